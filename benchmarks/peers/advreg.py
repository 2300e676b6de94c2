"""advreg, as its README says to use it."""

import keras

import advreg
from advreg import attacks
from peers import keras_networks, keras_tasks
from peers.job import CLIP, MULTIPLIER, Task

RANGE = {"clip_value_min": CLIP[0], "clip_value_max": CLIP[1]}


def wrapped(base, job):
    """The model that is trained instead of a network."""
    config = advreg.make_adv_reg_config(
        multiplier=MULTIPLIER,
        adv_step_size=job.step_size,
        adv_grad_norm="infinity",
        pgd_iterations=job.iterations,
        pgd_epsilon=None if job.iterations == 1 else job.epsilon,
        **RANGE,
    )
    return advreg.AdversarialRegularization(base, config)


def step(job):
    base = keras_networks.load(job)
    model = keras_tasks.compiled(wrapped(base, job))
    return keras_tasks.training_task(model, base, *job.data())


def evaluate(job):
    base = keras_networks.load(job)
    model, data = keras_tasks.compiled(wrapped(base, job)), job.data(job.examples)
    return keras_tasks.inference_task(model.evaluate, base, job.batch, *data)


def predict(job):
    base = keras_networks.load(job)
    model, (x, _) = keras_tasks.compiled(wrapped(base, job)), job.data(job.examples)
    return keras_tasks.inference_task(model.predict, base, job.batch, x)


def first_step(job):
    base = keras_networks.load(job)
    return keras_tasks.first_step_task(
        lambda base: wrapped(base, job), base, job.batch, *job.data()
    )


def attack(job, early_stop=True):
    base, (x, y) = keras_networks.load(job), job.data(job.examples)

    def made():
        if job.attack == "autoattack":
            return attacks.AutoAttack(job.epsilon, **RANGE)
        steps = {"step_size": job.step_size, "iterations": job.iterations}
        return attacks.PGD(job.epsilon, **steps, **RANGE)

    def turn():
        model = keras.models.clone_model(base)  # For which nothing is compiled yet.
        model.set_weights(base.get_weights())
        options = {"batch_size": job.batch, "early_stop": early_stop}
        return lambda count: made()(model, x[:count], y[:count], **options)

    return Task(turn, keras_tasks.logits_of(base))
