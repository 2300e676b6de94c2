"""What more workers bring, and what they lose to communication.

Starts groups of worker processes on this machine: one worker alone, which trains on one
device, and for each number of `--workers` as many under a
`tf.distribute.MultiWorkerMirroredStrategy`, one core each (where there are fewer cores
than workers, some share one, and the table says so). All train the network of the MNIST
tutorial with the same global batch: plainly, with FGSM, and with PGD-10. The groups
take turns in one run, the others idle, so that a machine whose speed drifts slows all
of them. Printed are medians over the turns, and quartiles in brackets:

- `one/s` and `all/s`: the examples per second of one worker, and of all together, and
  `speed-up`, their ratio;
- `lost`: the share of the step that is lost to all that several workers bring,
  1 - T(one worker, its share of the batch, alone) / T(all workers);
- `communication`: the same, compared with as many workers that train apart, each on its
  share, at the same time: cores that share a memory, and workers that share a core, are
  slower without any communication;
- `step ms`: the step of all workers; and `model ms`: what `step_time` predicts of it,
  from the time of workers that train apart, the bytes of the gradients, and the latency
  and the bandwidth of a bare all-reduce of as many bytes between the same workers.

On machines of one's own there is nothing to start workers: docs/scaling.md has the
command for each.

    python benchmarks/multi_worker.py [--workers 2 3] [--batch 256] [--turns 10]
        [--attacks plain fgsm pgd] [--markdown] [--json FILE]
"""

import argparse
import collections
import contextlib
import functools
import inspect
import json
import os
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time

# TensorFlow is imported by the workers alone, once they are bound to their cores.

STEP_SIZE, RADIUS, MULTIPLIER = 0.2, 0.2, 0.2
ATTACKS = {
    "plain": {"multiplier": 0.0},
    "fgsm": {"multiplier": MULTIPLIER, "pgd_iterations": 1},
    "pgd": {"multiplier": MULTIPLIER, "pgd_iterations": 10, "pgd_epsilon": RADIUS},
}
NAMES = {"plain": "plain", "fgsm": "FGSM", "pgd": "PGD-10"}
PATIENCE = 600  # Seconds that a worker may take for an answer.
TAIL = 30  # Lines of a failed worker's messages that are shown.
SECONDS = 1  # About as long the slowest side trains in a turn.
CHAINED = 50  # All-reduces one after the other, of which one is timed.


def step_time(apart, workers, collectives, size, latency, bandwidth):
    """The cost model: seconds that a step takes with several workers.

    Args:
        apart: Seconds of a worker for its share of the batch without the others, but
            while they work, where they are on the same machine.
        workers: Number of workers.
        collectives: Number of all-reduces in a step, however small.
        size: Bytes of the gradients.
        latency: Seconds of an all-reduce of one number.
        bandwidth: Bytes per second from one worker to the next.
    """
    # In a ring each worker sends all but its own share of the gradients, twice.
    return (
        apart + collectives * latency + 2 * (workers - 1) / workers * size / bandwidth
    )


def bandwidth_of(seconds, latency, workers, size):
    """Bytes per second, from the time of a bare all-reduce of as many bytes."""
    return 2 * (workers - 1) / workers * size / max(seconds - latency, 1e-9)


# What a worker does.


