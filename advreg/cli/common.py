"""What sub-commands share: options, models, and messages in their words."""

from __future__ import annotations

import argparse
import math
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import keras
import tensorflow as tf

_WORDS = {
    "epsilon": "--epsilons",
    "clip_value_min": "LOW",
    "clip_value_max": "HIGH",
    "from_logits=True": "--from-logits",
    "from_logits=False": "--no-from-logits",
    "model": "The model",
    "x": "The images",
    "y": "The labels of the dataset",
}


def add_pixel_range(parser: argparse.ArgumentParser, whose: str) -> None:
    """Adds the option that says what black and white are."""
    parser.add_argument(
        "--pixel-range",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        default=(0.0, 1.0),
        help=f"what black and white are in {whose} input (default: 0 1)",
    )


def add_from_logits(parser: argparse.ArgumentParser, whose: str) -> None:
    """Adds the option that says what outputs are."""
    parser.add_argument(
        "--from-logits",
        action=argparse.BooleanOptionalAction,
        help=f"whether {whose} outputs are logits (default: told by their values)",
    )


def told(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.ArgumentParser, argparse.Namespace], None],
    args: argparse.Namespace,
) -> int:
    """Runs a sub-command, and tells in a line what files or models stand against."""
    try:
        run(parser, args)
    except BrokenPipeError:
        raise  # It is of the output, for `main`.
    except (
        OSError,
        TypeError,
        ValueError,
        ImportError,
        tf.errors.InvalidArgumentError,
    ) as error:
        print(f"{parser.prog}: error: {as_options(str(error))}", file=sys.stderr)
        return 1
    return 0


def load(path: Path) -> keras.Model:
    """Loads a saved model."""
    if not path.is_file():
        raise FileNotFoundError(
            "MODEL.keras must be a file that Keras saved a model in. Received: "
            f"{str(path)!r}, which {'is a directory' if path.is_dir() else 'is absent'}"
        )
    try:
        with warnings.catch_warnings():
            # No optimizer is needed here.
            warnings.filterwarnings("ignore", "Skipping variable loading for optimi")
            model = keras.models.load_model(path)
    # What a damaged or foreign file raises depends on what is wrong with it.
    except Exception as error:
        # Between what Keras says are configurations, pages of them.
        said = " ".join(str(error).split()).split("Exception encountered: ")[-1]
        said = said.split(" Full object config")[0]
        hint = ""
        if "register_keras_serializable" in said:
            hint = (
                " The command knows Keras's and advreg's classes only: for others call "
                "advreg.evaluate_robustness in Python."
            )
        raise ValueError(
            f"{str(path)!r} is no model that Keras can load.{hint} Keras says: "
            f"{said[:500]}"
        ) from error
    if not isinstance(model, keras.Model):
        raise TypeError(f"{str(path)!r} holds no model. Received: {model!r}")
    return model


def check_pixel_range(value: Sequence[float]) -> None:
    """Checks what black and white are."""
    low, high = value
    if not -math.inf < low < high < math.inf:
        raise ValueError(
            f"`pixel_range` must be two numbers that grow. Received: {low:g} {high:g}"
        )


def as_options(message: str) -> str:
    """Names the options of the command line, where a message names arguments."""

    def option(match: re.Match[str]) -> str:
        return _WORDS.get(match[1], "--" + match[1].replace("_", "-"))

    return re.sub(r"`(\w+(?:=\w+)?)`", option, message)
