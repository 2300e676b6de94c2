"""Models side by side, each attacked by itself: what they make of one picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from advreg import attacks
from advreg.attacks.base import check_norm
from advreg.attacks.victim import Victim
from advreg.config import NormType
from advreg.demo import GENERAL_RECIPE, RECIPES
from advreg.explorer.pictures import Shape

# What answers while a slider moves: APGD and the steps of the others in a tenth of a
# second on digits, where Square's thousands of queries take many.
ATTACKS: dict[str, tuple[type[attacks.Attack], dict[str, Any]]] = {
    "FGSM": (attacks.FGSM, {}),
    "BIM": (attacks.BIM, {"iterations": 20}),
    "PGD": (attacks.PGD, {"iterations": 20}),
    "APGD": (attacks.APGD, {"iterations": 20}),
    "Random noise": (attacks.RandomNoise, {"draws": 1}),
}

_RECIPES = {(8, 8, 1): RECIPES["digits"], (28, 28, 1): RECIPES["mnist"]}
_GENERAL_VALUES = 32 * 32 * 3  # Of the images that the general recipe was made for.
_PROBES = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """What one model makes of a picture, and of its perturbation.

    Args:
        clean: The picture, `[height, width, channels]` in [0, 1].
        perturbed: The picture after an attack on this model.
        on_clean: The probability of each class for the picture, `[classes]`.
        on_perturbed: The same for the perturbed picture.
        attacked: The class that the attack leads away from: the true one, or the one
            that the model sees in the picture where that is not known.
    """

    clean: np.ndarray
    perturbed: np.ndarray
    on_clean: np.ndarray
    on_perturbed: np.ndarray
    attacked: int

    @property
    def change(self) -> np.ndarray:
        """The perturbation."""
        return self.perturbed.astype("float64") - self.clean


class SideBySide:
    """Models that look at the same pictures, each attacked white-box by itself.

    What an attack compiles is kept, so that all radii share it, and one change of the
    radius takes no longer than the steps of the attack.

    Args:
        models: The classifiers, wrapped or not, by their names.
        shape: Height, width and channels of the pictures.
        pixel_range: What black and white are in the input of the models.
        from_logits: Whether the outputs are logits. If `None`, they are probabilities
            if all lie in [0, 1], and each row of several sums to 1.

    Raises:
        TypeError: A model is no Keras 3 model.
        ValueError: A model is no classifier of such pictures, or they tell a different
            number of classes apart.

    Example:
    >>> networks = {"plain": plain, "regularised": regularised}
    >>> sides = SideBySide(networks, (8, 8, 1)).explore(x[0], "PGD", "infinity", 0.1)
    >>> sides["plain"].on_perturbed.argmax()
    """

    def __init__(
        self,
        models: Mapping[str, keras.Model],
        shape: Shape,
        *,
        pixel_range: tuple[float, float] = (0.0, 1.0),
        from_logits: bool | None = None,
    ) -> None:
        self.shape = shape
        self._low, high = pixel_range
        self._width = high - self._low
        self._networks = {
            name: _Network(model, self._probes(), from_logits)
            for name, model in models.items()
        }
        classes = {name: one.classes for name, one in self._networks.items()}
        if len(set(classes.values())) != 1:
            raise ValueError(
                "The models must tell the same number of classes apart, to stand side "
                f"by side. Received: {_listed(classes)}"
            )
        self.classes = next(iter(classes.values()))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the models."""
        return tuple(self._networks)

    def radius(self, norm: NormType | str) -> float:
        """A radius to begin with: at it the demo attacks pictures of this shape.

        Args:
            norm: Norm of the ball.

        Returns:
            A number in units of the models' input.
        """
        norm, recipe = check_norm(norm), _RECIPES.get(self.shape, GENERAL_RECIPE)
        more = 1.0  # Values than the recipe was made for.
        if recipe is GENERAL_RECIPE:
            more = float(np.prod(self.shape)) / _GENERAL_VALUES
        power = {NormType.INFINITY: 0.0, NormType.L2: 0.5, NormType.L1: 1.0}[norm]
        return recipe.adv_step_size[norm] * more**power * self._width

    def explore(
        self,
        pixels: np.ndarray,
        attack: str,
        norm: NormType | str,
        epsilon: float,
        label: int | None = None,
    ) -> dict[str, Side]:
        """Attacks every model with a picture.

        Attacks take all their steps, past the first that fools the model, and random
        starts are always the same.

        Args:
            pixels: The picture, in [0, 1].
            attack: A key of `ATTACKS`.
            norm: Norm of the radius, one of the attack's.
            epsilon: The radius, in units of the models' input.
            label: The true class, if it is known.

        Returns:
            A `Side` for each model, by its name.

        Raises:
            ValueError: The attack is unknown, it is not defined for the norm, or an
                argument does not fit the models.
        """
        if attack not in ATTACKS:
            raise ValueError(
                f"`attack` must be one of {list(ATTACKS)}. Received: {attack!r}"
            )
        if np.shape(pixels) != self.shape:
            raise ValueError(
                f"`pixels` must be of shape {self.shape}. Received: {np.shape(pixels)}"
            )
        x = (self._low + self._width * pixels[None]).astype("float32")
        made, options = ATTACKS[attack]
        limits: dict[str, Any] = {
            "clip_value_min": self._low,
            "clip_value_max": self._low + self._width,
        }
        sides = {}
        for name, network in self._networks.items():
            on_clean = network.probabilities(x)[0]
            attacked = int(on_clean.argmax()) if label is None else label
            x_adv = network.perturbed(
                made(
                    epsilon,
                    norm=norm,
                    from_logits=network.from_logits,
                    seed=0,
                    **limits,
                    **options,
                ),
                x,
                attacked,
            )
            sides[name] = Side(
                clean=pixels,
                perturbed=(x_adv[0].astype("float64") - self._low) / self._width,
                on_clean=on_clean,
                on_perturbed=network.probabilities(x_adv)[0],
                attacked=attacked,
            )
        return sides

    def _probes(self) -> np.ndarray:
        """Inputs that tell how the outputs of a model are to be read."""
        noise = np.random.default_rng(0).random((_PROBES, *self.shape))
        return (self._low + self._width * noise).astype("float32")


