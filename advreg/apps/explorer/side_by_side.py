"""Models side by side: each is attacked by itself, with the same picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from advreg import attacks, backend
from advreg.apps.explorer.pictures import Shape
from advreg.apps.recipes import GENERAL_RECIPE, RECIPES
from advreg.attacks.engine.target import TargetModel
from advreg.backend.parts import Parts
from advreg.checks import brief
from advreg.config.norms import NormType, check_norm

# The attacks that are fast enough to follow a slider: a tenth of a second on digits.
# Square is not, because it makes thousands of queries.
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
    """The predictions of one model for a picture, before and after an attack.

    Args:
        clean: The picture, `[height, width, channels]` in [0, 1].
        perturbed: The picture after an attack on this model.
        clean_probabilities: Probability of each class for the picture, `[classes]`.
        perturbed_probabilities: Probability of each class for the perturbed picture.
        attacked_class: The class that the attack leads away from: the true class, or
            the predicted one if the true class is unknown.
    """

    clean: np.ndarray
    perturbed: np.ndarray
    clean_probabilities: np.ndarray
    perturbed_probabilities: np.ndarray
    attacked_class: int

    @property
    def perturbation(self) -> np.ndarray:
        """The difference of the perturbed and the clean picture, in float64."""
        return self.perturbed.astype("float64") - self.clean


class SideBySide:
    """Attacks several models with the same pictures, each white-box and by itself.

    What an attack compiles is kept, and all radii share it. A change of the radius
    takes no longer than the steps of the attack.

    Args:
        models: The classifiers, wrapped or not, by their names.
        shape: Height, width and channels of the pictures.
        pixel_range: Values of black and white in the input of the models.
        from_logits: Whether the outputs are logits. If `None`, they count as
            probabilities if all lie in [0, 1] and each row of several sums to 1.

    Raises:
        TypeError: A model is no Keras 3 model.
        ValueError: A model is no classifier of such pictures, or the models have
            different numbers of classes.

    Example:
    >>> networks = {"plain": plain, "regularised": regularised}
    >>> sides = SideBySide(networks, (8, 8, 1)).explore(x[0], "PGD", "infinity", 0.1)
    >>> sides["plain"].perturbed_probabilities.argmax()
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
                "The models must have the same number of classes. Received: "
                + ", ".join(f"{name} has {count}" for name, count in classes.items())
            )
        self.classes = next(iter(classes.values()))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the models."""
        return tuple(self._networks)

    def radius(self, norm: NormType | str) -> float:
        """Returns a first radius, at which the demo attacks pictures of this shape.

        Args:
            norm: Norm of the ball.

        Returns:
            A number in units of the models' input.
        """
        norm = check_norm("norm", norm)
        recipe = _RECIPES.get(self.shape, GENERAL_RECIPE)
        growth = 1.0  # Values of a picture, divided by those that the recipe is for.
        if recipe is GENERAL_RECIPE:
            growth = float(np.prod(self.shape)) / _GENERAL_VALUES
        power = {NormType.INFINITY: 0.0, NormType.L2: 0.5, NormType.L1: 1.0}[norm]
        return recipe.adv_step_size[norm.value] * growth**power * self._width

    def explore(
        self,
        pixels: np.ndarray,
        attack: str,
        norm: NormType | str,
        epsilon: float,
        label: int | None = None,
    ) -> dict[str, Side]:
        """Attacks every model with a picture.

        Attacks take all their steps, even after one that fools the model. Random
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
                f"`attack` must be one of {list(ATTACKS)}. Received: {brief(attack)}"
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
            clean = network.probabilities(x)[0]
            attacked = int(clean.argmax()) if label is None else label
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
                clean_probabilities=clean,
                perturbed_probabilities=network.probabilities(x_adv)[0],
                attacked_class=attacked,
            )
        return sides

    def _probes(self) -> np.ndarray:
        """Returns random inputs, whose outputs tell logits from probabilities."""
        noise = np.random.default_rng(0).random((_PROBES, *self.shape))
        return (self._low + self._width * noise).astype("float32")


def picture_shape(model: keras.Model, fallback: Shape | None = None) -> Shape:
    """Returns the shape of the pictures that a model takes.

    Args:
        model: The model, wrapped or not.
        fallback: Height, width and channels to use where the model leaves them open.

    Returns:
        Height, width and channels.

    Raises:
        ValueError: It takes no pictures, or leaves their size open without a fallback.
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
                "The model leaves the size of its images open: choose a --dataset that "
                f"has them. Received: an input of shape {shape}"
            )
        shape = tuple(
            there if size is None else size
            for size, there in zip(shape, fallback, strict=True)
        )
    return shape


class _Network:
    """A model that takes pictures and returns probabilities."""

    def __init__(
        self, model: keras.Model, probes: np.ndarray, from_logits: bool | None
    ) -> None:
        self._model, self._probes, self._from_logits = model, probes, from_logits
        self._inspect_model()

    def _inspect_model(self) -> None:
        """Finds out whether the outputs are logits, and of how many classes."""
        self._parts = Parts(self._model)
        self._target = TargetModel(self._model, self._from_logits)
        if self._target.fits_values:
            raise ValueError(
                "The model must be a classifier. Received: a model compiled with "
                f"loss={brief(self._model.loss)}"
            )
        # All probes, because a single output can look like probabilities by chance.
        form = self._target.output_form(self._features(self._probes))
        self.classes, self.from_logits = form.classes, form.from_logits

    def probabilities(self, x: np.ndarray) -> np.ndarray:
        """Returns the probability of each class, `[batch, classes]`."""
        if self._parts.differences(Parts(self._model)):
            self._inspect_model()
        form, target = self._target.known_form, self._target
        features = self._features(x)
        logits = target.compile(
            "logits", lambda features: form.logits(target.outputs(features)), features
        )(features)
        logits = ops.cast(logits, backend.widest_float())
        probabilities = ops.convert_to_numpy(ops.softmax(logits))
        if not np.isfinite(probabilities).all():
            raise ValueError("The model gives no numbers for this picture.")
        return probabilities

    def perturbed(self, attack: attacks.Attack, x: np.ndarray, label: int) -> Any:
        """Attacks the model, and returns the perturbed inputs in the shape of `x`."""
        x_adv = attack(
            self._target.model, self._packed(x), np.array([label]), early_stop=False
        )
        return np.reshape(tree.flatten(x_adv)[0], x.shape)

    def _features(self, x: np.ndarray) -> Any:
        features, _ = self._target.unpack((self._packed(x), np.zeros(len(x), "int64")))
        return features

    def _packed(self, x: np.ndarray) -> Any:
        """Returns pictures in the structure and the shape that the model declares."""
        base = self._target.base
        if not getattr(base, "inputs", None):
            return x
        # A model that was never called, such as a new `Sequential`, has no `input`.
        declared = getattr(base, "input", base.inputs[0])

        def packed(tensor: Any) -> np.ndarray:
            return x[..., 0] if len(tensor.shape) == 3 else x

        return tree.map_structure(packed, declared)
