import dataclasses
import json

import keras
import numpy as np
import pytest
from helpers.backends import compiled
from keras import ops

import advreg
from advreg import AdvNeighborConfig, AdvRegConfig, NormType, make_adv_reg_config
from advreg.objectives import LabeledLoss

pytestmark = pytest.mark.every_backend

SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)


@pytest.mark.parametrize(
    ("value", "norm"),
    [
        ("l1", NormType.L1),
        (1, NormType.L1),
        ("L2", NormType.L2),
        (2.0, NormType.L2),
        ("infinity", NormType.INFINITY),
        ("linf", NormType.INFINITY),
        ("inf", NormType.INFINITY),
        (np.inf, NormType.INFINITY),
        (NormType.L2, NormType.L2),
    ],
)
def test_norms_have_many_names(value, norm):
    assert AdvNeighborConfig(adv_grad_norm=value).adv_grad_norm is norm


def test_defaults_are_those_of_nsl():
    assert dataclasses.asdict(AdvNeighborConfig()) == {
        "feature_mask": None,
        "adv_step_size": 0.001,
        "adv_grad_norm": "l2",
        "clip_value_min": None,
        "clip_value_max": None,
        "pgd_iterations": 1,
        "pgd_epsilon": None,
        "random_init": False,
        "init_radius": None,
        "power_iterations": 0,
        "perturb": "inputs",
        "relative": False,
    }
    assert AdvRegConfig().multiplier == 0.2
    assert AdvRegConfig().objective == LabeledLoss()
    assert AdvRegConfig().clean_weight == 1.0
    assert AdvRegConfig().weight_perturbation == 0.0
    assert make_adv_reg_config() == AdvRegConfig()


def test_positional_order_is_that_of_nsl():
    config = AdvNeighborConfig(0.5, 0.1, "l1", 0.0, 1.0, 3, 0.2, True)
    assert [f.name for f in dataclasses.fields(config)] == list(
        dataclasses.asdict(AdvNeighborConfig())
    )
    assert config == AdvNeighborConfig(
        feature_mask=0.5,
        adv_step_size=0.1,
        adv_grad_norm="l1",
        clip_value_min=0.0,
        clip_value_max=1.0,
        pgd_iterations=3,
        pgd_epsilon=0.2,
        random_init=True,
    )
    assert AdvRegConfig(0.3, config).adv_neighbor_config is config


def test_make_takes_the_fields_of_both():
    config = make_adv_reg_config(0.5, 0.25, 0.1, "l1", 0, 1, 3, 0.2, True)
    assert config == AdvRegConfig(
        0.5, AdvNeighborConfig(0.25, 0.1, "l1", 0, 1, 3, 0.2, True)
    )


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        AdvRegConfig().multiplier = 1.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        AdvNeighborConfig().adv_step_size = 1.0


def test_arrays_are_copied_and_read_only():
    mask = np.ones(3)
    config = AdvNeighborConfig(feature_mask=mask)
    mask[:] = 0
    assert config.feature_mask.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="read-only"):
        config.feature_mask[0] = 0


