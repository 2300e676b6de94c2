"""What a training step of each preset costs.

Prints the ratio of the median training step of each preset to the plain Keras step of
the same network, that of NSL's tutorial, and for those that move the weights as well
the ratio to the same preset without that. All sides take turns in one run.

    python benchmarks/preset_cost.py [--turns 20] [--batch 128] [--iterations 10]
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from comparison.measuring import order
from comparison.ratios import ratio
from peers.keras_tasks import compiled, training_task

import advreg
from advreg import AdvRegConfig
from advreg.demo import mnist_network
from advreg.tables import text_table

STEPS = 2  # Of a turn.


def presets(iterations):
    """The presets, by name."""
    return {
        "fgsm": AdvRegConfig.fgsm(0.1),
        "fast": AdvRegConfig.fast(0.1),
        "fast, clean_weight 0": AdvRegConfig.fast(0.1, clean_weight=0.0),
        "n_fgsm": AdvRegConfig.n_fgsm(0.1),
        f"pgd-{iterations}": AdvRegConfig.pgd(0.1, iterations),
        f"pgd-{iterations}, clean_weight 0": AdvRegConfig.pgd(
            0.1, iterations, clean_weight=0.0
        ),
        f"trades-{iterations}": AdvRegConfig.trades(0.1, iterations=iterations),
        f"mart-{iterations}": AdvRegConfig.mart(0.1, iterations=iterations),
        f"logit_pairing-{iterations}": AdvRegConfig.logit_pairing(
            0.1, iterations=iterations
        ),
        "virtual_adversarial": AdvRegConfig.virtual_adversarial(1.0),
        "fgsm + awp": AdvRegConfig.fgsm(0.1, weight_perturbation=0.01),
        f"trades-{iterations} + awp": AdvRegConfig.trades(
            0.1, iterations=iterations, weight_perturbation=0.01
        ),
    }


def steps_of(config, data):
    """A function that makes so many steps of training; without a config, plain ones."""
    keras.utils.set_random_seed(0)
    base = mnist_network((28, 28, 1), 10)
    model = base if config is None else advreg.AdversarialRegularization(base, config)
    return training_task(compiled(model), base, *data).turn()


def measure(sides, turns):
    """Milliseconds per step of each side in each turn."""
    times = {name: [] for name in sides}
    for turn in range(-3, turns):  # Tracing, compiling and warming up stay out.
        for name in order(sides, turn):
            start = time.perf_counter()
            sides[name](STEPS)
            if turn >= 0:
                times[name].append((time.perf_counter() - start) / STEPS * 1e3)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=10)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    data = (
        rng.uniform(size=(args.batch, 28, 28, 1)).astype("float32"),
        rng.integers(0, 10, args.batch),
    )
    configs = {"plain": None, **presets(args.iterations)}
    sides = {name: steps_of(config, data) for name, config in configs.items()}
    times = measure(sides, args.turns)
    rows = []
    for name, values in times.items():
        row = [name, f"{statistics.median(values):.1f}"]
        alone = name.removesuffix(" + awp")
        for reference in ("plain", alone if alone != name else None):
            if reference is None:
                row.append("")
            else:
                row.append(f"{ratio(values, times[reference])[1]:.2f}")
        rows.append(row)
    head = ("preset", "ms", "/ plain Keras", "/ without awp")
    print(text_table(head, rows))


if __name__ == "__main__":
    main()
