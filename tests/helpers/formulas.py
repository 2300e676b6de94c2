"""The objectives of training once more, in float64, from the formulas of their papers.

Probabilities are written out, and the network is made of matrices: nothing of the
formulas is Keras's or advreg's. Below them is what runs advreg on the same network.
"""

import dataclasses

import keras
import numpy as np
from keras import layers, losses, ops

from advreg import make_adv_reg_config
from helpers.backends import BACKEND, array, gradient_of, gradients_of, tensor
from helpers.models import regularized, rows
from helpers.oracle import project, steepest

BATCH, WIDTH, CLASSES = 7, 4, 3
INPUT = np.clip(rows(BATCH, WIDTH), -1.4, 1.4).astype("float64")  # In the range.
LABELS = np.random.default_rng(1).integers(0, CLASSES, BATCH)
WEIGHTS = np.array([0.5, 2.0, 0.0, 1.0, 3.0, 0.0, 0.25])
START = np.random.default_rng(2).uniform(-1, 1, (BATCH, WIDTH))


def network(weights, x):
    first, bias, last, shift = weights
    return ops.tanh(tensor(x) @ first + bias) @ last + shift


def two_classes(scores):
    """A single score tells two classes apart."""
    if scores.shape[-1] > 1:
        return scores
    return ops.concatenate([ops.zeros_like(scores), scores], -1)


def probabilities(logits):
    odds = ops.exp(logits - ops.max(logits, -1, keepdims=True))
    return odds / ops.sum(odds, -1, keepdims=True)


def surprise(logits, truth):
    return -ops.log(ops.sum(truth * probabilities(logits), -1))


def divergence(clean, moved):
    p, q = probabilities(clean), probabilities(moved)
    return ops.sum(p * (ops.log(p) - ops.log(q)), -1)


def boosted(moved, truth):
    q = probabilities(moved)
    best = ops.max(q * (1 - truth), -1)
    return surprise(moved, truth) - ops.log(1 - best)


def labeled_loss(clean, moved, truth):
    return surprise(moved, truth)


def trades(clean, moved, truth):
    return divergence(clean, moved)


def mart(clean, moved, truth):
    sure = ops.sum(truth * probabilities(clean), -1)
    return boosted(moved, truth) + 5.0 * divergence(clean, moved) * (1 - sure)


def virtual_adversarial(clean, moved, truth):
    return divergence(ops.stop_gradient(clean), moved)


def logit_pairing(clean, moved, truth):
    distance = ops.mean((clean - moved) ** 2, -1)
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
        counting = np.ones((len(x), 1))
        if sample_weight is not None and self.name != "virtual_adversarial":
            counting = np.reshape(sample_weight, (-1, 1)) != 0
        moved = np.clip(
            x + self.init_radius * self.start * counting, self.low, self.high
        )
        for iteration in range(self.power_iterations + self.iterations):

            def loss(point):
                there = two_classes(logits(weights, point))
                if self.name in ATTACKS:
                    return ATTACKS[self.name](clean, there)
                return surprise(there, tensor(truth))

            gradient = array(gradient_of(loss, tensor(moved))) * counting
            if iteration < self.power_iterations:
                moved = self.init_radius * steepest(gradient, self.norm)
            else:
                moved = moved - x + self.step * steepest(gradient, self.norm)
            moved = np.clip(x + project(moved, self.radius, self.norm), -1.5, 1.5)
            moved = np.where(counting, moved, x)
        return moved

    def term(self, weights, x, x_adv, truth, sample_weight=None, logits=network):
        """The adversarial term, with its weight."""
        clean, moved = (two_classes(logits(weights, at)) for at in (x, x_adv))
        values = TERMS[self.name](clean, moved, tensor(truth))
        if sample_weight is not None and self.name != "virtual_adversarial":
            values = values * tensor(np.reshape(sample_weight, -1))
        return self.multiplier * ops.mean(values)

    def labeled(self, weights, x, truth, sample_weight=None, logits=network):
        """The labelled loss on clean features."""
        values = surprise(two_classes(logits(weights, x)), tensor(truth))
        if sample_weight is not None:
            values = values * tensor(np.reshape(sample_weight, -1))
        return ops.mean(values)

    def gradients(self, weights, x, truth, sample_weight=None, logits=network):
        """The gradients of the total loss, and the losses that `fit` logs."""
        weights = [tensor(w) for w in weights]
        x_adv = self.perturbed(weights, x, truth, sample_weight, logits)
        more = (truth, sample_weight, logits)
        there = self.moved_weights(weights, x, x_adv, *more)

        def losses(here, there):
            # Where the loss compares predictions, both are those of the moved weights.
            clean_at = here if self.name == "labeled_loss" else there
            labeled = self.labeled(clean_at, x, *more)
            term = self.term(there, x, x_adv, *more)
            return self.clean_weight * labeled + term, labeled, term

        def total(both):
            return losses(both[: len(weights)], both[len(weights) :])[0]

        # The moved weights are constants in their difference from the others.
        parts = [array(part) for part in gradients_of(total, [*weights, *there])]
        found = [a + b for a, b in zip(parts, parts[len(weights) :], strict=False)]
        names = ("loss", "labeled_loss", "scaled_adversarial_loss")
        values = zip(names, losses(weights, there), strict=True)
        return found, {name: float(value) for name, value in values}

    def moved_weights(self, weights, x, x_adv, *more):
        """Wu et al., 2020: each kernel by gamma times its norm, along its gradient."""
        if not self.gamma:
            return weights

        def loss(weights):
            term = self.term(weights, x, x_adv, *more)
            if self.name != "labeled_loss":
                term += self.clean_weight * self.labeled(weights, x, *more)
            return term

        return [
            w + self.gamma * _length(w) * g / _length(g) if len(w.shape) > 1 else w
            for w, g in zip(weights, gradients_of(loss, weights), strict=True)
        ]


def _length(tensor):
    return ops.sqrt(ops.sum(ops.square(tensor)))


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


# Layers and losses of Keras compute float64 in float32 but on TensorFlow.
ROUNDING = 1e-9 if BACKEND == "tensorflow" else 1e-4


def assert_same(got, expected, rtol=ROUNDING):
    (gradients, logs), (wanted, values) = got, expected
    for a, b in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol, 1e-3 * rtol)
    for name, value in values.items():  # They are kept in float32.
        np.testing.assert_allclose(logs[name], value, max(1e-5, rtol), err_msg=name)
