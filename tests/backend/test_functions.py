"""Compiled functions: kept while a model is what it was, and dropped when it is not."""

import gc
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.models import classifier, cross_entropy, labelled, regularized, rows
from helpers.slow import slow, slow_but
from keras import layers, ops

from advreg import AdversarialRegularization, evaluate_robustness, make_adv_reg_config
from advreg.attacks import FGSM, PGD
from advreg.backend.parts import Parts
from advreg.backend.tensorflow.functions import functions_of

X, Y = labelled(40)


class Scaled(keras.Model):
    """Reads a number, and what a list and a dictionary hold, when it is called."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)
        self.scale, self.heads = 1.0, [ops.tanh]
        self.options = {"shift": {"by": 0.0}}

    def call(self, inputs):
        logits = self.dense(inputs)
        for head in self.heads:
            logits = head(logits)
        shift = self.options["shift"]["by"]
        return self.scale * logits + shift * np.float32([0, 1, 2])


def compiled(model):
    model.compile("sgd", cross_entropy(), metrics=["accuracy"])
    if not model.built:
        model.build((None, 6))
    return model


def mlp():
    return compiled(classifier())


def exchange_the_head(model):
    model.pop()
    model.add(layers.Dense(3))
    model.build((None, 6))


def add_lora(model):
    model.layers[0].enable_lora(2)
    kernel = model.layers[0].lora_kernel_b
    kernel.assign(ops.ones(kernel.shape) * 3)


def exchange_the_activation(model):
    model.layers[0].activation = keras.activations.tanh


CHANGES = {
    "activation": exchange_the_activation,
    "head": exchange_the_head,
    "lora": add_lora,
    "quantize": lambda model: model.quantize("int8"),
}
SCALED = {
    "number": lambda model: setattr(model, "scale", -1.0),
    "list": lambda model: model.heads.append(ops.negative),
    "nested dictionary": lambda model: model.options["shift"].update({"by": 5.0}),
}


def accuracy(model):
    """What the model itself says, with nothing compiled."""
    return np.mean(np.argmax(model(X, training=False), axis=1) == Y)


def seen(model):
    return evaluate_robustness(model, X, Y, attacks=FGSM(0.3), verbose=0).clean_accuracy


def fooled(model):
    """The accuracy at what a single attack returns, by the model uncompiled."""
    moved = FGSM(0.3)(model, X, Y)
    return np.mean(np.argmax(model(moved, training=False), axis=1) == Y)


@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have a `quantize`")
@pytest.mark.parametrize("change", slow_but(CHANGES, "head", "lora"))
@pytest.mark.parametrize(
    "anew", [False, *slow(True)], ids=["as it is", "compiled anew"]
)
def test_reports_and_attacks_are_of_the_model_as_it_is_now(change, anew):
    change = CHANGES[change]
    keras.utils.set_random_seed(0)
    model = mlp()
    seen(model), fooled(model)
    change(model)
    if anew:
        compiled(model)
    assert seen(model) == pytest.approx(accuracy(model))
    # A copy was never attacked before, so that it has nothing to be out of date.
    copy = keras.models.clone_model(model) if change is not add_lora else None
    if copy is not None and copy.count_params() == model.count_params():
        copy.set_weights(model.get_weights())
        np.testing.assert_allclose(FGSM(0.3)(model, X, Y), FGSM(0.3)(copy, X, Y))


@pytest.mark.parametrize("change", slow_but(SCALED, "list"))
def test_attributes_that_a_call_reads(change):
    change = SCALED[change]
    keras.utils.set_random_seed(1)
    model = Scaled()
    model(X)
    assert seen(model) == pytest.approx(accuracy(model))
    before = FGSM(0.1)(model, X, Y)
    change(model)
    assert seen(model) == pytest.approx(accuracy(model))
    assert not np.array_equal(FGSM(0.1)(model, X, Y), before)


@pytest.mark.parametrize("change", [exchange_the_activation, *slow(add_lora)])
def test_a_wrapped_model_trains_evaluates_predicts_and_perturbs_anew(change):
    keras.utils.set_random_seed(2)
    config = make_adv_reg_config(adv_step_size=0.1, adv_grad_norm="infinity")
    model = regularized(classifier(), config, metrics=["accuracy"], optimizer="sgd")
    model.fit(X, Y, verbose=0)
    before = model.predict(X, verbose=0)
    model.perturb_on_batch(X, Y)
    model.evaluate(X, Y, verbose=0)
    change(model.base_model)
    now = model.base_model(X, training=False).numpy()
    assert np.abs(before - now).max() > 1e-3
    np.testing.assert_allclose(model.predict(X, verbose=0), now, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.predict_on_batch(X), now, rtol=1e-4, atol=1e-5)
    found = model.evaluate(X, Y, verbose=0, return_dict=True)
    loss = keras.losses.sparse_categorical_crossentropy(Y, now, from_logits=True)
    assert found["loss"] == pytest.approx(float(ops.mean(loss)), rel=1e-4)
    assert found["accuracy"] == pytest.approx(np.mean(now.argmax(1) == Y))
    other = AdversarialRegularization(model.base_model, config)
    other.compile("sgd", cross_entropy())
    np.testing.assert_array_equal(
        model.perturb_on_batch(X, Y), other.perturb_on_batch(X, Y)
    )


def test_nothing_is_dropped_that_still_holds():
    model = mlp()
    attack = PGD(0.1, iterations=2, seed=0)
    attack(model, X, Y)
    keys = functions_of(model).keys
    model.fit(X, Y, verbose=0, validation_data=(X, Y))
    model.evaluate(X, Y, verbose=0)
    model.predict(X, verbose=0)
    model(X)
    model.layers[0].kernel.assign(rows(6, 8, seed=3))
    attack(model, X, Y)
    evaluate_robustness(model, X, Y, attacks=attack, verbose=0)
    assert functions_of(model).keys[: len(keys)] == keys
    compiled(model)
    assert functions_of(model).keys == []


def test_saving_and_loading_weights_while_it_trains_drops_nothing(tmp_path):
    path = str(tmp_path / "{epoch}.keras")
    model = regularized(classifier(), make_adv_reg_config(adv_step_size=0.1))
    checkpoint = keras.callbacks.ModelCheckpoint(path)
    model.fit(X, Y, verbose=0, validation_data=(X, Y), callbacks=[checkpoint])
    functions = model.train_function, model.test_function
    model.perturb_on_batch(X, Y)
    keys = functions_of(model).keys
    model.save_weights(tmp_path / "model.weights.h5")
    model.load_weights(tmp_path / "model.weights.h5")
    model.fit(X, Y, verbose=0, epochs=2, validation_data=(X, Y), callbacks=[checkpoint])
    model.perturb_on_batch(X, Y)
    assert (model.train_function, model.test_function) == functions
    assert functions_of(model).keys == keys


class ExchangeTheActivation(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            exchange_the_activation(self.model.base_model)


def test_a_base_that_changes_while_it_trains_is_validated_as_it_is():
    model = regularized(
        classifier(),
        make_adv_reg_config(adv_step_size=0.1),
        optimizer=keras.optimizers.SGD(0.0),
    )
    history = model.fit(
        X,
        Y,
        verbose=0,
        epochs=3,
        validation_data=(X, Y),
        callbacks=[ExchangeTheActivation()],
    ).history
    first, *rest = history["val_loss"]
    assert rest[0] == rest[1] != first
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(rest[0])


def test_attacks_and_perturb_on_batch_share_one_cache():
    model = regularized(classifier(), make_adv_reg_config(adv_step_size=0.1))
    model.perturb_on_batch(X, Y)
    FGSM(0.1)(model, X, Y)
    keys = str(functions_of(model).keys)
    assert "perturb_on_batch" in keys
    assert "'step'" in keys


def test_perturb_on_batch_is_traced_once_for_all_lengths():
    model = regularized(classifier(), make_adv_reg_config(adv_step_size=0.1))
    expected = model.perturb_on_batch(X, Y)
    for length in range(1, 16):
        got = model.perturb_on_batch(X[:length], Y[:length])
        assert got.shape == (length, 6)
    # The gradient of the mean has the same direction, whatever the length.
    np.testing.assert_allclose(got, expected[:length], atol=1e-6)
    assert len(functions_of(model).keys) == 1


def images():
    return keras.Sequential(
        [
            keras.Input((None, None, 3)),
            layers.Conv2D(4, 3, padding="same", activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(4),
        ]
    )


@pytest.mark.slow
def test_images_of_many_sizes_need_two_tracings():
    model = regularized(images(), make_adv_reg_config(adv_step_size=0.1))
    labels = np.arange(5) % 4
    for size in (6, 7, 9, 12):
        x = rows(5, size, size + 1, 3, seed=size)
        moved = FGSM(0.2)(model, x, labels)
        alone = FGSM(0.2)(keras.models.clone_model(model.base_model), x, labels)
        assert moved.shape == alone.shape == x.shape
        copy = images()
        copy.set_weights(model.base_model.get_weights())
        np.testing.assert_allclose(moved, FGSM(0.2)(copy, x, labels), atol=1e-6)
        model.perturb_on_batch(x, labels)
    keys = functions_of(model).keys
    assert len(keys) == 2 * len(set(map(repr, keys)))


def test_what_needs_to_know_a_size_is_traced_for_each():
    model = mlp()
    cache = functions_of(model)
    sizes = []

    def function(x):
        if x.shape[1] is None:
            raise TypeError("The size must be known.")
        sizes.append(x.shape[1])
        return x * x.shape[1]

    for size in (2, 3, 2, 4):
        x = tf.ones((5, size))
        found = cache.compiled("key", function, (x,))(x)
        np.testing.assert_array_equal(found, np.full((5, size), size))
    assert sizes == [2, 3, 4]


def test_what_fails_says_why():
    def function(x):
        raise ValueError(f"Received: {x.shape}")

    x = tf.ones((5, 2))
    with pytest.raises(ValueError, match=r"Received: \(5, 2\)"):
        functions_of(mlp()).compiled("key", function, (x,))


def test_facts_last_as_long_as_the_model_is_what_it_was():
    model = mlp()
    answers = iter("ab")
    assert functions_of(model).fact("question", lambda: next(answers)) == "a"
    assert functions_of(model).fact("question", lambda: next(answers)) == "a"
    exchange_the_activation(model)
    assert functions_of(model).fact("question", lambda: next(answers)) == "b"


def test_parts_of_a_model_are_compared_by_identity_and_value():
    model = mlp()
    layer = model.layers[0]
    parts = Parts(model)
    assert parts.same_objects(model)
    assert parts.differences(Parts(model)) == []
    layer.units_ = float("1.5")
    changed = Parts(model)
    assert not parts.same_objects(model)
    assert parts.differences(changed) == [(id(layer), "units_")]
    layer.units_ = float("1.5")  # Another object of the same value.
    assert changed.differences(Parts(model)) == []
    layer.units_ = True  # Which equals 1, but is none.
    assert changed.differences(Parts(model)) == [(id(layer), "units_")]
    assert Parts(model, {(id(layer), "units_")}).differences(changed) == []


class Noting(layers.Layer):
    """Notes on itself what its calls see, as many tutorials have layers do."""

    def __init__(self):
        super().__init__()
        self.calls, self.last, self.seen = 0, None, []

    def call(self, inputs):
        self.calls += 1
        self.last = inputs
        self.seen.append(len(self.seen))
        return inputs


NOTING = {
    "attributes": lambda: [Noting(), layers.Flatten()],
    "LSTM": lambda: [layers.LSTM(4, dropout=0.1, recurrent_dropout=0.1)],
    "GRU": lambda: [layers.GRU(4)],
    "Bidirectional": lambda: [layers.Bidirectional(layers.SimpleRNN(4))],
    "stacked cells": lambda: [
        layers.RNN([layers.LSTMCell(4, dropout=0.1), layers.GRUCell(4)])
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("noting", NOTING)
def test_what_calls_write_on_layers_changes_nothing(noting):
    x = rows(40, 3, 2)
    base = keras.Sequential([keras.Input((3, 2)), *NOTING[noting](), layers.Dense(3)])
    model = regularized(base, make_adv_reg_config(adv_step_size=0.1))
    validated = {"verbose": 0, "validation_data": (x, Y)}
    model.fit(x, Y, epochs=2, **validated)
    model.predict(x, verbose=0)
    model.perturb_on_batch(x, Y)
    FGSM(0.1)(model, x, Y)
    functions = model.train_function, model.test_function, model.predict_function
    keys = functions_of(model).keys
    for _ in range(2):
        model.fit(x, Y, **validated)
        model.train_on_batch(x, Y)
        model.predict(x, verbose=0)
        base(x)
        model.perturb_on_batch(x, Y)
        FGSM(0.1)(model, x, Y)
    now = model.train_function, model.test_function, model.predict_function
    assert now == functions
    assert functions_of(model).keys == keys


class Positions(keras.Model):
    """Slices by the length of a sequence, which it takes from the static shape."""

    def __init__(self, wrong):
        super().__init__()
        self.dense, self.head, self.wrong = layers.Dense(4), layers.Dense(3), wrong

    def build(self, shape):
        self.table = self.add_weight(shape=(1, 16, 4))
        super().build(shape)

    def call(self, inputs):
        length = inputs.shape[1] or 0 if self.wrong else inputs.shape[1]
        if self.wrong:  # It runs for any length, and does something else.
            return self.head(ops.mean(self.dense(inputs), 1)) * (1 if length else -1)
        hidden = self.dense(inputs) + self.table[:, :length]
        return self.head(ops.mean(hidden, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong", [False, *slow(True)], ids=["fails", "gives something else"]
)
def test_models_that_need_a_static_length(wrong):
    model = Positions(wrong)
    model(rows(4, 5, 2))
    model = regularized(model, make_adv_reg_config(adv_step_size=0.1))
    for length in (5, 7, 16, 9, 7):
        x = rows(20, length, 2, seed=length)
        y = np.argmax(model(x), axis=1)
        assert FGSM(0.1)(model, x, y).shape == x.shape
        assert model.perturb_on_batch(x, y).shape == x.shape
        assert (
            evaluate_robustness(
                model, x, y, attacks=FGSM(0.1), verbose=0
            ).clean_accuracy
            == 1.0
        )


def test_a_model_that_was_attacked_can_be_freed():
    model = mlp()
    FGSM(0.1)(model, X, Y)
    gone = weakref.ref(model)
    del model
    keras.utils.clear_session()
    gc.collect()
    assert gone() is None


def test_nothing_of_it_is_put_on_the_model_or_into_a_file(tmp_path):
    model = mlp()
    model.predict(X, verbose=0)
    before = {layer: set(vars(layer)) for layer in (model, *model.layers)}
    FGSM(0.1)(model, X, Y)
    assert {layer: set(vars(layer)) for layer in (model, *model.layers)} == before
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(FGSM(0.1)(model, X, Y), FGSM(0.1)(loaded, X, Y))
