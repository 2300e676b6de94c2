import copy
import dataclasses
import inspect

import keras
import numpy as np
import pytest
from helpers.nsl_names import NAMES

import advreg
from advreg import nsl

SIGNATURES = {
    "configs.AdvNeighborConfig": "feature_mask adv_step_size adv_grad_norm "
    "clip_value_min clip_value_max pgd_iterations pgd_epsilon random_init",
    "configs.AdvRegConfig": "multiplier adv_neighbor_config",
    "configs.make_adv_reg_config": "multiplier feature_mask adv_step_size "
    "adv_grad_norm clip_value_min clip_value_max pgd_iterations pgd_epsilon "
    "random_init",
    "configs.AdvTargetConfig": "target_method random_seed",
    "configs.DistanceConfig": "distance_type reduction sum_over_axis transform_fn",
    "configs.DecayConfig": "decay_steps decay_rate min_value decay_type",
    "configs.VirtualAdvConfig": "adv_neighbor_config distance_config num_approx_steps "
    "approx_difference",
    "keras.AdversarialRegularization": "base_model label_keys sample_weight_key "
    "adv_config base_with_labels_in_features kwargs",
    "keras.adversarial_loss": "features labels model loss_fn sample_weights adv_config "
    "predictions labeled_loss gradient_tape model_kwargs",
    "lib.gen_adv_neighbor": "input_features labeled_loss config "
    "raise_invalid_gradient gradient_tape pgd_model_fn pgd_loss_fn pgd_labels "
    "use_while_loop",
    "lib.normalize": "tensor norm_type epsilon",
    "lib.project_to_ball": "tensors radius norm_type epsilon",
    "lib.random_in_norm_ball": "tensor_structure radius norm_type",
    "lib.maximize_within_unit_norm": "weights norm_type epsilon",
    "lib.get_target_indices": "logits labels adv_target_config",
    "lib.decay_over_time": "global_step decay_config init_value",
    "lib.apply_feature_mask": "features feature_mask",
    "lib.adv_regularizer": "adv_neighbors target_scores model_fn loss_fn",
    "lib.virtual_adv_regularizer": "input_layer embedding_fn virtual_adv_config "
    "embedding",
    "lib.pairwise_distance_wrapper": "sources targets weights distance_config",
    "lib.kl_divergence": "labels predictions axis weights scope loss_collection "
    "reduction",
}


def module(name):
    return getattr(nsl, name) if name else nsl


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_there_or_says_why_not(name):
    names = NAMES[name].split()
    there = [one for one in names if not one.startswith("-")]
    assert set(module(name).__all__) == set(there)
    for one in set(names) - set(there):
        with pytest.raises(AttributeError, match=rf"no attribute '{one[1:]}': .{{40}}"):
            getattr(module(name), one[1:])
    with pytest.raises(AttributeError, match=r"no attribute 'typo'$"):
        module(name).typo  # noqa: B018


@pytest.mark.parametrize("path", SIGNATURES)
def test_arguments_come_in_the_order_of_nsl(path):
    space, name = path.split(".")
    parameters = inspect.signature(getattr(module(space), name)).parameters
    # What can only be given by keyword is none of NSL's.
    names = [n for n, p in parameters.items() if p.kind is not p.KEYWORD_ONLY]
    assert names == SIGNATURES[path].split()


def test_defaults_are_those_of_nsl():
    config = nsl.configs.AdvNeighborConfig()
    assert nsl.configs.DEFAULT_ADVERSARIAL_PARAMS == {
        "feature_mask": None,
        "adv_step_size": 0.001,
        "adv_grad_norm": nsl.configs.NormType.L2,
        "clip_value_min": None,
        "clip_value_max": None,
        "pgd_iterations": 1,
        "pgd_epsilon": None,
        "random_init": False,
    }
    assert nsl.configs.AdvNeighborConfig(**nsl.configs.DEFAULT_ADVERSARIAL_PARAMS) == (
        config
    )
    assert nsl.configs.AdvRegConfig().multiplier == 0.2
    assert nsl.configs.AdvRegConfig().adv_neighbor_config == config
    assert nsl.configs.DEFAULT_DISTANCE_PARAMS == {
        "distance_type": nsl.configs.DistanceType.L2,
        "reduction": "weighted_sum_by_nonzero_weights",
        "sum_over_axis": None,
        "transform_fn": nsl.configs.TransformType.NONE,
    }
    decay = nsl.configs.DecayConfig(10)
    assert (decay.decay_rate, decay.min_value) == (0.96, 0.0)
    assert decay.decay_type is nsl.configs.DecayType.EXPONENTIAL_DECAY
    virtual = nsl.configs.VirtualAdvConfig()
    assert (virtual.num_approx_steps, virtual.approx_difference) == (1, 1e-6)
    target = nsl.configs.AdvTargetConfig()
    assert target.target_method is nsl.configs.AdvTargetType.GROUND_TRUTH


