"""`perturb="embeddings"` and layers by name, on every backend.

The oracle is a model that is cut in two by hand: a lookup in the table of embeddings,
and a second model from there. Its gradients are taken by the backend alone.
"""

import keras
import numpy as np
import pytest
from helpers.backends import array, gradients_of, only_tensorflow, tensor
from helpers.slow import slow, slow_but, slow_on_jax
from keras import layers, ops

import advreg
from advreg import AdversarialRegularization, AdvRegConfig, attacks, backend

pytestmark = pytest.mark.every_backend

WORDS, WIDTH, LENGTH, CLASSES = 12, 4, 6, 3
EPSILON, MULTIPLIER, RATE = 0.3, 0.7, 0.5
RNG = np.random.default_rng(0)
IDS = RNG.integers(1, WORDS, (5, LENGTH)).astype("int32")
IDS[1:, -2:] = 0
OTHER_IDS = RNG.integers(1, WORDS, (5, LENGTH)).astype("int32")
COLUMNS = RNG.normal(size=(5, 3)).astype("float32")
CODES = RNG.integers(0, WORDS, (5, 1)).astype("int32")
Y = np.array([0, 2, 1, 1, 0])


def embedding(**kwargs):
    return layers.Embedding(WORDS, WIDTH, name="words", **kwargs)


