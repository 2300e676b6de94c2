"""Where the time of a training step goes: advreg's, the minimal loop's, plain Keras's.

TensorFlow's profiler tells the operations of each step and their times. This adds them
up, by what they are for and by their kind, and prints both tables with what remains:
the time of a step that no operation takes, which the executor and Python spend.

    python benchmarks/step_profile.py [--network mnist] [--batch 32 256]
    python benchmarks/step_profile.py --iterations 10    # PGD-10

All is done by a single thread, so that times of operations add up to those of steps.
The sides take turns, and a figure is the median over the turns, in milliseconds per
step. `step` is the time of a step without the profiler, of a function that has run for
long; operations are those of the first steps of a new one. What is left of the step
lies between operations. The sides are those of `compare.py`. `PROFILE.md` says what
was found.
"""

import argparse
import collections
import importlib
import os
import pathlib
import re
import statistics
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = "1"

import tensorflow as tf
from comparison.measuring import order, steps_of_a_turn
from comparison.works import ATTACKS
from peers import keras_networks, materials
from peers.job import Job
from tensorflow.tsl.profiler.protobuf import xplane_pb2

from advreg.tables import text_table

SIDES = ("plain", "loop", "advreg")
# What an operation is for, by what stands in its name: the first that fits.
PURPOSES = (
    ("update of the weights", r"adam(_\d+)?/"),
    ("backward passes", "gradient_tape/|gradients/"),
    ("forward passes", "functional"),
    ("losses", "sparse_categorical_crossentropy|compile_loss"),
    ("perturbation, metrics, the rest", ""),
)
# An operation of the executor: its path, a colon and its type.
OPERATION = re.compile(r"(?P<path>[^:]+):(?P<kind>_?[A-Z]\w+)")
# After some 90 steps the executor knows which operations are cheap, and the profiler
# leaves those out: it sees few steps, of a function that is new.
STEPS = 10
SMALL = 0.005  # Kinds by which no two sides differ by more of a step are one row.


def runner(side, job):
    """A function that makes a number of steps, traced already."""
    run = importlib.import_module(f"peers.{side}").step(job).turn()
    run(3)
    return run


def profiled(run):
    """Milliseconds per step of each operation, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        run(STEPS)
        tf.profiler.experimental.stop()
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        space = xplane_pb2.XSpace.FromString(file.read_bytes())
    times = collections.Counter()
    for plane in space.planes:
        for line in plane.lines:
            for event in line.events:
                name = plane.event_metadata[event.metadata_id].name
                times[name] += event.duration_ps / 1e9 / STEPS
    return {name: time for name, time in times.items() if OPERATION.fullmatch(name)}


def purpose(name):
    """What an operation is for."""
    return next(told for told, pattern in PURPOSES if re.search(pattern, name))


def kind(name):
    """The kind of an operation, however it is implemented."""
    found = OPERATION.fullmatch(name)["kind"]
    return re.sub("^_(Mkl)?(Native)?(Fused)?", "", found)


def summed(times, group):
    """Times of groups of operations."""
    sums = collections.Counter()
    for name, value in times.items():
        sums[group(name)] += value
    return sums


def seconds(run, steps):
    start = time.perf_counter()
    run(steps)
    return time.perf_counter() - start


def measure(job, turns):
    """The time of a step, and of its operations, of each side in each turn."""
    runs = {side: runner(side, job) for side in SIDES}
    steps = {side: steps_of_a_turn(seconds(run, 1)) for side, run in runs.items()}
    found = {side: [] for side in SIDES}
    for turn in range(turns):
        for side in order(SIDES, turn):
            step = seconds(runs[side], steps[side]) / steps[side] * 1e3
            found[side].append((step, profiled(runner(side, job))))
    return found


def median(values):
    """The median of dictionaries, key by key."""
    keys = dict.fromkeys(key for value in values for key in value)
    return {key: statistics.median(v.get(key, 0.0) for v in values) for key in keys}


def by_purpose(turns):
    """A step, what its operations are for, and what is left of it."""
    step = statistics.median(step for step, _ in turns)
    sums = median([summed(operations, purpose) for _, operations in turns])
    parts = {told: sums.get(told, 0.0) for told, _ in PURPOSES}
    rest = step - sum(parts.values())
    return {"step": step, **parts, "between operations": rest}


def by_kind(turns):
    return median([summed(operations, kind) for _, operations in turns])


def small_together(columns, step):
    """Takes the kinds that hardly tell the sides apart together."""
    kinds = dict.fromkeys(kind for column in columns.values() for kind in column)

    def spread(kind):
        values = [column.get(kind, 0.0) for column in columns.values()]
        return max(values) - min(values)

    shown = {kind for kind in kinds if spread(kind) > SMALL * step}
    names = sorted(shown, key=lambda kind: -columns["advreg"].get(kind, 0.0))
    return {
        name: {
            **{kind: column.get(kind, 0.0) for kind in names},
            "others": sum(v for kind, v in column.items() if kind not in shown),
        }
        for name, column in columns.items()
    }


def table(title, columns):
    """A table of the sides' columns, and of how advreg differs from the loop."""
    rows = []
    for name in columns["advreg"]:
        values = [columns[side].get(name, 0.0) for side in SIDES]
        values.append(values[-1] - values[-2])
        rows.append([name, *(f"{value:.3f}" for value in values)])
    return text_table((title, *SIDES, "advreg − loop"), rows)


def jobs(settings, folder):
    """The steps to profile, each with its name."""
    for network in settings.network:
        path = str(pathlib.Path(folder, f"{network}.npz"))
        materials.make(path, network, examples=max(materials.CHECKED, *settings.batch))
        for attack, iterations, step_size in ATTACKS:
            if iterations in settings.iterations:
                for batch in settings.batch:
                    job = Job(
                        kind="step",
                        network=network,
                        file=path,
                        iterations=iterations,
                        step_size=step_size,
                        batch=batch,
                    )
                    yield f"{network}/{attack}/{batch}", job


def parse(arguments=None):
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = list(keras_networks.NETWORKS)
    attacks = [iterations for _, iterations, _ in ATTACKS]
    parser.add_argument("--network", nargs="+", choices=known, default=["mnist"])
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256])
    parser.add_argument(
        "--iterations", type=int, nargs="+", choices=attacks, default=[1]
    )
    parser.add_argument("--turns", type=int, default=10)
    return parser.parse_args(arguments)


def main():
    settings = parse()
    with tempfile.TemporaryDirectory() as folder:
        for name, job in jobs(settings, folder):
            found = measure(job, settings.turns)
            purposes = {side: by_purpose(turns) for side, turns in found.items()}
            print(f"{table(f'{name}, ms', purposes)}\n")
            kinds = {side: by_kind(turns) for side, turns in found.items()}
            kinds = small_together(kinds, purposes["advreg"]["step"])
            print(f"{table('kinds of operations', kinds)}\n", flush=True)


if __name__ == "__main__":
    main()
