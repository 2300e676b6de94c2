"""What `evaluate` and `predict` of a wrapped model cost.

Prints the median ratio of the wrapped model's time to that of its own base model, the
network of the MNIST tutorial, on 4,096 images. The two sides take turns in one run.

    python benchmarks/inference_cost.py [--turns 20] [--batch 32 256]
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

import advreg
from advreg.demo import mnist_network


def seconds(model, method, data, batch):
    start = time.perf_counter()
    getattr(model, method)(*data, batch_size=batch, verbose=0)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--images", type=int, default=4096)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(arguments.images, 28, 28, 1)).astype("float32")
    y = rng.integers(0, 10, arguments.images)
    base = mnist_network((28, 28, 1), 10)
    # An attack that would cost ten passes, if `evaluate` ran it.
    config = advreg.make_adv_reg_config(adv_step_size=0.1, pgd_iterations=10)
    model = advreg.AdversarialRegularization(base, config)
    for side in (base, model):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        side.compile("adam", loss, metrics=["accuracy"])

    print(f"{'method':9} {'batch':>5} {'base ms':>8} {'advreg ms':>9} {'ratio':>6}")
    for method, data in (("evaluate", (x, y)), ("predict", (x,))):
        for batch in arguments.batch:
            for side in (base, model):  # Tracing and warming up stay out.
                seconds(side, method, data, batch)
            turns = [
                [seconds(side, method, data, batch) * 1e3 for side in (base, model)]
                for _ in range(arguments.turns)
            ]
            plain, wrapped = (
                statistics.median(side) for side in zip(*turns, strict=True)
            )
            ratio = statistics.median(b / a for a, b in turns)
            print(f"{method:9} {batch:5} {plain:8.0f} {wrapped:9.0f} {ratio:6.2f}")


if __name__ == "__main__":
    main()
