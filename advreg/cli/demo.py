"""`advreg demo`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from advreg import demo
from advreg.cli.common import as_options
from advreg.datasets import DatasetError


def add(commands: Any) -> None:
    """Adds the parser to those of the other sub-commands."""
    defaults = demo.DemoSettings()
    parser = commands.add_parser(
        "demo",
        help="train a plain and a regularised network, and attack both",
        description="Train a plain and a regularised copy of the same network, and "
        "compare their accuracies on clean and on perturbed images.",
    )
    digits, mnist = (demo.recipe_for(name) for name in ("digits", "mnist"))

    def by_dataset(name: str) -> str:
        """Says what the recipes of the datasets that have one hold."""
        return (
            f"default: {getattr(digits, name)} for digits, {getattr(mnist, name)} for "
            f"mnist, {getattr(demo.GENERAL_RECIPE, name)} for others"
        )

    parser.add_argument(
        "--dataset",
        metavar="NAME",
        default=defaults.dataset,
        help="'digits', or a dataset of TensorFlow Datasets that classifies images "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help=f"epochs of training ({by_dataset('epochs')})",
    )
    parser.add_argument(
        "--multiplier",
        type=float,
        metavar="X",
        help=f"weight of the adversarial loss ({by_dataset('multiplier')})",
    )
    parser.add_argument(
        "--adv-step-size",
        type=float,
        metavar="X",
        help="step of the perturbation in training, and radius of every attack "
        "(default: depends on dataset and norm; 0.2 for mnist in the infinity norm)",
    )
    parser.add_argument(
        "--adv-grad-norm",
        metavar="NORM",
        default=defaults.adv_grad_norm,
        help="norm of the perturbation: l1, l2 or infinity (default: %(default)s)",
    )
    parser.add_argument(
        "--pgd-iterations",
        type=int,
        metavar="N",
        default=defaults.pgd_iterations,
        help="steps of a perturbation in training (default: %(default)s)",
    )
    parser.add_argument(
        "--random-init",
        action="store_true",
        help="start perturbations in training at random",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        default=defaults.seed,
        help="seed of weights, batches and random starts (default: %(default)s)",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        default=defaults.output_dir,
        help="where the figure and the numbers go (default: %(default)s)",
    )
    parser.set_defaults(run=lambda args: _run(parser, args))


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    values = {name: value for name, value in vars(args).items() if name != "run"}
    try:
        settings = demo.DemoSettings(**values)
    except (TypeError, ValueError) as error:
        parser.error(as_options(str(error)))
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output-dir must be a directory. Received: {error}")
    try:
        result = demo.run(settings)
    except (DatasetError, ImportError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    print(result)
    return 0
