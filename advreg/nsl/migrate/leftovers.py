"""Finds code of Keras 2, in programs that use NSL, that does not work in Keras 3."""

from __future__ import annotations

import warnings
from typing import Any

from advreg.nsl.migrate.renaming import NSL, Module, collapsed

# Names of TensorFlow 2 that Keras 3 does not have, without `compat.v1`, and what to do.
_GONE = {
    "tensorflow.feature_column": "Keras 3 takes no feature columns; use preprocessing "
    "layers, or keras.utils.FeatureSpace",
    "tensorflow.keras.layers.DenseFeatures": "Keras 3 has no feature columns; use "
    "preprocessing layers, or keras.utils.FeatureSpace",
    "tensorflow.estimator": "TensorFlow has had no estimators since 2.16; use a Keras "
    "model, its compile and fit",
    "tensorflow.disable_eager_execution": "Keras 3 does not run in graphs of "
    "TensorFlow 1; remove the call",
    "tensorflow.disable_v2_behavior": "Keras 3 does not run in graphs of TensorFlow 1; "
    "remove the call",
    "tensorflow.keras.backend.get_session": "Keras 3 has no sessions; call the model, "
    "and tensors have .numpy()",
    "tensorflow.keras.experimental": "Keras 3 has no such module; look in Keras's "
    "documentation for what has taken its place",
    "tensorflow.keras.wrappers.scikit_learn": "gone from Keras 3; use keras.wrappers, "
    "or the package scikeras",
}
_ATTRS = {
    f"{package}.{name}": "configs of advreg are dataclasses; if this is one, use "
    f"dataclasses.{new}"
    for package in ("attr", "attrs")
    for name, new in (("evolve", "replace"), ("asdict", "asdict"))
}
# Attributes of Keras 2's models, which a `train_step` of the user's own may use.
_TRAINER = {
    "compiled_loss": "Keras 3 keeps it for old code, and warns; call "
    "self.compute_loss(x, y, y_pred, sample_weight), which adds the layers' own losses",
    "compiled_metrics": "Keras 3 keeps its update_state for old code, and warns; call "
    "self.compute_metrics(x, y, y_pred, sample_weight), or update each of self.metrics",
}
# Attributes of Keras 2's optimizers.
_OPTIMIZERS = {
    "minimize": "Keras 3's optimizers have no minimize; take gradients with a "
    "tf.GradientTape, and call apply_gradients or apply",
    "lr": "Keras 3's optimizers have no lr, and to set it changes nothing; use "
    "learning_rate",
}
_ATTACKED_LOG = "val_scaled_adversarial_loss"
_WRAPPER = ("keras", "AdversarialRegularization")
_SAVES = "Keras 3 saves to .keras; for a SavedModel call base_model.export"
_LOADS = "Keras 3 loads .keras and .h5; a SavedModel loads by tf.saved_model.load"
_SAVED = (".keras", ".h5", ".hdf5")
_LOADERS = {"tensorflow.keras.models.load_model", "tensorflow.keras.saving.load_model"}
_UNCONSTRAINED = {"pgd_epsilon", "clip_value_min", "clip_value_max", "feature_mask"}


