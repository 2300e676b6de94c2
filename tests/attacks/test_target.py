import keras
import numpy as np
import pytest
import tensorflow as tf
from helpers.models import Subclassed, rows, two_outputs
from keras import layers, ops

from advreg import AdversarialRegularization
from advreg.attacks.engine.target import TargetModel
from advreg.network.output_form import OutputForm

X = rows(10, 4)
Y = np.random.default_rng(1).integers(0, 3, 10)


def dense(units=3, activation=None, loss=None):
    keras.utils.set_random_seed(2)
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(units, activation=activation)]
    )
    if loss is not None:
        model.compile("sgd", loss)
    return model


def form_of(model, from_logits=None, x=X):
    return TargetModel(model, from_logits).output_form(tf.constant(x))


class TestOutputForm:
    def test_logits_and_probabilities_of_several_classes(self):
        assert form_of(dense()) == OutputForm(True, 3)
        assert form_of(dense(activation="softmax")) == OutputForm(False, 3)
        # Not what the last layer is called counts, but what comes out.
        inputs = keras.Input((4,))
        outputs = ops.softmax(layers.Dense(3)(inputs))
        assert form_of(keras.Model(inputs, outputs)) == OutputForm(False, 3)
        one_vs_rest = OutputForm(False, 3, one_vs_rest=True)
        assert form_of(dense(activation="sigmoid")) == one_vs_rest

    @pytest.mark.parametrize(
        ("loss", "from_logits"),
        [
            ("binary_crossentropy", False),
            (keras.losses.BinaryCrossentropy(), False),
            (keras.losses.BinaryCrossentropy(from_logits=True), True),
            (None, False),
        ],
    )
    def test_the_compiled_loss_says_what_a_single_score_is(self, loss, from_logits):
        # All scores lie in [0, 1], so that the values leave both open.
        model = dense(1, "sigmoid", loss)
        assert form_of(model) == OutputForm(from_logits, 1)

    def test_else_the_last_activation_says_it(self):
        model = dense(1)
        model.set_weights([np.zeros((4, 1)), np.array([0.5])])
        assert form_of(model).from_logits
        model.compile("sgd", "binary_crossentropy")
        assert not form_of(model).from_logits

    def test_a_score_outside_0_and_1_is_a_logit(self):
        model = dense(1, loss="binary_crossentropy")
        model.set_weights([np.zeros((4, 1)), np.array([-0.5])])
        assert form_of(model).from_logits

    @pytest.mark.parametrize("columns", [1, 3])
    def test_the_user_has_the_last_word(self, columns):
        model = dense(columns, "softmax" if columns == 3 else "sigmoid")
        assert form_of(model, from_logits=True).from_logits
        assert not form_of(model, from_logits=False).from_logits

    @pytest.mark.parametrize("columns", [1, 3])
    def test_unless_the_outputs_contradict(self, columns):
        model = dense(columns)
        model.set_weights([np.zeros((4, columns)), np.full(columns, 7.0)])
        with pytest.raises(ValueError, match=r"`from_logits=False`.*from 7 to 7"):
            form_of(model, from_logits=False)

    def test_rows_of_nan_do_not_count(self):
        x = X.copy()
        x[0] = np.nan
        assert not form_of(dense(activation="softmax"), x=x).from_logits
        with pytest.raises(ValueError, match=r"`model` must give numbers.*first 10 ex"):
            form_of(dense(), x=np.full_like(X, np.nan))

    @pytest.mark.parametrize("columns", [1, 2, 3])
    @pytest.mark.parametrize("from_logits", [False, True])
    def test_classes_and_predictions(self, columns, from_logits):
        form = OutputForm(from_logits, columns)
        logits = rows(9, columns, seed=3)
        scores = logits
        if not from_logits:
            scores = keras.activations.get("softmax" if columns > 1 else "sigmoid")(
                tf.constant(logits)
            )
        assert form.classes == max(columns, 2)
        predicted = form.predicted(tf.convert_to_tensor(scores))
        expected = logits.argmax(1) if columns > 1 else logits[:, 0] > 0
        np.testing.assert_array_equal(predicted, expected.astype(int))
        got = form.logits(tf.convert_to_tensor(scores)).numpy()
        assert got.shape == (9, max(columns, 2))
        wanted = logits if columns > 1 else np.concatenate([logits * 0, logits], 1)
        np.testing.assert_allclose(
            got - got[:, :1], wanted - wanted[:, :1], rtol=1e-4, atol=1e-5
        )

    @pytest.mark.parametrize(("columns", "last"), [(3, "softmax"), (1, "sigmoid")])
    def test_saturated_probabilities_keep_their_logits(self, columns, last):
        model = dense(columns, last)
        model.set_weights([np.eye(4)[:, :columns] * 1e3, np.zeros(columns)])
        target = TargetModel(model)
        x = tf.constant(X)
        form = target.output_form(x)

        @tf.function
        def gradient(x):
            logits = form.logits(target.outputs(x))
            return logits, tf.gradients(logits[:, -1] - logits[:, 0], x)[0]

        logits, slope = gradient(x)
        assert (np.abs(slope).sum(1) > 900).all()
        wanted = X[:, :columns] * 1e3
        if columns == 1:
            wanted = np.concatenate([wanted * 0, wanted], 1)
        np.testing.assert_allclose(logits, wanted, rtol=1e-4)

    @pytest.mark.parametrize(
        "output",
        [
            lambda h: ops.argmax(h, axis=-1),
            lambda h: ops.cast(h, "int32"),
            lambda h: ops.reshape(h, (-1, 3, 1)),
        ],
        ids=["classes", "integers", "rank 3"],
    )
    def test_what_is_no_score(self, output):
        inputs = keras.Input((4,))
        model = keras.Model(inputs, output(layers.Dense(3)(inputs)))
        with pytest.raises(ValueError, match=r"`model` must give class scores.*shape"):
            form_of(model)

    def test_segmentation_is_refused(self):
        model = keras.Sequential([keras.Input((4, 4, 1)), layers.Conv2D(3, 1)])
        with pytest.raises(ValueError, match=r"class scores.*\(10, 4, 4, 3\)"):
            form_of(model, x=rows(10, 4, 4, 1))

    def test_several_outputs_are_refused(self):
        with pytest.raises(ValueError, match=r"one output.*Choose.*model.outputs\[0\]"):
            form_of(two_outputs(width=4))


