"""What is trained on one device, on two replicas and on two workers alike.

    python -m helpers.replicas one|replicas|worker RESULTS [CASE ...]

Writes as JSON what each case gave. `test_distribution.py` starts this as processes of
its own, for devices and workers are what TensorFlow is told before it begins.
"""

import contextlib
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import advreg
from advreg.attacks import PGD
from advreg.backend.tensorflow.replicas import ReplicaSeedGenerator
from advreg.backend.tensorflow.workers import function_over_workers, local_example
from advreg.callbacks import RobustAccuracy
from helpers.models import aligned

KIND = sys.argv[1]
RNG = np.random.default_rng(0)
# Of eight at a time the last five are divided four to one; of seventeen, one to none.
X, Y = aligned(RNG.normal(size=(21, 6))), aligned(RNG.integers(0, 3, 21))
WEIGHTS = aligned(RNG.uniform(0.5, 2.0, 21))
DATA = X, Y, WEIGHTS
FEW = X[:17], Y[:17]
CASES = {}


def strategy_of(kind):
    if kind == "worker":
        return tf.distribute.MultiWorkerMirroredStrategy()
    if kind == "replicas":
        cpu = tf.config.list_physical_devices("CPU")[0]
        devices = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, devices)
        return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    return None


STRATEGY = strategy_of(KIND)
INDEX = STRATEGY.cluster_resolver.task_id if KIND == "worker" else 0


def scope():
    return STRATEGY.scope() if STRATEGY else contextlib.nullcontext()


def case(function):
    CASES[function.__name__] = function
    return function


def dense():
    return [
        keras.Input((6,)),
        layers.Dense(8, activation="tanh", kernel_regularizer="l2"),
        layers.Dense(3),
    ]


def normalised(**kwargs):
    return [
        keras.Input((6,)),
        layers.Dense(8),
        layers.BatchNormalization(**kwargs),
        layers.Dense(3),
    ]


def crossentropy(**kwargs):
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **kwargs)


def wrapped(make=dense, loss=None, optimizer="sgd", compiled=(), **fields):
    """A model that is compiled with the configuration of these fields."""
    keras.utils.set_random_seed(0)
    fields = {
        "adv_step_size": 0.1,
        "adv_grad_norm": "l2",
        "pgd_iterations": 3,
        "pgd_epsilon": 0.25,
        **fields,
    }
    with scope():
        base = make()
        if not isinstance(base, keras.Model):
            base = keras.Sequential(base)
        config = advreg.make_adv_reg_config(**fields)
        model = advreg.AdversarialRegularization(base, config)
        metrics = ["accuracy"] * len(base.outputs) if base.built else ["accuracy"]
        model.compile(
            optimizer, loss or crossentropy(), metrics=metrics, **dict(compiled)
        )
    return model


def found(model, history=None):
    """What is to be equal: weights, and logs."""
    weights = [weight.numpy().tolist() for weight in model.base_model.weights]
    return {"weights": weights, "logs": history and history.history}


def trained(model, *data, **kwargs):
    data = data or (X, Y, WEIGHTS)
    if isinstance(data[0], np.ndarray):
        data = (tf.data.Dataset.from_tensor_slices(data).batch(8),)
    history = model.fit(
        *data, **{"epochs": 2, "verbose": 0, "shuffle": False, **kwargs}
    )
    return found(model, history)


@case
def fgsm():
    return trained(wrapped(pgd_iterations=1))


@case
def pgd():
    return trained(wrapped())


@case
def embeddings():
    def text():
        ids = keras.Input((5,), dtype="int32")
        x = layers.Embedding(7, 4, mask_zero=True)(ids)
        x = layers.GlobalAveragePooling1D()(x)
        return keras.Model(ids, layers.Dense(3)(x))

    ids = np.random.default_rng(1).integers(0, 7, (21, 5)).astype("int32")
    ids[:, 0] = 1  # No text is all padding.
    model = wrapped(text, perturb="embeddings", relative=True)
    return trained(model, aligned(ids), Y, WEIGHTS)


