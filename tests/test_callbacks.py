"""advreg's own callbacks; those of Keras on the wrapper are in test_callbacks.py."""

import csv
import random

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.models import (
    busy_base,
    classifier,
    cross_entropy,
    labelled,
    regularized,
    rows,
)
from helpers.slow import slow

from advreg import datasets, evaluate_robustness, make_adv_reg_config
from advreg.apps.recipes import digits_network
from advreg.attacks import FGSM, PGD, RandomNoise
from advreg.callbacks import CatastrophicOverfitting, RobustAccuracy

X, Y = labelled(24)
VALIDATION = rows(20, 6, seed=5), np.arange(20) % 3
ATTACK = PGD(epsilon=0.1, iterations=3)
KEY = "val_robust_accuracy"


def plain(base=None, **kwargs):
    model = base or classifier()
    kwargs = {"metrics": ["accuracy"], **kwargs}
    model.compile(keras.optimizers.SGD(0.5), cross_entropy(), **kwargs)
    return model


def wrapped(base=None, **kwargs):
    return regularized(
        base or classifier(),
        make_adv_reg_config(0.5, adv_step_size=0.1),
        optimizer=keras.optimizers.SGD(0.5),
        **{"metrics": ["accuracy"], **kwargs},
    )


def fit(model, *callbacks, epochs=3, **kwargs):
    arguments = {"batch_size": 8, "validation_data": VALIDATION, "verbose": 0}
    return model.fit(
        X, Y, epochs=epochs, callbacks=list(callbacks), **arguments | kwargs
    ).history


def robust(attack=ATTACK, data=VALIDATION, **kwargs):
    return RobustAccuracy(attack, data, **kwargs)


def accuracy(model, attack, data=VALIDATION):
    """What `evaluate_robustness` finds."""
    x, y, *_ = data if isinstance(data, tuple) else (data, None)
    report = evaluate_robustness(model, x, y, attacks=attack, verbose=0)
    return report.results[0].accuracy


class Seen(keras.callbacks.Callback):
    """Keeps what it hears at the end of every epoch, and of the training."""

    def __init__(self, *names):
        super().__init__()
        self.names = names or (KEY,)
        self.epochs, self.end = [], None

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append([logs.get(name) for name in self.names])

    def on_train_end(self, logs=None):
        self.end = [logs.get(name) for name in self.names]


class Each(keras.callbacks.Callback):
    """Calls a function at the end of every epoch, and keeps what it returns."""

    def __init__(self, function):
        super().__init__()
        self.function, self.results = function, []

    def on_epoch_end(self, epoch, logs=None):
        self.results.append(self.function(self.model))


# RobustAccuracy: what it measures


@pytest.mark.parametrize(
    "mode", [*slow("eager"), "function", *slow("jit")], indirect=True
)
@pytest.mark.parametrize("make", [*slow(plain), wrapped])
def test_logs_what_evaluate_robustness_finds(make, mode):
    attack = PGD(epsilon=0.5, iterations=3, seed=7)
    expected = Each(lambda model: accuracy(model, attack))
    history = fit(make(**mode), robust(attack), expected)
    assert history[KEY] == expected.results
    assert all(type(value) is float for value in history[KEY])
    clean = history["val_accuracy"]
    assert sum(history[KEY]) < sum(clean)


@pytest.mark.slow
def test_an_attack_without_a_seed_starts_every_epoch_from_the_same_points():
    attack = RandomNoise(epsilon=1.0)
    seen = Seen()
    model = plain()
    model.optimizer.learning_rate = 0.0
    fit(model, robust(attack), seen, epochs=4)
    assert len({value for (value,) in seen.epochs}) == 1
    assert attack.seed is None


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        part = slice(5 * index, 5 * index + 5)
        return VALIDATION[0][part], VALIDATION[1][part]


def dataset():
    return tf.data.Dataset.from_tensor_slices(VALIDATION).batch(6)


@pytest.mark.parametrize(
    "data",
    [
        Batches,
        *slow(
            dataset,
            lambda: (tf.constant(VALIDATION[0]), tf.constant(VALIDATION[1])),
            lambda: list(VALIDATION),
            lambda: (*VALIDATION, np.zeros(20, "float32")),
            lambda: (dataset(),),
            lambda: dataset().batch(1).unbatch(),
            lambda: (VALIDATION[0], np.eye(3)[VALIDATION[1]]),
        ),
    ],
)
def test_forms_of_validation_data(data):
    model = plain()
    (value,) = fit(model, robust(data=data()), epochs=1)[KEY]
    assert value == accuracy(model, PGD(epsilon=0.1, iterations=3, seed=0))


