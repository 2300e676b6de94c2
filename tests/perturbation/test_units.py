import warnings

import keras
import numpy as np
import pytest
from helpers.backends import (
    BACKEND,
    array,
    compiled,
    in_float64,
    only_tensorflow,
    tensor,
    tf,
)
from helpers.models import X, Y, classifier, regularized
from helpers.oracle import NORMS, norms
from helpers.slow import slow, slow_on_jax
from hypothesis import given
from hypothesis import strategies as st
from keras import layers

from advreg import AdvRegConfig, make_adv_reg_config
from advreg.config.norms import NormType
from advreg.perturbation.ball import Ball
from advreg.perturbation.units import DataSummary, check_units, summarize

pytestmark = pytest.mark.every_backend

UNIT = {"clip_value_min": 0.0, "clip_value_max": 1.0}
RIGHT = np.random.default_rng(0).uniform(0, 1, (12, 6)).astype("float32")
RIGHT[0, :2] = [0, 1]
WRONG = RIGHT * 255
SAYS = r"`x` must lie in the clip range.*x from 0 to 255, and a clip range from 0 to 1"


def fgsm(**fields):
    return AdvRegConfig.fgsm(0.1, **{**UNIT, **fields})


# --- What is seen of a batch


def surveyed(x, norm="l2", **kwargs):
    x = tensor(x)
    return DataSummary(
        *array(summarize(Ball(x, [True], NormType(norm), None, **kwargs))).tolist()
    )


@given(
    st.sampled_from(NORMS),
    st.integers(0, 2**32 - 1),
    st.floats(-0.5, 0.5, allow_subnormal=False),
    st.floats(0.5, 1.5),
)
@in_float64
def test_a_survey_is_numpy_s(norm, seed, low, high):
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 2, (4, 5))
    x[rng.uniform(size=x.shape) < 0.2] = np.nan
    x[rng.uniform(size=x.shape) < 0.2] = np.inf
    mask = (rng.uniform(size=5) < 0.8).astype("float64")
    found = surveyed(
        x, norm, feature_mask=mask, clip_value_min=low, clip_value_max=high
    )
    counts = np.isfinite(x) & (mask > 0)
    assert found.outside == (counts & ((x < low - 2e-6) | (x > high + 2e-6))).sum()
    assert found.missing == (~np.isfinite(x) & (mask > 0)).sum()
    if counts.any():
        assert found.smallest == x[counts].min()
        assert found.largest == x[counts].max()
        ends = [found.low_from, found.low_to, found.high_from, found.high_to]
        assert ends == [low, low, high, high]
    size = norms(counts * (high - low), norm).max()
    np.testing.assert_allclose(found.diameter, size, rtol=1e-12)


def test_one_rounding_is_not_outside():
    x = np.float32([[0.0, 1.0 + 1e-7]])
    assert not surveyed(x, **UNIT).outside
    assert surveyed(x + np.float32(1e-5), **UNIT).outside == 1
    assert not surveyed(x).outside  # Without a range nothing is.
    large = np.float32([[255.0, np.nextafter(np.float32(255), np.float32(256))]])
    assert not surveyed(large, clip_value_max=255.0).outside


@pytest.mark.parametrize("graph", [False, True])
def test_data_of_half_precision_may_be_a_rounding_of_it_outside(graph):
    ends = {"clip_value_min": (0 - 0.3) / 0.37, "clip_value_max": (1 - 0.3) / 0.37}
    x = ((np.float32([[0.0, 0.5, 1.0]]) - 0.3) / 0.37).astype("float16")
    x = x.astype("float32")  # As Keras does.

    def outside(x):
        return summarize(Ball(x, [True], NormType("infinity"), None, **ends))[0]

    run = compiled(outside) if graph else outside
    assert x.min() < ends["clip_value_min"]
    assert run(tensor(x)) == 0
    assert run(tensor(x * np.float32(1.001))) == 2


def test_nothing_is_said_where_nothing_counts():
    found = surveyed(np.float32([[np.nan]]), **UNIT)
    check_units(found, NormType.L2, "epsilon", 5.0)
    check_units(surveyed(np.float32([[0.5]])), NormType.L2, "epsilon", 5.0)
    with pytest.raises(ValueError, match=r"`epsilon`.*further apart than 1.*: 5"):
        check_units(surveyed([[0.5]], **UNIT), NormType.L2, "epsilon", 5.0)


# --- The first batch of training