class Worker:
    """One process of a group, which does what the lines of its input say."""

    def __init__(self):
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(1)
        # Not one, for they may have to answer the other workers as well.
        tf.config.threading.set_inter_op_parallelism_threads(4)
        self.alone = tf.distribute.get_strategy()
        self.strategy = self.alone
        if "TF_CONFIG" in os.environ:
            self.strategy = tf.distribute.MultiWorkerMirroredStrategy()

    @functools.cache  # noqa: B019 - There is one worker in a process.
    def trainer(self, attack, batch, together):
        """A model that has taken its first steps, and an iterator over its batches."""
        import keras
        import numpy as np
        import tensorflow as tf

        import advreg
        from advreg.demo import mnist_network

        strategy = self.strategy if together else self.alone
        keras.utils.set_random_seed(0)
        with strategy.scope():
            config = advreg.make_adv_reg_config(
                adv_step_size=STEP_SIZE, adv_grad_norm="infinity", **ATTACKS[attack]
            )
            base = mnist_network((28, 28, 1), 10)
            model = advreg.AdversarialRegularization(base, config)
            model.compile(
                "adam",
                keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
                jit_compile=False,
            )
        rng = np.random.default_rng(0)
        images = rng.uniform(size=(batch, 28, 28, 1)).astype("float32")
        labels = rng.integers(0, 10, batch)
        data = tf.data.Dataset.from_tensor_slices((images, labels))
        data = data.batch(batch).repeat()
        model.fit(data, steps_per_epoch=2, shuffle=False, verbose=0)
        return model, iter(strategy.experimental_distribute_dataset(data))

    def train(self, attack, batch, together, steps):
        """Trains, and returns the seconds per step."""
        model, iterator = self.trainer(attack, batch, together)
        start = time.perf_counter()
        for _ in range(steps):
            model.train_function(iterator)
        return (time.perf_counter() - start) / steps

    def traffic(self, attack, batch):
        """Returns the number of all-reduces in a step, and of bytes of gradients."""
        model, iterator = self.trainer(attack, batch, True)
        inside = inspect.getclosurevars(model.train_function).nonlocals
        function = inside["on_iterator"]
        graph = function.get_concrete_function(iterator).graph.as_graph_def()
        bodies = {body.signature.name: body.node_def for body in graph.library.function}

        def collectives(nodes):
            return sum(
                node.op.startswith("CollectiveReduce")
                + sum(
                    collectives(bodies[value.func.name])
                    for value in node.attr.values()
                    if value.func.name in bodies
                )
                for node in nodes
            )

        weights = model.trainable_weights
        size = sum(w.numpy().nbytes for w in weights)
        return collectives(graph.node), size

    @functools.cache  # noqa: B019
    def chain(self, values, calls):
        """A function of several all-reduces, each of which waits for the last one."""
        import tensorflow as tf

        def replica():
            context = tf.distribute.get_replica_context()
            total = tf.ones([values])
            for _ in range(calls):
                total = context.all_reduce("MEAN", total)
            return total[0]

        run = tf.function(lambda: self.strategy.run(replica), autograph=False)
        run()
        return run

    def all_reduce(self, size):
        """Returns the seconds of an all-reduce of one number, and of many bytes."""
        return [self._all_reduce(values) for values in (1, size // 4)]

    def _all_reduce(self, values):
        seconds = []
        for calls in (1, 1 + CHAINED):
            run = self.chain(values, calls)
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        return (seconds[1] - seconds[0]) / CHAINED  # Without what a call costs.


def work():
    worker = Worker()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        method, arguments = json.loads(line)
        print(json.dumps(getattr(worker, method)(**arguments)), flush=True)


# What starts and drives them.


class Group:
    """Workers that train one model.

    Args:
        workers: Number of them.
        stack: What ends them, whatever happens.
    """

    def __init__(self, workers, stack):
        addresses = [f"127.0.0.1:{port}" for port in free_ports(workers)]
        cores = available_cores()
        self.per_core = -(-workers // len(cores)) if cores else 1
        self.members = []
        for index in range(workers):
            task = {"type": "worker", "index": index}
            cluster = {"cluster": {"worker": addresses}, "task": task}
            core = cores[index % len(cores)] if cores else None
            self.members.append(
                start_worker(cluster if workers > 1 else None, core, stack)
            )
        self._answers("starts")

    def ask(self, method, **arguments):
        """Lets all workers do the same, and returns what each answers."""
        line = json.dumps([method, arguments]) + "\n"
        for process, _ in self.members:
            with contextlib.suppress(BrokenPipeError):  # Its end is noticed below.
                process.stdin.write(line)
                process.stdin.flush()
        return self._answers(f"does `{method}` with {arguments}")

    def _answers(self, what):
        found = {}
        with selectors.DefaultSelector() as waiting:
            for index, (process, _) in enumerate(self.members):
                waiting.register(process.stdout, selectors.EVENT_READ, index)
            while waiting.get_map():
                ready = waiting.select(PATIENCE)
                if not ready:
                    late = sorted({*range(len(self.members))} - set(found))
                    sys.exit(
                        f"Workers {late} of {len(self.members)} gave no answer in "
                        f"{PATIENCE} s, while each {what}"
                    )
                for key, _ in ready:
                    line = key.fileobj.readline()
                    if not line:
                        self._fail(key.data, what)
                    found[key.data] = json.loads(line)
                    waiting.unregister(key.fileobj)
        return [found[index] for index in range(len(self.members))]

    def _fail(self, index, what):
        process, messages = self.members[index]
        status = process.wait()
        messages.seek(0)
        tail = "".join(messages.readlines()[-TAIL:])
        sys.exit(
            f"Worker {index} of {len(self.members)} ended with status {status} while "
            f"each {what}. The last that it said:\n{tail}"
        )


def start_worker(cluster, core, stack):
    """Starts a worker; returns it, and the file that takes its messages."""
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "-1",
        "OMP_NUM_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2"),
    }
    environment.pop("TF_CONFIG", None)
    if cluster is not None:
        environment["TF_CONFIG"] = json.dumps(cluster)
    messages = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
    stack.enter_context(messages)
    command = [sys.executable, __file__, "--worker"]
    process = subprocess.Popen(
        command if core is None else [*command, "--core", str(core)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=messages,
        env=environment,
        text=True,
    )
    stack.callback(end, process)
    return process, messages


def end(process):
    process.kill()
    process.communicate()


def free_ports(number):
    """Ports that were free a moment ago, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def available_cores():
    """The cores that this process may use; none where it cannot choose."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []


def sides_of(groups, batch):
    """What is compared: in which group, its batch, and whether it trains one model."""
    sides = {"one": (1, batch, False)}
    for workers in sorted(set(groups) - {1}):
        part = -(-batch // workers)
        sides[f"together {workers}"] = (workers, batch, True)
        sides[f"alone {workers}"] = (1, part, False)
        sides[f"apart {workers}"] = (workers, part, False)
    return sides


def measure(groups, attack, batch, turns):
    """Seconds of all that is compared, in each turn, and what steps exchange."""
    sides = sides_of(groups, batch)

    def train(side, steps):
        number, size, together = sides[side]
        group = groups[number]
        return max(
            group.ask(
                "train", attack=attack, batch=size, together=together, steps=steps
            )
        )

    for side in sides:
        train(side, 1)  # Tracing stays out.
    steps = max(1, round(SECONDS / max(train(side, 1) for side in sides)))
    traffic = {
        workers: group.ask("traffic", attack=attack, batch=batch)[0]
        for workers, group in groups.items()
        if workers > 1
    }
    times = collections.defaultdict(list)
    for turn in range(turns + 1):
        found = {side: train(side, steps) for side in sides}
        for workers, (_, size) in traffic.items():
            answers = groups[workers].ask("all_reduce", size=size)
            small, large = map(max, zip(*answers, strict=True))
            found |= {f"latency {workers}": small, f"gradients {workers}": large}
        if turn:  # The first one warms up.
            for name, value in found.items():
                times[name].append(value)
    return times, traffic


def quartiles(values):
    """The first quartile, the median and the third one."""
    if len(values) == 1:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def row_of(times, traffic, workers, attack, batch, per_core):
    """What was found of one attack and one number of workers."""

    def turns(name):
        return times[f"{name} {workers}"]

    def lost(reference):
        pairs = zip(turns(reference), turns("together"), strict=True)
        return quartiles([1 - a / b for a, b in pairs])

    collectives, size = traffic[workers]
    latency, gradients, apart = (
        statistics.median(turns(name)) for name in ("latency", "gradients", "apart")
    )
    bandwidth = bandwidth_of(gradients, latency, workers, size)
    one, together = times["one"], turns("together")
    return {
        "attack": attack,
        "batch": batch,
        "workers": workers,
        "per_core": per_core,
        "bytes": size,
        "collectives": collectives,
        "latency": latency,
        "bandwidth": bandwidth,
        "one": quartiles(one),
        "alone": quartiles(turns("alone")),
        "together": quartiles(together),
        "examples_per_second_of_one": quartiles([batch / t for t in one]),
        "examples_per_second": quartiles([batch / t for t in together]),
        "speed_up": quartiles([a / b for a, b in zip(one, together, strict=True)]),
        "lost": lost("alone"),
        "communication": lost("apart"),
        "model": step_time(apart, workers, collectives, size, latency, bandwidth),
    }


def cells(row):
    """A row as text."""

    def spread(name, scale, digits, unit=""):
        low, middle, high = (f"{value * scale:.{digits}f}" for value in row[name])
        return f"{middle}{unit} ({low}–{high})"

    shared = f", {row['per_core']} on a core" if row["per_core"] > 1 else ""
    return (
        NAMES[row["attack"]],
        f"{row['workers']}{shared}",
        spread("examples_per_second_of_one", 1, 0),
        spread("examples_per_second", 1, 0),
        spread("speed_up", 1, 2),
        spread("lost", 100, 1, " %"),
        spread("communication", 100, 1, " %"),
        spread("together", 1e3, 1),
        f"{row['model'] * 1e3:.1f}",
        f"{row['model'] / row['together'][1]:.2f}",
    )


HEAD = (
    *("attack", "workers", "one/s", "all/s", "speed-up", "lost", "communication"),
    *("step ms", "model ms", "model/step"),
)


def table(rows, markdown):
    lines = [HEAD, *(cells(row) for row in rows)]
    if markdown:
        lines.insert(1, ["---"] * len(HEAD))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def benchmark(arguments):
    rows = []
    if not available_cores():
        print("Workers cannot be bound to cores on this machine", file=sys.stderr)
    with contextlib.ExitStack() as stack:
        groups = {n: Group(n, stack) for n in sorted({1, *arguments.workers})}
        for attack in arguments.attacks:
            print(f"Measuring {NAMES[attack]}", file=sys.stderr)
            times, traffic = measure(groups, attack, arguments.batch, arguments.turns)
            rows += [
                row_of(times, traffic, n, attack, arguments.batch, groups[n].per_core)
                for n in arguments.workers
            ]
    print(table(rows, arguments.markdown))
    for workers in arguments.workers:
        row = next(row for row in rows if row["workers"] == workers)
        print(
            f"\n{workers} workers: {row['bytes']} bytes of gradients and "
            f"{row['collectives']} all-reduces a step; a bare all-reduce takes "
            f"{row['latency'] * 1e3:.2f} ms, and {row['bandwidth'] / 1e6:.0f} MB/s."
        )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)


def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more. Received: {text}")
    return number


def number_of_workers(text):
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(
            f"must be 2 or more, for they are compared with one. Received: {text}"
        )
    return number


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=number_of_workers, nargs="+", default=[2])
    parser.add_argument("--batch", type=positive, default=256, help="the global batch")
    parser.add_argument("--turns", type=positive, default=10)
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--markdown", action="store_true", help="print such a table")
    parser.add_argument("--json", metavar="FILE", help="write what was found there")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.batch < max(arguments.workers):
        parser.error(
            "--batch must have an example for each of --workers. Received: "
            f"{arguments.batch}"
        )
    if not arguments.worker:
        benchmark(arguments)
        return
    if arguments.core is not None:
        os.sched_setaffinity(0, {arguments.core})
    work()


if __name__ == "__main__":
    main()
