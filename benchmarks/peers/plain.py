"""Keras alone: no perturbation anywhere."""

from peers import keras_networks, keras_tasks


def step(job):
    base = keras_networks.load(job)
    return keras_tasks.training_task(keras_tasks.compiled(base), base, *job.data())


def evaluate(job):
    base = keras_networks.load(job)
    model, data = keras_tasks.compiled(base), job.data(job.examples)
    return keras_tasks.inference_task(model.evaluate, base, job.batch, *data)


def predict(job):
    base = keras_networks.load(job)
    model, (x, _) = keras_tasks.compiled(base), job.data(job.examples)
    return keras_tasks.inference_task(model.predict, base, job.batch, x)


def first_step(job):
    base = keras_networks.load(job)
    return keras_tasks.first_step_task(lambda base: base, base, job.batch, *job.data())
