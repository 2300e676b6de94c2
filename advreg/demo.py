"""The demo: one network trained twice, plainly and with adversarial regularisation.

`run` trains both copies on a dataset, attacks both, and returns what a user wants to
compare: accuracy on clean and on perturbed images, and the price of an epoch.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

from advreg import attacks, datasets, plots
from advreg.config import AdvRegConfig, NormType, make_adv_reg_config
from advreg.model import AdversarialRegularization
from advreg.tables import text_table

PLAIN = "plain"
REGULARISED = "regularised"

_PGD_ITERATIONS = 20
_ATTACK_BATCH = 250
_IMAGES_IN_FIGURE = 10

Shape = tuple[int, ...]


def digits_network(shape: Shape, classes: int) -> keras.Model:
    """Makes a small convolutional network for images of 8×8 pixels."""
    return keras.Sequential(
        [
            keras.Input(shape),
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
    return keras.Sequential(
        [
            keras.Input(shape),
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
    network = keras.Sequential([keras.Input(shape)])
    for filters in (32, 64, 128):
        network.add(layers.Conv2D(filters, 3, padding="same", activation="relu"))
        network.add(layers.Conv2D(filters, 3, padding="same", activation="relu"))
        network.add(layers.MaxPooling2D(padding="same"))
    network.add(layers.GlobalAveragePooling2D())
    network.add(layers.Dense(classes))
    return network


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is trained on a dataset, and how, unless the user says otherwise.

    Args:
        network: Function from the shape of an image and the number of classes to an
            untrained network whose outputs are logits.
        epochs: Number of epochs.
        batch_size: Number of images in a batch of training.
        multiplier: Weight of the adversarial loss.
        adv_step_size: Step of the perturbation in each norm, a `NormType`.
    """

    network: Callable[[Shape, int], keras.Model]
    epochs: int
    batch_size: int
    multiplier: float
    adv_step_size: Mapping[NormType, float]


def _in_each_norm(infinity: float, l2: float, l1: float) -> Mapping[NormType, float]:
    return {NormType.INFINITY: infinity, NormType.L2: l2, NormType.L1: l1}


RECIPES = {
    "digits": Recipe(digits_network, 15, 32, 1.0, _in_each_norm(0.15, 0.7, 3.0)),
    "mnist": Recipe(mnist_network, 5, 32, 0.2, _in_each_norm(0.2, 2.0, 10.0)),
}
GENERAL_RECIPE = Recipe(general_network, 10, 64, 1.0, _in_each_norm(8 / 255, 0.5, 12.0))


def recipe_for(dataset: str) -> Recipe:
    """Returns the recipe of a dataset, whatever version of it is asked for."""
    return RECIPES.get(dataset.split(":")[0], GENERAL_RECIPE)


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """The demo's settings, checked when they are made.

    Where `epochs`, `multiplier` or `adv_step_size` is `None`, the dataset's recipe
    gives its value.

    Args:
        dataset: See `advreg.datasets.load`.
        epochs: Number of epochs.
        multiplier: Weight of the adversarial loss.
        adv_step_size: Step of the perturbation, and radius of every attack.
        adv_grad_norm: Norm of the step and of the radius.
        pgd_iterations: Number of steps of a perturbation in training.
        random_init: Whether perturbations in training start at random.
        seed: Seed of the weights, of the order of the batches, and of random starts.
        output_dir: Directory for the figure and the numbers.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field has a value that its rule forbids.
    """

    dataset: str = "digits"
    epochs: int | None = None
    multiplier: float | None = None
    adv_step_size: float | None = None
    adv_grad_norm: str = "infinity"
    pgd_iterations: int = 1
    random_init: bool = False
    seed: int = 0
    output_dir: str | Path = "advreg-demo"

    def __post_init__(self) -> None:
        recipe = recipe_for(self.dataset)
        defaults = {
            "epochs": recipe.epochs,
            "multiplier": recipe.multiplier,
            "adv_step_size": recipe.adv_step_size[NormType(self.adv_grad_norm)],
        }
        for name, default in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if self.epochs < 1:  # type: ignore[operator]
            raise ValueError(f"`epochs` must be at least 1. Received: {self.epochs!r}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(
                f"`seed` must lie between 0 and 2**32 - 1. Received: {self.seed!r}"
            )
        self.adv_config()

    @property
    def radius(self) -> float:
        """The radius of every attack: the step of training."""
        assert self.adv_step_size is not None  # __post_init__ has filled it in.
        return self.adv_step_size

    def adv_config(self) -> AdvRegConfig:
        """Returns the configuration that the regularised network trains with."""
        in_ball = self.pgd_iterations > 1 or self.random_init
        return make_adv_reg_config(
            multiplier=self.multiplier,
            adv_step_size=self.adv_step_size,
            adv_grad_norm=self.adv_grad_norm,
            pgd_iterations=self.pgd_iterations,
            random_init=self.random_init,
            pgd_epsilon=self.adv_step_size if in_ball else None,
            clip_value_min=0.0,
            clip_value_max=1.0,
        )


