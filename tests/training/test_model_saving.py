import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.linear import linear_base
from helpers.models import (
    LEFT,
    RIGHT,
    Subclassed,
    X,
    Y,
    busy_base,
    classifier,
    cross_entropy,
    regularized,
    rows,
)
from keras import layers, ops

from advreg import AdversarialRegularization, make_adv_reg_config


@pytest.mark.slow
def test_saved_and_loaded_it_trains_on_as_if_nothing_had_happened(tmp_path):
    config = make_adv_reg_config(
        multiplier=keras.optimizers.schedules.ExponentialDecay(0.5, 10, 0.9),
        adv_step_size=0.2,
        random_init=True,
        feature_mask=np.array([1, 1, 0, 1, 0.5, 1]),
    )
    model = AdversarialRegularization(
        busy_base(), config, label_keys=["y"], sample_weight_key="w", name="robust"
    )
    model.compile("adam", cross_entropy(), metrics=["accuracy"])
    model.fit(X, Y, batch_size=6, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is AdversarialRegularization
    assert loaded.adv_config == config
    assert loaded.label_keys == ("y",)
    assert loaded.sample_weight_key == "w"
    assert loaded.name == "robust"
    logs = [
        m.fit(X, Y, batch_size=6, shuffle=False, epochs=2, verbose=0).history
        for m in (model, loaded)
    ]
    assert logs[0] == logs[1]
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_weights_alone_carry_the_random_state(tmp_path):
    def make(seed):
        keras.utils.set_random_seed(seed)
        return regularized(busy_base(), make_adv_reg_config(random_init=True))

    model, other = make(0), make(1)
    model.fit(X, Y, verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    other.load_weights(tmp_path / "model.weights.h5")
    model.reset_metrics()  # Older versions of Keras average over calls.
    for call in ("train_on_batch", "perturb_on_batch"):
        got, expected = (getattr(side, call)(X, Y) for side in (other, model))
        np.testing.assert_array_equal(got, expected)


def test_weights_load_where_dropout_has_been_turned_off(tmp_path):
    path = tmp_path / "model.weights.h5"
    model, other = (
        AdversarialRegularization(
            keras.Sequential([keras.Input((6,)), layers.Dense(3), layers.Dropout(rate)])
        )
        for rate in (0.5, 0.0)
    )
    model.save_weights(path)
    with pytest.warns(UserWarning, match=r"in 2 places.*did in 3.*not restored"):
        other.load_weights(path)
    for a, b in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_weights_of_the_base_are_for_the_base(tmp_path):
    path = tmp_path / "base.weights.h5"
    classifier().save_weights(path)
    with pytest.raises(ValueError, match=r"model\.base_model\.load_weights"):
        AdversarialRegularization(classifier()).load_weights(path)


def test_the_older_format_is_refused_before_it_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"must end in '\.keras'.*model\.h5"):
        AdversarialRegularization(classifier()).save(tmp_path / "model.h5")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_base_saves_without_advreg(tmp_path):
    model = regularized(classifier())
    model.fit(X, Y, verbose=0)
    model.base_model.save(tmp_path / "base.keras")
    code = (
        "import sys, keras, numpy as np\n"
        f"model = keras.models.load_model({str(tmp_path / 'base.keras')!r})\n"
        "assert 'advreg' not in sys.modules\n"
        f"np.save({str(tmp_path / 'out.npy')!r}, model(np.ones((2, 6))))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    np.testing.assert_allclose(
        np.load(tmp_path / "out.npy"), model(np.ones((2, 6))), rtol=1e-6
    )


def test_another_config_takes_effect_with_the_next_step():
    x, y = rows(7, 4), rows(7, seed=1)
    model = regularized(
        linear_base(), make_adv_reg_config(0.0), "mse", keras.optimizers.SGD(0.0)
    )
    model.train_on_batch(x, y)

    class Switch(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                self.model.adv_config = make_adv_reg_config(
                    0.5, adv_step_size=0.0, pgd_epsilon=0.0
                )

    history = model.fit(x, y, epochs=2, callbacks=[Switch()], verbose=0).history
    off, on = history["scaled_adversarial_loss"]
    assert off == 0.0
    np.testing.assert_allclose(on, 0.5 * history["labeled_loss"][1], rtol=1e-6)
    with pytest.raises(TypeError, match=r"`adv_config` must be an `AdvRegConfig`"):
        model.adv_config = {"multiplier": 0.5}


@pytest.mark.parametrize("kind", ["sequential", "subclassed", "own build"])
def test_built_from_a_shape_it_loads_weights(kind, tmp_path):
    class OwnBuild(Subclassed):
        def build(self, input_shape):
            self.dense.build(input_shape)

        def call(self, inputs):
            return self.dense(inputs)

    def make():
        base = {
            "sequential": lambda: keras.Sequential([layers.Dense(3)]),
            "subclassed": Subclassed,
            "own build": OwnBuild,
        }[kind]()
        return regularized(base)

    model, other = make(), make()
    model.fit(X, Y, verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    other.build((None, 6))
    assert len(other.trainable_weights) == 2
    other.optimizer.build(other.trainable_weights)
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(
        model.predict(X, verbose=0), other.predict(X, verbose=0)
    )


def test_called_before_it_is_built():
    class OneHot(keras.Model):
        """Takes integers alone, and cannot be traced on floats."""

        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, inputs):
            assert "int" in inputs["id"].dtype.name
            hot = ops.one_hot(inputs["id"], 9)
            return self.dense(ops.concatenate([hot, inputs["x"]], axis=-1))

    for base, x in [
        (keras.Sequential([layers.Dense(3)]), {"image": X, "label": Y}),
        (Subclassed(), {"a": LEFT, "b": RIGHT, "label": Y}),
        (OneHot(), {"id": Y, "x": X, "label": Y}),
    ]:
        model = regularized(base)
        called = model(x)
        assert called.shape == (12, 3)
        np.testing.assert_allclose(called, model.predict(x, verbose=0), rtol=1e-5)
        assert np.isfinite(model.train_on_batch(x)).all()


def test_exports_the_base(tmp_path):
    model = regularized(classifier())
    model.fit(X, Y, verbose=0)
    model.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(tmp_path / "served")
    np.testing.assert_allclose(served.serve(X), model.predict(X, verbose=0), rtol=1e-5)


@pytest.mark.skipif(
    tuple(map(int, keras.__version__.split(".")[:2])) < (3, 10),
    reason="this version of Keras exports no dictionaries of inputs",
)
def test_exports_keep_the_types_of_inputs(tmp_path):
    ids, x = keras.Input((2,), dtype="int32", name="ids"), keras.Input((4,), name="x")
    embedded = layers.Flatten()(layers.Embedding(5, 2)(ids))
    outputs = layers.Dense(3)(layers.Concatenate()([embedded, x]))
    model = regularized(keras.Model({"ids": ids, "x": x}, outputs))
    data = {"ids": np.ones((12, 2), "int32"), "x": rows(12, 4)}
    model.fit(data, Y, verbose=0)
    model.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(tmp_path / "served")
    signature = served.signatures["serving_default"].structured_input_signature[1]
    assert {name: spec.dtype for name, spec in signature.items()} == {
        "ids": tf.int32,
        "x": tf.float32,
    }
    np.testing.assert_allclose(
        served.serve(data), model.predict(data, verbose=0), rtol=1e-5
    )


@pytest.mark.slow
def test_exports_are_served_without_advreg(tmp_path):
    model = regularized(classifier())
    model.fit(X, Y, verbose=0)
    model.export(tmp_path / "served", verbose=False)
    script = (
        "import sys; sys.modules['advreg'] = None\n"
        "import numpy as np, tensorflow as tf\n"
        "served = tf.saved_model.load(sys.argv[1])\n"
        "np.save(sys.argv[1] + '/got.npy', served.serve(np.load(sys.argv[2])))"
    )
    np.save(tmp_path / "x.npy", X)
    paths = [str(tmp_path / "served"), str(tmp_path / "x.npy")]
    subprocess.run([sys.executable, "-c", script, *paths], check=True)
    got = np.load(tmp_path / "served" / "got.npy")
    np.testing.assert_allclose(got, model.predict(X, verbose=0), rtol=1e-5)
