"""Neural Structured Learning's names: `from advreg import nsl`.

Adversarial code that was written for `import neural_structured_learning as nsl` runs on
it. `docs/nsl.md` has every name, and every difference in behaviour with its reason.
"""

from advreg._version import __version__
from advreg.nsl import configs, keras, lib
from advreg.nsl._absent import ESTIMATORS, GRAPHS, absent

__all__ = ["__version__", "configs", "keras", "lib"]

keras.mend_metrics_names()

__getattr__ = absent(
    __name__, {"estimator": ESTIMATORS, "experimental": GRAPHS, "tools": GRAPHS}
)
