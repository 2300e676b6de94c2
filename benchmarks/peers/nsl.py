"""Neural Structured Learning 1.4.0, on Keras 2.

Its `evaluate` runs the attack, so that the configuration counts there too.
"""

import neural_structured_learning as nsl

from peers import keras_networks, keras_tasks
from peers.job import CLIP, MULTIPLIER


def wrapped(base, job):
    config = nsl.configs.make_adv_reg_config(
        multiplier=MULTIPLIER,
        adv_step_size=job.step_size,
        adv_grad_norm="infinity",
        pgd_iterations=job.iterations,
        pgd_epsilon=None if job.iterations == 1 else job.epsilon,
        # For a dictionary of features NSL ignores a range that is a scalar.
        clip_value_min={"image": CLIP[0]},
        clip_value_max={"image": CLIP[1]},
    )
    return nsl.keras.AdversarialRegularization(
        base, label_keys=["label"], adv_config=config
    )


def dictionary(x, y):
    return {"image": x, "label": y}


def step(job):
    base = keras_networks.load(job)
    model = keras_tasks.compiled(wrapped(base, job))
    return keras_tasks.training_task(model, base, dictionary(*job.data()))


def evaluate(job):
    base = keras_networks.load(job)
    model = keras_tasks.compiled(wrapped(base, job))
    data = dictionary(*job.data(job.examples))
    return keras_tasks.inference_task(model.evaluate, base, job.batch, data)


def first_step(job):
    base = keras_networks.load(job)
    return keras_tasks.first_step_task(
        lambda base: wrapped(base, job), base, job.batch, dictionary(*job.data())
    )
