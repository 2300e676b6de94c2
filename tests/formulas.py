"""The objectives of training once more, in float64, from the formulas of their papers.

Probabilities are written out, and the network is made of matrices: nothing of the
formulas is Keras's or advreg's. Below them is what runs advreg on the same network.
"""

import dataclasses

import keras
import numpy as np
import tensorflow as tf
from keras import layers, losses
from models import regularized, rows
from oracle import project, steepest

from advreg import make_adv_reg_config

BATCH, WIDTH, CLASSES = 7, 4, 3
INPUT = rows(BATCH, WIDTH).astype("float64")
LABELS = np.random.default_rng(1).integers(0, CLASSES, BATCH)
WEIGHTS = np.array([0.5, 2.0, 0.0, 1.0, 3.0, 0.0, 0.25])
START = np.random.default_rng(2).uniform(-1, 1, (BATCH, WIDTH))


def network(weights, x):
    first, bias, last, shift = weights
    return tf.tanh(x @ first + bias) @ last + shift


def two_classes(scores):
    """A single score tells two classes apart."""
    if scores.shape[-1] > 1:
        return scores
    return tf.concat([tf.zeros_like(scores), scores], -1)


def probabilities(logits):
    odds = tf.exp(logits - tf.reduce_max(logits, -1, keepdims=True))
    return odds / tf.reduce_sum(odds, -1, keepdims=True)


def surprise(logits, truth):
    return -tf.math.log(tf.reduce_sum(truth * probabilities(logits), -1))


def divergence(clean, moved):
    p, q = probabilities(clean), probabilities(moved)
    return tf.reduce_sum(p * (tf.math.log(p) - tf.math.log(q)), -1)


def boosted(moved, truth):
    q = probabilities(moved)
    best = tf.reduce_max(q * (1 - truth), -1)
    return surprise(moved, truth) - tf.math.log(1 - best)


def labeled_loss(clean, moved, truth):
    return surprise(moved, truth)


def trades(clean, moved, truth):
    return divergence(clean, moved)


def mart(clean, moved, truth):
    sure = tf.reduce_sum(truth * probabilities(clean), -1)
    return boosted(moved, truth) + 5.0 * divergence(clean, moved) * (1 - sure)


def virtual_adversarial(clean, moved, truth):
    return divergence(tf.stop_gradient(clean), moved)


def logit_pairing(clean, moved, truth):
    distance = tf.reduce_mean((clean - moved) ** 2, -1)
    return surprise(moved, truth) + 0.5 * distance


TERMS = {
    "labeled_loss": labeled_loss,
    "trades": trades,
    "mart": mart,
    "virtual_adversarial": virtual_adversarial,
    "logit_pairing": logit_pairing,
}
ATTACKS = {"trades": divergence, "virtual_adversarial": divergence}