@keras.saving.register_keras_serializable(package="tests")
class Positions(layers.Layer):
    """Adds a table of positions, which has no axis of examples."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.table = layers.Embedding(LENGTH, WIDTH, name="places")

    def build(self, _):
        self.table.build(None)

    def call(self, x):
        return x + self.table(ops.arange(ops.shape(x)[1]))


class Parts:
    """A model, and the same in two parts.

    Args:
        model: The model.
        table: Its `Embedding`.
        back: The model from the outputs of the embedding, in a list, and from the
            other inputs on.
        lookups: For each call of the embedding, the ids.
        others: The other inputs of `back`.
        x: The inputs of `model`.
    """

    def __init__(self, model, table, back, lookups, x, others=()):
        self.model, self.table, self.back = model, table, back
        self.lookups, self.x, self.others = lookups, x, others


def sequence(make_rest, mask_zero):
    ids, given = keras.Input((LENGTH,), dtype="int32"), keras.Input((LENGTH, WIDTH))
    mask = keras.Input((LENGTH,), dtype="bool")
    words, last = embedding(mask_zero=mask_zero), layers.Dense(CLASSES)
    rest = make_rest()
    model = keras.Model(ids, last(rest(words(ids), None)))
    back = keras.Model([given, mask], last(rest(given, mask if mask_zero else None)))
    return Parts(model, words, back, [IDS], IDS, [IDS > 0])


def pooled():
    pool = layers.GlobalAveragePooling1D()
    return lambda x, mask: pool(x) if mask is None else pool(x, mask=mask)


def recurrent():
    lstm = layers.LSTM(5)
    return lambda x, mask: lstm(x) if mask is None else lstm(x, mask=mask)


def convolutional():
    convolution, pool = layers.Conv1D(5, 3, activation="tanh"), layers.GlobalMaxPool1D()
    return lambda x, _: pool(convolution(x))


def attentive():
    places, attention = Positions(), layers.MultiHeadAttention(2, 3)
    normal, pool = layers.LayerNormalization(), layers.GlobalAveragePooling1D()

    def rest(x, _):
        x = places(x)
        return pool(normal(x + attention(x, x)))

    return rest


def siamese():
    inputs = [keras.Input((LENGTH,), dtype="int32") for _ in range(2)]
    given = [keras.Input((LENGTH, WIDTH)) for _ in range(2)]
    words, last = embedding(), layers.Dense(CLASSES)
    pool, dense = layers.GlobalMaxPool1D(), layers.Dense(4, "tanh")

    def rest(embedded):
        return last(layers.Concatenate()([dense(pool(each)) for each in embedded]))

    model = keras.Model(inputs, rest([words(each) for each in inputs]))
    ids = [IDS, OTHER_IDS]
    return Parts(model, words, keras.Model(given, rest(given)), ids, ids)


def tabular():
    columns, codes = keras.Input((3,)), keras.Input((1,), dtype="int32")
    given = keras.Input((1, WIDTH))
    words, hidden, last = embedding(), layers.Dense(5, "tanh"), layers.Dense(CLASSES)

    def rest(columns, embedded):
        return last(hidden(layers.Concatenate()([columns, layers.Flatten()(embedded)])))

    model = keras.Model([columns, codes], rest(columns, words(codes)))
    back = keras.Model([given, columns], rest(columns, given))
    return Parts(model, words, back, [CODES], [COLUMNS, CODES], [COLUMNS])


KINDS = {
    "pooling": lambda: sequence(pooled, mask_zero=True),
    "LSTM with mask": lambda: sequence(recurrent, mask_zero=True),
    "TextCNN": lambda: sequence(convolutional, mask_zero=False),
    "attention": lambda: sequence(attentive, mask_zero=False),
    "siamese": siamese,
    "tabular": tabular,
}

CHOSEN = slow_but(KINDS, "LSTM with mask", "attention", "tabular")


def make(kind):
    keras.utils.set_random_seed(1)
    parts = KINDS[kind]()
    parts.model(parts.x if isinstance(parts.x, list) else tensor(parts.x))
    return parts


def loss_of(logits):
    return ops.mean(
        keras.losses.sparse_categorical_crossentropy(Y, logits, from_logits=True)
    )


class Oracle:
    """One step of training with FGSM in L2, by hand."""

    def __init__(self, parts, moves_columns=False, relative=False):
        self.parts, self.relative = parts, relative
        self.weights = parts.model.trainable_variables
        self.moves_columns = moves_columns

    def embedded(self, values):
        table = values[self._place(self.parts.table.trainable_variables[0])]
        return [ops.take(table, ids, axis=0) for ids in self.parts.lookups]

    def _place(self, variable):
        return next(i for i, each in enumerate(self.weights) if each is variable)

    def loss(self, values, embedded, others):
        back = self.parts.back
        of_back = [values[self._place(each)] for each in back.trainable_variables]
        frozen = [tensor(v.value) for v in back.non_trainable_variables]
        inputs = [*embedded, *others]
        inputs = inputs[0] if len(inputs) == 1 else inputs
        return loss_of(back.stateless_call(of_back, frozen, inputs)[0])

    def displacements(self):
        """Of the outputs of the embedding, and of the columns."""
        values = [tensor(array(weight.value)) for weight in self.weights]
        start = [tensor(array(each)) for each in self.embedded(values)]
        others = [tensor(each) for each in self.parts.others]
        count = len(start)
        moving = [*start, *others] if self.moves_columns else start
        found = gradients_of(
            lambda tensors: self.loss(
                values,
                tensors[:count],
                tensors[count:] if self.moves_columns else others,
            ),
            moving,
        )
        found = [array(each).astype("float64") for each in found]
        scales = [1.0] * len(found)
        if self.relative:
            mask = np.ones_like(IDS) if len(others) == 0 else IDS > 0
            size = np.sqrt(
                (array(start[0]) ** 2 * mask[..., None]).sum((1, 2))
                / (mask.sum(1) * WIDTH)
            )
            scales = [size[:, None, None]]
        found = [each * scale for each, scale in zip(found, scales, strict=True)]
        squares = sum((each**2).reshape(len(Y), -1).sum(1) for each in found)
        made = []
        for each, scale in zip(found, scales, strict=True):
            length = np.sqrt(squares).reshape(-1, *[1] * (each.ndim - 1))
            made.append((EPSILON * each / length * scale).astype("float32"))
        return list(map(tensor, made[:count])), list(map(tensor, made[count:]))

    def step(self):
        of_words, of_columns = self.displacements()
        others = [tensor(each) for each in self.parts.others]
        columns = [o + d for o, d in zip(others, of_columns, strict=False)] or others

        def total(values):
            clean = self.embedded(values)
            moved = [e + d for e, d in zip(clean, of_words, strict=True)]
            return self.loss(values, clean, others) + MULTIPLIER * self.loss(
                values, moved, columns
            )

        values = [tensor(array(weight.value)) for weight in self.weights]
        gradients = gradients_of(total, values)
        return [
            array(value) - RATE * array(gradient)
            for value, gradient in zip(values, gradients, strict=True)
        ]


def config(**fields):
    fields = {"perturb": "embeddings", "adv_grad_norm": "l2", **fields}
    return AdvRegConfig.fgsm(EPSILON, multiplier=MULTIPLIER, **fields)


def wrapped(parts, adv_config, **kwargs):
    model = AdversarialRegularization(parts.model, adv_config)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(RATE), loss, **kwargs)
    return model


@pytest.mark.parametrize(
    "how", [*slow({"run_eagerly": True}, {"jit_compile": True}), {"jit_compile": False}]
)
@pytest.mark.parametrize("kind", CHOSEN)
def test_a_step_is_that_of_a_model_cut_in_two(kind, how):
    if keras.backend.backend() == "torch" and how.get("jit_compile"):
        pytest.skip("PyTorch runs everything at once")
    parts = make(kind)
    both = kind == "tabular"
    expected = Oracle(parts, moves_columns=both).step()
    perturb = ("inputs", "embeddings") if both else "embeddings"
    model = wrapped(parts, config(perturb=perturb), **how)
    model.fit(parts.x, Y, batch_size=5, verbose=0)
    for weight, value in zip(parts.model.trainable_variables, expected, strict=True):
        np.testing.assert_allclose(array(weight.value), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["pooling", "TextCNN"])
def test_a_radius_in_units_of_the_embedding(kind):
    parts = make(kind)
    parts.others = [IDS > 0] if kind == "pooling" else [np.ones_like(IDS, bool)]
    oracle = Oracle(parts, relative=True)
    if kind == "TextCNN":  # Nothing is padding there.
        values = array(parts.table.trainable_variables[0].value)[IDS]
        size = np.sqrt((values**2).mean((1, 2)))
        found = wrapped(parts, config(relative=True)).displace_on_batch(IDS, Y)
        lengths = np.linalg.norm(found["words"][0].reshape(5, -1), axis=1)
        np.testing.assert_allclose(lengths, EPSILON * size, rtol=1e-5)
        return
    expected, _ = oracle.displacements()
    found = wrapped(parts, config(relative=True)).displace_on_batch(IDS, Y)
    np.testing.assert_allclose(
        found["words"][0], array(expected[0]), rtol=1e-4, atol=1e-6
    )
    fitted = oracle.step()
    wrapped(parts, config(relative=True)).fit(IDS, Y, batch_size=5, verbose=0)
    for weight, value in zip(parts.model.trainable_variables, fitted, strict=True):
        np.testing.assert_allclose(array(weight.value), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", CHOSEN)
def test_what_is_displaced_is_what_training_adds(kind):
    parts = make(kind)
    expected, _ = Oracle(parts).displacements()
    model = wrapped(parts, config())
    found = model.displace_on_batch(parts.x, Y)
    assert list(found) == ["words"]
    displacements = found["words"]
    if kind == "siamese":  # Keras may call the layer for the second input first.
        displacements = sorted(
            displacements, key=lambda d: np.abs(d - array(expected[0])).sum()
        )
    for displacement, value in zip(displacements, expected, strict=True):
        np.testing.assert_allclose(displacement, array(value), rtol=1e-4, atol=1e-6)
    x = [tensor(each) for each in parts.x] if isinstance(parts.x, list) else parts.x
    clean = array(loss_of(parts.model(x)))
    for called in (model, parts.model):
        with advreg.displaced(model, found):
            logits = called(x, training=False)
            again = called(x, training=False)
        np.testing.assert_array_equal(array(logits), array(again))
        assert array(loss_of(logits)) > clean + 0.01
    assert array(loss_of(parts.model(x))) == clean  # Nothing stays on the model.


def test_padding_stands_still():
    model = wrapped(make("LSTM with mask"), config())
    start = AdvRegConfig.pgd(
        EPSILON, 3, perturb="embeddings", adv_grad_norm="infinity"
    ).adv_neighbor_config
    for overrides in ({}, {"pgd_iterations": 3, "random_init": start.random_init}):
        (found,) = model.displace_on_batch(IDS, Y, **overrides)["words"]
        assert (found[IDS == 0] == 0).all()
        assert (np.abs(found[IDS > 0]) > 0).any()


def test_examples_of_weight_zero_stand_still():
    model = wrapped(make("pooling"), config())
    weights = np.array([1.0, 0.0, 1.0, 0.0, 2.0])
    (found,) = model.displace_on_batch(IDS, Y, weights)["words"]
    moved = np.abs(found).max((1, 2)) > 0
    np.testing.assert_array_equal(moved, weights > 0)


PRESETS = {
    "fast": lambda: AdvRegConfig.fast(0.3, perturb="words", adv_grad_norm="l1"),
    "pgd": lambda: AdvRegConfig.pgd(0.3, 2, perturb="words", clean_weight=0.0),
    "trades": lambda: AdvRegConfig.trades(0.3, iterations=2, perturb="words"),
    "mart": lambda: AdvRegConfig.mart(0.3, iterations=2, perturb="words"),
    "logit pairing": lambda: AdvRegConfig.logit_pairing(
        0.3, iterations=2, perturb="embeddings"
    ),
    "virtual": lambda: AdvRegConfig.virtual_adversarial(
        keras.optimizers.schedules.PolynomialDecay(0.0, 10, 0.3), perturb="embeddings"
    ),
    "weight perturbation": lambda: AdvRegConfig.fgsm(
        0.3, perturb="embeddings", weight_perturbation=0.01
    ),
    "weights, together": lambda: AdvRegConfig.trades(
        0.3, iterations=2, perturb="embeddings", weight_perturbation=0.01
    ),
}


@pytest.mark.parametrize("name", slow_but(PRESETS, "virtual", "trades"))
def test_every_preset_trains(name):
    parts = make("pooling")
    before = array(parts.table.trainable_variables[0].value)
    model = wrapped(parts, PRESETS[name]())
    logs = model.fit(IDS, Y, batch_size=3, epochs=3, verbose=0).history
    assert np.isfinite(logs["loss"]).all()
    assert max(np.abs(logs["scaled_adversarial_loss"])) > 0
    assert (array(parts.table.trainable_variables[0].value) != before).any()


def test_virtual_adversarial_training_uses_texts_without_labels():
    model = wrapped(
        make("pooling"), AdvRegConfig.virtual_adversarial(0.3, perturb="words")
    )
    unlabelled = np.zeros(5)
    logs = model.train_on_batch(IDS, Y, sample_weight=unlabelled, return_dict=True)
    assert float(logs["labeled_loss"]) == 0
    assert float(logs["scaled_adversarial_loss"]) > 0


def test_half_precision_displaces_as_much():
    parts = make("pooling")
    (expected,) = wrapped(parts, config()).displace_on_batch(IDS, Y)["words"]
    weights = parts.model.get_weights()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        halved = make("pooling")
    finally:
        keras.config.set_dtype_policy("float32")
    halved.model.set_weights(weights)
    (found,) = wrapped(halved, config()).displace_on_batch(IDS, Y)["words"]
    np.testing.assert_allclose(found, expected, atol=2e-3)
    model = wrapped(halved, config())
    logs = model.fit(IDS, Y, batch_size=5, epochs=2, verbose=0).history
    assert logs["scaled_adversarial_loss"][0] > MULTIPLIER * logs["labeled_loss"][0]


@slow_on_jax
def test_a_frozen_table_is_displaced_too():
    parts = make("pooling")
    (expected,) = wrapped(parts, config()).displace_on_batch(IDS, Y)["words"]
    before = array(parts.table.trainable_variables[0].value)
    parts.table.trainable = False
    model = wrapped(parts, config())
    (found,) = model.displace_on_batch(IDS, Y)["words"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    logs = model.fit(IDS, Y, batch_size=5, verbose=0).history
    assert logs["scaled_adversarial_loss"][0] > MULTIPLIER * logs["labeled_loss"][0]
    np.testing.assert_array_equal(
        array(parts.table.non_trainable_variables[0].value), before
    )


class Twice(keras.Model):
    """A subclassed model in a model, with layers of its own names."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.words = embedding()
        self.dense = layers.Dense(4, "tanh", name="hidden")
        self.last = layers.Dense(CLASSES, name="last")

    def call(self, ids):
        x = self.words(ids)
        for _ in range(2):
            x = self.dense(x)
        return self.last(ops.mean(x, axis=1))


