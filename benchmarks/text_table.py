"""Trains classifiers of short texts by several recipes, and prints what each gives.

Sentence classification (TREC, CR, MR, SST-2) with random embeddings, by a TextCNN
([Kim, 2014](https://arxiv.org/abs/1408.5882)) and a bidirectional LSTM:

    python benchmarks/text_table.py --texts FOLDER [--only trec/cnn cr/lstm/fgsm ...]
    python benchmarks/text_table.py --print     # the rows that are there
    python benchmarks/text_table.py --quick     # tiny, on made-up texts

FOLDER has one file for each part of a dataset, `trec.train.txt`, `trec.test.txt`,
`cr.txt` and so on: one text a line, the label first, tokens between blanks.

Radius and epochs of each recipe are chosen by cross-validation on the training data, in
three parts, with seeds of their own, and never on test data. Then ten seeds train on
all of it. A dataset without a test part gives a tenth, another one for each seed. Rows
have the accuracy on test data, and that under one and three substituted tokens, as
means with 95 % intervals; and the same as the difference from random noise of the same
size, seed by seed.

All of it takes many hours on two cores. Each finished seed is a line of
`benchmarks/text_table.jsonl`, and a run goes on where the last one stopped; several may
run at once. It runs on TensorFlow and JAX. On a CPU the LSTM is faster with
`KERAS_BACKEND=jax`, and the TextCNN without.
"""

import argparse
import itertools
import json
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from keras import layers
from turns import table

import advreg
from advreg import AdvRegConfig, make_adv_reg_config
from advreg.attacks import TokenSubstitution

FILE = pathlib.Path(__file__).with_suffix(".jsonl")
DATASETS = ("trec", "cr", "mr", "sst2")
NETWORKS = ("cnn", "lstm")
LENGTH, WIDTH, BATCH, EPOCHS, SEEDS, FOLDS = 30, 50, 64, 15, 10, 3
LABELLED = 500  # Examples with a label in the semi-supervised recipes.
FEW = ("few labels", "few labels, virtual")
LAYERS = {"perturb": "embeddings", "relative": True, "adv_grad_norm": "l2"}
RADII = (0.3, 1.0, 3.0)


# Recipes: a configuration for each value to choose from, or `None` for plain training.


def noise(radius):
    return make_adv_reg_config(
        1.0, pgd_iterations=0, pgd_epsilon=radius, random_init=True, **LAYERS
    )


def fgsm(radius):
    return AdvRegConfig.fgsm(radius, **LAYERS)


def pgd(radius):
    return AdvRegConfig.pgd(radius, 3, **LAYERS)


def virtual(radius):
    return AdvRegConfig.virtual_adversarial(radius, **LAYERS)


CONFIGS = {"noise": noise, "fgsm": fgsm, "pgd": pgd, "virtual": virtual}
CONFIGS["few labels, virtual"] = virtual
CHOICES = {
    "plain": (0.5,),  # Dropout.
    "dropout": (0.3, 0.5, 0.7),
    "table": (0.3, 1.0, 3.0),  # Radius of the gradient with respect to the table.
    "few labels": (0.5,),
    **dict.fromkeys(CONFIGS, RADII),
}


class TableGradient(keras.Model):
    """What the snippets do: the table moves along its own gradient, and back.

    Args:
        base: The model, with one `Embedding`.
        radius: Length of the step, in the Frobenius norm of the table.
    """

    def __init__(self, base, radius):
        super().__init__()
        self.base, self.radius = base, radius

    def call(self, ids, training=None):
        return self.base(ids, training=training)

    def train_step(self, *arguments):
        on_jax = keras.backend.backend() == "jax"
        return (self._jax_step if on_jax else self._tensorflow_step)(*arguments)

    def _place(self):
        """Returns which of the trainable variables the table is."""
        table = self.base.get_layer("words").trainable_variables[0]
        return [each is table for each in self.trainable_variables].index(True)

    def _step(self, gradient):
        return self.radius * gradient / (keras.ops.norm(gradient) + 1e-12)

    def _tensorflow_step(self, data):
        import tensorflow as tf

        x, y = data

        def gradients():
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
            return loss, tape.gradient(loss, self.trainable_variables)

        _, found = gradients()
        step = self._step(tf.convert_to_tensor(found[self._place()]))
        table = self.trainable_variables[self._place()]
        table.assign_add(step)
        loss, found = gradients()
        table.assign_sub(step)
        self.optimizer.apply(found, self.trainable_variables)
        return {"loss": loss}

    def _jax_step(self, state, data):
        import jax

        variables, fixed, of_optimizer, of_metrics = state
        compute = jax.value_and_grad(self.compute_loss_and_updates, has_aux=True)

        def gradients(variables):
            arguments = (variables, fixed, of_metrics, *data, None, True, of_optimizer)
            return compute(*arguments)

        _, found = gradients(variables)
        moved = list(variables)
        moved[self._place()] += self._step(found[self._place()])
        (loss, (_, _, fixed, of_metrics)), found = gradients(moved)
        variables, of_optimizer = self.optimizer.stateless_apply(
            of_optimizer, found, variables
        )
        return {"loss": loss}, (variables, fixed, of_optimizer, of_metrics)


