"""Files that somebody has tampered with, or that are broken."""

import contextlib
import copy
import dataclasses
import functools
import json
import operator
import os
import tempfile
import zipfile

import keras
import numpy as np
import pytest
from helpers.models import X, classifier, regularized
from keras import layers

from advreg import AdversarialRegularization, make_adv_reg_config
from advreg.config.configs import AdvNeighborConfig, AdvRegConfig

REG = ("adv_config", "config")
NEIGHBOR = (*REG, "adv_neighbor_config", "config")
MISSING = object()
OLD_FIELDS = [f for f in dataclasses.fields(AdvNeighborConfig) if not f.kw_only]


def schedule(**changes):
    config = {"initial_learning_rate": 0.1, "decay_steps": 9, "decay_rate": 0.9}
    return {
        "module": "keras.optimizers.schedules",
        "class_name": "ExponentialDecay",
        "config": {**config, **changes},
        "registered_name": None,
    }


def array(value, dtype="float64", **more):
    return {
        "class_name": "__numpy__",
        "config": {"value": value, "dtype": dtype, **more},
    }


def of_class(module, name, config=None, **more):
    return {
        "module": module,
        "class_name": name,
        "config": config or {},
        "registered_name": name,
        **more,
    }


def function(module, name):
    return of_class(module, "function", name)


LAMBDA = {"class_name": "__lambda__", "config": {"value": ["4wAA", None, None]}}
# To build it would take longer than anyone waits, and more memory than there is.
GIANT = {
    "module": "keras.layers",
    "class_name": "Dense",
    "config": {"units": 10**6},
    "registered_name": None,
    "build_config": {"input_shape": [None, 10**5]},
}
CALLABLES = [
    function("os", "system"),
    function("builtins", "eval"),
    of_class("os", "system", {"command": "touch victim"}),
    of_class("builtins", "eval", {"source": "open('victim', 'w')"}),
    of_class("subprocess", "Popen", {"args": ["touch", "victim"]}),
    of_class("keras.utils", "get_file", {"origin": "file:///etc/passwd"}),
]


def config():
    return make_adv_reg_config(0.5, feature_mask=np.ones(6), adv_step_size=0.1)


@functools.cache
def saved():
    """The members of a saved file."""
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "model.keras")
        regularized(classifier()).save(path)
        with zipfile.ZipFile(path) as file:
            return {name: file.read(name) for name in file.namelist()}


@functools.cache
def serialized():
    return keras.saving.serialize_keras_object(regularized(classifier(), config()))


def write(path, at, value, compiled=False):
    """Writes the file of a model that has another value at this place."""
    changed = copy.deepcopy(serialized())
    place = changed if compiled else changed["config"]
    place = functools.reduce(operator.getitem, at[:-1], place)
    if value is MISSING:
        del place[at[-1]]
    else:
        place[at[-1]] = value
    members = {**saved(), "config.json": json.dumps(changed).encode()}
    with zipfile.ZipFile(path, "w") as file:
        for name, member in members.items():
            file.writestr(name, member)
    return path


def refused(path, **kwargs):
    """The message of the error, without Keras's print of all that the file holds."""
    with pytest.raises((TypeError, ValueError)) as caught:
        keras.models.load_model(path, **kwargs)
    return str(caught.value).split("Exception encountered: ")[-1]


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def cases(at, rule, values):
    return [pytest.param(at, rule, v, id=f"{at[-1]}-{v!r:.40}") for v in values]


