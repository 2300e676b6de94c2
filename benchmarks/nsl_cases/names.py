"""The public names: parameters in their order, with defaults, and members of enums."""

import enum
import inspect

from nsl_cases.common import Groups, nsl

GROUPS = Groups()

# Graphs, fusion and an abstract class are no part of advreg.
LEFT_OUT = {
    "GenNeighbor",
    "GraphBuilderConfig",
    "GraphNeighborConfig",
    "GraphRegConfig",
    "GraphRegularization",
    "IntegrationConfig",
    "IntegrationType",
    "layers",
    "make_graph_reg_config",
    "replicate_embeddings",
    "strip_neighbor_features",
    "unpack_neighbor_features",
}
METHODS = ("compile", "perturb_on_batch", "save")


def simple(value):
    """A default as text; an object, for which advreg may have `None`, is not told."""
    if isinstance(value, enum.Enum):
        value = value.value
    return repr(value) if isinstance(value, (int, float, str)) else ""


def parameters(function):
    """For each parameter its place and its name, and its default."""
    known = inspect.signature(function).parameters.values()
    named = [one for one in known if one.kind is one.POSITIONAL_OR_KEYWORD]
    return {
        f"{place} {one.name}": simple(one.default) for place, one in enumerate(named)
    }


def describe(thing):
    if isinstance(thing, dict):
        return {name: simple(value) for name, value in thing.items()}
    if isinstance(thing, enum.EnumMeta):
        return {name: simple(member) for name, member in thing.__members__.items()}
    return parameters(thing)


@GROUPS.add("names, parameters, defaults")
def names():
    for module in (nsl.configs, nsl.keras, nsl.lib):
        for name in sorted(set(module.__all__) - LEFT_OUT):
            short = f"{module.__name__.split('.')[-1]}.{name}"
            yield short, lambda m=module, n=name: describe(getattr(m, n))
    wrapper = nsl.keras.AdversarialRegularization
    for method in METHODS:
        yield (
            f"AdversarialRegularization.{method}",
            # advreg has defaults where NSL has none.
            lambda m=method: dict.fromkeys(parameters(getattr(wrapper, m)), ""),
        )
