"""Trains on one device of JAX and then on two, and prints how far they are apart.

It runs in a process of its own, because JAX counts its devices once.
"""

import json

import keras
import numpy as np
from keras import layers

import advreg
from advreg import attacks

ROWS, CLASSES = 96, 3


def trained():
    keras.utils.set_random_seed(0)
    base = keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(16),
            layers.BatchNormalization(),
            layers.Activation("tanh"),
            layers.Dense(CLASSES, activation="softmax"),
        ]
    )
    config = advreg.make_adv_reg_config(
        adv_step_size=0.1, adv_grad_norm="l2", pgd_iterations=2, pgd_epsilon=0.3
    )
    model = advreg.AdversarialRegularization(base, config)
    loss = "sparse_categorical_crossentropy"
    model.compile(keras.optimizers.SGD(0.1), loss, metrics=["accuracy"])
    generator = np.random.default_rng(0)
    x = generator.normal(size=(ROWS, 8)).astype("float32")
    y = generator.integers(0, CLASSES, ROWS)
    weights = generator.uniform(0, 2, ROWS).astype("float32")
    logs = model.fit(
        x, y, sample_weight=weights, batch_size=16, epochs=2, shuffle=False, verbose=0
    )
    report = advreg.evaluate_robustness(
        model, x, y, attacks=attacks.FGSM(0.1), batch_size=32, verbose=0
    )
    return [
        *base.get_weights(),
        model.perturb_on_batch(x[:16], y[:16]),
        np.array([values for _, values in sorted(logs.history.items())]),
        np.array(model.evaluate(x, y, verbose=0)),
        np.array([line.accuracy for line in report.results]),
    ]


def main():
    import jax

    one = trained()
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    two = trained()
    apart = [float(np.abs(a - b).max()) for a, b in zip(one, two, strict=True)]
    print(json.dumps({"devices": jax.device_count(), "apart": apart}))


if __name__ == "__main__":
    main()