@dataclasses.dataclass
class Recipe:
    """One step of training, all of it.

    `start` holds what a random start draws: one row for each example.
    """

    name: str
    start: np.ndarray
    init_radius: float = 0.05
    power_iterations: int = 0
    step: float = 0.1
    radius: float = 0.2
    iterations: int = 3
    multiplier: float = 0.75
    clean_weight: float = 1.0
    gamma: float = 0.0
    norm: str = "infinity"
    low: float = -1.5
    high: float = 1.5

    def config(self):
        """The arguments of `make_adv_reg_config` that say the same."""
        return {
            "objective": self.name,
            "init_radius": self.init_radius,
            "power_iterations": self.power_iterations,
            "random_init": True,
            "adv_step_size": self.step,
            "pgd_epsilon": self.radius,
            "pgd_iterations": self.iterations,
            "multiplier": self.multiplier,
            "clean_weight": self.clean_weight,
            "weight_perturbation": self.gamma,
            "adv_grad_norm": self.norm,
            "clip_value_min": self.low,
            "clip_value_max": self.high,
        }

    def perturbed(self, weights, x, truth, sample_weight=None, logits=network):
        """The loop of the attack; examples without weight stay, unless all count."""
        clean = two_classes(logits(weights, x))
        moves = np.ones((len(x), 1))
        if sample_weight is not None and self.name != "virtual_adversarial":
            moves = np.reshape(sample_weight, (-1, 1)) != 0
        moved = np.clip(x + self.init_radius * self.start * moves, self.low, self.high)
        for iteration in range(self.power_iterations + self.iterations):
            point = tf.constant(moved)
            with tf.GradientTape() as tape:
                tape.watch(point)
                there = two_classes(logits(weights, point))
                if self.name in ATTACKS:
                    loss = tf.reduce_sum(ATTACKS[self.name](clean, there))
                else:
                    loss = tf.reduce_sum(surprise(there, truth))
            gradient = tape.gradient(loss, point).numpy() * moves
            if iteration < self.power_iterations:
                moved = self.init_radius * steepest(gradient, self.norm)
            else:
                moved = moved - x + self.step * steepest(gradient, self.norm)
            moved = np.clip(x + project(moved, self.radius, self.norm), -1.5, 1.5)
            moved = np.where(moves, moved, x)
        return moved

    def term(self, weights, x, x_adv, truth, sample_weight=None, logits=network):
        """The adversarial term, with its weight."""
        clean, moved = (two_classes(logits(weights, at)) for at in (x, x_adv))
        values = TERMS[self.name](clean, moved, truth)
        if sample_weight is not None and self.name != "virtual_adversarial":
            values = values * np.reshape(sample_weight, -1)
        return self.multiplier * tf.reduce_mean(values)

    def labeled(self, weights, x, truth, sample_weight=None, logits=network):
        """The labelled loss on clean features."""
        values = surprise(two_classes(logits(weights, x)), truth)
        if sample_weight is not None:
            values = values * np.reshape(sample_weight, -1)
        return tf.reduce_mean(values)

    def gradients(self, weights, x, truth, sample_weight=None, logits=network):
        """The gradients of the total loss, and the losses that `fit` logs."""
        weights = [tf.constant(w) for w in weights]
        x_adv = self.perturbed(weights, x, truth, sample_weight, logits)
        more = (truth, sample_weight, logits)
        there = self.moved_weights(weights, x, x_adv, *more)
        # Where the loss compares predictions, both are those of the moved weights.
        clean_at = weights if self.name == "labeled_loss" else there
        with tf.GradientTape(persistent=True) as tape:
            tape.watch([*weights, *there])
            labeled = self.labeled(clean_at, x, *more)
            term = self.term(there, x, x_adv, *more)
            total = self.clean_weight * labeled + term
        found = []
        for here, moved in zip(weights, there, strict=True):
            parts = tape.gradient(
                total, [here] if here is moved else [here, moved], None
            )
            found.append(sum(part.numpy() for part in parts if part is not None))
        losses = {
            "loss": total,
            "labeled_loss": labeled,
            "scaled_adversarial_loss": term,
        }
        return found, {name: float(value) for name, value in losses.items()}

    def moved_weights(self, weights, x, x_adv, *more):
        """Wu et al., 2020: each kernel by gamma times its norm, along its gradient."""
        if not self.gamma:
            return weights
        with tf.GradientTape() as tape:
            tape.watch(weights)
            term = self.term(weights, x, x_adv, *more)
            if self.name != "labeled_loss":
                term += self.clean_weight * self.labeled(weights, x, *more)
        return [
            w + self.gamma * tf.norm(w) * g / tf.norm(g)
            if len(w.shape) > 1
            else w + 0.0
            for w, g in zip(weights, tape.gradient(term, weights), strict=True)
        ]


# --- The same by advreg


def base_of(activation=None, units=CLASSES):
    stack = [
        layers.Dense(5, "tanh", bias_initializer="normal", dtype="float64"),
        layers.Dense(
            units, activation, bias_initializer="normal", dtype="float64", name="last"
        ),
    ]
    return keras.Sequential([keras.Input((WIDTH,), dtype="float64"), *stack])


def exact_cross_entropy(**kwargs):
    kwargs.setdefault("from_logits", True)
    return losses.SparseCategoricalCrossentropy(dtype="float64", **kwargs)


def step(base, recipe, y, loss, sample_weight=None, x=INPUT, **mode):
    """Gradients and logs of one step, whose learning rate is 1."""
    before = base.get_weights()
    config = make_adv_reg_config(**recipe.config())
    sgd = keras.optimizers.SGD(1.0)
    model = regularized(base, config, loss, sgd, **mode)
    logs = model.train_on_batch(x, y, sample_weight, return_dict=True)
    pairs = zip(before, base.get_weights(), strict=True)
    return [old - new for old, new in pairs], logs


def assert_same(got, expected, rtol=1e-9):
    (gradients, logs), (wanted, values) = got, expected
    for a, b in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol, 1e-3 * rtol)
    for name, value in values.items():  # They are kept in float32.
        np.testing.assert_allclose(logs[name], value, 1e-5, err_msg=name)
