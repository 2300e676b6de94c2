"""The arithmetic of a perturbation, without any model.

Comes in: features, a nested structure of tensors, and the gradient of the loss with
respect to each of them. Goes out: perturbed features, inside the norm ball and the clip
range. Everything is written with `keras.ops`, and computed in float32 at least.

Read in this order:

- `geometry`: steps, projections and random points, as pure functions of a matrix
  `[batch, values]`.
- `packing`: puts the features side by side into such a matrix, and back.
- `ball`: joins both with masks and clip ranges. All attacks use it.
- `ascent`: the attack of training: start, step, project, clip, repeat.
- `units`: checks that the data lie in the clip range.
"""