@pytest.mark.slow
def test_labels_inside_a_dictionary():
    inputs = {"x": keras.Input((6,), name="x")}
    model = wrapped(keras.Model(inputs, classifier()(inputs["x"])))
    train = {"x": X, "label": Y}
    data = {"x": VALIDATION[0], "label": VALIDATION[1]}
    history = model.fit(
        train,
        epochs=2,
        validation_data=(data,),
        callbacks=[robust(data=data)],
        verbose=0,
    ).history
    attack = PGD(epsilon=0.1, iterations=3, seed=0)
    assert history[KEY][-1] == accuracy(model, attack, data)


@pytest.mark.slow
def test_one_hot_labels_and_probabilities():
    model = keras.Sequential([classifier(), keras.layers.Softmax()])
    model.compile("sgd", "categorical_crossentropy")
    data = VALIDATION[0], np.eye(3)[VALIDATION[1]]
    one_hot = np.eye(3)[Y]
    (value,) = model.fit(
        X, one_hot, validation_data=data, callbacks=[robust(data=data)], verbose=0
    ).history[KEY]
    assert value == accuracy(model, PGD(epsilon=0.1, iterations=3, seed=0), data)


# RobustAccuracy: who sees it


@pytest.mark.parametrize(
    "mode", [*slow("eager"), "function", *slow("jit")], indirect=True
)
@pytest.mark.parametrize("validation", [VALIDATION, None], ids=["with", "without"])
def test_callbacks_after_it_see_what_it_logs(validation, mode):
    seen = Seen()
    history = fit(plain(**mode), robust(), seen, validation_data=validation)
    assert [value for (value,) in seen.epochs] == history[KEY]
    assert seen.end == [history[KEY][-1]]
    assert len(history[KEY]) == 3
    assert ("val_loss" in history) == (validation is not None)


def test_callbacks_before_it_miss_it_and_those_of_keras_warn():
    seen = Seen()
    stopping = keras.callbacks.EarlyStopping(KEY, mode="max")
    with pytest.warns(UserWarning, match=f"`{KEY}` which is not available"):
        history = fit(plain(), seen, stopping, robust())
    assert seen.epochs == [[None]] * 3
    assert len(history[KEY]) == 3


def test_epochs_that_are_not_measured_log_nothing():
    seen = Seen()
    history = fit(plain(), robust(frequency=2), seen, epochs=5, validation_freq=2)
    assert len(history[KEY]) == 2
    a, b = history[KEY]
    assert seen.epochs == [[None], [a], [None], [b], [None]]
    assert seen.end == [None]


@pytest.mark.slow
def test_two_attacks_under_two_names():
    weak = robust(FGSM(epsilon=0.1), name="weak")
    strong = robust(PGD(epsilon=1.0, iterations=5), name="strong")
    for validation in (VALIDATION, None):
        names = "val_weak", "val_strong"
        seen = Seen(*names)
        history = fit(plain(), weak, strong, seen, validation_data=validation)
        expected = [history[name] for name in names]
        assert seen.epochs == [list(pair) for pair in zip(*expected, strict=True)]
        assert sum(history["val_weak"]) > sum(history["val_strong"])


@pytest.mark.parametrize("name", ["robust_accuracy", *slow("accuracy")])
def test_a_name_that_is_taken(name):
    with pytest.raises(ValueError, match=f"logs 'val_{name}', which is there already"):
        fit(plain(), robust(), robust(name=name))


@pytest.mark.slow
def test_early_stopping_and_checkpoint_choose_by_it(tmp_path):
    stopping = keras.callbacks.EarlyStopping(
        KEY, mode="max", patience=2, restore_best_weights=True
    )
    best, each = (
        keras.callbacks.ModelCheckpoint(
            tmp_path / name,
            monitor=KEY,
            mode="max",
            save_best_only=name == "best.keras",
        )
        for name in ("best.keras", "{epoch:02d} {val_robust_accuracy:.2f}.keras")
    )
    attack = PGD(epsilon=0.1, iterations=3, seed=0)
    model = plain()
    history = fit(model, robust(attack), stopping, best, each, epochs=30)[KEY]
    top = int(np.argmax(history))
    assert 2 <= len(history) < 30
    assert stopping.stopped_epoch == len(history) - 1 == top + 2
    assert stopping.best == max(history) > min(history)
    assert accuracy(model, attack) == max(history)
    saved = keras.models.load_model(tmp_path / "best.keras")
    assert accuracy(saved, attack) == max(history)
    names = {
        f"{epoch + 1:02d} {value:.2f}.keras" for epoch, value in enumerate(history)
    }
    assert {path.name for path in tmp_path.iterdir()} == {"best.keras", *names}


