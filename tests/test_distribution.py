import json
import random
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from advreg.distribution import ReplicaSeedGenerator, unscale_loss

# Logical devices have to be made before TensorFlow looks at them, so this is a process
# of its own. It prints weights, logs and random starts with one replica and with two.
TWO_REPLICAS = """
import contextlib, json, sys
import keras, numpy as np, tensorflow as tf
import advreg

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(
    cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
fields = json.loads(sys.argv[1])
rng = np.random.default_rng(0)
x = rng.normal(size=(24, 6)).astype("float32")
y = rng.integers(0, 3, 24)
weights = rng.uniform(0.5, 2.0, 24).astype("float32")

def train(strategy, random_init=False):
    keras.utils.set_random_seed(0)
    with strategy.scope() if strategy else contextlib.nullcontext():
        base = keras.Sequential([
            keras.Input((6,)), keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dense(3)])
        config = advreg.make_adv_reg_config(
            adv_step_size=0.1, adv_grad_norm="l2", pgd_epsilon=0.25,
            random_init=random_init, **fields)
        model = advreg.AdversarialRegularization(base, config)
        model.compile(
            "sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"])
    data = tf.data.Dataset.from_tensor_slices((x, y, weights)).batch(8)
    history = model.fit(data, epochs=2, shuffle=False, verbose=0).history
    evaluated = model.evaluate(data, verbose=0)
    with strategy.scope() if strategy else contextlib.nullcontext():
        unbuilt = advreg.AdversarialRegularization(
            keras.Sequential([keras.layers.Dense(3)]), config)
        unbuilt.compile("sgd", model.loss)
    unbuilt.perturb_on_batch(x, y)
    unbuilt.fit({"x": x, "label": y}, verbose=0)  # Labels inside, as in NSL.
    perturbed = model.perturb_on_batch(x, y, random_init=False).tolist()
    return [w.tolist() for w in base.get_weights()], history, evaluated, perturbed

strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
one, two = train(None), train(strategy)
train(strategy, random_init=True)
with strategy.scope():
    seed = advreg.distribution.ReplicaSeedGenerator(1)
drawn = strategy.run(lambda: keras.random.normal((3,), seed=seed))
drawn = [value.numpy().tolist() for value in strategy.experimental_local_results(drawn)]
print(json.dumps([one, two, drawn]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"pgd_iterations": 1},
        {"pgd_iterations": 3},
        {"objective": "mart", "pgd_iterations": 2, "weight_perturbation": 0.1},
        {"clean_weight": 0.0, "pgd_iterations": 2, "weight_perturbation": 0.1},
    ],
    ids=str,
)
def test_two_replicas_train_like_one_and_draw_different_noise(fields):
    result = subprocess.run(
        [sys.executable, "-c", TWO_REPLICAS, json.dumps(fields)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    one, two, drawn = json.loads(result.stdout.splitlines()[-1])
    assert not np.allclose(drawn[0], drawn[1])
    if tuple(map(int, keras.__version__.split(".")[:2])) < (3, 12):
        # Plain models of older versions report other logs under replicas, too.
        one, two = one[::3], two[::3]
    for a, b in zip(keras.tree.flatten(one), keras.tree.flatten(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_seed_leaves_python_s_random_state_alone():
    random.seed(0)
    expected = random.random()
    random.seed(0)
    seeds = [ReplicaSeedGenerator(name=name) for name in ("a", "a", "b")]
    drawn_by_keras = random.randint(1, int(1e9))
    random.seed(0)
    assert random.randint(1, int(1e9)) == drawn_by_keras
    random.seed(0)
    assert random.random() == expected
    states = [int(seed.state.numpy()[0]) for seed in seeds]
    assert states[0] == states[1]
    assert len({*states, drawn_by_keras}) == 3


def test_a_single_replica_draws_as_keras_does():
    ours, keras_s = ReplicaSeedGenerator(3), keras.random.SeedGenerator(3)
    for _ in range(2):
        np.testing.assert_array_equal(ours.next(), keras_s.next())


def test_a_single_replica_scales_nothing():
    loss = tf.constant(2.0)
    assert unscale_loss(loss) is loss
