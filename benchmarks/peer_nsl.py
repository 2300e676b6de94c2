# /// script
# requires-python = ">=3.9,<3.12"
# dependencies = [
#   "tensorflow==2.15.1", "numpy==1.26.4", "neural-structured-learning==1.4.0",
# ]
# ///
"""Neural Structured Learning 1.4.0 on Keras 2, and Keras alone where NSL is.

Its `evaluate` runs the attack, so that the configuration counts there too.
"""

import keras_side
import neural_structured_learning as nsl
from side import CLIP, MULTIPLIER, serve


def wrapped(base, job):
    # For a dictionary of features NSL ignores a range that is a scalar.
    low, high = ({"image": value} for value in CLIP)
    limits = {"clip_value_min": low, "clip_value_max": high}
    make = nsl.configs.make_adv_reg_config
    config = make(MULTIPLIER, **job.adversary(), **limits)
    return nsl.keras.AdversarialRegularization(base, ["label"], adv_config=config)


def dictionary(x, y):
    return ({"image": x, "label": y},)


serve({"nsl": keras_side.kinds(wrapped, dictionary), "plain_nsl": keras_side.kinds()})
