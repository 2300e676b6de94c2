"""The names of Neural Structured Learning."""

# The public names of Neural Structured Learning 1.4.0; `-` marks what advreg has not.
NAMES = {
    "": "configs keras lib __version__ -estimator -experimental -tools",
    "configs": "AdvNeighborConfig AdvRegConfig AdvTargetConfig AdvTargetType "
    "DecayConfig DecayType DEFAULT_ADVERSARIAL_PARAMS DEFAULT_DISTANCE_PARAMS "
    "DistanceConfig DistanceType NormType TransformType VirtualAdvConfig "
    "make_adv_reg_config "
    "-GraphBuilderConfig -GraphNeighborConfig -GraphRegConfig -IntegrationConfig "
    "-IntegrationType -make_graph_reg_config",
    "keras": "adversarial_loss AdversarialRegularization -GraphRegularization -layers",
    "lib": "adv_regularizer apply_feature_mask decay_over_time gen_adv_neighbor "
    "get_target_indices jensen_shannon_divergence kl_divergence "
    "maximize_within_unit_norm normalize pairwise_distance_wrapper project_to_ball "
    "random_in_norm_ball virtual_adv_regularizer -GenNeighbor -replicate_embeddings "
    "-strip_neighbor_features -unpack_neighbor_features",
}
