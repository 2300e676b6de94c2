"""Tasks of KerasHub, whose own methods preprocess what the network receives."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.slow import slow_but
from keras import ops

import advreg
from advreg import nsl
from advreg.attacks import FGSM, PGD, Transfer
from advreg.attacks.engine.target import TargetModel
from advreg.callbacks import RobustAccuracy
from advreg.network.preprocessing import (
    describe_preprocessing,
    overridden_methods,
    preprocesses,
    preprocessing_off,
    readable,
)

keras_hub = pytest.importorskip("keras_hub")

pytestmark = [
    # As the task itself, which makes a dataset of arrays.
    pytest.mark.filterwarnings("ignore:`shuffle=True` was passed"),
    pytest.mark.filterwarnings("ignore:`perturb_on_batch` returns what the network"),
    # That a generator ends.
    pytest.mark.filterwarnings("ignore:Your input ran out of data"),
]
SCALE = 1 / 255.0
CLASSES = 3
STEP = {"adv_step_size": 0.01, "adv_grad_norm": "infinity"}
NAMES = ("fit", "evaluate", "predict", "train_on_batch", "train_step")


def loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def images(count=10):
    random = np.random.default_rng(0)
    x = random.integers(0, 255, (count, 8, 8, 3)).astype("float32")
    return x, random.integers(0, CLASSES, count)


def make_task(preprocessor=True):
    keras.utils.set_random_seed(1)
    backbone = keras_hub.models.ViTBackbone(
        image_shape=(8, 8, 3),
        patch_size=4,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=16,
    )
    if preprocessor:
        converter = keras_hub.layers.ViTImageConverter(image_size=(8, 8), scale=SCALE)
        preprocessor = keras_hub.models.ViTImageClassifierPreprocessor(converter)
    task = keras_hub.models.ViTImageClassifier(
        backbone, num_classes=CLASSES, preprocessor=preprocessor or None
    )
    # Else all scores are almost the same, whatever the input is.
    for weight in task.trainable_weights:
        weight.assign(weight + keras.random.normal(weight.shape, stddev=0.5, seed=7))
    task.compile("sgd", loss(), metrics=["accuracy"])
    return task


def wrap(task, multiplier=0.2, **kwargs):
    config = advreg.make_adv_reg_config(multiplier=multiplier, **STEP)
    model = advreg.AdversarialRegularization(task, config, **kwargs)
    model.compile("sgd", loss(), metrics=["accuracy"])
    return model


class Doubled(keras_hub.src.utils.pipeline_model.PipelineModel):
    """Not a task, and without a preprocessor: what it does stands in its method."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(CLASSES, use_bias=False)

    def preprocess_samples(self, x, y=None, sample_weight=None):
        return keras.utils.pack_x_y_sample_weight(2 * x, y, sample_weight)

    def call(self, x, training=None):
        return self.dense(x)


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y, size=4):
        super().__init__()
        self.x, self.y, self.size, self.epochs = x, y, size, 0

    def __len__(self):
        return -(-len(self.x) // self.size)

    def __getitem__(self, index):
        rows = slice(index * self.size, (index + 1) * self.size)
        return self.x[rows], self.y[rows]

    def on_epoch_end(self):
        self.epochs += 1


def generator(x, y, size=4):
    for start in range(0, len(x), size):
        yield x[start : start + size], y[start : start + size]


def forms(x, y):
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
    inside = tf.data.Dataset.from_tensor_slices({"image": x, "label": y}).batch(4)
    return {
        "arrays": {"x": x, "y": y, "batch_size": 4},
        "tensors": {"x": tf.constant(x), "y": tf.constant(y), "batch_size": 4},
        "dictionary": {"x": {"image": x, "label": y}, "batch_size": 4},
        "dataset": {"x": dataset},
        "dataset of dictionaries": {"x": inside},
        "PyDataset": {"x": Batches(x, y)},
        "generator": {"x": generator(x, y)},
    }


def test_which_models_preprocess():
    assert preprocesses(make_task())
    assert preprocesses(Doubled())
    assert not preprocesses(make_task(preprocessor=False))
    assert not preprocesses(keras_hub.src.utils.pipeline_model.PipelineModel())
    assert not preprocesses(keras.Sequential())


def test_a_method_of_that_name_is_not_enough():
    class Net(keras.Model):
        """Whose `fit` is Keras's, and so does not preprocess."""

        preprocessor = "something"

        def preprocess_samples(self, x, y=None, sample_weight=None):
            raise AssertionError

    assert not preprocesses(Net())


def test_it_is_said_in_a_sentence():
    assert describe_preprocessing(make_task()) == (
        "Perturbed is what the network receives after the preprocessing of "
        "ViTImageClassifier."
    )
    assert describe_preprocessing(keras.Sequential()) is None


@pytest.mark.slow
def test_evaluate_and_predict_are_those_of_the_task():
    x, y = images()
    task = make_task()
    model = wrap(task)
    expected = task.evaluate(x, y, verbose=0)
    for data in forms(x, y).values():
        assert model.evaluate(**data, verbose=0) == pytest.approx(expected, rel=1e-5)
    predictions = task.predict(x, verbose=0)
    # The network on what was preprocessed by hand, and on what was not.
    by_hand = ops.convert_to_numpy(task(x * SCALE, training=False))
    assert predictions == pytest.approx(by_hand, abs=1e-4)
    assert np.abs(predictions - task(x, training=False)).max() > 0.1
    for data in forms(x, y).values():
        found = model.predict(**{k: v for k, v in data.items() if k != "y"}, verbose=0)
        assert found == pytest.approx(predictions, abs=1e-5)
    assert model.predict_on_batch(x) == pytest.approx(predictions, abs=1e-5)
    assert model.test_on_batch(x, y) == pytest.approx(
        task.test_on_batch(x, y), rel=1e-5
    )


def test_calling_the_model_stays_raw():
    x, _ = images()
    task = make_task()
    raw = ops.convert_to_numpy(task(x))
    assert ops.convert_to_numpy(wrap(task)(x)) == pytest.approx(raw, abs=1e-5)


VALIDATED = {
    "validation_data": tuple(part[:4] for part in images()),
    "verbose": 0,
    "shuffle": False,
}


@functools.cache
def trained_task():
    """The history and the weights of a task that is trained without a wrapper."""
    task = make_task()
    history = task.fit(*images(), batch_size=4, **VALIDATED).history
    return history, [np.array(weight) for weight in task.weights]


@pytest.mark.slow
@pytest.mark.parametrize("form", forms(*images()))
def test_fit_is_that_of_the_task(form):
    x, y = images()
    expected, weights = trained_task()
    task = make_task()
    model = wrap(task, multiplier=0.0)
    found = model.fit(**forms(x, y)[form], **VALIDATED).history
    for name in ("loss", "val_loss", "val_accuracy"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4)
    for one, other in zip(weights, task.weights, strict=True):
        assert one == pytest.approx(np.array(other), abs=1e-5)


@pytest.mark.slow
def test_training_perturbs_what_the_network_receives():
    """A step of the wrapper equals one on data that were preprocessed before."""
    x, y = images()
    task, bare = make_task(), make_task(preprocessor=False)
    history = wrap(task).fit(x, y, batch_size=10, verbose=0).history
    expected = wrap(bare).fit(x * SCALE, y, batch_size=10, verbose=0).history
    assert history == {k: pytest.approx(v, rel=1e-4) for k, v in expected.items()}
    other = wrap(make_task())
    assert other.train_on_batch(x, y, return_dict=True)["loss"] == pytest.approx(
        expected["loss"][0], rel=1e-4
    )


@functools.cache
def loss_of_validation():
    """By the task alone."""
    x, y = images()
    return make_task().evaluate(x[6:], y[6:], verbose=0)[0]


@pytest.mark.slow
@pytest.mark.parametrize("form", slow_but(forms(*images()), "dictionary"))
def test_every_form_of_validation_data(form):
    x, y = images()
    data = forms(x[6:], y[6:])[form]
    validation = (data["x"], data["y"]) if "y" in data else data["x"]
    model = wrap(make_task())
    model.optimizer.learning_rate = 0.0
    history = model.fit(
        x, y, batch_size=5, validation_data=validation, epochs=1, verbose=0
    ).history
    assert history["val_loss"] == [pytest.approx(loss_of_validation(), rel=1e-4)]


@pytest.mark.slow
def test_validation_may_be_split_off():
    x, y = images()
    model = wrap(make_task())
    model.optimizer.learning_rate = 0.0
    history = model.fit(x, y, validation_split=0.4, verbose=0).history
    assert history["val_loss"] == [pytest.approx(loss_of_validation(), rel=1e-4)]


@pytest.mark.slow
def test_weights_of_examples_and_classes():
    x, y = images()
    weights = np.linspace(0.1, 2.0, len(x)).astype("float32")
    class_weight = {0: 1.0, 1: 3.0, 2: 0.5}
    model, plain = wrap(make_task(), multiplier=0.0), make_task()
    options = {"batch_size": 10, "verbose": 0}
    for kwargs in ({"sample_weight": weights}, {"class_weight": class_weight}):
        expected = plain.fit(x, y, **kwargs, **options).history["loss"]
        found = model.fit(x, y, **kwargs, **options).history["loss"]
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_a_py_dataset_hears_of_epochs():
    heard = []
    plain = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(CLASSES)])
    plain.compile("sgd", loss())
    for model in (wrap(make_task()), plain):
        data = Batches(*images())
        model.fit(data, epochs=2, verbose=0)
        heard.append(data.epochs)
    assert heard[0] == heard[1] >= 2