@pytest.mark.slow
def test_csv_logger_and_tensorboard_write_it(tmp_path):
    pytest.importorskip("tensorboard")
    logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    board = keras.callbacks.TensorBoard(tmp_path)
    history = fit(wrapped(), robust(), logger, board)[KEY]
    with (tmp_path / "log.csv").open() as file:
        assert [float(row[KEY]) for row in csv.DictReader(file)] == history
    written = []
    for path in (tmp_path / "validation").glob("events*"):
        for record in tf.data.TFRecordDataset(str(path)):
            for value in tf.compat.v1.Event.FromString(record.numpy()).summary.value:
                if value.tag == "epoch_robust_accuracy":
                    written.append(float(tf.make_ndarray(value.tensor)))
    np.testing.assert_allclose(written, history, rtol=1e-6)


def test_the_progress_bar_shows_it(capsys):
    fit(plain(), robust(), epochs=1, verbose=2)
    assert f"{KEY}: 0." in capsys.readouterr().out


@pytest.mark.slow
def test_evaluations_that_others_start_are_left_alone():
    measured = robust()
    results = Each(lambda model: model.evaluate(*VALIDATION, verbose=0))
    history = fit(plain(), results, measured)
    assert [accuracy for _, accuracy in results.results] == history["val_accuracy"]
    model = plain()
    logs = model.evaluate(
        *VALIDATION, callbacks=[measured], return_dict=True, verbose=0
    )
    assert set(logs) == {"loss", "accuracy"}


# RobustAccuracy: what it leaves alone


class Draws:
    """An attack that nothing is known of, and that draws random numbers."""

    def __call__(self, model, x, y):
        return x + np.float32(random.random()) * np.random.rand(*x.shape)


@pytest.mark.slow
@pytest.mark.parametrize("make", [*slow(plain), wrapped])
@pytest.mark.parametrize(
    "attack", [*slow(ATTACK, PGD(epsilon=0.1, iterations=2, seed=3)), Draws()]
)
def test_training_is_the_same_bit_for_bit(make, attack):
    class Shuffled(keras.utils.PyDataset):
        """Every batch is drawn anew, from Python's and NumPy's random state."""

        def __len__(self):
            return 3

        def __getitem__(self, index):
            chosen = np.random.permutation(24)[: random.randint(5, 9)]
            return X[chosen], Y[chosen]

    def run(*callbacks):
        keras.utils.clear_session()  # Older Keras keeps its generator for ever.
        keras.utils.set_random_seed(1)
        model = make(busy_base())
        history = model.fit(
            Shuffled(),
            epochs=3,
            validation_data=VALIDATION,
            callbacks=list(callbacks),
            verbose=0,
        ).history
        history |= fit(model, *callbacks)  # Shuffled by Keras, this one.
        draws = random.random(), np.random.rand(), keras.random.uniform(())
        state = [variable.numpy() for variable in model.variables]
        return history, state, [float(draw) for draw in draws]

    history, state, draws = run()
    with_it, state_with_it, draws_with_it = run(robust(attack))
    assert KEY in with_it
    assert {name: with_it[name] for name in history} == history
    assert draws_with_it == draws
    for left, right in zip(state_with_it, state, strict=True):
        np.testing.assert_array_equal(left, right)


class Counting(keras.layers.Layer):
    """Counts how often it is traced, or called eagerly."""

    traces = 0

    def call(self, inputs):
        type(self).traces += 1
        return inputs


def test_attacks_are_compiled_once():
    model = plain(
        keras.Sequential([keras.Input((6,)), Counting(), *classifier().layers])
    )
    counts = Each(lambda model: Counting.traces)
    # Batches of several sizes, and a last one that is smaller.
    fit(model, robust(batch_size=7), counts, epochs=4)
    assert counts.results[0] == counts.results[-1]
    before = Counting.traces
    fit(model, robust(PGD(epsilon=0.3, iterations=5), batch_size=3), epochs=2)
    assert Counting.traces == before


