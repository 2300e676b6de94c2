"""The cases of `nsl_parity.py`, which runs this file on both sides.

Nothing in it knows which library it got: that is the point. Networks are small, their
weights and data come from NumPy's generators. Written to run on Keras 2 and Keras 3:

- Weights are set and read by the names of layers, since the order in which a network
  with several branches lists them is not the same in both.
- Batches of a `fit` are of one size: where they are not, Keras 2 takes the mean over
  batches and Keras 3 over examples.
- No network has BatchNorm, dropout or losses of its own: see the defects.
- SGD and Adam compute the same in both (Adam adds its epsilon to the square root of
  the uncorrected second moment in both). The optimizer's epsilon is Keras's own.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

try:
    from advreg import nsl
except ImportError:
    import neural_structured_learning as nsl

import argparse
import functools
import itertools
import re
from unittest import mock

import keras
import numpy as np
import tensorflow as tf
from keras import layers

NORMS = ("l1", "l2", "infinity")
BATCH = 8
# The length of a step. Largest movements of ten such steps stay near 1, so that 1e-6
# is about eight roundings of a float32.
STEP = 0.1


def rng(seed):
    return np.random.default_rng(seed)


def use(dtype):
    """Makes networks and data of a type of floats from here on."""
    keras.backend.set_floatx(dtype)
    keras.mixed_precision.set_global_policy(dtype)


def floats(values):
    return np.asarray(values, keras.backend.floatx())


# The networks: a Keras model, its features, its labels.


def set_weights(model, seed=0):
    """Draws weights of a sensible scale, layer by layer in the order of names."""
    generator = rng(seed)
    for layer in sorted(model.layers, key=lambda layer: layer.name):
        layer.set_weights(
            [
                floats(generator.normal(size=w.shape) / np.sqrt(np.prod(w.shape[:-1])))
                for w in layer.get_weights()
            ]
        )
    return model


def weights_of(model):
    return {
        f"{layer.name}/{number}": weight
        for layer in model.layers
        for number, weight in enumerate(layer.get_weights())
    }


def mlp(rows=BATCH):
    """Six values, three classes."""
    x = keras.Input((6,), name="values")
    hidden = layers.Dense(8, "tanh", name="hidden")(x)
    model = keras.Model(x, layers.Dense(3, name="logits")(hidden))
    features = {"values": floats(rng(1).uniform(size=(rows, 6)))}
    return set_weights(model), features, rng(2).integers(3, size=(rows, 1))


def cnn(rows=BATCH):
    """Grey images of 8 x 8, ten classes."""
    x = keras.Input((8, 8, 1), name="image")
    hidden = layers.Conv2D(4, 3, activation="relu", name="convolution")(x)
    hidden = layers.Flatten(name="flat")(layers.MaxPooling2D(name="pool")(hidden))
    model = keras.Model(x, layers.Dense(10, name="logits")(hidden))
    features = {"image": floats(rng(3).uniform(size=(rows, 8, 8, 1)))}
    return set_weights(model), features, rng(4).integers(10, size=(rows, 1))


def two_inputs(rows=BATCH):
    """A row and a small image under names whose order is not that of the inputs."""
    row, patch = keras.Input((5,), name="row"), keras.Input((2, 3), name="patch")
    left = layers.Dense(7, name="of_row")(row)
    right = layers.Dense(7, name="of_patch")(layers.Flatten(name="flat")(patch))
    hidden = layers.Activation("tanh", name="tanh")(
        layers.Add(name="sum")([left, right])
    )
    model = keras.Model([row, patch], layers.Dense(3, name="logits")(hidden))
    generator = rng(5)
    features = {
        "row": floats(generator.uniform(size=(rows, 5))),
        "patch": floats(generator.uniform(size=(rows, 2, 3))),
    }
    return set_weights(model), features, rng(6).integers(3, size=(rows, 1))


def two_outputs(rows=BATCH):
    """Three classes, and a number."""
    x = keras.Input((6,), name="values")
    hidden = layers.Dense(8, "tanh", name="hidden")(x)
    outputs = [layers.Dense(3, name="kind")(hidden), layers.Dense(1, name="size")(x)]
    model = keras.Model(x, outputs)
    features = {"values": floats(rng(7).uniform(size=(rows, 6)))}
    labels = {
        "kind_label": rng(8).integers(3, size=(rows, 1)),
        "size_label": floats(rng(9).uniform(size=(rows, 1))),
    }
    return set_weights(model), features, labels


def classes_loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def predictor(model):
    """The model as a function of a dictionary, which Keras 2 and 3 read alike."""
    names = [tensor.name.split(":")[0] for tensor in model.inputs]

    def predict(features, **kwargs):
        inputs = [features[name] for name in names]
        return model(inputs if len(inputs) > 1 else inputs[0], **kwargs)

    return predict


def tensors(features):
    return {name: tf.constant(value) for name, value in features.items()}


# The grid of perturbations.


def grid(features, norms=NORMS, iterations=(1, 3, 10)):
    """Yields a label and the fields of `AdvNeighborConfig`, for each combination."""
    for norm, times, bounded, masked, clipped in itertools.product(
        norms, iterations, (False, True), (False, True), (False, True)
    ):
        if norm == "l1" and bounded:
            continue  # NSL has no projection to the L1 ball.
        settings = {
            "adv_step_size": STEP,
            "adv_grad_norm": norm,
            "pgd_iterations": times,
        }
        if bounded:
            # Between one step and two, so that the path goes along the ball; but one
            # step alone has to be longer for the ball to bind.
            settings["pgd_epsilon"] = (0.6 if times == 1 else 1.5) * STEP
        if masked:
            settings["feature_mask"] = masks(features)
        if clipped:
            settings["clip_value_min"], settings["clip_value_max"] = clips(
                features, tight=not masked
            )
        label = f"{norm} {times}"
        for name, on in (("ball", bounded), ("mask", masked), ("clip", clipped)):
            label += f" {name}" * on
        yield label, settings


def masks(features):
    """Weights 0, 0.5 and 1 for each value. NSL takes no others than float32."""
    generator = rng(10)
    kinds = np.array([0, 0.5, 1], "float32")
    return {
        name: generator.choice(kinds, size=value.shape[1:])
        for name, value in features.items()
    }


def clips(features, tight):
    """A number for one feature, arrays for others.

    A tight range cuts off some values of the input itself. Not with masks: a masked
    value that is out of range is one of the defects.
    """
    margin = 0.1 if tight else 0.0
    low, high = {}, {}
    for number, (name, value) in enumerate(sorted(features.items())):
        shape = value.shape[1:] if number else ()
        low[name], high[name] = np.full(shape, margin), np.full(shape, 1 - margin)
    return tree_floats(low), tree_floats(high)


def tree_floats(values):
    return {name: floats(value) for name, value in values.items()}


# The groups: generators of labels and of functions that compute arrays.

GROUPS = {}


def group(name, *arguments):
    def register(cases):
        GROUPS[name] = functools.partial(cases, *arguments)
        return cases

    return register


def neighbor(network, settings, use_while_loop=False):
    """What `gen_adv_neighbor` makes of the features of a network, in eager code."""
    model, features, labels = network()
    predict, loss_fn, features = predictor(model), classes_loss(), tensors(features)
    with tf.GradientTape() as tape:
        tape.watch(features)
        loss = loss_fn(labels, predict(features))
    found, weights = nsl.lib.gen_adv_neighbor(
        features,
        loss,
        nsl.configs.AdvNeighborConfig(**settings),
        gradient_tape=tape,
        pgd_model_fn=predict,
        pgd_loss_fn=loss_fn,
        pgd_labels=labels,
        use_while_loop=use_while_loop,
    )
    return {**found, "weights": weights}


@group("gen_adv_neighbor, float64", "float64")
@group("gen_adv_neighbor, float32", "float32")
def neighbors(dtype):
    use(dtype)
    for network in (mlp, cnn, two_inputs):
        _, features, _ = network()
        for label, settings in grid(features):
            yield (
                f"{network.__name__} {label}",
                functools.partial(neighbor, network, settings),
            )


@group("gen_adv_neighbor: structures, types, graphs")
def neighbor_forms():
    """Other structures than dictionaries of floats, and code inside `tf.function`."""
    use("float32")
    _, both, _ = two_inputs()
    kernels = {name: rng(11).normal(size=v.shape[1:]) for name, v in both.items()}
    kernels = tree_floats(kernels)

    def score(leaves):
        """A smooth number for each example, of a row and of a patch."""
        row = tf.reduce_sum(leaves[0] * kernels["row"], 1)
        patch = tf.reduce_sum(leaves[1] * kernels["patch"], (1, 2))
        return tf.tanh(row) + tf.sin(patch) * row

    def mean_loss(_, scores):
        return tf.reduce_mean(scores)

    def run(structure, predict, settings, graph):
        config = nsl.configs.AdvNeighborConfig(adv_step_size=STEP, **settings)

        def compute(features, tape):
            with tape:
                tape.watch(
                    [
                        leaf
                        for leaf in tf.nest.flatten(features)
                        if leaf.dtype.is_floating
                    ]
                )
                loss = mean_loss(None, predict(features))
            found, _ = nsl.lib.gen_adv_neighbor(
                features,
                loss,
                config,
                gradient_tape=tape,
                pgd_model_fn=predict,
                pgd_loss_fn=mean_loss,
                use_while_loop=graph,
            )
            return found

        def in_graph(features):
            return compute(features, tf.GradientTape())

        features = tf.nest.map_structure(tf.constant, structure)
        found = (tf.function(in_graph) if graph else in_graph)(features)
        return dict(enumerate(tf.nest.flatten(found)))

    row, patch = both["row"], both["patch"]
    number = rng(12).integers(3, size=(BATCH, 1))
    mask = floats([1, 0, 0.5, 1, 1])
    forms = {
        "a tensor": (row, lambda x: score([x, patch]), {}),
        "a tensor, mask, clips": (
            row,
            lambda x: score([x, patch]),
            {"feature_mask": mask, "clip_value_min": 0.0, "clip_value_max": 1.0},
        ),
        "a list": ([row, patch], score, {}),
        "a list, masks, clips": (
            [row, patch],
            score,
            {
                "feature_mask": [mask, None],
                "clip_value_min": [0.0, 0.0],
                "clip_value_max": [None, 0.9],
            },
        ),
        "integers stay": (
            {"row": row, "patch": patch, "number": number},
            lambda x: (
                score([x["row"], x["patch"]])
                * tf.cast(x["number"][:, 0] + 1, "float32")
            ),
            {},
        ),
        "what the loss does not use stays": (
            {"row": row, "patch": patch, "other": row},
            lambda x: score([x["row"], x["patch"]]),
            {},
        ),
    }
    for (name, (structure, predict, more)), norm, times, graph in itertools.product(
        forms.items(), NORMS, (1, 3), (False, True)
    ):
        settings = {"adv_grad_norm": norm, "pgd_iterations": times, **more}
        if norm != "l1":
            settings["pgd_epsilon"] = 1.5 * STEP
        yield (
            f"{name}: {norm} {times} {'graph' if graph else 'eager'}",
            functools.partial(run, structure, predict, settings, graph),
        )


@group("perturb_on_batch, float32")
def batches():
    """One model of each network, and overrides; labels come back too."""
    use("float32")
    for network, iterations in ((mlp, (1, 3, 10)), (cnn, (1, 3)), (two_inputs, (1, 3))):
        model, features, labels = network()
        wrapped = nsl.keras.AdversarialRegularization(model)
        wrapped.compile("sgd", classes_loss())
        batch = {**features, "label": labels}
        for label, settings in grid(features, iterations=iterations):
            yield (
                f"{network.__name__} {label}",
                functools.partial(wrapped.perturb_on_batch, batch, **settings),
            )


@group("adversarial_loss, float64", "float64")
@group("adversarial_loss, float32", "float32")
def adversarial_losses(dtype):
    """Its value, and its gradient with respect to the weights."""
    use(dtype)

    def run(network, config, given, weighted, graph):
        model, features, labels = network()
        predict, features = predictor(model), tensors(features)
        loss_fn = classes_loss()
        weights = tf.constant(floats(rng(13).uniform(size=(BATCH, 1))))
        weights = weights if weighted else None

        def compute():
            known = {}
            with tf.GradientTape() as outer:
                if given:
                    with tf.GradientTape() as tape:
                        tape.watch(features)
                        predictions = predict(features, training=True)
                        loss = loss_fn(labels, predictions, weights)
                    known = {"gradient_tape": tape}
                    if given == "predictions":
                        known["predictions"] = predictions
                    else:
                        known["labeled_loss"] = loss
                value = nsl.keras.adversarial_loss(
                    features,
                    labels,
                    predict,
                    loss_fn,
                    weights,
                    config,
                    model_kwargs={"training": True},
                    **known,
                )
            return value, outer.gradient(value, model.trainable_variables)

        value, gradients = (tf.function(compute) if graph else compute)()
        return {"loss": value, **dict(enumerate(gradients))}

    # NSL multiplies the weights by ones in float32: they cannot be in float64.
    weightings = (False, True) if dtype == "float32" else (False,)
    for network, norm, times, given, weighted, graph in itertools.product(
        (mlp, cnn, two_inputs),
        NORMS,
        (1, 3),
        (None, "predictions", "labeled_loss"),
        weightings,
        (False, True),
    ):
        if graph and (network is not mlp or given == "predictions"):
            continue
        config = nsl.configs.make_adv_reg_config(
            adv_step_size=STEP,
            adv_grad_norm=norm,
            pgd_iterations=times,
            pgd_epsilon=None if norm == "l1" else 1.5 * STEP,
        )
        label = (
            f"{network.__name__} {norm} {times} given {given or 'nothing'}"
            f"{' weighted' * weighted}{' graph' * graph}"
        )
        yield label, functools.partial(run, network, config, given, weighted, graph)


# Training: one step, then two more, by `fit`.


def optimizer(name):
    if name == "sgd":
        return keras.optimizers.SGD(0.1)
    return keras.optimizers.Adam()


def train(network, optimizer_name, norm, times, compiled, weighted=False):
    model, features, labels = network(3 * BATCH)
    labels = labels if isinstance(labels, dict) else {"label": labels}
    config = nsl.configs.make_adv_reg_config(
        multiplier=0.5,
        adv_step_size=STEP,
        adv_grad_norm=norm,
        pgd_iterations=times,
        pgd_epsilon=None if norm == "l1" else 1.5 * STEP,
    )
    data = {**features, **labels}
    if weighted:
        data["weight"] = floats(rng(14).uniform(size=(3 * BATCH, 1)))
    wrapped = nsl.keras.AdversarialRegularization(
        model, tuple(labels), "weight" if weighted else None, config
    )
    wrapped.compile(optimizer(optimizer_name), **compiled())
    result = {}
    for steps, part in ((1, slice(0, BATCH)), (3, slice(BATCH, 3 * BATCH))):
        batch = {name: value[part] for name, value in data.items()}
        history = wrapped.fit(batch, batch_size=BATCH, shuffle=False, verbose=0)
        for name, value in {**weights_of(model), **history.history}.items():
            result[f"{steps} {name}"] = value
    return result


def one_output():
    return {"loss": classes_loss(), "metrics": ["accuracy"]}


def with_metric_objects():
    return {
        "loss": classes_loss(),
        "metrics": [
            keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="ce"),
            keras.metrics.SparseTopKCategoricalAccuracy(2, name="top2"),
        ],
    }


def outputs_by_name():
    return {
        "loss": {"kind": classes_loss(), "size": "mae"},
        "loss_weights": {"kind": 0.7, "size": 1.3},
        "metrics": ["mse"],
    }


def outputs_by_position():
    return {
        "loss": [classes_loss(), "mean_squared_error"],
        "loss_weights": [0.7, 1.3],
        "metrics": {
            "kind": ["sparse_categorical_accuracy"],
            "size": ["mean_absolute_error"],
        },
    }


def training(cases):
    for network, optimizers, times, norms, compiled, weighted in cases:
        for optimizer_name, iterations, norm in itertools.product(
            optimizers, times, norms
        ):
            yield (
                f"{network.__name__} {optimizer_name} {norm} {iterations} "
                f"{compiled.__name__}",
                functools.partial(
                    train, network, optimizer_name, norm, iterations, compiled, weighted
                ),
            )


@group("fit: weights, logs, metrics, float32")
def training_32():
    use("float32")
    both = ("sgd", "adam")
    yield from training(
        [
            (mlp, both, (1, 3), NORMS, one_output, False),
            (cnn, both, (1,), ("l2", "infinity"), one_output, False),
            (cnn, ("sgd",), (3,), ("l2", "infinity"), one_output, False),
            (two_inputs, both, (1,), NORMS, with_metric_objects, False),
            (two_inputs, ("sgd",), (3,), NORMS, with_metric_objects, False),
        ]
    )


@group("fit: sample weights")
def training_weighted():
    use("float32")
    yield from training([(mlp, ("sgd", "adam"), (1, 3), NORMS, one_output, True)])


@group("fit: two outputs, loss weights")
def training_two_outputs():
    use("float32")
    yield from training(
        [
            (two_outputs, ("sgd", "adam"), (1, 3), NORMS, outputs_by_position, False),
            (two_outputs, ("sgd",), (1,), NORMS, outputs_by_name, False),
        ]
    )


@group("fit: weights, logs, metrics, float64")
def training_64():
    use("float64")
    yield from training([(mlp, ("sgd", "adam"), (1, 3), NORMS, one_output, False)])


def cubed_error(y_true, y_pred):
    return tf.reduce_mean(tf.abs(y_true - y_pred) ** 3, axis=-1)


# A loss, what the network ends in, what its labels are, and metrics.
LOSSES = {
    "mse": ("mse", None, "values", ["mae"]),
    "mae, metrics twice": (
        "mean_absolute_error",
        None,
        "values",
        ["mse", "mean_squared_error"],
    ),
    "summed": (
        lambda: keras.losses.MeanSquaredError(reduction="sum"),
        None,
        "values",
        [],
    ),
    "huber": (lambda: keras.losses.Huber(0.5), None, "values", []),
    "function": (lambda: cubed_error, None, "values", [cubed_error]),
    "one-hot": ("categorical_crossentropy", "softmax", "one-hot", ["accuracy", "ce"]),
    "smoothed": (
        lambda: keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=0.1
        ),
        None,
        "one-hot",
        ["acc"],
    ),
    "sparse": (
        "sparse_categorical_crossentropy",
        "softmax",
        "classes",
        ["accuracy", "crossentropy"],
    ),
    "divergence": ("kl_divergence", "softmax", "one-hot", []),
    "binary": ("binary_crossentropy", "sigmoid", "bits", ["accuracy", "ce"]),
    "binary logits": (
        lambda: keras.losses.BinaryCrossentropy(from_logits=True),
        None,
        "bits",
        [],
    ),
    "hinge": ("hinge", "tanh", "bits", ["acc"]),
    "squared hinge": ("squared_hinge", "sigmoid", "bits", ["accuracy", "ce"]),
}


def other_loss(name, evaluate, weighted):
    """A step of training, or an evaluation, on another loss."""
    loss, activation, kind, metrics = LOSSES[name]
    x = keras.Input((6,), name="values")
    hidden = layers.Dense(8, "tanh", name="hidden")(x)
    model = keras.Model(x, layers.Dense(3, activation, name="scores")(hidden))
    set_weights(model)
    _, batch, classes = mlp()
    batch["label"] = {
        "values": lambda: floats(rng(25).normal(size=(BATCH, 3))),
        "one-hot": lambda: np.eye(3, dtype=keras.backend.floatx())[classes[:, 0]],
        "classes": lambda: classes,
        "bits": lambda: floats(rng(25).integers(2, size=(BATCH, 3))),
    }[kind]()
    if weighted:
        batch["weight"] = floats(rng(26).uniform(size=(BATCH, 1)))
    wrapped = nsl.keras.AdversarialRegularization(
        model,
        ["label"],
        "weight" if weighted else None,
        nsl.configs.make_adv_reg_config(adv_step_size=STEP, adv_grad_norm="l2"),
    )
    wrapped.compile(
        optimizer("sgd"), loss() if callable(loss) else loss, metrics=metrics
    )
    if evaluate:
        values = wrapped.evaluate(batch, verbose=0)
        logs = dict(zip(wrapped.metrics_names, values, strict=True))
        # NSL's `evaluate` attacks, and these are of that: see the defects.
        del logs["loss"]
        logs.pop("scaled_adversarial_loss", None)
        return logs
    return {**wrapped.train_on_batch(batch, return_dict=True), **weights_of(model)}


@group("fit and evaluate: other losses and metrics")
def other_losses():
    use("float32")
    for name, evaluate, weighted in itertools.product(
        LOSSES, (False, True), (False, True)
    ):
        yield (
            f"{name}{' evaluate' * evaluate}{' weighted' * weighted}",
            functools.partial(other_loss, name, evaluate, weighted),
        )


# The arithmetic of `nsl.lib`.


def gradients_like():
    """Rows of several kinds: plain, small, with ties, zero."""
    plain = rng(15).normal(size=(5, 4, 3))
    plain[1] *= 1e-3
    plain[2] = np.round(plain[2])
    plain[3] = 0
    return floats(plain)


@group("lib.normalize")
def normalizing():
    use("float32")
    value = tf.constant(gradients_like())
    for norm in NORMS:
        yield f"{norm} cube", lambda n=norm, v=value: nsl.lib.normalize(v, n)
        yield f"{norm} rows", lambda n=norm, v=value: nsl.lib.normalize(v[:, 0], n)
        kind = nsl.configs.NormType(norm)
        yield f"{norm} enum", lambda n=kind, v=value: nsl.lib.normalize(v, n, 1e-2)


@group("lib.maximize_within_unit_norm")
def maximizing():
    use("float32")
    values = tf.constant(gradients_like())
    nested = {"a": values, "b": {"c": values[:, 0] * 2}}
    for norm in NORMS:
        yield norm, lambda n=norm: nsl.lib.maximize_within_unit_norm(values, n)
        yield (
            f"{norm} nested",
            lambda n=norm: nsl.lib.maximize_within_unit_norm(
                nested, nsl.configs.NormType(n)
            ),
        )


@group("lib.project_to_ball")
def projecting():
    use("float32")
    values = tf.constant(gradients_like())
    structure = [values, {"b": values[:, 0] * 2}]
    # Inside, on, and outside: some rows for each radius.
    for norm, radius in itertools.product(("l2", "infinity"), (0.01, 1.0, 3.0, 100.0)):
        kind = nsl.configs.NormType(norm)
        yield (
            f"{norm} {radius}",
            lambda k=kind, r=radius: nsl.lib.project_to_ball(values, r, k),
        )
        yield (
            f"{norm} {radius} nested",
            lambda k=kind, r=radius: nsl.lib.project_to_ball(structure, r, k),
        )


@group("lib.get_target_indices")
def targets():
    use("float32")
    logits, labels = floats(rng(16).normal(size=(9, 5))), np.arange(9) % 5
    kinds = nsl.configs.AdvTargetType
    for kind in (kinds.SECOND, kinds.LEAST, kinds.GROUND_TRUTH):
        config = nsl.configs.AdvTargetConfig(target_method=kind)
        yield (
            kind.value,
            lambda c=config: nsl.lib.get_target_indices(logits, tf.constant(labels), c),
        )


@group("lib.apply_feature_mask")
def masking():
    use("float32")
    values = tf.constant(gradients_like())
    for name, mask in {
        "none": None,
        "number": 0.5,
        "row": floats([0, 0.5, 1]),
        "cube": floats(rng(17).uniform(size=(4, 3))),
    }.items():
        yield name, lambda m=mask: nsl.lib.apply_feature_mask(values, m)


@group("lib.decay_over_time")
def decaying():
    """In a graph: in eager code NSL's does not work, which is one of the defects."""
    use("float32")
    for kind, step, least, start in itertools.product(
        nsl.configs.DecayType, (0, 1, 7, 100), (0.0, 0.3), (1.0, 2.5)
    ):
        config = nsl.configs.DecayConfig(10, 0.9, least, kind)
        decay = functools.partial(
            nsl.lib.decay_over_time, step, config, init_value=start
        )
        yield f"{kind.value} {step} {least} {start}", tf.function(decay)


