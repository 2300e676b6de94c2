"""A table of the peculiarities of single attacks of ART."""

from __future__ import annotations

import dataclasses

from advreg.config.norms import NormType


@dataclasses.dataclass(frozen=True)
class Quirk:
    """The differences between one attack and most others of ART.

    Args:
        y: Meaning of ART's `y`, where the attack has no argument `targeted`, or ignores
            it: `"target"`, always the class to reach; `"true"`, always the true class;
            `None`, as `targeted` says.
        takes_probabilities: Whether its formulas need probabilities, not logits.
        needs_range: Whether it needs the range of the data.
        batch: Number of examples that it gets at once: `"all"`, because it searches one
            change for all; `"one"`; `None` for any number.
        sets_batch_size: Whether its `batch_size` may be set. It may not if it counts
            something else, or must be 1.
        norm: The norm of its radius, where the attack has no argument `norm`.
        has_norm: Whether its radius is measured in a norm at all.
        refused: The reason why it cannot be used here, for the error.
        only_on_tensorflow: What to use instead on other backends, where ART runs it on
            its own classifiers alone.
    """

    y: str | None = None
    takes_probabilities: bool = False
    needs_range: bool = False
    batch: str | None = None
    sets_batch_size: bool = True
    norm: NormType | None = None
    has_norm: bool = True
    refused: str | None = None
    only_on_tensorflow: str | None = None


_IMITATES = "`attack` must work on labels, and this one imitates other images."
QUIRKS = {
    # Its `targeted` adds targets to the untargeted attacks.
    "AutoAttack": Quirk(y="true", needs_range=True),
    "BasicIterativeMethod": Quirk(norm=NormType.INFINITY),
    "FeatureAdversariesNumpy": Quirk(refused=_IMITATES),
    "FeatureAdversariesPyTorch": Quirk(refused=_IMITATES),
    "FeatureAdversariesTensorFlowV2": Quirk(refused=_IMITATES),
    "GeoDA": Quirk(
        refused="`attack` must run with NumPy 2 and leave no files behind, and ART's "
        "GeoDA does neither. Use HopSkipJump or SignOPTAttack, which search along the "
        "boundary too."
    ),
    "LowProFool": Quirk(y="target", takes_probabilities=True),
    "MalwareGDTensorFlow": Quirk(
        only_on_tensorflow="There is no other attack on the bytes of programs."
    ),
    "NewtonFool": Quirk(takes_probabilities=True),
    "PixelAttack": Quirk(takes_probabilities=True, needs_range=True),
    "ProjectedGradientDescentTensorFlowV2": Quirk(
        only_on_tensorflow="Use ProjectedGradientDescent."
    ),
    "SaliencyMapMethod": Quirk(y="target"),
    "ShadowAttack": Quirk(
        y="target",
        needs_range=True,
        batch="one",
        sets_batch_size=False,
        only_on_tensorflow="Use CarliniL2Method or ElasticNet, which penalise the "
        "change too.",
    ),
    "SignOPTAttack": Quirk(needs_range=True),
    "SimBA": Quirk(takes_probabilities=True, sets_batch_size=False),
    "SpatialTransformation": Quirk(batch="all"),
    "SquareAttack": Quirk(needs_range=True),
    "TargetedUniversalPerturbation": Quirk(y="target", batch="all"),
    "ThresholdAttack": Quirk(takes_probabilities=True, needs_range=True),
    "UniversalPerturbation": Quirk(batch="all"),
    "VirtualAdversarialMethod": Quirk(takes_probabilities=True, norm=NormType.L2),
    "Wasserstein": Quirk(has_norm=False),
    "ZooAttack": Quirk(sets_batch_size=False),
}
NO_QUIRK = Quirk()


def quirk_of(attack: type) -> Quirk:
    """Returns the row of a class of ART's attacks."""
    return QUIRKS.get(attack.__name__, NO_QUIRK)
