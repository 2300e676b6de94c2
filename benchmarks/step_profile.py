"""Tells where the time of a training step goes: advreg's, the loop's, plain Keras's.

TensorFlow's profiler tells the operations of each step and their times. This adds them
up, by what they are for and by their kind, and prints both with what remains: the time
of a step that no operation takes, which the executor and Python spend.

    python benchmarks/step_profile.py [--network mnist] [--batch 32 256] [--quick]
    python benchmarks/step_profile.py --iterations 10    # PGD-10

All is done by a single thread, so that times of operations add up to those of steps.
The sides take turns, and a figure is the median over the turns, in milliseconds per
step. `step` is timed without the profiler, of a function that has run for long;
operations are those of the first steps of a new one. `PROFILE.md` says what was found.
"""

import argparse
import collections
import functools
import os
import pathlib
import re
import tempfile
from statistics import median

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = "1"

import tensorflow as tf
from keras_side import make_file
from peer_advreg import SIDES
from side import Job
from tensorflow.tsl.profiler.protobuf import xplane_pb2
from turns import seconds, steps_of_a_turn, table, take_turns

NAMES = ("plain", "loop", "advreg")
# What an operation is for, by what stands in its name: the first that fits.
PURPOSES = {
    "update of the weights": r"adam(_\d+)?/",
    "backward passes": "gradient_tape/|gradients/",
    "forward passes": "functional",
    "losses": "sparse_categorical_crossentropy|compile_loss",
    "perturbation, metrics, the rest": "",
}
# An operation of the executor: its path, a colon and its type.
OPERATION = re.compile(r"[^:]+:(?P<kind>_?[A-Z]\w+)")
# After some 90 steps the executor knows which operations are cheap, and the profiler
# leaves those out: it sees few steps, of a function that is new.
STEPS = 10
SMALL = 0.005  # Kinds that take less of advreg's step are left out.


def profiled(run):
    """Returns milliseconds per step of each operation, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        run(STEPS)
        tf.profiler.experimental.stop()
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        space = xplane_pb2.XSpace.FromString(file.read_bytes())
    times = collections.Counter()
    for plane in space.planes:
        for event in (event for line in plane.lines for event in line.events):
            name = plane.event_metadata[event.metadata_id].name
            if OPERATION.fullmatch(name):
                times[name] += event.duration_ps / 1e9 / STEPS
    return times


def purpose(name, purposes=PURPOSES):
    return next(told for told, pattern in purposes.items() if re.search(pattern, name))


def kind(name):
    """Returns the kind of an operation, however it is implemented."""
    return re.sub("^_(Mkl)?(Native)?(Fused)?", "", OPERATION.fullmatch(name)["kind"])


def medians(turns, group):
    """Adds up the operations of each turn by group, and returns the medians."""
    sums = [collections.Counter() for _ in turns]
    for total, times in zip(sums, turns, strict=True):
        for name, value in times.items():
            total[group(name)] += value
    return {name: median(total[name] for total in sums) for name in set().union(*sums)}


def runner(side, job):
    """Returns a new function that makes a number of steps, traced already."""
    turn, _ = SIDES[side]["step"](job)
    run = turn()
    run(3)
    return run


def measure(job, turns):
    """Returns the step of each side, and its operations, both in each turn."""

    def one_turn(side, run, steps):
        return seconds(run, steps) / steps * 1e3, profiled(runner(side, job))

    sides = {}
    for side in NAMES:
        run = runner(side, job)
        steps = steps_of_a_turn(seconds(run, 1))
        sides[side] = functools.partial(one_turn, side, run, steps)
    return take_turns(sides, turns)


def show(title, columns, names):
    """Prints a table of the sides, and of how advreg differs from the loop."""
    rows = []
    for name in names:
        values = [columns[side].get(name, 0.0) for side in NAMES]
        values.append(values[-1] - values[-2])
        rows.append([name, *(f"{value:.3f}" for value in values)])
    print(table([title, *NAMES, "advreg − loop"], rows), end="\n\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="+", default=["mnist"])
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--iterations", type=int, nargs="+", default=[1])
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument(
        "--quick", action="store_true", help="the tiny network, one turn"
    )
    options = parser.parse_args()
    if options.quick:
        options.network, options.batch, options.turns = ["tiny"], [4], 1
    with tempfile.TemporaryDirectory() as folder:
        for network in options.network:
            path = str(pathlib.Path(folder, f"{network}.npz"))
            make_file(path, network)
            for n in options.iterations:
                steps = {"iterations": n, "step_size": 0.2 if n == 1 else 0.05}
                for batch in options.batch:
                    job = Job("step", network, path, batch=batch, **steps)
                    profile(f"{network}, {n} iterations, {batch}", job, options.turns)


def profile(title, job, turns):
    """Prints the tables of one job."""
    purposes, kinds = {}, {}
    for side, found in measure(job, turns).items():
        steps, operations = zip(*found, strict=True)
        step, parts = median(steps), medians(operations, purpose)
        rest = step - sum(parts.values())
        purposes[side] = {"step": step, **parts, "between operations": rest}
        kinds[side] = medians(operations, kind)
    show(f"{title}, ms", purposes, ["step", *PURPOSES, "between operations"])
    most = collections.Counter()
    for column in kinds.values():
        most |= collections.Counter(column)
    least = SMALL * purposes["advreg"]["step"]
    large = [name for name, value in most.most_common() if value > least]
    show("kinds of operations", kinds, large)


if __name__ == "__main__":
    main()