REDUCTIONS = (
    "NONE",
    "SUM",
    "MEAN",
    "SUM_OVER_BATCH_SIZE",
    "SUM_BY_NONZERO_WEIGHTS",
)


@group("lib.pairwise_distance_wrapper")
def distances():
    """The distance, and its gradient with respect to the second argument."""
    use("float32")
    logits = floats(rng(18).normal(size=(2, 6, 4)))
    # Most distances tell probabilities from logits.
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    some = floats(rng(19).uniform(size=(6, 1)))
    some[2] = 0

    def run(values, weights, config):
        sources, targets = tf.constant(values[0]), tf.constant(values[1])
        with tf.GradientTape() as tape:
            tape.watch(targets)
            distance = nsl.lib.pairwise_distance_wrapper(
                sources, targets, weights, config
            )
        return {"distance": distance, "gradient": tape.gradient(distance, targets)}

    for kind, reduction, axis, transform, weighted in itertools.product(
        nsl.configs.DistanceType,
        REDUCTIONS,
        (None, -1, 1),
        ("none", "softmax"),
        (False, True),
    ):
        if axis is None and kind.value not in ("l1", "l2"):
            continue  # The others need an axis.
        config = nsl.configs.DistanceConfig(
            kind,
            getattr(tf.compat.v1.losses.Reduction, reduction),
            axis,
            transform,
        )
        values = probabilities if transform == "none" else logits
        yield (
            f"{kind.value} {reduction} {axis} {transform}{' weighted' * weighted}",
            functools.partial(run, values, some if weighted else 1.0, config),
        )
    yield (
        "default",
        lambda: nsl.lib.pairwise_distance_wrapper(
            tf.constant(logits[0]), tf.constant(logits[1])
        ),
    )