def nested():
    keras.utils.set_random_seed(2)
    ids = keras.Input((LENGTH,), dtype="int32")
    model = keras.Model(ids, Twice(name="inner")(ids))
    return Parts(model, None, None, None, IDS)


@pytest.mark.parametrize("name", ["hidden", "inner/hidden"])
def test_each_call_of_a_layer_has_a_displacement(name):
    model = wrapped(nested(), config(perturb=name))
    found = model.displace_on_batch(IDS, Y)
    assert list(found) == ["inner/hidden"]
    assert [each.shape for each in found["inner/hidden"]] == [(5, LENGTH, 4)] * 2
    length = sum((each**2).sum((1, 2)) for each in found["inner/hidden"])
    np.testing.assert_allclose(np.sqrt(length), EPSILON, rtol=1e-5)
    model.fit(IDS, Y, verbose=0)
    with advreg.displaced(model, {name: found["inner/hidden"]}):
        model(IDS)


def test_several_layers_share_one_ball():
    model = wrapped(nested(), config(perturb=["words", "inner/last"]))
    found = model.displace_on_batch(IDS, Y)
    parts = [found["inner/words"][0].reshape(5, -1), found["inner/last"][0]]
    lengths = np.linalg.norm(np.concatenate(parts, axis=1), axis=1)
    np.testing.assert_allclose(lengths, EPSILON, rtol=1e-5)