@case
def without_perturbation():
    return trained(wrapped(multiplier=0.0))


@case
def in_float32():
    def single():
        return [
            keras.Input((6,), dtype="float32"),
            layers.Dense(8, activation="tanh", dtype="float32"),
            layers.Dense(3, dtype="float32"),
        ]

    return trained(wrapped(single))


@case
def clean_weight_of_none():
    return trained(wrapped(clean_weight=0.0, weight_perturbation=0.1))


@case
def mart_with_weight_perturbation():
    return trained(wrapped(objective="mart", weight_perturbation=0.1))


@case
def logit_pairing():
    return trained(wrapped(objective="logit_pairing"))


def trained_and_evaluated(model, *data, **kwargs):
    result = trained(model, *data, **kwargs)
    found = model.evaluate(X, Y, sample_weight=WEIGHTS, batch_size=8, verbose=0)
    return {**result, "evaluated": found}


@case
def reduction_to_a_sum():
    model = wrapped(loss=crossentropy(reduction="sum"), multiplier=0.1)
    return trained_and_evaluated(model)


@case
def reduction_by_weights():
    loss = crossentropy(reduction="mean_with_sample_weight")
    return trained_and_evaluated(wrapped(loss=loss))


@keras.saving.register_keras_serializable("replicas")
class Added(layers.Layer):
    """Adds a mean over examples to the loss."""

    def call(self, inputs):
        self.add_loss(0.1 * keras.ops.mean(inputs**2))
        return inputs


@case
def losses_that_layers_add():
    def make():
        regularised = layers.Dense(
            8, activity_regularizer="l2", kernel_regularizer="l2"
        )
        return [keras.Input((6,)), Added(), regularised, layers.Dense(3)]

    model = wrapped(make)
    return {**trained(model, *FEW), "evaluated": model.evaluate(*FEW, 8, verbose=0)}


