"""What the sides on Keras share, NSL's on Keras 2 among them."""

import keras
import numpy as np
import tensorflow as tf

from peers.job import Task


def cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def compiled(model):
    model.compile("adam", cross_entropy(), metrics=["accuracy"])
    return model


def logits_of(model):
    return lambda x: np.asarray(model(x, training=False))


def step_task(step, base, *data):
    """Steps of a function of an iterator, which goes over one batch for ever."""
    iterator = iter(tf.data.Dataset.from_tensors(data).repeat())

    def run(steps):
        for _ in range(steps):
            logs = step(iterator)
        tf.nest.map_structure(np.asarray, logs)  # Waits for the last step.

    return Task(lambda: run, logits_of(base))


def training_task(model, base, *data):
    """The training step of a compiled model, as its `fit` calls it."""
    model.make_train_function()
    # Keras 2 has a counter besides, and makes its function anew where there is none.
    return step_task(lambda iterator: model.train_function(iterator), base, *data)


def inference_task(method, base, batch, *data):
    """`evaluate` or `predict` of a compiled model, on the first examples."""

    def run(count):
        part = tf.nest.map_structure(lambda array: array[:count], data)
        method(*part, batch_size=batch, verbose=0)

    return Task(lambda: run, logits_of(base))


def first_step_task(wrap, base, batch, *data):
    """The first step of `fit`: compiling, tracing, and the step.

    Args:
        wrap: Function from the network to the model that is trained.
        base: The network.
        batch: Number of examples in the data.
        *data: What `fit` takes.
    """

    def run(_):
        compiled(wrap(base)).fit(*data, batch_size=batch, verbose=0)

    return Task(lambda: run, logits_of(base))
