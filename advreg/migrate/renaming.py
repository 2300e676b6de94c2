"""What becomes of a module's names when it moves from NSL to `advreg.nsl`."""

from __future__ import annotations

import bisect
import importlib
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from advreg._extras import import_extra

_NSL = "neural_structured_learning"
# The modules of NSL that each of advreg's takes the place of.
_INNER = {
    "configs": {"configs"},
    "keras": {"adversarial_regularization"},
    "lib": {"adversarial_neighbor", "distances", "regularizer", "utils"},
}
# Those of which it has nothing, and what of each it gives the reason for.
_LEFT_OUT = {
    "abstract_gen_neighbor": "GenNeighbor",
    "graph_regularization": "GraphRegularization",
}
MENTION = re.compile(r"neural[-_.]structured[-_.]learning", re.IGNORECASE)


def _missing(path: tuple[str, ...]) -> str | None:
    """Why advreg does not have what is at a path within NSL; `None` where it does."""
    path = _collapsed(path)
    if not path:
        return None
    space, *names = path
    if space not in _INNER:
        return _absence("advreg.nsl", space)
    if not names:
        return None
    return _absence(f"advreg.nsl.{space}", _LEFT_OUT.get(names[0], names[0]))


def _absence(module: str, name: str) -> str | None:
    found = importlib.import_module(module)
    if name in getattr(found, "__all__", ()):
        return None
    try:
        getattr(found, name)
    except AttributeError as error:
        why = str(error)
    else:
        why = f"module {module!r} has no public attribute {name!r}"
    if why.endswith(f"{name!r}"):  # No reason is given where NSL had it for itself.
        return f"{why}: do without it, or write it yourself"
    # What is missing is shown beside the reason.
    return why.removeprefix(f"module {module!r} has no attribute {name!r}: ")


def _collapsed(path: tuple[str, ...]) -> tuple[str, ...]:
    """Leaves out the module within `configs`, `keras` or `lib`, as advreg has none."""
    if len(path) > 1 and path[1] in _INNER.get(path[0], ()):
        return (path[0], *path[2:])
    return path


# What Keras 3 does not have, by the names of TensorFlow 2, with `compat.v1` left out.
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
# What a model's own steps took of TensorFlow 2's trainer.
_TRAINER = {
    "compiled_loss": "Keras 3 keeps it for old code, and warns; call "
    "self.compute_loss(x, y, y_pred, sample_weight), which adds the layers' own losses",
    "compiled_metrics": "Keras 3 keeps its update_state for old code, and warns; call "
    "self.compute_metrics(x, y, y_pred, sample_weight), or update each of self.metrics",
}
# And of optimizers.
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

Position = tuple[int, int]


