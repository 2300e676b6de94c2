import io
import pathlib
import sys

import numpy as np
import pytest
from keras.optimizers.schedules import PiecewiseConstantDecay, PolynomialDecay

from advreg import AdvRegConfig, make_adv_reg_config, plots
from advreg.evaluation.report import Accuracy, RobustnessReport

pytestmark = pytest.mark.every_backend

matplotlib = pytest.importorskip("matplotlib")

COLORS = {plots.RIGHT, plots.WRONG}


def images(count=3, channels=1, seed=0):
    return np.random.default_rng(seed).random((count, 5, 5, channels), "float32")


def grid(channels=1, **kwargs):
    clean = images(channels=channels)
    return plots.perturbation_grid(
        clean,
        clean + 0.1,
        np.array([0, 1, 2]),
        {
            "plain": (np.array([0, 1, 1]), np.array([2, 1, 0])),
            "robust": (np.array([0, 2, 2]), np.array([0, 1, 2])),
        },
        **kwargs,
    )


def predictions(figure):
    """The coloured texts: two rows of axes, three columns, two lines each."""
    return [
        [
            (text.get_text(), text.get_color())
            for text in ax.texts
            if "✓" in text.get_text() or "✗" in text.get_text()
        ]
        for ax in figure.axes
    ]


def test_colours():
    right, wrong = plots.RIGHT, plots.WRONG
    assert (right, wrong) == ("green", "red")
    assert predictions(grid()) == [
        [("0 ✓", right), ("0 ✓", right)],
        [("1 ✓", right), ("2 ✗", wrong)],
        [("1 ✗", wrong), ("2 ✓", right)],
        [("2 ✗", wrong), ("0 ✓", right)],
        [("1 ✓", right), ("1 ✓", right)],
        [("0 ✗", wrong), ("2 ✓", right)],
    ]


def test_class_names():
    figure = grid(class_names=["cat", "dog", "hen"])
    assert [ax.get_title() for ax in figure.axes] == [
        *("true: cat", "true: dog", "true: hen", "", "", "")
    ]
    assert [text for text, _ in predictions(figure)[3]] == ["hen ✗", "cat ✓"]


def test_says_which_line_is_which_network():
    figure = grid(title="Title")
    assert figure.get_suptitle() == "Title"
    legend = figure.get_supxlabel()
    assert legend.index("plain") < legend.index("robust")
    for row, ax in zip(("clean", "perturbed"), figure.axes[::3], strict=True):
        assert ax.get_ylabel() == row
        names = [text for text in ax.texts if text.get_text().endswith(":")]
        assert [text.get_text() for text in names] == ["plain:", "robust:"]
        heights = [text.xyann[1] for text in names]
        assert heights[0] > heights[1]


@pytest.mark.parametrize(("channels", "shape"), [(1, (5, 5)), (3, (5, 5, 3))])
def test_images(channels, shape):
    figure = grid(channels)
    clean = images(channels=channels)
    for index, ax in enumerate(figure.axes):
        (image,) = ax.images
        expected = clean[index % 3] + (0.1 if index >= 3 else 0.0)
        assert image.get_array().shape == shape
        np.testing.assert_allclose(
            image.get_array(), np.clip(expected, 0, 1).reshape(shape), atol=1e-6
        )
        assert image.get_clim() == (0.0, 1.0)


@pytest.mark.parametrize("names", [None, ["cat", "a rather long name", "hen"]])
def test_no_text_is_clipped(names):
    figure = grid(class_names=names, title="Some title")
    figure.savefig(io.BytesIO(), format="png")
    width, height = figure.canvas.get_width_height()
    texts = [text for ax in figure.axes for text in [*ax.texts, ax.title]]
    for text in [*texts, *figure.texts]:
        box = text.get_window_extent()
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height


def test_no_prediction_overlaps_its_neighbour():
    figure = grid(class_names=["cat", "a rather long name", "a rather long one"])
    figure.savefig(io.BytesIO(), format="png")
    boxes = [
        text.get_window_extent()
        for ax in figure.axes
        for text in ax.texts
        if text.get_color() in COLORS
    ]
    for index, box in enumerate(boxes):
        for other in boxes[index + 1 :]:
            assert not box.overlaps(other)


def test_draws_into_a_given_figure():
    figure = plots.figure_class()()
    assert grid(figure=figure) is figure
    assert len(figure.axes) == 6


