"""Adversarial regularisation for Keras 3: wrap a model, `compile`, `fit`."""

import keras as _keras

if _keras.backend.backend() != "tensorflow":
    raise ImportError(
        "advreg works on Keras's TensorFlow backend. Set the environment variable "
        'KERAS_BACKEND=tensorflow before Keras is imported, or "backend": '
        '"tensorflow" in ~/.keras/keras.json. Received the backend: '
        f"{_keras.backend.backend()!r}"
    )

from advreg._version import __version__
from advreg.config import (
    AdvNeighborConfig,
    AdvRegConfig,
    NormType,
    make_adv_reg_config,
)
from advreg.model import AdversarialRegularization
from advreg.perturbation import adversarial_loss, gen_adv_neighbor

__all__ = [
    "AdvNeighborConfig",
    "AdvRegConfig",
    "AdversarialRegularization",
    "NormType",
    "__version__",
    "adversarial_loss",
    "gen_adv_neighbor",
    "make_adv_reg_config",
]
