"""The logits behind a last activation, on every backend."""

import contextlib
import gc

import keras
import numpy as np
import pytest
from keras import layers, ops

import advreg
from advreg import attacks, backend
from advreg.network import last_activation
from advreg.network.last_activation import logits_behind, made_by, recorded

pytestmark = pytest.mark.every_backend(tensorflow="slow")

CLASSES = 4
X = np.random.default_rng(0).normal(size=(12, 6)).astype("float32")
Y = np.arange(12) % CLASSES
on_tensorflow = backend.BACKEND == "tensorflow"
# On TensorFlow Keras's own losses find the logits, wherever the graph shows them.
elsewhere = pytest.mark.skipif(on_tensorflow, reason="Keras finds them by itself")


@keras.saving.register_keras_serializable("test")
class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden = layers.Dense(5, activation="relu")
        self.last = layers.Dense(CLASSES, activation="softmax")

    def call(self, inputs):
        return self.last(self.hidden(inputs))


class Normalised(layers.Layer):
    """A softmax that nobody sees."""

    def call(self, inputs):
        scores = ops.exp(inputs)
        return scores / ops.sum(scores, axis=-1, keepdims=True)


def opaque():
    return functional(Normalised())


def functional(last):
    inputs = keras.Input((6,))
    hidden = layers.Dense(5, activation="relu")(inputs)
    return keras.Model(inputs, last(layers.Dense(CLASSES)(hidden)))


def nested():
    inner = keras.Sequential(
        [keras.Input((5,)), layers.Dense(CLASSES, activation="softmax")]
    )
    return keras.Sequential([keras.Input((6,)), layers.Dense(5), inner])


def reshaped():
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(2 * CLASSES),
            layers.Reshape((2, CLASSES)),
            layers.Activation("softmax"),
            layers.Reshape((2, 1, CLASSES)),
        ]
    )


NETWORKS = {
    "layer": lambda: keras.Sequential(
        [keras.Input((6,)), layers.Dense(CLASSES, activation="softmax")]
    ),
    "softmax layer": lambda: functional(layers.Softmax()),
    "activation layer": lambda: functional(layers.Activation("softmax")),
    "operation": lambda: functional(ops.softmax),
    "nested": nested,
    "subclassed": Subclassed,
    "reshaped": reshaped,
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_logits_are_those_that_the_softmax_was_applied_to(kind):
    model = NETWORKS[kind]()
    x = ops.convert_to_tensor(X)
    model(x)
    with recorded(model):
        outputs = model(x, training=False)
        logits = logits_behind(outputs)
    if on_tensorflow and logits is None:  # In eager code Keras notes only its own.
        pytest.skip("TensorFlow shows them in a graph")
    np.testing.assert_allclose(
        ops.convert_to_numpy(ops.softmax(logits)),
        ops.convert_to_numpy(outputs),
        atol=1e-6,
    )


@elsewhere
@pytest.mark.parametrize("kind", NETWORKS)
def test_what_made_the_outputs_is_known(kind):
    model = NETWORKS[kind]()
    with recorded(model):
        assert made_by(model(ops.convert_to_tensor(X))) == "softmax"


@elsewhere
def test_nothing_stays_when_the_outputs_have_gone():
    model = NETWORKS["softmax layer"]()
    gc.collect()
    before = len(last_activation._notes)
    with recorded(model):
        outputs = model(ops.convert_to_tensor(X))
        assert logits_behind(outputs) is not None
        assert logits_behind(outputs + 0.0) is None
    assert "call" not in vars(model.layers[-1])
    del outputs
    gc.collect()
    assert len(last_activation._notes) == before


@elsewhere
def test_a_softmax_over_another_axis_is_none_of_classes():
    model = functional(layers.Softmax(axis=0))
    with recorded(model):
        assert logits_behind(model(ops.convert_to_tensor(X))) is None


def trained(last, loss, labels, units=CLASSES, **run):
    """The weights after five steps, and a perturbed batch."""
    keras.utils.set_random_seed(0)
    base = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, activation="tanh"),
            layers.Dense(units, activation=last),
        ]
    )
    # So far apart that probabilities round to 0 and 1, where a clipped loss is flat.
    base.layers[-1].kernel.assign(30 * base.layers[-1].kernel)
    model = advreg.AdversarialRegularization(
        base,
        advreg.make_adv_reg_config(
            adv_step_size=0.1, adv_grad_norm="l2", pgd_iterations=2, pgd_epsilon=0.3
        ),
    )
    model.compile(keras.optimizers.SGD(0.01), loss, **run)
    logs = model.fit(X, labels, epochs=5, batch_size=12, shuffle=False, verbose=0)
    moved = model.perturb_on_batch(X, labels)
    evaluated = model.evaluate(X, labels, verbose=0)
    return [*base.get_weights(), moved, logs.history["loss"], evaluated]


