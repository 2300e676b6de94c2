"""Where NSL's defects are mended: numbers that tell."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from nsl_cases.common import BATCH, STEP, floats, nsl, rng
from nsl_cases.networks import classes_loss, cnn, mlp, predictor, set_weights, tensors

# For each defect what the number should be, and a function that measures it.
DEFECTS = {}


def defect(name, expected):
    def register(measure):
        DEFECTS[name] = (expected, measure)
        return measure

    return register


def wrapped_mlp(rows=BATCH, compiled=None, weight=None, **settings):
    """A compiled wrapper of the MLP, its batch, and its settings."""
    model, features, labels = mlp(rows)
    config = nsl.configs.make_adv_reg_config(**{"adv_step_size": STEP, **settings})
    wrapped = nsl.keras.AdversarialRegularization(
        model, ("label",), weight, adv_config=config
    )
    wrapped.compile("sgd", **(compiled or {"loss": classes_loss()}))
    return wrapped, {**features, "label": labels}


def movement(found, batch):
    """How far each value of each example moved."""
    return np.abs(np.asarray(found["values"]) - batch["values"])


def clean_losses():
    """The loss of each example, in float64."""
    model, features, labels = mlp()
    logits = np.asarray(model(features["values"]), "float64")
    return np.log(np.exp(logits).sum(1)) - logits[np.arange(BATCH), labels[:, 0]]


@defect("a scalar clip_value_max=0.9: largest perturbed value", lambda: 0.9)
def scalar_clip():
    wrapped, batch = wrapped_mlp()
    found = wrapped.perturb_on_batch(
        batch, adv_step_size=5.0, clip_value_min=0.1, clip_value_max=0.9
    )
    return np.max(found["values"])


@defect("a scalar feature_mask=0: largest movement", lambda: 0.0)
def scalar_mask():
    wrapped, batch = wrapped_mlp()
    return np.max(movement(wrapped.perturb_on_batch(batch, feature_mask=0.0), batch))


@defect("a masked value out of range: its movement", lambda: 0.0)
def masked_out_of_range():
    wrapped, batch = wrapped_mlp()
    mask = floats([0, 1, 1, 1, 1, 1])
    found = wrapped.perturb_on_batch(
        batch,
        feature_mask={"values": mask},
        clip_value_min={"values": floats(0.5)},
    )
    return np.max(movement(found, batch)[:, 0])


@defect(
    "sample weights of shape [batch]: labelled loss",
    lambda: np.mean(rng(23).uniform(size=BATCH) * clean_losses()),
)
def weights_of_one_axis():
    wrapped, batch = wrapped_mlp(weight="weight", multiplier=0.0)
    batch["weight"] = floats(rng(23).uniform(size=BATCH))
    return wrapped.train_on_batch(batch, return_dict=True)["loss"]


@defect(
    "adversarial_loss, weights of shape [batch], no step: loss",
    lambda: np.mean(rng(23).uniform(size=BATCH) * clean_losses()),
)
def loss_with_weights_of_one_axis():
    model, features, labels = mlp()
    return nsl.keras.adversarial_loss(
        tensors(features),
        labels,
        predictor(model),
        classes_loss(),
        tf.constant(floats(rng(23).uniform(size=BATCH))),
        nsl.configs.make_adv_reg_config(adv_step_size=0.0),
    )


def step_of_scaled_loss(scale, dtype="float32"):
    """A step along the gradient of a scaled loss: its largest L2 norm."""
    x = tf.constant(rng(24).uniform(size=(BATCH, 6)), dtype)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(x * tf.cast(tf.range(1, 7), dtype)) * scale
    found, _ = nsl.lib.gen_adv_neighbor(
        x,
        loss,
        nsl.configs.AdvNeighborConfig(adv_step_size=1.0),
        gradient_tape=tape,
    )
    return np.max(np.linalg.norm(np.asarray(found - x, "float64"), axis=1))


@defect("gradients near 1e-8, L2 step of 1: norm of the step", lambda: 1.0)
def small_gradients():
    return step_of_scaled_loss(1e-9)


@defect("float16, gradient 0: norm of the step", lambda: 0.0)
def float16_zero_gradient():
    return step_of_scaled_loss(0.0, "float16")


@defect("evaluate: loss", lambda: np.mean(clean_losses()))
def evaluated_loss():
    wrapped, batch = wrapped_mlp()
    return wrapped.evaluate(batch, batch_size=BATCH, verbose=0, return_dict=True)[
        "loss"
    ]


@defect("BatchNorm, PGD-3: updates of its statistics in one step", lambda: 2.0)
def statistics_updates():
    """How often one training step moved the statistics of a BatchNorm.

    Perturbations are too small to change the mean of the batch: `n` updates take the
    moving mean from 0 to `(1 - 0.99 ** n)` of it.
    """
    x = keras.Input((6,), name="values")
    normal = layers.BatchNormalization(name="normal")
    model = keras.Model(x, layers.Dense(3, name="logits")(normal(x)))
    set_weights(model)
    normal.set_weights([floats(np.full(6, value)) for value in (1, 0, 0, 1)])
    config = nsl.configs.make_adv_reg_config(
        adv_step_size=1e-6, pgd_iterations=3, multiplier=0.1
    )
    wrapped = nsl.keras.AdversarialRegularization(model, adv_config=config)
    wrapped.compile("sgd", classes_loss())
    _, features, labels = mlp()
    wrapped.train_on_batch({**features, "label": labels})
    moved = np.asarray(normal.moving_mean) / features["values"].mean(0)
    return np.round(np.log(1 - np.mean(moved)) / np.log(0.99), 2)


def own_loss(multiplier):
    """How often a loss that the model adds itself counts in the total."""
    x = keras.Input((6,), name="values")
    hidden = layers.Dense(
        3, name="logits", activity_regularizer=keras.regularizers.L1(1)
    )
    model = set_weights(keras.Model(x, hidden(x)))
    config = nsl.configs.make_adv_reg_config(adv_step_size=1e-7, multiplier=multiplier)
    wrapped = nsl.keras.AdversarialRegularization(model, adv_config=config)
    wrapped.compile("sgd", classes_loss())
    _, features, labels = mlp()
    logits = model(features["values"])
    labeled = (1 + multiplier) * classes_loss()(labels, logits)
    logs = wrapped.train_on_batch({**features, "label": labels}, return_dict=True)
    own = np.sum(np.abs(logits)) / BATCH
    return np.round((logs["loss"] - labeled) / own, 3)


@defect("a loss of the model's own, FGSM: how often it counts", lambda: 1.0)
def own_loss_of_fgsm():
    return own_loss(0.5)


@defect("a loss of the model's own, multiplier 0: how often", lambda: 1.0)
def own_loss_alone():
    return own_loss(0.0)


@defect("L1 with pgd_epsilon 0.15, three steps of 0.1: L1 norm", lambda: 0.15)
def l1_projection():
    wrapped, batch = wrapped_mlp(adv_grad_norm="l1", pgd_iterations=3)
    found = wrapped.perturb_on_batch(batch, pgd_epsilon=0.15)
    return np.max(movement(found, batch).sum(1))


@defect("pgd_epsilon=None overrides 0.01: largest movement", lambda: STEP)
def override_by_none():
    wrapped, batch = wrapped_mlp(adv_grad_norm="infinity", pgd_epsilon=0.01)
    found = wrapped.perturb_on_batch(batch, pgd_epsilon=None)
    return np.max(movement(found, batch))


@defect("random_init: largest movement of masked values", lambda: 0.0)
def random_start_of_masked():
    wrapped, batch = wrapped_mlp(random_init=True, pgd_epsilon=STEP)
    mask = {"values": floats([0, 0, 0, 1, 1, 1])}
    found = wrapped.perturb_on_batch(batch, feature_mask=mask)
    return np.max(movement(found, batch)[:, :3])


@defect("random_init, batch size unknown to the graph: steps of fit", lambda: 2.0)
def random_start_of_unknown_batch():
    wrapped, batch = wrapped_mlp(random_init=True)
    dataset = tf.data.Dataset.from_tensor_slices(batch).batch(5)
    wrapped.fit(dataset, verbose=0)
    return wrapped.optimizer.iterations


@defect("an example of weight 0, PGD-3: largest movement", lambda: 0.0)
def example_without_weight():
    wrapped, batch = wrapped_mlp(weight="weight", pgd_iterations=3)
    batch["weight"] = floats([[0]] + [[1]] * (BATCH - 1))
    return np.max(movement(wrapped.perturb_on_batch(batch), batch)[0])


@defect("images of type uint8, a step of 1: largest movement", lambda: 1.0)
def eight_bits():
    model, features, labels = cnn()
    wrapped = nsl.keras.AdversarialRegularization(model)
    wrapped.compile("sgd", classes_loss())
    images = np.round(255 * features["image"]).astype("uint8")
    found = wrapped.perturb_on_batch(
        {"image": images, "label": labels}, adv_step_size=1.0, adv_grad_norm="infinity"
    )
    return np.max(np.abs(np.asarray(found["image"], "float32") - images))


@defect("examples that perturb_on_batch leaves in a metric", lambda: 0.0)
def metrics_of_perturbing():
    metric = keras.metrics.MeanAbsoluteError()
    wrapped, batch = wrapped_mlp(compiled={"loss": "mse", "metrics": [metric]})
    wrapped.evaluate(batch, verbose=0)
    metric.reset_state()
    wrapped.perturb_on_batch(batch)
    return metric.count


@defect("a mask in float64, as NumPy makes it: largest movement", lambda: STEP)
def float64_mask():
    wrapped, batch = wrapped_mlp(adv_grad_norm="infinity")
    mask = {"values": np.array([0.0, 1, 1, 1, 1, 1])}
    return np.max(movement(wrapped.perturb_on_batch(batch, feature_mask=mask), batch))


@defect("decay_over_time in eager code: 0.96 after one of one steps", lambda: 0.96)
def eager_decay():
    return nsl.lib.decay_over_time(1, nsl.configs.DecayConfig(1))


@defect("fit(x, y): steps", lambda: 1.0)
def fit_on_pairs():
    wrapped, batch = wrapped_mlp()
    wrapped.fit(batch["values"], batch["label"], batch_size=BATCH, verbose=0)
    return wrapped.optimizer.iterations


@defect("predict without labels: rows", lambda: float(BATCH))
def predict_without_labels():
    wrapped, batch = wrapped_mlp()
    wrapped.evaluate(batch, verbose=0)
    return len(wrapped.predict({"values": batch["values"]}, verbose=0))
