# /// script
# requires-python = ">=3.9,<3.12"
# dependencies = [
#   "tensorflow==2.15.1", "numpy==1.26.4", "neural-structured-learning==1.4.0",
# ]
# ///
"""Computes the cases of `nsl_parity.py` by the library that is here: advreg's or NSL's.

Nothing but the first import knows which one it is. It runs on Keras 2 and Keras 3, and
is written so that both mean the same: weights are set and read by the names of layers,
and batches of a `fit` are of one size. (Where they are not, Keras 2 takes the mean over
batches and Keras 3 over examples.) No network has BatchNorm, dropout or losses of its
own, which NSL treats otherwise.

    python benchmarks/nsl_cases.py FILE [--quick]
"""

try:
    from advreg import nsl
except ImportError:
    import neural_structured_learning as nsl

import functools
import itertools
import sys

import keras
import numpy as np
import tensorflow as tf
from keras import layers, losses

NORMS, BOTH, BATCH = ("l1", "l2", "infinity"), (False, True), 8
# The length of a step. Largest movements of ten such steps stay near 1, so that 1e-6
# is about eight roundings of a float32.
STEP = 0.1
QUICK = 50  # Of so many cases one is computed.
GROUPS = []


def cases(group, dtype="float32", unless=lambda **_: False, **axes):
    """Registers a function of a case, for all combinations of the axes.

    Args:
        group: Name of the group of cases.
        dtype: The type of floats.
        unless: Tells which combinations are no case.
        **axes: The values of each argument.
    """

    def register(function):
        rows = itertools.product(*axes.values())
        found = [dict(zip(axes, row)) for row in rows]  # noqa: B905
        GROUPS.append((group, dtype, function, [c for c in found if not unless(**c)]))
        return function

    return register


def rng(seed):
    return np.random.default_rng(seed)


def floats(values):
    return np.asarray(values, keras.backend.floatx())


def uniform(seed, *shape):
    return floats(rng(seed).uniform(size=shape))


# Networks: a Keras model, its features, and its labels.


def set_weights(model):
    """Draws weights of a sensible scale, layer by layer in the order of names."""
    generator = rng(0)
    for layer in sorted(model.layers, key=lambda layer: layer.name):
        shapes = [weight.shape for weight in layer.get_weights()]
        scales = [np.sqrt(np.prod(shape[:-1])) for shape in shapes]
        drawn = [generator.normal(size=shape) for shape in shapes]
        layer.set_weights([floats(w / s) for w, s in zip(drawn, scales)])  # noqa: B905
    return model


def mlp(rows=BATCH):
    """Six values, three classes."""
    x = keras.Input((6,), name="values")
    hidden = layers.Dense(8, "tanh", name="hidden")(x)
    model = keras.Model(x, layers.Dense(3, name="logits")(hidden))
    labels = rng(2).integers(3, size=(rows, 1))
    return set_weights(model), {"values": uniform(1, rows, 6)}, labels


def cnn(rows=BATCH):
    """Grey images of 8 x 8, ten classes."""
    x = keras.Input((8, 8, 1), name="image")
    hidden = layers.Conv2D(4, 3, activation="relu", name="convolution")(x)
    hidden = layers.Flatten(name="flat")(layers.MaxPooling2D(name="pool")(hidden))
    model = keras.Model(x, layers.Dense(10, name="logits")(hidden))
    labels = rng(4).integers(10, size=(rows, 1))
    return set_weights(model), {"image": uniform(3, rows, 8, 8, 1)}, labels


def two_inputs(rows=BATCH):
    """A row and a small image under names whose order is not that of the inputs."""
    row, patch = keras.Input((5,), name="row"), keras.Input((2, 3), name="patch")
    left = layers.Dense(7, name="of_row")(row)
    right = layers.Dense(7, name="of_patch")(layers.Flatten(name="flat")(patch))
    total = layers.Add(name="sum")([left, right])
    hidden = layers.Activation("tanh", name="tanh")(total)
    model = keras.Model([row, patch], layers.Dense(3, name="logits")(hidden))
    features = {"row": uniform(5, rows, 5), "patch": uniform(7, rows, 2, 3)}
    return set_weights(model), features, rng(6).integers(3, size=(rows, 1))