class TestLabels:
    def classes(self, y, columns=3):
        model = dense(columns)
        victim = TargetModel(model)
        return victim.classes(tf.convert_to_tensor(y), OutputForm(True, columns))

    @pytest.mark.parametrize(
        "y",
        [
            Y,
            Y[:, None],
            Y.astype("uint8"),
            Y.astype("float32"),
            np.eye(3)[Y],
            np.eye(3, dtype=bool)[Y],
            np.eye(3)[Y] * 0.85 + 0.05,
        ],
        ids=["sparse", "column", "uint8", "floats", "one-hot", "bools", "smoothed"],
    )
    def test_forms(self, y):
        classes = self.classes(y)
        assert classes.dtype == tf.int32
        np.testing.assert_array_equal(classes, Y)

    @pytest.mark.parametrize("y", [Y % 2, Y[:, None] % 2, Y % 2 == 1, Y % 2 * 1.0])
    def test_forms_of_two_classes(self, y):
        np.testing.assert_array_equal(self.classes(y, 1), Y % 2)

    @pytest.mark.parametrize(
        ("y", "received"),
        [
            (np.full(10, 3), r"3 \(and 9 more\)"),
            (np.append(Y, -1), r"-1 \(and 0 more\)"),
            (np.full(10, 0.5), "0.5"),
            (np.full(10, np.nan), "nan"),
            (np.full(10, 2**40), "1.09951e"),
            (np.zeros((10, 2)), r"shape=\(10, 2\)"),
            (np.zeros((10, 3, 1)), r"shape=\(10, 3, 1\)"),
            (np.array(["a"] * 10), "string"),
            (np.full(10, 1j), "complex"),
            (np.zeros((10, 3)), r"\[0. 0. 0.\] \(and 9 more\)"),
            (np.full((10, 3), np.nan), r"\[nan nan nan\]"),
        ],
    )
    def test_what_is_no_label(self, y, received):
        rule = r"`y` must hold classes from 0 to 2, in the shape \[batch\] or"
        with pytest.raises(ValueError, match=f"{rule}.*Received: .*{received}"):
            self.classes(y)

    def test_two_arrays_of_labels_are_refused(self):
        with pytest.raises(ValueError, match="`y` must hold classes from 0 to 2"):
            TargetModel(dense()).classes([tf.constant(Y)] * 2, OutputForm(True, 3))

    def test_a_single_score_tells_two_classes(self):
        with pytest.raises(ValueError, match=r"from 0 to 1.*has 2 classes.*2 "):
            self.classes(np.full(10, 2), 1)


