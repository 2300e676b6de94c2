"""Tells where the time of an attack goes, on a plainly trained network for MNIST.

Prints the operations of a look at a batch, by what they are for, of PGD and of the two
attacks in which AutoAttack spends its time; how many images still stand at each look of
PGD-20; and how long AutoAttack takes for each of its parts. All is done by a single
thread. The network and the images are those of the works `attack` of `compare.py`;
`PROFILE.md` says what was found.

    python benchmarks/attack_profile.py [--quick]
"""

import argparse
import pathlib
import tempfile

# It limits the threads of TensorFlow, and comes first.
from step_profile import STEPS, medians, profiled, purpose

# isort: split
import numpy as np
from keras_side import fresh_copy, load, make_file
from peer_advreg import RANGE
from side import Job
from turns import seconds, table

from advreg.attacks import APGD, PGD, AutoAttack, Square

EPSILON = 0.1
RADII = {EPSILON: 0.01, 0.3: 0.0375}  # With the size of a step.
# Attacks that look as often as they are told to.
LOOKS = {
    "PGD": lambda looks: PGD(EPSILON, iterations=looks, step_size=0.01, **RANGE),
    "APGD": lambda looks: APGD(EPSILON, iterations=looks, **RANGE),
    "Square": lambda looks: Square(EPSILON, queries=looks, **RANGE),
}
# What an operation is for, by what stands in its name: the first that fits.
PURPOSES = {
    "backward, to the first convolution's input": "IdentityN_grad",
    "backward, the rest": "gradient_tape/|gradients/",
    "forward": "functional|sequential|conv2d|dense|max_pool",
    "ball, range, sign, loss, the rest": "",
}


def look(make, model, x, y):
    """Returns milliseconds of the operations of a look, without the last judgement."""
    twin = fresh_copy(model)  # Its functions are new to the profiler.

    def run(steps):
        make(steps)(twin, x, y, batch_size=len(x), early_stop=False)

    run(1)
    longer, shorter = profiled(lambda _: run(2 * STEPS)), profiled(run)
    longer.subtract(shorter)
    return longer


def standing(model, x, y, epsilon, step_size, batch, looks):
    """Yields the part of the images that stands when each look begins, nearly exactly.

    The first look is at all images, the second at those that stand at a random start,
    which moves hardly any, and every other at what one step less has left.
    """
    yield 1.0
    yield accuracy(model, x, y)
    for steps in range(1, looks - 1):
        attack = PGD(epsilon, iterations=steps, step_size=step_size, seed=0, **RANGE)
        yield accuracy(model, attack(model, x, y, batch_size=batch), y)


def accuracy(model, x, y):
    return float(np.mean(model.predict(x, 250, verbose=0).argmax(1) == y))


def took(attack, model, x, y):
    """Returns the seconds of an attack, with its tracing."""
    return seconds(lambda: attack(fresh_copy(model), x, y, batch_size=100))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images, no training")
    quick = parser.parse_args().quick
    batch, images, turns, epochs = (16, 32, 1, 0) if quick else (250, 2000, 5, 5)
    looks, iterations, queries, few = (3, 2, 5, 16) if quick else (20, 100, 5000, 200)
    with tempfile.TemporaryDirectory() as folder:
        path = str(pathlib.Path(folder, "mnist.npz"))
        make_file(path, "mnist", examples=images, epochs=epochs)
        job = Job("attack", "mnist", path, examples=images)
        model, (x, y) = load(job), job.data()
    columns = []
    for make in LOOKS.values():
        found = [look(make, model, x[:batch], y[:batch]) for _ in range(turns)]
        columns.append(medians(found, lambda name: purpose(name, PURPOSES)))
    rows = [[told, *(f"{c.get(told, 0):.2f}" for c in columns)] for told in PURPOSES]
    rows.append(["all", *(f"{sum(column.values()):.2f}" for column in columns)])
    print(table([f"a look at {batch} images, ms", *LOOKS], rows))
    for epsilon, step_size in RADII.items():
        parts = list(standing(model, x, y, epsilon, step_size, batch, looks))
        print(f"\nε {epsilon}: {np.mean(parts):.2f} of the images stand on average:")
        print(*(f"{part:.3f}" for part in parts))
    steps, some = {"iterations": iterations, **RANGE}, (model, x[:few], y[:few])
    first = took(APGD(EPSILON, **steps), *some)
    ascents = took(AutoAttack(EPSILON, queries=1, **steps), *some)
    whole = took(AutoAttack(EPSILON, queries=queries, **steps), *some)
    print(
        f"\nAutoAttack, ε {EPSILON}, {few} images: {first:.1f} s in APGD, "
        f"{ascents - first:.1f} towards each class, {whole - ascents:.1f} in Square"
    )


if __name__ == "__main__":
    main()