@pytest.mark.parametrize(
    ("perturb", "message"),
    [
        ("word", "'word'. The layers are: .*'inner', 'inner/words', 'inner/hidden'"),
        (["words", "emb"], "must name layers of the model. Received: 'emb'"),
    ],
)
def test_unknown_layers(perturb, message):
    with pytest.raises(ValueError, match=message):
        wrapped(nested(), config(perturb=perturb)).fit(IDS, Y, verbose=0)


def test_names_of_several_layers():
    keras.utils.set_random_seed(0)
    ids = keras.Input((LENGTH,), dtype="int32")
    added = layers.Add()([Twice(name="one")(ids), Twice(name="two")(ids)])
    parts = Parts(keras.Model(ids, added), None, None, None, IDS)
    with pytest.raises(ValueError, match=r"several paths: .'one/hidden', 'two/hidden'"):
        wrapped(parts, config(perturb="hidden")).fit(IDS, Y, verbose=0)
    found = wrapped(parts, config(perturb="two/hidden")).displace_on_batch(IDS, Y)
    assert list(found) == ["two/hidden"]
    found = wrapped(parts, config()).displace_on_batch(IDS, Y)
    assert list(found) == ["one/words", "two/words"]


def test_the_cell_of_an_rnn():
    with pytest.raises(ValueError, match=r"called in a loop. Name the RNN itself: 'ls"):
        wrapped(make("LSTM with mask"), config(perturb="lstm_cell")).fit(
            IDS, Y, verbose=0
        )


