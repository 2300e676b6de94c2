"""Callbacks, and attacks of other origin that they and reports call."""

import keras
import numpy as np
import pytest
from helpers.slow import slow_on_jax
from keras import layers, ops

import advreg
from advreg import attacks, plots
from advreg.attacks.transfer import Transfer
from advreg.callbacks import CatastrophicOverfitting, RobustAccuracy
from advreg.config.configs import AdvRegConfig

pytestmark = pytest.mark.every_backend(tensorflow="slow")

BACKEND = keras.backend.backend()
RANDOM = np.random.default_rng(0)
X = RANDOM.random((40, 6)).astype("float32")
Y = (X.sum(axis=1) > 3).astype("int64")
ATTACK = attacks.PGD(0.05, iterations=2, seed=0)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def network(built=True, seed=1):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            *([keras.Input((6,))] if built else []),
            layers.Dense(8, activation="relu"),
            layers.Dense(2),
        ]
    )


def wrapped(base=None, **config):
    config = advreg.make_adv_reg_config(multiplier=0.5, adv_step_size=0.05, **config)
    model = advreg.AdversarialRegularization(base or network(), config)
    model.compile(keras.optimizers.Adam(0.05), LOSS, metrics=["accuracy"])
    return model


def accuracy(model, attack=ATTACK):
    report = advreg.evaluate_robustness(model, X, Y, attacks=[attack], verbose=0)
    return report.results[0].accuracy


class Batches(keras.utils.PyDataset):
    def __init__(self, keyed=False):
        super().__init__()
        self.keyed = keyed

    def __len__(self):
        return 4

    def __getitem__(self, index):
        rows = slice(10 * index, 10 * index + 10)
        if self.keyed:
            return {"feature": X[rows], "label": Y[rows]}
        return X[rows], Y[rows]


def loader():
    data = pytest.importorskip("torch.utils.data")
    return data.DataLoader(list(zip(X, Y, strict=True)), batch_size=10)


@pytest.mark.parametrize(
    "data",
    [
        lambda: (X, Y),
        lambda: (ops.convert_to_tensor(X), ops.convert_to_tensor(Y)),
        Batches,
        lambda: Batches(keyed=True),
        lambda: ({"feature": X, "label": Y},),
        loader,
    ],
    ids=["arrays", "tensors", "PyDataset", "keyed", "dictionary", "DataLoader"],
)
def test_it_logs_what_a_report_says(data):
    model = wrapped()
    logs = model.fit(
        X, Y, epochs=2, verbose=0, callbacks=[RobustAccuracy(ATTACK, data())]
    ).history["val_robust_accuracy"]
    assert len(logs) == 2
    assert logs[-1] == pytest.approx(accuracy(model), abs=1e-9)


@pytest.mark.parametrize("wrap", [False, True])
def test_a_network_that_the_first_batch_builds(wrap):
    model = network(built=False)
    if wrap:
        model = wrapped(model)
    else:
        model.compile("sgd", LOSS)
    watch = RobustAccuracy(ATTACK, (X, Y), batch_size=64)
    history = model.fit(X, Y, batch_size=8, verbose=0, callbacks=[watch]).history
    assert history["val_robust_accuracy"][-1] == pytest.approx(
        accuracy(model), abs=1e-9
    )


@slow_on_jax
def test_other_callbacks_read_its_log(tmp_path):
    model, path = wrapped(), tmp_path / "best.keras"
    history = model.fit(
        X,
        Y,
        epochs=6,
        verbose=0,
        callbacks=[
            RobustAccuracy(ATTACK, (X, Y)),
            keras.callbacks.EarlyStopping(
                "val_robust_accuracy",
                mode="max",
                patience=1,
                restore_best_weights=True,
                start_from_epoch=0,
            ),
            keras.callbacks.ModelCheckpoint(
                path, "val_robust_accuracy", mode="max", save_best_only=True
            ),
        ],
    ).history["val_robust_accuracy"]
    best = max(history)
    assert accuracy(model) == pytest.approx(best, abs=1e-9)
    assert accuracy(keras.models.load_model(path)) == pytest.approx(best, abs=1e-9)


def test_overfitting_restores_the_best_weights(monkeypatch):
    model = wrapped()
    watch = CatastrophicOverfitting(ATTACK, (X, Y), max_gap=0.3)
    weights = []
    measured = iter([(0.5, 0.5), (0.9, 0.1)])

    def measure():
        weights.append(model.get_weights())
        names = ("single_step_accuracy", "iterative_accuracy")
        return dict(zip(names, next(measured), strict=True))

    monkeypatch.setattr(watch, "measure", measure)
    with pytest.warns(UserWarning, match="Catastrophic overfitting in epoch 2"):
        history = model.fit(X, Y, epochs=5, verbose=0, callbacks=[watch]).history
    assert history["val_iterative_accuracy"] == [0.5, 0.1]
    for restored, best in zip(model.get_weights(), weights[0], strict=True):
        np.testing.assert_array_equal(restored, best)
    assert any((a != b).any() for a, b in zip(*weights, strict=True))


@slow_on_jax
def test_overfitting_measures_both_attacks():
    model = wrapped()
    watch = CatastrophicOverfitting(ATTACK, (X, Y))
    logs = model.fit(X, Y, verbose=0, callbacks=[watch]).history
    assert logs["val_iterative_accuracy"][-1] == pytest.approx(
        accuracy(model), abs=1e-9
    )
    assert logs["val_iterative_accuracy"] <= logs["val_single_step_accuracy"]


