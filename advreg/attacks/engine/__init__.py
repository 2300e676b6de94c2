"""The engine of attacks: runs solvers on problems, batch by batch.

A `Problem` is a target model, and a threat model, which says how its inputs may be
changed. A `Solver` is an iterative method: it computes the next displacements of a
batch from an evaluation of the model at the present ones. `run` runs a solver on a
batch, drops the rows that are fooled, and returns a `Result`. A `Pipeline` runs several
solvers one after another, each on the rows that those before it have not fooled.

Read in this order:

- `target`: the model under attack, any Keras model, in inference mode.
- `labels`: labels in any form, as class numbers or values.
- `problem`: the threat model, and what "fooled" means.
- `solver`: the interface of solvers.
- `runner`: `run` and `Pipeline`.
- `rows`: selects and joins rows of batches.
- `losses`: the losses that attacks maximise.

A new attack is a `Solver`, in a file of `advreg.attacks`, and a subclass of `Attack`
with its hyperparameters.
"""
