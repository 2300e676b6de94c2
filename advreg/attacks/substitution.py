"""Attacks on tokens and categories: some of them are replaced by others.

An attacker who changes words does not move in a ball. `TokenSubstitution` replaces up
to `max_changes` tokens of an example, each by one of its `candidates`. It is greedy:
one change after the other, each the best of those that it tries. Which to try, it
learns from the gradient at the embedding
([Ebrahimi et al., 2018](https://arxiv.org/abs/1712.06751), HotFlip):

    loss(token v at place t) - loss(now)  ≈  (E[v] - E[token at t]) · gradient[t]

One forward and backward pass ranks all changes of all places so. This is a linear
approximation over a large distance. So the model itself is called on the first
`verified` of them, and judges which is best, and whether it fools. Every third call
tries what raised the margin most in other examples, because the approximation can miss
it in all of them alike.

`RandomSubstitution` chooses by chance, and is the baseline. In a report both count in
`overall`, but in no ball. Shared parts are in `engine.substitution`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar

import keras
import numpy as np
from keras import tree

from advreg.attacks.arguments import check_runs_eagerly, check_seed
from advreg.attacks.engine.rows import Batch, Result, num_rows
from advreg.attacks.engine.substitution import (
    BoundSubstitution,
    check_candidates,
)
from advreg.checks import check_bool, check_count, describe_value


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Substitution:
    """Base class of attacks that replace tokens: hyperparameters, and how it is called.

    See `TokenSubstitution` for the fields.
    """

    max_changes: int = 1
    candidates: Any = 10
    _: dataclasses.KW_ONLY
    fixed_tokens: Sequence[int] = (0,)
    can_change: Callable[[np.ndarray], Any] | None = None
    feature: Hashable | None = None
    from_logits: bool | None = None
    seed: int | None = None

    uses_gradient: ClassVar[bool] = False
    # What reports ask of attacks.
    is_native: ClassVar[bool] = False
    has_radius: ClassVar[bool] = False
    is_bounded: ClassVar[bool] = True
    targeted: ClassVar[bool] = False
    epsilon: ClassVar[None] = None
    norm: ClassVar[None] = None
    loss: ClassVar[None] = None
    feature_mask: ClassVar[None] = None
    clip_value_min: ClassVar[None] = None
    clip_value_max: ClassVar[None] = None
    iterations_per_start: ClassVar[int] = 1

    def __post_init__(self) -> None:
        self._set("max_changes", check_count("max_changes", self.max_changes))
        check_candidates(self.candidates)
        self._set("fixed_tokens", _check_tokens(self.fixed_tokens))
        if self.can_change is not None and not callable(self.can_change):
            raise TypeError(
                "`can_change` must be a function of an array of tokens, or `None`. "
                f"Received: {describe_value(self.can_change)}"
            )
        if self.from_logits is not None:
            self._set("from_logits", check_bool("from_logits", self.from_logits))
        if self.seed is not None:
            check_seed(self.seed)

    @property
    def runs(self) -> int:
        """Number of runs, each on the examples that those before have not fooled."""
        raise NotImplementedError

    @property
    def calls(self) -> int:
        """Number of changes that the model is called on, for each token replaced."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Name in reports, with the number of changes."""
        return f"{type(self).__name__}({self.max_changes})"

    def bind(
        self, model: keras.Model, from_logits: bool | None, batch_size: int
    ) -> BoundSubstitution:
        """Binds the attack to a classifier, for a report.

        Args:
            model: The model to attack.
            from_logits: Used where the attack's own `from_logits` is `None`.
            batch_size: Number of examples that go through the model at once.
        """
        if self.from_logits is not None:
            from_logits = self.from_logits
        return BoundSubstitution(self, model, from_logits, batch_size)

    def __call__(
        self, model: keras.Model, x: Any, y: Any = None, *, batch_size: int = 32
    ) -> Any:
        """Returns examples with replaced tokens.

        An example that is fooled is returned as it was then. Any other has the changes
        that came closest.

        Args:
            model: A Keras 3 model, wrapped or not. It runs in inference mode, and
                nothing of it changes.
            x: Features: an array of token ids, `[n]` or `[n, length]`, or a structure
                of arrays that holds one. For a wrapped model labels may be in it if it
                is a dictionary.
            y: The true classes. See `Attack.__call__`.
            batch_size: Number of examples that go through the model at once.

        Returns:
            The features as NumPy arrays, in the structure and dtypes of `x`, without
            labels. Other features than the tokens are the same objects.

        Raises:
            RuntimeError: It is called inside a `tf.function`.
            TypeError: `model` is not a Keras 3 model, or `x` or `y` are no arrays.
            ValueError: The model gives no class scores, labels do not fit it, or no
                input holds tokens.
        """
        check_runs_eagerly(f"`{type(self).__name__}`")
        check_count("batch_size", batch_size)
        bound = self.bind(model, None, batch_size)
        target = bound.target
        features, y = target.unpack((x, y))
        given = target.given(x, features)
        target.settle(features)
        bound.check(features)
        classes = target.classes(y, target.output_form(features))
        found: list[tuple[np.ndarray, np.ndarray]] = []

        def done(batch: Batch, result: Result) -> None:
            found.append((batch["index"], result.displacement))

        batch = {"features": features, "classes": classes}
        batch["index"] = np.arange(num_rows(features))
        pipeline = bound.pipeline(done)
        for start in range(0, num_rows(features), batch_size):
            part = slice(start, start + batch_size)
            pipeline.feed(tree.map_structure(lambda leaf, part=part: leaf[part], batch))
        pipeline.flush()
        order = np.argsort(np.concatenate([index for index, _ in found]))
        displacement = np.concatenate([rows for _, rows in found])[order]
        return bound.replaced(given, features, displacement)

    def __repr__(self) -> str:
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if field.name == "max_changes"
            or repr(getattr(self, field.name)) != repr(field.default)
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class RandomSubstitution(Substitution):
    """Replaces tokens, chosen at random, by random candidates: a baseline.

    An attack that fools no more examples than this one found nothing.

    Args:
        max_changes: Number of tokens to replace in each example; fewer, where an
            example has fewer that may be replaced.
        candidates: What a token may be replaced by. See `TokenSubstitution`, as for all
            that follow but `tries`.
        fixed_tokens: Tokens that are neither replaced nor put in.
        can_change: Function that says which places may change.
        feature: The input that holds the tokens.
        from_logits: Whether the outputs of the model are logits.
        seed: Seed of random numbers.
        tries: Number of random examples. Each is tried only where those before have
            not fooled.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has a value that its rule forbids.

    Example:
    >>> report = advreg.evaluate_robustness(
    ...     model, ids, y, attacks=[RandomSubstitution(1), TokenSubstitution(1)])
    """

    _: dataclasses.KW_ONLY
    tries: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("tries", check_count("tries", self.tries))

    @property
    def runs(self) -> int:
        """Number of runs, each on the examples that those before have not fooled."""
        return self.tries

    @property
    def calls(self) -> int:
        """Number of changes that the model is called on, for each token replaced."""
        return 1


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TokenSubstitution(Substitution):
    """Replaces up to k tokens of an example, guided by the gradient at the embedding.

    The changes are those that the gradient at the embedding ranks highest
    ([Ebrahimi et al., 2018](https://arxiv.org/abs/1712.06751)), verified by calls of
    the model, one token after the other. Where the model has no gradient with respect
    to embedded tokens, they are tried in random order.

    Args:
        max_changes: Largest number of tokens to replace in each example.
        candidates: What a token may be replaced by: the number of its nearest
            neighbours by cosine in the model's own embedding; a dictionary from tokens
            to lists of tokens; a function of a token that returns a list; or an integer
            array `[tokens, candidates]`, padded by -1. Tokens without candidates stay.
        fixed_tokens: Tokens that are neither replaced nor put in: padding, and special
            tokens. The default is the padding of `TextVectorization`; pass `()` for
            categories that count from 0.
        can_change: Function of an integer array `[n, length]` of tokens that returns
            booleans of that shape: where a token may be replaced. `None` for
            everywhere. Positions that the embedding masks never change.
        feature: Key of the input that holds the tokens, in a dictionary or list of
            inputs. `None` if only one input goes into an `Embedding`.
        from_logits: Whether the outputs of the model are logits. See `FGSM`.
        seed: Seed of random numbers, `None` for other ones in each run.
        verified: Number of changes that the model is called on for each token that is
            replaced. Every third is the one that raised the margin most in the other
            examples of this call or report, if there is one.
        restarts: Number of runs. All but the first rank changes with some random noise.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has a value that its rule forbids.

    Example:
    >>> attack = TokenSubstitution(max_changes=3, candidates=10)
    >>> ids_adv = attack(model, ids, y)
    """

    _: dataclasses.KW_ONLY
    verified: int = 10
    restarts: int = 1

    uses_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("verified", check_count("verified", self.verified))
        self._set("restarts", check_count("restarts", self.restarts))

    @property
    def runs(self) -> int:
        """Number of runs, each on the examples that those before have not fooled."""
        return self.restarts

    @property
    def calls(self) -> int:
        """Number of changes that the model is called on, for each token replaced."""
        return self.verified


def _check_tokens(value: Any) -> tuple[int, ...]:
    """Checks that a value is a sequence of token ids, and returns it as a tuple."""
    if isinstance(value, (str, bytes)) or not all(
        isinstance(each, (int, np.integer)) and not isinstance(each, bool)
        for each in (value if hasattr(value, "__iter__") else [None])
    ):
        raise TypeError(
            "`fixed_tokens` must be a sequence of integers. Received: "
            f"{describe_value(value)}"
        )
    return tuple(int(each) for each in value)
