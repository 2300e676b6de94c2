# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "tensorflow==2.21.0", "keras==3.15.1", "numpy==2.4.6", "cleverhans==4.0.0",
# ]
# ///
"""CleverHans 4, on its TensorFlow 2."""

import keras_side
import numpy as np
import tensorflow as tf
from cleverhans.tf2.attacks import projected_gradient_descent as pgd
from side import CLIP, in_batches, serve


def attack(job):
    base, (x, y) = keras_side.load(job), job.data()
    steps = {"eps": job.epsilon, "eps_iter": job.step_size, "nb_iter": job.iterations}
    start = {"rand_init": True, "rand_minmax": job.epsilon, "sanity_checks": False}
    options = {**steps, **start, "clip_min": CLIP[0], "clip_max": CLIP[1]}

    def turn():
        model = keras_side.fresh_copy(base)  # It compiles the gradient of each.

        def one_batch(x, y):
            x, y = tf.constant(x), tf.constant(y)
            return pgd.projected_gradient_descent(model, x, norm=np.inf, y=y, **options)

        return lambda count: in_batches(one_batch, job, x[:count], y[:count])

    return turn, keras_side.logits_of(base)


serve({"cleverhans": {"attack": attack}})