@slow_on_jax
def test_the_first_batch_of_fit_is_checked(mode):
    model = regularized(classifier(), fgsm(), **mode)
    steps = []
    count = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: steps.append(batch)
    )
    with pytest.raises(ValueError, match=SAYS):
        model.fit(WRONG, Y, batch_size=4, shuffle=False, verbose=0, callbacks=[count])
    assert len(steps) == 1
    # Each `fit` looks anew, at its first batch alone.
    model.fit(RIGHT, Y, batch_size=4, epochs=2, verbose=0)
    with pytest.raises(ValueError, match=SAYS):
        model.fit(WRONG, Y, batch_size=12, verbose=0)
    later = np.concatenate([RIGHT[:4], WRONG[4:]])
    model.fit(later, Y, batch_size=4, shuffle=False, verbose=0)


def test_the_first_batch_of_train_on_batch_is_checked(mode):
    model = regularized(classifier(), fgsm(), **mode)
    for _ in range(2):
        with pytest.raises(ValueError, match=SAYS):
            model.train_on_batch(WRONG, Y)
    model.train_on_batch(RIGHT, Y)
    model.compile("sgd", model.loss, **mode)
    with pytest.raises(ValueError, match=SAYS):
        model.train_on_batch(WRONG, Y)
    # Another configuration has another range.
    model.adv_config = AdvRegConfig.fgsm(0.1, clip_value_max=255.0)
    model.train_on_batch(WRONG, Y)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has one step there")
def test_several_steps_at_once_are_checked_together():
    model = regularized(classifier(), fgsm(), steps_per_execution=3)
    later = np.concatenate([RIGHT[:4], WRONG[4:]])
    model.fit(later, Y, batch_size=4, shuffle=False, verbose=0)
    sooner = np.concatenate([WRONG[:4], RIGHT[4:]])
    with pytest.raises(ValueError, match=SAYS):
        model.fit(sooner, Y, batch_size=4, shuffle=False, verbose=0)


@pytest.mark.parametrize(
    "name", ["pgd", *slow("trades", "mart", "virtual_adversarial")]
)
@pytest.mark.parametrize("clean_weight", [0.0, *slow(1.0)])
def test_every_way_of_training_is_checked(name, clean_weight):
    config = getattr(AdvRegConfig, name)(0.1, clean_weight=clean_weight, **UNIT)
    model = regularized(classifier(), config)
    model.fit(RIGHT, Y, verbose=0)
    with pytest.raises(ValueError, match="`x` must lie in the clip range"):
        model.fit(WRONG, Y, verbose=0)


def test_only_what_counts_must_lie_in_the_range():
    x = RIGHT.copy()
    x[0], x[1:, 2], x[1, 3] = 300, -7, np.inf
    weights = np.ones(12)
    weights[0] = 0
    mask = np.array([1.0, 1, 0, 1, 1, 1])
    model = regularized(classifier(), fgsm(feature_mask=mask))
    with pytest.warns(UserWarning, match="1 input values that are NaN or infinite"):
        model.fit(x, Y, sample_weight=weights, verbose=0)
    with pytest.raises(ValueError, match=r"`x` must lie in the clip range.*to 300"):
        model.fit(x, Y, verbose=0)


@pytest.mark.slow
def test_padding_does_not_count():
    base = keras.Sequential(
        [
            keras.Input((4, 2)),
            layers.Masking(-9.0),
            layers.GRU(3),
            layers.Dense(3),
        ]
    )
    x = np.full((12, 4, 2), -9.0, "float32")
    x[:, :2] = 0.5
    model = regularized(base, fgsm())
    model.fit(x, Y, verbose=0)
    x[0, 0] = -8
    with pytest.raises(ValueError, match=r"x from -8 to 0\.5"):
        model.fit(x, Y, verbose=0)


def test_ranges_of_single_inputs_are_checked():
    inputs = {name: keras.Input((3,), name=name) for name in "ab"}
    base = keras.Model(
        inputs, layers.Dense(3)(layers.Concatenate()([*inputs.values()]))
    )
    config = make_adv_reg_config(adv_step_size=0.1, clip_value_max={"b": 1.0})
    model = regularized(base, config)
    x = {"a": WRONG[:, :3], "b": RIGHT[:, 3:]}
    model.fit(x, Y, verbose=0)
    with pytest.raises(ValueError, match=r"a clip range from -inf to 1 \.\.\. inf"):
        model.fit({"a": x["a"], "b": x["a"]}, Y, verbose=0)


