"""What a training step of advreg costs.

For batches of 32 and 256, FGSM and PGD-10, on the network of the MNIST tutorial, prints
the median ratio of advreg's training step to

(a) the plain Keras step of the same network, and
(b) a hand-written `tf.function` that does the same arithmetic and nothing else.

The three sides take turns in one run, so that a machine whose speed drifts slows all of
them; a ratio is the median over the turns.

    python benchmarks/step_cost.py [--turns 40] [--batch 32 256] [--jit]
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

import advreg
from advreg.demo import mnist_network

STEP_SIZE, RADIUS, MULTIPLIER = 0.2, 0.2, 0.2


def network():
    keras.utils.set_random_seed(0)
    return mnist_network((28, 28, 1), 10)


def compiled(model, jit):
    model.compile(
        "adam",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=jit,
    )
    return model


def keras_step(model):
    """The compiled training step of a Keras model, on an iterator of one batch."""
    model.make_train_function()

    def step(iterator):
        return model.train_function(iterator)

    return step


def minimal_step(iterations, jit):
    """Two passes, the attack between them, one update, the same metrics."""
    model = network()
    optimizer = keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)
    loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    loss_mean = keras.metrics.Mean()
    accuracy = keras.metrics.SparseCategoricalAccuracy()

    def attack(x, y, gradient):
        x_adv = x + STEP_SIZE * tf.sign(gradient)
        for _ in range(iterations - 1):
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(x_adv)
                loss = loss_fn(y, model(x_adv, training=True))
            x_adv = x_adv + STEP_SIZE * tf.sign(tape.gradient(loss, x_adv))
            x_adv = tf.clip_by_value(x_adv, x - RADIUS, x + RADIUS)
        return x_adv

    @tf.function(jit_compile=jit)
    def train(x, y):
        weights = model.trainable_variables
        with tf.GradientTape() as tape:
            tape.watch(x)
            logits = model(x, training=True)
            loss = loss_fn(y, logits)
        *gradients, input_gradient = tape.gradient(loss, [*weights, x])
        x_adv = attack(x, y, input_gradient)
        with tf.GradientTape() as tape:
            adv_loss = MULTIPLIER * loss_fn(y, model(x_adv, training=True))
        adv_gradients = tape.gradient(adv_loss, weights)
        gradients = [a + b for a, b in zip(gradients, adv_gradients, strict=True)]
        optimizer.apply_gradients(zip(gradients, weights, strict=True))
        loss_mean.update_state(loss + adv_loss)
        accuracy.update_state(y, logits)
        return loss_mean.result(), accuracy.result()

    @tf.function
    def step(iterator):
        return train(*iterator.get_next())

    return step


def measure(sides, dataset, turns, steps):
    """Milliseconds per step of each side in each turn."""
    iterators = {name: iter(dataset) for name in sides}
    times = {name: [] for name in sides}
    for turn in range(turns + 3):
        for name, step in sides.items():
            start = time.perf_counter()
            for _ in range(steps):
                logs = step(iterators[name])
            tf.nest.map_structure(np.asarray, logs)
            if turn >= 3:  # Tracing, compiling and warming up stay out.
                times[name].append((time.perf_counter() - start) / steps * 1e3)
    return times


def ratio(times, name, reference):
    return statistics.median(
        a / b for a, b in zip(times[name], times[reference], strict=True)
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--jit", action="store_true", help="compile with XLA")
    arguments = parser.parse_args()
    print(
        f"{'attack':8} {'batch':>5} {'plain ms':>9} {'loop ms':>8} {'advreg ms':>9}"
        f" {'advreg/plain':>13} {'advreg/loop':>12}"
    )
    for attack, iterations in (("FGSM", 1), ("PGD-10", 10)):
        for batch in arguments.batch:
            rng = np.random.default_rng(0)
            data = tf.data.Dataset.from_tensors(
                (
                    rng.uniform(size=(batch, 28, 28, 1)).astype("float32"),
                    rng.integers(0, 10, batch),
                )
            ).repeat()
            config = advreg.make_adv_reg_config(
                multiplier=MULTIPLIER,
                adv_step_size=STEP_SIZE,
                adv_grad_norm="infinity",
                pgd_iterations=iterations,
                pgd_epsilon=None if iterations == 1 else RADIUS,
            )
            wrapped = advreg.AdversarialRegularization(network(), config)
            sides = {
                "plain": keras_step(compiled(network(), arguments.jit)),
                "loop": minimal_step(iterations, arguments.jit),
                "advreg": keras_step(compiled(wrapped, arguments.jit)),
            }
            steps = max(1, 640 // batch // iterations)
            times = measure(sides, data, arguments.turns, steps)
            ms = {name: statistics.median(values) for name, values in times.items()}
            print(
                f"{attack:8} {batch:5} {ms['plain']:9.2f} {ms['loop']:8.2f} "
                f"{ms['advreg']:9.2f} {ratio(times, 'advreg', 'plain'):13.2f} "
                f"{ratio(times, 'advreg', 'loop'):12.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
