"""advreg as its README says to use it, Keras alone, and a loop written by hand."""

import keras
import keras_side
import tensorflow as tf
from side import CLIP, MULTIPLIER, serve

import advreg
from advreg import attacks

RANGE = {"clip_value_min": CLIP[0], "clip_value_max": CLIP[1]}


def wrapped(base, job):
    """Returns the model that is trained instead of a network."""
    config = advreg.make_adv_reg_config(MULTIPLIER, **job.adversary(), **RANGE)
    return advreg.AdversarialRegularization(base, config)


def attack(job, early_stop=True):
    base, (x, y) = keras_side.load(job), job.data()
    options = {"batch_size": job.batch, "early_stop": early_stop}
    if job.attack == "autoattack":
        made = attacks.AutoAttack(job.epsilon, **RANGE)
    else:
        steps = {"step_size": job.step_size, "iterations": job.iterations}
        made = attacks.PGD(job.epsilon, **steps, **RANGE)

    def turn():
        model = keras_side.fresh_copy(base)
        return lambda count: made(model, x[:count], y[:count], **options)

    return turn, keras_side.logits_of(base)


def attack_all_steps(job):
    """Takes every step of every example."""
    return attack(job, early_stop=False)


def loop(job):
    base = keras_side.load(job)
    run = keras_side.repeated(minimal_step(base, job), *job.data())
    return lambda: run, keras_side.logits_of(base)


def minimal_step(model, job):
    """Two passes, the attack between them, one update, the metrics of `fit`."""
    optimizer = keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)
    loss_fn = keras_side.cross_entropy()
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


SIDES = {
    "advreg": {**keras_side.kinds(wrapped), "attack": attack},
    "advreg_all_steps": {"attack": attack_all_steps},
    "plain": keras_side.kinds(),
    "loop": {"step": loop},
}

if __name__ == "__main__":
    serve(SIDES)