ANYTHING = [*CALLABLES, GIANT, LAMBDA, [1], {}, "1.0", float("nan")]
NO_NUMBERS = [*ANYTHING, True, None, array([1.0]), -1, float("inf"), 10**400]
NO_SCHEDULES = [
    schedule(initial_learning_rate="0.1"),
    schedule(decay_rate=None),
    schedule(unknown=1),
    {**schedule(), "config": {}},
    {**schedule(), "config": 3},
    {**schedule(), "class_name": "__class__"},
    {**schedule(), "class_name": 3, "registered_name": [3]},
    {**schedule(), "class_name": "SGD", "module": "keras.optimizers"},
    {**schedule(), "registered_name": "advreg>AdversarialRegularization"},
]
NO_OBJECTIVES = [
    *(value for value in ANYTHING if value != "1.0"),
    "os.system",
    None,
    3,
    schedule(),
    of_class("advreg.objectives", "Objective"),
    of_class("advreg.objectives", "Trades", registered_name="Trades"),
    of_class("x", "x", {"beta": "5"}, registered_name="advreg>Mart"),
    of_class("x", "x", {"beta": -1.0}, registered_name="advreg>Mart"),
    of_class("x", "x", {"beta": schedule()}, registered_name="advreg>Mart"),
    of_class("x", "x", {"unknown": 1.0}, registered_name="advreg>Trades"),
]
NO_ARRAYS = [
    array([1.0], "S1000000000"),
    array([1.0], "U1000000000"),
    array([1.0], "V2000000000"),
    array([1.0], "object"),
    array([1.0], "no dtype"),
    array([1.0], ["float64"]),
    array(["1.0"]),
    array([[1.0], [1.0, 1.0]]),
    array([10**400]),
    array([[None]]),
    array([2.0]),
    array({"a": 1.0}),
    {"class_name": "__numpy__", "config": {"shape": [10**12], "dtype": "float64"}},
    {"class_name": "__numpy__", "config": 3},
    {"class_name": "__tensor__", "config": {"value": [1.0], "dtype": "float32"}},
    of_class("", "__keras_tensor__", {"shape": [10**12], "dtype": "float32"}),
    {"class_name": "__typespec__", "config": [], "spec_name": "TensorSpec"},
    "ones",
    -1,
    2,
    float("nan"),
    [1.0, "1.0"],
    {"x": {"y": True, "z": "1.0"}},
]


@pytest.mark.parametrize(
    ("at", "rule", "value"),
    [
        *cases((*REG, "multiplier"), "must be", [*NO_NUMBERS, *NO_SCHEDULES]),
        *cases((*NEIGHBOR, "adv_step_size"), "must be", [*NO_NUMBERS, *NO_SCHEDULES]),
        *cases((*NEIGHBOR, "pgd_epsilon"), "must be", [*NO_SCHEDULES, *CALLABLES]),
        *cases((*NEIGHBOR, "feature_mask"), "must", [*NO_ARRAYS, *CALLABLES, GIANT]),
        *cases((*NEIGHBOR, "clip_value_min"), "must", [*NO_ARRAYS[:10], GIANT]),
        *cases((*NEIGHBOR, "adv_grad_norm"), "must be", [*NO_NUMBERS[:-2], 10**400]),
        *cases((*NEIGHBOR, "pgd_iterations"), "must be", [*NO_NUMBERS, 1.0, 10**30]),
        *cases((*NEIGHBOR, "random_init"), "must be", [*ANYTHING, 0, 1, None]),
        *cases((*REG, "adv_neighbor_config"), "must be", [*ANYTHING, None]),
        *cases((*REG, "objective"), "must", NO_OBJECTIVES),
        *cases((*REG, "clean_weight"), "must be", [*NO_NUMBERS, schedule()]),
        *cases((*REG, "weight_perturbation"), "must be", [*NO_NUMBERS, *NO_SCHEDULES]),
        *cases((*NEIGHBOR, "init_radius"), "must be", [*NO_SCHEDULES, *CALLABLES]),
        *cases(("adv_config",), "must be", [*ANYTHING, *NO_SCHEDULES, None]),
        *cases(("base_model",), "must be", [*CALLABLES, *ANYTHING[-5:], None, -1]),
        *cases(("dtype",), "must be", [*ANYTHING, *NO_SCHEDULES, 3, None]),
        *cases(("label_keys",), "must be", [*ANYTHING, "label", None]),
        *cases(("sample_weight_key",), "must be", [3, [1], {}, float("nan"), True]),
        *cases(("base_with_labels_in_features",), "must be", [*ANYTHING, None, 1]),
        *cases(("name",), "must be", [*ANYTHING[:-2], 3]),
        *cases(("trainable",), "must be", [*ANYTHING, None, 1]),
    ],
)
def test_a_wrong_value_is_refused(at, rule, value, tmp_path):
    message = refused(write(tmp_path / "model.keras", at, value))
    assert at[-1] in message
    assert rule in message
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize(
    "at",
    [
        *[("adv_config", "config", f) for f in ("multiplier", "adv_neighbor_config")],
        *[(*NEIGHBOR, field.name) for field in OLD_FIELDS],
        ("base_model",),
        ("adv_config",),
        ("dtype",),
        ("label_keys",),
        ("sample_weight_key",),
        ("base_with_labels_in_features",),
    ],
)
def test_missing_fields_are_named(at, tmp_path):
    message = refused(write(tmp_path / "model.keras", at, MISSING))
    assert f"missing=['{at[-1]}']" in message