def test_images_of_bytes_are_checked_in_their_units():
    base = keras.Sequential(
        [
            keras.Input((2, 3, 1), dtype="uint8"),
            layers.Rescaling(1 / 255),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )
    x = WRONG.reshape(12, 2, 3, 1).astype("uint8")
    with pytest.raises(ValueError, match=SAYS):
        regularized(base, fgsm()).fit(x, Y, verbose=0)
    config = AdvRegConfig.fgsm(8.0, clip_value_min=0.0, clip_value_max=255.0)
    regularized(base, config).fit(x, Y, verbose=0)


@slow_on_jax
def test_a_radius_longer_than_the_range_is_refused():
    config = AdvRegConfig.pgd(2.5, adv_grad_norm="l2", **UNIT)
    model = regularized(classifier(), config)
    with pytest.raises(ValueError, match=r"`pgd_epsilon`.*2.44949 in the l2.*: 2.5"):
        model.fit(RIGHT, Y, verbose=0)
    ramp = keras.optimizers.schedules.PiecewiseConstantDecay([1], [2.5, 2.5])
    regularized(classifier(), AdvRegConfig.pgd(ramp, adv_grad_norm="l2", **UNIT)).fit(
        RIGHT, Y, verbose=0
    )


def test_a_multiplier_of_zero_asks_nothing():
    config = make_adv_reg_config(0.0, **UNIT)
    regularized(classifier(), config).fit(WRONG, Y, verbose=0)


@only_tensorflow
@pytest.mark.slow
def test_code_of_nsl_runs_as_it_did():
    from advreg import nsl

    config = nsl.configs.make_adv_reg_config(**UNIT)
    model = nsl.keras.AdversarialRegularization(
        keras.Sequential([keras.Input((6,), name="x"), layers.Dense(3, "softmax")]),
        adv_config=config,
    )
    model.compile("sgd", "sparse_categorical_crossentropy")
    x = WRONG.copy()
    x[:11, 0] = np.nan
    model.fit({"x": x, "label": Y}, verbose=0)
    model.perturb_on_batch({"x": x, "label": Y})


def test_a_generator_is_read_once_and_in_its_order():
    seen = []

    def batches():
        for index in range(3):
            seen.append(index)
            yield RIGHT[4 * index : 4 * index + 4], Y[4 * index : 4 * index + 4]

    model = regularized(classifier(), fgsm())
    model.fit(batches(), verbose=0, shuffle=False, steps_per_epoch=3)
    assert seen == [0, 1, 2]


@only_tensorflow
def test_two_replicas_train_without_the_check():
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        model = regularized(classifier(), fgsm())
    model.fit(WRONG, Y, verbose=0)


@pytest.mark.slow
def test_nothing_of_the_check_is_saved(tmp_path):
    plain = regularized(classifier(), AdvRegConfig.fgsm(0.1))
    model = regularized(classifier(), fgsm())
    for each in (plain, model):
        each.fit(RIGHT, Y, verbose=0)
    assert [v.name for v in model.variables] == [v.name for v in plain.variables]
    assert len(model.variables) == len(model.weights) + 2  # Two random states.
    assert [m.name for m in model.metrics] == [m.name for m in plain.metrics]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=SAYS):
        loaded.fit(WRONG, Y, verbose=0)


# --- NaN


def missing(*places):
    x = X.copy()
    for place in places:
        x[place] = np.nan
    return x


def said_by(function):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        function()
    return [str(each.message) for each in said]


def test_fit_warns_once_of_nan(mode):
    model = regularized(classifier(), **mode)
    x = missing((3, 2), (7, 1), (7, 5))
    said = said_by(lambda: model.fit(x, Y, batch_size=4, epochs=3, verbose=0))
    assert len(said) == 1
    assert "Received: in epoch 1 3 input values that are NaN" in said[0]
    assert "the loss may become NaN" in said[0]
    assert len(said_by(lambda: model.fit(x, Y, verbose=0))) == 1
    assert not said_by(lambda: model.fit(X, Y, verbose=0))


def test_infinite_values_are_no_numbers_either():
    x = X.copy()
    x[0, 0], x[1, 1] = np.inf, -np.inf
    model = regularized(classifier())
    (said,) = said_by(lambda: model.fit(x, Y, verbose=0))
    assert "in epoch 1 2 input values that are NaN or infinite" in said


@pytest.mark.slow
def test_callbacks_of_the_user_are_kept():
    model = regularized(classifier())
    seen = []

    class Mine(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(epoch)

    given = [Mine()]
    model.fit(X, Y, epochs=2, verbose=0, callbacks=given)
    assert seen == [0, 1]
    assert len(given) == 1
    model.fit(X, Y, verbose=0, callbacks=Mine())
    listed = keras.callbacks.CallbackList([Mine()], add_history=True, model=model)
    for _ in range(2):
        said = said_by(
            lambda: model.fit(missing((0, 0)), Y, verbose=0, callbacks=listed)
        )
        assert len(said) == 1
