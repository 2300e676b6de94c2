"""Perturbations, and the loss at them."""

import functools
import itertools

import keras
import numpy as np
import tensorflow as tf

from nsl_cases.common import BATCH, NORMS, STEP, Groups, floats, nsl, rng
from nsl_cases.networks import (
    classes_loss,
    cnn,
    mlp,
    predictor,
    tensors,
    tree_floats,
    two_inputs,
)

GROUPS = Groups()

# The grid of perturbations.


def grid(features, iterations=(1, 3, 10)):
    """Yields a label and the fields of `AdvNeighborConfig`, for each combination."""
    for norm, times, bounded, masked, clipped in itertools.product(
        NORMS, iterations, (False, True), (False, True), (False, True)
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


def neighbor(network, settings):
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
    )
    return {**found, "weights": weights}


@GROUPS.add("gen_adv_neighbor, float64", "float64")
@GROUPS.add("gen_adv_neighbor, float32", "float32")
def neighbors():
    for network in (mlp, cnn, two_inputs):
        _, features, _ = network()
        for label, settings in grid(features):
            yield (
                f"{network.__name__} {label}",
                functools.partial(neighbor, network, settings),
            )


@GROUPS.add("gen_adv_neighbor: structures, types, graphs")
def neighbor_forms():
    """Other structures than dictionaries of floats, and code inside `tf.function`."""
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


@GROUPS.add("perturb_on_batch, float32")
def batches():
    """One model of each network, and overrides; labels come back too."""
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


@GROUPS.add("adversarial_loss, float64", "float64")
@GROUPS.add("adversarial_loss, float32", "float32")
def adversarial_losses():
    """Its value, and its gradient with respect to the weights."""

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
    weightings = (False, True) if keras.backend.floatx() == "float32" else (False,)
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