def test_loads_no_backend_with_windows(monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    grid().savefig(io.BytesIO(), format="png")
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(
    ("clean", "perturbed"),
    [
        (images(3), images(2)),
        (images(3, 2), images(3, 2)),
        (images(3)[..., 0], images(3)[..., 0]),
        (images(0), images(0)),
    ],
)
def test_shapes_are_checked(clean, perturbed):
    with pytest.raises(ValueError, match="`clean` and `perturbed` must have"):
        plots.perturbation_grid(clean, perturbed, [0] * len(clean), {})


@pytest.mark.parametrize(
    ("labels", "predicted", "name"),
    [
        ([0, 1], ([0, 1, 2], [0, 1, 2]), "`labels`"),
        ([0, 1, 2], ([0, 1], [0, 1, 2]), r"`predictions\['plain'\]`"),
        ([0, 1, 2], ([0, 1, 2], [0, 1, 2, 3]), r"`predictions\['plain'\]`"),
        ([0, 1, 2], ([0, 1, 2],), r"`predictions\['plain'\]`"),
    ],
)
def test_lengths_are_checked(labels, predicted, name):
    with pytest.raises(ValueError, match=f"{name} must hold 3 classes"):
        plots.perturbation_grid(images(), images(), labels, {"plain": predicted})


def test_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'advreg\[demo\]'"):
        grid()


# perturbation_panels


def panels(channels=1, change=0.1, count=3, **kwargs):
    clean = 0.2 + 0.5 * images(count, channels)
    moved = clean.copy()
    moved[:, 0] += change
    moved[:, 1] -= change / 2
    labels = np.arange(count)
    return plots.perturbation_panels(
        clean, moved, labels, (labels, (labels + [0, 1, 0][:count]) % 3), **kwargs
    )


def rows_of(figure):
    """The axes of the images, a list for each example."""
    axes = [ax for ax in figure.axes if ax.images]
    axes = [ax for ax in axes if ax.get_label() != "<colorbar>"]
    return [axes[index : index + 3] for index in range(0, len(axes), 3)]


def test_panels_show_images_and_what_they_are_taken_for():
    figure = panels(confidences=([0.9, 0.8, 1.0], [0.5, 0.994, 0.6]), title="Title")
    assert figure.get_suptitle() == "Title"
    rows = rows_of(figure)
    texts = [
        [[(t.get_text(), t.get_color()) for t in ax.texts] for ax in row]
        for row in rows
    ]
    assert texts == [
        [[("0, 90 % ✓", "green")], [], [("0, 50 % ✓", "green")]],
        [[("1, 80 % ✓", "green")], [], [("2, 99 % ✗", "red")]],
        [[("2, 100 % ✓", "green")], [], [("2, 60 % ✓", "green")]],
    ]
    assert [ax.get_title() for ax in rows[0]] == [
        *("clean\ntrue: 0", "perturbation\n", "perturbed\n")
    ]
    assert [row[0].get_title() for row in rows[1:]] == ["true: 1", "true: 2"]
    clean = 0.2 + 0.5 * images()
    for index, (left, _, right) in enumerate(rows):
        np.testing.assert_allclose(
            left.images[0].get_array(), clean[index, ..., 0], rtol=1e-6
        )
        np.testing.assert_allclose(
            right.images[0].get_array()[0], clean[index, 0, :, 0] + 0.1, rtol=1e-6
        )


def test_panels_of_grey_images_have_one_symmetric_scale():
    figure = panels()
    for row in rows_of(figure):
        (image,) = row[1].images
        np.testing.assert_allclose(image.get_clim(), (-0.1, 0.1), rtol=1e-6)
        np.testing.assert_allclose(image.get_array()[0], 0.1, rtol=1e-5)
        np.testing.assert_allclose(image.get_array()[1], -0.05, rtol=1e-5)
        assert not np.any(image.get_array()[2:])
    figure.savefig(io.BytesIO(), format="png")
    (bar,) = [ax for ax in figure.axes if ax.get_label() == "<colorbar>"]
    assert [tick.get_text() for tick in bar.get_xticklabels()] == ["-0.1", "0", "+0.1"]


def test_panels_of_rgb_images_are_magnified_around_grey():
    figure = panels(channels=3)
    for row in rows_of(figure):
        shown = row[1].images[0].get_array()
        np.testing.assert_allclose(shown[0], 1.0, rtol=1e-5)
        np.testing.assert_allclose(shown[1], 0.25, rtol=1e-5)
        np.testing.assert_array_equal(shown[2:], 0.5)
    assert len(figure.axes) == 9
    assert "magnified 5 times around grey" in figure.get_supxlabel()
    assert "no value moves by more than 0.1" in figure.get_supxlabel()


@pytest.mark.parametrize(("channels", "middle"), [(1, 0.0), (3, 0.5)])
def test_panels_without_a_perturbation(channels, middle):
    figure = panels(channels, change=0.0, count=1)
    ((_, ax, _),) = rows_of(figure)
    np.testing.assert_array_equal(ax.images[0].get_array(), middle)
    assert figure.get_supxlabel().endswith("No pixel is perturbed")
    figure.savefig(io.BytesIO(), format="png")


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_no_text_of_panels_is_clipped_or_covered(channels, count):
    names = ["cat", "a rather long name of a class", "another rather long name"]
    figure = panels(
        channels,
        count=count,
        class_names=names,
        confidences=([0.5] * count, [1.0] * count),
        title="Some title",
    )
    figure.savefig(io.BytesIO(), format="png")
    width, height = figure.canvas.get_width_height()
    texts = [text for ax in figure.axes for text in [*ax.texts, ax.title]]
    boxes = [t.get_window_extent() for t in [*texts, *figure.texts] if t.get_text()]
    for index, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])


