"""Measures what more workers bring, and what they lose to communication.

For each number of `--workers` it starts as many processes on this machine, under a
`tf.distribute.MultiWorkerMirroredStrategy`, one core each; where there are fewer cores
some share one, and the table says so. They train the network of the MNIST tutorial. In
turns they train together, apart at the same time, each on its share of the batch, and
the first one alone on the whole batch. Printed are medians over the turns and quartiles
of `speed-up`, T(one) / T(together); of the `share lost to communication`,
1 - T(apart) / T(together); and `predicted`, what docs/scaling.md makes of T(apart) and
of bare all-reduces.

    python benchmarks/multi_worker.py [--workers 2 3] [--quick]
"""

import argparse
import functools
import inspect
import json
import os
import socket
import subprocess
import sys
from statistics import median

from turns import quartiles, seconds, table, take_turns

# TensorFlow is imported by the workers alone, once they are bound to their cores.

ATTACKS = {
    "plain": {"multiplier": 0.0},
    "FGSM": {"multiplier": 0.2, "pgd_iterations": 1},
    "PGD-10": {"multiplier": 0.2, "pgd_iterations": 10, "pgd_epsilon": 0.2},
}
SECONDS = 1  # About as long the slowest side trains in a turn.
CHAINED = 50  # All-reduces one after the other, of which one is timed.


# What a worker does. All do the same at the same time.


def trainer(attack, batch, strategy):
    """Returns a model that has taken its first steps, and its batches."""
    import keras
    import numpy as np
    import tensorflow as tf

    import advreg
    from advreg.apps.recipes import mnist_network

    keras.utils.set_random_seed(0)
    config = advreg.make_adv_reg_config(
        adv_step_size=0.2, adv_grad_norm="infinity", **ATTACKS[attack]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    with strategy.scope():
        base = mnist_network((28, 28, 1), 10)
        model = advreg.AdversarialRegularization(base, config)
        model.compile("adam", loss, metrics=["accuracy"], jit_compile=False)
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(batch, 28, 28, 1)).astype("float32")
    arrays = images, rng.integers(0, 10, batch)
    data = tf.data.Dataset.from_tensor_slices(arrays).batch(batch).repeat()
    model.fit(data, steps_per_epoch=2, shuffle=False, verbose=0)
    return model, iter(strategy.experimental_distribute_dataset(data))


def traffic(model, iterator):
    """Returns the number of all-reduces in a step, and of bytes of gradients."""
    function = inspect.unwrap(model.train_function)
    function = inspect.getclosurevars(function).nonlocals["on_iterator"]
    graph = function.get_concrete_function(iterator).graph.as_graph_def()
    bodies = {body.signature.name: body.node_def for body in graph.library.function}

    def collectives(nodes):
        called = [value.func.name for node in nodes for value in node.attr.values()]
        own = sum(node.op.startswith("CollectiveReduce") for node in nodes)
        return own + sum(collectives(bodies.get(name, ())) for name in called)

    size = sum(weight.numpy().nbytes for weight in model.trainable_weights)
    return collectives(graph.node), size


def chain(strategy, values, calls):
    """Returns a function of several all-reduces, each after the last one."""
    import tensorflow as tf

    def replica():
        context, total = tf.distribute.get_replica_context(), tf.ones([values])
        for _ in range(calls):
            total = context.all_reduce("MEAN", total)
        return total[0]

    return tf.function(lambda: strategy.run(replica), autograph=False)