@pytest.mark.parametrize(
    ("field", "value", "error", "message"),
    [
        ("adv_step_size", -0.1, ValueError, "not negative.*-0.1"),
        ("adv_step_size", np.nan, ValueError, "finite.*nan"),
        ("adv_step_size", np.inf, ValueError, "finite.*inf"),
        ("adv_step_size", 10**400, ValueError, "finite"),
        ("adv_step_size", "0.1", TypeError, "number.*'0.1'"),
        ("adv_step_size", True, TypeError, "number.*True"),
        ("adv_step_size", None, TypeError, "number.*None"),
        ("adv_step_size", [0.1], TypeError, r"number.*\[0.1\]"),
        ("pgd_epsilon", -1, ValueError, "not negative.*-1"),
        ("pgd_epsilon", "big", TypeError, "number.*'big'"),
        ("multiplier", -0.2, ValueError, "not negative.*-0.2"),
        ("multiplier", np.inf, ValueError, "finite"),
        ("multiplier", None, TypeError, "number"),
        ("adv_grad_norm", "l3", ValueError, "'l1', 'l2' and 'infinity'.*'l3'"),
        ("adv_grad_norm", 3, ValueError, "Received: 3"),
        ("adv_grad_norm", True, ValueError, "Received: True"),
        ("adv_grad_norm", None, ValueError, "Received: None"),
        ("pgd_iterations", 0, ValueError, "at least 1.*0"),
        ("pgd_iterations", 2.0, TypeError, "integer.*2.0"),
        ("pgd_iterations", True, TypeError, "integer.*True"),
        ("random_init", 1, TypeError, "bool.*1"),
        ("feature_mask", 1.5, ValueError, r"\[0, 1\].*1.5"),
        ("feature_mask", {"a": -0.5}, ValueError, r"\[0, 1\].*-0.5"),
        ("feature_mask", np.array([0.0, 2.0]), ValueError, r"\[0, 1\].*0.0 to 2.0"),
        ("feature_mask", "all", TypeError, "number, an array.*'all'"),
        ("feature_mask", np.array(["a"]), TypeError, "numbers"),
        ("clip_value_min", np.nan, ValueError, "NaN"),
        ("clip_value_max", {"a": np.array([np.nan])}, ValueError, r"\['a'\].*NaN"),
        ("clip_value_max", {"a": object()}, TypeError, r"\['a'\].*number, an array"),
        ("clip_value_min", 1j, TypeError, "number, an array"),
    ],
)
def test_wrong_values_are_refused_when_the_object_is_made(field, value, error, message):
    with pytest.raises(error, match=f"(?s)`{field}.*{message}"):
        make_adv_reg_config(**{field: value})


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (1.0, 0.0, "above.*1.0 and 0.0"),
        (np.array([0.0, 2.0]), 1.0, "above"),
        ({"a": 2.0}, 1.0, r"clip_value_min\['a'\].*above.*2.0 and 1.0"),
        (1.0, {"a": 2.0, "b": 0.0}, r"\['b'\].*above"),
        ([0.0, 3.0], (1.0, 1.0), "structure"),
        ([0.0, 3.0], [1.0, 1.0], r"\[1\].*above"),
        ([0.0], [1.0, 1.0], "structure"),
        ([0.0, 0.0], [1.0], "structure"),
        ({"a": 0.0}, [1.0], "structure"),
        (np.zeros(2), np.ones(3), r"broadcast.*\(2,\) and \(3,\)"),
    ],
)
def test_minimum_above_maximum_is_refused(low, high, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        AdvNeighborConfig(clip_value_min=low, clip_value_max=high)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0.5, 0.5),
        (0.0, None),
        (-np.inf, np.inf),
        ({"a": 0.0}, {"b": -1.0}),
        ({"a": None}, 0.0),
        (np.zeros(2), np.ones((3, 1))),
    ],
)
def test_ranges_that_hold_a_value_are_accepted(low, high):
    AdvNeighborConfig(clip_value_min=low, clip_value_max=high)


@pytest.mark.parametrize(
    "limits",
    [
        {"clip_value_min": 0.0, "clip_value_max": 1.0},
        {"clip_value_min": np.zeros(3), "clip_value_max": np.array([0.1, 0.5, 1.0])},
        {"clip_value_min": -0.5, "clip_value_max": np.full((2, 3), 0.5)},
    ],
)
def test_a_radius_larger_than_the_range_is_refused(limits):
    match = r"`{}` must not be larger than the range.*1 wide.*: 8\..*divide it by 255$"
    with pytest.raises(ValueError, match=match.format("pgd_epsilon")):
        AdvRegConfig.pgd(8.0, **limits)
    with pytest.raises(ValueError, match=match.format("pgd_epsilon")):
        make_adv_reg_config(pgd_epsilon=8, adv_grad_norm="linf", **limits)
    with pytest.raises(ValueError, match=match.format("adv_step_size")):
        make_adv_reg_config(adv_step_size=8, adv_grad_norm="linf", **limits)
    # What fits, or is no bound, or not known yet.
    AdvRegConfig.pgd(1.0, **limits)
    AdvRegConfig.fast(1.0, **limits)
    AdvRegConfig.n_fgsm(1.0, **limits)
    AdvRegConfig.pgd(SCHEDULE, **limits)
    AdvRegConfig.pgd(8.0, adv_grad_norm="l2", **limits)
    AdvRegConfig.pgd(8.0, clip_value_min=0.0)
    AdvRegConfig.pgd(8.0, clip_value_min={"a": 0.0}, clip_value_max={"a": 1.0})
    AdvRegConfig.pgd(8.0, clip_value_min=-np.inf, clip_value_max=np.inf)
    make_adv_reg_config(
        adv_step_size=8, pgd_iterations=2, adv_grad_norm="linf", **limits
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"adv_step_size": 0},
        {"adv_step_size": 0, "pgd_epsilon": 0.1},
        {"adv_step_size": 0, "random_init": True},
        {"adv_step_size": 0, "random_init": True, "init_radius": 0},
        {"pgd_iterations": 0, "random_init": True, "init_radius": 0},
    ],
)
def test_what_would_move_nothing_is_refused(fields):
    with pytest.raises(ValueError, match=r"`adv_step_size`.*nothing would move"):
        AdvNeighborConfig(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        # A radius of 0 says itself that nothing is to move, as that of an attack does.
        {"pgd_epsilon": 0},
        {"adv_step_size": 0, "pgd_epsilon": 0},
        {"adv_step_size": 0, "pgd_epsilon": 0.1, "random_init": True},
        {"adv_step_size": 0, "init_radius": 0.1, "random_init": True},
        {"adv_step_size": 0, "init_radius": SCHEDULE, "random_init": True},
        {"adv_step_size": SCHEDULE},
        {"adv_step_size": 0.1, "pgd_iterations": 0, "random_init": True},
    ],
)
def test_what_moves_or_is_said_to_stand_is_accepted(fields):
    AdvNeighborConfig(**fields)