ONE_HOT = np.eye(CLASSES, dtype="float32")[Y]
BITS = (Y % 2).astype("float32")[:, None]
LOSSES = {
    "sparse": (keras.losses.SparseCategoricalCrossentropy, "softmax", Y, CLASSES),
    "categorical": (keras.losses.CategoricalCrossentropy, "softmax", ONE_HOT, CLASSES),
    "binary": (keras.losses.BinaryCrossentropy, "sigmoid", BITS, 1),
}


@pytest.mark.parametrize("run", [{}, {"run_eagerly": True}], ids=["compiled", "eager"])
@pytest.mark.parametrize("kind", LOSSES)
def test_training_is_that_of_logits(kind, run):
    loss, activation, labels, units = LOSSES[kind]
    given = trained(activation, loss(), labels, units, **run)
    expected = trained(None, loss(from_logits=True), labels, units, **run)
    for one, other in zip(given, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "name", ["sparse_categorical_crossentropy", "crossentropy"], ids=str
)
def test_a_loss_may_be_a_name(name):
    given = trained("softmax", name, Y)
    expected = trained("softmax", keras.losses.SparseCategoricalCrossentropy(), Y)
    for one, other in zip(given, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def confident(last):
    """A network whose logits are far apart."""
    generator = np.random.default_rng(0)
    model = keras.Sequential(
        [
            keras.Input((20,)),
            layers.Dense(32, activation="relu"),
            layers.Dense(5, activation=last),
        ]
    )
    model.set_weights([generator.normal(0, 1.5, w.shape) for w in model.get_weights()])
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=last is None)
    )
    return model


@pytest.mark.parametrize("loss", ["cross_entropy", "model"])
def test_a_confident_network_is_no_more_robust_with_a_softmax(loss):
    x = np.random.default_rng(1).uniform(0, 1, (200, 20)).astype("float32")
    y = confident(None).predict(x, verbose=0).argmax(axis=1)
    attack = attacks.PGD(0.4, iterations=10, random_init=False, loss=loss)
    left = [
        np.mean(model.predict(attack(model, x, y), verbose=0).argmax(axis=1) == y)
        for model in map(confident, (None, "softmax"))
    ]
    assert left[0] < 0.1  # A clipped loss would leave 0.8 with a softmax.
    assert left[1] == pytest.approx(left[0], abs=0.005)


@elsewhere
def test_without_the_logits_it_would_seem_robust(monkeypatch):
    x = np.random.default_rng(1).uniform(0, 1, (200, 20)).astype("float32")
    y = confident(None).predict(x, verbose=0).argmax(axis=1)
    monkeypatch.setattr(
        "advreg.network.network.recorded", lambda model: contextlib.nullcontext()
    )
    model = confident("softmax")
    attack = attacks.PGD(0.4, iterations=10, random_init=False, loss="model")
    moved = attack(model, x, y)
    assert np.mean(model.predict(moved, verbose=0).argmax(axis=1) == y) > 0.7


def perturb(base, loss):
    model = advreg.AdversarialRegularization(
        base, advreg.make_adv_reg_config(adv_step_size=0.1)
    )
    model.compile("sgd", loss)
    return model.perturb_on_batch(X, Y)


@elsewhere
def test_an_activation_that_nobody_sees_draws_a_warning():
    with pytest.warns(UserWarning, match="the logits behind them were not found"):
        perturb(opaque(), "sparse_categorical_crossentropy")


@elsewhere
def test_a_loss_of_the_users_own_draws_a_warning():
    def own(y_true, y_pred):
        chosen = ops.one_hot(ops.cast(ops.reshape(y_true, (-1,)), "int32"), CLASSES)
        return -ops.log(ops.sum(chosen * y_pred, axis=-1))

    with pytest.warns(UserWarning, match="computed from the probabilities that a soft"):
        perturb(Subclassed(), own)


def test_a_report_says_that_logits_are_hidden():
    model = opaque()
    model.compile(loss="sparse_categorical_crossentropy")
    target = attacks.FGSM(0.1).problem(model).target
    assert target.output_form(ops.convert_to_tensor(X)).hidden


def test_the_loss_that_was_given_is_saved(tmp_path):
    base = NETWORKS["layer"]()
    model = advreg.AdversarialRegularization(base)
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.fit(X, Y, verbose=0)
    assert model.loss == "sparse_categorical_crossentropy"
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras.models.load_model(path)
    assert loaded.loss == "sparse_categorical_crossentropy"
    np.testing.assert_allclose(
        loaded.evaluate(X, Y, verbose=0), model.evaluate(X, Y, verbose=0), rtol=1e-6
    )
