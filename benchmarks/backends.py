"""How robust the same network is on each backend of Keras.

    python benchmarks/backends.py train network.npz --dataset mnist
    KERAS_BACKEND=tensorflow python benchmarks/backends.py attack network.npz
    KERAS_BACKEND=jax python benchmarks/backends.py attack network.npz
    KERAS_BACKEND=torch python benchmarks/backends.py attack network.npz

`train` trains the network of the tutorial for an epoch, and writes its weights and test
images into a file. `attack` measures it: with logits and with a softmax at its end, by
PGD-10 and AutoAttack. The accuracies should be those of the other backends, up to
random starts.
"""

import argparse

import keras
import numpy as np

import advreg
from advreg import attacks, datasets
from advreg.apps.recipes import digits_network, mnist_network


def make_network(shape, last):
    make = digits_network if shape[0] < 28 else mnist_network
    network = make(shape, 10)
    network.layers[-1].activation = keras.activations.get(last)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=last is None)
    network.compile("adam", loss, metrics=["accuracy"])
    return network


def train(path, name, quick):
    data = datasets.load(name)
    keras.utils.set_random_seed(0)
    rows = 500 if quick else None
    network = make_network(data.x_train.shape[1:], None)
    network.fit(data.x_train[:rows], data.y_train[:rows], epochs=1, verbose=0)
    np.savez(
        path,
        x=data.x_test[:1000],
        y=data.y_test[:1000],
        **{f"weight{n:02}": w for n, w in enumerate(network.get_weights())},
    )
    print(f"wrote {path}")


def attack(path, examples, epsilon):
    saved = np.load(path)
    x, y = saved["x"][:examples], saved["y"][:examples]
    limits = {"clip_value_min": 0.0, "clip_value_max": 1.0}
    tried = [
        attacks.PGD(epsilon, iterations=10, **limits),
        attacks.AutoAttack(epsilon, seed=0, **limits),
    ]
    if examples < 100:
        tried = [attacks.PGD(epsilon, iterations=2, **limits)]
    for last in ("softmax", None):
        network = make_network(x.shape[1:], last)
        network.set_weights([saved[key] for key in saved.files if "weight" in key])
        report = advreg.evaluate_robustness(
            network, x, y, attacks=tried, batch_size=250, verbose=0
        )
        for line in report.results:
            print(
                f"{keras.backend.backend():10}  {last or 'logits':7}  "
                f"{line.name:10}  {line.accuracy:.4f}"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few images")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("path")
    training.add_argument("--dataset", default="digits")
    attacking = commands.add_parser("attack")
    attacking.add_argument("path")
    attacking.add_argument("--examples", type=int, default=500)
    attacking.add_argument("--epsilon", type=float, default=0.1)
    options = parser.parse_args()
    if options.command == "train":
        train(options.path, options.dataset, options.quick)
    else:
        attack(options.path, 20 if options.quick else options.examples, options.epsilon)


if __name__ == "__main__":
    main()