def test_values_of_enumerations_are_understood_and_listed():
    assert nsl.configs.NormType is advreg.NormType
    for kind in ("NormType", "DistanceType", "DecayType", "AdvTargetType"):
        members = getattr(nsl.configs, kind).all()
        assert members == list(getattr(nsl.configs, kind))
    config = nsl.configs.DistanceConfig("cosine", transform_fn="softmax")
    assert config.distance_type is nsl.configs.DistanceType.COSINE
    assert config.transform_fn is nsl.configs.TransformType.SOFTMAX
    with pytest.raises(ValueError, match=r"DistanceType.*'l1'.*Received: 'l3'"):
        nsl.configs.DistanceConfig("l3")
    with pytest.raises(ValueError, match="reduction"):
        nsl.configs.DistanceConfig(reduction="all")
    with pytest.raises(ValueError, match="`decay_steps` must be positive"):
        nsl.configs.DecayConfig(0)
    with pytest.raises(TypeError, match="`distance_config` must be of the class"):
        nsl.configs.VirtualAdvConfig(distance_config="l2")
    with pytest.raises(ValueError, match="`num_approx_steps` must be at least 0"):
        nsl.configs.VirtualAdvConfig(num_approx_steps=-1)


def test_fields_can_be_assigned_and_are_checked():
    config = nsl.configs.make_adv_reg_config(adv_step_size=0.1, adv_grad_norm="l1")
    neighbor = config.adv_neighbor_config
    assert isinstance(config, advreg.AdvRegConfig)
    assert isinstance(neighbor, advreg.AdvNeighborConfig)
    neighbor.adv_grad_norm = "infinity"
    neighbor.pgd_iterations = 5
    config.multiplier = 0.5
    assert neighbor.adv_grad_norm is nsl.configs.NormType.INFINITY
    assert (neighbor.pgd_iterations, config.multiplier) == (5, 0.5)
    with pytest.raises(ValueError, match="`pgd_iterations` must be at least 1"):
        neighbor.pgd_iterations = -1
    with pytest.raises(TypeError, match="`adv_neighbor_config` must be"):
        config.adv_neighbor_config = 0.1
    with pytest.raises(AttributeError, match=r"has the fields .*Received: 'step'"):
        neighbor.step = 0.1
    assert neighbor.pgd_iterations == 5


def test_steps_of_0_and_large_radii_are_taken_as_in_nsl():
    make = nsl.configs.make_adv_reg_config
    config = make(adv_step_size=0.0)
    config.adv_neighbor_config.pgd_epsilon = 0.1
    large = make(
        adv_step_size=8.0,
        adv_grad_norm="infinity",
        clip_value_min=0.0,
        clip_value_max=1.0,
    )
    assert large.adv_neighbor_config.adv_step_size == 8.0


def test_each_configuration_has_a_neighbor_of_its_own():
    one, other = nsl.configs.AdvRegConfig(), nsl.configs.AdvRegConfig()
    one.adv_neighbor_config.adv_step_size = 1.0
    assert other.adv_neighbor_config.adv_step_size == 0.001
    assert one != other
    assert copy.deepcopy(one) == one
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)


def test_configurations_survive_serialisation():
    config = nsl.configs.make_adv_reg_config(feature_mask={"x": np.ones(3)})
    data = keras.saving.serialize_keras_object(config)
    again = keras.saving.deserialize_keras_object(data)
    assert type(again) is nsl.configs.AdvRegConfig
    assert again == config
    assert again.adv_neighbor_config == config.adv_neighbor_config
    assert dataclasses.replace(config, multiplier=1.0).multiplier == 1.0


def test_no_iterations_after_a_random_start():
    config = nsl.configs.AdvNeighborConfig(pgd_iterations=0, random_init=True)
    assert config.pgd_iterations == 0
    with pytest.raises(ValueError, match="`pgd_iterations` must be at least 1"):
        nsl.configs.AdvNeighborConfig(pgd_iterations=0)


def test_inner_modules_are_found_too():
    assert nsl.keras.adversarial_regularization is nsl.keras
    for name in ("adversarial_neighbor", "distances", "regularizer", "utils"):
        assert getattr(nsl.lib, name) is nsl.lib
    assert nsl.configs.configs is nsl.configs
