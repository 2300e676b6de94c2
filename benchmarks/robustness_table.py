"""Trains every preset with one budget, and prints how robust the networks are.

MNIST with the network of NSL's tutorial (93,322 parameters), ten epochs at most, Adam
with a learning rate that rises and falls once. Recipes were chosen on the last 5,000
training images, which nothing is trained on. Each network is measured on the first
1,000 test images, white-box: PGD-40 with 5 restarts, and AutoAttack.

    python benchmarks/robustness_table.py [--only fast@0.3 ...] [--seeds 0 1 2]
    python benchmarks/robustness_table.py --judge --only pgd@0.3   # ART's attacks, too
    python benchmarks/robustness_table.py --held-out  # to choose by, kept nowhere
    python benchmarks/robustness_table.py --print     # the rows that are there

All of it takes hours on two cores. Every finished row is kept in
`benchmarks/robustness_table.json`, every network in `benchmarks/networks`, and a run
goes on where the last one stopped. Several may run at once on different rows.
"""

import argparse
import dataclasses
import fcntl
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
from advreg.attacks import ART, PGD, AutoAttack
from advreg.demo import mnist_network
from advreg.schedules import times
from advreg.tables import text_table

ROWS = Path(__file__).with_suffix(".json")
NETWORKS = Path(__file__).with_name("networks")
BATCH, TRAINING, TESTED = 128, 55_000, 1_000
RADII = (0.1, 0.2, 0.3)
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
        seeds: How many seeds a full table has.
        fixed: Whether the configuration is the same for every radius.
    """

    config: Callable[[float, int], AdvRegConfig]
    epochs: int = 10
    peak: float = 5e-3
    average: float = 0.999
    seeds: int = 1
    fixed: bool = False


def ramp(value, steps):
    """From 0 to the value over a number of steps."""
    return Schedules.PolynomialDecay(0.0, steps, value)


def ramped(preset, **fields):
    """A preset whose radius grows, over the first half, to a tenth more than needed."""
    return lambda e, n: preset(ramp(1.1 * e, n // 2), **RANGE, **fields)


def single_step(preset, **fields):
    """A preset of single steps, which wants more weight, and no average of weights."""
    config = ramped(preset, multiplier=5.0, **fields)
    return Recipe(config, peak=4e-3, average=0.0, seeds=3)


def calm_n_fgsm(epsilon, **fields):
    """N-FGSM from noise of half a radius.

    Of two, its default, little is learnt at 0.3, and of one some seeds collapse.
    """
    return AdvRegConfig.n_fgsm(epsilon, init_radius=times(0.5, epsilon), **fields)


RECIPES = {
    "plain": Recipe(lambda e, n: AdvRegConfig(multiplier=0.0), fixed=True),
    "nsl": Recipe(
        lambda e, n: advreg.make_adv_reg_config(
            multiplier=0.2, adv_step_size=0.2, adv_grad_norm="infinity"
        ),
        fixed=True,
    ),
    "fgsm": single_step(AdvRegConfig.fgsm),
    "fast": single_step(AdvRegConfig.fast),
    "n_fgsm": single_step(calm_n_fgsm),
    "pgd": Recipe(ramped(AdvRegConfig.pgd)),
    "madry": Recipe(ramped(AdvRegConfig.pgd, clean_weight=0.0)),
    "trades": Recipe(ramped(AdvRegConfig.trades)),
    "mart": Recipe(ramped(AdvRegConfig.mart)),
    "logit_pairing": Recipe(ramped(AdvRegConfig.logit_pairing)),
    "virtual_adversarial": Recipe(
        ramped(AdvRegConfig.virtual_adversarial, adv_grad_norm="infinity")
    ),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table."""

    preset: str
    epsilon: float
    seed: int

    @property
    def network(self):
        """The name of the network that it is about."""
        radius = "" if RECIPES[self.preset].fixed else f"-{self.epsilon}"
        return f"{self.preset}{radius}-{self.seed}"


def rows_wanted(only, seeds):
    """The rows of the table that are asked for."""
    return [
        Row(name, radius, seed)
        for radius in RADII
        for name, recipe in RECIPES.items()
        for seed in (range(recipe.seeds) if seeds is None else seeds)
        if not only or f"{name}@{radius}" in only or name in only
    ]