def test_a_table_of_positions_is_left_out_or_refused():
    parts = make("attention")
    assert list(wrapped(parts, config()).displace_on_batch(IDS, Y)) == ["words"]
    model = wrapped(parts, config(perturb="places"))
    with pytest.raises(ValueError, match=r"for each example. Received: .*/places'.*6"):
        model.displace_on_batch(IDS, Y)
    with pytest.raises(ValueError, match="must name layers that return a row for each"):
        model.fit(IDS, Y, batch_size=5, verbose=0)


class Silent(keras.Model):
    def __init__(self):
        super().__init__()
        self.words, self.last = embedding(), layers.Dense(CLASSES)
        self.never = layers.Dense(2, name="never")
        self.never.build((None, WIDTH))

    def call(self, ids):
        return self.last(ops.mean(self.words(ids), axis=1))


def test_a_layer_that_is_not_called():
    model = Silent()
    model(IDS)
    parts = Parts(model, None, None, None, IDS)
    with pytest.raises(ValueError, match=r"without such an output: .'never'"):
        wrapped(parts, config(perturb="never")).fit(IDS, Y, verbose=0)


def test_a_model_without_embeddings():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), layers.Dense(CLASSES)])
    parts = Parts(model, None, None, None, COLUMNS)
    with pytest.raises(ValueError, match=r"needs a model with a `keras.layers.Embed"):
        wrapped(parts, config()).fit(COLUMNS, Y, verbose=0)


