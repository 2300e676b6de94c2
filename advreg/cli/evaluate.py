"""`advreg evaluate`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import keras
import numpy as np

from advreg import attacks, datasets, plots
from advreg.attacks.base import check_norm
from advreg.checks import count
from advreg.cli.common import (
    add_from_logits,
    add_pixel_range,
    as_options,
    check_pixel_range,
    load,
    told,
)
from advreg.demo import recipe_for
from advreg.evaluation import evaluate_robustness

_ATTACKS: dict[str, type[attacks.Attack]] = {
    "fgsm": attacks.FGSM,
    "bim": attacks.BIM,
    "pgd": attacks.PGD,
    "apgd": attacks.APGD,
    "square": attacks.Square,
    "noise": attacks.RandomNoise,
    "autoattack": attacks.AutoAttack,
}


def add(commands: Any) -> None:
    """Adds the parser to those of the other sub-commands."""
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
        "--restarts",
        type=int,
        metavar="N",
        help="random starts of pgd, apgd and others that have them",
    )
    add_pixel_range(parser, "the model's")
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
    add_from_logits(parser, "the model's")
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
    parser.set_defaults(run=lambda args: told(parser, _run, args))


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    low, high = args.pixel_range
    try:
        chosen = _chosen_attacks(args)
        count("batch_size", args.batch_size)
        if args.examples is not None:
            count("examples", args.examples)
    except (TypeError, ValueError) as error:
        parser.error(as_options(str(error)))
    for option, path in (("--json", args.json), ("--figure", args.figure)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            parser.error(
                f"{option} must be a file in a directory that exists. Received: {path}"
            )
    if args.figure is not None:
        # Without Matplotlib, or for a format that it cannot write, fail before the
        # attack.
        plots.check_format(args.figure)
    model = load(args.model)
    data = datasets.load(args.dataset)
    x, y = data.x_test[: args.examples], data.y_test[: args.examples]
    _check_fits(model, x, args)
    if (low, high) != (0.0, 1.0):
        x = (low + (high - low) * x).astype("float32")
    report = evaluate_robustness(
        model,
        x,
        y,
        attacks=chosen,
        epsilons=_radii(args),
        batch_size=args.batch_size,
        from_logits=args.from_logits,
    )
    print(f"\n{report}")
    if args.json is not None:
        args.json.write_text(f"{report.to_json()}\n", encoding="utf-8")
    if args.figure is not None:
        report.plot().figure.savefig(args.figure, dpi=150)


def _radii(args: argparse.Namespace) -> list[float]:
    """The radii: those asked for, or that of the demo in the units of the input."""
    if args.epsilons is not None:
        return args.epsilons
    low, high = args.pixel_range
    step = recipe_for(args.dataset).adv_step_size[check_norm(args.norm)]
    return [step * (high - low)]


def _chosen_attacks(args: argparse.Namespace) -> list[attacks.Attack]:
    """Makes the attacks, each with those options that it has.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option has a wrong value, or none of the attacks has it.
    """
    low, high = args.pixel_range
    check_pixel_range(args.pixel_range)
    wanted = {
        option: getattr(args, option)
        for option in ("iterations", "restarts")
        if getattr(args, option) is not None
    }
    for option in wanted:
        if not any(_has(name, option) for name in args.attacks):
            able = ", ".join(name for name in sorted(_ATTACKS) if _has(name, option))
            raise ValueError(
                f"`{option}` is for {able}, and means nothing to the attacks that are "
                f"asked for. Received: {', '.join(args.attacks)}"
            )
    chosen = []
    for name in args.attacks:
        options = {key: value for key, value in wanted.items() if _has(name, key)}
        for epsilon in _radii(args):  # Each is checked here, before anything is read.
            attack = _ATTACKS[name](
                epsilon,
                norm=args.norm,
                clip_value_min=low,
                clip_value_max=high,
                seed=args.seed,
                **options,
            )
        chosen.append(attack)
    return chosen


def _has(attack: str, option: str) -> bool:
    return any(field.name == option for field in dataclasses.fields(_ATTACKS[attack]))


def _check_fits(model: keras.Model, x: np.ndarray, args: argparse.Namespace) -> None:
    """Checks that images have the shape that a model declares."""
    declared = getattr(model, "base_model", model)
    shapes = [tuple(tensor.shape[1:]) for tensor in getattr(declared, "inputs", ())]
    if not shapes:
        return
    known = len(shapes) == 1 and len(shapes[0]) == 3
    if not known or any(
        size not in (None, found)
        for size, found in zip(shapes[0], x.shape[1:], strict=True)
    ):
        raise ValueError(
            f"The model does not take the images of {args.dataset!r}: its inputs are "
            f"of shape {', '.join(map(str, shapes))}. Choose another --dataset. "
            f"Received: images of shape {x.shape[1:]}"
        )