# Data


def read(path):
    """Returns the labels and the lists of words of a file."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = [line.split(" ", 1) for line in lines if " " in line]
    return [label for label, _ in pairs], [text.split() for _, text in pairs]


def load(folder, name, seed):
    """Returns training and test data as ids and classes, and the size of the table."""
    train, test = (folder / f"{name}.{part}.txt" for part in ("train", "test"))
    if train.is_file():
        labels, texts = read(train)
        others = read(test)
    else:
        labels, texts = read(folder / f"{name}.txt")
        order = np.random.default_rng(seed).permutation(len(labels))
        held = set(order[: len(order) // 10].tolist())
        others = tuple([p[i] for i in sorted(held)] for p in (labels, texts))
        labels, texts = (
            [p[i] for i in range(len(p)) if i not in held] for p in (labels, texts)
        )
    counts = {}
    for word in itertools.chain(*texts):
        counts[word] = counts.get(word, 0) + 1
    words = sorted(word for word, count in counts.items() if count > 1)
    place = {word: index + 2 for index, word in enumerate(words)}
    classes = sorted(set(labels))

    def encoded(labels, texts):
        x = np.zeros((len(texts), LENGTH), "int32")
        for row, text in zip(x, texts, strict=True):
            ids = [place.get(word, 1) for word in text[:LENGTH]]
            row[: len(ids)] = ids
        return x, np.array([classes.index(label) for label in labels])

    return encoded(labels, texts), encoded(*others), len(words) + 2, len(classes)


def made_up(_folder, _name, seed):
    """Returns texts in which one word decides, to see the script run."""
    draws = np.random.default_rng(seed)
    parts = []
    for _ in range(2):
        x = draws.integers(4, 60, (120, LENGTH)).astype("int32")
        y = draws.integers(0, 2, 120)
        x[:, 3] = 2 + y
        parts.append((x, y))
    return *parts, 60, 2


# Training


def make(network, words, classes, dropout):
    inputs = keras.Input((LENGTH,), dtype="int32")
    masked = network == "lstm"
    x = layers.Embedding(words, WIDTH, mask_zero=masked, name="words")(inputs)
    x = layers.Dropout(dropout / 2)(x)
    if masked:
        x = layers.Bidirectional(layers.LSTM(48))(x)
    else:
        found = [layers.Conv1D(48, size, activation="relu")(x) for size in (3, 4, 5)]
        x = layers.Concatenate()([layers.GlobalMaxPooling1D()(each) for each in found])
    x = layers.Dropout(dropout)(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def train(network, recipe, value, data, words, classes, seed, epochs, judge=None):
    """Trains a network; returns it, and the accuracy on `judge` after each epoch."""
    keras.utils.set_random_seed(seed)
    dropout = value if recipe in ("plain", "dropout", "few labels") else 0.5
    base = make(network, words, classes, dropout)
    model, (x, y), weights = base, data, None
    if recipe in FEW:
        weights = np.zeros(len(y), "float32")
        weights[np.random.default_rng(seed).permutation(len(y))[:LABELLED]] = 1
    if recipe == "few labels":
        # As many steps in an epoch as with the texts that have no label.
        places = np.resize(np.flatnonzero(weights), len(y))
        (x, y), weights = (x[places], y[places]), None
    if recipe in CONFIGS:
        model = advreg.AdversarialRegularization(base, CONFIGS[recipe](value))
    if recipe == "table":
        model = TableGradient(base, value)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    base.compile("adam", loss, metrics=["accuracy"])
    if model is not base:
        model.compile("adam", loss)
    accuracies = []
    for _ in range(epochs):
        model.fit(x, y, BATCH, sample_weight=weights, verbose=0)
        if judge is not None:
            accuracies.append(base.evaluate(*judge, batch_size=500, verbose=0)[1])
    return base, accuracies


def choose(network, recipe, data, words, classes, epochs):
    """Chooses the value and the number of epochs by cross-validation."""
    x, y = data
    parts = np.array_split(np.random.default_rng(99).permutation(len(y)), FOLDS)
    best = (-1.0, None, 0)
    for value in CHOICES[recipe]:
        means = np.zeros(epochs)
        for fold, held in enumerate(parts):
            rest = np.setdiff1d(np.arange(len(y)), held)
            _, found = train(
                network,
                recipe,
                value,
                (x[rest], y[rest]),
                words,
                classes,
                99 + fold,
                epochs,
                judge=(x[held], y[held]),
            )
            means += np.array(found) / FOLDS
            forget()
        at = int(np.argmax(means))
        best = max(best, (float(means[at]), value, at + 1))
    return best[1:]


def forget():
    """Frees what was compiled for the last network."""
    keras.backend.clear_session()
    if keras.backend.backend() == "jax":
        import jax

        jax.clear_caches()


def measure(base, test, examples):
    """Returns the accuracy, and that under one and three substituted tokens."""
    x, y = test
    accuracy = base.evaluate(x, y, batch_size=500, verbose=0)[1]
    some = np.random.default_rng(0).permutation(len(y))[:examples]
    report = advreg.evaluate_robustness(
        base,
        x[some],
        y[some],
        attacks=[TokenSubstitution(count, seed=0) for count in (1, 3)],
        batch_size=250,
        verbose=0,
    )
    return [accuracy, *(line.accuracy for line in report.results)]


# The table


def interval(values):
    """Returns mean and half of the 95 % interval of the mean, in points."""
    values = 100 * np.asarray(values)
    # Quantiles of Student's t for 1 to 9 degrees of freedom.
    t = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
    if len(values) < 2:
        return f"{values.mean():.1f}"
    half = t[min(len(values) - 2, 8)] * values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():.1f} ± {half:.1f}"


def read_kept():
    """Reads the rows: value, epochs, and what each seed has given."""
    kept = {}
    for line in FILE.read_text().splitlines() if FILE.is_file() else ():
        part = json.loads(line)
        row = kept.setdefault(part.pop("case"), {"seeds": {}})
        seed, found = part.pop("seed", None), part.pop("accuracies", None)
        row.update(part)
        if seed is not None:
            row["seeds"][seed] = found
    return kept


def keep(**part):
    """Adds a line, in one piece, so that several runs can write."""
    with FILE.open("a") as file:
        file.write(json.dumps(part) + "\n")


def show(kept):
    rows = []
    for key, row in kept.items():
        data, network, recipe = key.split("/")
        rival = kept.get(f"{data}/{network}/noise")
        if recipe in FEW:
            rival = kept.get(f"{data}/{network}/few labels")
        line = [data, network, recipe, f"{row['value']:g}", row["epochs"]]
        seeds = sorted(row["seeds"])
        line.append(len(seeds))
        for column in range(3):
            line.append(interval([row["seeds"][seed][column] for seed in seeds]))
        for column in range(3):
            both = [s for s in seeds if rival and s in rival["seeds"]]
            gains = [row["seeds"][s][column] - rival["seeds"][s][column] for s in both]
            line.append(interval(gains) if gains and rival is not row else "")
        rows.append(line)
    columns = ["data", "network", "recipe", "value", "epochs", "seeds"]
    columns += ["accuracy", "1 token", "3 tokens"]
    columns += ["− noise", "− noise, 1 token", "− noise, 3 tokens"]
    print(table(columns, rows))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--texts", type=pathlib.Path, help="folder with the texts")
    parser.add_argument("--only", nargs="+", metavar="DATA[/NETWORK[/RECIPE]]")
    parser.add_argument("--print", action="store_true", help="show what is kept")
    parser.add_argument("--quick", action="store_true", help="tiny, keeps nothing")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args(arguments)
    kept = {} if options.quick else read_kept()
    if options.print:
        show(kept)
        return
    if options.texts is None and not options.quick:
        parser.error("--texts is needed: the folder with the texts")
    cases = ["/".join(c) for c in itertools.product(DATASETS, NETWORKS, CHOICES)]
    only = ["trec/cnn/fgsm"] if options.quick else options.only
    if only:
        cases = [c for c in cases if any(f"{c}/".startswith(f"{o}/") for o in only)]
    read_data = made_up if options.quick else load
    epochs, seeds = (1, 1) if options.quick else (EPOCHS, options.seeds)
    for case in cases:
        name, network, recipe = case.split("/")
        row = kept.setdefault(case, {"seeds": {}})
        if "value" not in row:
            data, _, words, classes = read_data(options.texts, name, 99)
            found = choose(network, recipe, data, words, classes, epochs)
            row["value"], row["epochs"] = found
            if not options.quick:
                keep(case=case, value=row["value"], epochs=row["epochs"])
        for seed in set(range(seeds)) - set(row["seeds"]):
            data, test, words, classes = read_data(options.texts, name, seed)
            base, _ = train(
                network,
                recipe,
                row["value"],
                data,
                words,
                classes,
                seed,
                row["epochs"],
            )
            row["seeds"][seed] = measure(base, test, 20 if options.quick else 500)
            forget()
            if not options.quick:
                keep(
                    case=case,
                    seed=seed,
                    accuracies=row["seeds"][seed],
                    backend=keras.backend.backend(),
                )
    show({case: kept[case] for case in cases if kept[case]["seeds"]})


if __name__ == "__main__":
    main()