def train(row, data, quiet=False):
    """Trains a network on all but the held-out images; returns it and the seconds."""
    recipe = RECIPES[row.preset]
    keras.utils.set_random_seed(row.seed)
    network = mnist_network((28, 28, 1), 10)
    steps = recipe.epochs * -(-TRAINING // BATCH)
    model = advreg.AdversarialRegularization(network, recipe.config(row.epsilon, steps))
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
    return network, time.perf_counter() - begin


def trained(row, data, quiet):
    """A network that is kept, or a new one, which is kept then; and the seconds."""
    weights = NETWORKS / f"{row.network}.weights.h5"
    seconds = NETWORKS / f"{row.network}.seconds"
    if seconds.exists():
        network = mnist_network((28, 28, 1), 10)
        network.load_weights(weights)
        return network, float(seconds.read_text())
    network, took = train(row, data, quiet)
    NETWORKS.mkdir(exist_ok=True)
    network.save_weights(weights)
    seconds.write_text(f"{took:.1f}\n")
    return network, took


def attacks_of_ours(radius):
    """PGD-40 with 5 restarts, and AutoAttack."""
    return [
        PGD(radius, iterations=40, restarts=5, **RANGE),
        AutoAttack(radius, **RANGE),
    ]


def attacks_of_art(radius):
    """The same by ART, whose AutoAttack with its own defaults takes hours."""
    ball = {"norm": "infinity", "eps": radius, **RANGE}
    ascent = {**ball, "eps_step": 2 * radius, "max_iter": 100, "nb_random_init": 1}
    pgd = {"eps_step": 2.5 * radius / 40, "max_iter": 40, "num_random_init": 5}
    parts = [
        ART("AutoProjectedGradientDescent", loss_type="cross_entropy", **ascent),
        ART(
            "AutoProjectedGradientDescent",
            loss_type="difference_logits_ratio",
            **ascent,
        ),
        ART("SquareAttack", max_iter=5000, nb_restarts=1, **ball),
    ]
    return [
        ART("ProjectedGradientDescent", **pgd, **ball),
        ART("AutoAttack", attacks=parts, eps_step=2 * radius, **ball),
    ]


def measure(network, attacks, x, y):
    """Accuracies under attacks, and the names of the checks that they did not pass."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(loss=loss, metrics=["accuracy"])
    report = advreg.evaluate_robustness(
        network, x, y, attacks=attacks, batch_size=250, verbose=0
    )
    doubts = [check.name for check in report.checks if check.passed is False]
    return {result.name: result.accuracy for result in report.results}, doubts


def finished(row, data, args):
    """The row with what was measured."""
    network, seconds = trained(row, data, args.quiet)
    x, y = data.x_test, data.y_test
    clean = np.mean(network.predict(x, 500, verbose=0).argmax(1) == y)
    found, doubts = measure(
        network, attacks_of_ours(row.epsilon), x[:TESTED], y[:TESTED]
    )
    return {
        **dataclasses.asdict(row),
        "clean": float(clean),
        **found,
        "warnings": doubts,
        "seconds": round(seconds, 1),
    }


def judged(row, data, args):
    """What ART's attacks find on the same network."""
    network, _ = trained(row, data, args.quiet)
    x, y = data.x_test[:TESTED], data.y_test[:TESTED]
    found, _ = measure(network, attacks_of_art(row.epsilon), x, y)
    return {**dataclasses.asdict(row), **found}


def held_out(row, data, args):
    """Accuracies on images that were held out, under PGD-40 without restarts."""
    network, seconds = train(row, data, args.quiet)
    x, y = data.x_train[TRAINING:], data.y_train[TRAINING:]
    clean = np.mean(network.predict(x, 500, verbose=0).argmax(1) == y)
    pgd = PGD(row.epsilon, iterations=40, **RANGE)
    found, doubts = measure(network, [pgd], x[:TESTED], y[:TESTED])
    print(
        f"{row.network}: clean {100 * clean:.1f}, held out "
        f"{100 * next(iter(found.values())):.1f} {doubts}, {seconds:.0f} s",
        flush=True,
    )


def key(row):
    """What tells rows apart."""
    return row["preset"], row["epsilon"], row["seed"]


def read():
    """The rows that are kept."""
    return json.loads(ROWS.read_text()) if ROWS.exists() else []


def keep(row):
    """Adds to what is kept of a row, while others may do the same."""
    with ROWS.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = {key(one): one for one in read()}
        rows[key(row)] = {**rows.get(key(row), {}), **row}
        new = ROWS.with_suffix(".new")
        ordered = sorted(rows.values(), key=order)
        new.write_text(json.dumps(ordered, indent=1) + "\n")
        new.replace(ROWS)


def order(row):
    """By radius, then as the recipes are listed."""
    return row["epsilon"], list(RECIPES).index(row["preset"]), row["seed"]


def table(rows):
    """The rows as text."""
    columns = {
        "PGD-40": "PGD-40 ×5",
        "AutoAttack": "AutoAttack",
        "ART's PGD-40": "ART ProjectedGradientDescent",
        "ART's AutoAttack": "ART AutoAttack",
    }
    columns = {
        head: name for head, name in columns.items() if any(name in row for row in rows)
    }
    return text_table(
        ("preset", "epsilon", "seed", "clean", *columns, "minutes"),
        [
            (
                row["preset"],
                f"{row['epsilon']:g}",
                str(row["seed"]),
                *(
                    f"{100 * row[name]:.1f}" if name in row else ""
                    for name in ("clean", *columns.values())
                ),
                f"{row['seconds'] / 60:.1f}",
            )
            for row in rows
        ],
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", metavar="PRESET[@EPSILON]", help="only these rows"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, help="by default those of each recipe"
    )
    parser.add_argument("--quiet", action="store_true", help="no line for each epoch")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--print", action="store_true", help="print what is there")
    what.add_argument("--judge", action="store_true", help="attack with ART instead")
    what.add_argument(
        "--held-out", action="store_true", help="measure on held-out images"
    )
    args = parser.parse_args()
    if not args.print:
        data = datasets.load("mnist")
        for row in rows_wanted(args.only, args.seeds):
            there = {key(one): one for one in read()}.get(key(vars(row)), {})
            if args.held_out:
                held_out(row, data, args)
            elif args.judge and "ART AutoAttack" not in there:
                keep(judged(row, data, args))
            elif not args.judge and "AutoAttack" not in there:
                keep(finished(row, data, args))
    print(table([row for row in read() if "seconds" in row]))


if __name__ == "__main__":
    main()