def test_panels_draw_into_a_given_figure():
    figure = plots.figure_class()()
    assert panels(figure=figure) is figure


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0, 1]}, "`labels` must hold 3 classes"),
        ({"predictions": ([0, 1, 2], [0])}, "`predictions` must hold 3 classes"),
        ({"confidences": ([1, 1, 1], [0.5])}, "`confidences` must hold 3 numbers"),
        ({"perturbed": images(2)}, "`clean` and `perturbed` must have the same shape"),
    ],
)
def test_arguments_of_panels_are_checked(change, message):
    right = {
        "clean": images(),
        "perturbed": images(),
        "labels": [0, 1, 2],
        "predictions": ([0, 1, 2], [0, 1, 2]),
    }
    with pytest.raises(ValueError, match=f"{message}.*Received: "):
        plots.perturbation_panels(**{**right, **change})


# robustness_curves


def line(name, correct, epsilon=None, norm="infinity"):
    return Accuracy(name, correct, 200, epsilon, None if epsilon is None else norm)


def report(*results, worst=(), name="net"):
    return RobustnessReport(
        name, line("clean", 190), results, worst, line("overall", 0), "", (), 1.0
    )


TWO = report(
    line("FGSM", 100, 0.2),
    line("FGSM", 150, 0.1),
    line("PGD", 60, 0.2),
    line("PGD", 30, 1.0, "l2"),
    worst=(line("worst case", 50, 0.2), line("worst case", 30, 1.0, "l2")),
)


def curves_of(ax):
    return {
        curve.get_label(): np.round(curve.get_xydata(), 6).tolist()
        for curve in ax.get_lines()
    }


def test_curves_of_one_report():
    ax = plots.robustness_curves(TWO)
    assert curves_of(ax) == {
        "FGSM, L∞": [[0, 95], [0.1, 75], [0.2, 50]],
        "PGD, L∞": [[0, 95], [0.2, 30]],
        "PGD, L2": [[0, 95], [1, 15]],
        "worst case, L∞": [[0, 95], [0.2, 25]],
        "worst case, L2": [[0, 95], [1, 15]],
    }
    styles = [curve.get_linestyle() for curve in ax.get_lines()]
    assert styles == ["-", "-", "-", "--", "--"]
    assert ax.get_title() == "Robustness of 'net': 200 examples"
    assert "95 %" in ax.get_ylabel()
    assert "ε" in ax.get_xlabel()
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == list(curves_of(ax))


def test_curves_have_their_confidence_intervals():
    ax = plots.robustness_curves(report(line("PGD", 60, 0.2)))
    (band,) = ax.collections
    heights = np.unique(np.round(band.get_paths()[0].vertices[:, 1], 6))
    bounds = [*line("", 190).interval, *line("", 60).interval]
    expected = np.unique(np.round(100 * np.array(bounds), 6))
    np.testing.assert_allclose(heights, expected)