def test_data_that_cannot_be_preprocessed():
    model = wrap(make_task())
    with pytest.raises(TypeError, match="`x` must be arrays, a list of strings"):
        model.fit(object(), verbose=0)
    with pytest.raises(ValueError, match="must have a batch axis, of the same length"):
        model.fit(np.float32(1.0), np.int64(1), verbose=0)
    with pytest.raises(ValueError, match="must have a batch axis, of the same length"):
        model.evaluate(np.zeros((4, 8, 8, 3)), np.zeros(3), verbose=0)
    with pytest.raises(ValueError, match=r"Received: 0\.95 of 10 examples"):
        model.fit(*images(), validation_split=0.95, verbose=0)
    with pytest.raises(ValueError, match="`validation_split` needs arrays"):
        model.fit(forms(*images())["dataset"]["x"], validation_split=0.5, verbose=0)


def test_perturb_on_batch_returns_what_the_network_receives():
    x, y = images()
    model = wrap(make_task())
    bare = wrap(make_task(preprocessor=False))
    with pytest.warns(UserWarning, match=r"receives after the preprocessing of ViTIma"):
        moved = model.perturb_on_batch(x, y)
    assert moved == pytest.approx(bare.perturb_on_batch(x * SCALE, y), abs=1e-5)
    assert np.abs(moved - x * SCALE).max() == pytest.approx(0.01, rel=1e-3)
    moved = model.perturb_on_batch({"image": x, "label": y})
    assert np.abs(moved - x * SCALE).max() == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(TypeError, match="`x` must be one batch"):
        model.perturb_on_batch(forms(x, y)["dataset"]["x"])


