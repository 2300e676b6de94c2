"""Refuses any Keras backend but TensorFlow, before anything else is imported."""

import os

_ADVICE = (
    "advreg works on Keras's TensorFlow backend. Set the environment variable "
    'KERAS_BACKEND=tensorflow before Keras is imported, or "backend": "tensorflow" in '
    "~/.keras/keras.json. Received the backend: "
)

try:
    import keras
except ImportError as error:  # A backend that is asked for and not installed.
    asked = os.environ.get("KERAS_BACKEND", "tensorflow")
    if asked == "tensorflow":
        raise
    raise ImportError(f"{_ADVICE}{asked!r}") from error

if keras.backend.backend() != "tensorflow":
    raise ImportError(f"{_ADVICE}{keras.backend.backend()!r}")