@dataclasses.dataclass(frozen=True)
class NetworkResult:
    """What the demo measures of one network. Accuracies are fractions.

    Args:
        clean: Accuracy on the test images as they are.
        fgsm_on_plain: Accuracy on images perturbed by FGSM against the plain network.
        fgsm: Accuracy under FGSM against this network.
        pgd: Accuracy under PGD against this network.
        seconds_per_epoch: Typical time of one epoch of training.
    """

    clean: float
    fgsm_on_plain: float
    fgsm: float
    pgd: float
    seconds_per_epoch: float


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """What the demo found. Its `str` is the table and what it means.

    Args:
        settings: The settings, with the recipe's values filled in.
        batch_size: Number of images in a batch of training.
        test_images: Number of images that accuracies are measured on.
        networks: What was measured of each network, by its name.
        figure: Where the figure was saved.
    """

    settings: DemoSettings
    batch_size: int
    test_images: int
    networks: dict[str, NetworkResult]
    figure: Path

    def __str__(self) -> str:
        return f"{format_table(self.networks)}\n\n{format_notes(self)}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as a dictionary that JSON can hold."""
        settings = dataclasses.asdict(self.settings)
        settings["output_dir"] = str(self.settings.output_dir)
        settings["adv_grad_norm"] = NormType(self.settings.adv_grad_norm).value
        return {
            **settings,
            "batch_size": self.batch_size,
            "test_images": self.test_images,
            "radius": self.settings.radius,
            "attack_pgd_iterations": _PGD_ITERATIONS,
            "networks": {
                name: dataclasses.asdict(result)
                for name, result in self.networks.items()
            },
            "figure": str(self.figure),
        }


