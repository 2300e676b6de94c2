"""The base model, as training and attacks run it.

Comes in: a batch in any form that `fit` takes. Goes out: outputs, losses and gradients.
Training and attacks call the same code, so that an attack raises the same loss that
training lowers.

Read in this order:

- `inputs`: tells features, labels and sample weights of a batch apart.
- `network`: the one forward pass.
- `compiled_loss`: the losses that `compile` received.
- `gradients`, `precision`: gradients with respect to features, also in half precision.
- `masks`, `images`, `declared`: which values may be perturbed, and as which type.
- `logits`, `output_form`: how the outputs of a classifier are read.
- `states`, `modes`: what a forward pass changes in layers, and how they learn whether
  they train.
- `preprocessing`: models that preprocess in their own `fit`, as tasks of KerasHub do.
- `taps`, `convolution`: replace a method of a layer while the model runs.
"""
