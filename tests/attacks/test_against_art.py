"""The Adversarial Robustness Toolbox judges how strong the attacks are."""

import functools

import keras
import numpy as np
import pytest

from advreg import AdversarialRegularization, datasets, make_adv_reg_config
from advreg.apps.recipes import mnist_network
from advreg.attacks import APGD, BIM, PGD, AutoAttack

pytestmark = pytest.mark.slow

UNIT = {"clip_value_min": 0.0, "clip_value_max": 1.0}


@pytest.fixture(params=["plain", "regularised"])
def case(request, mnist_dir):
    """A network, and the radius at which it is attacked."""
    pytest.importorskip("art")  # It keeps quiet what ART warns of while it is imported.
    plain, regularised = _networks()
    return {"plain": (plain, 0.1), "regularised": (regularised, 0.3)}[request.param]


@functools.cache
def _mnist():
    return datasets.load("mnist")


@functools.cache
def _networks():
    """The tutorial's network, trained as always and against PGD-5 at 0.3."""
    data = _mnist()
    keras.utils.set_random_seed(0)
    plain, base = (mnist_network(data.x_train.shape[1:], 10) for _ in range(2))
    plain.compile("adam", _loss())
    plain.fit(
        data.x_train[:20_000], data.y_train[:20_000], 64, 2, verbose=0, shuffle=False
    )
    config = make_adv_reg_config(
        multiplier=1.0,
        adv_step_size=0.1,
        adv_grad_norm="infinity",
        pgd_iterations=5,
        pgd_epsilon=0.3,
        random_init=True,
        **UNIT,
    )
    regularised = AdversarialRegularization(base, config)
    regularised.compile("adam", _loss())
    regularised.fit(
        data.x_train[:12_000], data.y_train[:12_000], 50, 3, verbose=0, shuffle=False
    )
    return plain, base


def _loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def _images(count):
    return _mnist().x_test[:count], _mnist().y_test[:count]


def _accuracy(network, x, y):
    return np.mean(network.predict(x, batch_size=250, verbose=0).argmax(1) == y)


def _judge(network):
    """What ART takes a network for."""
    from art.estimators.classification import TensorFlowV2Classifier

    return TensorFlowV2Classifier(
        model=network,
        nb_classes=10,
        input_shape=(28, 28, 1),
        loss_object=_loss(),
        clip_values=(0.0, 1.0),
    )


def test_bim_leaves_what_art_s_leaves(case):
    from art.attacks.evasion import BasicIterativeMethod

    network, epsilon = case
    x, y = _images(500)
    step_size = 2.5 * epsilon / 20
    bim = BIM(epsilon, step_size=step_size, iterations=20, **UNIT)
    ours = bim(network, x, y, batch_size=250)
    judge = BasicIterativeMethod(
        _judge(network),
        eps=epsilon,
        eps_step=step_size,
        max_iter=20,
        batch_size=250,
        verbose=False,
    )
    left, judged = (_accuracy(network, z, y) for z in (ours, judge.generate(x, y)))
    assert left < 0.9
    assert left == pytest.approx(judged, abs=0.003)


def test_pgd_is_as_strong_as_art_s(case):
    from art.attacks.evasion import ProjectedGradientDescent

    network, epsilon = case
    x, y = _images(1000)
    ours = PGD(epsilon, iterations=20, seed=0, **UNIT)(network, x, y, batch_size=250)
    judge = ProjectedGradientDescent(
        _judge(network),
        eps=epsilon,
        eps_step=2.5 * epsilon / 20,
        max_iter=20,
        num_random_init=1,
        batch_size=250,
        verbose=False,
    )
    left, judged = (_accuracy(network, z, y) for z in (ours, judge.generate(x, y)))
    assert left < 0.9
    # From other random starts either leaves up to 0.005 more or less.
    assert left <= judged + 0.01


def test_apgd_is_as_strong_as_pgd(case):
    network, epsilon = case
    x, y = _images(500)
    left = {
        attack.name: _accuracy(network, attack(network, x, y, batch_size=250), y)
        for attack in (
            PGD(epsilon, iterations=20, seed=0, **UNIT),
            APGD(epsilon, iterations=20, seed=0, **UNIT),
        )
    }
    assert left["APGD-20"] <= left["PGD-20"] < 0.9


def test_auto_attack_is_as_strong_as_art_s(case):
    from art.attacks.evasion import AutoAttack as Judge
    from art.attacks.evasion import AutoProjectedGradientDescent, SquareAttack

    network, epsilon = case
    x, y = _images(100)
    ours = AutoAttack(epsilon, iterations=20, queries=200, seed=0, **UNIT)
    left = _accuracy(network, ours(network, x, y, batch_size=100), y)
    estimator = _judge(network)
    ascent = {
        "estimator": estimator,
        "eps": epsilon,
        "eps_step": 2 * epsilon,
        "max_iter": 20,
        "nb_random_init": 1,
        "batch_size": 100,
        "verbose": False,
    }
    judge = Judge(
        estimator,
        eps=epsilon,
        eps_step=2 * epsilon,
        batch_size=100,
        attacks=[
            AutoProjectedGradientDescent(loss_type="cross_entropy", **ascent),
            AutoProjectedGradientDescent(loss_type="difference_logits_ratio", **ascent),
            SquareAttack(
                estimator, eps=epsilon, max_iter=200, nb_restarts=1, verbose=False
            ),
        ],
    )
    judged = _accuracy(network, judge.generate(x, y), y)
    assert left < 0.9
    assert left <= judged + 0.005
