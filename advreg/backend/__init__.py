"""The interface to Keras's backend. Of the core of the library, only it imports one.

`backend.f(...)` is the function `f` of the package for the backend on which Keras runs:
`tensorflow`, `jax` or `torch`. Each has the same names. `tensorflow` says what each of
them is for, and has some that belong to `tf.distribute` and tapes alone. Read in this
order:

- `check`: finds out the backend, before anything else is imported.
- `tensorflow`, `jax`, `torch`: gradients, loops, random numbers, and what a tensor is;
  compiled functions of a model; the part of the wrapper that Keras's trainer calls.
- `cache`, `parts`: what is known of a model, dropped when the model changes.
- `common`, `one_device`, `batches`, `seeds`: what JAX and PyTorch have in common.
- `keras_private`: the only module that uses private names of Keras.
"""

from typing import TYPE_CHECKING

from advreg.backend import check  # First, because it says which backend is missing.
from advreg.backend.cache import alike as alike

BACKEND = check.BACKEND

if TYPE_CHECKING or BACKEND == "tensorflow":
    from advreg.backend.tensorflow import *  # noqa: F403
elif BACKEND == "jax":
    from advreg.backend.jax import *  # noqa: F403
else:
    from advreg.backend.torch import *  # noqa: F403