def test_where_nothing_moves_the_error_names_embeddings():
    model = wrapped(make("pooling"), AdvRegConfig.fgsm(0.1))
    for run in (model.train_on_batch, model.perturb_on_batch):
        with pytest.raises(ValueError, match='set `perturb="embeddings"` in the conf'):
            run(IDS, Y)


def test_methods_say_which_of_them_is_meant():
    model = wrapped(make("tabular"), config())
    x = [COLUMNS, CODES]
    with pytest.raises(ValueError, match="Call `displace_on_batch` to get what is add"):
        model.perturb_on_batch(x, Y)
    moved = model.perturb_on_batch(x, Y, perturb="inputs")
    assert np.abs(moved[0] - COLUMNS).max() > 0.1
    with pytest.raises(ValueError, match=r"Pass `perturb='embeddings'`. Received"):
        model.displace_on_batch(x, Y, perturb="inputs")
    with pytest.raises(ValueError, match=r"Pass `perturb='words'`. Received"):
        model.displace_on_batch(x, Y, perturb=("inputs", "words"))
    with pytest.raises(ValueError, match='must be "inputs" in a custom loop'):
        advreg.gen_adv_neighbor(
            tensor(COLUMNS), lambda x: ops.sum(x), config().adv_neighbor_config
        )


def test_displaced_is_for_calls_of_the_model():
    parts = make("pooling")
    model = wrapped(parts, config())
    found = model.displace_on_batch(IDS, Y)

    def enter(displacements, run=lambda: model(IDS)):
        with advreg.displaced(model, displacements):
            run()

    with pytest.raises(ValueError, match=r"the model must be called itself, `model\(x"):
        enter(found, lambda: None)
    if keras.backend.backend() != "torch":  # Nothing is compiled there.
        with pytest.raises(ValueError, match="or one while a function is compiled"):
            enter(found, lambda: model.predict(IDS, verbose=0))
    with pytest.raises(ValueError, match=r"^A displacement must have the shape of the"):
        enter({"words": [found["words"][0][:3]]})
    with pytest.raises(ValueError, match=r"Received too many, by layer: {'words': 1}"):
        enter({"words": [*found["words"], *found["words"]]})
    with pytest.raises(ValueError, match="more outputs than there are displacements"):
        enter({"words": []})
    with pytest.raises(TypeError, match="must be a dictionary from names of layers to"):
        enter(found["words"])
    with pytest.raises(ValueError, match="must have one key for each layer"):
        enter({"words": found["words"], "embeddings": found["words"]})
    model.predict(IDS, verbose=0)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"perturb": ""}, ValueError, "at least one name"),
        ({"perturb": []}, ValueError, "at least one name"),
        ({"perturb": ["a", "a"]}, ValueError, "each once"),
        ({"perturb": 3}, TypeError, "a name, or a list or tuple of names"),
        ({"perturb": "inputs", "relative": True}, ValueError, "name some in `perturb`"),
        ({"relative": 1}, TypeError, "`relative` must be a bool"),
        ({"clip_value_min": 0.0}, ValueError, "`clip_value_min` concerns inputs"),
        ({"feature_mask": np.ones(3)}, ValueError, "`feature_mask` concerns inputs"),
    ],
)
def test_fields_are_checked(fields, error, message):
    with pytest.raises(error, match=message):
        config(**fields)


