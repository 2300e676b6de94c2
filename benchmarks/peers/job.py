"""What a side is asked to do, and what it makes of that."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

# What the steps of training have in common, whatever the network.
MULTIPLIER, EPSILON = 0.2, 0.2
CLIP = (0.0, 1.0)
CLASSES = 10
ROUNDING = 1e-5  # By which perturbed examples may miss the ball and the range.


@dataclasses.dataclass(frozen=True)
class Job:
    """A piece of work, as JSON can hold it.

    Args:
        kind: The function of a side's module that does it.
        network: Name of a network, see `keras_networks`.
        file: The .npz file with examples, labels, logits and weights.
        sizes: Arguments of the network.
        attack: `"fgsm"`, `"pgd"` or `"autoattack"`.
        iterations: Iterations of PGD.
        epsilon: Radius of the perturbations.
        step_size: Length of a step of PGD.
        batch: Number of examples in a batch.
        examples: Number of examples, where there are several batches.
    """

    kind: str
    network: str
    file: str
    sizes: dict = dataclasses.field(default_factory=dict)
    attack: str = "fgsm"
    iterations: int = 1
    epsilon: float = EPSILON
    step_size: float = EPSILON
    batch: int = 32
    examples: int = 0

    def data(self, count=None):
        """Examples and labels: a batch, unless their number is said."""
        count = count or self.batch
        with np.load(self.file) as file:
            x, y = file["x"], file["y"]
        if count > len(x):
            raise ValueError(
                f"`count` must be at most {len(x)}, the examples of the file. "
                f"Received: {count}"
            )
        return x[:count].copy(), y[:count].copy()

    def logits(self):
        """The logits of the first examples, as plain Keras computed them."""
        with np.load(self.file) as file:
            return file["logits"]

    def weights(self):
        """The list of arrays of each layer that has any, by the layer's name."""
        layers = {}
        with np.load(self.file) as file:
            for name in file.files:
                if name.startswith("weights/"):
                    _, layer, number = name.split("/")
                    layers.setdefault(layer, {})[int(number)] = file[name]
        return {
            layer: [arrays[number] for number in sorted(arrays)]
            for layer, arrays in layers.items()
        }


@dataclasses.dataclass(frozen=True)
class Task:
    """A job, set up.

    Args:
        turn: Function that makes ready what is not to be timed, and returns the
            function that is: of a number, the steps to make or the examples to use.
            An attack's returns the perturbed examples.
        logits: Function from examples to the network's logits, arrays of NumPy.
    """

    turn: Callable[[], Callable[[int], Any]]
    logits: Callable[[np.ndarray], np.ndarray]