@pytest.mark.filterwarnings("error:`perturb_on_batch` returns")
def test_perturb_on_batch_warns_once():
    x, y = images(4)
    model = wrap(make_task())
    with pytest.warns(UserWarning, match="measure with"):
        model.perturb_on_batch(x, y)
    model.perturb_on_batch(x, y)
    wrap(make_task(preprocessor=False)).perturb_on_batch(x, y)


@pytest.mark.slow
def test_attacks_and_reports_are_of_the_task():
    x, _ = images()
    task = make_task()
    y = task.predict(x, verbose=0).argmax(1)  # All of them right, as they are.
    y[:3] = (y[:3] + 1) % CLASSES
    attack = PGD(0.5, iterations=3, seed=0)
    bare = make_task(preprocessor=False)
    expected = attack(bare, x * SCALE, y)

    def foreign(model, x, y):
        return PGD(0.5, iterations=3, seed=0)(model, x, y)

    def through_predict(model, x, y):
        wrong = model.predict(x, verbose=0).argmax(1) != y
        return np.where(wrong[:, None, None, None], 0, x)

    attacks = [attack, foreign, through_predict]
    of_bare = advreg.evaluate_robustness(
        bare, x * SCALE, y, attacks=[*attacks, Transfer(attack, bare)], verbose=0
    )
    attacks.append(Transfer(attack, make_task()))
    for model in (task, wrap(task)):
        assert attack(model, x, y) == pytest.approx(expected, abs=1e-4)
        report = advreg.evaluate_robustness(model, x, y, attacks=attacks, verbose=0)
        assert report.clean.correct == 7
        found = [one.correct for one in report.results]
        assert found == [one.correct for one in of_bare.results]
        assert found[0] == found[1] < 7
        assert found[3] < 7
        assert found[2] == 7  # It is told the classes that the model gives.
    assert preprocesses(task)


@pytest.mark.slow
def test_a_callback_measures_the_task():
    x, _ = images()
    task = make_task()
    y = task.predict(x, verbose=0).argmax(1)
    model = wrap(task)
    model.optimizer.learning_rate = 0.0
    callback = RobustAccuracy(FGSM(0.0), (x, y))
    history = model.fit(x, y, callbacks=[callback], verbose=0).history
    assert history["val_robust_accuracy"] == [1.0]