class TestInTheMidstOfAnEpoch:
    """On JAX, Keras takes the values out of the variables during an epoch."""

    def fit(self, model, watch):
        return model.fit(
            X,
            Y,
            batch_size=10,
            shuffle=False,
            verbose=0,
            callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=watch)],
        ).history

    @slow_on_jax
    def test_a_measurement_sees_the_weights_and_changes_no_training(self):
        model, seen = wrapped(), []

        def watch(batch, logs):
            seen.append(
                (
                    attacks.FGSM(0.05)(model, X, Y),
                    model.perturb_on_batch(X, Y),
                    accuracy(model),
                )
            )

        history = self.fit(model, watch)
        assert history == self.fit(wrapped(), lambda batch, logs: None)
        assert len(seen) == 4
        for found, again in zip(
            seen[-1],
            (
                attacks.FGSM(0.05)(model, X, Y),
                model.perturb_on_batch(X, Y),
                accuracy(model),
            ),
            strict=True,
        ):
            np.testing.assert_array_equal(found, again)

    @pytest.mark.skipif(BACKEND != "jax", reason="variables keep their values")
    def test_the_base_has_no_weights_and_says_so(self):
        model = wrapped()
        with pytest.raises(RuntimeError, match="Use the model that is trained"):
            self.fit(
                model,
                lambda batch, logs: attacks.FGSM(0.05)(model.base_model, X, Y),
            )
        assert accuracy(model) == accuracy(model.base_model)

    @slow_on_jax
    @pytest.mark.skipif(BACKEND != "jax", reason="variables keep their values")
    def test_the_base_may_follow_the_model(self):
        model, seen = wrapped(), []

        def watch(batch, logs):
            accuracy(model)
            seen.append(accuracy(model.base_model))

        self.fit(model, watch)
        assert seen[-1] == accuracy(model)


class TestForeign:
    def test_it_may_return_tensors_of_the_backend(self):
        model = wrapped()

        def arrays(model, x, y):
            assert isinstance(x, np.ndarray)
            assert isinstance(y, np.ndarray)
            return x - 0.2

        def tensors(model, x, y):
            return ops.convert_to_tensor(x) - 0.2

        assert accuracy(model, tensors) == accuracy(model, arrays)

    def test_a_tensor_of_pytorch_may_ask_for_a_gradient(self):
        torch = pytest.importorskip("torch")
        model = wrapped()

        def attack(model, x, y):
            return torch.tensor(x, requires_grad=True) - 0.2

        assert accuracy(model, attack) == accuracy(model, lambda model, x, y: x - 0.2)

    def test_tensors_of_another_framework_are_detached(self):
        class Tensor:
            """What PyTorch's tensors do where NumPy meets them."""

            def __init__(self, values, asks=True):
                self.values, self.asks = values, asks

            def detach(self):
                return Tensor(self.values, asks=False)

            def to(self, device):
                return self.values

            def __array__(self, dtype=None, copy=None):
                raise RuntimeError("Can't call numpy() on Tensor that requires grad.")

        model = wrapped()
        moved = accuracy(model, lambda model, x, y: Tensor(x - 0.2))
        assert moved == accuracy(model, lambda model, x, y: x - 0.2)

    def test_structures_of_tensors(self):
        one, other = keras.Input((6,), name="one"), keras.Input((3,), name="other")
        scores = layers.Dense(2)(layers.concatenate([one, other]))
        model = keras.Model({"one": one, "other": other}, scores)
        report = advreg.evaluate_robustness(
            model,
            {"one": X, "other": X[:, :3]},
            Y,
            attacks=[
                lambda model, x, y: {
                    key: ops.convert_to_tensor(part) for key, part in x.items()
                }
            ],
            verbose=0,
        )
        assert report.results[0].accuracy == report.clean.accuracy


def test_transferred_examples_are_those_of_the_source():
    model, source = wrapped(), network(seed=2)
    attack = attacks.PGD(0.3, iterations=3, seed=0)
    moved = Transfer(attack, source)(model, X, Y)
    np.testing.assert_array_equal(moved, attack(source, X, Y, early_stop=False))
    assert isinstance(moved, np.ndarray)
    assert 0 <= accuracy(model, Transfer(attack, source)) <= 1


RAMP = keras.optimizers.schedules.PolynomialDecay(0.0, 4, 0.1)


@pytest.mark.parametrize(
    "config",
    [AdvRegConfig.fast(RAMP), AdvRegConfig.fast(0.1), AdvRegConfig.trades(0.1)],
    ids=["a schedule", "fast", "trades"],
)
def test_presets_and_schedules_train(config):
    model = advreg.AdversarialRegularization(network(), config)
    model.compile("sgd", LOSS)
    history = model.fit(X, Y, batch_size=10, epochs=2, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert history["scaled_adversarial_loss"][-1] > 0


def test_figures_are_drawn_of_tensors():
    pytest.importorskip("matplotlib")
    images = ops.convert_to_tensor(RANDOM.random((2, 4, 4, 1)).astype("float32"))
    classes = ops.argmax(ops.convert_to_tensor(RANDOM.random((2, 3))), axis=1)
    pair = (classes, classes)
    for figure in (
        plots.perturbation_grid(images, images + 0.1, classes, {"plain": pair}),
        plots.perturbation_panels(images, images + 0.1, classes, pair),
        plots.schedules(AdvRegConfig.fast(RAMP), steps=8),
    ):
        assert figure.axes
