"""Foolbox 3.3, on TensorFlow."""

import numpy as np
import tensorflow as tf
from foolbox import TensorFlowModel
from foolbox.attacks import LinfPGD

from peers import keras_networks, keras_tasks
from peers.job import CLIP, Task


def attack(job):
    base, (x, y) = keras_networks.load(job), job.data(job.examples)

    def run(count):
        model = TensorFlowModel(base, bounds=CLIP)
        pgd = LinfPGD(
            abs_stepsize=job.step_size, steps=job.iterations, random_start=True
        )
        parts = []
        for start in range(0, count, job.batch):
            part = slice(start, min(start + job.batch, count))
            images, labels = tf.constant(x[part]), tf.constant(y[part])
            _, x_adv, _ = pgd(model, images, labels, epsilons=job.epsilon)
            parts.append(x_adv.numpy())
        return np.concatenate(parts)

    return Task(lambda: run, keras_tasks.logits_of(base))