def test_a_file_that_is_older_than_a_field_has_its_default(tmp_path):
    path = tmp_path / "model.keras"
    for at in [
        (*REG, "objective"),
        (*REG, "clean_weight"),
        (*REG, "weight_perturbation"),
        (*NEIGHBOR, "init_radius"),
    ]:
        loaded = keras.models.load_model(write(path, at, MISSING))
        assert loaded.adv_config == config()


@pytest.mark.parametrize("at", [(), REG, NEIGHBOR])
def test_unknown_fields_are_named(at, tmp_path):
    path = write(tmp_path / "model.keras", (*at, "surprise"), 1)
    assert "surprise" in refused(path)


@pytest.mark.parametrize(
    "other",
    [
        keras.saving.serialize_keras_object(AdvNeighborConfig()),
        schedule(),
        {"module": "keras.layers", "class_name": "Dense", "config": {"units": 3}},
    ],
)
def test_another_class_in_the_place_of_a_configuration(other, tmp_path):
    path = write(tmp_path / "model.keras", ("adv_config",), other)
    assert "`adv_config` must be" in refused(path)


def test_a_configuration_in_the_place_of_a_model_or_a_number(tmp_path):
    config = keras.saving.serialize_keras_object(AdvRegConfig())
    path = tmp_path / "model.keras"
    for at in [("base_model",), (*REG, "multiplier"), (*NEIGHBOR, "feature_mask")]:
        assert f"`{at[-1]}` must be" in refused(write(path, at, config))


@pytest.mark.parametrize("place", ["base_model", "adv_config", "multiplier"])
def test_code_in_a_lambda_layer_does_not_run(place, tmp_path):
    victim = tmp_path / "victim"
    name = str(victim)
    layer = layers.Lambda(lambda x: (open(name, "w").close(), x)[1])
    serialized_layer = keras.saving.serialize_keras_object(layer)
    base = keras.saving.serialize_keras_object(classifier())
    base["config"]["layers"].append(serialized_layer)
    at, value = {
        "base_model": (("base_model",), base),
        "adv_config": (("adv_config",), serialized_layer),
        "multiplier": ((*REG, "multiplier"), serialized_layer),
    }[place]
    path = write(tmp_path / "model.keras", at, value)
    assert place in refused(path)
    assert not victim.exists()
    if place != "base_model":
        assert place in refused(path, safe_mode=False)
        assert not victim.exists()
    else:
        keras.models.load_model(path, safe_mode=False)
        assert victim.exists()  # The code is one that would have run.


def test_unsafe_mode_reaches_the_base(tmp_path):
    base = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
    base.add(layers.Lambda(lambda x: 2.0 * x))
    regularized(base).save(tmp_path / "model.keras")
    assert "lambda" in refused(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", safe_mode=False)
    np.testing.assert_array_equal(loaded(X), base(X))


@pytest.mark.parametrize("value", CALLABLES)
@pytest.mark.parametrize("argument", ["loss", "optimizer"])
def test_arbitrary_callables_are_not_called(argument, value, tmp_path):
    path = write(tmp_path / "m.keras", ("compile_config", argument), value, True)
    # It is Keras that compiles, and older versions of it do not refuse all of these.
    with contextlib.suppress(TypeError, ValueError):
        keras.models.load_model(path)
    assert not (tmp_path / "victim").exists()


class Unregistered(keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        return 0.25

    def get_config(self):
        return {}


def test_a_schedule_of_one_s_own_loads_where_it_is_known(tmp_path):
    config = make_adv_reg_config(Unregistered(), adv_step_size=Unregistered())
    regularized(classifier(), config).save(tmp_path / "model.keras")
    message = refused(tmp_path / "model.keras")
    assert "`multiplier`" in message
    assert "register_keras_serializable" in message
    known = {"Unregistered": Unregistered}
    for loaded in (
        keras.models.load_model(tmp_path / "model.keras", known),
        AdversarialRegularization.from_config(
            regularized(classifier(), config).get_config(), known
        ),
    ):
        assert type(loaded.adv_config.multiplier) is Unregistered
        assert loaded.adv_config == config


def test_the_file_itself_loads(tmp_path):
    path = write(tmp_path / "model.keras", (*REG, "multiplier"), schedule())
    loaded = keras.models.load_model(path)
    assert float(loaded.adv_config.multiplier(9)) == pytest.approx(0.09)
    np.testing.assert_array_equal(
        loaded.adv_config.adv_neighbor_config.feature_mask, np.ones(6)
    )
