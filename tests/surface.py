"""What `advreg migrate` has to know of `advreg.nsl`, until that is there."""

import importlib.util
import sys
import types

NAMES = {
    "configs": "AdvNeighborConfig AdvRegConfig DEFAULT_ADVERSARIAL_PARAMS "
    "DEFAULT_DISTANCE_PARAMS DistanceConfig NormType make_adv_reg_config",
    "keras": "AdversarialRegularization adversarial_loss",
    "lib": "gen_adv_neighbor kl_divergence normalize project_to_ball "
    "virtual_adv_regularizer",
}


def install(monkeypatch):
    """Puts modules of the same shape in its place."""
    if importlib.util.find_spec("advreg.nsl"):
        return
    root = _module(monkeypatch, "advreg.nsl", list(NAMES))
    for name, names in NAMES.items():
        setattr(root, name, _module(monkeypatch, f"advreg.nsl.{name}", names.split()))


def _module(monkeypatch, name, names):
    def missing(wanted):
        raise AttributeError(f"{name} has no {wanted!r}, which is out of scope")

    module = types.ModuleType(name)
    module.__all__ = names
    module.__getattr__ = missing
    monkeypatch.setitem(sys.modules, name, module)
    return module
