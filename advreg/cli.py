"""The command line: `advreg demo` and `advreg evaluate`.

Each sub-command is a function that adds its parser, and one that runs it.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras

from advreg import attacks, datasets, demo, plots
from advreg._version import __version__
from advreg.attacks.base import check_norm
from advreg.config import NormType
from advreg.datasets import DatasetError
from advreg.evaluation import evaluate_robustness


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sub-command.

    Args:
        argv: The arguments, by default those of the process.

    Returns:
        The exit status: 0, or 1 where something that the command needs is not there.

    Raises:
        SystemExit: An argument is wrong (status 2), or help or the version was asked
            for (status 0).

    Example:
    >>> main(["demo", "--epochs", "2"])
    """
    args = _parser().parse_args(argv)
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="advreg", description="Adversarial regularisation for Keras 3."
    )
    parser.add_argument("--version", action="version", version=f"advreg {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for add in (_add_demo, _add_evaluate):
        add(commands)
    return parser


def _add_demo(commands: Any) -> None:
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
    parser.set_defaults(run=lambda args: _run_demo(parser, args))


def _run_demo(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    values = {name: value for name, value in vars(args).items() if name != "run"}
    try:
        settings = demo.DemoSettings(**values)
    except (TypeError, ValueError) as error:
        parser.error(_as_options(str(error)))
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


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="attack a saved model, and report how accurate it stays",
        description="Attack a saved Keras model on the test images of a dataset, and "
        "report its accuracy with the checks of an honest evaluation.",
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL.keras", help="the saved model"
    )
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        default="digits",
        help="'digits', or a dataset of TensorFlow Datasets that classifies images "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--attacks",
        nargs="+",
        metavar="ATTACK",
        choices=sorted(_ATTACKS),
        default=["fgsm", "pgd"],
        help=f"which attacks, of {', '.join(sorted(_ATTACKS))} (default: fgsm pgd)",
    )
    parser.add_argument(
        "--epsilons",
        nargs="+",
        type=float,
        metavar="X",
        help="radii, in units of the model's input (default: that of the demo on "
        "this dataset)",
    )
    parser.add_argument(
        "--norm",
        metavar="NORM",
        default="infinity",
        help="norm of the radius: l1, l2 or infinity (default: %(default)s)",
    )
    parser.add_argument(
        "--iterations",
        type=int,
        metavar="N",
        help="steps of each iterative attack (default: its own)",
    )
    parser.add_argument(
        "--restarts", type=int, metavar="N", help="random starts of pgd and apgd"
    )
    parser.add_argument(
        "--pixel-range",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        default=(0.0, 1.0),
        help="what black and white are in the model's input (default: 0 1)",
    )
    parser.add_argument(
        "--examples",
        type=int,
        metavar="N",
        help="how many test images, the first ones (default: all)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        default=250,
        help="images that go through the model at once (default: %(default)s)",
    )
    parser.add_argument(
        "--from-logits",
        action=argparse.BooleanOptionalAction,
        help="whether the model's outputs are logits (default: told by their values)",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", default=0, help="seed of random starts"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the report to a file as JSON"
    )
    parser.add_argument(
        "--figure",
        type=Path,
        metavar="FILE",
        help="draw accuracy against radius into a file, such as report.png",
    )
    parser.set_defaults(run=lambda args: _run_evaluate(parser, args))


def _run_evaluate(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    low, high = args.pixel_range
    if not low < high:
        parser.error(
            f"--pixel-range must be two numbers that grow. Received: {low:g} {high:g}"
        )
    if args.examples is not None and args.examples < 1:
        parser.error(f"--examples must be at least 1. Received: {args.examples}")
    for path in (args.json, args.figure):
        if path is not None and not path.parent.is_dir():
            parser.error(f"{path.parent} is no directory to write {path.name} into")
    try:
        if args.figure is not None:
            plots.figure_class()  # Without Matplotlib, fail before the attack.
        model = _load(args.model)
        data = datasets.load(args.dataset)
    except (OSError, TypeError, ValueError, ImportError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    x, y = data.x_test[: args.examples], data.y_test[: args.examples]
    if args.pixel_range != (0.0, 1.0):
        x = (low + (high - low) * x).astype("float32")
    try:
        norm = check_norm(args.norm)
        radii = args.epsilons or [
            demo.recipe_for(args.dataset).adv_step_size[norm] * (high - low)
        ]
        report = evaluate_robustness(
            model,
            x,
            y,
            attacks=[_attack(name, radii[0], norm, args) for name in args.attacks],
            epsilons=radii,
            batch_size=args.batch_size,
            from_logits=args.from_logits,
        )
    except (TypeError, ValueError) as error:
        parser.error(_as_options(str(error)))
    print(f"\n{report}")
    if args.json is not None:
        args.json.write_text(f"{report.to_json()}\n", encoding="utf-8")
    if args.figure is not None:
        report.plot().figure.savefig(args.figure, dpi=150)
    return 0


_ATTACKS: dict[str, type[attacks.Attack]] = {
    "fgsm": attacks.FGSM,
    "bim": attacks.BIM,
    "pgd": attacks.PGD,
    "apgd": attacks.APGD,
    "square": attacks.Square,
    "noise": attacks.RandomNoise,
    "autoattack": attacks.AutoAttack,
}


def _attack(
    name: str, epsilon: float, norm: NormType, args: argparse.Namespace
) -> attacks.Attack:
    """Makes an attack, with those options that it has."""
    cls = _ATTACKS[name]
    fields = {field.name for field in dataclasses.fields(cls)}
    chosen = {name: getattr(args, name) for name in ("iterations", "restarts")}
    low, high = args.pixel_range
    return cls(
        epsilon,
        norm=norm,
        clip_value_min=low,
        clip_value_max=high,
        seed=args.seed,
        **{key: value for key, value in chosen.items() if value and key in fields},
    )


def _load(path: Path) -> keras.Model:
    """Loads a saved model."""
    if not path.exists():
        raise FileNotFoundError(f"There is no file {str(path)!r}")
    try:
        return keras.models.load_model(path)
    # What a damaged or foreign file raises depends on what is wrong with it.
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} is no model that Keras can load: {error}"
        ) from error


def _as_options(message: str) -> str:
    """Names the options of the command line, where a message names arguments."""
    return re.sub(r"`(\w+)`", lambda match: "--" + match[1].replace("_", "-"), message)
