"""Models that a user has saved, and the values of their input."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import keras

from advreg import backend

# Registers the classes of wrapped models, which Keras then finds in files.
from advreg import nsl as nsl
from advreg.checks import brief
from advreg.training.model import AdversarialRegularization as AdversarialRegularization

# What Keras says of a layer that wraps a model of one framework.
_OTHER_BACKEND = re.compile(
    r"No module named '(?P<module>tensorflow|torch|jax)\b"
    r"|only [^.]*\bwith the (?P<name>tensorflow|torch|jax)\b[^.]*\bbackend",
    re.IGNORECASE,
)


def load(path: Path) -> keras.Model:
    """Loads a saved model, wrapped or not.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: The file holds something else than a model.
        ValueError: Keras cannot load it.
    """
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
    # The type of the error depends on what is wrong with the file.
    except Exception as error:
        # Keras quotes whole configurations, which fill pages.
        message = " ".join(str(error).split()).split("Exception encountered: ")[-1]
        message = message.split(" Full object config")[0]
        hint = ""
        if "register_keras_serializable" in message:
            hint = (
                " The command knows only the classes of Keras and of advreg. If the "
                "model has others, call advreg.evaluate_robustness in Python."
            )
        elif other := _OTHER_BACKEND.search(message):
            needed = (other["module"] or other["name"]).lower()
            hint = (
                f" The model has a part that only Keras's backend {needed} runs. "
                f"Install it, and set the environment variable KERAS_BACKEND={needed}. "
                f"Received: the backend {backend.BACKEND}."
            )
        raise ValueError(
            f"{str(path)!r} is no model that Keras can load.{hint} Keras says: "
            f"{message[:500]}"
        ) from error
    if not isinstance(model, keras.Model):
        raise TypeError(f"{str(path)!r} holds no model. Received: {brief(model)}")
    return model


def check_pixel_range(value: Sequence[float]) -> None:
    """Checks the values of black and white.

    Raises:
        ValueError: They are not finite, or the first is not the lower one.
    """
    low, high = value
    if not -math.inf < low < high < math.inf:
        raise ValueError(
            "`pixel_range` must be two finite numbers, the lower one first. Received: "
            f"{low:g} {high:g}"
        )