class Break(keras.callbacks.Callback):
    def __init__(self, epoch):
        super().__init__()
        self.at, self.epoch = epoch, None

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch == self.at and batch == 1:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("make", [plain, wrapped])
def test_an_interrupted_training_leaves_no_trace(make):
    model, measured = make(), robust()
    with pytest.raises(KeyboardInterrupt):
        fit(model, Break(1))
    before = set(vars(model))
    with pytest.raises(KeyboardInterrupt):
        fit(model, measured, Break(1))
    assert set(vars(model)) <= before
    assert set(model.evaluate(*VALIDATION, return_dict=True, verbose=0)) == {
        "loss",
        "accuracy",
    }
    assert KEY not in fit(model)
    seen = Seen()
    history = fit(model, measured, seen)
    assert [value for (value,) in seen.epochs] == history[KEY]


def test_an_interrupted_measurement_leaves_no_trace():
    def attack(model, x, y):
        raise KeyboardInterrupt

    model = plain()
    state = random.getstate()
    with pytest.raises(KeyboardInterrupt):
        fit(model, robust(attack))
    random.setstate(state)
    assert KEY not in fit(model)
    assert "evaluate" not in vars(model)


@pytest.mark.slow
def test_one_callback_serves_several_models():
    measured = robust()
    first, second = (fit(make(), measured)[KEY] for make in (plain, wrapped))
    assert len(first) == len(second) == 3


def test_without_a_list_of_callbacks():
    """As a loop of one's own may call it."""
    model, measured, logs = plain(), robust(), {}
    fit(model)
    measured.set_model(model)
    measured.on_train_begin()
    measured.on_epoch_begin(0)
    measured.on_epoch_end(0, logs)
    measured.on_epoch_begin(1)
    measured.on_epoch_end(1)
    assert logs == {KEY: accuracy(model, PGD(epsilon=0.1, iterations=3, seed=0))}


# Bad input


@pytest.mark.parametrize("make", [RobustAccuracy, CatastrophicOverfitting])
@pytest.mark.parametrize(
    ("attack", "data", "error", "message"),
    [
        (
            PGD,
            VALIDATION,
            TypeError,
            r"`attack` must be an attack, such as .*Received:",
        ),
        ("pgd", VALIDATION, TypeError, r"`attack` must be an attack.*Received: 'pgd'"),
        (None, VALIDATION, TypeError, "`attack` must be an attack.*Received: None"),
        (
            PGD(0.1, targeted=True),
            VALIDATION,
            ValueError,
            r"`attack` must not be targeted.*Received: PGD\(",
        ),
        (ATTACK, None, ValueError, r"`validation_data` must be.*Received: None"),
        (ATTACK, (None, Y), ValueError, r"`validation_data` must be.*Received: \(None"),
        (ATTACK, (), ValueError, r"`validation_data` must be.*a tuple of 0"),
        (ATTACK, (X, Y, Y, Y), ValueError, r"`validation_data` must.*a tuple of 4"),
        (ATTACK, (X, Y[:5]), ValueError, r"`validation_data` .* \(24, 6\) and \(5,\)"),
        (ATTACK, (X[:0], Y[:0]), ValueError, r"`validation_data` .* \(0, 6\) and"),
        (
            ATTACK,
            iter([VALIDATION]),
            TypeError,
            r"`validation_data` is read again and again.*Received: <list_iterator",
        ),
        (
            ATTACK,
            dataset().repeat(),
            ValueError,
            "`validation_data` must end.*Received: <_RepeatDataset",
        ),
    ],
)
def test_wrong_arguments(make, attack, data, error, message):
    with pytest.raises(error, match=message):
        make(attack, data)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1.*Received: 0"),
        ({"batch_size": 2.5}, TypeError, "`batch_size` must be an integer.*2.5"),
        ({"frequency": 0}, ValueError, "`frequency` must be at least 1.*Received: 0"),
        ({"frequency": True}, TypeError, "`frequency` must be an integer.*True"),
        ({"name": ""}, TypeError, "`name` must be a string that is not empty.*''"),
        ({"name": 3}, TypeError, "`name` must be a string.*Received: 3"),
    ],
)
def test_wrong_options(kwargs, error, message):
    with pytest.raises(error, match=message):
        robust(**kwargs)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"max_gap": 0}, ValueError, r"`max_gap` must be a number in \(0, 1\].*: 0 "),
        ({"max_gap": 1.5}, ValueError, r"`max_gap` must be .*Received: 1.5"),
        ({"max_gap": "wide"}, ValueError, "`max_gap` must be .*Received: 'wide'"),
        ({"max_gap": np.nan}, ValueError, "`max_gap` must be .*Received: nan"),
        ({"action": "explode"}, ValueError, "`action` must be 'restore', .*'explode'"),
        ({"single_step": FGSM}, TypeError, "`single_step` must be an attack"),
        ({"frequency": 0}, ValueError, "`frequency` must be at least 1"),
    ],
)
def test_wrong_options_of_the_watch(kwargs, error, message):
    with pytest.raises(error, match=message):
        CatastrophicOverfitting(ATTACK, VALIDATION, **kwargs)


