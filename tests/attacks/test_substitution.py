"""`TokenSubstitution` and `RandomSubstitution`: the oracle is exhaustive search."""

import keras
import numpy as np
import pytest
from helpers.backends import array, tensor
from helpers.slow import slow_on_jax
from keras import layers, ops

import advreg
from advreg import callbacks
from advreg.attacks import PGD, RandomSubstitution, TokenSubstitution

pytestmark = pytest.mark.every_backend

WORDS, WIDTH, LENGTH, CLASSES, COUNT = 30, 6, 8, 3, 100
RNG = np.random.default_rng(0)
IDS = RNG.integers(1, WORDS, (COUNT, LENGTH)).astype("int32")
IDS[::2, -3:] = 0
NEIGHBOURS = 5


def network(pool=layers.GlobalAveragePooling1D, mask_zero=False):
    ids = keras.Input((LENGTH,), dtype="int32")
    words = layers.Embedding(WORDS, WIDTH, mask_zero=mask_zero, name="words")
    x = pool()(layers.Dense(12, "tanh")(words(ids)))
    model = keras.Model(ids, layers.Dense(CLASSES)(x))
    draws = np.random.default_rng(1)
    model.set_weights([draws.normal(0, 0.7, w.shape) for w in model.get_weights()])
    # So that about half of the examples are near another class.
    kernel, _ = model.layers[-1].get_weights()
    logits = array(model(tensor(IDS), training=False))
    model.layers[-1].set_weights([kernel, -0.6 * logits.mean(0)])
    return model


@pytest.fixture(scope="module")
def model():
    return network()


def predicted(model, ids):
    return array(model(tensor(ids), training=False)).argmax(1)


def nearest(model):
    """The neighbours of each word by cosine, without padding, by sorting all."""
    (table,) = model.get_layer("words").get_weights()
    rows = table / np.linalg.norm(table, axis=1, keepdims=True)
    near = rows @ rows.T
    np.fill_diagonal(near, -np.inf)
    near[:, 0] = -np.inf
    return np.argsort(-near, axis=1)[:, :NEIGHBOURS]


def exhaustive(model, ids, classes):
    """Which examples some single replacement fools."""
    near, fooled = nearest(model), np.zeros(len(ids), bool)
    for place in range(LENGTH):
        for turn in range(NEIGHBOURS):
            moved = ids.copy()
            moved[:, place] = near[ids[:, place], turn]
            moved = np.where(ids == 0, ids, moved)
            fooled |= predicted(model, moved) != classes
    return fooled


def left(report):
    return [round(line.accuracy * line.examples) for line in report.results]


def test_all_changes_of_a_token_are_those_of_exhaustive_search(model):
    classes = predicted(model, IDS)
    expected = exhaustive(model, IDS, classes)
    assert 0.2 < expected.mean() < 0.9
    attack = TokenSubstitution(1, NEIGHBOURS, verified=LENGTH * NEIGHBOURS)
    moved = attack(model, IDS, classes)
    np.testing.assert_array_equal(predicted(model, moved) != classes, expected)


