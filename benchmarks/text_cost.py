"""Measures what perturbing embeddings costs in training, and how good substitution is.

    python benchmarks/text_cost.py              # steps of training
    python benchmarks/text_cost.py --attack --texts FOLDER

The first prints the ratio of the median training step to that of plain Keras: Adam, a
table of 20,000 words of width 100, texts of 40 words, batches of 64. "named, multiplier
0" names the layer and perturbs nothing. All sides take turns in one run.

The second trains a TextCNN on TREC, and compares `TokenSubstitution(1)` with trying all
candidates of all tokens, on 200 test sentences: how many are fooled, and how often the
model is called for each. FOLDER is that of `text_table.py`.
"""

import argparse
import os
import pathlib
import statistics

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers
from keras_side import steps_of
from text_table import load, made_up, train
from turns import ratio, seconds, table, take_turns

import advreg
from advreg import AdvRegConfig
from advreg.attacks import RandomSubstitution, TokenSubstitution

LAYERS = {"perturb": "embeddings", "adv_grad_norm": "l2"}
CONFIGS = {
    "plain Keras": None,
    "named, multiplier 0": AdvRegConfig.fgsm(0.3, multiplier=0.0, **LAYERS),
    "FGSM": AdvRegConfig.fgsm(0.3, **LAYERS),
    "PGD-3": AdvRegConfig.pgd(0.3, 3, random_init=False, **LAYERS),
    "virtual adversarial": AdvRegConfig.virtual_adversarial(0.3, perturb="embeddings"),
}
CANDIDATES = 10


def network(kind, words, width):
    ids = keras.Input((None,), dtype="int32")
    x = layers.Embedding(words, width, mask_zero=kind == "LSTM")(ids)
    if kind == "LSTM":
        x = layers.LSTM(64)(x)
    else:
        found = [layers.Conv1D(64, size, activation="relu")(x) for size in (3, 4, 5)]
        x = layers.Concatenate()([layers.GlobalMaxPooling1D()(each) for each in found])
    return keras.Model(ids, layers.Dense(2)(x))


def side(kind, config, words, width, x, y, steps):
    keras.utils.set_random_seed(0)
    model = network(kind, words, width)
    if config is not None:
        model = advreg.AdversarialRegularization(model, config)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    # Not `fit`, whose end waits for the threads that read: up to half as long again.
    run = steps_of(model, x, y)
    return lambda: seconds(run, steps) / steps * 1e3


def costs(quick):
    words, width, steps, turns = (50, 4, 2, 1) if quick else (20_000, 100, 30, 9)
    draws = np.random.default_rng(0)
    x = draws.integers(1, words, (64, 40)).astype("int32")
    y = draws.integers(0, 2, len(x))
    for kind in ("TextCNN", "LSTM"):
        sides = {
            name: side(kind, config, words, width, x, y, steps)
            for name, config in CONFIGS.items()
        }
        rows, times = [], take_turns(sides, turns, warm=1)
        for name, own in times.items():
            found = ratio(own, times["plain Keras"])
            rows.append([name, f"{statistics.median(own):.1f}", f"{found[1]:.2f}"])
        print(table([kind, "ms", "/ plain Keras"], rows), end="\n\n")


def fooled_by_any(model, x, y, candidates):
    """Tries all candidates of all tokens; returns who is fooled, and the calls."""
    fooled, calls = np.zeros(len(y), bool), 0
    for place in range(x.shape[1]):
        for turn in range(CANDIDATES):
            token = candidates[x[:, place], turn]
            rows = np.flatnonzero((x[:, place] > 0) & (token > 0))
            if not len(rows):
                continue
            moved = x[rows].copy()
            moved[:, place] = token[rows]
            # Always as many rows, so that nothing is compiled again.
            padded = np.concatenate([moved, x[: len(x) - len(rows)]])
            found = model.predict_on_batch(padded)[: len(rows)].argmax(1)
            fooled[rows] |= found != y[rows]
            calls += len(rows)
    return fooled, calls


def attack(folder, quick):
    read = made_up if quick else load
    data, (x, y), words, classes = read(folder, "trec", 0)
    model, _ = train("cnn", "plain", 0.5, data, words, classes, 0, 1 if quick else 8)
    right = np.flatnonzero(model.predict(x, verbose=0).argmax(1) == y)
    x, y = x[right][:200], y[right][:200]
    (rows,) = model.get_layer("words").get_weights()
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    near = rows @ rows.T
    np.fill_diagonal(near, -np.inf)
    near[:, 0] = -np.inf
    candidates = np.argsort(-near, axis=1)[:, :CANDIDATES]
    expected, calls = fooled_by_any(model, x, y, candidates)
    lines = [["all changes", f"{100 * expected.mean():.1f}", f"{calls / len(y):.0f}"]]
    for verified in (5, 10, 20):
        tried = TokenSubstitution(1, CANDIDATES, verified=verified)
        found = model.predict(tried(model, x, y), verbose=0).argmax(1) != y
        # One call judges the text as it is, and one gives the gradient.
        cost = f"≤ {2 + verified}"
        lines.append([repr(tried), f"{100 * found.mean():.1f}", cost])
    tried = RandomSubstitution(1, CANDIDATES, tries=10, seed=0)
    found = model.predict(tried(model, x, y), verbose=0).argmax(1) != y
    lines.append([repr(tried), f"{100 * found.mean():.1f}", "≤ 11"])
    print(table(["one token replaced", "fooled, %", "calls for a text"], lines))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="tiny")
    parser.add_argument("--attack", action="store_true", help="compare substitutions")
    parser.add_argument("--texts", type=pathlib.Path, help="folder with the texts")
    options = parser.parse_args()
    if not options.attack:
        costs(options.quick)
    elif options.texts is None and not options.quick:
        parser.error("--texts is needed: the folder with the texts")
    else:
        attack(options.texts, options.quick)


if __name__ == "__main__":
    main()
