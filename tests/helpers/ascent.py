"""Perturbations under a loss whose gradient is given."""

from keras import ops

from advreg.perturbation.ascent import perturb
from advreg.perturbation.ball import Settings
from helpers.backends import array, tensor


def ascend(x, slope, config, seed=None):
    """Perturbs `x` under a loss whose gradient is `slope` everywhere."""
    x = tensor(x)
    slope = ops.cast(ops.broadcast_to(slope, x.shape), x.dtype)
    x_adv = perturb(x, [slope], lambda _: [slope], Settings.of(config), seed)
    assert x_adv.dtype == x.dtype
    assert x_adv.shape == x.shape
    return array(x_adv)


def follow(x, slope, config, seed=None):
    """Returns how far `ascend` moves `x`."""
    x_adv = ascend(x, slope, config, seed).astype("float64")
    return x_adv - array(tensor(x)).astype("float64")