@group("lib.kl_divergence, jensen_shannon_divergence")
def divergences():
    use("float32")
    logits = floats(rng(20).normal(size=(2, 6, 4)))
    p, q = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    weights = floats(rng(21).uniform(size=(6, 1)))
    for name, reduction, weight in itertools.product(
        ("kl_divergence", "jensen_shannon_divergence"), REDUCTIONS, (1.0, weights)
    ):
        yield (
            f"{name} {reduction} {np.shape(weight)}",
            lambda n=name, r=reduction, w=weight: getattr(nsl.lib, n)(
                tf.constant(p),
                tf.constant(q),
                axis=-1,
                weights=w,
                reduction=getattr(tf.compat.v1.losses.Reduction, r),
            ),
        )


@group("lib.adv_regularizer")
def regularizing():
    use("float32")
    model, features, labels = mlp()

    def logits(x, is_train, reuse):
        assert reuse is True
        assert not bool(is_train)
        return model(x)

    yield (
        "mlp",
        lambda: nsl.lib.adv_regularizer(
            tf.constant(features["values"]), labels, logits, classes_loss()
        ),
    )


@group("lib.virtual_adv_regularizer, float64")
def virtually_regularizing():
    """Its value and its gradient, from the same direction to start with.

    NSL takes distances in float32, whatever the input: the difference has to be large,
    or what the finite differences tell would be noise.
    """
    use("float64")
    model, features, _ = mlp()
    x = tf.constant(features["values"])

    def run(config, given):
        with same_start(), tf.GradientTape() as tape:
            known = model(x) if given else None
            value = nsl.lib.virtual_adv_regularizer(x, model, config, known)
        return {
            "loss": value,
            **dict(enumerate(tape.gradient(value, model.trainable_variables))),
        }

    distances = {
        "l2": nsl.configs.DistanceConfig(),
        "kl": nsl.configs.DistanceConfig(
            "kl_divergence", sum_over_axis=-1, transform_fn="softmax"
        ),
    }
    for norm, steps, masked, given, (name, distance) in itertools.product(
        NORMS, (1, 3), (False, True), (False, True), distances.items()
    ):
        config = nsl.configs.VirtualAdvConfig(
            nsl.configs.AdvNeighborConfig(
                feature_mask=masks(features)["values"] if masked else None,
                adv_step_size=STEP,
                adv_grad_norm=norm,
            ),
            distance,
            num_approx_steps=steps,
            approx_difference=STEP,
        )
        yield (
            f"{norm} {steps} {name}{' mask' * masked}{' given' * given}",
            functools.partial(run, config, given),
        )