def run(
    settings: DemoSettings | None = None, verbose: int | str = "auto"
) -> DemoResult:
    """Trains a plain and a regularised copy of a network, and attacks both.

    The figure `perturbations.png` and the numbers, `results.json`, are written to the
    output directory.

    Args:
        settings: The `DemoSettings`, by default those of `DemoSettings()`.
        verbose: How much Keras shows of the training, as in `fit`; 0 for nothing.

    Returns:
        A `DemoResult`. Its `str` is a table.

    Raises:
        DatasetError: The dataset cannot be had. It is a `ValueError`.
        ImportError: The extra `demo` is not installed.

    Example:
    >>> print(run(DemoSettings(dataset="mnist", epochs=1)))
    """
    settings = DemoSettings() if settings is None else settings
    plots.figure_class()  # Without Matplotlib, fail before training, not after.
    data = datasets.load(settings.dataset)
    networks, seconds = train_pair(data, settings, verbose)

    say = print if verbose != 0 else _say_nothing
    say(f"Attacking both on {len(data.x_test):,} test images\n")
    fgsm, _ = _attacks(settings)
    on_plain = fgsm(
        networks[PLAIN],
        data.x_test,
        data.y_test,
        batch_size=_ATTACK_BATCH,
        early_stop=False,
    )
    results = _measure(networks, data, on_plain, settings, seconds)

    directory = Path(settings.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    result = DemoResult(
        settings=settings,
        batch_size=recipe_for(settings.dataset).batch_size,
        test_images=len(data.x_test),
        networks=results,
        figure=directory / "perturbations.png",
    )
    _draw(networks, data, on_plain, settings).savefig(result.figure, dpi=150)
    text = json.dumps(result.to_dict(), indent=2)
    (directory / "results.json").write_text(f"{text}\n", encoding="utf-8")
    return result


def train_pair(
    data: datasets.ImageDataset, settings: DemoSettings, verbose: int | str = "auto"
) -> tuple[dict[str, keras.Model], dict[str, float]]:
    """Trains a plain and a regularised copy of a network.

    Args:
        data: The dataset that the settings name.
        settings: The `DemoSettings`.
        verbose: How much Keras shows of the training, as in `fit`; 0 for nothing.

    Returns:
        The networks, plain Keras models whose outputs are logits, and the seconds that
        an epoch took: two dictionaries by `PLAIN` and `REGULARISED`.

    Example:
    >>> networks, _ = train_pair(datasets.load("digits"), DemoSettings())
    """
    say = print if verbose != 0 else _say_nothing
    recipe = recipe_for(settings.dataset)
    plain, regularised = _twins(recipe, data, settings)
    seconds = {}
    for name, model in ((PLAIN, plain), (REGULARISED, regularised)):
        say(f"Training the {name} network on {data.name}")
        seconds[name] = _train(model, data, recipe, settings, verbose)
    return {PLAIN: plain, REGULARISED: regularised.base_model}, seconds


def format_table(networks: Mapping[str, NetworkResult]) -> str:
    """Formats the measurements as a table, a line for each network.

    Args:
        networks: What was measured of each network, by its name.

    Returns:
        Lines of text.
    """
    head = ["network", "clean", "FGSM on plain", "FGSM", _pgd_name(), "s/epoch"]
    rows = [
        [
            name,
            *(
                f"{100 * value:.2f} %"
                for value in (
                    result.clean,
                    result.fgsm_on_plain,
                    result.fgsm,
                    result.pgd,
                )
            ),
            f"{result.seconds_per_epoch:.2f}",
        ]
        for name, result in networks.items()
    ]
    return text_table(head, rows)


def format_notes(result: DemoResult) -> str:
    """Formats what stands under the table: what was measured, and on what.

    Args:
        result: The demo's result.

    Returns:
        Lines of text.
    """
    settings = result.settings
    norm = NormType(settings.adv_grad_norm).value
    notes = {
        "clean": "accuracy on the test images as they are",
        "FGSM on plain": (
            "the same images for both networks: one step against the plain network"
        ),
        "FGSM": "one step of the radius against the network itself",
        _pgd_name(): (
            f"{_PGD_ITERATIONS} steps of 2.5 × radius / {_PGD_ITERATIONS} against the "
            "network itself, from a random start"
        ),
        "s/epoch": "seconds of training per epoch, compilation left out"
        if settings.epochs != 1
        else "seconds of training in the only epoch, compilation included",
    }
    width = max(len(name) for name in notes)
    return "\n".join(
        [
            f"Dataset {settings.dataset}, {result.test_images:,} test images; radius "
            f"{settings.radius:.4g} in the {norm} norm, pixels in [0, 1].",
            *(f"{name.ljust(width)}  {text}" for name, text in notes.items()),
            f"Figure: {result.figure}",
        ]
    )


def _pgd_name() -> str:
    return f"PGD-{_PGD_ITERATIONS}"


def _say_nothing(_: str) -> None:
    pass


def _loss() -> keras.losses.Loss:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _twins(
    recipe: Recipe, data: datasets.ImageDataset, settings: DemoSettings
) -> tuple[keras.Model, AdversarialRegularization]:
    """Makes the plain network, and a copy with the same weights, regularised."""
    keras.utils.set_random_seed(settings.seed)
    plain = recipe.network(data.x_train.shape[1:], data.num_classes)
    twin = keras.models.clone_model(plain)
    twin.set_weights(plain.get_weights())
    return plain, AdversarialRegularization(twin, settings.adv_config())


def _train(
    model: keras.Model,
    data: datasets.ImageDataset,
    recipe: Recipe,
    settings: DemoSettings,
    verbose: int | str,
) -> float:
    """Trains a model, and returns the seconds that an epoch took."""
    model.compile(optimizer="adam", loss=_loss(), metrics=["accuracy"])
    stopwatch = _Stopwatch()
    keras.utils.set_random_seed(settings.seed)
    model.fit(
        data.x_train,
        data.y_train,
        batch_size=recipe.batch_size,
        epochs=settings.epochs,
        callbacks=[stopwatch],
        verbose=verbose,
    )
    return stopwatch.typical()


class _Stopwatch(keras.callbacks.Callback):
    """Measures how long each epoch takes."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Starts the watch."""
        self._begin = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Reads the watch."""
        self.seconds.append(time.perf_counter() - self._begin)

    def typical(self) -> float:
        """Returns the median, without the first epoch, which compiles, if it can."""
        return statistics.median(self.seconds[1:] or self.seconds)


def _attacks(settings: DemoSettings) -> tuple[attacks.FGSM, attacks.PGD]:
    """The attacks of the demo, on the radius that the network was trained with."""
    what: dict[str, Any] = {
        "epsilon": settings.radius,
        "norm": settings.adv_grad_norm,
        "clip_value_min": 0.0,
        "clip_value_max": 1.0,
        "seed": settings.seed,
    }
    return attacks.FGSM(**what), attacks.PGD(iterations=_PGD_ITERATIONS, **what)


def _measure(
    networks: Mapping[str, keras.Model],
    data: datasets.ImageDataset,
    on_plain: np.ndarray,
    settings: DemoSettings,
    seconds: Mapping[str, float],
) -> dict[str, NetworkResult]:
    x, y = data.x_test, data.y_test
    results = {}
    for name, network in networks.items():

        def accuracy(x: np.ndarray, network: keras.Model = network) -> float:
            return float(np.mean(_predict(network, x) == y))

        fgsm, pgd = (
            accuracy(attack(network, x, y, batch_size=_ATTACK_BATCH))
            for attack in _attacks(settings)
        )
        results[name] = NetworkResult(
            clean=accuracy(x),
            fgsm_on_plain=accuracy(on_plain),
            fgsm=fgsm,
            pgd=pgd,
            seconds_per_epoch=seconds[name],
        )
    return results


def _predict(network: keras.Model, x: np.ndarray) -> np.ndarray:
    logits = network.predict(x, batch_size=_ATTACK_BATCH, verbose=0)
    return np.argmax(logits, axis=-1)


def _draw(
    networks: dict[str, keras.Model],
    data: datasets.ImageDataset,
    on_plain: np.ndarray,
    settings: DemoSettings,
) -> Any:
    shown = slice(_IMAGES_IN_FIGURE)
    clean, perturbed = data.x_test[shown], on_plain[shown]
    norm = NormType(settings.adv_grad_norm).value
    return plots.perturbation_grid(
        clean,
        perturbed,
        data.y_test[shown],
        {
            name: (_predict(network, clean), _predict(network, perturbed))
            for name, network in networks.items()
        },
        class_names=data.class_names,
        title=(
            f"The first test images of {data.name}, perturbed against the plain "
            f"network (FGSM, radius {settings.radius:.4g}, {norm} norm)"
        ),
    )
