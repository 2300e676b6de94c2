# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "tensorflow==2.21.0", "keras==3.15.1", "numpy==2.4.6", "foolbox==3.3.4",
# ]
# ///
"""Foolbox 3.3, on TensorFlow."""

import keras_side
import tensorflow as tf
from foolbox import TensorFlowModel
from foolbox.attacks import LinfPGD
from side import CLIP, in_batches, serve


def attack(job):
    base, (x, y) = keras_side.load(job), job.data()
    steps = {"abs_stepsize": job.step_size, "steps": job.iterations}

    def run(count):
        model = TensorFlowModel(base, bounds=CLIP)
        pgd = LinfPGD(**steps, random_start=True)

        def one_batch(x, y):
            x, y = tf.constant(x), tf.constant(y)
            return pgd(model, x, y, epsilons=job.epsilon)[1]

        return in_batches(one_batch, job, x[:count], y[:count])

    return lambda: run, keras_side.logits_of(base)


serve({"foolbox": {"attack": attack}})