def same_start():
    """Lets `tf.random.normal`, which the first direction is drawn by, repeat itself."""

    def draw(shape, **kwargs):
        return tf.constant(floats(rng(22).normal(size=[int(size) for size in shape])))

    return mock.patch.object(tf.random, "normal", draw)


# Random starts come from other generators: their law is compared, not their values.

RADIUS, DRAWS = 0.3, 4000


def random_starts():
    """The norms of draws from a ball, as parts of the radius, for each norm."""
    use("float32")
    shapes = {"a": (DRAWS, 3), "b": (DRAWS, 2, 2)}
    features = {name: tf.zeros(shape) for name, shape in shapes.items()}
    dimensions = sum(int(np.prod(shape[1:])) for shape in shapes.values())
    orders = {"l1": 1, "l2": 2, "infinity": np.inf}
    result = {}
    for norm, order in orders.items():
        drawn = nsl.lib.random_in_norm_ball(features, RADIUS, norm)
        rows = np.concatenate(
            [np.reshape(drawn[name], (DRAWS, -1)) for name in shapes], axis=1
        )
        assert rows.shape[1] == dimensions
        result[norm] = np.linalg.norm(rows, order, axis=1) / RADIUS
    return result


# Where NSL's defects are mended. Each yields what is measured, what it should be, and a
# function that measures it.

