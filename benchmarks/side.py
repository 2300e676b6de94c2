"""One side of `compare.py`: a process that does one job, as often as it is told to.

The script of a peer ends in `serve`. It is started with the name of a side and a job in
JSON, prints a line when it is ready, and answers each line of its input by one line.
"""

import contextlib
import dataclasses
import gc
import importlib.metadata
import json
import os
import platform
import sys
import time

import numpy as np

# What the steps of training have in common, whatever the network.
MULTIPLIER, EPSILON = 0.2, 0.2
CLIP = (0.0, 1.0)
CLASSES = 10
ROUNDING = 1e-5  # By which perturbed examples may miss the ball and the range.
LIBRARIES = (
    *("tensorflow", "keras", "numpy", "neural-structured-learning", "torch"),
    *("adversarial-robustness-toolbox", "foolbox", "cleverhans"),
)


@dataclasses.dataclass(frozen=True)
class Job:
    """What a side is to do, as JSON can hold it."""

    kind: str  # A kind of work that the script of the side knows.
    network: str
    file: str = ""  # The .npz file with examples, labels, logits and weights.
    sizes: dict = dataclasses.field(default_factory=dict)  # Arguments of the network.
    attack: str = "pgd"
    iterations: int = 1
    epsilon: float = EPSILON
    step_size: float = EPSILON
    batch: int = 32
    examples: int = 0  # Their number, where there are several batches.

    def arrays(self, start):
        """Returns the arrays of the file whose names start so, in their order."""
        with np.load(self.file) as file:
            return {name: file[name] for name in file.files if name.startswith(start)}

    def data(self):
        """Returns the examples and labels."""
        count = self.examples or self.batch
        return self.arrays("x")["x"][:count], self.arrays("y")["y"][:count]

    def adversary(self):
        """Returns the arguments of `make_adv_reg_config`, advreg's and NSL's."""
        steps = {"adv_step_size": self.step_size, "pgd_iterations": self.iterations}
        epsilon = None if self.iterations == 1 else self.epsilon
        return {**steps, "adv_grad_norm": "infinity", "pgd_epsilon": epsilon}

    def weights(self):
        """Returns the list of arrays of each layer, by the layer's name."""
        layers = {}
        for name, array in self.arrays("weights/").items():
            layers.setdefault(name.split("/")[1], []).append(array)
        return layers


def serve(sides):
    """Does the job of the command line whenever the input says so.

    For each side and kind of work `sides` has a function from a `Job` to two functions.
    The first makes ready what is not to be timed, and returns what is: a function of a
    number of steps or examples, which the input names. The second computes logits.
    `check` in the input compares them to those of the file.
    """
    job = Job(**json.loads(sys.argv[2]))
    # What libraries print must not end up among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    turn, logits = sides[sys.argv[1]][job.kind](job)
    answer = {"peak": peak_memory(), "versions": versions()}
    print(json.dumps(answer), file=answers, flush=True)
    for line in sys.stdin:
        if line.strip() == "check":
            expected = job.arrays("logits")["logits"]
            found = logits(job.arrays("x")["x"][: len(expected)])
            answer = {"difference": float(np.max(np.abs(found - expected)))}
        else:
            run = turn()
            gc.collect()
            start = time.perf_counter()
            result = run(int(line))
            answer = {"seconds": time.perf_counter() - start, "peak": peak_memory()}
            if job.kind == "attack":
                answer["accuracy"] = accuracy(job, logits, result, int(line))
        print(json.dumps(answer), file=answers, flush=True)


def accuracy(job, logits, x_adv, count):
    """Returns the accuracy on perturbed examples.

    Raises:
        ValueError: They are outside of the ball or the range.
    """
    x, y = (array[:count] for array in job.data())
    distance, low, high = np.max(np.abs(x_adv - x)), np.min(x_adv), np.max(x_adv)
    within = low >= CLIP[0] - ROUNDING and high <= CLIP[1] + ROUNDING
    if not (within and distance <= job.epsilon + ROUNDING):  # NaN is not.
        raise ValueError(f"moved by {distance} at {job.epsilon}, into [{low}, {high}]")
    return float(
        np.mean(in_batches(lambda x, _: logits(x), job, x_adv, y).argmax(1) == y)
    )


def in_batches(function, job, x, y):
    """Calls a function of examples and labels batch by batch."""
    starts = range(0, len(x), job.batch)
    parts = [slice(start, start + job.batch) for start in starts]
    return np.concatenate([np.asarray(function(x[part], y[part])) for part in parts])


def peak_memory():
    """Returns the most memory that the process has held, in bytes; Linux tells it."""
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024


def versions():
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
