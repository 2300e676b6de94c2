"""The wrapper that trains a model adversarially, and its parts.

Comes in: a Keras model and a configuration. Goes out: a Keras model that is compiled,
fitted, saved and loaded like any other.

Read in this order:

- `model`: the wrapper, as users see it.
- `trainer`: its base class, which Keras calls. `train_step` gives a batch and a
  `Request` to `step`, and applies the gradients that come back.
- `request`: the parts of the wrapper that a step needs. `step` and `perturb_on_batch`
  get this frozen object, and do not know the wrapper.
- `step`: one training step, from a batch to its gradients.
- `perturb_on_batch`: the perturbation of one batch, outside of training.
- `custom_loops`: the same arithmetic for training loops of the user's own.
- `watch`: checks the data from within the compiled step.
- `saving`: writes a whole file or none.
"""