def work(number, index, attacks, batch, turns):
    """Measures each attack: a line of the table, and what a step exchanges."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    # Not one, for they may have to answer the other workers as well.
    tf.config.threading.set_inter_op_parallelism_threads(4)
    alone = tf.distribute.get_strategy()
    strategy = tf.distribute.MultiWorkerMirroredStrategy()

    @tf.function(autograph=False)
    def gather(value):
        context = tf.distribute.get_replica_context
        return strategy.run(lambda: context().all_gather(value[None], 0))

    def slowest(value):
        """Waits for all workers, and returns the largest value of any."""
        return float(tf.reduce_max(gather(tf.constant(value, tf.float64))))

    def training(model, iterator, steps, takes_part=True):
        slowest(0.0)
        own = [model.train_function] * steps if takes_part else ()
        return slowest(seconds(lambda: [step(iterator) for step in own])) / steps

    def all_reduce(one, many):
        """Leaves out what a call costs."""
        return slowest(seconds(many) - seconds(one)) / CHAINED

    for attack in attacks:
        together = trainer(attack, batch, strategy)
        collectives, size = traffic(*together)
        runs = {
            "together": functools.partial(training, *together),
            "apart": functools.partial(
                training, *trainer(attack, -(-batch // number), alone)
            ),
            "one": functools.partial(
                training, *trainer(attack, batch, alone), takes_part=index == 0
            ),
        }
        longest = max(run(steps=1) for run in runs.values())
        steps = max(1, round(SECONDS / longest))
        sides = {
            name: functools.partial(run, steps=steps) for name, run in runs.items()
        }
        for name, values in (("latency", 1), ("gradients", size // 4)):
            chains = [chain(strategy, values, calls) for calls in (1, 1 + CHAINED)]
            sides[name] = functools.partial(all_reduce, *chains)
        times = take_turns(sides, turns, warm=1)
        told = f"{attack}: {size} bytes of gradients, {collectives} all-reduces a step."
        yield cells(times, attack, number, collectives), told


def cells(times, attack, number, collectives):
    """Returns a line of the table."""
    together, apart = times["together"], times["apart"]
    latency, gradients = (median(times[name]) for name in ("latency", "gradients"))
    # The bytes take what their bare all-reduce takes above one of a single number.
    predicted = median(apart) + collectives * latency + max(gradients - latency, 0.0)
    speed_up = [a / b for a, b in zip(times["one"], together, strict=True)]
    lost = [100 - 100 * a / b for a, b in zip(apart, together, strict=True)]
    per_core = -(-number // os.cpu_count())
    return [
        attack,
        f"{number}, {per_core} on a core" if per_core > 1 else number,
        "{1:.2f} ({0:.2f}–{2:.2f})".format(*quartiles(speed_up)),
        "{1:.1f} % ({0:.1f}–{2:.1f})".format(*quartiles(lost)),
        f"{median(together) * 1e3:.1f}",
        f"{predicted * 1e3:.1f}",
    ]


# What starts the workers.


def start(number):
    """Starts workers by the command of this process; returns what the first prints."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()  # Their ports were free a moment ago.
    workers = []
    for index in range(number):
        task = {"type": "worker", "index": index}
        config = {"cluster": {"worker": addresses}, "task": task}
        variables = {"TF_CONFIG": json.dumps(config), "OMP_NUM_THREADS": "1"}
        variables = {**os.environ, **variables, "CUDA_VISIBLE_DEVICES": "-1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, *sys.argv]
        workers.append(subprocess.Popen(command, env=variables, **pipes))
    told = [worker.communicate() for worker in workers]
    for worker, (_, messages) in zip(workers, told, strict=True):
        if worker.returncode:
            sys.exit(f"A worker has failed:\n{messages[-2000:]}")
    return json.loads(told[0][0])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--quick", action="store_true", help="FGSM alone, one turn")
    options = parser.parse_args()
    settings = (["FGSM"], 4, 1) if options.quick else (list(ATTACKS), 256, 10)
    if "TF_CONFIG" in os.environ:
        config = json.loads(os.environ["TF_CONFIG"])
        number, index = len(config["cluster"]["worker"]), config["task"]["index"]
        if hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[index % len(cores)]})
        print(json.dumps(list(work(number, index, *settings))))
        return
    found = [line for number in options.workers for line in start(number)]
    rows, exchanged = zip(*found, strict=True)
    head = ["attack", "workers", "speed-up", "share lost to communication"]
    head += ["step, ms", "predicted, ms"]
    print(table(head, rows), *dict.fromkeys(exchanged), sep="\n")


if __name__ == "__main__":
    main()
