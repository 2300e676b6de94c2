"""CleverHans 4, on its TensorFlow 2."""

import keras
import numpy as np
import tensorflow as tf
from cleverhans.tf2.attacks.projected_gradient_descent import (
    projected_gradient_descent,
)

from peers import keras_networks, keras_tasks
from peers.job import CLIP, Task


def attack(job):
    base, (x, y) = keras_networks.load(job), job.data(job.examples)

    def turn():
        model = keras.models.clone_model(base)  # It compiles the gradient of each.
        model.set_weights(base.get_weights())

        def run(count):
            parts = []
            for start in range(0, count, job.batch):
                part = slice(start, min(start + job.batch, count))
                x_adv = projected_gradient_descent(
                    model,
                    tf.constant(x[part]),
                    eps=job.epsilon,
                    eps_iter=job.step_size,
                    nb_iter=job.iterations,
                    norm=np.inf,
                    clip_min=CLIP[0],
                    clip_max=CLIP[1],
                    y=tf.constant(y[part]),
                    rand_init=True,
                    rand_minmax=job.epsilon,
                    sanity_checks=False,
                )
                parts.append(x_adv.numpy())
            return np.concatenate(parts)

        return run

    return Task(turn, keras_tasks.logits_of(base))