@case
def an_overflow_in_one_part():
    """In half precision, where a step is skipped by all or by none."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = wrapped(lambda: [keras.Input((6,)), layers.Dense(3)])
    finally:
        keras.config.set_dtype_policy("float64")
    x = X[:16].copy()
    x[4:8] = 30.0
    result = trained(model, x, Y[:16])
    scale = model.optimizer.dynamic_scale.numpy().tolist()
    return {"scale": scale, "weights": result["weights"]}


@case
def metrics_of_several_numbers():
    model = wrapped()
    with scope():
        each = keras.metrics.F1Score(average=None, dtype="float64")
        loss = keras.losses.CategoricalCrossentropy(from_logits=True)
        model.compile("sgd", loss, metrics=[each])
    result = trained(model, X, keras.utils.to_categorical(Y, 3), epochs=1)
    result["logs"] = {k: np.asarray(v).tolist() for k, v in result["logs"].items()}
    return result


@case
def a_list_of_callbacks_and_a_late_start():
    model = wrapped()
    epochs = []
    note = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda e, logs: epochs.append(e)
    )
    callbacks = keras.callbacks.CallbackList([note], model=model, add_history=True)
    # The first worker decides where all begin.
    first = 1 if INDEX == 0 else 2
    model.fit(
        X, Y, 8, epochs=3, callbacks=callbacks, initial_epoch=first, shuffle=False
    )
    model.fit(X, Y, 8, epochs=1, callbacks=callbacks, shuffle=False, verbose=0)
    return {**found(model), "epochs": epochs}


@case
def two_outputs():
    def make():
        inputs = keras.Input((6,))
        hidden = layers.Dense(8, activation="tanh")(inputs)
        outputs = {name: layers.Dense(3, name=name)(hidden) for name in ("a", "b")}
        return keras.Model(inputs, outputs)

    losses = {"a": crossentropy(), "b": crossentropy()}
    # Keras means the losses of single outputs over batches of whatever size.
    x, y = X[:16], Y[:16]
    data = tf.data.Dataset.from_tensor_slices((x, {"a": y, "b": 2 - y})).batch(8)
    keras.utils.set_random_seed(0)
    with scope():
        config = advreg.make_adv_reg_config(adv_grad_norm="l2", adv_step_size=0.1)
        model = advreg.AdversarialRegularization(make(), config)
        model.compile("sgd", losses, loss_weights={"a": 1.0, "b": 0.5})
    return trained(model, data)


@case
def a_replica_without_examples():
    return trained(wrapped(), *FEW)


@case
def synchronized_normalisation():
    return trained(wrapped(lambda: normalised(synchronized=True)), *FEW)


@case
def separate_normalisation():
    model = wrapped(normalised)
    result = trained(model, *FEW)
    return {**result, "evaluated": model.evaluate(X, Y, verbose=0)}


@case
def objectives_that_draw():
    """What replicas draw must differ, so that there is nothing to be equal to."""
    return [
        trained(wrapped(objective=objective, random_init=True))
        for objective in ("trades", "virtual_adversarial")
    ]


@case
def noise():
    with scope():
        seed = ReplicaSeedGenerator(1)

    def draw():
        return keras.random.normal((3,), seed=seed)

    if STRATEGY is None:
        return [draw().numpy().tolist()]
    drawn = STRATEGY.run(tf.function(draw))
    values = STRATEGY.experimental_local_results(drawn)
    return [value.numpy().tolist() for value in values]


@case
def arrays_with_labels_inside():
    model = wrapped(lambda: [layers.Dense(8), layers.Dense(3)])  # Not built yet.
    return trained(model, {"x": X, "label": Y}, batch_size=8, shuffle=True)


@case
def validation_and_robust_accuracy():
    attack = PGD(epsilon=0.5, iterations=5, norm="l2")
    watch = RobustAccuracy(attack, (X, Y))
    kept = {"validation_data": (X, Y), "callbacks": [watch]}
    return trained(wrapped(optimizer="adam"), **kept)


@case
def evaluation():
    model = wrapped()
    report = advreg.evaluate_robustness(
        model, X, Y, attacks=[PGD(epsilon=0.5, iterations=5)], verbose=0
    )
    return {
        "evaluated": model.evaluate(X, Y, batch_size=8, verbose=0),
        "predicted": model.predict(X, batch_size=8, verbose=0).tolist(),
        "robust": [result.accuracy for result in report.results],
        "perturbed": model.perturb_on_batch(X, Y).tolist(),
    }


@case
def steps_on_batches():
    model = wrapped()
    logs = model.train_on_batch(X, Y, return_dict=True)
    return {"logs": logs, "tested": model.test_on_batch(X, Y, return_dict=True)}


@case
def a_generator():
    """Keras looks at what comes first, and must not lose it."""

    def batches():
        for start in (0, 8, 16):
            yield X[start : start + 8], Y[start : start + 8]

    model = wrapped(lambda: [layers.Dense(8), layers.Dense(3)])  # Not built yet.
    return trained(model, batches(), epochs=1)


@case
def files():
    """Sharding by file: each worker reads files of its own."""
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.FILE
    )
    folder = Path(tempfile.mkdtemp())
    rows = np.concatenate([X, Y[:, None]], 1)[:16]
    for number, part in enumerate((rows[:8], rows[8:])):
        np.savetxt(folder / f"{number}.csv", part, delimiter=",")
    if KIND == "one":  # What the two files give together, in batches of eight.
        x, y = (array[:16].reshape(2, 2, 4, -1).swapaxes(0, 1) for array in (X, Y))
        data = tf.data.Dataset.from_tensor_slices(
            (x.reshape(16, 6), y.reshape(16))
        ).batch(8)
        return trained(wrapped(), data)
    names = tf.data.Dataset.from_tensor_slices(
        sorted(str(path) for path in folder.iterdir())
    )

    def parse(line):
        values = tf.strings.to_number(tf.strings.split(line, ","), tf.float64)
        values = tf.ensure_shape(values, [7])
        return values[:6], tf.cast(values[6], "int64")

    lines = names.interleave(tf.data.TextLineDataset, cycle_length=2, block_length=4)
    data = lines.map(parse).batch(8).with_options(options)
    return trained(wrapped(), data)


@case
def saving():
    model = wrapped(optimizer="adam")
    trained(model)
    path = os.path.join(tempfile.mkdtemp(), "model.keras")
    model.save(path)
    with scope():
        loaded = keras.models.load_model(path)
    return {"before": found(model), "after": trained(loaded)}


def inside_of_scope():
    model = wrapped()
    attack = PGD(epsilon=0.5, iterations=2)
    watch = RobustAccuracy(attack, (X, Y))
    with scope():
        return [
            message_of(
                lambda: advreg.evaluate_robustness(
                    model, X, Y, attacks=attack, verbose=0
                )
            ),
            message_of(lambda: trained(model, callbacks=[watch])),
        ]


def message_of(function):
    try:
        function()
    except ValueError as error:
        return str(error)
    return "nothing"


@case
def refusals():
    base = keras.Sequential(dense())
    with scope():
        inside = keras.Sequential(dense())
        outside = message_of(lambda: advreg.AdversarialRegularization(base))
    return {
        "jit_compile": message_of(
            lambda: trained(wrapped(compiled={"jit_compile": True}))
        ),
        "steps_per_execution": message_of(
            lambda: trained(wrapped(compiled={"steps_per_execution": 2}))
        ),
        "gradient_accumulation_steps": message_of(
            lambda: trained(
                wrapped(optimizer=keras.optimizers.SGD(gradient_accumulation_steps=2))
            )
        ),
        "inside the scope": inside_of_scope(),
        "base outside": outside,
        "wrapper outside": message_of(lambda: advreg.AdversarialRegularization(inside)),
    }


@case
def resumed():
    """Training that is killed in one worker, in the middle of the third epoch."""
    model = wrapped(optimizer="adam")

    class Killer(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            steps = model.optimizer.iterations.numpy()
            if os.environ.get("KILLED") == str(INDEX) and steps == 8:
                os.kill(os.getpid(), signal.SIGKILL)

    backup = []
    if "BACKUP" in os.environ:
        folder = os.path.join(os.environ["BACKUP"], str(INDEX))
        backup = [keras.callbacks.BackupAndRestore(folder, delete_checkpoint=False)]
    return trained(model, epochs=4, callbacks=[*backup, Killer()])


@case
def defects_of_keras():
    """What plain models fail with, while Keras has not been mended."""

    class BuiltLocally(keras.Model):
        def _maybe_symbolic_build(self, iterator=None, data_batch=None):
            super()._maybe_symbolic_build(None, local_example(iterator, STRATEGY))

    class AveragedAtOnce(keras.Model):
        def _make_function(self, step_function):
            return function_over_workers(self, step_function)

    messages: dict[str, str] = {}
    if KIND != "worker":
        return messages
    for cls in (BuiltLocally, AveragedAtOnce):
        keras.utils.set_random_seed(0)
        with scope():
            inputs = keras.Input((6,))
            model = cls(inputs, layers.Dense(3)(inputs))
            model.compile("sgd", crossentropy())
        try:
            model.fit(X, Y, batch_size=8, verbose=0)
        except Exception as error:
            messages[cls.__name__] = f"{type(error).__name__}: {error}"
    return messages


def result_of(name):
    """What a case gives, if it leaves the data as they are."""
    before = [array.copy() for array in DATA]
    result = CASES[name]()
    for array, expected in zip(DATA, before, strict=True):
        np.testing.assert_array_equal(array, expected, name)
    return result


if __name__ == "__main__":
    keras.config.set_floatx("float64")
    results = {name: result_of(name) for name in sys.argv[3:] or CASES}
    # Older versions of Keras give arrays where newer ones give numbers.
    Path(sys.argv[2]).write_text(json.dumps(results, default=np.ndarray.tolist))
