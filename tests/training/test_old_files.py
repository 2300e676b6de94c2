"""Files that earlier versions saved still load."""

from pathlib import Path

import keras
import numpy as np
import pytest
from helpers.slow import slow_on_jax

from advreg import AdversarialRegularization
from advreg.config.norms import NormType
from advreg.objectives import Mart

pytestmark = pytest.mark.every_backend

# Saved with Keras 3.8 by version 0.1.0, before its modules moved: a functional network
# with batch normalisation and dropout, trained for two epochs.
FILE = Path(__file__).with_name("saved_by_0.1.0.keras")
# What it predicted then for the images of `images`.
OUTPUTS = [
    [0.14158091, 0.53810394, -0.0573548],
    [0.01074565, 0.41927823, -0.20376167],
    [-0.31245664, 0.5094173, -0.30286604],
    [-0.25312623, 0.18586965, -0.09020212],
]


def images():
    generator = np.random.default_rng(5)
    return generator.uniform(size=(32, 6, 6, 1)).astype("float32")


@slow_on_jax
def test_a_file_from_before_the_modules_moved():
    model = keras.models.load_model(FILE)
    assert type(model) is AdversarialRegularization
    x, y = images(), np.arange(32) % 3
    outputs = model.predict({"image": x[:4]}, verbose=0)
    np.testing.assert_allclose(outputs, OUTPUTS, rtol=1e-5, atol=1e-6)
    neighbor, objective = (
        model.adv_config.adv_neighbor_config,
        model.adv_config.objective,
    )
    assert isinstance(objective, Mart)
    assert isinstance(
        model.adv_config.multiplier, keras.optimizers.schedules.CosineDecay
    )
    assert neighbor.adv_grad_norm is NormType.L2
    assert neighbor.feature_mask["image"].shape == (6, 6, 1)
    assert (model.label_keys, model.sample_weight_key) == (("digit",), "weight")
    # It is compiled, and goes on where its optimizer was.
    assert int(model.optimizer.iterations) == 2
    data = {"image": x, "digit": y, "weight": np.ones(32)}
    history = model.fit(data, epochs=1, verbose=0).history
    assert {"loss", "labeled_loss", "scaled_adversarial_loss", "accuracy"} <= {*history}
    assert int(model.optimizer.iterations) == 3
