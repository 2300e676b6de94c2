import keras
import numpy as np
import pytest
from helpers.models import X, Y, classifier, regularized
from helpers.slow import slow_on_jax

from advreg import AdvRegConfig
from advreg.config.schedules import Scaled, scaled

pytestmark = pytest.mark.every_backend

RAMP = keras.optimizers.schedules.PolynomialDecay(0.0, 10, 0.4)


def test_a_multiple_of_a_number_or_of_a_schedule():
    assert scaled(2.5, 0.1) == 0.25
    schedule = scaled(2.5, RAMP)
    for step in (0, 3, 10, 99):
        assert float(schedule(step)) == pytest.approx(2.5 * float(RAMP(step)))
    with pytest.raises(ValueError, match="`factor` must be finite and not negative"):
        Scaled(RAMP, -1.0)


def test_it_survives_serialisation_and_makes_nothing_else():
    config = AdvRegConfig.fast(RAMP)
    again = AdvRegConfig.from_config(config.get_config())
    assert again == config
    step = again.adv_neighbor_config.adv_step_size
    assert float(step(10)) == pytest.approx(0.5)
    described = keras.saving.serialize_keras_object(scaled(2.0, RAMP))
    layer = keras.saving.serialize_keras_object(keras.layers.Dense(1))
    described["config"]["schedule"] = layer
    with pytest.raises(TypeError, match="`schedule` must be a `LearningRateSchedule`"):
        Scaled.from_config(described["config"])


@slow_on_jax
@pytest.mark.parametrize(
    ("preset", "reach"),
    [("fgsm", 1.0), ("fast", 1.0), ("n_fgsm", 3.0), ("pgd", 1.0), ("trades", 1.0)],
)
def test_every_preset_takes_a_ramp_as_radius(preset, reach):
    model = regularized(classifier(), getattr(AdvRegConfig, preset)(RAMP))
    radii = []
    for _ in range(12):
        radii.append(np.abs(model.perturb_on_batch(X, Y) - X).max())
        model.train_on_batch(X, Y)
    np.testing.assert_array_less(
        radii, [reach * float(RAMP(i)) + 1e-3 for i in range(12)]
    )
    assert radii[-1] > 0.35
