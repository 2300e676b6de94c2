"""Times training and attacks on the device that Keras sees: a GPU, or the CPU.

    KERAS_BACKEND=jax python benchmarks/gpu.py [--json found.json]
    KERAS_BACKEND=torch python benchmarks/gpu.py --network cnn --batch 256 \
        --dtype float32                     # what a CPU can do
    python benchmarks/gpu.py --quick        # tiny, to see it run

A ResNet-18 is trained on made-up images of CIFAR-10's shape, in float32 and bfloat16,
with batches of 128 to 1024: by plain Keras, by advreg with FGSM and with PGD-10, and by
a loop written by hand for JAX or PyTorch that trains the same Keras network on the same
losses. Then PGD-10 attacks the network: advreg's, one written by hand, and that of
torchattacks where it is installed. TensorFlow has no side by hand here: `compare.py`
has.

The sides take turns in one process. A turn is an epoch of `fit` of some batches, or as
many batches of an attack, and the device is waited for at its end. `ms` is the median
for a batch, and ratios are those of medians. `first, s` is the time until a side has
run once: tracing, compiling, warming up. `MiB` is the peak of the device's memory until
then, beyond what was in use before the side was made. JAX cannot forget a peak: after ≤
a side before it may have needed more.

With `--cpu-time` a turn counts the seconds of the processor: for a CPU that others work
on, too, and only for one.

What does not fit into the memory or into `--deadline` seconds is said to be left out.
"""

import argparse
import contextlib
import functools
import gc
import importlib
import json
import os
import pathlib
import platform
import time
from importlib import metadata
from statistics import median

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers
from turns import ratio, seconds, table, take_turns

import advreg
from advreg import AdvRegConfig, attacks
from advreg.apps.recipes import mnist_network

# What the framework itself has to do: `gpu_jax`, `gpu_torch` or `gpu_tensorflow`.
device = importlib.import_module(f"gpu_{keras.backend.backend()}")

PLAIN = ("plain", "plain Keras")  # The side that others are compared to.
DTYPES = ["float32", "mixed_bfloat16"]
EPSILON, CLASSES = 8 / 255, 10
RANGE = {"clip_value_min": 0.0, "clip_value_max": 1.0}
SECONDS = 0.3  # About as long plain Keras trains in a turn.
MOST_BATCHES = 50
MARGIN = 1.3  # By which a side may take longer than those before it let expect.
LIBRARIES = ("advreg", "keras", "numpy", "jax", "torch", "torchattacks", "tensorflow")
HEAD = ["ms", "/ plain Keras", "/ by hand", "/ torchattacks", "first, s", "MiB"]


def residual_network(shape, filters, blocks):
    """Makes a residual network for small images.

    With 2 blocks each of 64, 128, 256 and 512 filters it is ResNet-18.
    """
    inputs = keras.Input(shape)
    x = layers.ReLU()(convolution(inputs, filters[0]))
    for stage, width in enumerate(filters):
        for block in range(blocks):
            strides = 2 if stage and not block else 1
            short = x
            if strides > 1:
                short = convolution(x, width, strides, size=1)
            x = layers.ReLU()(convolution(x, width, strides))
            x = layers.ReLU()(layers.add([convolution(x, width), short]))
    x = layers.GlobalAveragePooling2D()(x)
    # Logits are in float32 whatever the policy, as Keras advises.
    return keras.Model(inputs, layers.Dense(CLASSES, dtype="float32")(x))


def convolution(x, filters, strides=1, size=3):
    """A convolution and its batch normalisation."""
    options = {"strides": strides, "padding": "same", "use_bias": False}
    x = layers.Conv2D(filters, size, **options)(x)
    return layers.BatchNormalization()(x)


NETWORKS = {
    "resnet18": ((32, 32, 3), lambda s: residual_network(s, (64, 128, 256, 512), 2)),
    "cnn": ((28, 28, 1), lambda s: mnist_network(s, CLASSES)),
    "tiny": ((8, 8, 3), lambda s: residual_network(s, (4,), 1)),
}