NETWORKS = {"mlp": mlp, "cnn": cnn, "two_inputs": two_inputs}


def classes_loss():
    return losses.SparseCategoricalCrossentropy(from_logits=True)


def predictor(model):
    """Returns the model as a function of a dictionary, which both Keras read alike."""
    names = [tensor.name.split(":")[0] for tensor in model.inputs]

    def predict(features, **kwargs):
        inputs = [features[name] for name in names]
        return model(inputs if len(inputs) > 1 else inputs[0], **kwargs)

    return predict


# Perturbations, and the loss at them.


def steps_of(norm, times, ball=True):
    """Returns the fields of a configuration; NSL cannot project to the L1 ball."""
    fields = {"adv_step_size": STEP, "adv_grad_norm": norm, "pgd_iterations": times}
    if ball and norm != "l1":
        # Between one step and two, so that the path goes along the ball.
        fields["pgd_epsilon"] = 1.5 * STEP
    return fields


def fields_of(features, norm, times, ball, mask, clip):
    """Returns the fields of a configuration with masks and ranges."""
    fields, names = steps_of(norm, times, ball), sorted(features)
    if ball and times == 1:
        fields["pgd_epsilon"] = 0.6 * STEP  # Else the ball would not bind.
    if mask:
        fields["feature_mask"] = masks(features)
    if clip:
        # A tight range cuts off some values of the input itself. Not with masks: NSL
        # moves a masked value that is out of range.
        low, first = floats(0.0 if mask else 0.1), names[0]
        full = {name: np.broadcast_to(low, features[name].shape[1:]) for name in names}
        fields["clip_value_min"] = {**full, first: low}
        fields["clip_value_max"] = {**{n: 1 - full[n] for n in names}, first: 1 - low}
    return fields


def masks(features):
    """Returns weights 0, 0.5 and 1 for each value. NSL takes no others than float32."""
    draw = functools.partial(rng(10).choice, np.array([0, 0.5, 1], "float32"))
    return {name: draw(value.shape[1:]) for name, value in features.items()}


GRID = {"network": tuple(NETWORKS), "times": (1, 3, 10), "norm": NORMS}
GRID = {**GRID, "ball": BOTH, "mask": BOTH, "clip": BOTH}


def no_ball(norm, ball, **_):
    return norm == "l1" and ball


def no_batch(network, times, **case):
    return no_ball(**case) or (network != "mlp" and times == 10)


@cases("gen_adv_neighbor, float32", "float32", no_ball, **GRID)
@cases("gen_adv_neighbor, float64", "float64", no_ball, **GRID)
def neighbors(network, **case):
    """In eager code."""
    model, features, labels = NETWORKS[network]()
    config = nsl.configs.AdvNeighborConfig(**fields_of(features, **case))
    predict = predictor(model)
    features = tf.nest.map_structure(tf.constant, features)
    with tf.GradientTape() as tape:
        tape.watch(features)
        loss = classes_loss()(labels, predict(features))
    again = {"pgd_model_fn": predict, "pgd_loss_fn": classes_loss()}
    again = {**again, "pgd_labels": labels, "gradient_tape": tape}
    return nsl.lib.gen_adv_neighbor(features, loss, config, **again)


@functools.lru_cache
def wrapped(network):
    model, features, labels = NETWORKS[network]()
    model = nsl.keras.AdversarialRegularization(model)
    model.compile("sgd", classes_loss())
    return model, features, labels


@cases("perturb_on_batch, float32", "float32", no_batch, **GRID)
def batches(network, **case):
    """One model of each network, and overrides; labels come back too."""
    model, features, labels = wrapped(network)
    batch = {**features, "label": labels}
    return model.perturb_on_batch(batch, **fields_of(features, **case))


LOSS = {"network": tuple(NETWORKS), "norm": NORMS, "times": (1, 3), "graph": BOTH}
LOSS["given"] = ("nothing", "predictions", "labeled_loss")


