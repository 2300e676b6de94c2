import numpy as np
import pytest
from helpers.backends import array, gradient_of, tensor
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from keras import ops

from advreg.attacks.engine import losses

pytestmark = [pytest.mark.every_backend, pytest.mark.usefixtures("float64")]

logits_of = st.integers(4, 7).flatmap(
    lambda classes: hnp.arrays(
        "float64",
        st.tuples(st.integers(1, 5), st.just(classes)),
        elements=st.floats(-20, 20),
    )
)
seeds = st.integers(0, 2**32 - 1)


def classes_for(logits, seed):
    return np.random.default_rng(seed).integers(0, logits.shape[1], len(logits))


def cross_entropy(z, c, targeted):
    value = np.log(np.exp(z - z.max()).sum()) + z.max() - z[c]
    return -value if targeted else value


def margin(z, c, targeted):
    value = max(z[i] for i in range(len(z)) if i != c) - z[c]
    return -value if targeted else value


def dlr(z, c, targeted):
    top = np.sort(z)[::-1]
    spread = top[0] - (top[2] + top[3]) / 2 if targeted else top[0] - top[2]
    return margin(z, c, targeted) / max(spread, 1e-12)


FORMULAS = {"cross_entropy": cross_entropy, "margin": margin, "dlr": dlr}


def run(name, logits, classes, targeted):
    values = losses.LOSSES[name](tensor(logits), tensor(classes), targeted)
    return array(values)


@given(logits_of, seeds, st.sampled_from(list(FORMULAS)), st.booleans())
def test_losses_are_their_formulas(logits, seed, name, targeted):
    classes = classes_for(logits, seed)
    expected = [
        FORMULAS[name](row, c, targeted) for row, c in zip(logits, classes, strict=True)
    ]
    got = run(name, logits, classes, targeted)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


@given(st.integers(4, 7), seeds)
def test_margin_and_dlr_are_positive_where_the_class_is_another(classes, seed):
    logits = np.random.default_rng(seed).normal(size=(5, classes)) * 10
    classes = classes_for(logits, seed)
    wrong = logits.argmax(1) != classes
    for name in ("margin", "dlr"):
        np.testing.assert_array_equal(run(name, logits, classes, False) > 0, wrong)
        np.testing.assert_array_equal(run(name, logits, classes, True) > 0, ~wrong)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name", FORMULAS)
def test_gradients_are_those_of_finite_differences(name, targeted):
    logits = np.random.default_rng(0).normal(size=(6, 5)) * 3
    classes = classes_for(logits, 1)
    loss, labels = losses.LOSSES[name], tensor(classes)
    slopes = gradient_of(lambda x: loss(x, labels, targeted), tensor(logits))
    for row, c, found in zip(logits, classes, array(slopes), strict=True):
        for column in range(5):
            step = np.eye(5)[column] * 1e-6
            up, down = (FORMULAS[name](row + s, c, targeted) for s in (step, -step))
            assert found[column] == pytest.approx((up - down) / 2e-6, abs=1e-6)


@pytest.mark.parametrize("targeted", [False, True])
def test_dlr_does_not_know_scale_or_shift(targeted):
    logits = np.random.default_rng(0).normal(size=(6, 5))
    classes = classes_for(logits, 1)
    expected = run("dlr", logits, classes, targeted)
    got = run("dlr", logits * 1e4 + 7, classes, targeted)
    np.testing.assert_allclose(got, expected, rtol=1e-7)


def test_dlr_of_equal_logits_is_zero_with_a_finite_gradient():
    logits = ops.ones((2, 4))
    labels = tensor([0, 1])
    np.testing.assert_array_equal(losses.dlr(logits, labels), [0, 0])
    slopes = gradient_of(lambda x: losses.dlr(x, labels), logits)
    assert np.isfinite(array(slopes)).all()


def test_the_margin_does_not_saturate_where_the_cross_entropy_does():
    logits = tensor([[1e4, 0.0, 0.0]])
    flat, steep = (
        array(gradient_of(lambda x, loss=loss: loss(x, tensor([0])), logits))
        for loss in (losses.cross_entropy, losses.margin)
    )
    assert not flat.any()
    assert steep[0, 0] == -1


@given(logits_of, seeds)
def test_dlr_towards_a_target_is_its_formula(logits, seed):
    classes = classes_for(logits, seed)
    targets = (classes + 1) % logits.shape[1]
    got = losses.dlr_towards(tensor(logits), tensor(classes), tensor(targets))
    top = -np.sort(-logits, axis=1)
    spread = np.maximum(top[:, 0] - (top[:, 2] + top[:, 3]) / 2, 1e-12)
    rows = np.arange(len(logits))
    expected = (logits[rows, targets] - logits[rows, classes]) / spread
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


def test_classes_that_losses_need():
    needed = losses.classes_needed
    assert [needed("dlr", False), needed("dlr", True)] == [3, 4]
    assert [needed(n, t) for n in ("margin", "cross_entropy") for t in (0, 1)] == [
        2
    ] * 4
