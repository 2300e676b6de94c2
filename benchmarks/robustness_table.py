"""Trains every preset with one budget, and prints how robust the networks are.

MNIST with the network of NSL's tutorial (93,322 parameters), ten epochs, Adam with a
learning rate that rises and falls once. Recipes were chosen on the last 5,000 training
images, which nothing is trained on. Each network is measured on the first 1,000 test
images, white-box: PGD-40 with 5 restarts, and AutoAttack.

    python benchmarks/robustness_table.py [--only fast@0.3 ...] [--quick]
    python benchmarks/robustness_table.py --judge --only madry@0.3  # ART's attacks
    python benchmarks/robustness_table.py --print     # the rows that are there

All of it takes hours on two cores. Every finished row is kept in
`benchmarks/robustness_table.json`, and a run goes on where the last one stopped.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from turns import table

import advreg
from advreg import AdvRegConfig, datasets
from advreg.apps.recipes import mnist_network
from advreg.attacks import ART, PGD, AutoAttack
from advreg.config.schedules import scaled

FILE = pathlib.Path(__file__).with_suffix(".json")
BATCH, RADII = 128, (0.1, 0.2, 0.3)
RANGE = {"clip_value_min": 0.0, "clip_value_max": 1.0}
COLUMNS = {
    "clean": "clean",
    "PGD-40, 5 restarts": "PGD-40 ×5",
    "AutoAttack": "AutoAttack",
    "ART's PGD-40": "ART ProjectedGradientDescent",
    "ART's AutoAttack": "ART AutoAttack",
}
Schedules = keras.optimizers.schedules


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A preset, and how it is trained."""

    config: Callable  # A function of the radius and the number of steps.
    peak: float = 5e-3  # The largest learning rate.
    average: float = 0.999  # Momentum of the average of the weights, 0 for none.
    seeds: int = 1