def test_data_are_made_readable_for_those_who_read_them_by_keras():
    x, y = ["a", "b", "c"], np.arange(3)
    task = make_task()
    found, labels = readable(task, x, y, 2)
    assert labels is None
    assert [batch[0].numpy().tolist() for batch in found] == [[b"a", b"b"], [b"c"]]
    assert [batch[1].numpy().tolist() for batch in found] == [[0, 1], [2]]
    assert readable(task, found, None, 2) == (found, None)
    assert readable(keras.Sequential(), x, y, 2) == (x, y)


def test_the_preprocessing_can_be_switched_off():
    x, _ = images()
    task = make_task()
    with preprocessing_off(task):
        assert not preprocesses(task)
        assert task.predict(x * SCALE, verbose=0) == pytest.approx(
            ops.convert_to_numpy(task(x * SCALE)), abs=1e-4
        )
    assert preprocesses(task)
    with pytest.raises(KeyError), preprocessing_off(task):
        raise KeyError
    assert preprocesses(task)
    with preprocessing_off(plain := keras.Sequential()):
        assert not hasattr(plain, "preprocess_samples")


# That the task itself, which has a `compile` of its own, is not compiled again.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`compile..` was not called as part of model")
def test_a_saved_wrapper_preprocesses_when_it_is_loaded(tmp_path):
    x, y = images()
    model = wrap(make_task())
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.evaluate(x, y, verbose=0) == pytest.approx(
        model.evaluate(x, y, verbose=0), rel=1e-5
    )
    task = make_task()
    assert task.evaluate(x, y, verbose=0) != loaded.evaluate(x, y, verbose=0)


def test_neural_structured_learning_s_wrapper_preprocesses():
    x, y = images()
    task = make_task()
    config = advreg.make_adv_reg_config(**STEP)
    model = nsl.keras.AdversarialRegularization(task, adv_config=config)
    model.compile("sgd", loss(), metrics=["accuracy"])
    data = {"image": x, "label": y}
    expected = make_task().evaluate(x, y, verbose=0)[0]
    assert model.evaluate(data, verbose=0)[0] == pytest.approx(expected, rel=1e-5)
    moved = model.perturb_on_batch(data)
    assert np.abs(moved - x * SCALE).max() == pytest.approx(0.01, rel=1e-3)


def test_a_pipeline_of_ones_own():
    x = np.random.default_rng(0).random((6, 4)).astype("float32")
    y = np.arange(6) % CLASSES
    base = Doubled()
    base(x)
    base.compile("sgd", loss())
    model = wrap(base)
    expected = base.evaluate(x, y, verbose=0)
    assert model.evaluate(x, y, verbose=0)[0] == pytest.approx(expected, rel=1e-5)
    features, _ = TargetModel(base).unpack((x, y))
    assert np.array(features) == pytest.approx(2 * x)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "film", "bad", "good"]
TEXTS, OPINIONS = ["the film good", "the bad"] * 4, np.array([1, 0] * 4)


def bert():
    keras.utils.set_random_seed(0)
    tokenizer = keras_hub.models.BertTokenizer(vocabulary=WORDS, lowercase=True)
    task = keras_hub.models.BertTextClassifier(
        keras_hub.models.BertBackbone(
            vocabulary_size=len(WORDS),
            num_layers=1,
            num_heads=2,
            hidden_dim=8,
            intermediate_dim=16,
            max_sequence_length=8,
            dropout=0.0,
        ),
        num_classes=2,
        dropout=0.0,
        preprocessor=keras_hub.models.BertTextClassifierPreprocessor(
            tokenizer, sequence_length=8
        ),
    )
    task.compile("sgd", loss())
    return task


@pytest.mark.slow
def test_text_has_nothing_to_perturb_but_embeddings():
    task, x, y = bert(), TEXTS, OPINIONS
    model = wrap(task)
    message = 'Nothing can be perturbed.*set `perturb="embeddings"`'
    for text in (x, np.array(x), tf.constant(x)):
        found = model.evaluate(text, y, verbose=0)[0]
        expected = task.evaluate(text, y, verbose=0)[0]
        assert found == pytest.approx(expected, rel=1e-5)
        with pytest.raises(ValueError, match=message):
            model.fit(text, y, verbose=0)
    with pytest.raises(ValueError, match=message):
        model.perturb_on_batch(x, y)
    with pytest.raises(ValueError, match="Nothing can be perturbed"):
        FGSM(0.1)(task, tf.constant(x), y)


