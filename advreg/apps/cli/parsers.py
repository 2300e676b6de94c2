"""The options of all sub-commands, and their help.

Nothing here imports Keras or TensorFlow: help and wrong usage are answered at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from advreg._version import __version__
from advreg.apps.recipes import GENERAL_RECIPE, RECIPES
from advreg.apps.settings import DemoSettings

# The attacks of `advreg evaluate`, and their classes in `advreg.attacks`.
ATTACKS = {
    "apgd": "APGD",
    "autoattack": "AutoAttack",
    "bim": "BIM",
    "fgsm": "FGSM",
    "noise": "RandomNoise",
    "pgd": "PGD",
    "square": "Square",
}
_KNOWN_DATASETS = "'digits', or a dataset of TensorFlow Datasets that classifies images"


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the command.

    Returns:
        A parser. The arguments that it reads also hold `command`, the name of the
        sub-command, and `parser`, the parser of the sub-command.
    """
    parser = argparse.ArgumentParser(
        prog="advreg", description="Adversarial regularisation for Keras 3."
    )
    parser.add_argument("--version", action="version", version=f"advreg {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    for add in (_add_demo, _add_evaluate, _add_explore, _add_migrate):
        sub_parser = add(commands)
        sub_parser.set_defaults(parser=sub_parser)
    return parser


def _add_demo(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "demo",
        help="train a plain and a regularised network, and attack both",
        description="Train a plain and a regularised copy of the same network, and "
        "compare their accuracies on clean and on perturbed images.",
    )
    digits, mnist = RECIPES["digits"], RECIPES["mnist"]

    def by_dataset(name: str) -> str:
        """Returns the defaults of an option, which depend on the dataset."""
        return (
            f"default: {getattr(digits, name)} for digits, {getattr(mnist, name)} for "
            f"mnist, {getattr(GENERAL_RECIPE, name)} for others"
        )

    _add_dataset(parser)
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
    norm = DemoSettings.adv_grad_norm
    parser.add_argument(
        "--adv-step-size",
        type=float,
        metavar="X",
        help="step of the perturbation in training, and radius of every attack "
        "(default: depends on dataset and norm; "
        f"{mnist.adv_step_size[norm]} for mnist in the {norm} norm)",
    )
    parser.add_argument(
        "--adv-grad-norm",
        metavar="NORM",
        default=norm,
        help="norm of the perturbation: l1, l2 or infinity (default: %(default)s)",
    )
    parser.add_argument(
        "--pgd-iterations",
        type=int,
        metavar="N",
        default=DemoSettings.pgd_iterations,
        help="steps of a perturbation in training (default: %(default)s)",
    )
    parser.add_argument(
        "--random-init",
        action="store_true",
        help="start perturbations in training at random",
    )
    _add_seed(parser, "weights, batches and random starts")
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        default=DemoSettings.output_dir,
        help="where the figure and the numbers go (default: %(default)s)",
    )
    return parser


def _add_evaluate(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "evaluate",
        help="attack a saved model, and report how accurate it stays",
        description="Attack a saved Keras model on the test images of a dataset. "
        "Report its accuracy, and warn if the attacks may have been too weak.",
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL.keras", help="the saved model"
    )
    _add_dataset(parser)
    default = ["fgsm", "pgd"]
    parser.add_argument(
        "--attacks",
        nargs="+",
        metavar="ATTACK",
        choices=list(ATTACKS),
        default=default,
        help=f"which attacks, of {', '.join(ATTACKS)} (default: {' '.join(default)})",
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
        "--restarts",
        type=int,
        metavar="N",
        help="random starts of each attack that has them (default: its own)",
    )
    _add_pixel_range(parser, "the model's")
    parser.add_argument(
        "--examples",
        type=int,
        metavar="N",
        help="number of test images, the first ones (default: all)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        default=250,
        help="images that go through the model at once (default: %(default)s)",
    )
    _add_from_logits(parser, "the model's")
    parser.add_argument(
        "--draws",
        type=int,
        metavar="N",
        help="how often a model that draws random numbers is called on each image "
        "(default: 10)",
    )
    _add_seed(parser, "random starts")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the report to a file as JSON"
    )
    parser.add_argument(
        "--figure",
        type=Path,
        metavar="FILE",
        help="draw accuracy against radius into a file, such as report.png",
    )
    return parser


def _add_explore(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "explore",
        help="open a page to attack pictures on, and watch the predictions",
        description="Open a page in the browser: choose or upload a picture, move the "
        "radius, and see what a saved Keras model, or two side by side, predict for "
        "the clean and the perturbed picture. Without a model, first train the demo's "
        "plain and regularised networks.",
    )
    parser.add_argument(
        "models",
        nargs="*",
        type=Path,
        metavar="MODEL.keras",
        help="one saved model, or two",
    )
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        help="where the pictures and the names of the classes come from: "
        f"{_KNOWN_DATASETS} (default: pictures of scikit-learn's; without a model, "
        f"{DemoSettings.dataset})",
    )
    _add_pixel_range(parser, "the models'")
    _add_from_logits(parser, "the models'")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s, this machine alone)",
    )
    parser.add_argument(
        "--port",
        type=int,
        metavar="N",
        help="port to listen on (default: the first free one from 7860)",
    )
    _add_seed(parser, "the training, without a model")
    return parser


def _add_migrate(commands: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "migrate",
        help="move code from Neural Structured Learning to advreg",
        description="Move Python files and notebooks from Neural Structured Learning "
        "to advreg.nsl. Print what would change as a diff, and list what needs a "
        "person. Cells of notebooks are counted from 1, those of text included.",
    )
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="FILE_OR_FOLDER",
        help="files that end in .py or .ipynb, and folders to search for them",
    )
    parser.add_argument("--write", action="store_true", help="change the files")
    return parser


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        default=DemoSettings.dataset,
        help=f"{_KNOWN_DATASETS} (default: %(default)s)",
    )


def _add_seed(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        default=DemoSettings.seed,
        help=f"seed of {what} (default: %(default)s)",
    )


def _add_pixel_range(parser: argparse.ArgumentParser, whose: str) -> None:
    parser.add_argument(
        "--pixel-range",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        default=(0.0, 1.0),
        help=f"values of black and white in {whose} input (default: 0 1)",
    )


def _add_from_logits(parser: argparse.ArgumentParser, whose: str) -> None:
    parser.add_argument(
        "--from-logits",
        action=argparse.BooleanOptionalAction,
        help=f"whether {whose} outputs are logits (default: guessed from the outputs)",
    )
