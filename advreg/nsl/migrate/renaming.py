"""Renames what a module uses of NSL to names of `advreg.nsl`.

How it works: each import binds a name to a path of NSL, such as
`(NSL, "lib", "utils")`. libcst says for each use of a name which statements may have
bound it (its referents). So every expression `name.a.b` gets its full path, also
through assignments like `lib = nsl.lib`. Then:

- Imports are written anew for advreg (`_import`, `_import_from`).
- Paths through NSL's inner modules are shortened, because advreg has none
  (`collapsed`).
- Names that advreg does not have, and code that cannot be followed, become places for
  the user.
"""

from __future__ import annotations

import bisect
import importlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from advreg._extras import import_extra

NSL = "neural_structured_learning"
# The inner modules of NSL whose names each module of `advreg.nsl` has.
_INNER = {
    "configs": {"configs"},
    "keras": {"adversarial_regularization"},
    "lib": {"adversarial_neighbor", "distances", "regularizer", "utils"},
}
# Inner modules of which advreg has nothing, and the name whose absence is explained.
_LEFT_OUT = {
    "abstract_gen_neighbor": "GenNeighbor",
    "graph_regularization": "GraphRegularization",
}
MENTION = re.compile(r"neural[-_.]structured[-_.]learning", re.IGNORECASE)


def _missing(path: tuple[str, ...]) -> str | None:
    """Returns why advreg does not have a path of NSL, or `None` if it has."""
    path = collapsed(path)
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
    if why.endswith(f"{name!r}"):  # A private name of NSL, without a reason.
        return f"{why}: do without it, or write it yourself"
    # The name itself is shown in front of the reason.
    return why.removeprefix(f"module {module!r} has no attribute {name!r}: ")


def collapsed(path: tuple[str, ...]) -> tuple[str, ...]:
    """Returns a path without NSL's inner module, because advreg has no such modules."""
    if len(path) > 1 and path[1] in _INNER.get(path[0], ()):
        return (path[0], *path[2:])
    return path


Position = tuple[int, int]