def test_a_callable_needs_its_single_step():
    with pytest.raises(
        ValueError, match=r"`single_step` must be given.*Received: attack"
    ):
        CatastrophicOverfitting(lambda model, x, y: x, VALIDATION)


def test_labels_that_do_not_fit_the_model():
    with pytest.raises(ValueError, match="`y` must hold classes from 0 to 2"):
        fit(plain(), robust(data=(VALIDATION[0], np.full(20, 3))))


class NoBatch(keras.callbacks.Callback):
    """Fails if anything is paid for."""

    def on_train_batch_begin(self, batch, logs=None):
        pytest.fail("training began")


def watch(attack=ATTACK, data=VALIDATION):
    return CatastrophicOverfitting(attack, data)


def with_head(*layers):
    return keras.Sequential([keras.Input((6,)), *layers])


def outside():
    """An attack of somebody else's, which says in which range data lie."""

    def attack(model, x, y):
        raise AssertionError("never called")

    attack.clip_value_min, attack.clip_value_max = 0.0, 1.0
    return attack


@pytest.mark.parametrize("make", [robust, watch])
@pytest.mark.parametrize("build", [plain, wrapped])
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("labels", r"`y` must hold classes from 0 to 2.*3 classes\. Received: 7"),
        ("range", "`x` must lie in the clip range"),
        ("missing", "Labels are missing"),
        ("lengths", "must have the same number of examples"),
    ],
)
def test_what_cannot_be_measured_is_found_before_training(make, build, case, message):
    x = VALIDATION[0]
    attack = PGD(0.1, clip_value_min=0.0, clip_value_max=1.0)
    callback = {
        "labels": lambda: make(data=(x, np.full(20, 7))),
        "range": lambda: make(attack),
        "missing": lambda: make(data=dataset().map(lambda x, y: x)),
        "lengths": lambda: make(data=dataset().map(lambda x, y: (x, y[:2]))),
    }[case]()
    with pytest.raises(ValueError, match=message):
        fit(build(), callback, NoBatch())


@pytest.mark.parametrize("make", [robust, watch])
def test_models_that_cannot_be_measured_are_found_before_training(make):
    layers = keras.layers
    inputs = keras.Input((6,))
    regression = keras.Model(inputs, layers.Dense(1)(inputs))
    regression.compile("sgd", "mse")
    heads = [layers.Dense(3)(inputs), layers.Dense(3)(inputs)]
    several = keras.Model(inputs, heads)
    several.compile("sgd", [cross_entropy(), cross_entropy()])
    pixels = keras.Model(inputs, layers.Reshape((2, 3))(layers.Dense(6)(inputs)))
    pixels.compile("sgd", cross_entropy())
    labels = {0: Y, 1: [Y, Y], 2: np.stack([Y, Y], 1)}
    messages = ["must be a classifier", "must have one output", "must give class sc"]
    for index, model in enumerate([regression, several, pixels]):
        with pytest.raises(ValueError, match=messages[index]):
            model.fit(X, labels[index], callbacks=[make(), NoBatch()], verbose=0)


def test_a_range_that_somebody_else_states():
    with pytest.raises(ValueError, match="`x` must lie in the clip range"):
        fit(plain(), robust(outside()), NoBatch())


