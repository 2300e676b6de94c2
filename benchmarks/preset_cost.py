"""What a training step of each preset costs.

Prints the median ratio of the training step of each preset to the plain Keras step of
the same network, that of NSL's tutorial, and for those that move the weights as well
the ratio to the same preset without that. All sides take turns in one run.

    python benchmarks/preset_cost.py [--turns 20] [--batch 128] [--iterations 10]
"""

import argparse
import statistics

import numpy as np
import tensorflow as tf
from step_cost import compiled, keras_step, measure, network  # Sets TensorFlow up.

import advreg
from advreg import AdvRegConfig
from advreg.tables import text_table


def presets(iterations):
    """The presets, by name."""
    return {
        "fgsm": AdvRegConfig.fgsm(0.1),
        "fast": AdvRegConfig.fast(0.1),
        "fast, clean_weight 0": AdvRegConfig.fast(0.1, clean_weight=0.0),
        "n_fgsm": AdvRegConfig.n_fgsm(0.1),
        f"pgd-{iterations}": AdvRegConfig.pgd(0.1, iterations),
        f"pgd-{iterations}, clean_weight 0": AdvRegConfig.pgd(
            0.1, iterations, clean_weight=0.0
        ),
        f"trades-{iterations}": AdvRegConfig.trades(0.1, iterations=iterations),
        f"mart-{iterations}": AdvRegConfig.mart(0.1, iterations=iterations),
        f"logit_pairing-{iterations}": AdvRegConfig.logit_pairing(
            0.1, iterations=iterations
        ),
        "virtual_adversarial": AdvRegConfig.virtual_adversarial(1.0),
        "fgsm + awp": AdvRegConfig.fgsm(0.1, weight_perturbation=0.01),
        f"trades-{iterations} + awp": AdvRegConfig.trades(
            0.1, iterations=iterations, weight_perturbation=0.01
        ),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=10)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    data = tf.data.Dataset.from_tensors(
        (
            rng.uniform(size=(args.batch, 28, 28, 1)).astype("float32"),
            rng.integers(0, 10, args.batch),
        )
    ).repeat()
    configs = presets(args.iterations)
    sides = {"plain": keras_step(compiled(network(), False))}
    for name, config in configs.items():
        model = advreg.AdversarialRegularization(network(), config)
        sides[name] = keras_step(compiled(model, False))
    times = measure(sides, data, args.turns, steps=2)

    def ratio(name, reference):
        ratios = [a / b for a, b in zip(times[name], times[reference], strict=True)]
        return f"{statistics.median(ratios):.2f}"

    rows = [("plain", f"{statistics.median(times['plain']):.1f}", "1.00", "")]
    for name in configs:
        alone = name.removesuffix(" + awp")
        without = ratio(name, alone) if alone != name else ""
        milliseconds = f"{statistics.median(times[name]):.1f}"
        rows.append((name, milliseconds, ratio(name, "plain"), without))
    head = ("preset", "ms", "/ plain Keras", "/ without awp")
    print(text_table(head, rows))


if __name__ == "__main__":
    main()
