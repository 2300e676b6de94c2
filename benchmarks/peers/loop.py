"""A hand-written `tf.function` that does advreg's arithmetic and nothing else."""

import keras
import tensorflow as tf

from peers import keras_networks, keras_tasks
from peers.job import CLIP, MULTIPLIER


def step(job):
    base = keras_networks.load(job)
    return keras_tasks.step_task(minimal_step(base, job), base, *job.data())


def minimal_step(model, job):
    """Two passes, the attack between them, one update, the metrics of `fit`."""
    optimizer = keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)
    loss_fn = keras_tasks.cross_entropy()
    loss_mean = keras.metrics.Mean()
    accuracy = keras.metrics.SparseCategoricalAccuracy()

    def attack(x, y, gradient):
        x_adv = x + job.step_size * tf.sign(gradient)
        x_adv = tf.clip_by_value(x_adv, *CLIP)
        for _ in range(job.iterations - 1):
            # Moving averages see the clean and the perturbed examples, and no others.
            with (
                keras.StatelessScope(),
                tf.GradientTape(watch_accessed_variables=False) as tape,
            ):
                tape.watch(x_adv)
                loss = loss_fn(y, model(x_adv, training=True))
            x_adv += job.step_size * tf.sign(tape.gradient(loss, x_adv))
            x_adv = tf.clip_by_value(x_adv, x - job.epsilon, x + job.epsilon)
            x_adv = tf.clip_by_value(x_adv, *CLIP)
        return x_adv

    @tf.function
    def step(iterator):
        x, y = iterator.get_next()
        weights = model.trainable_variables
        with tf.GradientTape() as tape:
            tape.watch(x)
            logits = model(x, training=True)
            loss = loss_fn(y, logits)
        *gradients, input_gradient = tape.gradient(loss, [*weights, x])
        x_adv = attack(x, y, input_gradient)
        with tf.GradientTape() as tape:
            adv_loss = MULTIPLIER * loss_fn(y, model(x_adv, training=True))
        adv_gradients = tape.gradient(adv_loss, weights)
        gradients = [a + b for a, b in zip(gradients, adv_gradients, strict=True)]
        optimizer.apply_gradients(zip(gradients, weights, strict=True))
        loss_mean.update_state(loss + adv_loss)
        accuracy.update_state(y, logits)
        return loss_mean.result(), accuracy.result()

    return step
