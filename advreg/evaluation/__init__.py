"""Reports: how robust a classifier is, and whether the result can be trusted.

Comes in: a model, data and attacks. Goes out: a `RobustnessReport`.

Read in this order:

- `robustness`: `evaluate_robustness`, which puts the rest together.
- `evaluation_run`: reads the data once, and gives the examples that the model
  classifies correctly to all attacks.
- `attack_run`: one attack at one radius, and its result for each example.
- `diagnostics`: checks that the attacks were strong enough, by attacks of its own.
- `data_checks`, `values`: checks of the data, the model and the radii.
- `report`, `tables`: the results, and how they are printed.
- `features`: which parts of the input are perturbed.

A new check is a function in `diagnostics` or `data_checks`, and a name in
`diagnostics.CHECKS`.
"""
