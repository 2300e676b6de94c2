"""`advreg evaluate`: attacks a saved model, and writes the report."""

from __future__ import annotations

import argparse
import dataclasses

import keras
import numpy as np

from advreg import attacks, datasets, plots
from advreg.apps.cli.errors import to_cli_words
from advreg.apps.cli.models import check_pixel_range, load
from advreg.apps.cli.parsers import ATTACKS
from advreg.apps.recipes import recipe_for
from advreg.checks import check_count
from advreg.config.norms import check_norm
from advreg.evaluation.robustness import check_draws, evaluate_robustness


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Evaluates a saved model.

    Args:
        parser: The parser of the sub-command, which ends it where an option is wrong.
        args: The arguments.
    """
    low, high = args.pixel_range
    try:
        chosen = _chosen_attacks(args)
        check_count("batch_size", args.batch_size)
        if args.examples is not None:
            check_count("examples", args.examples)
        check_draws(args.draws)
    except (TypeError, ValueError) as error:
        parser.error(to_cli_words(str(error)))
    for option, path in (("--json", args.json), ("--figure", args.figure)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            parser.error(
                f"{option} must be a file in a directory that exists. Received: {path}"
            )
    if args.figure is not None:
        # Fails before the attack if there is no Matplotlib, or it cannot write the
        # format.
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
        draws=args.draws,
    )
    print(f"\n{report}")
    if args.json is not None:
        args.json.write_text(f"{report.to_json()}\n", encoding="utf-8")
    if args.figure is not None:
        report.plot().figure.savefig(args.figure, dpi=150)


def _radii(args: argparse.Namespace) -> list[float]:
    """Returns the radii, by default that of the demo, in units of the input."""
    if args.epsilons is not None:
        return args.epsilons
    low, high = args.pixel_range
    norm = check_norm("norm", args.norm)
    return [recipe_for(args.dataset).adv_step_size[norm.value] * (high - low)]


def _chosen_attacks(args: argparse.Namespace) -> list[attacks.Attack]:
    """Makes the attacks, each with those options that it has.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option has a wrong value, or none of the attacks has it.
    """
    low, high = args.pixel_range
    check_pixel_range(args.pixel_range)
    given = {
        option: getattr(args, option)
        for option in ("iterations", "restarts")
        if getattr(args, option) is not None
    }
    for option in given:
        if not any(_has(name, option) for name in args.attacks):
            able = ", ".join(name for name in ATTACKS if _has(name, option))
            raise ValueError(
                f"`{option}` is for {able}, and means nothing to the attacks that are "
                f"asked for. Received: {', '.join(args.attacks)}"
            )
    chosen = []
    for name in args.attacks:
        options = {key: value for key, value in given.items() if _has(name, key)}
        for epsilon in _radii(args):  # Making an attack checks its radius.
            attack = _attack_class(name)(
                epsilon,
                norm=args.norm,
                clip_value_min=low,
                clip_value_max=high,
                seed=args.seed,
                **options,
            )
        chosen.append(attack)
    return chosen


def _attack_class(name: str) -> type[attacks.Attack]:
    return getattr(attacks, ATTACKS[name])


def _has(attack: str, option: str) -> bool:
    fields = dataclasses.fields(_attack_class(attack))
    return any(field.name == option for field in fields)


def _check_fits(model: keras.Model, x: np.ndarray, args: argparse.Namespace) -> None:
    """Checks that images have the shape that a model declares.

    Raises:
        ValueError: They have another.
    """
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