DEFECTS = {}


def defect(name, expected, tolerance=1e-6):
    def register(measure):
        DEFECTS[name] = (expected, tolerance, measure)
        return measure

    return register


def wrapped_mlp(rows=BATCH, compiled=None, weight=None, **settings):
    """A compiled wrapper of the MLP, its batch, and its settings."""
    model, features, labels = mlp(rows)
    config = nsl.configs.make_adv_reg_config(**{"adv_step_size": STEP, **settings})
    wrapped = nsl.keras.AdversarialRegularization(
        model, ("label",), weight, adv_config=config
    )
    wrapped.compile("sgd", **(compiled or {"loss": classes_loss()}))
    return wrapped, {**features, "label": labels}


def movement(found, batch):
    """How far each value of each example moved."""
    return np.abs(np.asarray(found["values"]) - batch["values"])


def clean_losses():
    """The loss of each example, in float64."""
    model, features, labels = mlp()
    logits = np.asarray(model(features["values"]), "float64")
    return np.log(np.exp(logits).sum(1)) - logits[np.arange(BATCH), labels[:, 0]]


@defect("a scalar clip_value_max=0.9: largest perturbed value", lambda: 0.9)
def scalar_clip():
    wrapped, batch = wrapped_mlp()
    found = wrapped.perturb_on_batch(
        batch, adv_step_size=5.0, clip_value_min=0.1, clip_value_max=0.9
    )
    return np.max(found["values"])


