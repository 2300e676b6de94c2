import io
import sys

import numpy as np
import pytest

from advreg import plots

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
