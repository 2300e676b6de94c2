"""Where the time of an attack goes, on a plainly trained network for MNIST.

Prints the operations of a look at a batch, by what they are for, of PGD and of the two
attacks in which AutoAttack spends its time; how many images still stand at each look of
PGD-20, those which advreg goes on with; and how long AutoAttack takes for each kind of
its rounds. All is done by a single thread. The network and the images are those of the
works `attack` of `compare.py`; `PROFILE.md` says what was found.

    python benchmarks/attack_profile.py [--batch 250] [--images 2000] [--turns 5]
"""

import argparse
import collections
import pathlib
import re
import statistics
import tempfile
import time
from unittest import mock

from step_profile import STEPS, median, profiled, summed  # Before TensorFlow: threads.

# isort: split
import keras
import numpy as np
from peers import keras_networks, materials
from peers.job import CLIP, Job

from advreg.attacks import APGD, PGD, AutoAttack, Square
from advreg.attacks.engine import Scene
from advreg.tables import text_table

RANGE = {"clip_value_min": CLIP[0], "clip_value_max": CLIP[1]}
RADII = ((0.1, 0.01), (0.3, 0.0375))  # With the size of a step.
ITERATIONS = 20
EPSILON = 0.1
# Attacks that look as often as they are told to.
LOOKS = {
    "PGD": lambda looks: PGD(EPSILON, iterations=looks, step_size=0.01, **RANGE),
    "APGD": lambda looks: APGD(EPSILON, iterations=looks, **RANGE),
    "Square": lambda looks: Square(EPSILON, queries=looks, **RANGE),
}
# AutoAttack, as the comparison has it, and what its rounds are.
AUTO_IMAGES, AUTO_BATCH = 200, 100
ROUNDS = {
    "AutoAscent": "APGD",
    "AscentTowards": "APGD, towards a class",
    "Search": "Square",
}
NETWORKS = str(pathlib.Path(__file__).with_name("networks"))
# What an operation is for, by what stands in its name: the first that fits.
PURPOSES = (
    ("backward, to the first convolution's input", "IdentityN_grad"),
    ("backward, the rest", "gradient_tape/|gradients/"),
    ("forward", "functional|sequential|conv2d|dense|max_pool"),
    ("ball, range, sign, loss, the rest", ""),
)


def purpose(name):
    return next(told for told, pattern in PURPOSES if re.search(pattern, name))


def look(make, model, x, y):
    """Milliseconds of the operations of a look, the judgement at the end left out."""
    twin = keras.models.clone_model(model)  # Whose functions are new to the profiler.
    twin.set_weights(model.get_weights())

    def run(steps):
        make(steps)(twin, x, y, batch_size=len(x), early_stop=False)

    run(1)
    longer, shorter = profiled(lambda _: run(2 * STEPS)), profiled(run)
    names = longer.keys() | shorter.keys()
    times = {name: longer.get(name, 0.0) - shorter.get(name, 0.0) for name in names}
    return summed(times, purpose)


def standing(model, x, y, epsilon, step_size, batch):
    """The part of the images that stands when each look begins, as good as exactly.

    The first look is at all images, the second at those that stand at a random start,
    which moves hardly any, and every other at what one step less has left.
    """
    parts = [1.0, accuracy(model, x, y, batch)]
    for steps in range(1, ITERATIONS - 1):
        attack = PGD(epsilon, iterations=steps, step_size=step_size, seed=0, **RANGE)
        x_adv = attack(model, x, y, batch_size=batch)
        parts.append(accuracy(model, x_adv, y, batch))
    return parts


def by_round(model, x, y):
    """How many batches AutoAttack plays each kind of round on, and the seconds spent.

    They hold the tracing of each kind.
    """
    played, seconds = collections.Counter(), collections.Counter()
    play = Scene.play

    def timed(scene, round_, rows, seed):
        start = time.perf_counter()
        outcome = play(scene, round_, rows, seed)
        name = ROUNDS[type(round_).__name__]
        played[name] += 1
        seconds[name] += time.perf_counter() - start
        return outcome

    with mock.patch.object(Scene, "play", timed):
        AutoAttack(EPSILON, **RANGE)(model, x, y, batch_size=AUTO_BATCH)
    return [(name, str(played[name]), f"{seconds[name]:.1f}") for name in played]


def accuracy(model, x, y, batch):
    return float(np.mean(model.predict(x, batch, verbose=0).argmax(1) == y))


def network(images, epochs):
    """The network, and test images with their labels."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(pathlib.Path(folder, "mnist.npz"))
        trained = {"epochs": epochs, "folder": NETWORKS}
        materials.make(path, "mnist", examples=images, trained=trained)
        job = Job(kind="attack", network="mnist", file=path)
        x, y = job.data(images)
        return keras_networks.load(job), x, y


def parse(arguments=None):
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5, help="of plain training")
    return parser.parse_args(arguments)


def main():
    settings = parse()
    model, x, y = network(settings.images, settings.epochs)
    few = x[: settings.batch], y[: settings.batch]
    found = {name: [] for name in LOOKS}
    for _ in range(settings.turns):
        for name, make in LOOKS.items():
            found[name].append(look(make, model, *few))
    times = {name: median(turns) for name, turns in found.items()}
    rows = [
        (told, *(f"{column.get(told, 0.0):.2f}" for column in times.values()))
        for told, _ in PURPOSES
    ]
    rows.append(("all", *(f"{sum(column.values()):.2f}" for column in times.values())))
    print(text_table((f"a look at {len(few[0])} images, ms", *times), rows))
    for epsilon, step_size in RADII:
        parts = standing(model, x, y, epsilon, step_size, settings.batch)
        print(
            f"\nε {epsilon}: {statistics.mean(parts):.2f} of the images stand on "
            f"average over {len(parts)} looks:\n"
            f"{' '.join(f'{part:.3f}' for part in parts)}",
            flush=True,
        )
    some = x[:AUTO_IMAGES], y[:AUTO_IMAGES]
    titles = (f"AutoAttack, ε {EPSILON}, {len(some[0])} images", "batches", "s")
    print(f"\n{text_table(titles, by_round(model, *some))}")


if __name__ == "__main__":
    main()