class TestUnpack:
    @pytest.mark.parametrize(
        ("x", "y", "error", "message"),
        [
            (X, None, ValueError, "Labels are missing: pass them as `y`.*y=None"),
            (X, Y[:5], ValueError, "same number of examples. Received: 10 and 5"),
            ({"a": X, "b": X[:5]}, Y, ValueError, "examples.*10 and 5 and 10"),
            (X.tolist(), Y, ValueError, "`x` must be an array with a batch axis"),
            (X, Y.tolist(), ValueError, "`y` must be an array with a batch axis"),
            (3.0, Y, ValueError, "`x` must be an array.*Received: float"),
            (None, Y, ValueError, "`x` must be an array.*Received: NoneType"),
            ("abc", Y, ValueError, "`x` must be an array.*Received: str"),
            (X.astype(object), Y, TypeError, "`x` must hold arrays.*dtype=object"),
            (X, np.array([{}] * 10), TypeError, "`y` must hold arrays.*object"),
            (tf.sparse.from_dense(X), Y, ValueError, "`x`.*`tf.sparse.to_dense`"),
        ],
    )
    def test_what_is_no_batch(self, x, y, error, message):
        with pytest.raises(error, match=f"(?s){message}"):
            TargetModel(dense()).unpack((x, y))

    def test_images_of_bytes_become_floats_and_other_integers_stay(self):
        image = np.zeros((2, 3, 3), "uint8")
        x, _ = TargetModel(dense()).unpack(([image, np.zeros((2, 3), "uint8")], Y[:2]))
        assert [leaf.dtype.name for leaf in x] == ["float32", "uint8"]

    def test_labels_in_the_dictionary_of_a_wrapped_model(self):
        target = TargetModel(AdversarialRegularization(dense(), label_keys=["truth"]))
        x, y = target.unpack({"x": X, "truth": Y})
        assert list(x) == ["x"]
        np.testing.assert_array_equal(y, Y)
        with pytest.raises(ValueError, match=r"`label_keys` \('truth',\).*\['x'\]"):
            target.unpack({"x": X})


@pytest.mark.parametrize("model", [len, layers.Dense(3), keras.Model, None])
def test_what_is_no_model(model):
    with pytest.raises(TypeError, match=r"`model` must be a Keras 3 model.*Received"):
        TargetModel(model)


def test_from_logits_is_a_bool():
    with pytest.raises(TypeError, match=r"`from_logits` must be a bool.*1"):
        TargetModel(dense(), 1)


@pytest.mark.parametrize(
    ("loss", "fits"),
    [
        ("mse", True),
        ("mean_absolute_error", True),
        (keras.losses.Huber(), True),
        (keras.losses.mean_squared_error, True),
        (["mse"], True),
        ("sparse_categorical_crossentropy", False),
        (keras.losses.BinaryCrossentropy(), False),
        (lambda y, p: p, False),
        (None, False),
    ],
)
def test_losses_of_regression_are_known(loss, fits):
    assert TargetModel(dense(loss=loss)).fits_values is fits


class TestCompile:
    def traced(self, model):
        """How often the layer was traced, once called."""
        count = []

        class Counting(layers.Layer):
            def call(self, x):
                if not tf.executing_eagerly():
                    count.append(1)
                return x

        model = keras.Sequential([keras.Input((4,)), Counting(), *model.layers])
        count.clear()  # Keras's own, to build it.
        return model, count

    def test_once_for_batches_of_any_size(self):
        model, count = self.traced(dense())
        for size in (3, 5, 1):
            target = TargetModel(model)  # What is compiled stays with the model.
            outputs = target.compile("key", target.outputs, tf.constant(X))
            assert outputs(tf.constant(X[:size])).shape == (size, 3)
        assert len(count) == 1

    def test_a_key_and_a_type_of_its_own(self):
        model, count = self.traced(dense())
        target = TargetModel(model)
        for key, x in (("a", X), ("b", X), ("a", X.astype("float64"))):
            target.compile(key, target.outputs, tf.constant(x))(tf.constant(x))
        assert len(count) == 3

    def test_not_at_all_where_the_model_runs_eagerly(self):
        model, count = self.traced(dense())
        model.compile("sgd", run_eagerly=True)
        target = TargetModel(model)
        target.compile("key", target.outputs, tf.constant(X))(tf.constant(X))
        assert not count


def test_the_batch_size_that_a_network_was_built_for():
    fixed = keras.Sequential([keras.Input(batch_shape=(8, 4)), layers.Dense(3)])
    assert TargetModel(fixed).fixed_batch == 8
    assert TargetModel(dense()).fixed_batch is None
    assert TargetModel(Subclassed()).fixed_batch is None
