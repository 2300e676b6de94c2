"""Trains every preset with one budget, and prints how robust the networks are.

MNIST with the network of NSL's tutorial (93,322 parameters), ten epochs at most, Adam
with a learning rate that rises and falls once; the last 5,000 training images are held
out, and no test image is looked at before the end. Each row is measured on the first
1,000 test images, white-box: PGD-40 with 5 restarts, and AutoAttack.

    python benchmarks/robustness_table.py [--only fast@0.3 ...] [--seeds 0 1 2]
    python benchmarks/robustness_table.py --print     # what is there
    python benchmarks/robustness_table.py --held-out  # to choose by, kept nowhere

All of it takes hours on two cores. Every finished row is kept in
`benchmarks/robustness_table.json`, and a run goes on where the last one stopped.
"""

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

import advreg
from advreg import AdvRegConfig, datasets
from advreg.attacks import PGD, AutoAttack
from advreg.demo import mnist_network
from advreg.tables import text_table

RESULTS = Path(__file__).with_suffix(".json")
BATCH, TRAINING, TESTED = 128, 55_000, 1_000
RANGE = {"clip_value_min": 0.0, "clip_value_max": 1.0}
Schedules = keras.optimizers.schedules


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A preset, and how it is trained.

    Args:
        config: Makes the configuration for a radius and a number of steps.
        epochs: Passes over the training images.
        peak: The largest learning rate.
        average: Momentum of the average of the weights, 0 for none.
    """

    config: Callable[[float, int], AdvRegConfig | None]
    epochs: int = 10
    peak: float = 2e-3
    average: float = 0.0


def ramp(value, steps):
    """From 0 to the value over a number of steps."""
    return Schedules.PolynomialDecay(0.0, steps, value)


RECIPES: dict[str, Recipe] = {
    "plain": Recipe(lambda e, n: AdvRegConfig(multiplier=0.0)),
    "nsl": Recipe(
        lambda e, n: advreg.make_adv_reg_config(
            multiplier=0.2, adv_step_size=0.2, adv_grad_norm="infinity"
        ),
        epochs=5,
    ),
    "fgsm": Recipe(lambda e, n: AdvRegConfig.fgsm(e, **RANGE)),
    "fast": Recipe(lambda e, n: AdvRegConfig.fast(e, **RANGE)),
    "n_fgsm": Recipe(lambda e, n: AdvRegConfig.n_fgsm(e, **RANGE)),
    "pgd": Recipe(lambda e, n: AdvRegConfig.pgd(e, 10, **RANGE)),
    "madry": Recipe(
        lambda e, n: AdvRegConfig.pgd(ramp(e, n // 2), 10, clean_weight=0.0, **RANGE)
    ),
    "trades": Recipe(lambda e, n: AdvRegConfig.trades(e, 6.0, 10, **RANGE)),
    "mart": Recipe(lambda e, n: AdvRegConfig.mart(e, 5.0, 10, **RANGE)),
}


def rows_wanted(only, seeds):
    """The rows of the table: a recipe, a radius and a seed each."""
    rows = []
    for radius in (0.1, 0.2, 0.3):
        for name in RECIPES:
            if only and f"{name}@{radius}" not in only:
                continue
            if name in ("plain", "nsl") and radius != 0.2 and not only:
                continue
            many = name in ("fgsm", "fast", "n_fgsm")
            rows += [(name, radius, seed) for seed in (seeds if many else seeds[:1])]
    return rows


def train(recipe, radius, seed, data, quiet=False):
    """Trains a network on all but the held-out images, and returns it with its cost."""
    keras.utils.set_random_seed(seed)
    steps = recipe.epochs * (TRAINING // BATCH)
    network = mnist_network((28, 28, 1), 10)
    model = advreg.AdversarialRegularization(network, recipe.config(radius, steps))
    rate = Schedules.CosineDecay(
        recipe.peak / 25,
        steps - steps // 5,
        warmup_target=recipe.peak,
        warmup_steps=steps // 5,
    )
    optimizer = keras.optimizers.Adam(
        rate, use_ema=recipe.average > 0, ema_momentum=recipe.average or 0.99
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    begin = time.perf_counter()
    model.fit(
        data.x_train[:TRAINING],
        data.y_train[:TRAINING],
        batch_size=BATCH,
        epochs=recipe.epochs,
        verbose=0 if quiet else 2,
    )
    if recipe.average:
        optimizer.finalize_variable_values(model.trainable_variables)
    return network, time.perf_counter() - begin


def measure(network, radius, x, y, held_out=False):
    """Accuracies in percent: clean, PGD-40 with 5 restarts, and AutoAttack."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(loss=loss, metrics=["accuracy"])
    pgd = PGD(radius, iterations=40, restarts=1 if held_out else 5, **RANGE)
    attacks = [pgd] if held_out else [pgd, AutoAttack(radius, **RANGE)]
    return advreg.evaluate_robustness(
        network, x, y, attacks=attacks, batch_size=250, verbose=0
    )


def row_of(name, radius, seed, data, args):
    """Trains and measures one row."""
    recipe = RECIPES[name]
    network, seconds = train(recipe, radius, seed, data, args.quiet)
    if args.held_out:
        x, y = data.x_train[TRAINING:], data.y_train[TRAINING:]
    else:
        x, y = data.x_test, data.y_test
    clean = np.mean(network.predict(x, 500, verbose=0).argmax(1) == y)
    report = measure(network, radius, x[:TESTED], y[:TESTED], args.held_out)
    row = {"preset": name, "epsilon": radius, "seed": seed, "clean": float(clean)}
    for result in report.results:
        row[result.name] = result.accuracy
    row["worst"] = report.robust_accuracy
    row["warnings"] = [check.name for check in report.checks if check.passed is False]
    row["seconds"] = round(seconds, 1)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="PRESET@EPSILON")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--held-out",
        action="store_true",
        help="measure on training "
        "images that were held out, by PGD-40 alone, and keep nothing",
    )
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--print", action="store_true", help="print what is there")
    args = parser.parse_args()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    done = {(row["preset"], row["epsilon"], row["seed"]) for row in kept}
    if not args.print:
        data = datasets.load("mnist")
        for key in rows_wanted(args.only, args.seeds):
            if key in done and not args.held_out:
                continue
            row = row_of(*key, data, args)
            print(row, flush=True)
            if not args.held_out:
                kept.append(row)
                RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    head = ("preset", "epsilon", "seed", "clean", "PGD-40", "AutoAttack", "minutes")
    rows = [
        (
            row["preset"],
            f"{row['epsilon']:g}",
            str(row["seed"]),
            *(f"{100 * row[name]:.1f}" for name in ("clean", "PGD-40", "AutoAttack")),
            f"{row['seconds'] / 60:.1f}",
        )
        for row in kept
    ]
    print(text_table(head, rows))


if __name__ == "__main__":
    main()
