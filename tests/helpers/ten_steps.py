"""Ten steps of training that every backend must take alike.

`python -m helpers.ten_steps` (in `tests/`, on TensorFlow) writes the numbers that
`tests/training/test_ten_steps.py` compares with. All random numbers come from NumPy, so
that they are the same on each backend.
"""

from pathlib import Path

import keras
import numpy as np
from keras import layers, ops

import advreg
from advreg import make_adv_reg_config
from advreg.perturbation import ball

FILE = Path(__file__).parents[1] / "training" / "ten_steps.npz"
ROWS, BATCH, CLASSES = 160, 16, 4
UNIT = {"clip_value_min": 0.0, "clip_value_max": 1.0}
STEPS = {"adv_step_size": 0.03, "pgd_iterations": 3, "pgd_epsilon": 0.06}
LINF = {**STEPS, "adv_grad_norm": "infinity"}
L2 = {"adv_grad_norm": "l2", "adv_step_size": 0.3, "pgd_iterations": 3}
START = {"random_init": True}


def perceptron(last):
    return keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(16, activation="tanh"),
            layers.Dense(CLASSES, activation=last),
        ]
    )


def convolutional(last):
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(8, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(CLASSES, activation=last),
        ]
    )


def normalised(last):
    return keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(16),
            layers.BatchNormalization(),
            layers.Activation("tanh"),
            layers.Dense(CLASSES, activation=last),
        ]
    )


def two_inputs(last):
    left, right = keras.Input((5,), name="left"), keras.Input((3,), name="right")
    hidden = layers.Dense(16, activation="tanh")(layers.Concatenate()([left, right]))
    outputs = layers.Dense(CLASSES, activation=last)(hidden)
    return keras.Model({"left": left, "right": right}, outputs)


def of_bytes(last):
    return keras.Sequential(
        [
            keras.Input((8, 8, 1), dtype="uint8"),
            layers.Rescaling(1 / 255),
            layers.Flatten(),
            layers.Dense(CLASSES, activation=last),
        ]
    )


def masked(last):
    return keras.Sequential(
        [
            keras.Input((6, 4)),
            layers.Masking(),
            layers.SimpleRNN(8),
            layers.Dense(CLASSES, activation=last),
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


CASES = {
    "fgsm": (perceptron, vectors, {"adv_step_size": 0.1, "adv_grad_norm": "infinity"}),
    "pgd": (convolutional, images, {**LINF, **UNIT}),
    "l2": (perceptron, vectors, {**L2, "pgd_epsilon": 0.5}),
    "l1": (perceptron, vectors, {**L2, "adv_grad_norm": "l1", "pgd_epsilon": 0.5}),
    "random start": (perceptron, vectors, {**LINF, **START}),
    "without clean pass": (convolutional, images, {**LINF, "clean_weight": 0.0}),
    "weight perturbation": (perceptron, vectors, {**LINF, "weight_perturbation": 0.01}),
    "trades": (perceptron, vectors, {**LINF, **START, "objective": "trades"}),
    "mart": (perceptron, vectors, {**LINF, "objective": "mart", "clean_weight": 0.0}),
    "virtual": (
        perceptron,
        vectors,
        {
            **L2,
            **START,
            "objective": "virtual_adversarial",
            "power_iterations": 1,
            "init_radius": 0.1,
        },
    ),
    "two inputs": (two_inputs, pairs, L2),
    "uint8": (of_bytes, byte_images, {"adv_step_size": 8.0, "adv_grad_norm": "l2"}),
    "masking": (masked, sequences, LINF),
    "BatchNorm": (normalised, vectors, {**L2, "pgd_epsilon": 0.5}),
}


def sample(shape, norm, seed, free, dtype):
    """Stands in for `sample_unit_ball`: the same start on every backend."""
    rows = np.random.default_rng(5).uniform(-1, 1, (BATCH, shape[1]))
    start = ops.convert_to_tensor(rows / shape[1], dtype)[: shape[0]]
    return start if free is None else ops.where(free, start, 0.0)


def run(name, last):
    """Takes ten steps.

    Args:
        name: A key of `CASES`.
        last: The last activation, "softmax" or `None`.

    Returns:
        The logs, and of each weight and of a perturbed batch the first values and the
        length, in one array.
    """
    network, make, config = CASES[name]
    generator = np.random.default_rng(1)
    x, y = make(generator), generator.integers(0, CLASSES, ROWS)
    base = network(last)
    base.set_weights(
        [
            np.ones(w.shape)
            if "variance" in w.path or "gamma" in w.path
            else generator.normal(0, 0.3, w.shape)
            for w in base.weights
        ]
    )
    model = advreg.AdversarialRegularization(base, make_adv_reg_config(**config))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=last is None)
    model.compile(keras.optimizers.SGD(0.1), loss, metrics=["accuracy"])
    logs = model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
    few = keras.tree.map_structure(lambda leaf: leaf[:BATCH], x)
    found = [value for _, value in sorted(logs.history.items())]
    moved = keras.tree.flatten(model.perturb_on_batch(few, y[:BATCH]))
    for values in (*base.get_weights(), *moved):
        flat = np.asarray(values, "float64").ravel()
        found.append([*flat[:6], np.linalg.norm(flat)])
    return np.concatenate(found)


def main():
    ball.sample_unit_ball = sample
    found = {}
    for name in CASES:
        for last in (None, "softmax"):
            floatx = "float64" if name == "BatchNorm" else "float32"
            keras.config.set_floatx(floatx)
            found[f"{name}, {last}"] = run(name, last)
    np.savez_compressed(FILE, **found)
    print(f"{len(found)} arrays, {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
