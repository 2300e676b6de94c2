"""What attacks of advreg cost beside those of ART and Foolbox.

PGD with 20 iterations from a random start on MNIST test images, against the network of
the MNIST tutorial: at radius 0.1 and 0.3 in batches of 250, and in ART's default batch
of 32. Prints the median seconds of both sides, the accuracy that each leaves, and the
median ratio advreg/peer with its range. `--autoattack` compares AutoAttack instead.

The sides take turns in one run. In each turn each attacks a network of its own, cloned
for the occasion, so that what tracing costs is counted.

    python benchmarks/attack_speed.py [--turns 5] [--images 2000] [--epochs 5]
    python benchmarks/attack_speed.py --autoattack [--turns 1] [--images 200]

The peers, and MNIST, come by `python -m pip install -e ".[demo,attacks]" foolbox`.
"""

import argparse
import os
import statistics
import time
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

from advreg import attacks, datasets
from advreg.demo import mnist_network

ITERATIONS = 20
# Radius, length of a step, batch, peers.
SETTINGS = (
    (0.1, 0.01, 250, ("ART", "Foolbox")),
    (0.3, 0.0375, 250, ("ART", "Foolbox")),
    (0.1, 0.01, 32, ("ART",)),
)
HEAD = (
    f"{'attack':10} {'epsilon':>7} {'batch':>5} {'peer':8} {'advreg s':>8} "
    f"{'peer s':>7} {'advreg acc':>10} {'peer acc':>8} {'advreg/peer':>11} "
    f"{'range':>11}"
)


def trained_network(data, epochs):
    keras.utils.set_random_seed(0)
    model = mnist_network(data.x_train.shape[1:], 10)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    model.fit(data.x_train, data.y_train, batch_size=32, epochs=epochs, verbose=0)
    return model


def fresh(model):
    """The network once more, with nothing compiled for it yet."""
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    return clone


def advreg_pgd(epsilon, step, batch):
    attack = attacks.PGD(
        epsilon=epsilon,
        step_size=step,
        iterations=ITERATIONS,
        clip_value_min=0.0,
        clip_value_max=1.0,
    )
    return lambda model, x, y: attack(model, x, y, batch_size=batch)


def advreg_autoattack(epsilon, batch):
    attack = attacks.AutoAttack(epsilon=epsilon, clip_value_min=0.0, clip_value_max=1.0)
    return lambda model, x, y: attack(model, x, y, batch_size=batch)


def art_classifier(model):
    from art.estimators.classification import TensorFlowV2Classifier

    return TensorFlowV2Classifier(
        model,
        nb_classes=10,
        input_shape=model.input_shape[1:],
        loss_object=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        clip_values=(0.0, 1.0),
    )


def art_pgd(epsilon, step, batch):
    from art.attacks.evasion import ProjectedGradientDescent

    def run(model, x, y):
        attack = ProjectedGradientDescent(
            art_classifier(model),
            eps=epsilon,
            eps_step=step,
            max_iter=ITERATIONS,
            num_random_init=1,
            batch_size=batch,
            verbose=False,
        )
        return attack.generate(x, y)

    return run


def art_autoattack(epsilon, batch):
    from art.attacks.evasion import AutoAttack

    def run(model, x, y):
        attack = AutoAttack(art_classifier(model), eps=epsilon, batch_size=batch)
        return attack.generate(x, y)

    return run


def foolbox_pgd(epsilon, step, batch):
    from foolbox import TensorFlowModel
    from foolbox.attacks import LinfPGD

    def run(model, x, y):
        fooled = TensorFlowModel(model, bounds=(0.0, 1.0))
        attack = LinfPGD(abs_stepsize=step, steps=ITERATIONS, random_start=True)
        parts = []
        for start in range(0, len(x), batch):
            part = slice(start, start + batch)
            images = tf.convert_to_tensor(x[part])
            labels = tf.convert_to_tensor(y[part])
            parts.append(attack(fooled, images, labels, epsilons=epsilon)[1].numpy())
        return np.concatenate(parts)

    return run


PGD = {"advreg": advreg_pgd, "ART": art_pgd, "Foolbox": foolbox_pgd}
AUTO_ATTACK = {"advreg": advreg_autoattack, "ART": art_autoattack}


def compare(sides, model, x, y, turns):
    """Seconds and accuracies of each side, of each turn but a first that warms up."""
    seconds = {name: [] for name in sides}
    accuracies = {name: [] for name in sides}
    for turn in range(turns + 1):
        # The first turn loads what the process loads once, which few images do too.
        count = len(x) if turn else min(len(x), 64)
        for name, attack in sides.items():
            victim = fresh(model)
            start = time.perf_counter()
            x_adv = attack(victim, x[:count], y[:count])
            elapsed = time.perf_counter() - start
            if turn:
                seconds[name].append(elapsed)
                predicted = model.predict(x_adv, batch_size=250, verbose=0).argmax(1)
                accuracies[name].append(np.mean(predicted == y))
    return seconds, accuracies


def rows_of(label, seconds, accuracies):
    """A line for each peer."""
    s = {name: statistics.median(values) for name, values in seconds.items()}
    accuracy = {name: statistics.median(v) for name, v in accuracies.items()}
    for peer in list(seconds)[1:]:
        pairs = zip(seconds["advreg"], seconds[peer], strict=True)
        ratios = [own / other for own, other in pairs]
        span = f"{min(ratios):.2f}-{max(ratios):.2f}"
        yield (
            f"{label} {peer:8} {s['advreg']:8.2f} {s[peer]:7.2f} "
            f"{accuracy['advreg']:10.4f} {accuracy[peer]:8.4f} "
            f"{statistics.median(ratios):11.3f} {span:>11}"
        )


def missing(modules):
    """The packages that are not installed."""
    packages = {"art": "'advreg[attacks]'", "foolbox": "foolbox"}
    for module in modules:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # ART misses PyTorch aloud.
                __import__(module)
        except ImportError as error:
            yield (
                f"{module} is needed here: python -m pip install {packages[module]}. "
                f"Received: {error}"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int)
    parser.add_argument("--images", type=int)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--autoattack", action="store_true")
    arguments = parser.parse_args()
    lacking = list(missing(["art"] if arguments.autoattack else ["art", "foolbox"]))
    if lacking:
        parser.error(" ".join(lacking))
    turns = arguments.turns or (1 if arguments.autoattack else 5)
    images = arguments.images or (200 if arguments.autoattack else 2000)
    data = datasets.load("mnist")
    model = trained_network(data, arguments.epochs)
    x, y = data.x_test[:images], data.y_test[:images]
    print(HEAD)
    if arguments.autoattack:
        sides = {name: make(0.1, 100) for name, make in AUTO_ATTACK.items()}
        label = f"{'AutoAttack':10} {0.1:7} {100:5}"
        print(*rows_of(label, *compare(sides, model, x, y, turns)), sep="\n")
        return
    for epsilon, step, batch, peers in SETTINGS:
        sides = {name: PGD[name](epsilon, step, batch) for name in ("advreg", *peers)}
        label = f"{'PGD-20':10} {epsilon:7} {batch:5}"
        result = compare(sides, model, x, y, turns)
        print(*rows_of(label, *result), sep="\n", flush=True)


if __name__ == "__main__":
    main()