def test_it_is_saved_and_loaded(tmp_path):
    model = wrapped(make("pooling"), config(perturb=["words"], relative=True))
    model.fit(IDS, Y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.adv_config == model.adv_config
    assert loaded.adv_config.adv_neighbor_config.perturb == ("words",)
    one, other = (m.displace_on_batch(IDS, Y) for m in (model, loaded))
    np.testing.assert_array_equal(one["words"], other["words"])


def test_attacks_and_reports_know_no_embeddings():
    parts = make("tabular")
    model = wrapped(parts, config(perturb=("inputs", "embeddings")))
    model.fit(parts.x, Y, verbose=0)
    attack = attacks.FGSM(0.1)
    moved = attack(model, parts.x, Y)
    sizes = np.abs(array(moved[0]) - COLUMNS).max(1)
    assert ((sizes == 0) | np.isclose(sizes, 0.1)).all()  # Some are fooled already.
    assert sizes.any()
    np.testing.assert_array_equal(moved[1], CODES)


@only_tensorflow
@pytest.mark.parametrize("clean_weight", [0.0, 1.0])
def test_the_gradient_of_the_table_is_sparse(monkeypatch, clean_weight):
    model = wrapped(
        make("pooling"), config(clean_weight=clean_weight), run_eagerly=True
    )
    kinds = []
    apply = backend.apply_gradients

    def noting(optimizer, gradients, weights):
        kinds.extend(type(gradient).__name__ for gradient in gradients)
        apply(optimizer, gradients, weights)

    monkeypatch.setattr(backend, "apply_gradients", noting)
    model.train_on_batch(IDS, Y)
    assert kinds[0] == "IndexedSlices"
    assert kinds.count("IndexedSlices") == 1


@slow_on_jax
def test_an_embedding_with_lora():
    parts = make("pooling")
    (expected,) = wrapped(parts, config()).displace_on_batch(IDS, Y)["words"]
    parts.table.enable_lora(2)
    model = wrapped(parts, config())
    (found,) = model.displace_on_batch(IDS, Y)["words"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    model.fit(IDS, Y, batch_size=5, verbose=0)


def test_a_quantised_embedding():
    parts = make("TextCNN")
    (expected,) = wrapped(parts, config()).displace_on_batch(IDS, Y)["words"]
    parts.table.quantize("int8")
    (found,) = wrapped(parts, config()).displace_on_batch(IDS, Y)["words"]
    lengths = np.linalg.norm(found.reshape(5, -1), axis=1)
    np.testing.assert_allclose(lengths, EPSILON, rtol=1e-5)
    cosines = (found * expected).sum((1, 2)) / EPSILON**2
    assert np.median(cosines) > 0.99  # A maximum may be taken at another place.


@slow_on_jax
def test_a_layer_within_time_distributed():
    keras.utils.set_random_seed(0)
    columns = keras.Input((4, 3))
    x = layers.TimeDistributed(layers.Dense(5, "tanh", name="inner"))(columns)
    model = keras.Model(columns, layers.Dense(CLASSES)(layers.Flatten()(x)))
    parts = Parts(model, None, None, None, RNG.normal(size=(5, 4, 3)).astype("float32"))
    model = wrapped(parts, config(perturb="time_distributed"))
    (found,) = model.displace_on_batch(parts.x, Y)["time_distributed"]
    assert found.shape == (5, 4, 5)
    np.testing.assert_allclose(
        np.linalg.norm(found.reshape(5, -1), axis=1), EPSILON, rtol=1e-5
    )
    model.fit(parts.x, Y, batch_size=5, verbose=0)
