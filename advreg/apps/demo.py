"""The demo: one network trained twice, plainly and with adversarial regularisation.

`run` trains both copies on a dataset, attacks both, and returns what a user wants to
compare: accuracy on clean and on perturbed images, and the time of an epoch.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from advreg import attacks, datasets, plots
from advreg.apps.recipes import Recipe, recipe_for
from advreg.apps.settings import DemoSettings
from advreg.config.norms import NormType
from advreg.evaluation.tables import text_table
from advreg.training.model import AdversarialRegularization

PLAIN = "plain"
REGULARISED = "regularised"

_PGD_ITERATIONS = 20
_ATTACK_BATCH = 250
_IMAGES_IN_FIGURE = 10


@dataclasses.dataclass(frozen=True)
class NetworkResult:
    """Measurements of one network. Accuracies are fractions.

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
    """The demo's result. Its `str` is the table and an explanation of its columns.

    Args:
        settings: The settings, with the recipe's values filled in.
        batch_size: Number of images in a batch of training.
        test_images: Number of images that accuracies are measured on.
        networks: Measurements of each network, by its name.
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
        DatasetError: The dataset cannot be loaded. It is a `ValueError`.
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
    plain, regularised = make_twins(recipe, data, settings)
    seconds = {}
    for name, model in ((PLAIN, plain), (REGULARISED, regularised)):
        say(f"Training the {name} network on {data.name}")
        seconds[name] = train_network(model, data, recipe, settings, verbose)
    return {PLAIN: plain, REGULARISED: regularised.base_model}, seconds


def format_table(networks: Mapping[str, NetworkResult]) -> str:
    """Formats the measurements as a table with a line for each network.

    Args:
        networks: Measurements of each network, by its name.

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
    """Formats the notes under the table: what each column is, and the settings.

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


def make_twins(
    recipe: Recipe, data: datasets.ImageDataset, settings: DemoSettings
) -> tuple[keras.Model, AdversarialRegularization]:
    """Makes a plain network, and a regularised copy with the same weights."""
    keras.utils.set_random_seed(settings.seed)
    plain = recipe.network(data.x_train.shape[1:], data.num_classes)
    twin = keras.models.clone_model(plain)
    twin.set_weights(plain.get_weights())
    return plain, AdversarialRegularization(twin, settings.adv_config())


def train_network(
    model: keras.Model,
    data: datasets.ImageDataset,
    recipe: Recipe,
    settings: DemoSettings,
    verbose: int | str,
) -> float:
    """Trains a model, and returns the typical seconds of an epoch."""
    model.compile(optimizer="adam", loss=_loss(), metrics=["accuracy"])
    timer = EpochTimer()
    keras.utils.set_random_seed(settings.seed)
    model.fit(
        data.x_train,
        data.y_train,
        batch_size=recipe.batch_size,
        epochs=settings.epochs,
        callbacks=[timer],
        verbose=verbose,
    )
    return timer.typical()


class EpochTimer(keras.callbacks.Callback):
    """Measures how long each epoch takes."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Starts the clock."""
        self._begin = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Stops the clock."""
        self.seconds.append(time.perf_counter() - self._begin)

    def typical(self) -> float:
        """Returns the median, without the first epoch if there are others.

        The first epoch includes compilation.
        """
        return statistics.median(self.seconds[1:] or self.seconds)


def _attacks(settings: DemoSettings) -> tuple[attacks.FGSM, attacks.PGD]:
    """Makes the demo's attacks. Their radius is the step of training."""
    arguments: dict[str, Any] = {
        "epsilon": settings.radius,
        "norm": settings.adv_grad_norm,
        "clip_value_min": 0.0,
        "clip_value_max": 1.0,
        "seed": settings.seed,
    }
    pgd = attacks.PGD(iterations=_PGD_ITERATIONS, **arguments)
    return attacks.FGSM(**arguments), pgd


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