@pytest.mark.parametrize("name", ["fgsm", "fast", "n_fgsm", "pgd", "trades", "mart"])
def test_presets_have_a_radius_of_0(name):
    config = getattr(AdvRegConfig, name)(0.0).adv_neighbor_config
    assert config.pgd_epsilon == 0.0


def test_edges_are_accepted():
    AdvNeighborConfig(adv_step_size=0, pgd_epsilon=0, pgd_iterations=1, feature_mask=0)
    AdvNeighborConfig(feature_mask=1, pgd_iterations=np.int64(3))
    # Several iterations without a radius are allowed, as in NSL.
    AdvNeighborConfig(pgd_iterations=5)
    assert AdvRegConfig(multiplier=0).multiplier == 0.0
    assert AdvNeighborConfig(adv_step_size=np.float32(0.5)).adv_step_size == 0.5
    assert AdvNeighborConfig(adv_step_size=np.array(0.5)).adv_step_size == 0.5


def test_unknown_fields_are_named():
    with pytest.raises(TypeError, match="epsilon"):
        make_adv_reg_config(epsilon=0.1)
    with pytest.raises(TypeError, match="epsilon"):
        AdvNeighborConfig(epsilon=0.1)


def test_the_neighbor_config_has_its_type():
    with pytest.raises(TypeError, match=r"adv_neighbor_config.*AdvNeighborConfig"):
        AdvRegConfig(0.2, {"adv_step_size": 0.1})


CONFIGS = [
    make_adv_reg_config(),
    make_adv_reg_config(
        multiplier=SCHEDULE,
        feature_mask={"a": np.array([0.0, 1.0], "float32"), "b": None},
        adv_step_size=keras.optimizers.schedules.PolynomialDecay(0.0, 5, 0.2),
        adv_grad_norm="infinity",
        clip_value_min=(0.0, None),
        clip_value_max=(1.0, np.array([[3.0]])),
        pgd_iterations=7,
        pgd_epsilon=SCHEDULE,
        random_init=True,
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_survives_serialisation(config):
    again = AdvRegConfig.from_config(config.get_config())
    assert again == config
    assert hash(again) == hash(config)
    as_json = json.dumps(keras.saving.serialize_keras_object(config))
    with keras.saving.custom_object_scope({}):
        loaded = keras.saving.deserialize_keras_object(json.loads(as_json))
    assert loaded == config
    assert type(loaded.adv_neighbor_config) is AdvNeighborConfig
    if isinstance(config.multiplier, keras.optimizers.schedules.LearningRateSchedule):
        assert float(loaded.multiplier(10)) == float(config.multiplier(10))


def test_structures_keep_their_type():
    assert AdvNeighborConfig(feature_mask=[0, None]).feature_mask == [0.0, None]
    assert AdvNeighborConfig(feature_mask=(0, None)).feature_mask == (0.0, None)
    assert AdvNeighborConfig(feature_mask={"a": [0]}).feature_mask == {"a": [0.0]}


def test_equality_is_by_value():
    def config(**kwargs):
        return AdvNeighborConfig(feature_mask=np.array([0, 1]), **kwargs)

    assert config() == config()
    assert config() != config(adv_step_size=0.5)
    assert config(adv_step_size=0.5) != config()
    ordered = AdvNeighborConfig(feature_mask={"a": 0, "b": 1})
    assert ordered == AdvNeighborConfig(feature_mask={"b": 1, "a": 0})
    assert config() != AdvNeighborConfig(feature_mask=np.array([1, 0]))
    assert config() != "config"
    assert len({config(), config(), AdvNeighborConfig()}) == 2


def test_replace_checks_again():
    config = dataclasses.replace(AdvNeighborConfig(), adv_step_size=0.5)
    assert config.adv_step_size == 0.5
    with pytest.raises(ValueError, match="adv_step_size"):
        dataclasses.replace(config, adv_step_size=-1)


def test_registered_names():
    assert (
        keras.saving.get_registered_name(advreg.AdvRegConfig) == "advreg>AdvRegConfig"
    )


def test_constraints_have_values():
    ones = ops.ones(3)
    assert AdvNeighborConfig(feature_mask=ones).feature_mask.tolist() == [1, 1, 1]

    def make(mask):
        AdvNeighborConfig(feature_mask=mask)
        return mask

    run = compiled(make)
    with pytest.raises(TypeError, match=r"`feature_mask`.*values are known"):
        run(ones)
