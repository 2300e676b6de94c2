"""Finds out the backend of Keras, before anything else is imported."""

import importlib.util
import os

_BACKENDS = ("tensorflow", "jax", "torch")


def _find_out() -> str:
    """Returns the name of the backend on which Keras runs.

    Raises:
        ImportError: It is not installed, or advreg does not work on it.
    """
    try:
        import keras
    # A backend that is asked for and not installed, or that Keras does not know.
    except (ImportError, ValueError) as error:
        asked = os.environ.get("KERAS_BACKEND") or "tensorflow"
        if asked not in _BACKENDS:
            raise ImportError(_unknown(asked)) from error
        if importlib.util.find_spec(asked) is not None:
            raise  # It is installed, and the error is another one.
        raise ImportError(_missing(asked)) from error
    name = str(keras.backend.backend())
    if name not in _BACKENDS:
        raise ImportError(_unknown(name))
    return name


def _unknown(name: str) -> str:
    """Returns the error message for a backend that advreg does not work on."""
    return (
        f"advreg works on Keras's backends {', '.join(_BACKENDS)}. Set the environment "
        "variable KERAS_BACKEND to one of them before Keras is imported, or "
        f'"backend" in ~/.keras/keras.json. Received the backend: {name!r}'
    )


def _missing(name: str) -> str:
    """Returns the error message for a backend that is not installed."""
    found = [each for each in _BACKENDS if importlib.util.find_spec(each) is not None]
    other = f" Or set KERAS_BACKEND={found[0]}, which is installed." if found else ""
    return (
        f"Keras needs a backend, and {name} is not installed: `pip install "
        f'"advreg[{name}]"` installs it. Others are {_others(name)}; they are used if '
        "the environment variable KERAS_BACKEND names them before Keras is "
        f"imported.{other} Received the backend: {name!r}"
    )


def _others(name: str) -> str:
    return " and ".join(each for each in _BACKENDS if each != name)


BACKEND = _find_out()
