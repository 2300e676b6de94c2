import keras
import keras_tuner
import numpy as np
import pytest
from helpers.models import classifier, cross_entropy, rows

from advreg import AdversarialRegularization, make_adv_reg_config

# KerasTuner calls what Python 3.10 has deprecated, and loads the weights of the best
# model, plain or not, without having built its optimizer.
pytestmark = [
    pytest.mark.filterwarnings("ignore:currentThread:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:getName:DeprecationWarning"),
    pytest.mark.filterwarnings(
        "ignore:Skipping variable loading for optim:UserWarning"
    ),
]

X, VAL = rows(60, 6), rows(30, 6, seed=1)
Y, VAL_Y = (np.argmax(x[:, :3], axis=1) for x in (X, VAL))


def build(hp):
    config = make_adv_reg_config(
        multiplier=hp.Float("multiplier", 0.0, 2.0),
        adv_step_size=hp.Choice("adv_step_size", [0.01, 0.1, 3.0]),
        adv_grad_norm="infinity",
    )
    model = AdversarialRegularization(classifier(), config)
    model.compile(keras.optimizers.Adam(0.03), cross_entropy(), metrics=["accuracy"])
    return model


@pytest.mark.slow
def test_a_random_search(tmp_path):
    tuner = keras_tuner.RandomSearch(
        build,
        objective="val_accuracy",
        max_trials=3,
        seed=0,
        directory=tmp_path,
        project_name="search",
    )
    tuner.search(X, Y, epochs=4, validation_data=(VAL, VAL_Y), verbose=0)
    trials = tuner.oracle.get_best_trials(3)
    values = [trial.hyperparameters.values for trial in trials]
    assert len({v["multiplier"] for v in values}) == 3
    assert len({trial.score for trial in trials}) > 1
    (best,) = tuner.get_best_hyperparameters()
    assert best.values == values[0]
    (model,) = tuner.get_best_models()
    assert type(model) is AdversarialRegularization
    assert model.adv_config.multiplier == best["multiplier"]
    assert model.adv_config.adv_neighbor_config.adv_step_size == best["adv_step_size"]
    accuracy = model.evaluate(VAL, VAL_Y, return_dict=True, verbose=0)["accuracy"]
    assert accuracy == pytest.approx(max(trial.score for trial in trials))
