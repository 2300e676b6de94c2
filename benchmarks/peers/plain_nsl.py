"""Keras alone where NSL is: what of NSL's time is that of its Keras and TensorFlow."""

from peers import plain

step, evaluate, first_step = plain.step, plain.evaluate, plain.first_step
