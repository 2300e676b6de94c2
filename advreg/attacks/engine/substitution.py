"""Finds tokens to replace: which may be, by which others, and in which order.

`BoundSubstitution` is what a report runs (see `attacks.substitution`). It finds out
with a first batch which input holds the tokens, and where they are embedded: it runs
the model once, and compares what goes into each `Embedding` with the inputs. Then, for
each change of each batch, three steps:

1. `_gradients`: a compiled pass gives the gradient of the margin at the embedding.
2. `_changes`: NumPy ranks all allowed changes by it.
3. `_judge`: a compiled pass for each of the best, on the model itself. Every third is
   one that did most harm in other examples (see `token_changes`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops, tree

from advreg import backend
from advreg._types import Features, Tensor
from advreg.attacks.engine.losses import margin
from advreg.attacks.engine.rows import Batch, Result, gather_rows, num_rows, only
from advreg.attacks.engine.runner import Pipeline
from advreg.attacks.engine.solver import Solver
from advreg.attacks.engine.target import TargetModel
from advreg.attacks.engine.token_changes import Changes, Gains
from advreg.checks import brief, describe, describe_value
from advreg.config.norms import NormType
from advreg.network.layer_outputs import LayerOutputs, find_layers
from advreg.network.precision import Precision
from advreg.network.taps import intercepted
from advreg.perturbation.packing import name_of

_NAMES = ("features", "classes")
# Number of examples that are attacked side by side, and learn from each other.
_TOGETHER = 256


class _Lookup(NamedTuple):
    """One call of an `Embedding` on the tokens.

    Args:
        path: Path of the layer.
        call: Number of the call, because a layer may be called several times.
        layer: The layer.
    """

    path: str
    call: int
    layer: keras.layers.Embedding


def check_candidates(value: Any) -> None:
    """Checks the argument `candidates` of attacks that replace tokens.

    Raises:
        TypeError: It has the wrong type.
        ValueError: It is a number below 1, or an array of another rank than 2.
    """
    if isinstance(value, bool) or not (
        isinstance(value, (int, np.integer, Mapping, np.ndarray)) or callable(value)
    ):
        raise TypeError(
            "`candidates` must be a number of neighbours, a dictionary from tokens to "
            "lists of tokens, a function of a token, or an integer array. Received: "
            f"{describe_value(value)}"
        )
    if isinstance(value, (int, np.integer)) and value < 1:
        raise ValueError(f"`candidates` must be at least 1. Received: {value}")
    if isinstance(value, np.ndarray) and (
        value.ndim != 2 or not np.issubdtype(value.dtype, np.integer)
    ):
        raise ValueError(
            "`candidates` must be an integer array [tokens, candidates]. Received: "
            f"{describe_value(value)}"
        )


class BoundSubstitution:
    """An attack on tokens bound to a classifier, as reports run it.

    Args:
        attack: The attack, see `attacks.substitution` for its hyperparameters.
        model: The model to attack.
        from_logits: Whether its outputs are logits, `None` if that is to be found out.
        batch_size: Number of examples that go through the model at once.
    """

    def __init__(
        self,
        attack: Any,
        model: keras.Model,
        from_logits: bool | None,
        batch_size: int,
    ) -> None:
        self._attack = attack
        self.target = TargetModel(model, from_logits)
        self._batch_size = min(batch_size, self.target.fixed_batch or batch_size)
        self._random = np.random.default_rng(attack.seed)
        self._place: int | None = None  # Of the tokens among the features' leaves.
        self._lookups: list[_Lookup] = []
        self._candidates: dict[int, list[int]] = {}
        self._neighbours: _Neighbours | None = None
        self._gains = Gains()

    @property
    def problem(self) -> BoundSubstitution:
        """The problem that it solves: this object, which has what reports ask for."""
        return self

    def range(self, features: Features) -> tuple[np.ndarray, np.ndarray]:
        """Returns empty ends of the clip range, because tokens have none."""
        return np.zeros(0), np.zeros(0)

    def check(self, features: Features) -> None:
        """Finds the tokens in a first batch.

        Raises:
            ValueError: No input holds tokens, or several do and none is named.
        """
        if self._place is None:
            self.target.output_form(features)
            self._find(tree.map_structure(lambda leaf: leaf[:8], features))

    def place(self, features: Features) -> int:
        """Returns which leaf of the features holds the tokens."""
        self.check(features)
        assert self._place is not None
        return self._place

    def select(self, batch: Batch) -> Batch:
        """Returns a batch without its labels, because classes suffice."""
        return {name: batch[name] for name in batch if name != "labels"}

    def pipeline(self, done: Callable[[Batch, Result], None]) -> Pipeline:
        """Makes the `Pipeline` that runs the attack. See `BoundAttack`.

        Args:
            done: Function that is called with finished rows.
        """
        self._random = np.random.default_rng(self._attack.seed)
        self._gains = Gains()
        solvers = [Solver(index, "") for index in range(self._attack.runs)]
        together = max(_TOGETHER, self._batch_size)
        return Pipeline(self._run, solvers, together, not self.target.random, done)

    def lengths(self, batch: Batch, result: Result) -> dict[NormType, np.ndarray]:
        """Returns infinite lengths: replaced tokens lie in no ball."""
        return {norm: np.full(len(result.fooled), np.inf) for norm in NormType}

    def in_range(self, batch: Batch, result: Result) -> np.ndarray:
        """Returns which rows keep to the rules: all of them."""
        return np.ones(len(result.fooled), bool)

    def correct_draws(
        self, batch: Batch, displacement: np.ndarray, draws: int
    ) -> np.ndarray:
        """Counts the draws in which perturbed examples are classified correctly.

        Args:
            batch: `features` and `classes`.
            displacement: Differences of tokens, `[batch, length]`.
            draws: Number of times that the model is called.
        """
        tokens = self._tokens(batch)
        tokens = tokens + displacement.reshape(tokens.shape).astype("int64")
        moved = self._with_tokens(only(batch, _NAMES), tokens)

        def once(batch: Batch) -> Tensor:
            outputs = self.target.outputs(batch["features"])
            predicted = self.target.known_form.predicted(outputs)
            return ops.equal(predicted, batch["classes"])

        compiled = self.target.compile(
            "substitution: correct", once, moved, features=moved["features"]
        )
        counts = [ops.convert_to_numpy(compiled(moved)) for _ in range(draws)]
        return np.sum(counts, axis=0)

    def replaced(
        self, given: Features, features: Features, displacement: np.ndarray
    ) -> Features:
        """Returns features with replaced tokens, as NumPy arrays.

        Args:
            given: The features as the user passed them.
            features: The same as tensors.
            displacement: Differences of tokens, `[n, length]`.
        """
        tokens = self._tokens({"features": features})
        tokens = tokens + displacement.reshape(tokens.shape)
        leaves, place = tree.flatten(given), self.place(features)
        dtype = tree.flatten(features)[place].dtype
        leaves[place] = tokens.astype(keras.backend.standardize_dtype(dtype))
        return tree.pack_sequence_as(given, leaves)

    # The search

    def _run(self, solver: Solver, batch: Batch) -> Result:
        """Replaces tokens of a batch, one after another.

        Args:
            solver: Its `steps` is the number of the run.
            batch: `features` and `classes`.
        """
        count = num_rows(batch)
        first = self._tokens(batch).reshape(count, -1)
        allowed = self._may_change(first)
        rows = np.arange(count)
        best = first.copy()
        closeness, fooled, not_finite = self._in_batches(self._judge, batch, best)
        for _ in range(self._attack.max_changes):
            if not self.target.random:
                rows = np.flatnonzero(~fooled)
            if not len(rows):
                break
            part = gather_rows(batch, rows)
            now = best[rows]
            changes = self._changes(
                part, now, allowed[rows] & (now == first[rows]), solver.steps
            )
            found = np.full(len(rows), -np.inf)
            chosen = now.copy()
            ended = np.zeros(len(rows), bool)
            undefined = np.zeros(len(rows), bool)
            for turn in range(self._attack.calls):
                tried = np.flatnonzero(~ended | self.target.random)
                known = self._gains if turn % 3 == 2 else None
                tried, place, token = changes.next(tried, known)
                if not len(tried):
                    break
                moved = now[tried].copy()
                old = moved[np.arange(len(tried)), place]
                moved[np.arange(len(tried)), place] = token
                near, out, nans = self._in_batches(
                    self._judge, gather_rows(part, tried), moved
                )
                self._gains.add(old, token, near - closeness[rows[tried]])
                better = near > found[tried]
                kept = tried[better]
                found[kept], chosen[kept] = near[better], moved[better]
                ended[kept], undefined[kept] = out[better], nans[better]
            # Where no change helps, a further one may, on top of the least harmful.
            seen = np.isfinite(found) | ended
            best[rows[seen]] = chosen[seen]
            closeness[rows[seen]] = found[seen]
            fooled[rows[seen]] = ended[seen]
            not_finite[rows[seen]] = undefined[seen]
        return Result(fooled, best - first, closeness, not_finite)

    def _changes(
        self, batch: Batch, tokens: np.ndarray, allowed: np.ndarray, run: int
    ) -> Changes:
        """Returns the changes to try.

        Args:
            batch: `features` and `classes`.
            tokens: The tokens now, `[batch, length]`.
            allowed: Which of them may be replaced.
            run: Number of the run. All but the first add noise.
        """
        candidates = self._of_tokens(tokens)  # [batch, length, candidates]
        possible = (candidates >= 0) & allowed[:, :, None]
        possible &= candidates != tokens[:, :, None]
        if not self._attack.uses_gradient:  # One place by chance, then one candidate.
            of_places = self._random.random(tokens.shape)
            of_places = np.where(possible.any(2), of_places, -np.inf)
            possible &= (of_places == of_places.max(1, keepdims=True))[:, :, None]
        scores = self._random.random(candidates.shape)
        if self._attack.uses_gradient and self._lookups:
            (guided,) = self._in_batches(self._scores, batch, tokens, candidates)
            if run:
                spread = guided[possible].std() if possible.any() else 0.0
                guided = guided + spread * self._random.gumbel(size=guided.shape)
            scores = guided
        return Changes(tokens, candidates, possible, scores)

    def _scores(
        self, batch: Batch, tokens: np.ndarray, candidates: np.ndarray
    ) -> tuple[np.ndarray]:
        """Approximates how much each change raises the margin, by the gradient."""
        total = np.zeros(candidates.shape)
        gradients = self._gradients(batch, tokens)
        for each, gradient in zip(self._lookups, gradients, strict=True):
            table = _table(each.layer)
            slopes = gradient.reshape(*tokens.shape, -1).astype("float64")
            slopes = np.where(np.isfinite(slopes), slopes, 0.0)
            now = np.einsum("btd,btd->bt", slopes, table[tokens])
            of_candidates = table[np.maximum(candidates, 0)]
            total += np.einsum("btd,btcd->btc", slopes, of_candidates) - now[..., None]
        return (total,)

    def _in_batches(
        self, function: Callable[..., tuple[np.ndarray, ...]], *arguments: Any
    ) -> list[np.ndarray]:
        """Calls a function of rows on as many as go through the model at once.

        Args:
            function: Function of a batch and arrays of as many rows, that returns
                arrays of as many rows.
            *arguments: The batch and the arrays.
        """
        parts = []
        for start in range(0, num_rows(arguments[0]), self._batch_size):
            part = slice(start, start + self._batch_size)
            parts.append(
                function(
                    *tree.map_structure(lambda rows, part=part: rows[part], arguments)
                )
            )
        return [np.concatenate(each) for each in zip(*parts, strict=True)]

    def _gradients(self, batch: Batch, tokens: np.ndarray) -> list[np.ndarray]:
        """Returns the gradient of the margin at each lookup of the tokens."""
        outputs = LayerOutputs({each.path: each.layer for each in self._lookups})
        target = self.target

        def gradients(batch: Batch) -> tuple[Tensor, ...]:
            # Only shapes of this pass are computed, where it is compiled.
            with backend.StatelessScope(), outputs.recorded() as recorded:
                target.outputs(batch["features"])
            zeros = recorded.zeros()
            precision = Precision(target.base)

            def raised(leaves: list[Tensor]) -> tuple[Tensor, None]:
                given = tree.pack_sequence_as(zeros, leaves)
                with outputs.displaced(given):
                    found = target.outputs(batch["features"])
                logits = target.known_form.logits(found)
                return ops.sum(margin(logits, batch["classes"], False)), None

            def evaluate() -> tuple[Tensor, ...]:
                _, _, found = backend.differentiate(
                    raised, tree.flatten(zeros), precision.scale, zeros=True
                )
                of_paths = tree.pack_sequence_as(zeros, list(found))
                return tuple(
                    backend.dense(of_paths[each.path][each.call])
                    for each in self._lookups
                )

            return target.mean(evaluate)

        moved = self._with_tokens(only(batch, _NAMES), tokens)
        key = ("substitution: gradient", tuple(each[:2] for each in self._lookups))
        compiled = target.compile(key, gradients, moved, features=moved["features"])
        target.evaluations += len(tokens) * target.draws
        # A network of a fixed batch size has more rows.
        return [ops.convert_to_numpy(each)[: len(tokens)] for each in compiled(moved)]

    def _judge(
        self, batch: Batch, tokens: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns margins, which rows are fooled, and which outputs are not finite."""
        target = self.target

        def judge(batch: Batch) -> tuple[Tensor, ...]:
            def evaluate() -> tuple[Tensor, ...]:
                outputs = target.outputs(batch["features"])
                predicted = target.known_form.predicted(outputs)
                fooled = ops.logical_not(ops.equal(predicted, batch["classes"]))
                not_finite = ops.less(predicted, 0)
                logits = target.known_form.logits(outputs)
                found = margin(logits, batch["classes"], False)
                worst = ops.convert_to_tensor(np.inf, found.dtype)
                return ops.where(not_finite, worst, found), fooled, not_finite

            return target.mean(evaluate)

        moved = self._with_tokens(only(batch, _NAMES), tokens)
        compiled = target.compile(
            "substitution: judge", judge, moved, features=moved["features"]
        )
        target.evaluations += len(tokens) * target.draws
        near, fooled, not_finite = (
            np.array(ops.convert_to_numpy(each)) for each in compiled(moved)
        )
        return near.astype("float64"), fooled, not_finite

    # Tokens and candidates

    def _tokens(self, batch: Batch) -> np.ndarray:
        """Returns the tokens of a batch, int64 in the shape of their input."""
        leaf = tree.flatten(batch["features"])[self.place(batch["features"])]
        return np.asarray(ops.convert_to_numpy(leaf)).astype("int64")

    def _with_tokens(self, batch: Batch, tokens: np.ndarray) -> Batch:
        """Returns a batch with other tokens."""
        leaves, place = tree.flatten(batch["features"]), self.place(batch["features"])
        old = leaves[place]
        dtype = keras.backend.standardize_dtype(old.dtype)
        shape = (len(tokens), *tuple(old.shape)[1:])
        made = np.asarray(tokens).reshape(shape).astype(dtype)
        leaves[place] = ops.convert_to_tensor(made)
        return {**batch, "features": tree.pack_sequence_as(batch["features"], leaves)}

    def _may_change(self, tokens: np.ndarray) -> np.ndarray:
        """Returns which tokens may be replaced, `[batch, length]`."""
        allowed = ~np.isin(tokens, self._attack.fixed_tokens)
        for each in self._lookups:
            if each.layer.mask_zero:
                allowed &= tokens != 0
        if self._attack.can_change is not None:
            given = np.asarray(self._attack.can_change(tokens))
            if given.shape != tokens.shape or given.dtype != bool:
                raise ValueError(
                    "`can_change` must return booleans of the shape of the tokens, "
                    f"{tokens.shape}. Received: {describe_value(given)}"
                )
            allowed &= given
        return allowed

    def _of_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the candidates of each token, padded by -1."""
        unique, where = np.unique(tokens, return_inverse=True)
        unknown = [token for token in unique.tolist() if token not in self._candidates]
        if unknown:
            self._candidates.update(self._look_up(unknown))
        lists = [self._candidates[token] for token in unique.tolist()]
        width = max(1, *map(len, lists))
        table = np.full((len(lists), width), -1)
        for row, found in zip(table, lists, strict=True):
            row[: len(found)] = found
        return table[where.reshape(tokens.shape)]

    def _look_up(self, tokens: list[int]) -> dict[int, list[int]]:
        """Finds the candidates of tokens, without fixed ones."""
        given = self._attack.candidates
        if isinstance(given, (int, np.integer)):
            found = self._nearest(tokens, int(given))
        elif isinstance(given, Mapping):
            found = {token: list(given.get(token, ())) for token in tokens}
        elif isinstance(given, np.ndarray):
            found = {
                token: given[token].tolist() if 0 <= token < len(given) else []
                for token in tokens
            }
        else:
            found = {token: list(given(token)) for token in tokens}
        fixed = {*self._attack.fixed_tokens, -1}
        size = min((each.layer.input_dim for each in self._lookups), default=None)
        for token, others in found.items():
            if size is not None and any(not -1 <= other < size for other in others):
                raise ValueError(
                    f"`candidates` must be tokens of the model, from 0 to {size - 1}. "
                    f"Received for token {token}: {brief(others)}"
                )
        return {
            token: [int(o) for o in others if o not in fixed and o != token]
            for token, others in found.items()
        }

    def _nearest(self, tokens: list[int], number: int) -> dict[int, list[int]]:
        if not self._lookups:
            raise ValueError(
                "`candidates` must be given as a dictionary or a function: the model "
                "has no `Embedding` of this input whose neighbours could be taken. "
                f"Received: candidates={number}"
            )
        if self._neighbours is None:
            fixed = {*self._attack.fixed_tokens}
            if self._lookups[0].layer.mask_zero:
                fixed.add(0)
            self._neighbours = _Neighbours(_table(self._lookups[0].layer), fixed)
        return self._neighbours.of(tokens, number)

    def _find(self, features: Features) -> None:
        """Finds out which input holds the tokens, and where they are embedded."""
        leaves = tree.flatten_with_path(features)
        integers = [
            place
            for place, (_, leaf) in enumerate(leaves)
            if keras.backend.is_int_dtype(backend.dtype_name(leaf))
            and len(leaf.shape) in (1, 2)
        ]
        calls = self._embedding_calls(features)
        embedded = {
            place: [
                each
                for each, ids in calls
                if _same_tokens(ids, ops.convert_to_numpy(leaves[place][1]))
            ]
            for place in integers
        }
        names = {place: name_of(leaves[place][0]) for place in integers}
        if self._attack.feature is not None:
            named = [p for p in integers if _is_named(self._attack.feature, leaves[p])]
        else:
            named = [place for place in integers if embedded[place]]
            if not named and len(integers) == 1:
                named = integers
        if len(named) != 1:
            rule = "must name" if self._attack.feature is not None else "is needed for"
            raise ValueError(
                f"`feature` {rule} the one input that holds the tokens: integers of "
                f"shape [batch] or [batch, length]. These are: "
                f"{', '.join(map(repr, names.values())) or 'none'}. Received: "
                f"feature={self._attack.feature!r} and x={describe(features)}"
            )
        self._place = named[0]
        self._lookups = embedded[self._place]

    def _embedding_calls(self, features: Features) -> list[tuple[_Lookup, np.ndarray]]:
        """Runs the model, and returns the calls of embeddings with their tokens."""
        try:
            layers = find_layers(self.target.base, ["embeddings"])
        except ValueError:
            return []
        found: list[tuple[_Lookup, np.ndarray]] = []
        counts = dict.fromkeys(layers, 0)

        def handler(path: str) -> Callable[..., Any]:
            def call(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                if not kwargs.get("reverse"):
                    ids = ops.convert_to_numpy(args[0])
                    number, counts[path] = counts[path], counts[path] + 1
                    found.append((_Lookup(path, number, layers[path]), ids))
                return method(*args, **kwargs)

            return call

        with contextlib.ExitStack() as stack:
            for path, layer in layers.items():
                quantized = getattr(layer, "quantization_mode", None) is not None
                name = "quantized_call" if quantized else "call"
                stack.enter_context(intercepted(layer, name, handler(path)))
            self.target.outputs(features)
        return found


class _Neighbours:
    """Nearest neighbours by cosine among the rows of a table.

    Args:
        table: The rows, `[tokens, values]`.
        fixed: Rows that are no neighbour of any other.
    """

    def __init__(self, table: np.ndarray, fixed: set[int]) -> None:
        lengths = np.linalg.norm(table, axis=1, keepdims=True)
        self._rows = table / np.maximum(lengths, np.finfo("float64").tiny)
        self._fixed = sorted(each for each in fixed if 0 <= each < len(table))

    def of(self, tokens: list[int], number: int) -> dict[int, list[int]]:
        """Returns the neighbours of each token, the nearest first."""
        found: dict[int, list[int]] = {}
        number = min(number, len(self._rows) - 1 - len(self._fixed))
        for start in range(0, len(tokens), 256):
            part = np.array(tokens[start : start + 256])
            near = self._rows[part] @ self._rows.T
            near[np.arange(len(part)), part] = -np.inf
            near[:, self._fixed] = -np.inf
            if number < 1:
                found.update({int(token): [] for token in part})
                continue
            top = np.argpartition(-near, number - 1, axis=1)[:, :number]
            order = np.argsort(-np.take_along_axis(near, top, axis=1), axis=1)
            top = np.take_along_axis(top, order, axis=1)
            found.update(zip(part.tolist(), top.tolist(), strict=True))
        return found


def _table(layer: keras.layers.Embedding) -> np.ndarray:
    """Returns the rows of an embedding, in float64."""
    tokens = ops.arange(layer.input_dim)
    return ops.convert_to_numpy(ops.cast(layer(tokens), "float32")).astype("float64")


def _same_tokens(ids: np.ndarray, leaf: np.ndarray) -> bool:
    """Returns whether an embedding was called on an input, up to a last axis of 1."""
    count = len(leaf)
    if ids.ndim == 0 or len(ids) < count:
        return False
    return np.array_equal(
        ids[:count].reshape(count, -1), np.asarray(leaf).reshape(count, -1)
    )


def _is_named(feature: Any, leaf: tuple[Any, Any]) -> bool:
    path, _ = leaf
    keys = feature if isinstance(feature, tuple) else (feature,)
    return tuple(path) == keys or name_of(path) == feature