class Module:
    r"""A module's syntax tree, what its names stand for, and what is to become of it.

    Args:
        code: The module, with `\n` at the ends of its lines.
        tops: How many lines stand before each cell, where it is made of several.
    """

    def __init__(self, code: str, tops: Sequence[int] = (0,)) -> None:
        cst = import_extra("libcst", "migrate")
        metadata = import_extra("libcst.metadata", "migrate")
        try:
            wrapper = metadata.MetadataWrapper(cst.parse_module(code))
        except cst.ParserSyntaxError as error:
            raise ValueError(f"line {error.raw_line}: {error.message}") from error
        self.cst: Any = cst
        self.lines = code.split("\n")
        self.tops = tops
        self.positions = wrapper.resolve(metadata.PositionProvider)
        self.parents = wrapper.resolve(metadata.ParentNodeProvider)
        self.scopes = dict.fromkeys(wrapper.resolve(metadata.ScopeProvider).values())
        self.changes: list[tuple[Position, Position, str]] = []
        # The first and last lines of statements that go, with their lines.
        self.dropped: list[tuple[int, int]] = []
        self.places: list[tuple[int, str, str]] = []
        # What a name stands for that a statement binds, by statement and name.
        self.bound: dict[tuple[Any, str], tuple[str, ...]] = {}
        # What an expression stands for, where it is a name or an attribute of one.
        self.meanings: dict[Any, tuple[str, ...]] = {}
        # Who bound a name that is read.
        self.referents: dict[Any, list[Any]] = {}
        # The imports that have been written, by the body and cell that they stand in.
        self.written: dict[tuple[Any, int], set[str]] = {}

    def migrate(self) -> None:
        """Collects the changes, and the places for a person."""
        imports = [*self._of("Import"), *self._of("ImportFrom")]
        for node in imports:
            self._bind(node)
        uses_nsl = any(path[0] == _NSL for path in self.bound.values())
        for node in imports:
            if isinstance(node, self.cst.Import):
                self._import(node)
            else:
                uses_nsl |= self._import_from(node)
        self._names()
        self._strings()
        if uses_nsl:
            self._keras()

    def _of(self, *kinds: str) -> list[Any]:
        types = tuple(getattr(self.cst, kind) for kind in kinds)
        return [node for node in self.positions if isinstance(node, types)]

    def _span(self, node: Any) -> tuple[Position, Position]:
        span = self.positions[node]
        return (span.start.line, span.start.column), (span.end.line, span.end.column)

    def _text(self, node: Any) -> str:
        (first, left), (last, right) = self._span(node)
        lines = self.lines[first - 1 : last]
        lines[-1] = lines[-1][:right]
        lines[0] = lines[0][left:]
        return "\n".join(lines)

    def _place(self, node: Any, what: str, why: str) -> None:
        self.places.append((self._span(node)[0][0], what, why))

    def _dotted(self, node: Any) -> tuple[str, ...]:
        name = self.cst.helpers.get_full_name_for_node(node)
        return tuple(name.split(".")) if name else ()

    def _aliases(self, node: Any) -> list[tuple[Any, tuple[str, ...], str | None]]:
        """What an import names: the nodes, the paths, and the names after `as`."""
        if isinstance(node.names, self.cst.ImportStar):
            return []
        module: tuple[str, ...] = ()
        if isinstance(node, self.cst.ImportFrom):
            if node.relative:
                return []
            module = self._dotted(node.module)
        return [
            (alias, module + self._dotted(alias.name), alias.evaluated_alias)
            for alias in node.names
        ]

    def _bind(self, node: Any) -> None:
        for _, path, name in self._aliases(node):
            if isinstance(node, self.cst.ImportFrom):
                self.bound[node, name or path[-1]] = path
            elif name is None:  # `import a.b` binds a.
                self.bound[node, path[0]] = path[:1]
            else:
                self.bound[node, name] = path

    def _import(self, node: Any) -> None:
        kept: list[str] = []
        moved: list[tuple[tuple[str, ...], str]] = []
        for alias, path, name in self._aliases(node):
            if not self._moves(alias, path):
                kept.append(self._text(alias))
            elif name is None:
                moved.append((("advreg", "nsl"), _NSL))
            else:
                moved.append((("advreg", "nsl", *_collapsed(path[1:])), name))
        if moved:
            first = [f"import {', '.join(kept)}"] if kept else []
            self._put(node, [*first, *_from_imports(moved)])

    def _put(self, node: Any, statements: list[str]) -> None:
        """Puts statements in the place of one, but for those that stand there before.

        `import neural_structured_learning` and another of a module within it come to
        the same.
        """
        (first, left), (last, right) = self._span(node)
        line = self.parents[node]
        end = re.match(r"\s*(?=#|$)", self.lines[last - 1][right:])
        alone = isinstance(line, self.cst.SimpleStatementLine) and len(line.body) == 1
        if not alone or not end or self._is_rebound(_NSL):
            self._split(node, statements)
            return
        cell = bisect.bisect_right(self.tops, first - 1)
        written = self.written.setdefault((self.parents[line], cell), set())
        new = [statement for statement in statements if statement not in written]
        written.update(new)
        if new:
            self._split(node, new)
        elif self.lines[last - 1][right + end.end() :]:  # Its comment stays.
            self.changes.append(((first, left), (last, right + end.end()), ""))
        else:
            self.dropped.append((first, last))

    def _is_rebound(self, name: str) -> bool:
        """Whether a name is bound by anything but imports."""
        imports = (self.cst.Import, self.cst.ImportFrom)
        return any(
            not isinstance(getattr(assignment, "node", None), imports)
            for scope in self.scopes
            if scope
            for assignment in scope[name]
            if assignment.scope is scope
        )

    def _import_from(self, node: Any) -> bool:
        """Moves `from ... import ...`, and says whether it is from NSL."""
        if node.relative or self._dotted(node.module)[0] != _NSL:
            return False
        if isinstance(node.names, self.cst.ImportStar):
            self._place(
                node,
                f"`{self._text(node)}`",
                "it does not say which names it brings; import those by name, and "
                "migrate again",
            )
            return True
        kept: list[str] = []
        moved: list[tuple[tuple[str, ...], str]] = []
        for alias, path, name in self._aliases(node):
            if self._moves(alias, path):
                new = ("advreg", "nsl", *_collapsed(path[1:]))
                moved.append((new, name or path[-1]))
            else:
                kept.append(self._text(alias))
        modules = {".".join(new[:-1]) for new, _ in moved}
        if len(modules) == 1 and not kept:  # Then it keeps its form.
            self._change(node.module, modules.pop())
            for alias, (new, name) in zip(node.names, moved, strict=True):
                if new[-1] == self._dotted(alias.name)[0]:
                    continue
                if alias.asname is None or new[-1] == name:
                    self._change(alias, _as(new[-1], name))
                else:
                    self._change(alias.name, new[-1])
        elif moved:
            module = self._text(node.module)
            first = [f"from {module} import {', '.join(kept)}"] if kept else []
            self._split(node, [*first, *_from_imports(moved)])
        return True

    def _moves(self, alias: Any, path: tuple[str, ...]) -> bool:
        """Whether advreg has what is imported; tells a person where it does not."""
        if path[0] != _NSL:
            return False
        why = _missing(path[1:])
        if why is not None:
            self._place(alias, f"import of `{'.'.join(path)}`", why)
        return why is None

    def _change(self, node: Any, new: str) -> None:
        self.changes.append((*self._span(node), new))

    def _split(self, node: Any, statements: list[str]) -> None:
        """Puts statements in the place of one."""
        (first, left), _ = self._span(node)
        parent = self.parents[node]
        indent = self.lines[first - 1][:left]
        alone = (
            isinstance(parent, self.cst.SimpleStatementLine)
            and len(parent.body) == 1
            and not indent.strip()
        )
        comments = [
            comment.value
            for comment in self._of("Comment")
            if (first, left) <= self._span(comment)[0] < self._span(node)[1]
        ]
        if comments and not alone:
            self._place(
                node,
                "import of several names",
                "only some of them are in advreg, and there are comments between; put "
                "it on a line of its own, and migrate again",
            )
            return
        new = (f"\n{indent}" if alone else "; ").join([*comments, *statements])
        self._change(node, new)

    def _names(self) -> None:
        """Follows names to what they stand for, and changes what NSL had deeper."""
        uses = list(self._uses())
        self.referents = {root: referents for root, _, referents in uses}
        known = -1
        while known != len(self.bound):  # `lib = nsl.lib` binds a name as well.
            known = len(self.bound)
            for root, chain, referents in uses:
                path = self._path(root, chain, referents)
                top = chain[-1] if chain else root
                statement = self.parents[top]
                if not path or not isinstance(statement, self.cst.Assign):
                    continue
                for target in statement.targets:
                    if isinstance(target.target, self.cst.Name):
                        self.bound[target.target, target.target.value] = path
        for root, chain, referents in uses:
            path = self._path(root, chain, referents)
            if path:
                self.meanings[chain[-1] if chain else root] = path
            if path[:1] == (_NSL,):
                self._use(root, chain, path, referents)

    def _uses(self) -> Iterator[tuple[Any, list[Any], list[Any]]]:
        """The names that are read, the attributes taken of each, and who bound it."""
        seen = set()
        for access in (a for scope in self.scopes if scope for a in scope.accesses):
            root = access.node
            while isinstance(root, self.cst.Attribute):
                root = root.value
            if not isinstance(root, self.cst.Name) or root in seen:
                continue
            seen.add(root)
            chain, node = [], root
            while (
                isinstance(parent := self.parents[node], self.cst.Attribute)
                and parent.value is node
            ):
                node = parent
                chain.append(node)
            yield root, chain, list(access.referents)

    def _path(
        self, root: Any, chain: list[Any], referents: list[Any]
    ) -> tuple[str, ...]:
        nodes = (getattr(referent, "node", None) for referent in referents)
        bases = {self.bound.get((node, root.value), ()) for node in nodes} - {()}
        if not bases:
            return ()
        base = min(bases, key=lambda path: (path[0] != _NSL, path))
        return base + tuple(node.attr.value for node in chain)

    def _use(
        self, root: Any, chain: list[Any], path: tuple[str, ...], referents: list[Any]
    ) -> None:
        """Collapses, or lists, one use of a name from NSL."""
        given = len(path) - len(chain)  # What the name itself stands for.
        written = [root.value, *(node.attr.value for node in chain)]
        why = _missing(path[1:])
        collapsed = _collapsed(path[1:])
        if why is not None:
            self._place(root, f"`{'.'.join(written)}`", why)
            return
        if len(collapsed) != len(path) - 1 and given < 3:
            others = [r for r in referents if not self._is_known(r, root.value)]
            inner = chain[2 - given]
            if others:
                self._place(
                    root,
                    f"`{'.'.join(written[: 4 - given])}`",
                    f"`{root.value}` is bound to something else as well; if it is NSL "
                    f"here, leave out `.{inner.attr.value}`",
                )
            else:
                start = self._span(inner.dot)[0]
                self.changes.append((start, self._span(inner.attr)[1], ""))
        is_module = len(collapsed) < 2 and _INNER.keys() >= set(collapsed)
        if is_module and self._is_handed_on(chain[-1] if chain else root):
            self._place(
                root,
                f"`{'.'.join(written)}`",
                "the module itself is handed on; see that what is taken of it there is "
                "in advreg.nsl",
            )

    def _is_known(self, referent: Any, name: str) -> bool:
        """Whether a binding is an import that was followed, or None in its place."""
        node = getattr(referent, "node", None)
        if (node, name) in self.bound:
            path = self.bound[node, name]
            return path[0] == _NSL or path[:2] == ("advreg", "nsl")
        statement = self.parents.get(self.parents.get(node))
        return (
            isinstance(statement, self.cst.Assign)
            and isinstance(statement.value, self.cst.Name)
            and statement.value.value == "None"
        )

    def _is_handed_on(self, node: Any) -> bool:
        parent = self.parents[node]
        if isinstance(parent, self.cst.Arg):
            call = self.parents[parent]
            shown = isinstance(call, self.cst.Call) and self._dotted(call.func)
            return shown not in {("print",), ("help",), ("dir",), ("type",)}
        return isinstance(parent, self.cst.Assign) and any(
            not isinstance(target.target, self.cst.Name) for target in parent.targets
        )

    def _strings(self) -> None:
        for node in self._of("SimpleString", "FormattedStringText"):
            for found in MENTION.finditer(node.value):
                if self._is_docstring(node):
                    continue
                line = self._span(node)[0][0] + node.value.count("\n", 0, found.start())
                self.places.append(
                    (line, f"`{found[0]}` in a string", self._spell(node))
                )

    def _spell(self, node: Any) -> str:
        argument = self.parents[node]
        call = self.parents[argument]
        if isinstance(argument, self.cst.Arg) and isinstance(call, self.cst.Call):
            imports = self.meanings.get(call.func) == ("importlib", "import_module")
            if imports or self._dotted(call.func) == ("__import__",):
                return (
                    "an import by name is not followed; import advreg.nsl, and look at "
                    "what is taken of it"
                )
        return (
            "strings are left alone; if it names the module or the package, write "
            "advreg.nsl or advreg"
        )

    def _is_docstring(self, node: Any) -> bool:
        while isinstance(self.parents[node], self.cst.ConcatenatedString):
            node = self.parents[node]
        statement = self.parents[node]
        line = self.parents[statement]
        body = self.parents.get(line)
        if not isinstance(statement, self.cst.Expr) or line.body[0] is not statement:
            return False
        if isinstance(line, self.cst.SimpleStatementSuite):
            return isinstance(body, (self.cst.FunctionDef, self.cst.ClassDef))
        return body.body[0] is line and isinstance(
            body if isinstance(body, self.cst.Module) else self.parents[body],
            (self.cst.Module, self.cst.FunctionDef, self.cst.ClassDef),
        )

    def _keras(self) -> None:
        """Lists what stops in Keras 3, whoever wraps the model."""
        imports = [
            (alias, path)
            for node in self._of("Import", "ImportFrom")
            for alias, path, _ in self._aliases(node)
        ]
        for node, path in [*imports, *self.meanings.items()]:
            name = _modern(path)
            is_import = isinstance(node, self.cst.ImportAlias)
            shown = (
                f"import of `{'.'.join(path)}`"
                if is_import
                else f"`{self._text(node)}`"
            )
            for gone, why in _GONE.items():
                if f"{name}.".startswith(f"{gone}."):
                    self._place(node, shown, why)
            if name in _ATTRS and not is_import:
                self._place(node, shown, _ATTRS[name])
        self._trainer()
        self._logs()
        calls = self._of("Call")
        wrapped = self._wrapped(calls)
        for call in calls:
            self._call(call, wrapped)

    def _trainer(self) -> None:
        """Lists what Keras 2's models and optimizers had."""
        for node in self._of("Attribute"):
            name = node.attr.value
            call = self.parents[node]
            is_called = isinstance(call, self.cst.Call) and call.func is node
            why = _TRAINER.get(name)
            if (name == "lr" or (name == "minimize" and is_called)) and (
                self._is_optimizer(node.value)
            ):
                why = _OPTIMIZERS[name]
            if why is not None:
                self._place(node, f"`{' '.join(self._text(node).split())}`", why)

    def _is_optimizer(self, node: Any) -> bool:
        """Whether an expression is one of Keras's optimizers, or is named like one."""
        value = self._assigned(node) or node
        if isinstance(value, self.cst.Call):
            path = _modern(self.meanings.get(value.func, ()))
            if path.startswith(("tensorflow.keras.optimizers.", "tensorflow.train.")):
                return path.startswith("tensorflow.keras.")
        return any("optimizer" in name.lower() for name in self._dotted(node)[-1:])

    def _logs(self) -> None:
        """Lists what is looked for in logs under the names that it had."""
        strings = self._of("SimpleString")
        for node in strings:
            if node.raw_value == _ATTACKED_LOG:
                self._place(
                    node,
                    f"`{_ATTACKED_LOG}`",
                    "evaluate runs no attack, and logs none; use "
                    "advreg.callbacks.RobustAccuracy, or monitor val_loss",
                )
        for node in strings:
            holder = self._holder(node) if node.raw_value == "lr" else None
            if self._dotted(holder)[-1:] in {("logs",), ("history",)}:
                self._place(
                    node, f"{node.value} of the logs", "Keras 3 logs learning_rate"
                )

    def _holder(self, key: Any) -> Any:
        """What is asked for a key, in `holder[key]` and in `holder.get(key)`."""
        parent = self.parents[key]
        asked = self.parents[parent]
        if isinstance(parent, self.cst.Index):
            return self.parents[asked].value
        if (
            isinstance(parent, self.cst.Arg)
            and isinstance(asked, self.cst.Call)
            and asked.args[0] is parent
            and isinstance(asked.func, self.cst.Attribute)
            and asked.func.attr.value == "get"
        ):
            return asked.func.value
        return None

    def _wrapped(self, calls: list[Any]) -> set[tuple[str, ...]]:
        """The variables that hold wrapped models and their bases."""
        names = set()
        for call in calls:
            path = self.meanings.get(call.func, ())
            if path[:1] != (_NSL,) or _collapsed(path[1:]) != _WRAPPER:
                continue
            base = _argument(call, "base_model", 0)
            if base is not None:
                names.add(self._dotted(base))
            statement = self.parents[call]
            if isinstance(statement, self.cst.Assign):
                names |= {self._dotted(target.target) for target in statement.targets}
        return names - {()}

    def _call(self, call: Any, wrapped: set[tuple[str, ...]]) -> None:
        path = self.meanings.get(call.func, ())
        method = (
            call.func.attr.value if isinstance(call.func, self.cst.Attribute) else ""
        )
        shown = f"`{self._text(call.func)}`"
        for argument in call.args:
            value = self._dotted(argument.value)
            key = argument.keyword.value if argument.keyword is not None else ""
            if key == "dynamic" and value == ("True",):
                self._place(
                    argument,
                    "`dynamic=True`",
                    "Keras 3 has no dynamic layers; compile with run_eagerly=True",
                )
            if (
                method == "perturb_on_batch"
                and key in _UNCONSTRAINED
                and value == ("None",)
            ):
                self._place(
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
            return  # What is shown may be but the end of the suffix.
        if not ending.endswith(endings):
            self._place(call, f"{shown} of a path that ends in {ending!r}", why)

    def _is_wrapped(self, node: Any, wrapped: set[tuple[str, ...]]) -> bool:
        name = self._dotted(node)
        return name in wrapped or name[-1:] == ("base_model",)

    def _assigned(self, node: Any) -> Any:
        """What a name is assigned, where that is done once; otherwise `None`."""
        referents = self.referents.get(node, [])
        if len(referents) != 1:
            return None
        statement = self.parents.get(getattr(referents[0], "node", None))
        if isinstance(statement, self.cst.AssignTarget):
            statement = self.parents[statement]
        if isinstance(statement, (self.cst.Assign, self.cst.AnnAssign)):
            return statement.value
        return None

    def _ending(self, node: Any, seen: tuple[Any, ...] = ()) -> str | None:
        """How a path ends, where the code shows it."""
        last: Any = None
        if isinstance(node, (self.cst.SimpleString, self.cst.ConcatenatedString)):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Of odd escapes.
                value = node.evaluated_value
            return value if isinstance(value, str) else None
        if isinstance(node, self.cst.FormattedString) and node.parts:
            last = node.parts[-1]
            if isinstance(last, self.cst.FormattedStringText):
                return last.value
            last = None if last.conversion or last.format_spec else last.expression
        elif isinstance(node, self.cst.BinaryOperation):
            joins = isinstance(node.operator, (self.cst.Add, self.cst.Divide))
            last = node.right if joins else None
        elif isinstance(node, self.cst.Call) and node.args:
            name = self._dotted(node.func)[-1:]
            if name in {("join",), ("joinpath",), ("Path",), ("str",)}:
                last = node.args[-1].value
        elif isinstance(node, self.cst.Name):
            last = self._assigned(node)
        if last is None or last in seen:
            return None
        return self._ending(last, (*seen, last))


def _argument(call: Any, name: str, index: int) -> Any:
    """An argument of a call, by keyword or by position."""
    for argument in call.args:
        if argument.keyword is not None and argument.keyword.value == name:
            return argument.value
    before = call.args[: index + 1]
    if len(before) > index and not any(a.star or a.keyword for a in before):
        return before[index].value
    return None


def _modern(path: tuple[str, ...]) -> str:
    """The name of a path in TensorFlow 2, where it is Keras's or one of `compat`."""
    if path[:1] == ("keras",):
        path = ("tensorflow", *path)
    if path[:2] == ("tensorflow", "compat"):
        path = ("tensorflow", *path[3:])
    return ".".join(path)


def _as(name: str, local: str) -> str:
    return name if name == local else f"{name} as {local}"


def _from_imports(moved: Iterable[tuple[tuple[str, ...], str]]) -> list[str]:
    """Writes imports of paths under names, those from one module together."""
    modules: dict[str, dict[str, None]] = {}
    for path, local in moved:
        names = modules.setdefault(".".join(path[:-1]), {})
        names[_as(path[-1], local)] = None
    return [f"from {module} import {', '.join(n)}" for module, n in modules.items()]
