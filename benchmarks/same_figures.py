"""Records what training and attacks give, to the last bit, and compares two records.

A change of the code that should change no figure is tried so:

    python benchmarks/same_figures.py record before.npz     # before the change
    python benchmarks/same_figures.py record after.npz      # after it
    python benchmarks/same_figures.py compare before.npz after.npz

For each of twelve configurations it takes ten steps of training on made data, and
records the weights, the logs, the perturbed batch of `perturb_on_batch`, and the
reports of five attacks. Figures are the same only on the same machine, with the same
versions of Keras and its backend.
"""

import argparse
import re
import sys

import keras
import numpy as np
from keras import layers

import advreg
from advreg import AdvRegConfig, attacks, make_adv_reg_config

ROWS, CLASSES = 80, 3


def perceptron():
    return keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(16, activation="relu"),
            layers.Dense(CLASSES),
        ]
    )


def convolutional(dtype=None):
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(9, 3, activation="relu", dtype=dtype),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(CLASSES, activation="softmax"),
        ]
    )


def normalised():
    return keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(16),
            layers.BatchNormalization(),
            layers.Activation("relu"),
            layers.Dropout(0.3),
            layers.Dense(CLASSES),
        ]
    )


def two_inputs():
    left, right = keras.Input((5,), name="left"), keras.Input((3,), name="right")
    hidden = layers.Dense(16, activation="tanh")(layers.Concatenate()([left, right]))
    inputs = {"left": left, "right": right}
    return keras.Model(inputs, layers.Dense(CLASSES)(hidden))


def of_bytes():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1), dtype="uint8"),
            layers.Rescaling(1 / 255),
            layers.Conv2D(9, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(CLASSES),
        ]
    )


def masked():
    return keras.Sequential(
        [
            keras.Input((6, 4)),
            layers.Masking(),
            layers.LSTM(8),
            layers.Dense(CLASSES),
        ]
    )


def vectors(generator):
    return generator.uniform(0, 1, (ROWS, 8)).astype("float32")


def images(generator):
    return generator.uniform(0, 1, (ROWS, 8, 8, 1)).astype("float32")


def byte_images(generator):
    return generator.integers(0, 256, (ROWS, 8, 8, 1)).astype("uint8")


def pairs(generator):
    x = vectors(generator)
    return {"left": x[:, :5], "right": x[:, 5:]}


def sequences(generator):
    x = generator.uniform(0.1, 1, (ROWS, 6, 4)).astype("float32")
    x[::2, 4:] = 0.0
    return x


STEP = {"adv_step_size": 0.1, "adv_grad_norm": "infinity"}
UNIT = {"clip_value_min": 0.0, "clip_value_max": 1.0}
# Name: network, data, configuration, range of the data.
CASES = {
    "fgsm": (perceptron, vectors, make_adv_reg_config(**STEP), 1.0),
    "pgd": (convolutional, images, AdvRegConfig.pgd(0.1, **UNIT), 1.0),
    "trades": (perceptron, vectors, AdvRegConfig.trades(0.1, **UNIT), 1.0),
    "mart": (convolutional, images, AdvRegConfig.mart(0.1, **UNIT), 1.0),
    "awp": (
        perceptron,
        vectors,
        AdvRegConfig.pgd(0.1, weight_perturbation=0.01, **UNIT),
        1.0,
    ),
    "virtual": (perceptron, vectors, AdvRegConfig.virtual_adversarial(0.5), 1.0),
    "two inputs": (two_inputs, pairs, AdvRegConfig.pgd(0.2, adv_grad_norm="l2"), 1.0),
    "batchnorm and dropout": (normalised, vectors, AdvRegConfig.trades(0.1), 1.0),
    "uint8": (of_bytes, byte_images, AdvRegConfig.pgd(8.0), 255.0),
    "masking": (masked, sequences, AdvRegConfig.pgd(0.1), 1.0),
    "clean_weight 0": (
        convolutional,
        images,
        AdvRegConfig.fast(0.1, clean_weight=0.0, **UNIT),
        1.0,
    ),
    "mixed_float16": (
        lambda: convolutional("mixed_float16"),
        images,
        AdvRegConfig.pgd(0.1, **UNIT),
        1.0,
    ),
}


def attacks_on(unit):
    words = {"clip_value_min": 0.0, "clip_value_max": unit, "seed": 1}
    epsilon = 0.1 * unit
    return [
        attacks.FGSM(epsilon, clip_value_min=0.0, clip_value_max=unit),
        attacks.PGD(epsilon, iterations=5, restarts=2, **words),
        attacks.PGD(5 * epsilon, iterations=5, norm="l2", **words),
        attacks.APGD(epsilon, iterations=10, **words),
        attacks.RandomNoise(epsilon, **words),
    ]


def record(path, quick=False):
    found = {}
    for name in list(CASES)[: 1 if quick else None]:
        network, make, config, unit = CASES[name]
        keras.utils.set_random_seed(7)
        generator = np.random.default_rng(7)
        x, y = make(generator), generator.integers(0, CLASSES, ROWS)
        base = network()
        is_softmax = getattr(base.layers[-1], "activation", None)
        from_logits = is_softmax is not keras.activations.softmax
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits)
        model = advreg.AdversarialRegularization(base, config)
        model.compile("adam", loss, metrics=["accuracy"])
        history = model.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
        for key, values in history.history.items():
            found[f"{name}: log {key}"] = np.array(values)
        for index, weight in enumerate(base.get_weights()):
            found[f"{name}: weight {index}"] = weight
        x_adv = model.perturb_on_batch(
            keras.tree.map_structure(lambda leaf: leaf[:32], x), y[:32]
        )
        for index, leaf in enumerate(keras.tree.flatten(x_adv)):
            found[f"{name}: x_adv {index}"] = leaf
        report = advreg.evaluate_robustness(
            model, x, y, attacks=attacks_on(unit), batch_size=32, verbose=0
        )
        # Of a report everything but the seconds, which are never the same.
        found[f"{name}: report"] = np.array(re.sub(r"[\d.]+ s\b", "", str(report)))
        square = attacks.Square(
            0.1 * unit, queries=20, seed=1, clip_value_min=0.0, clip_value_max=unit
        )
        if name in ("pgd", "uint8"):
            for index, leaf in enumerate(keras.tree.flatten(square(model, x, y))):
                found[f"{name}: square {index}"] = leaf
        print(f"{name}: {len(found)} values recorded")
    np.savez(path, **found)


def compare(before, after):
    one, other = np.load(before), np.load(after)
    differing = sorted(set(one.files) ^ set(other.files))
    for name in differing:
        print(f"{name}: only in one of the records")
    for name in sorted(set(one.files) & set(other.files)):
        a, b = one[name], other[name]
        if a.dtype.kind == "U":
            if a != b:
                print(f"{name}:\n{a}\n{b}")
                differing.append(name)
        elif not np.array_equal(a, b, equal_nan=True):
            distance = np.nanmax(np.abs(a.astype(float) - b.astype(float)))
            print(f"{name}: differs by up to {distance:.3g}")
            differing.append(name)
    print(f"{len(differing)} of {len(one.files)} values differ")
    return 1 if differing else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the first case alone")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("record").add_argument("path")
    comparing = commands.add_parser("compare")
    comparing.add_argument("before")
    comparing.add_argument("after")
    options = parser.parse_args()
    if options.command == "record":
        record(options.path, options.quick)
        return 0
    return compare(options.before, options.after)


if __name__ == "__main__":
    sys.exit(main())