def test_the_gradient_finds_them_with_a_tenth_of_the_calls(model):
    classes = predicted(model, IDS)
    expected = exhaustive(model, IDS, classes).sum()
    attack = TokenSubstitution(1, NEIGHBOURS, verified=LENGTH * NEIGHBOURS // 10)
    found = (predicted(model, attack(model, IDS, classes)) != classes).sum()
    noise = RandomSubstitution(1, NEIGHBOURS, tries=4, seed=0)
    by_chance = (predicted(model, noise(model, IDS, classes)) != classes).sum()
    assert found >= 0.85 * expected
    assert found > by_chance + 10


def test_what_fools_one_text_is_tried_on_others():
    """Token 9 does harm that no gradient shows, because a ReLU hides it."""
    ids = keras.Input((6,), dtype="int32")
    x = layers.Embedding(12, 2, name="words")(ids)
    x = layers.Lambda(lambda x: ops.relu(x[..., :1]) * 40 - x[..., 1:])(x)
    x = layers.GlobalMaxPooling1D()(x)
    model = keras.Model(ids, layers.Dense(2)(x))
    rows = np.tile([[-1.0, 0.0]], (12, 1))
    rows[9, 0] = 1.0
    model.get_layer("words").set_weights([rows])
    model.layers[-1].set_weights([np.array([[-1.0, 1.0]]), np.array([9.0, -9.0])])
    x = np.random.default_rng(0).integers(1, 7, (64, 6)).astype("int32")
    x[:, -1] = 7
    x[::16, :-1] = 0  # Of these, nothing but the 7 can be replaced.
    assert not predicted(model, x).any()
    candidates = {7: [9], **dict.fromkeys(range(1, 7), (1, 2, 3, 4, 5, 6))}
    attack = TokenSubstitution(1, candidates, verified=5)
    for batch_size in (64, 8):
        moved = attack(model, x, np.zeros(64, int), batch_size=batch_size)
        assert predicted(model, moved).all()
    alone = attack(model, x[1:2], np.zeros(1, int))
    assert not predicted(model, alone).any()


@pytest.mark.parametrize("attack", [TokenSubstitution, RandomSubstitution])
@pytest.mark.parametrize("changes", [1, 3])
def test_what_may_change(model, attack, changes):
    classes = predicted(model, IDS)
    attack = attack(
        changes, NEIGHBOURS, fixed_tokens=(0, 7), can_change=lambda ids: ids % 2 == 1
    )
    moved = attack(model, IDS, classes)
    assert moved.dtype == IDS.dtype
    differs = moved != IDS
    assert differs.sum(1).max() == changes
    assert (IDS[differs] % 2 == 1).all()
    assert not np.isin(IDS[differs], (0, 7)).any()
    assert not np.isin(moved[differs], (0, 7)).any()


def test_a_fixed_batch_size(model):
    inputs = keras.Input((LENGTH,), batch_size=8, dtype="int32")
    fixed = keras.Model(inputs, model(inputs))
    classes = predicted(model, IDS)
    attack = TokenSubstitution(2, NEIGHBOURS)
    moved = attack(fixed, IDS[:20], classes[:20], batch_size=8)
    np.testing.assert_array_equal(
        moved, attack(model, IDS[:20], classes[:20], batch_size=8)
    )


def test_candidates_are_the_nearest(model):
    classes = predicted(model, IDS)
    moved = TokenSubstitution(2, NEIGHBOURS)(model, IDS, classes)
    differs = moved != IDS
    near = nearest(model)
    for old, new in zip(IDS[differs], moved[differs], strict=True):
        assert new in near[old]


TABLE = np.full((WORDS, 2), -1)
TABLE[1:15, 0] = np.arange(1, 15) + 10


@pytest.mark.parametrize(
    "candidates",
    [
        {word: [word + 10] for word in range(1, 15)},
        lambda word: [word + 10] if 0 < word < 15 else [],
        TABLE,
    ],
    ids=["dictionary", "function", "array"],
)
def test_candidates_of_one_s_own(model, candidates):
    classes = predicted(model, IDS)
    moved = TokenSubstitution(2, candidates)(model, IDS, classes)
    differs = moved != IDS
    assert differs.any()
    assert (IDS[differs] < 15).all()
    np.testing.assert_array_equal(moved[differs], IDS[differs] + 10)


def test_masked_padding_stays():
    model = network(mask_zero=True)
    classes = predicted(model, IDS)
    attack = TokenSubstitution(3, fixed_tokens=())
    moved = attack(model, IDS, classes)
    np.testing.assert_array_equal(moved == 0, IDS == 0)


def test_more_changes_and_restarts_never_fool_fewer(model):
    classes = predicted(model, IDS)
    report = advreg.evaluate_robustness(
        model,
        IDS,
        classes,
        attacks=[
            TokenSubstitution(1, NEIGHBOURS, verified=3),
            TokenSubstitution(2, NEIGHBOURS, verified=3),
            TokenSubstitution(2, NEIGHBOURS, verified=3, restarts=3, seed=0),
        ],
        batch_size=16,
        verbose=0,
    )
    one, two, restarted = left(report)
    assert COUNT > one > two >= restarted
    assert round(report.overall.accuracy * COUNT) <= restarted


def test_a_report_says_what_was_done(model):
    classes = predicted(model, IDS)
    report = advreg.evaluate_robustness(
        model,
        IDS,
        classes,
        attacks=[RandomSubstitution(2, tries=2), TokenSubstitution(2)],
        verbose=0,
    )
    text = " ".join(str(report).split())
    assert "In an example up to 2 tokens may be replaced." in text
    assert "TokenSubstitution(2)" in text
    assert "Without the model's own gradient: RandomSubstitution(2)." in text
    assert not report.warnings
    assert "Perturbed: nothing" not in text
    (feature,) = report.features
    assert feature.perturbed
    line = report.results[1]
    assert line.epsilon is line.norm is line.median_l2 is None
    assert report.overall.accuracy == min(r.accuracy for r in report.results)
    moved = TokenSubstitution(2)(model, IDS, classes)
    assert left(report)[1] == (predicted(model, moved) == classes).sum()


def test_seeds_repeat(model):
    classes = predicted(model, IDS)
    for attack in (
        RandomSubstitution(2, seed=5),
        TokenSubstitution(2, verified=2, restarts=2, seed=5),
    ):
        one, two = (attack(model, IDS, classes) for _ in range(2))
        np.testing.assert_array_equal(one, two)


def two_inputs():
    keras.utils.set_random_seed(0)
    columns = keras.Input((2,), name="size")
    codes = keras.Input((), dtype="int32", name="kind")
    tags = keras.Input((3,), dtype="int32", name="tags")
    embedded = layers.Embedding(9, 4, name="words")(codes)
    tagged = layers.Flatten()(layers.Embedding(9, 4)(tags))
    x = layers.Concatenate()([columns, embedded, tagged])
    x = layers.Dense(3)(layers.Dense(8, "tanh")(x))
    return keras.Model({"size": columns, "kind": codes, "tags": tags}, x)


@slow_on_jax
def test_several_inputs():
    model = two_inputs()
    x = {
        "size": RNG.normal(size=(40, 2)).astype("float32"),
        "kind": RNG.integers(0, 9, 40),
        "tags": RNG.integers(0, 9, (40, 3)),
    }
    classes = array(model({k: tensor(v) for k, v in x.items()})).argmax(1)
    with pytest.raises(ValueError, match=r"`feature` is needed .*'kind', 'tags'"):
        TokenSubstitution(1)(model, x, classes)
    with pytest.raises(ValueError, match=r"`feature` must name .*feature='size'"):
        TokenSubstitution(1, feature="size")(model, x, classes)
    attack = TokenSubstitution(1, 8, feature="kind", fixed_tokens=())
    moved = attack(model, x, classes)
    assert moved["size"] is x["size"]
    assert moved["tags"] is x["tags"]
    assert moved["kind"].shape == (40,)
    assert (moved["kind"] != x["kind"]).any()
    # Floats are moved in balls, tokens are replaced: both count in `overall`.
    report = advreg.evaluate_robustness(
        model, x, classes, attacks=[PGD(0.3, iterations=3), attack], verbose=0
    )
    assert report.overall.accuracy < min(r.accuracy for r in report.results) + 1e-9
    assert "Or up to 1 token of it may be replaced." in " ".join(str(report).split())


def test_categories_without_an_embedding():
    keras.utils.set_random_seed(0)
    codes = keras.Input((4,), dtype="int32")
    x = layers.CategoryEncoding(7, output_mode="multi_hot")(codes)
    model = keras.Model(codes, layers.Dense(3)(layers.Dense(9, "tanh")(x)))
    ids = RNG.integers(0, 7, (40, 4))
    classes = predicted(model, ids)
    with pytest.raises(ValueError, match="`candidates` must be given as a dictionary"):
        TokenSubstitution(1, fixed_tokens=())(model, ids, classes)
    others = {code: [o for o in range(7) if o != code] for code in range(7)}
    attack = TokenSubstitution(1, others, fixed_tokens=(), verified=24)
    fooled = predicted(model, attack(model, ids, classes)) != classes
    expected = np.zeros(40, bool)
    for place in range(4):
        for code in range(7):
            moved = ids.copy()
            moved[:, place] = code
            expected |= predicted(model, moved) != classes
    np.testing.assert_array_equal(fooled, expected)


class Noisy(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed = keras.random.SeedGenerator(0)

    def call(self, x):
        return x + 0.3 * keras.random.normal(ops.shape(x), seed=self.seed)


@slow_on_jax
def test_models_that_draw():
    inner = network()
    outputs = Noisy()(inner.outputs[0])
    model = keras.Model(inner.inputs, outputs)
    classes = predicted(inner, IDS)
    report = advreg.evaluate_robustness(
        model, IDS[:20], classes[:20], attacks=TokenSubstitution(1), verbose=0, draws=4
    )
    assert 0 < report.results[0].accuracy < report.clean.accuracy <= 1


@slow_on_jax
def test_it_is_measured_after_each_epoch(model):
    network = keras.models.clone_model(model)
    network.compile(
        "adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    classes = predicted(model, IDS)
    measured = callbacks.RobustAccuracy(TokenSubstitution(1), (IDS, classes))
    logs = network.fit(IDS, classes, epochs=2, callbacks=[measured], verbose=0).history
    assert len(logs["val_robust_accuracy"]) == 2
    config = advreg.AdvRegConfig.fgsm(0.1, perturb="embeddings")
    wrapped = advreg.AdversarialRegularization(network, config)
    assert TokenSubstitution(1)(wrapped, IDS, classes).shape == IDS.shape


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TokenSubstitution(0), ValueError, "`max_changes` must be"),
        (
            lambda: TokenSubstitution(1, 0),
            ValueError,
            "`candidates` must be at least 1",
        ),
        (
            lambda: TokenSubstitution(1, [1]),
            TypeError,
            "a number of neighbours, a dict",
        ),
        (lambda: TokenSubstitution(1, np.ones(3)), ValueError, "integer array"),
        (
            lambda: TokenSubstitution(1, fixed_tokens=0),
            TypeError,
            "`fixed_tokens` must",
        ),
        (
            lambda: TokenSubstitution(1, fixed_tokens="a"),
            TypeError,
            "sequence of integ",
        ),
        (
            lambda: TokenSubstitution(1, can_change=1),
            TypeError,
            "`can_change` must be a",
        ),
        (lambda: TokenSubstitution(1, verified=0), ValueError, "`verified` must be"),
        (lambda: TokenSubstitution(1, restarts=0), ValueError, "`restarts` must be"),
        (lambda: RandomSubstitution(1, tries=0), ValueError, "`tries` must be"),
        (lambda: TokenSubstitution(1, seed=-1), ValueError, "`seed` must lie"),
        (lambda: TokenSubstitution(1, from_logits=1), TypeError, "`from_logits` must"),
    ],
)
def test_arguments_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_results_of_functions_are_checked(model):
    classes = predicted(model, IDS)
    with pytest.raises(ValueError, match="`can_change` must return booleans of the sh"):
        TokenSubstitution(1, can_change=lambda ids: ids)(model, IDS, classes)
    with pytest.raises(ValueError, match="must be tokens of the model, from 0 to 29"):
        TokenSubstitution(1, lambda word: [99])(model, IDS, classes)
    floats = keras.Sequential([keras.Input((3,)), layers.Dense(3)])
    with pytest.raises(ValueError, match=r"`feature` is needed for .*These are: none"):
        TokenSubstitution(1)(floats, np.ones((4, 3), "float32"), np.zeros(4, int))


def test_it_says_what_it_is():
    assert repr(TokenSubstitution(3, restarts=2)) == (
        "TokenSubstitution(max_changes=3, restarts=2)"
    )
    assert RandomSubstitution(2).name == "RandomSubstitution(2)"
