"""The bridge to the attacks of the Adversarial Robustness Toolbox (ART).

Comes in: a class of ART's attacks, and its arguments. Goes out: an attack that is
called like advreg's own. ART is imported only where it is used.

Read in this order:

- `attack`: the class that users see.
- `classes`: finds the classes of ART and their arguments.
- `bridge`: makes a classifier for ART of a Keras model.
- `estimators`: the classes of these classifiers, one for TensorFlow and one for the
  other backends.
- `quirks`: a table of the peculiarities of single attacks of ART. An attack that
  behaves unlike the others gets a row there.
"""