@pytest.mark.parametrize("form", ["dataset", "PyDataset", "tensors"])
def test_first_rows_of_every_form(form):
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return VALIDATION[0], np.full(20, 7)

    data = {
        "dataset": lambda: dataset().map(lambda x, y: (x, y + 7)),
        "PyDataset": Batches,
        "tensors": lambda: (tf.constant(VALIDATION[0]), tf.fill([20], 7)),
    }[form]()
    with pytest.raises(ValueError, match="`y` must hold classes from 0 to 2"):
        fit(plain(), robust(data=data), NoBatch())


def test_a_radius_of_zero_may_lie_outside_the_range():
    attack = PGD(0.0, clip_value_min=0.0, clip_value_max=1.0)
    model = plain()
    assert fit(model, robust(attack))[KEY][-1] == accuracy(
        model, FGSM(0.0, clip_value_min=0.0, clip_value_max=1.0)
    )


@pytest.mark.parametrize("make", slow(plain, wrapped))
def test_a_model_that_is_not_built_trains_as_without_it(make):
    class Late(keras.Model):
        def __init__(self):
            super().__init__()
            self.drop = keras.layers.Dropout(0.3)
            self.dense = keras.layers.Dense(3)

        def build(self, input_shape):
            # Draws from Python, as whoever makes layers here does.
            self.hidden = keras.layers.Dense(5, kernel_initializer="he_normal")
            self.hidden.build(input_shape)
            self.dense.build((None, 5))

        def call(self, x, training=None):
            hidden = self.hidden(self.drop(x, training=training))
            return self.dense(hidden)

    def run(*callbacks):
        keras.utils.set_random_seed(3)
        history = fit(make(Late()), *callbacks)
        return history["loss"], random.random(), np.random.rand()

    assert run() == run(robust())
    with pytest.raises(ValueError, match="`y` must hold classes from 0 to 2"):
        fit(make(Late()), robust(data=(VALIDATION[0], np.full(20, 7))), NoBatch())


# CatastrophicOverfitting


class Collapse(keras.callbacks.Callback):
    """Two attacks: all withstand the first, and none the second in some epochs."""

    def __init__(self, *collapsed):
        super().__init__()
        self.collapsed, self.epoch, self.weights = collapsed, 0, []

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_epoch_end(self, epoch, logs=None):
        self.weights.append(self.model.get_weights())

    def single(self, model, x, y):
        return x

    def iterative(self, model, x, y):
        return -100 * x if self.epoch in self.collapsed else x


