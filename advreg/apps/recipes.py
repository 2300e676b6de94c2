"""Networks and settings that fit the datasets of the demo.

Keras is imported when a network is made. The command's help reads the settings without
it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import keras

Shape = tuple[int, ...]


def digits_network(shape: Shape, classes: int) -> keras.Model:
    """Makes a small convolutional network for images of 8×8 pixels."""
    from keras import Input, Sequential, layers

    return Sequential(
        [
            Input(shape),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(classes),
        ]
    )


def mnist_network(shape: Shape, classes: int) -> keras.Model:
    """Makes the network of Neural Structured Learning's tutorial on MNIST."""
    from keras import Input, Sequential, layers

    return Sequential(
        [
            Input(shape),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(classes),
        ]
    )


def general_network(shape: Shape, classes: int) -> keras.Model:
    """Makes a convolutional network for images of any size."""
    from keras import Input, Sequential, layers

    network = Sequential([Input(shape)])
    for filters in (32, 64, 128):
        network.add(layers.Conv2D(filters, 3, padding="same", activation="relu"))
        network.add(layers.Conv2D(filters, 3, padding="same", activation="relu"))
        network.add(layers.MaxPooling2D(padding="same"))
    network.add(layers.GlobalAveragePooling2D())
    network.add(layers.Dense(classes))
    return network


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A network and settings that suit a dataset. Users can change the settings.

    Args:
        network: Function from the shape of an image and the number of classes to an
            untrained network whose outputs are logits.
        epochs: Number of epochs.
        batch_size: Number of images in a batch of training.
        multiplier: Weight of the adversarial loss.
        adv_step_size: Step of the perturbation, by the value of a `NormType`.
    """

    network: Callable[[Shape, int], keras.Model]
    epochs: int
    batch_size: int
    multiplier: float
    adv_step_size: Mapping[str, float]


def _in_each_norm(infinity: float, l2: float, l1: float) -> Mapping[str, float]:
    return {"infinity": infinity, "l2": l2, "l1": l1}


RECIPES = {
    "digits": Recipe(digits_network, 15, 32, 1.0, _in_each_norm(0.15, 0.7, 3.0)),
    "mnist": Recipe(mnist_network, 5, 32, 0.2, _in_each_norm(0.2, 2.0, 10.0)),
}
GENERAL_RECIPE = Recipe(general_network, 10, 64, 1.0, _in_each_norm(8 / 255, 0.5, 12.0))


def recipe_for(dataset: str) -> Recipe:
    """Returns the recipe of a dataset, which is the same for all its versions."""
    return RECIPES.get(dataset.split(":")[0], GENERAL_RECIPE)
