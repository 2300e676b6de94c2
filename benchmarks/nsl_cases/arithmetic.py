"""The arithmetic of `nsl.lib`."""

import functools
import itertools
from unittest import mock

import numpy as np
import tensorflow as tf

from nsl_cases.common import NORMS, STEP, Groups, floats, nsl, rng
from nsl_cases.networks import classes_loss, mlp
from nsl_cases.perturbing import masks

GROUPS = Groups()


def gradients_like():
    """Rows of several kinds: plain, small, with ties, zero."""
    plain = rng(15).normal(size=(5, 4, 3))
    plain[1] *= 1e-3
    plain[2] = np.round(plain[2])
    plain[3] = 0
    return floats(plain)


@GROUPS.add("lib.normalize")
def normalizing():
    value = tf.constant(gradients_like())
    for norm in NORMS:
        yield f"{norm} cube", lambda n=norm, v=value: nsl.lib.normalize(v, n)
        yield f"{norm} rows", lambda n=norm, v=value: nsl.lib.normalize(v[:, 0], n)
        kind = nsl.configs.NormType(norm)
        yield f"{norm} enum", lambda n=kind, v=value: nsl.lib.normalize(v, n, 1e-2)


@GROUPS.add("lib.maximize_within_unit_norm")
def maximizing():
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


@GROUPS.add("lib.project_to_ball")
def projecting():
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


@GROUPS.add("lib.get_target_indices")
def targets():
    logits, labels = floats(rng(16).normal(size=(9, 5))), np.arange(9) % 5
    kinds = nsl.configs.AdvTargetType
    for kind in (kinds.SECOND, kinds.LEAST, kinds.GROUND_TRUTH):
        config = nsl.configs.AdvTargetConfig(target_method=kind)
        yield (
            kind.value,
            lambda c=config: nsl.lib.get_target_indices(logits, tf.constant(labels), c),
        )


@GROUPS.add("lib.apply_feature_mask")
def masking():
    values = tf.constant(gradients_like())
    for name, mask in {
        "none": None,
        "number": 0.5,
        "row": floats([0, 0.5, 1]),
        "cube": floats(rng(17).uniform(size=(4, 3))),
    }.items():
        yield name, lambda m=mask: nsl.lib.apply_feature_mask(values, m)


@GROUPS.add("lib.decay_over_time")
def decaying():
    """In a graph: in eager code NSL's does not work, which is one of the defects."""
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


@GROUPS.add("lib.pairwise_distance_wrapper")
def distances():
    """The distance, and its gradient with respect to the second argument."""
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


@GROUPS.add("lib.kl_divergence, jensen_shannon_divergence")
def divergences():
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


@GROUPS.add("lib.adv_regularizer")
def regularizing():
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


@GROUPS.add("lib.virtual_adv_regularizer, float64", "float64")
def virtually_regularizing():
    """Its value and its gradient, from the same direction to start with.

    NSL takes distances in float32, whatever the input: the difference has to be large,
    or what the finite differences tell would be noise.
    """
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
