"""The cases of `nsl_parity.py`, which runs this package on both sides.

Nothing in it but `common` knows which library it got: that is the point. It runs on
Keras 2 and Keras 3, and is written so that both mean the same:

- Weights are set and read by the names of layers, since the order in which a network
  with several branches lists them is not the same in both.
- Batches of a `fit` are of one size: where they are not, Keras 2 takes the mean over
  batches and Keras 3 over examples.
- No network has BatchNorm, dropout or losses of its own: see the defects.
- SGD and Adam compute the same in both (Adam adds its epsilon to the square root of
  the uncorrected second moment), and so are used as they are.
"""