class Case:
    """A network in one precision, and a batch size.

    Args:
        network: Name of the network.
        dtype: A dtype policy of Keras.
        batch: Number of images in a batch.
        iterations: Number of steps of PGD.
    """

    def __init__(self, network, dtype, batch, iterations):
        self.dtype, self.batch, self.iterations = dtype, batch, iterations
        self._shape, self._make = NETWORKS[network]
        self.take(1)

    def take(self, batches):
        """Makes the images and labels of a turn of so many batches."""
        rng = np.random.default_rng(0)
        self.batches, count = batches, batches * self.batch
        x = rng.uniform(size=(count, *self._shape)).astype("float32")
        self._data = x, rng.integers(0, CLASSES, count).astype("int32")

    def sides(self):
        """Returns functions that make the sides, by the kind of work and the side.

        Each returns a function that takes a turn, and one that returns the weights,
        `None` for an attack.
        """
        n = self.iterations
        found = {PLAIN: self._fit}
        for work, steps in {"FGSM": 1, f"PGD-{n}": n}.items():
            found[work, "advreg"] = functools.partial(self._fit, steps)
            if device.training:
                found[work, "by hand"] = functools.partial(self._train_by_hand, steps)
        attack = f"attack by PGD-{n}"
        found[attack, "advreg"] = self._attack
        for side, make in device.ATTACKS.items():
            found[attack, side] = functools.partial(self._attack_by_hand, make)
        return found

    def passes(self, key):
        """Returns about how many steps of plain Keras a step of a side costs."""
        n = self.iterations
        return {"plain": 1, "FGSM": 2, f"PGD-{n}": n + 1}.get(key[0], n)

    def _network(self):
        keras.utils.set_random_seed(0)
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(self.dtype)
        try:
            return self._make(self._shape)
        finally:
            keras.config.set_dtype_policy(before)

    def _fit(self, iterations=0):
        model = network = self._network()
        if iterations:
            epsilon, step_size, _ = threat(iterations)
            fields = {"adv_step_size": step_size, "multiplier": 1.0, **RANGE}
            # From the input itself, so that sides do the same.
            fields["random_init"] = False
            config = AdvRegConfig.pgd(epsilon, iterations=iterations, **fields)
            model = advreg.AdversarialRegularization(network, config)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer(), loss)

        def run():
            options = {"batch_size": self.batch, "shuffle": False, "verbose": 0}
            model.fit(*self._data, **options)
            device.wait(network)

        return run, lambda: network.trainable_variables

    def _train_by_hand(self, iterations):
        made = device.training(self._network(), optimizer(), *threat(iterations))
        step, weights = made

        def run():
            for x, y in self._in_batches():
                loss = step(x, y)
            return float(loss)  # Waits for the last step.

        return run, weights

    def _attack(self):
        network = self._network()
        epsilon, step_size, iterations = threat(self.iterations)
        options = {"step_size": step_size, "iterations": iterations, **RANGE}
        attack = attacks.PGD(epsilon, **options)

        def run():
            options = {"batch_size": self.batch, "early_stop": False}
            return attack(network, *self._data, **options)

        return run, None

    def _attack_by_hand(self, make):
        attack = make(self._network(), *threat(self.iterations))

        def run():
            return np.concatenate([attack(x, y) for x, y in self._in_batches()])

        return run, None

    def _in_batches(self):
        x, y = self._data
        for start in range(0, len(x), self.batch):
            part = slice(start, start + self.batch)
            yield x[part], y[part]


def threat(iterations):
    """Returns epsilon, the length of a step, and the number of steps."""
    step_size = EPSILON if iterations == 1 else 2.5 * EPSILON / iterations
    return EPSILON, step_size, iterations


def optimizer():
    return keras.optimizers.SGD(0.01, momentum=0.9)


class Clock:
    """Knows how long sides take, and whether another one fits before the deadline.

    Args:
        deadline: Seconds from now.
        turns: Number of turns.
    """

    def __init__(self, deadline, turns):
        self._end, self._turns = time.monotonic() + deadline, turns
        self._made, self._share = {}, {}  # By side: seconds, and turns / plain's.
        self._plain = 0.0  # Seconds of a turn of plain Keras, in this case or the last.
        self._case = 0.0  # Seconds of a turn of all sides of this case.

    def begin(self):
        """Begins another case."""
        self._case = 0.0

    def fits(self, key, passes):
        """Returns whether a side can be made, and all can take their turns after it."""
        made = self._made.get(key, self._made.get(PLAIN, 0.0))
        turn = self._share.get(key, passes) * self._plain
        # Two turns come before those that count.
        needed = made + 2 * turn + self._turns * (self._case + turn)
        return time.monotonic() + MARGIN * needed < self._end

    def add(self, key, made, turn):
        """Notes how long it took to make a side, and how long its turn takes."""
        if key == PLAIN:
            self._plain = turn
        # Plain Keras has no turn where it was out of memory in the first case.
        self._made[key], self._share[key] = made, turn / (self._plain or turn)
        self._case += turn


