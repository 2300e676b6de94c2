"""What robust accuracy during `fit` costs.

Prints the median ratio of the time of one measurement by `RobustAccuracy`, with PGD-10
on 1,000 test images of MNIST, to that of a hand-written `tf.function` that makes ten
forward and backward passes over the same images in batches of the same size, and
nothing else. The two sides take turns in one run.

    python benchmarks/robust_accuracy_cost.py [--turns 20] [--batch 32 256]

Images that the attack has fooled drop out, and those of the plain network do so after a
few steps. So there are two networks, trained on 10,000 images for an epoch or two: a
plain one, and one regularised by PGD, on which most images stay to the end. That one
is the honest comparison.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import advreg
from advreg import datasets
from advreg.attacks import PGD
from advreg.callbacks import RobustAccuracy
from advreg.demo import mnist_network

ITERATIONS, RADIUS = 10, 0.1


def cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def plain(data, images):
    keras.utils.set_random_seed(0)
    model = mnist_network((28, 28, 1), 10)
    model.compile("adam", cross_entropy())
    model.fit(data.x_train[:images], data.y_train[:images], verbose=0)
    return model


def robust(data, images):
    model = plain(data, images)
    config = advreg.make_adv_reg_config(
        multiplier=1.0,
        adv_step_size=RADIUS / 2,
        adv_grad_norm="infinity",
        pgd_iterations=3,
        pgd_epsilon=RADIUS,
        clip_value_min=0.0,
        clip_value_max=1.0,
    )
    wrapped = advreg.AdversarialRegularization(model, config)
    wrapped.compile("adam", cross_entropy())
    wrapped.fit(data.x_train[:images], data.y_train[:images], verbose=0)
    return model


def passes(model, x, y, batch):
    """Ten forward and backward passes over the images, to their gradient alone."""
    loss_fn = cross_entropy()
    batches = list(tf.data.Dataset.from_tensor_slices((x, y)).batch(batch))

    @tf.function
    def ten(x, y):
        for _ in range(ITERATIONS):
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(x)
                loss = loss_fn(y, model(x, training=False))
            # Each pass needs what the one before gave, lest they become one.
            x += 1e-6 * tf.sign(tape.gradient(loss, x))
        return x

    def run():
        for part in batches:
            result = ten(*part)
        return np.asarray(result)

    return run


def seconds(side):
    start = time.perf_counter()
    side()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--training-images", type=int, default=10_000)
    arguments = parser.parse_args()
    data = datasets.load("mnist")
    x, y = data.x_test[: arguments.images], data.y_test[: arguments.images]
    attack = PGD(RADIUS, iterations=ITERATIONS, clip_value_min=0.0, clip_value_max=1.0)
    print(
        f"{'network':8} {'batch':>5} {'standing':>8} {'passes ms':>9} {'advreg ms':>9}"
        f" {'ratio':>6}"
    )
    for make in (plain, robust):
        model = make(data, arguments.training_images)
        for batch in arguments.batch:
            callback = RobustAccuracy(attack, (x, y), batch_size=batch)
            callback.set_model(model)
            sides = (passes(model, x, y, batch), callback.measure)
            for side in sides:  # Tracing and warming up stay out.
                side()
            (standing,) = callback.measure().values()
            turns = [
                [seconds(side) * 1e3 for side in sides] for _ in range(arguments.turns)
            ]
            loop, advreg_ = (
                statistics.median(side) for side in zip(*turns, strict=True)
            )
            ratio = statistics.median(b / a for a, b in turns)
            print(
                f"{make.__name__:8} {batch:5} {standing:8.3f} {loop:9.0f} "
                f"{advreg_:9.0f} {ratio:6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
