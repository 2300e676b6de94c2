"""Draws figures. Matplotlib is imported only when one is drawn, and opens no window."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from keras import ops

from advreg._extras import import_extra
from advreg._types import Schedule
from advreg.checks import brief, check_count, describe_value
from advreg.config.configs import AdvRegConfig
from advreg.config.norms import NormType

RIGHT = "green"
WRONG = "red"

Classes: TypeAlias = Sequence[int] | np.ndarray
# Matplotlib is an extra, and the annotations must not need it.
_Figure: TypeAlias = Any
_Axes: TypeAlias = Any
_Report: TypeAlias = Any  # A `RobustnessReport`, whose module imports this one.


def figure_class() -> type:
    """Returns Matplotlib's `Figure`, which draws without a window.

    Raises:
        ImportError: The extra `demo` is not installed.
    """
    return import_extra("matplotlib.figure", "demo").Figure


def check_format(path: Path) -> None:
    """Checks that Matplotlib can write the format in which a file name ends.

    Raises:
        ImportError: The extra `demo` is not installed.
        ValueError: Matplotlib cannot write it.
    """
    kind = path.suffix[1:].lower()
    known = figure_class()().canvas.get_supported_filetypes()
    if kind not in known:
        raise ValueError(
            f"`figure` must end in one of {', '.join(sorted(known))}. Received: {path}"
        )


def perturbation_grid(
    clean: np.ndarray,
    perturbed: np.ndarray,
    labels: Classes,
    predictions: Mapping[str, tuple[Classes, Classes]],
    *,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
    figure: _Figure | None = None,
) -> _Figure:
    """Draws clean and perturbed images with the predictions of several networks.

    Each example is a column: the clean image above, the perturbed one below. Under each
    image there is one line per network, green if its prediction is right, red if it is
    wrong.

    Args:
        clean: Images in [0, 1] of shape `[n, height, width, channels]`, with one or
            three channels.
        perturbed: The perturbed images, of the same shape.
        labels: The `n` true classes.
        predictions: For each network, by its name, the `n` classes that it predicts
            for the clean images and the `n` for the perturbed ones.
        class_names: Names of the classes, by default their numbers.
        title: Title of the figure.
        figure: Matplotlib figure to draw into, by default a new one of fitting size.

    Returns:
        The figure.

    Raises:
        ImportError: The extra `demo` is not installed.
        ValueError: Shapes or lengths do not fit together.

    Example:
    >>> figure = perturbation_grid(
    ...     x, x_adv, y, {"plain": (plain_on_x, plain_on_x_adv)})
    >>> figure.savefig("perturbations.png")
    """
    _check_images(clean, perturbed)
    _check_lengths(
        len(clean),
        labels,
        {f"predictions[{name!r}]": pair for name, pair in predictions.items()},
    )
    clean, perturbed = map(_array, (clean, perturbed))
    name = _namer(class_names)
    if figure is None:
        longest = max(len(name(int(index))) for index in labels)
        figure = figure_class()(
            figsize=_size(len(clean), longest, len(predictions)), layout="constrained"
        )
    axes = figure.subplots(2, len(clean), squeeze=False)
    for row, images in enumerate((clean, perturbed)):
        for column, image in enumerate(images):
            _draw_image(axes[row, column], image)
            for line, predicted in enumerate(predictions.values()):
                _draw_prediction(
                    axes[row, column],
                    line,
                    name(int(predicted[row][column])),
                    bool(predicted[row][column] == labels[column]),
                )
        _draw_row_names(axes[row, 0], ("clean", "perturbed")[row], predictions)
    for column, label in enumerate(labels):
        axes[0, column].set_title(f"true: {name(int(label))}", fontsize=9)
    if title is not None:
        _write(figure.suptitle, title, 11)
    _write(figure.supxlabel, _legend(list(predictions)), 9)
    return figure


def perturbation_panels(
    clean: np.ndarray,
    perturbed: np.ndarray,
    labels: Classes,
    predictions: tuple[Classes, Classes],
    *,
    confidences: tuple[Sequence[float], Sequence[float]] | None = None,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
    figure: _Figure | None = None,
) -> _Figure:
    """Draws clean image, perturbation and perturbed image of each example in a row.

    All perturbations have one scale, from minus to plus the largest change of a pixel.
    For grey images blue means darker and red lighter. For RGB images the perturbation
    is magnified around grey. Under the images are the predictions, green if right, red
    if wrong.

    Args:
        clean: Images in [0, 1] of shape `[n, height, width, channels]`, with one or
            three channels.
        perturbed: The perturbed images, of the same shape.
        labels: The `n` true classes.
        predictions: The `n` classes that the network predicts for the clean images, and
            the `n` for the perturbed ones.
        confidences: The probabilities, in [0, 1], of these predictions.
        class_names: Names of the classes, by default their numbers.
        title: Title of the figure.
        figure: Matplotlib figure to draw into, by default a new one of fitting size.

    Returns:
        The figure.

    Raises:
        ImportError: The extra `demo` is not installed.
        ValueError: Shapes or lengths do not fit together.

    Example:
    >>> p, p_adv = model.predict(x), model.predict(x_adv)
    >>> figure = perturbation_panels(
    ...     x, x_adv, y, (p.argmax(1), p_adv.argmax(1)),
    ...     confidences=(p.max(1), p_adv.max(1)))
    >>> figure.savefig("panels.png")
    """
    _check_images(clean, perturbed)
    paired: dict[str, tuple[Any, Any]] = {"predictions": predictions}
    if confidences is not None:
        paired["confidences"] = confidences
    _check_lengths(len(clean), labels, paired)
    clean, perturbed = map(_array, (clean, perturbed))
    name = _namer(class_names)
    texts = [
        [name(int(index)) for index in part]
        if confidences is None
        else [
            f"{name(int(index))}, {100 * share:.0f} %"
            for index, share in zip(part, confidences[which], strict=True)
        ]
        for which, part in enumerate(predictions)
    ]
    change = np.asarray(perturbed, "float64") - np.asarray(clean, "float64")
    largest = float(np.nanmax(np.abs(change), initial=0.0))
    with_bar = largest > 0 and clean.shape[-1] == 1
    if figure is None:
        longest = max(len(text) for part in texts for text in part)
        longest = max(longest, *(6 + len(name(int(index))) for index in labels))
        figure = figure_class()(
            figsize=_panels_size(len(clean), longest, with_bar), layout="constrained"
        )
        figure.get_layout_engine().set(h_pad=0.1)  # Each row has text on both sides.
    axes = figure.subplots(len(clean), 3, squeeze=False)
    for row, label in enumerate(labels):
        for column, image in ((0, clean[row]), (2, perturbed[row])):
            part = column // 2
            _draw_image(axes[row, column], image)
            right = bool(predictions[part][row] == label)
            _draw_prediction(axes[row, column], 0, texts[part][row], right)
        _draw_change(axes[row, 1], change[row], largest)
        axes[row, 0].set_title(f"true: {name(int(label))}", fontsize=9)
    for column, head in enumerate(("clean", "perturbation", "perturbed")):
        ax = axes[0, column]
        ax.set_title(f"{head}\n{ax.get_title()}", fontsize=9)
    if with_bar:
        bar = figure.colorbar(
            axes[0, 1].images[0],
            ax=axes,
            location="bottom",
            ticks=[-largest, 0.0, largest],
            format=lambda value, _: f"{value:+.3g}" if value else "0",
            shrink=0.4,
            aspect=30,
        )
        bar.ax.tick_params(labelsize=8)
        bar.set_label("perturbation of a pixel", fontsize=9)
    if title is not None:
        _write(figure.suptitle, title, 11)
    _write(figure.supxlabel, _scale_in_words(largest, clean.shape[-1]), 9)
    return figure


def robustness_curves(
    reports: _Report | Mapping[str, _Report],
    ax: _Axes | None = None,
) -> _Axes:
    """Draws accuracy against radius, with its 95 % confidence interval.

    For one report, each attack is a line, and the worst case over all attacks is
    another. For several reports, each is a line: its worst case. Every norm has lines
    of its own.

    Args:
        reports: A `RobustnessReport`, or a dictionary of them. Its keys are the names
            in the legend.
        ax: Matplotlib axes to draw into, by default those of a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: The extra `demo` is not installed.
        TypeError: `reports` is something else.
        ValueError: No report holds an attack with a radius.

    Example:
    >>> ax = robustness_curves({"plain": plain_report, "regularised": robust_report})
    >>> ax.figure.savefig("robustness.png")
    """
    _check_reports(reports)
    curves = _curves(reports)
    if ax is None:
        ax = figure_class()(figsize=(6.4, 4.4), layout="constrained").subplots()
    for (name, points), marker in zip(
        curves.items(), itertools.cycle("osD^vP*X"), strict=False
    ):
        radii = [radius for radius, _ in points]
        low, high = zip(*(accuracy.interval for _, accuracy in points), strict=True)
        (line,) = ax.plot(
            radii,
            [100 * accuracy.accuracy for _, accuracy in points],
            marker=marker,
            linestyle="--" if name.startswith("worst case") else "-",
            label=name,
        )
        ax.fill_between(
            radii,
            [100 * bound for bound in low],
            [100 * bound for bound in high],
            color=line.get_color(),
            alpha=0.15,
            linewidth=0,
        )
    if not ax.get_title():
        ax.set_title(_curves_title(reports))
    ax.set_xlabel("radius ε of the perturbation, in units of the input")
    ax.set_ylabel("accuracy in % (shaded: 95 % interval)")
    ax.set_ylim(-2, 102)
    ax.set_xlim(left=0)
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


def schedules(
    configs: AdvRegConfig | Mapping[str, AdvRegConfig],
    steps: int,
    figure: _Figure | None = None,
) -> _Figure:
    """Draws the values of schedules in configurations over the steps of the optimizer.

    Each field that is a schedule in one of them has a panel, with a line for each
    configuration that sets it.

    Args:
        configs: An `AdvRegConfig`, or a dictionary of them. Its keys are the names in
            the legend.
        steps: Number of steps to draw. A training takes batches per epoch times epochs.
        figure: Matplotlib figure to draw into, by default a new one of fitting size.

    Returns:
        The figure.

    Raises:
        ImportError: The extra `demo` is not installed.
        TypeError: `configs` is something else.
        ValueError: No field is a schedule.

    Example:
    >>> ramp = keras.optimizers.schedules.PolynomialDecay(0.0, 1000, 0.3)
    >>> figure = schedules(AdvRegConfig.fast(ramp), steps=2000)
    >>> figure.savefig("schedules.png")
    """
    steps = check_count("steps", steps)
    named = configs if isinstance(configs, Mapping) else {"": configs}
    values = {name: _numbers(config) for name, config in named.items()}
    fields = [
        field
        for field in next(iter(values.values()), {})
        if any(isinstance(found[field], Schedule) for found in values.values())
    ]
    if not fields:
        raise ValueError(
            "`configs` must hold a `LearningRateSchedule`: there is nothing to draw. "
            f"Received: {brief(configs)}"
        )
    if figure is None:
        size = (6.4, 1.2 + 2.2 * len(fields))
        figure = figure_class()(figsize=size, layout="constrained")
    panels = figure.subplots(len(fields), sharex=True, squeeze=False)[:, 0]
    at = np.unique(np.linspace(0, steps, 401).round().astype("int64"))
    for ax, field in zip(panels, fields, strict=True):
        for (name, found), dashes in zip(
            values.items(), itertools.cycle(["-", "--", "-.", ":"]), strict=False
        ):
            value = found[field]
            if value is not None:
                function = (
                    value if isinstance(value, Schedule) else lambda _, v=value: v
                )
                ax.plot(at, [float(function(step)) for step in at], dashes, label=name)
        ax.set_ylabel(field)
        ax.grid(alpha=0.3)
    panels[-1].set_xlabel("steps of the optimizer")
    if isinstance(configs, Mapping):
        panels[0].legend()
    return figure


def _numbers(config: Any) -> dict[str, Any]:
    """Returns the fields of a configuration that may be schedules."""
    if not isinstance(config, AdvRegConfig):
        raise TypeError(
            "`configs` must be an `AdvRegConfig`, or a dictionary of them by name. "
            f"Received: {describe_value(config)}"
        )
    neighbor = config.adv_neighbor_config
    return {
        "multiplier": config.multiplier,
        "pgd_epsilon": neighbor.pgd_epsilon,
        "adv_step_size": neighbor.adv_step_size,
        "init_radius": neighbor.init_radius,
        "weight_perturbation": config.weight_perturbation,
    }


def _curves_title(
    reports: _Report | Mapping[str, _Report],
) -> str:
    if not isinstance(reports, Mapping):
        # Matplotlib would read text between dollar signs as a formula.
        return textwrap.fill(reports.subject.replace("$", r"\$"), 60)
    counts = {report.examples for report in reports.values()}
    on = f" on {counts.pop():,} examples" if len(counts) == 1 else ""
    return f"Accuracy in the worst case over all attacks{on}"


def _check_reports(reports: Any) -> None:
    listed = list(reports.values()) if isinstance(reports, Mapping) else [reports]
    for report in listed:
        if not all(hasattr(report, name) for name in ("results", "worst_cases")):
            raise TypeError(
                "`reports` must be a `RobustnessReport`, or a dictionary of them by "
                f"name. Received: {describe_value(report)}"
            )


def _curves(
    reports: _Report | Mapping[str, _Report],
) -> dict[str, list[tuple[float, Any]]]:
    """Returns the lines of a figure: radii and accuracies, with the clean one at 0."""
    if isinstance(reports, Mapping):
        many = [
            (report.clean, name, line)
            for name, report in reports.items()
            for line in report.worst_cases
        ]
    else:
        worst = reports.worst_cases if len(reports.results) > 1 else ()
        many = [(reports.clean, line.name, line) for line in (*reports.results, *worst)]
    curves: dict[str, dict[float, Any]] = {}
    for clean, name, line in many:
        if line.norm is not None and line.epsilon is not None:
            curve = curves.setdefault(
                f"{name}, {NormType(line.norm).symbol}", {0.0: clean}
            )
            curve[line.epsilon] = line
    if not curves:
        raise ValueError(
            "`reports` must hold an attack with a radius: there is nothing to draw. "
            f"Received: {brief(reports)}"
        )
    return {
        name: sorted(curve.items(), key=lambda point: point[0])
        for name, curve in curves.items()
    }


def _array(images: Any) -> np.ndarray:
    """Returns images as an array, also if they are tensors that ask for a gradient."""
    return images if isinstance(images, np.ndarray) else ops.convert_to_numpy(images)


def _check_images(clean: np.ndarray, perturbed: np.ndarray) -> None:
    shapes = tuple(np.shape(clean)), tuple(np.shape(perturbed))
    if (
        shapes[0] != shapes[1]
        or len(shapes[0]) != 4
        or 0 in shapes[0]
        or shapes[0][-1] not in (1, 3)
    ):
        raise ValueError(
            "`clean` and `perturbed` must have the same shape [n, height, width, "
            f"channels], with one or three channels. Received: {shapes[0]} and "
            f"{shapes[1]}"
        )


def _check_lengths(
    count: int,
    labels: Classes,
    paired: Mapping[str, tuple[Any, Any]],
) -> None:
    """Checks the lengths of labels, and of pairs for clean and perturbed images."""
    lengths = {"labels": [len(labels)]}
    for name, pair in paired.items():
        lengths[name] = [len(part) for part in pair]
    for name, found in lengths.items():
        expected = [count] if name == "labels" else [count, count]
        if found != expected:
            what = "numbers" if name == "confidences" else "classes"
            raise ValueError(
                f"`{name}` must hold {count} {what}, as many as there are images"
                f"{'' if name == 'labels' else ', for clean and for perturbed ones'}. "
                f"Received: the lengths {found}"
            )


def _namer(class_names: Sequence[str] | None) -> Callable[[int], str]:
    """Makes a function from the number of a class to its name."""

    def name(index: int) -> str:
        return str(index) if class_names is None else str(class_names[index])

    return name


def _size(columns: int, longest_name: int, lines: int) -> tuple[float, float]:
    """Returns width and height in inches that leave room for the text."""
    column = max(1.1, 0.35 + 0.085 * longest_name)
    return 1.3 + column * columns, 1.0 + 2 * (column + 0.2 * lines)


def _panels_size(rows: int, longest_text: int, with_bar: bool) -> tuple[float, float]:
    """Returns width and height in inches of three columns of images and their texts."""
    column = max(1.5, 0.35 + 0.085 * longest_text)
    return 0.3 + 3 * column, (1.4 if with_bar else 0.7) + rows * (column + 0.6)


def _draw_image(ax: Any, image: np.ndarray) -> None:
    pixels = np.clip(image, 0.0, 1.0)
    if pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    ax.imshow(pixels, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])


def _draw_change(ax: Any, change: np.ndarray, largest: float) -> None:
    """Draws a perturbation, with 0 in the middle of the scale."""
    scale = largest or 1.0
    if change.shape[-1] == 1:
        ax.imshow(
            change[..., 0],
            cmap="RdBu_r",
            vmin=-scale,
            vmax=scale,
            interpolation="nearest",
        )
    else:
        ax.imshow(0.5 + change / (2 * scale), interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])


def _scale_in_words(largest: float, channels: int) -> str:
    marks = "Predictions: green ✓ right, red ✗ wrong"
    if not largest:
        return f"{marks}. No pixel is perturbed"
    if channels == 1:  # The colour bar shows the scale.
        return marks
    return (
        f"{marks}. Perturbations are magnified {0.5 / largest:.3g} times around grey: "
        f"no value moves by more than {largest:.3g}"
    )


def _draw_prediction(ax: Any, line: int, name: str, right: bool) -> None:
    # The mark shows what the colour shows, also in black and white.
    ax.annotate(
        f"{name} {'✓' if right else '✗'}",
        xy=(0.5, 0.0),
        xycoords="axes fraction",
        xytext=(0, _line_offset(line)),
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=9,
        color=RIGHT if right else WRONG,
    )


def _draw_row_names(ax: Any, row: str, networks: Iterable[str]) -> None:
    ax.set_ylabel(row, fontsize=10)
    for line, network in enumerate(networks):
        ax.annotate(
            f"{network}:",
            xy=(0.0, 0.0),
            xycoords="axes fraction",
            xytext=(-8, _line_offset(line)),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=9,
        )


def _write(write: Callable[..., Any], text: str, size: int) -> None:
    """Writes a text across the figure, wrapped to its width."""
    artist = write("", fontsize=size)
    points = 72 * artist.get_figure().get_figwidth()
    artist.set_text(textwrap.fill(text, max(20, int(points / (0.6 * size)))))


def _line_offset(line: int) -> float:
    return -4.0 - 13.0 * line


def _legend(networks: Sequence[str]) -> str:
    lines = ", then ".join(f"the {network} network's" for network in networks)
    return f"Predictions under each image: {lines} (green ✓ right, red ✗ wrong)"
