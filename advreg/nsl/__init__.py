"""The names of Neural Structured Learning (NSL): `from advreg import nsl`.

Adversarial code that was written for `import neural_structured_learning as nsl` runs
with it. Comes in: NSL's arguments. Goes out: advreg's results, under NSL's names. There
is no arithmetic of its own here, except for distances and decays that only NSL has.
`docs/nsl.md` lists every name, and every difference in behaviour with its reason.

Read `keras` first, then `configs` and `lib`. `_absent` explains names that are missing.
`_tensorflow` and `_elsewhere` have what the functions need of the backend itself.
`migrate` changes source code from NSL to this package.
"""

from advreg._version import __version__
from advreg.nsl import configs, keras, lib
from advreg.nsl._absent import ESTIMATORS, GRAPHS, absent

__all__ = ["__version__", "configs", "keras", "lib"]

keras.install_metrics_names()

__getattr__ = absent(
    __name__, {"estimator": ESTIMATORS, "experimental": GRAPHS, "tools": GRAPHS}
)