@defect("a scalar feature_mask=0: largest movement", lambda: 0.0)
def scalar_mask():
    wrapped, batch = wrapped_mlp()
    return np.max(movement(wrapped.perturb_on_batch(batch, feature_mask=0.0), batch))


@defect("a masked value out of range: its movement", lambda: 0.0)
def masked_out_of_range():
    wrapped, batch = wrapped_mlp()
    mask = floats([0, 1, 1, 1, 1, 1])
    found = wrapped.perturb_on_batch(
        batch,
        feature_mask={"values": mask},
        clip_value_min={"values": floats(0.5)},
    )
    return np.max(movement(found, batch)[:, 0])


@defect(
    "sample weights of shape [batch]: labelled loss",
    lambda: np.mean(rng(23).uniform(size=BATCH) * clean_losses()),
)
def weights_of_one_axis():
    wrapped, batch = wrapped_mlp(weight="weight", multiplier=0.0)
    batch["weight"] = floats(rng(23).uniform(size=BATCH))
    return wrapped.train_on_batch(batch, return_dict=True)["loss"]


@defect(
    "adversarial_loss, weights of shape [batch], no step: loss",
    lambda: np.mean(rng(23).uniform(size=BATCH) * clean_losses()),
)
def loss_with_weights_of_one_axis():
    model, features, labels = mlp()
    return nsl.keras.adversarial_loss(
        tensors(features),
        labels,
        predictor(model),
        classes_loss(),
        tf.constant(floats(rng(23).uniform(size=BATCH))),
        nsl.configs.make_adv_reg_config(adv_step_size=0.0),
    )