class Sign(keras.layers.Layer):
    """Takes every example for what its first value says, and has a weight to train."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer="ones")

    def call(self, inputs):
        first = inputs[:, :1]
        return keras.ops.concatenate([first, -first], axis=1) * self.scale


def sign_data(count=16):
    x = rows(count, 6, seed=4)
    return x, (x[:, 0] < 0).astype("int64")


def train_to_collapse(collapse, *others, action="restore", epochs=5, **kwargs):
    x, y = sign_data()
    model = keras.Sequential([keras.Input((6,)), Sign()])
    model.compile(keras.optimizers.SGD(0.1), cross_entropy())
    watch = CatastrophicOverfitting(
        collapse.iterative,
        (x, y),
        single_step=collapse.single,
        action=action,
        **kwargs,
    )
    history = model.fit(
        x,
        y,
        epochs=epochs,
        callbacks=[collapse, watch, *others],
        verbose=0,
        validation_data=(x, y),
    ).history
    return model, history


def assert_weights(model, weights):
    for left, right in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(left, right)


def test_restores_the_best_weights():
    collapse = Collapse(2)
    with pytest.warns(UserWarning, match="Catastrophic") as warned:
        model, history = train_to_collapse(collapse)
    assert [str(warning.message) for warning in warned] == [
        "Catastrophic overfitting in epoch 3: the accuracy is 100.0 % under a single "
        "step, but 0.0 % under an iterative attack. Training stops. The weights are "
        "again those of epoch 1, with 100.0 % under the iterative attack. Train with "
        "`random_init=True`, a smaller `adv_step_size`, or several `pgd_iterations`."
    ]
    assert history["val_single_step_accuracy"] == [1.0, 1.0, 1.0]
    assert history["val_iterative_accuracy"] == [1.0, 1.0, 0.0]
    assert_weights(model, collapse.weights[0])
    with pytest.raises(AssertionError):
        assert_weights(model, collapse.weights[1])


def test_stops():
    collapse = Collapse(1)
    with pytest.warns(UserWarning, match=r"epoch 2: .* Training stops\. Train with"):
        model, history = train_to_collapse(collapse, action="stop")
    assert len(history["loss"]) == 2
    assert_weights(model, collapse.weights[-1])


def test_warns_whenever_the_gap_opens():
    with pytest.warns(UserWarning, match="Catastrophic") as warned:
        _, history = train_to_collapse(Collapse(1, 2, 4), action="warn", epochs=6)
    assert history["val_iterative_accuracy"] == [1.0, 0.0, 0.0, 1.0, 0.0, 1.0]
    assert [str(warning.message)[:37] for warning in warned] == [
        "Catastrophic overfitting in epoch 2: ",
        "Catastrophic overfitting in epoch 5: ",
    ]
    assert not any("stops" in str(warning.message) for warning in warned)


def test_nothing_better_to_restore():
    collapse = Collapse(0)
    with pytest.warns(UserWarning, match="No epoch before was better, and so the wei"):
        model, history = train_to_collapse(collapse)
    assert len(history["loss"]) == 1
    assert_weights(model, collapse.weights[-1])


def test_a_gap_that_is_allowed():
    _, history = train_to_collapse(Collapse(1), max_gap=1.0)
    assert history["val_iterative_accuracy"] == [1.0, 0.0, 1.0, 1.0, 1.0]


def test_epochs_that_are_not_measured():
    with pytest.warns(UserWarning, match="in epoch 4:"):
        _, history = train_to_collapse(Collapse(2, 3), frequency=2)
    assert history["val_iterative_accuracy"] == [1.0, 0.0]


def test_both_callbacks_together():
    collapse = Collapse(2)
    seen = Seen(KEY, "val_iterative_accuracy")
    measured = RobustAccuracy(collapse.iterative, sign_data())
    with pytest.warns(UserWarning, match="epoch 3"):
        train_to_collapse(collapse, measured, seen)
    assert seen.epochs == [[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]


def test_another_training_starts_anew():
    x, y = sign_data()
    collapse = Collapse(0)
    watch = CatastrophicOverfitting(
        collapse.iterative, (x, y), single_step=collapse.single
    )

    def train():
        model = keras.Sequential([keras.Input((6,)), Sign()])
        model.compile("sgd", cross_entropy())
        model.fit(x, y, epochs=2, callbacks=[watch, collapse], verbose=0)

    collapse.collapsed = ()
    train()
    collapse.collapsed = (0,)
    with pytest.warns(UserWarning, match="No epoch before was better"):
        train()


@pytest.mark.slow
def test_the_single_step_is_that_of_the_attack():
    attack = PGD(
        0.3, norm="l2", iterations=5, loss="margin", clip_value_min=-9.0, seed=4
    )
    history = fit(plain(), CatastrophicOverfitting(attack, VALIDATION), epochs=1)
    keras.utils.set_random_seed(0)
    model = plain()
    step = FGSM(0.3, norm="l2", loss="margin", clip_value_min=-9.0)
    expected = Each(lambda model: (accuracy(model, step), accuracy(model, attack)))
    fit(model, expected, epochs=1)
    found = history["val_single_step_accuracy"] + history["val_iterative_accuracy"]
    assert found == list(expected.results[0])


@pytest.mark.slow
def test_catastrophic_overfitting_of_the_digits():
    """A single step of a large radius, without a random start, with a large weight."""
    pytest.importorskip("sklearn")
    data = datasets.load("digits")
    radius = {"adv_step_size": 0.4, "adv_grad_norm": "infinity"}
    span = {"clip_value_min": 0.0, "clip_value_max": 1.0}

    model = regularized(
        digits_network((8, 8, 1), 10),
        make_adv_reg_config(10.0, **radius, **span),
        optimizer=keras.optimizers.Adam(3e-3),
    )
    watch = CatastrophicOverfitting(
        PGD(0.4, iterations=10, **span),
        (data.x_test[:200], data.y_test[:200]),
        max_gap=0.3,
        action="stop",
    )
    with pytest.warns(UserWarning, match="Catastrophic overfitting in epoch"):
        history = model.fit(
            data.x_train, data.y_train, 64, 30, verbose=0, callbacks=[watch]
        ).history
    assert len(history["loss"]) < 30
    assert history["val_iterative_accuracy"][-1] < 0.1
    assert history["val_single_step_accuracy"][-1] > 0.3