def no_graph(network, given, graph, **_):
    return graph and (network != "mlp" or given == "predictions")


# NSL multiplies sample weights by ones in float32: they cannot be in float64.
@cases("adversarial_loss, float32", "float32", no_graph, **LOSS, weighted=BOTH)
@cases("adversarial_loss, float64", "float64", no_graph, **LOSS)
def adversarial_losses(network, norm, times, given, graph, weighted=False):
    """Computes the loss, and its gradient with respect to the weights."""
    model, features, labels = NETWORKS[network]()
    predict, loss_fn = predictor(model), classes_loss()
    features = tf.nest.map_structure(tf.constant, features)
    weights = tf.constant(uniform(13, BATCH, 1)) if weighted else None
    config = nsl.configs.make_adv_reg_config(**steps_of(norm, times))
    arguments = (features, labels, predict, loss_fn, weights, config)

    def compute():
        known = {"model_kwargs": {"training": True}}
        with tf.GradientTape() as outer:
            if given != "nothing":
                with tf.GradientTape() as tape:
                    tape.watch(features)
                    predictions = predict(features, training=True)
                    loss = loss_fn(labels, predictions, weights)
                known[given] = predictions if given == "predictions" else loss
                known["gradient_tape"] = tape
            value = nsl.keras.adversarial_loss(*arguments, **known)
        return value, outer.gradient(value, model.trainable_variables)

    return (tf.function(compute) if graph else compute)()


# Training: one step, then two more, by `fit`.


FIT = {"optimizer": ("sgd", "adam"), "times": (1, 3), "norm": NORMS}


@cases("fit, float32", network=tuple(NETWORKS), **FIT)
@cases("fit, float64", "float64", network=("mlp",), **FIT)
@cases("fit, sample weights", network=("mlp",), weighted=(True,), **FIT)
def fit(network, optimizer, times, norm, weighted=False):
    model, features, labels = NETWORKS[network](3 * BATCH)
    config = nsl.configs.make_adv_reg_config(0.5, **steps_of(norm, times))
    data, weight = {**features, "label": labels}, "weight" if weighted else None
    if weighted:
        data["weight"] = uniform(14, 3 * BATCH, 1)
    wrapped = nsl.keras.AdversarialRegularization(model, ["label"], weight, config)
    # Both Keras compute the same: Adam adds its epsilon to the root of the uncorrected
    # second moment in both.
    sgd, adam = keras.optimizers.SGD(0.1), keras.optimizers.Adam()
    optimizer = sgd if optimizer == "sgd" else adam
    wrapped.compile(optimizer, classes_loss(), metrics=["accuracy"])
    found = []
    for part in (slice(0, BATCH), slice(BATCH, 3 * BATCH)):
        batch = {name: value[part] for name, value in data.items()}
        history = wrapped.fit(batch, batch_size=BATCH, shuffle=False, verbose=0)
        weights = {layer.name: layer.get_weights() for layer in model.layers}
        found.append({**weights, **history.history})
    return found


# The script.


def leaves_of(value, prefix=""):
    """Yields the leaves of nested dictionaries and lists, with the path to each."""
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        yield prefix, value
        return
    for name, child in value.items():
        yield from leaves_of(child, f"{prefix}/{name}")


def main(path, quick):
    """Writes the arrays; keys are the group, the case and the part."""
    print(f"{nsl.__name__} on TensorFlow {tf.__version__}", flush=True)
    found = {}
    for group, dtype, function, combinations in GROUPS:
        keras.backend.set_floatx(dtype)
        keras.mixed_precision.set_global_policy(dtype)
        for case in combinations[:: QUICK if quick else 1]:
            label = " ".join(f"{name}={value}" for name, value in case.items())
            for part, value in leaves_of(function(**case)):
                found[f"{group}\t{label}\t{part}"] = np.asarray(value)
    with open(path, "wb") as output:
        np.savez(output, **found)


if __name__ == "__main__":
    main(sys.argv[1], "--quick" in sys.argv)