def step_of_scaled_loss(scale, dtype="float32"):
    """A step along the gradient of a scaled loss: its largest L2 norm."""
    x = tf.constant(rng(24).uniform(size=(BATCH, 6)), dtype)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(x * tf.cast(tf.range(1, 7), dtype)) * scale
    found, _ = nsl.lib.gen_adv_neighbor(
        x,
        loss,
        nsl.configs.AdvNeighborConfig(adv_step_size=1.0),
        gradient_tape=tape,
    )
    return np.max(np.linalg.norm(np.asarray(found - x, "float64"), axis=1))


@defect("gradients near 1e-8, L2 step of 1: norm of the step", lambda: 1.0)
def small_gradients():
    return step_of_scaled_loss(1e-9)


@defect("float16, gradient 0: norm of the step", lambda: 0.0)
def float16_zero_gradient():
    return step_of_scaled_loss(0.0, "float16")


@defect("evaluate: loss", lambda: np.mean(clean_losses()))
def evaluated_loss():
    wrapped, batch = wrapped_mlp()
    return wrapped.evaluate(batch, batch_size=BATCH, verbose=0, return_dict=True)[
        "loss"
    ]


@defect("BatchNorm, PGD-3: updates of its statistics in one step", lambda: 2.0)
def statistics_updates():
    """How often one training step moved the statistics of a BatchNorm.

    Perturbations are too small to change the mean of the batch: `n` updates take the
    moving mean from 0 to `(1 - 0.99 ** n)` of it.
    """
    x = keras.Input((6,), name="values")
    normal = layers.BatchNormalization(name="normal")
    model = keras.Model(x, layers.Dense(3, name="logits")(normal(x)))
    set_weights(model)
    normal.set_weights([floats(np.full(6, value)) for value in (1, 0, 0, 1)])
    config = nsl.configs.make_adv_reg_config(
        adv_step_size=1e-6, pgd_iterations=3, multiplier=0.1
    )
    wrapped = nsl.keras.AdversarialRegularization(model, adv_config=config)
    wrapped.compile("sgd", classes_loss())
    _, features, labels = mlp()
    wrapped.train_on_batch({**features, "label": labels})
    moved = np.asarray(normal.moving_mean) / features["values"].mean(0)
    return np.round(np.log(1 - np.mean(moved)) / np.log(0.99), 2)


def own_loss(multiplier):
    """How often a loss that the model adds itself counts in the total."""
    x = keras.Input((6,), name="values")
    hidden = layers.Dense(
        3, name="logits", activity_regularizer=keras.regularizers.L1(1)
    )
    model = set_weights(keras.Model(x, hidden(x)))
    config = nsl.configs.make_adv_reg_config(adv_step_size=1e-7, multiplier=multiplier)
    wrapped = nsl.keras.AdversarialRegularization(model, adv_config=config)
    wrapped.compile("sgd", classes_loss())
    _, features, labels = mlp()
    logits = model(features["values"])
    labeled = (1 + multiplier) * classes_loss()(labels, logits)
    logs = wrapped.train_on_batch({**features, "label": labels}, return_dict=True)
    own = np.sum(np.abs(logits)) / BATCH
    return np.round((logs["loss"] - labeled) / own, 3)


@defect("a loss of the model's own, FGSM: how often it counts", lambda: 1.0)
def own_loss_of_fgsm():
    return own_loss(0.5)


@defect("a loss of the model's own, multiplier 0: how often", lambda: 1.0)
def own_loss_alone():
    return own_loss(0.0)


@defect("L1 with pgd_epsilon 0.15, three steps of 0.1: L1 norm", lambda: 0.15)
def l1_projection():
    wrapped, batch = wrapped_mlp(adv_grad_norm="l1", pgd_iterations=3)
    found = wrapped.perturb_on_batch(batch, pgd_epsilon=0.15)
    return np.max(movement(found, batch).sum(1))