@pytest.mark.slow
@pytest.mark.parametrize("perturb", ["token_embedding", "embeddings"])
def test_text_is_perturbed_at_its_embedding(perturb):
    task = bert()
    config = advreg.AdvRegConfig.fgsm(0.2, perturb=perturb, adv_grad_norm="l2")
    model = advreg.AdversarialRegularization(task, config)
    model.compile("sgd", loss())
    displacements = model.displace_on_batch(TEXTS, OPINIONS)
    path = next(path for path in displacements if path.endswith("token_embedding"))
    (found,) = displacements[path]
    assert found.shape == (8, 8, 8)
    inputs = task.preprocessor(TEXTS)
    padding = np.array(inputs["token_ids"]) == 0
    assert padding.any()
    # A random start would move padding, if nothing kept it.
    drawn = model.displace_on_batch(
        TEXTS, OPINIONS, random_init=True, pgd_epsilon=0.2, perturb="token_embedding"
    )
    for each in (found, *drawn[path]):
        assert (each[padding] == 0).all()
        assert (np.abs(each[~padding]) > 0).any()

    def loss_with(values):
        with advreg.displaced(task, {path: [values.astype("float32")]}):
            return float(loss()(OPINIONS, task(inputs, training=False)))

    # The direction is that of the gradient, by finite differences.
    (alone,) = model.displace_on_batch(TEXTS, OPINIONS, perturb="token_embedding")[path]
    slopes = []
    for value in range(8):
        step = np.zeros_like(alone)
        step[1, 0, value] = 0.002
        slopes.append(loss_with(step) - loss_with(-step))
    np.testing.assert_allclose(
        np.array(slopes) / np.linalg.norm(slopes),
        alone[1, 0] / np.linalg.norm(alone[1, 0]),
        atol=0.02,
    )
    logs = model.fit(TEXTS, OPINIONS, epochs=2, verbose=0).history
    assert logs["scaled_adversarial_loss"][0] > logs["labeled_loss"][0]


@pytest.mark.slow
def test_a_step_of_bert_is_that_of_one_cut_in_two():
    """Cut at its token embedding, with nested tapes."""
    task, reference = bert(), bert()
    reference.set_weights(task.get_weights())
    config = advreg.AdvRegConfig.fgsm(
        0.2, multiplier=0.5, perturb="token_embedding", adv_grad_norm="l2"
    )
    model = advreg.AdversarialRegularization(task, config)
    model.compile(keras.optimizers.SGD(0.1), loss())
    model.fit(TEXTS, OPINIONS, batch_size=8, shuffle=False, verbose=0)

    inputs = reference.preprocessor(TEXTS)
    words = reference.backbone.get_layer("token_embedding")
    rest = keras.Model(
        [words.output, *reference.backbone.inputs], reference.backbone.output
    )
    is_word = tf.cast(inputs["padding_mask"], "float32")[..., None]

    def loss_at(embedded):
        given = [inputs[each.name] for each in reference.backbone.inputs]
        pooled = rest([embedded, *given])["pooled_output"]
        return loss()(OPINIONS, reference.get_layer("logits")(pooled))

    weights = reference.trainable_variables
    with tf.GradientTape() as outer:
        embedded = words(inputs["token_ids"])
        with tf.GradientTape(watch_accessed_variables=False) as inner:
            inner.watch(embedded)
            clean = loss_at(embedded)
        with outer.stop_recording():
            step = inner.gradient(clean, embedded) * is_word
            step *= 0.2 / tf.norm(tf.reshape(step, (8, -1)), axis=1)[:, None, None]
        total = clean + 0.5 * loss_at(embedded + step)
    keras.optimizers.SGD(0.1).apply_gradients(
        zip(outer.gradient(total, weights), weights, strict=True)
    )
    for found, expected in zip(task.weights, reference.weights, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_overrides_that_only_preprocess_are_not_named():
    task = make_task()
    assert overridden_methods(task, NAMES) == []
    assert overridden_methods(Doubled(), NAMES) == []
    wrap(task)  # Without a warning, which would be an error.

    class Own(type(task)):
        def fit(self, *args, **kwargs):
            return super().fit(*args, **kwargs)

    own = Own(task.backbone, CLASSES)
    assert overridden_methods(own, NAMES) == ["fit"]
