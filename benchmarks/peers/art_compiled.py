"""ART's trainers with a training step that is compiled once, by the user."""

import keras
import tensorflow as tf

from peers import art, keras_tasks


def step(job):
    loss_fn, optimizer = keras_tasks.cross_entropy(), keras.optimizers.Adam()

    @tf.function
    def train_step(model, images, labels):
        with tf.GradientTape() as tape:
            loss = loss_fn(labels, model(images, training=True))
        weights = model.trainable_variables
        gradients = tape.gradient(loss, weights)
        optimizer.apply_gradients(zip(gradients, weights, strict=True))

    return art.step(job, train_step)