@defect("pgd_epsilon=None overrides 0.01: largest movement", lambda: STEP)
def override_by_none():
    wrapped, batch = wrapped_mlp(adv_grad_norm="infinity", pgd_epsilon=0.01)
    found = wrapped.perturb_on_batch(batch, pgd_epsilon=None)
    return np.max(movement(found, batch))


@defect("random_init: largest movement of masked values", lambda: 0.0)
def random_start_of_masked():
    wrapped, batch = wrapped_mlp(random_init=True, pgd_epsilon=STEP)
    mask = {"values": floats([0, 0, 0, 1, 1, 1])}
    found = wrapped.perturb_on_batch(batch, feature_mask=mask)
    return np.max(movement(found, batch)[:, :3])


@defect("random_init, batch size unknown to the graph: steps of fit", lambda: 2.0)
def random_start_of_unknown_batch():
    wrapped, batch = wrapped_mlp(random_init=True)
    dataset = tf.data.Dataset.from_tensor_slices(batch).batch(5)
    wrapped.fit(dataset, verbose=0)
    return wrapped.optimizer.iterations


@defect("an example of weight 0, PGD-3: largest movement", lambda: 0.0)
def example_without_weight():
    wrapped, batch = wrapped_mlp(weight="weight", pgd_iterations=3)
    batch["weight"] = floats([[0]] + [[1]] * (BATCH - 1))
    return np.max(movement(wrapped.perturb_on_batch(batch), batch)[0])


@defect("images of type uint8, a step of 1: largest movement", lambda: 1.0)
def eight_bits():
    model, features, labels = cnn()
    wrapped = nsl.keras.AdversarialRegularization(model)
    wrapped.compile("sgd", classes_loss())
    images = np.round(255 * features["image"]).astype("uint8")
    found = wrapped.perturb_on_batch(
        {"image": images, "label": labels}, adv_step_size=1.0, adv_grad_norm="infinity"
    )
    return np.max(np.abs(np.asarray(found["image"], "float32") - images))


@defect("examples that perturb_on_batch leaves in a metric", lambda: 0.0)
def metrics_of_perturbing():
    metric = keras.metrics.MeanAbsoluteError()
    wrapped, batch = wrapped_mlp(compiled={"loss": "mse", "metrics": [metric]})
    wrapped.evaluate(batch, verbose=0)
    metric.reset_state()
    wrapped.perturb_on_batch(batch)
    return metric.count


@defect("a mask in float64, as NumPy makes it: largest movement", lambda: STEP)
def float64_mask():
    wrapped, batch = wrapped_mlp(adv_grad_norm="infinity")
    mask = {"values": np.array([0.0, 1, 1, 1, 1, 1])}
    return np.max(movement(wrapped.perturb_on_batch(batch, feature_mask=mask), batch))


@defect("decay_over_time in eager code: 0.96 after one of one steps", lambda: 0.96)
def eager_decay():
    return nsl.lib.decay_over_time(1, nsl.configs.DecayConfig(1))


@defect("fit(x, y): steps", lambda: 1.0)
def fit_on_pairs():
    wrapped, batch = wrapped_mlp()
    wrapped.fit(batch["values"], batch["label"], batch_size=BATCH, verbose=0)
    return wrapped.optimizer.iterations


@defect("predict without labels: rows", lambda: float(BATCH))
def predict_without_labels():
    wrapped, batch = wrapped_mlp()
    wrapped.evaluate(batch, verbose=0)
    return len(wrapped.predict({"values": batch["values"]}, verbose=0))


def first_line(error):
    """What an error says, short enough for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # An error from inside a `tf.function` begins with where it was.
    told = [line for line in lines if type(error).__name__ in line] or lines
    text = re.sub(r"{{.*?}} ", "", told[-1] if told else "")
    return f"{type(error).__name__}: {text.split('Error: ')[-1]}"


def measure(function):
    """Calls a function: its arrays by name, or its error under the name `error`."""
    try:
        found = function()
        if not isinstance(found, dict):
            found = {"": found}
        return {name: np.asarray(value) for name, value in leaves_of(found)}
    except Exception as error:
        if DEBUG:
            raise
        return {"error": np.array(first_line(error))}


def leaves_of(value, prefix=""):
    """The leaves of nested dictionaries and lists, with the path to each."""
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        yield prefix, value
        return
    for name, child in value.items():
        yield from leaves_of(child, f"{prefix}/{name}" if prefix else str(name))


DEBUG = False


def collect(only):
    """Runs the cases; keys are the kind, the group, the case and the part."""
    keras.utils.set_random_seed(0)
    found = {("library", nsl.__name__, "", ""): np.array(tf.__version__)}
    for name, cases in GROUPS.items():
        if only in name:
            for case, function in cases():
                for part, value in measure(function).items():
                    found["case", name, case, part] = value
    if only in "random starts":
        for norm, radii in measure(random_starts).items():
            found["start", norm, "", ""] = radii
    use("float32")
    for name, (expected, tolerance, function) in DEFECTS.items():
        if only in "defects":
            for part, value in measure(function).items():
                found["defect", name, "", part] = value
            found["defect", name, "", "expected"] = np.array(expected())
            found["defect", name, "", "tolerance"] = np.array(tolerance)
    return {"\t".join(key): value for key, value in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="the .npz file to write")
    parser.add_argument("--only", default="", help="a part of the names of groups")
    arguments = parser.parse_args()
    with open(arguments.output, "wb") as file:
        np.savez(file, **collect(arguments.only))


if __name__ == "__main__":
    main()