class Module:
    r"""A module's syntax tree, the meanings of its names, and its changes.

    Args:
        code: The module, with `\n` at the ends of its lines.
        tops: Number of lines before each cell, if it is made of several.
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
        # First and last lines of statements that are removed with their lines.
        self.dropped: list[tuple[int, int]] = []
        self.places: list[tuple[int, str, str]] = []
        # The path to which a statement binds a name, by statement and name.
        self.bound: dict[tuple[Any, str], tuple[str, ...]] = {}
        self.uses_nsl = False
        # The path of an expression that is a name, or an attribute of one.
        self.meanings: dict[Any, tuple[str, ...]] = {}
        # The assignments and imports that may have bound a name that is read.
        self.referents: dict[Any, list[Any]] = {}
        # The imports that have been written, by the body and cell in which they are.
        self.written: dict[tuple[Any, int], set[str]] = {}

    def migrate(self) -> None:
        """Collects the changes, and the places for the user."""
        imports = [*self.of("Import"), *self.of("ImportFrom")]
        for node in imports:
            self._bind(node)
        self.uses_nsl = any(path[0] == NSL for path in self.bound.values())
        for node in imports:
            if isinstance(node, self.cst.Import):
                self._import(node)
            else:
                self.uses_nsl |= self._import_from(node)
        self._names()
        self._strings()

    def of(self, *kinds: str) -> list[Any]:
        """Returns the nodes of some kinds."""
        types = tuple(getattr(self.cst, kind) for kind in kinds)
        return [node for node in self.positions if isinstance(node, types)]

    def _span(self, node: Any) -> tuple[Position, Position]:
        span = self.positions[node]
        return (span.start.line, span.start.column), (span.end.line, span.end.column)

    def text(self, node: Any) -> str:
        """Returns the text of a node."""
        (first, left), (last, right) = self._span(node)
        lines = self.lines[first - 1 : last]
        lines[-1] = lines[-1][:right]
        lines[0] = lines[0][left:]
        return "\n".join(lines)

    def place(self, node: Any, what: str, why: str) -> None:
        """Adds a node to the places for the user."""
        self.places.append((self._span(node)[0][0], what, why))

    def dotted(self, node: Any) -> tuple[str, ...]:
        """Returns the names in `a.b.c`, and an empty tuple for any other node."""
        name = self.cst.helpers.get_full_name_for_node(node)
        return tuple(name.split(".")) if name else ()

    def aliases(self, node: Any) -> list[tuple[Any, tuple[str, ...], str | None]]:
        """Returns the nodes, paths, and names after `as` of an import."""
        if isinstance(node.names, self.cst.ImportStar):
            return []
        module: tuple[str, ...] = ()
        if isinstance(node, self.cst.ImportFrom):
            if node.relative:
                return []
            module = self.dotted(node.module)
        return [
            (alias, module + self.dotted(alias.name), alias.evaluated_alias)
            for alias in node.names
        ]

    def _bind(self, node: Any) -> None:
        for _, path, name in self.aliases(node):
            if isinstance(node, self.cst.ImportFrom):
                self.bound[node, name or path[-1]] = path
            elif name is None:  # `import a.b` binds a.
                self.bound[node, path[0]] = path[:1]
            else:
                self.bound[node, name] = path

    def _import(self, node: Any) -> None:
        kept: list[str] = []
        moved: list[tuple[tuple[str, ...], str]] = []
        for alias, path, name in self.aliases(node):
            if not self._moves(alias, path):
                kept.append(self.text(alias))
            elif name is None:
                moved.append((("advreg", "nsl"), NSL))
            else:
                moved.append((("advreg", "nsl", *collapsed(path[1:])), name))
        if moved:
            first = [f"import {', '.join(kept)}"] if kept else []
            self._put(node, [*first, *_from_imports(moved)])

    def _put(self, node: Any, statements: list[str]) -> None:
        """Replaces a statement by others, without those that were written before.

        `import neural_structured_learning` and an import of a module within it become
        the same import.
        """
        (first, left), (last, right) = self._span(node)
        line = self.parents[node]
        end = re.match(r"\s*(?=#|$)", self.lines[last - 1][right:])
        alone = isinstance(line, self.cst.SimpleStatementLine) and len(line.body) == 1
        if not alone or not end or self._is_rebound(NSL):
            self._split(node, statements)
            return
        cell = bisect.bisect_right(self.tops, first - 1)
        written = self.written.setdefault((self.parents[line], cell), set())
        new = [statement for statement in statements if statement not in written]
        written.update(new)
        if new:
            self._split(node, new)
        elif self.lines[last - 1][right + end.end() :]:  # A comment after it is kept.
            self.changes.append(((first, left), (last, right + end.end()), ""))
        else:
            self.dropped.append((first, last))

    def _is_rebound(self, name: str) -> bool:
        """Returns whether a name is bound by anything but imports."""
        imports = (self.cst.Import, self.cst.ImportFrom)
        return any(
            not isinstance(getattr(assignment, "node", None), imports)
            for scope in self.scopes
            if scope
            for assignment in scope[name]
            if assignment.scope is scope
        )

    def _import_from(self, node: Any) -> bool:
        """Changes `from ... import ...`, and returns whether it is from NSL."""
        if node.relative or self.dotted(node.module)[0] != NSL:
            return False
        if isinstance(node.names, self.cst.ImportStar):
            self.place(
                node,
                f"`{self.text(node)}`",
                "it does not say which names it brings; import those by name, and "
                "migrate again",
            )
            return True
        kept: list[str] = []
        moved: list[tuple[tuple[str, ...], str]] = []
        for alias, path, name in self.aliases(node):
            if self._moves(alias, path):
                new = ("advreg", "nsl", *collapsed(path[1:]))
                moved.append((new, name or path[-1]))
            else:
                kept.append(self.text(alias))
        modules = {".".join(new[:-1]) for new, _ in moved}
        if len(modules) == 1 and not kept:  # Only names change, not the layout.
            self._change(node.module, modules.pop())
            for alias, (new, name) in zip(node.names, moved, strict=True):
                if new[-1] == self.dotted(alias.name)[0]:
                    continue
                if alias.asname is None or new[-1] == name:
                    self._change(alias, _as(new[-1], name))
                else:
                    self._change(alias.name, new[-1])
        elif moved:
            module = self.text(node.module)
            first = [f"from {module} import {', '.join(kept)}"] if kept else []
            self._split(node, [*first, *_from_imports(moved)])
        return True

    def _moves(self, alias: Any, path: tuple[str, ...]) -> bool:
        """Returns whether advreg has an imported name. If not, it becomes a place."""
        if path[0] != NSL:
            return False
        why = _missing(path[1:])
        if why is not None:
            self.place(alias, f"import of `{'.'.join(path)}`", why)
        return why is None

    def _change(self, node: Any, new: str) -> None:
        self.changes.append((*self._span(node), new))

    def _split(self, node: Any, statements: list[str]) -> None:
        """Replaces a statement by several."""
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
            for comment in self.of("Comment")
            if (first, left) <= self._span(comment)[0] < self._span(node)[1]
        ]
        if comments and not alone:
            self.place(
                node,
                "import of several names",
                "only some of them are in advreg, and there are comments between; put "
                "it on a line of its own, and migrate again",
            )
            return
        new = (f"\n{indent}" if alone else "; ").join([*comments, *statements])
        self._change(node, new)

    def _names(self) -> None:
        """Finds the paths of names, and shortens those through inner modules."""
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
            if path[:1] == (NSL,):
                self._use(root, chain, path, referents)

    def _uses(self) -> Iterator[tuple[Any, list[Any], list[Any]]]:
        """Yields the names that are read, their attributes, and their referents."""
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
        base = min(bases, key=lambda path: (path[0] != NSL, path))
        return base + tuple(node.attr.value for node in chain)

    def _use(
        self, root: Any, chain: list[Any], path: tuple[str, ...], referents: list[Any]
    ) -> None:
        """Shortens one use of a name from NSL, or adds it to the places."""
        given = len(path) - len(chain)  # Length of the path of the name itself.
        written = [root.value, *(node.attr.value for node in chain)]
        why = _missing(path[1:])
        short = collapsed(path[1:])
        if why is not None:
            self.place(root, f"`{'.'.join(written)}`", why)
            return
        if len(short) != len(path) - 1 and given < 3:
            others = [r for r in referents if not self._is_known(r, root.value)]
            inner = chain[2 - given]
            if others:
                self.place(
                    root,
                    f"`{'.'.join(written[: 4 - given])}`",
                    f"`{root.value}` is bound to something else as well; if it is NSL "
                    f"here, leave out `.{inner.attr.value}`",
                )
            else:
                start = self._span(inner.dot)[0]
                self.changes.append((start, self._span(inner.attr)[1], ""))
        is_module = len(short) < 2 and _INNER.keys() >= set(short)
        if is_module and self._is_handed_on(chain[-1] if chain else root):
            self.place(
                root,
                f"`{'.'.join(written)}`",
                "the module itself is handed on; see that what is taken of it there is "
                "in advreg.nsl",
            )

    def _is_known(self, referent: Any, name: str) -> bool:
        """Returns whether a binding is an import of NSL, or `name = None` beside it."""
        node = getattr(referent, "node", None)
        if (node, name) in self.bound:
            path = self.bound[node, name]
            return path[0] == NSL or path[:2] == ("advreg", "nsl")
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
            shown = isinstance(call, self.cst.Call) and self.dotted(call.func)
            return shown not in {("print",), ("help",), ("dir",), ("type",)}
        return isinstance(parent, self.cst.Assign) and any(
            not isinstance(target.target, self.cst.Name) for target in parent.targets
        )

    def _strings(self) -> None:
        for node in self.of("SimpleString", "FormattedStringText"):
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
            if imports or self.dotted(call.func) == ("__import__",):
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


def _as(name: str, local: str) -> str:
    return name if name == local else f"{name} as {local}"


def _from_imports(moved: Iterable[tuple[tuple[str, ...], str]]) -> list[str]:
    """Writes imports of paths under local names, one for each module."""
    modules: dict[str, dict[str, None]] = {}
    for path, local in moved:
        names = modules.setdefault(".".join(path[:-1]), {})
        names[_as(path[-1], local)] = None
    return [f"from {module} import {', '.join(n)}" for module, n in modules.items()]
