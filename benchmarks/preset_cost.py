"""Measures what a training step of each preset costs.

Prints the ratio of the median training step of each preset to the plain Keras step of
the same network, that of NSL's tutorial. For presets that move the weights as well it
also prints the ratio to the same preset without that. All sides take turns in one run.

    python benchmarks/preset_cost.py [--quick]
"""

import argparse
import os
import statistics

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras_side import build, compiled, steps_of
from turns import ratio, seconds, table, take_turns

import advreg
from advreg import AdvRegConfig

STEPS = 2  # Of a turn.


def presets(n):
    """Returns the presets by name, with so many iterations."""
    pgd, trades = AdvRegConfig.pgd, AdvRegConfig.trades
    mart, pairing = AdvRegConfig.mart, AdvRegConfig.logit_pairing
    moving, alone = {"weight_perturbation": 0.01}, {"clean_weight": 0.0}
    return {
        "fgsm": AdvRegConfig.fgsm(0.1),
        "fast": AdvRegConfig.fast(0.1),
        "fast, clean_weight 0": AdvRegConfig.fast(0.1, **alone),
        "n_fgsm": AdvRegConfig.n_fgsm(0.1),
        f"pgd-{n}": pgd(0.1, iterations=n),
        f"pgd-{n}, clean_weight 0": pgd(0.1, iterations=n, **alone),
        f"trades-{n}": trades(0.1, iterations=n),
        f"mart-{n}": mart(0.1, iterations=n),
        f"logit_pairing-{n}": pairing(0.1, iterations=n),
        "virtual_adversarial": AdvRegConfig.virtual_adversarial(1.0),
        "fgsm + awp": AdvRegConfig.fgsm(0.1, **moving),
        f"trades-{n} + awp": trades(0.1, iterations=n, **moving),
    }


def side(config, data):
    """Returns a function that times steps of training; without a config, plain ones."""
    keras.utils.set_random_seed(0)
    base = build("mnist")
    model = base if config is None else advreg.AdversarialRegularization(base, config)
    run = steps_of(compiled(model), *data)
    return lambda: seconds(run, STEPS) / STEPS * 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three presets, one turn")
    quick = parser.parse_args().quick
    turns, batch, iterations = (1, 2, 2) if quick else (20, 128, 10)
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(batch, 28, 28, 1)).astype("float32")
    data = x, rng.integers(0, 10, batch)
    configs = {"plain": None, **presets(iterations)}
    if quick:
        configs = {name: configs[name] for name in ("plain", "fgsm", "fgsm + awp")}
    sides = {name: side(config, data) for name, config in configs.items()}
    # Tracing, compiling and warming up stay out.
    times, rows = take_turns(sides, turns, warm=1 if quick else 3), []
    for name, own in times.items():
        row = [name, f"{statistics.median(own):.1f}"]
        for other in ("plain", name.removesuffix(" + awp")):
            row.append("" if other == name else f"{ratio(own, times[other])[1]:.2f}")
        rows.append(row)
    print(table(["preset", "ms", "/ plain Keras", "/ without awp"], rows))


if __name__ == "__main__":
    main()