def picture_shape(model: keras.Model, fallback: Shape | None = None) -> Shape:
    """Tells what pictures a model takes.

    Args:
        model: The model, wrapped or not.
        fallback: Height, width and channels, where the model leaves them open.

    Returns:
        Height, width and channels.

    Raises:
        ValueError: It takes no pictures, or does not say of which size.
    """
    declared = getattr(model, "base_model", model)
    shapes = [
        tuple(tensor.shape[1:]) for tensor in getattr(declared, "inputs", None) or ()
    ]
    if not shapes and fallback is not None:
        return fallback
    shape = shapes[0] if len(shapes) == 1 else ()
    if len(shape) == 2:  # Grey pictures without an axis of channels.
        shape = (*shape, 1)
    if len(shape) != 3 or shape[2] not in (None, 1, 3):
        raise ValueError(
            "The model must classify images: one input of shape (height, width, "
            "channels), with one or three channels, or (height, width). Received: "
            f"{'inputs' if len(shapes) > 1 else 'an input'} of shape "
            f"{', '.join(map(str, shapes)) or 'unknown'}"
        )
    if None in shape:
        if fallback is None:
            raise ValueError(
                "The model does not say of which size its images are: choose a "
                f"--dataset that has them. Received: an input of shape {shape}"
            )
        shape = tuple(
            there if size is None else size
            for size, there in zip(shape, fallback, strict=True)
        )
    return shape


class _Network:
    """A model, and how pictures go in and probabilities come out."""

    def __init__(
        self, model: keras.Model, probes: np.ndarray, from_logits: bool | None
    ) -> None:
        self._victim = Victim(model, from_logits)
        if self._victim.fits_values:
            raise ValueError(
                "The model must be a classifier. Received: a model compiled with "
                f"loss={model.loss!r}"
            )
        # Once for all: one picture alone could be taken for something else.
        form = self._victim.output_form(self._features(probes))
        self.classes, self.from_logits = form.classes, form.from_logits

    def probabilities(self, x: np.ndarray) -> np.ndarray:
        """What the model gives each class, `[batch, classes]`."""
        form, victim = self._victim.known_form, self._victim
        features = self._features(x)
        logits = victim.compile(
            "logits", lambda features: form.logits(victim.outputs(features)), features
        )(features)
        found = tf.nn.softmax(tf.cast(logits, "float64")).numpy()
        if not np.isfinite(found).all():
            raise ValueError("The model gives no numbers for this picture.")
        return found

    def perturbed(self, attack: attacks.Attack, x: np.ndarray, label: int) -> Any:
        """Attacks the model; the result has the shape of `x`."""
        found = attack(
            self._victim.model, self._packed(x), np.array([label]), early_stop=False
        )
        return np.reshape(tree.flatten(found)[0], x.shape)

    def _features(self, x: np.ndarray) -> Any:
        features, _ = self._victim.unpack((self._packed(x), np.zeros(len(x), "int64")))
        return features

    def _packed(self, x: np.ndarray) -> Any:
        """Pictures in the structure, and with the axes, that the model declares."""
        base = self._victim.base
        if not getattr(base, "inputs", None):
            return x
        # Those that were never called, like a new `Sequential`, have no `input`.
        declared = getattr(base, "input", base.inputs[0])

        def packed(tensor: Any) -> np.ndarray:
            return x[..., 0] if len(tensor.shape) == 3 else x

        return tree.map_structure(packed, declared)


def _listed(classes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} has {count}" for name, count in classes.items())