def test_curves_of_several_reports():
    other = report(line("PGD", 120, 0.2), worst=(line("worst case", 120, 0.2),))
    ax = plots.robustness_curves({"plain": TWO, "robust": other})
    assert curves_of(ax) == {
        "plain, L∞": [[0, 95], [0.2, 25]],
        "plain, L2": [[0, 95], [1, 15]],
        "robust, L∞": [[0, 95], [0.2, 60]],
    }
    title = "Accuracy in the worst case over all attacks on 200 examples"
    assert ax.get_title() == title


def test_curves_draw_into_given_axes_and_leave_their_title():
    given = plots.figure_class()().subplots()
    given.set_title("Mine")
    assert plots.robustness_curves(TWO, given) is given
    assert given.get_title() == "Mine"
    assert TWO.plot(given) is given


@pytest.mark.parametrize("reports", [{}, report(line("boundary", 5))])
def test_nothing_to_draw(reports):
    with pytest.raises(ValueError, match=r"`reports` must hold an attack.*Received: "):
        plots.robustness_curves(reports)


@pytest.mark.parametrize("reports", [None, [TWO], {"a": "TWO"}])
def test_what_is_no_report(reports):
    with pytest.raises(TypeError, match="`reports` must be a `RobustnessReport`, or"):
        plots.robustness_curves(reports)


def test_format_of_a_file():
    plots.check_format(pathlib.Path("a.PDF"))
    with pytest.raises(ValueError, match=r"must end in one of .*png.*: report\.docx"):
        plots.check_format(pathlib.Path("report.docx"))


# --- Schedules


def test_a_panel_for_each_schedule_and_a_line_for_each_configuration():
    ramp = PolynomialDecay(0.0, 100, 0.4)
    configs = {
        "ramp": AdvRegConfig.fast(ramp),
        "late": make_adv_reg_config(
            PiecewiseConstantDecay([150], [0.0, 1.0]), adv_step_size=0.1
        ),
    }
    figure = plots.schedules(configs, 200)
    lines = {
        ax.get_ylabel(): {line.get_label(): line.get_xydata() for line in ax.lines}
        for ax in figure.axes
    }
    assert list(lines) == ["multiplier", "pgd_epsilon", "adv_step_size"]
    assert all(ax.get_legend() is None for ax in figure.axes[1:])
    assert list(lines["pgd_epsilon"]) == ["ramp"]
    steps = np.arange(201)
    expected = {
        ("multiplier", "ramp"): np.ones(201),
        ("multiplier", "late"): np.where(steps > 150, 1.0, 0.0),
        ("pgd_epsilon", "ramp"): np.minimum(0.004 * steps, 0.4),
        ("adv_step_size", "ramp"): np.minimum(0.005 * steps, 0.5),
        ("adv_step_size", "late"): np.full(201, 0.1),
    }
    for (field, name), values in expected.items():
        drawn = np.stack([steps, values], axis=1)
        np.testing.assert_allclose(lines[field][name], drawn, rtol=1e-6, atol=1e-7)


def test_one_configuration_needs_no_legend_and_many_steps_no_time():
    config = make_adv_reg_config(PolynomialDecay(0.0, 10**6, 1.0))
    (ax,) = plots.schedules(config, 10**7).axes
    assert ax.get_legend() is None
    assert len(ax.lines[0].get_xydata()) == 401
    np.testing.assert_array_equal(ax.lines[0].get_xydata()[[0, -1], 0], [0, 10**7])


def test_schedules_draw_into_a_given_figure():
    figure = plots.figure_class()()
    config = make_adv_reg_config(PolynomialDecay(0.0, 10, 1.0))
    assert plots.schedules(config, 20, figure) is figure
    assert len(figure.axes) == 1


@pytest.mark.parametrize(
    ("configs", "steps", "error", "match"),
    [
        (make_adv_reg_config(0.2), 10, ValueError, "`configs` must hold a `Learn"),
        ({}, 10, ValueError, "`configs` must hold a `Learn"),
        ({"a": 0.2}, 10, TypeError, "`configs` must be an `AdvRegConfig`, or"),
        (make_adv_reg_config(0.2), 0, ValueError, "`steps` must be at least 1"),
    ],
)
def test_wrong_arguments_of_schedules(configs, steps, error, match):
    with pytest.raises(error, match=match):
        plots.schedules(configs, steps)