def ramped(preset, **fields):
    """Makes the radius grow, over the first half, to a tenth more than needed."""

    def config(epsilon, steps):
        radius = Schedules.PolynomialDecay(0.0, steps // 2, 1.1 * epsilon)
        return preset(radius, **RANGE, **fields)

    return config


def single_step(preset):
    """Gives single steps more weight, and no average of weights."""
    return Recipe(ramped(preset, multiplier=5.0), peak=4e-3, average=0.0, seeds=3)


def calm_n_fgsm(epsilon, **fields):
    """N-FGSM from noise of half a radius.

    Of two, its default, little is learnt at 0.3, and of one some seeds collapse.
    """
    return AdvRegConfig.n_fgsm(epsilon, init_radius=scaled(0.5, epsilon), **fields)


PLAIN = AdvRegConfig(multiplier=0.0)
NSL = advreg.make_adv_reg_config(0.2, adv_step_size=0.2, adv_grad_norm="infinity")
VIRTUAL = ramped(AdvRegConfig.virtual_adversarial, adv_grad_norm="infinity")
RECIPES = {
    "plain": Recipe(lambda *_: PLAIN),
    "nsl": Recipe(lambda *_: NSL),
    "fgsm": single_step(AdvRegConfig.fgsm),
    "fast": single_step(AdvRegConfig.fast),
    "n_fgsm": single_step(calm_n_fgsm),
    "pgd": Recipe(ramped(AdvRegConfig.pgd)),
    "madry": Recipe(ramped(AdvRegConfig.pgd, clean_weight=0.0)),
    "trades": Recipe(ramped(AdvRegConfig.trades)),
    "mart": Recipe(ramped(AdvRegConfig.mart)),
    "logit_pairing": Recipe(ramped(AdvRegConfig.logit_pairing)),
    "virtual_adversarial": Recipe(VIRTUAL),
}


def rows_wanted(only=()):
    """Returns the presets, radii and seeds that are asked for."""
    return [
        (name, radius, seed)
        for radius in RADII
        for name, recipe in RECIPES.items()
        for seed in range(recipe.seeds)
        if not only or f"{name}@{radius}" in only or name in only
    ]


def trained(preset, epsilon, seed, x, y, epochs):
    """Trains a network."""
    recipe, steps = RECIPES[preset], epochs * -(-len(x) // BATCH)
    keras.utils.set_random_seed(seed)
    network = mnist_network((28, 28, 1), 10)
    model = advreg.AdversarialRegularization(network, recipe.config(epsilon, steps))
    rising = {"warmup_target": recipe.peak, "warmup_steps": steps // 5}
    rate = Schedules.CosineDecay(recipe.peak / 25, steps - steps // 5, **rising)
    average = {"use_ema": recipe.average > 0, "ema_momentum": recipe.average or 0.99}
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate, **average), loss, metrics=["accuracy"])
    model.fit(x, y, batch_size=BATCH, epochs=epochs, verbose=2)
    return network


def attacks_of_ours(radius):
    """Returns PGD-40 with 5 restarts, and AutoAttack."""
    pgd = PGD(radius, iterations=40, restarts=5, **RANGE)
    return [pgd, AutoAttack(radius, **RANGE)]


def attacks_of_art(radius):
    """Returns the same of ART, whose AutoAttack with its own defaults takes hours."""
    ball = {"norm": "infinity", "eps": radius, **RANGE}
    pgd = {"eps_step": 2.5 * radius / 40, "max_iter": 40, "num_random_init": 5}
    ascent = {"eps_step": 2 * radius, "max_iter": 100, "nb_random_init": 1}
    parts = [
        ART("AutoProjectedGradientDescent", loss_type=loss, **ascent, **ball)
        for loss in ("cross_entropy", "difference_logits_ratio")
    ]
    parts.append(ART("SquareAttack", max_iter=5000, nb_restarts=1, **ball))
    return [
        ART("ProjectedGradientDescent", **pgd, **ball),
        ART("AutoAttack", attacks=parts, eps_step=2 * radius, **ball),
    ]


def measure(network, attacks, x, y):
    """Returns accuracies under attacks, and the checks that they did not pass."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(loss=loss, metrics=["accuracy"])
    options = {"attacks": attacks, "batch_size": 250, "verbose": 0}
    report = advreg.evaluate_robustness(network, x, y, **options)
    print(*report.warnings, sep="\n", file=sys.stderr)
    return {result.name: result.accuracy for result in report.results}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="PRESET[@EPSILON]")
    parser.add_argument("--print", action="store_true", help="print what is there")
    parser.add_argument("--judge", action="store_true", help="attack with ART instead")
    parser.add_argument("--quick", action="store_true", help="one row, kept nowhere")
    options = parser.parse_args()
    rows = json.loads(FILE.read_text()) if FILE.exists() and not options.quick else []
    kept = {(row["preset"], row["epsilon"], row["seed"]): row for row in rows}
    wanted, training, tested, epochs = rows_wanted(options.only), 55_000, 1000, 10
    if options.quick:
        wanted, training, tested, epochs = [("fast", 0.1, 0)], 256, 20, 1
    attacks, mark = attacks_of_ours, "AutoAttack"
    if options.judge:
        attacks, mark = attacks_of_art, "ART AutoAttack"
    for key in () if options.print else wanted:
        if mark in kept.get(key, {}):
            continue
        data = datasets.load("mnist")
        x, y = data.x_train[:training], data.y_train[:training]
        network, (x, y) = trained(*key, x, y, epochs), (data.x_test, data.y_test)
        clean = np.mean(network.predict(x, 500, verbose=0).argmax(1) == y)
        row = dict(zip(("preset", "epsilon", "seed"), key, strict=True))
        chosen = attacks(key[1])[: 1 if options.quick else None]
        found = measure(network, chosen, x[:tested], y[:tested])
        kept[key] = {**row, "clean": float(clean), **kept.get(key, {}), **found}
        ordered = [kept[other] for other in rows_wanted() if other in kept]
        if not options.quick:
            FILE.write_text(json.dumps(ordered, indent=1) + "\n")
    shown = [n for n in COLUMNS.values() if any(n in row for row in kept.values())]
    heads, rows = [head for head, name in COLUMNS.items() if name in shown], []
    for (preset, epsilon, seed), row in kept.items():
        cells = [f"{100 * row[name]:.1f} %" if name in row else "" for name in shown]
        rows.append([f"`{preset}`", epsilon, seed, *cells])
    print(table(["preset", "ε", "seed", *heads], rows))


if __name__ == "__main__":
    main()
