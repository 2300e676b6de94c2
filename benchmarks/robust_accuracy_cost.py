"""Measures what robust accuracy during `fit` costs.

Prints the median ratio of the time of one measurement by `RobustAccuracy`, with PGD-10
on 1,000 test images of MNIST, to that of a hand-written `tf.function` that makes ten
forward and backward passes over the same images in batches of the same size, and
nothing else. The two sides take turns in one run.

    python benchmarks/robust_accuracy_cost.py [--quick]

Images that the attack has fooled drop out, and those of a plain network do so after a
few steps. So there are two networks, trained on 10,000 images: a plain one, and one
regularised by PGD, on which most images stay to the end: the honest comparison.
"""

import argparse
import functools
import os
from statistics import median

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from keras_side import build, compiled, cross_entropy
from turns import seconds, table, take_turns

import advreg
from advreg import datasets
from advreg.attacks import PGD
from advreg.callbacks import RobustAccuracy

ITERATIONS, RADIUS = 10, 0.1
RANGE = {"clip_value_min": 0.0, "clip_value_max": 1.0}


def plain(x, y):
    keras.utils.set_random_seed(0)
    model = compiled(build("mnist"))
    model.fit(x, y, verbose=0)
    return model


def robust(x, y):
    model = plain(x, y)
    steps = {"adv_step_size": RADIUS / 2, "pgd_iterations": 3, "pgd_epsilon": RADIUS}
    steps |= {"adv_grad_norm": "infinity", **RANGE}
    config = advreg.make_adv_reg_config(1.0, **steps)
    compiled(advreg.AdversarialRegularization(model, config)).fit(x, y, verbose=0)
    return model


def passes(model, x, y, batch):
    """Returns a function of ten passes over the images, to their gradient alone."""
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

    return lambda: np.asarray([ten(*part) for part in batches][-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images, one turn")
    quick = parser.parse_args().quick
    turns, images, training = (1, 64, 256) if quick else (20, 1000, 10_000)
    data = datasets.load("mnist")
    x, y = data.x_test[:images], data.y_test[:images]
    attack, rows = PGD(RADIUS, iterations=ITERATIONS, **RANGE), []
    for make in (plain, robust):
        model = make(data.x_train[:training], data.y_train[:training])
        for batch in (32,) if quick else (32, 256):
            callback = RobustAccuracy(attack, (x, y), batch_size=batch)
            callback.set_model(model)
            runs = {"loop": passes(model, x, y, batch), "advreg": callback.measure}
            sides = {
                side: functools.partial(seconds, run) for side, run in runs.items()
            }
            # Tracing and warming up stay out.
            loop, own = take_turns(sides, turns, warm=1).values()
            ratio = median(a / b for a, b in zip(own, loop, strict=True))
            (standing,) = callback.measure().values()
            ms = [f"{median(side) * 1e3:.0f}" for side in (loop, own)]
            rows.append([make.__name__, batch, f"{standing:.3f}", *ms, f"{ratio:.2f}"])
    head = ["network", "batch", "standing", "passes ms", "advreg ms", "ratio"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
