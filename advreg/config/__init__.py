"""The configurations of training: everything that a user sets before there is a model.

Comes in: keyword arguments, with the names of Neural Structured Learning. Goes out: a
frozen, checked configuration, which can be saved, compared and hashed. A wrong value is
refused when the object is made. Nothing here knows a model or a batch.

Read in this order:

- `configs`: `AdvNeighborConfig` says how an input is perturbed, `AdvRegConfig` how the
  model is trained on it.
- `presets`: configurations from the literature.
- `norms`: the three norms.
- `schedules`: numbers that change during training.
- `serialization`: the JSON form of all configurations.
"""
