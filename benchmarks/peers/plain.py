"""Keras alone: no perturbation anywhere."""

from peers import keras_networks, keras_tasks


def step(job):
    base = keras_networks.load(job)
    return keras_tasks.training_task(keras_tasks.compiled(base), base, *job.data())


def evaluate(job):
    base = keras_networks.load(job)
    model, data = keras_tasks.compiled(base), job.data(job.examples)
    return keras_tasks.evaluation_task(model, base, job.batch, *data)


def first_step(job):
    return keras_tasks.first_step_task(lambda base: base, keras_networks.load(job), job)