def cpu_seconds(run):
    """Returns the seconds of the processor that a call takes."""
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(case, turns, clock, most, timed, sides=None):
    """Measures the sides of a case, and returns a row for each.

    Args:
        case: The `Case`.
        turns: How often each side takes its turn.
        clock: The `Clock`.
        most: The largest number of batches of a turn.
        timed: Function that returns the seconds that a call takes.
        sides: The names of sides besides plain Keras, `None` for all.
    """
    rows, runs = {}, {}
    clock.begin()
    for key, make in case.sides().items():
        work, side = key
        if sides and key != PLAIN and side not in sides:
            continue
        row = {"dtype": case.dtype, "batch": case.batch, "work": work, "side": side}
        rows[key] = row
        if not clock.fits(key, case.passes(key)):
            row["left out"] = "no time"
        elif run := unless_memory_is_short(
            row, lambda key=key, make=make: prepared(case, key, make, rows, clock, most)
        ):
            runs[key] = run
        gc.collect()  # What a side without memory has held.
    one_turn = {
        key: functools.partial(
            unless_memory_is_short, rows[key], functools.partial(timed, run)
        )
        for key, run in runs.items()
    }
    for key, times in take_turns(one_turn, turns).items():
        if "left out" not in rows[key]:
            rows[key]["batches"] = case.batches
            rows[key]["ms"] = [taken / case.batches * 1e3 for taken in times]
    return list(rows.values())


def prepared(case, key, make, rows, clock, most):
    """Makes a side and lets it run, so that it can take turns."""
    before = device.begin_peak()
    start = time.perf_counter()
    run, weights = make()
    initial = weights and copies(weights())
    run()
    made = time.perf_counter() - start
    rows[key]["bytes"] = device.peak(before)
    if key == PLAIN:
        # The first turn had one batch, which tells how many are to be in the others.
        batch = seconds(run)
        case.take(max(1, min(most, round(SECONDS / batch))))
    elif weights:
        pairs = zip(copies(weights()), initial, strict=True)
        moved = sum(np.sum(np.square(now - then)) for now, then in pairs)
        rows[key]["moved"] = float(np.sqrt(moved))
    turn = seconds(run)
    rows[key]["first"] = made
    clock.add(key, made, turn)
    return run


def copies(weights):
    return [
        np.array(keras.ops.convert_to_numpy(weight), "float64") for weight in weights
    ]


def unless_memory_is_short(row, function):
    """Calls a function, unless the side has failed, and notes it if memory is short."""
    if "left out" in row:
        return None
    try:
        return function()
    except Exception as error:
        if not device.is_out_of_memory(error):
            raise
        row["left out"] = "out of memory"
        return None


def show(rows):
    """Prints a table for each case, and what was left out."""
    cases = {}
    for row in rows:
        cases.setdefault((row["dtype"], row["batch"]), []).append(row)
    for (dtype, batch), found in cases.items():
        measured = {(r["work"], r["side"]): r for r in found if "ms" in r}
        lines = [line(row, measured) for row in measured.values()]
        print(table([f"{dtype}, batch {batch}", *HEAD], lines), end="\n\n")
    for row in rows:
        if why := row.get("left out"):
            names = (row["dtype"], f"batch {row['batch']}", row["work"], row["side"])
            print(f"Left out, {why}: {', '.join(names)}")


def line(row, measured):
    """Returns the line of a row in the table."""

    def over(key):
        if key not in measured or measured[key] is row:
            return ""
        return f"{ratio(row['ms'], measured[key]['ms'])[1]:.2f}"

    work, side = row["work"], row["side"]
    name = side if side == PLAIN[1] else f"{work}, {side}"
    others = [over((work, other)) for other in ("by hand", "torchattacks")]
    if side != "advreg":
        others = ["", ""]
    plain = "" if "attack" in work else over(PLAIN)
    peak = row["bytes"] or {}
    mebibytes = f"{peak['bytes'] / 2**20:.0f}" if peak else ""
    if peak.get("at most"):
        mebibytes = f"≤ {mebibytes}"
    return [
        name,
        f"{median(row['ms']):.2f}",
        plain,
        *others,
        f"{row['first']:.1f}",
        mebibytes,
    ]


def versions():
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="resnet18")
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 1024, 128, 512])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=DTYPES)
    parser.add_argument("--sides", nargs="+", help="sides besides plain Keras")
    parser.add_argument("--iterations", type=int, default=10, help="steps of PGD")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--deadline", type=float, default=480, help="seconds after which it ends"
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="count the processor's time"
    )
    parser.add_argument("--json", type=pathlib.Path, help="file for all figures")
    parser.add_argument("--quick", action="store_true", help="a tiny network, one turn")
    options = parser.parse_args()
    most, timed = MOST_BATCHES, cpu_seconds if options.cpu_time else seconds
    if options.quick:
        options.network, options.batch, options.turns, most = "tiny", [8], 1, 2
        options.iterations = 2
    clock, rows = Clock(options.deadline, options.turns), []
    told = {
        "backend": keras.backend.backend(),
        "device": device.name(),
        "network": options.network,
        "turns": options.turns,
        "versions": versions(),
    }
    print(f"{options.network} on {told['device']}, {told['backend']}")
    print(*(f"{name} {version}" for name, version in told["versions"].items()))
    print()
    for batch in options.batch:
        for dtype in options.dtype:
            case = Case(options.network, dtype, batch, options.iterations)
            rows += measure(case, options.turns, clock, most, timed, options.sides)
    show(rows)
    if options.json:
        options.json.write_text(json.dumps({**told, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