class Leftovers:
    """A search for code of Keras 2 in a module that uses NSL.

    Args:
        module: The module, after `Module.migrate`, which has followed its names.
    """

    def __init__(self, module: Module) -> None:
        self._module, self._cst = module, module.cst

    def find(self) -> None:
        """Lists the places in the module that do not work in Keras 3."""
        imports = [
            (alias, path)
            for node in self._module.of("Import", "ImportFrom")
            for alias, path, _ in self._module.aliases(node)
        ]
        for node, path in [*imports, *self._module.meanings.items()]:
            name = _modern(path)
            is_import = isinstance(node, self._cst.ImportAlias)
            shown = (
                f"import of `{'.'.join(path)}`"
                if is_import
                else f"`{self._module.text(node)}`"
            )
            for gone, why in _GONE.items():
                if f"{name}.".startswith(f"{gone}."):
                    self._module.place(node, shown, why)
            if name in _ATTRS and not is_import:
                self._module.place(node, shown, _ATTRS[name])
        self._trainer()
        self._logs()
        calls = self._module.of("Call")
        wrapped = self._wrapped(calls)
        for call in calls:
            self._call(call, wrapped)

    def _trainer(self) -> None:
        """Lists attributes that only Keras 2's models and optimizers have."""
        for node in self._module.of("Attribute"):
            name = node.attr.value
            call = self._module.parents[node]
            is_called = isinstance(call, self._cst.Call) and call.func is node
            why = _TRAINER.get(name)
            if (name == "lr" or (name == "minimize" and is_called)) and (
                self._is_optimizer(node.value)
            ):
                why = _OPTIMIZERS[name]
            if why is not None:
                self._module.place(
                    node, f"`{' '.join(self._module.text(node).split())}`", why
                )

    def _is_optimizer(self, node: Any) -> bool:
        """Returns whether an expression is an optimizer of Keras, or named like one."""
        value = self._assigned(node) or node
        if isinstance(value, self._cst.Call):
            path = _modern(self._module.meanings.get(value.func, ()))
            if path.startswith(("tensorflow.keras.optimizers.", "tensorflow.train.")):
                return path.startswith("tensorflow.keras.")
        return any(
            "optimizer" in name.lower() for name in self._module.dotted(node)[-1:]
        )

    def _logs(self) -> None:
        """Lists names of logs that Keras 3 or advreg does not have."""
        strings = self._module.of("SimpleString")
        for node in strings:
            if node.raw_value == _ATTACKED_LOG:
                self._module.place(
                    node,
                    f"`{_ATTACKED_LOG}`",
                    "evaluate runs no attack, and logs none; use "
                    "advreg.callbacks.RobustAccuracy, or monitor val_loss",
                )
        for node in strings:
            holder = self._holder(node) if node.raw_value == "lr" else None
            if self._module.dotted(holder)[-1:] in {("logs",), ("history",)}:
                self._module.place(
                    node, f"{node.value} of the logs", "Keras 3 logs learning_rate"
                )

    def _holder(self, key: Any) -> Any:
        """Returns the object in `holder[key]` or `holder.get(key)`, else `None`."""
        parent = self._module.parents[key]
        asked = self._module.parents[parent]
        if isinstance(parent, self._cst.Index):
            return self._module.parents[asked].value
        if (
            isinstance(parent, self._cst.Arg)
            and isinstance(asked, self._cst.Call)
            and asked.args[0] is parent
            and isinstance(asked.func, self._cst.Attribute)
            and asked.func.attr.value == "get"
        ):
            return asked.func.value
        return None

    def _wrapped(self, calls: list[Any]) -> set[tuple[str, ...]]:
        """Returns the variables that hold wrapped models and their bases."""
        names = set()
        for call in calls:
            path = self._module.meanings.get(call.func, ())
            if path[:1] != (NSL,) or collapsed(path[1:]) != _WRAPPER:
                continue
            base = _argument(call, "base_model", 0)
            if base is not None:
                names.add(self._module.dotted(base))
            statement = self._module.parents[call]
            if isinstance(statement, self._cst.Assign):
                names |= {
                    self._module.dotted(target.target) for target in statement.targets
                }
        return names - {()}

    def _call(self, call: Any, wrapped: set[tuple[str, ...]]) -> None:
        path = self._module.meanings.get(call.func, ())
        method = (
            call.func.attr.value if isinstance(call.func, self._cst.Attribute) else ""
        )
        shown = f"`{self._module.text(call.func)}`"
        for argument in call.args:
            value = self._module.dotted(argument.value)
            key = argument.keyword.value if argument.keyword is not None else ""
            if key == "dynamic" and value == ("True",):
                self._module.place(
                    argument,
                    "`dynamic=True`",
                    "Keras 3 has no dynamic layers; compile with run_eagerly=True",
                )
            if (
                method == "perturb_on_batch"
                and key in _UNCONSTRAINED
                and value == ("None",)
            ):
                self._module.place(
                    argument,
                    f"`{key}=None`",
                    "NSL ignored None here, and advreg takes it as no constraint; "
                    "leave it out for what the model was made with",
                )
        if method in {"save", "save_weights"} and self._is_wrapped(
            call.func.value, wrapped
        ):
            endings = _SAVED if method == "save" else (".weights.h5",)
            why = _SAVES if method == "save" else "Keras 3 saves them to .weights.h5"
        elif _modern(path) in _LOADERS:
            endings, why = _SAVED, _LOADS
        elif _modern(path) == "tensorflow.keras.callbacks.ModelCheckpoint":
            endings = _SAVED
            why = "Keras 3 takes .keras, and for weights alone .weights.h5"
        else:
            return
        file = _argument(call, "filepath", 0)
        ending = None if file is None else self._ending(file)
        if ending is None or any(known.endswith(ending) for known in endings):
            return  # The code may show only a part of the suffix.
        if not ending.endswith(endings):
            self._module.place(call, f"{shown} of a path that ends in {ending!r}", why)

    def _is_wrapped(self, node: Any, wrapped: set[tuple[str, ...]]) -> bool:
        name = self._module.dotted(node)
        return name in wrapped or name[-1:] == ("base_model",)

    def _assigned(self, node: Any) -> Any:
        """Returns the value of a name that is assigned exactly once, else `None`."""
        referents = self._module.referents.get(node, [])
        if len(referents) != 1:
            return None
        statement = self._module.parents.get(getattr(referents[0], "node", None))
        if isinstance(statement, self._cst.AssignTarget):
            statement = self._module.parents[statement]
        if isinstance(statement, (self._cst.Assign, self._cst.AnnAssign)):
            return statement.value
        return None

    def _ending(self, node: Any, seen: tuple[Any, ...] = ()) -> str | None:
        """Returns the end of a path, or `None` if the code does not show it."""
        last: Any = None
        if isinstance(node, (self._cst.SimpleString, self._cst.ConcatenatedString)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Warnings of invalid escapes.
                value = node.evaluated_value
            return value if isinstance(value, str) else None
        if isinstance(node, self._cst.FormattedString) and node.parts:
            last = node.parts[-1]
            if isinstance(last, self._cst.FormattedStringText):
                return last.value
            last = None if last.conversion or last.format_spec else last.expression
        elif isinstance(node, self._cst.BinaryOperation):
            joins = isinstance(node.operator, (self._cst.Add, self._cst.Divide))
            last = node.right if joins else None
        elif isinstance(node, self._cst.Call) and node.args:
            name = self._module.dotted(node.func)[-1:]
            if name in {("join",), ("joinpath",), ("Path",), ("str",)}:
                last = node.args[-1].value
        elif isinstance(node, self._cst.Name):
            last = self._assigned(node)
        if last is None or last in seen:
            return None
        return self._ending(last, (*seen, last))


def _argument(call: Any, name: str, index: int) -> Any:
    """Returns an argument of a call, by keyword or by position."""
    for argument in call.args:
        if argument.keyword is not None and argument.keyword.value == name:
            return argument.value
    before = call.args[: index + 1]
    if len(before) > index and not any(a.star or a.keyword for a in before):
        return before[index].value
    return None


def _modern(path: tuple[str, ...]) -> str:
    """Returns a path as a name of TensorFlow 2: `keras` as `tensorflow.keras`."""
    if path[:1] == ("keras",):
        path = ("tensorflow", *path)
    if path[:2] == ("tensorflow", "compat"):
        path = ("tensorflow", *path[3:])
    return ".".join(path)
