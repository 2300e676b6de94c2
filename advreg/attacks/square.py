"""Square Attack: a random search that needs no gradient."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import ops, tree

from advreg.attacks.base import Attack
from advreg.attacks.engine import Look, Numbers, Round, Rows, Scene
from advreg.ball import Ball
from advreg.checks import count, is_number, show
from advreg.config import NormType
from advreg.geometry import Tensor, l2_norm
from advreg.packing import Features

P_INIT = 0.8
# Of 10,000 queries, those after which windows are half as large as before.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


class Canvas(NamedTuple):
    """What windows are cut from: `[height, width, channels]`.

    Features that are no image are a column of values, one pixel wide.
    """

    height: int
    width: int
    channels: int

    @classmethod
    def of(cls, features: Features, ball: Ball) -> Canvas:
        """Finds it by what may move."""
        moving = list(itertools.compress(tree.flatten(features), ball.moving))
        if len(moving) == 1 and moving[0].shape.rank == 4:
            return cls(*moving[0].shape[1:])
        return cls(ball.x.shape[1], 1, 1)

    def window(self, share: Tensor, odd: bool) -> tuple[Tensor, Tensor]:
        """Height and width of a window that covers a share of all pixels."""
        if self.width == 1:
            return self._side(share * self.height, self.height, odd), tf.constant(1)
        side = self._side(
            ops.sqrt(share * self.height * self.width),
            min(self.height, self.width),
            odd,
        )
        return side, side

    def hang(self, matrix: Tensor) -> Tensor:
        """Makes pictures of rows."""
        return ops.reshape(matrix, (-1, *self))

    def lay(self, pictures: Tensor) -> Tensor:
        """Makes rows of pictures."""
        return ops.reshape(pictures, (-1, self.height * self.width * self.channels))

    @staticmethod
    def _side(length: Tensor, limit: int, odd: bool) -> Tensor:
        side = ops.cast(ops.round(length), "int32")
        if odd:  # A window of two halves and a middle.
            side = ops.maximum(side // 2 * 2 + 1, 3)
        return ops.clip(side, 1, limit)


@dataclasses.dataclass(frozen=True)
class Search(Round):
    """Tries a window after another, and keeps what raises the loss.

    Its `looks` are its queries. After the last it goes to the best point.
    """

    norm: NormType = NormType.INFINITY
    p_init: float = P_INIT

    uses_gradient = False

    def key(self) -> tuple[Any, ...]:
        """See `Round`."""
        return (*super().key(), self.norm)

    def numbers(self, epsilon: float) -> dict[str, float]:
        """See `Round`."""
        return {"queries": self.looks, "p_init": self.p_init}

    def start(self, scene: Scene, rows: Rows, seed: keras.random.SeedGenerator) -> Rows:
        """See `Round`."""
        ball = scene.ball(rows)
        canvas = Canvas.of(rows["features"], ball)
        batch, radius = ball.x.shape[0], scene.threat.epsilon
        state = {
            # Each row has one, for none is sure to stay; the first that is left counts.
            "seed": keras.random.randint((batch,), 0, 2**31 - 1, "int32", seed),
            "best_loss": ops.full_like(ball.x[:, :1], -np.inf),
        }
        if self.norm is NormType.INFINITY:
            # All points that it tries are corners of the ball, cut by the range. A flag
            # for each value says to which of its ends it goes.
            lowest, highest = (
                ball.constrain(_where_free(ball, ops.full_like(ball.x, end)))
                for end in (-radius, radius)
            )
            stripes = (batch, 1, canvas.width, canvas.channels)
            if canvas.width == 1:
                stripes = (batch, canvas.height, 1, canvas.channels)
            up = ops.broadcast_to(_coins(stripes, seed) > 0, (batch, *canvas))
            corner = canvas.lay(up)
            state.update(lowest=lowest, highest=highest, corner=corner, best=corner)
            # Where both ends are the same value a flag changes nothing.
            state["live"] = ops.not_equal(lowest, highest)
            start = _displacement(corner, state)
        else:
            tiles = _where_free(ball, canvas.lay(_tiles(canvas, batch, seed, ball)))
            start = state["best"] = ball.constrain(radius * _unit(tiles))
        return {**state, "displacement": start}

    def advance(self, look: Look, rows: Rows, numbers: Numbers) -> Rows:
        """See `Round`."""
        corners = self.norm is NormType.INFINITY
        point = "corner" if corners else "displacement"
        index, dtype = numbers["index"], rows["displacement"].dtype
        loss = ops.cast(look.loss, dtype)[:, None]
        better = loss > rows["best_loss"]
        best = ops.where(better, rows[point], rows["best"])
        canvas = Canvas.of(rows["features"], look.ball)
        made = ops.cast(index + 1, "float64")
        share = numbers["p_init"] * 0.5 ** ops.sum(
            ops.cast(
                made * 10_000 / numbers["queries"] > np.array(_HALVINGS, "float64"),
                "float64",
            )
        )
        size = canvas.window(share, odd=self.norm is NormType.L2)
        draws = tf.random.stateless_uniform(
            (tf.shape(loss)[0], 5 + canvas.channels),
            tf.stack([rows["seed"][0], index]),
            dtype=dtype,
        )
        if corners:
            tried = _flip(rows, best, canvas, size, draws)
        else:
            radius = ops.cast(numbers["epsilon"], dtype)
            tried = look.ball.constrain(
                _move(look.ball, best, radius, canvas, size, draws)
            )
        moved = {
            point: ops.where(made >= numbers["queries"], best, tried),
            "best": best,
            "best_loss": ops.where(better, loss, rows["best_loss"]),
        }
        if corners:
            moved["displacement"] = _displacement(moved[point], rows)
        return moved


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Square(Attack):
    """Square Attack: a random search over windows, which needs no gradient.

    [Andriushchenko et al., 2020](https://arxiv.org/abs/1912.00049). Each query changes
    the best point so far in a window at a random place, and keeps what raises the
    margin. Windows shrink as the search goes on. What a model's gradient hides does not
    concern it.

    Windows are squares where one feature of shape `[height, width, channels]` is
    perturbed. All else is taken as one row of values, and a window is a run of
    neighbours.

    Args:
        epsilon: Radius of the ball, in units of the input.
        norm: Norm of the ball, `"infinity"` or `"l2"`.
        queries: Number of points that it tries for each example, from each start.
        p_init: Share of all pixels that the first windows cover, in (0, 1].
        restarts: Number of starts. What one has fooled, the next leaves alone.
        targeted: As of `FGSM`.
        feature_mask: As of `FGSM`. Of a mask it counts only where it is 0.
        clip_value_min: As of `FGSM`.
        clip_value_max: As of `FGSM`.
        from_logits: As of `FGSM`.
        seed: As of `FGSM`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has a value that its rule forbids.

    Example:
    >>> attack = Square(epsilon=0.3, clip_value_min=0.0, clip_value_max=1.0)
    >>> x_adv = attack(model, x, y)
    """

    _: dataclasses.KW_ONLY
    queries: int = 5000
    p_init: float = P_INIT
    restarts: int = 1

    norms = (NormType.INFINITY, NormType.L2)
    uses_gradient = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("queries", count("queries", self.queries))
        self._set("restarts", count("restarts", self.restarts))
        if not is_number(self.p_init):
            raise TypeError(f"`p_init` must be a number. Received: {show(self.p_init)}")
        if not 0 < self.p_init <= 1:
            raise ValueError(f"`p_init` must lie in (0, 1]. Received: {self.p_init!r}")
        self._set("p_init", float(self.p_init))

    @property
    def name(self) -> str:
        """What reports call it, queries and restarts included."""
        restarts = f" ×{self.restarts}" if self.restarts > 1 else ""
        return f"Square-{self.queries}{restarts}"

    @property
    def iterations_per_round(self) -> int:
        """How many points it tries from one start."""
        return self.queries

    def rounds(self, scene: Scene) -> Sequence[Round]:
        """One round for each restart."""
        one = Search(
            self.queries,
            "margin",
            self.targeted,
            norm=NormType(self.norm),
            p_init=self.p_init,
        )
        return [one] * self.restarts


def _displacement(corner: Tensor, rows: Rows) -> Tensor:
    """Takes each value to the end that its flag says."""
    return ops.where(corner, rows["highest"], rows["lowest"])


def _flip(
    rows: Rows,
    best: Tensor,
    canvas: Canvas,
    size: tuple[Tensor, Tensor],
    draws: Tensor,
) -> Tensor:
    """Sets the flags of a window, so that each of its channels goes to one end."""
    _, _, inside = _place(canvas, size, draws[:, 0:2])
    up = draws[:, None, None, 5:] < 0.5
    now = canvas.hang(best)
    changed = ops.logical_and(inside, ops.not_equal(now, up))
    changed = ops.logical_and(changed, canvas.hang(rows["live"]))
    # A query that changes nothing would be lost: it goes to the other ends.
    changes = ops.any(changed, axis=(1, 2, 3), keepdims=True)
    # Cheaper than to select, for TensorFlow is slow to broadcast there.
    kept = ops.logical_and(ops.logical_not(inside), now)
    return canvas.lay(
        ops.logical_or(kept, ops.logical_and(inside, ops.equal(up, changes)))
    )


def _move(
    ball: Ball,
    best: Tensor,
    radius: Tensor,
    canvas: Canvas,
    size: tuple[Tensor, Tensor],
    draws: Tensor,
) -> Tensor:
    """Moves the norm of one window to another, and adds what the ball has left."""
    now = canvas.hang(best)
    down, right, inside = _place(canvas, size, draws[:, 0:2])
    _, _, emptied = _place(canvas, size, draws[:, 2:4])
    lying = ops.logical_and(draws[:, 4:5] < 0.5, canvas.width > 1)
    bump = _bump(down, right, size, lying, canvas)[..., None]
    bump = _picture_where_free(ball, canvas, ops.where(inside, bump, 0.0))
    sign = ops.cast(ops.where(draws[:, None, None, 5:] < 0.5, 1.0, -1.0), best.dtype)
    here = _channels_unit(ops.where(inside, now, 0.0))
    shape = _channels_unit(sign * _channels_unit(bump) + here)
    square = ops.square(now)
    touched = ops.where(ops.logical_or(inside, emptied), square, 0.0)
    left = radius**2 - ops.sum(square, axis=(1, 2, 3), keepdims=True)
    available = ops.sqrt(
        ops.sum(touched, axis=(1, 2), keepdims=True)
        + ops.maximum(left, 0.0) / canvas.channels
    )
    return canvas.lay(
        ops.where(inside, shape * available, ops.where(emptied, 0.0, now))
    )


def _place(
    canvas: Canvas, size: tuple[Tensor, Tensor], draws: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Puts a window somewhere in each picture.

    Returns:
        How far down and right of its corner each line and column is, `[batch, height]`
        and `[batch, width]`, and whether each pixel is in it,
        `[batch, height, width, 1]`.
    """
    offsets, within = [], []
    for axis in (0, 1):
        rooms = canvas[axis] - size[axis] + 1
        corner = ops.cast(
            draws[:, axis : axis + 1] * ops.cast(rooms, draws.dtype), "int32"
        )
        offset = ops.arange(canvas[axis]) - ops.minimum(corner, rooms - 1)
        offsets.append(offset)
        within.append(ops.logical_and(offset >= 0, offset < size[axis]))
    inside = ops.logical_and(within[0][:, :, None], within[1][:, None, :])
    return offsets[0], offsets[1], inside[..., None]


def _bump(
    down: Tensor,
    right: Tensor,
    size: tuple[Tensor, Tensor],
    lying: Tensor,
    canvas: Canvas,
) -> Tensor:
    """Two peaks side by side in a window, one up and one down.

    Args:
        down: How far down of the window's corner each line is, `[batch, height]`.
        right: How far right each column is, `[batch, width]`.
        size: Height and width of the window.
        lying: Whether the peaks lie side by side, or one above the other, `[batch, 1]`.
        canvas: The `Canvas`.

    Returns:
        Tensor of shape `[batch, height, width]`, of no meaning outside the window.
    """
    reach = max(canvas.height, canvas.width) + 2
    heights = np.cumsum([0.0, *(1.0 / np.arange(1, reach) ** 2)])
    slopes = tf.constant(heights, "float32")
    lines, up = _profile(down, size[0], ops.logical_not(lying), slopes)
    columns, left = _profile(right, size[1], lying, slopes)
    # A peak falls off with the larger of the distances along the two axes.
    falloff = ops.maximum(lines[:, :, None], columns[:, None, :])
    top = slopes[ops.maximum(*size) // 2 + 1]
    return (top - falloff) * up[:, :, None] * left[:, None, :]


def _profile(
    offset: Tensor, size: Tensor, split: Tensor, slopes: Tensor
) -> tuple[Tensor, Tensor]:
    """How far a peak has fallen off along one axis, and its sign.

    Where `split`, two peaks share the axis, and the second is negative.
    """
    half = size // 2
    second = offset >= half
    middle = ops.where(second, half + (size - half) // 2, half // 2)
    middle = ops.where(split, middle, half)
    distance = ops.clip(ops.abs(offset - middle), 0, slopes.shape[0] - 1)
    sign = ops.where(ops.logical_and(split, second), -1.0, 1.0)
    return tf.gather(slopes, distance), sign


def _tiles(
    canvas: Canvas, batch: int, seed: keras.random.SeedGenerator, ball: Ball
) -> Tensor:
    """Covers pictures with windows side by side, five along the shorter edge."""
    edge = canvas.height if canvas.width == 1 else min(canvas.height, canvas.width)
    side = max(edge // 5, min(edge, 3))
    size = (tf.constant(side), tf.constant(1 if canvas.width == 1 else side))
    line, column = (np.arange(length, dtype="int32") for length in canvas[:2])
    bump = _bump(
        tf.constant(line[None] % side),
        tf.constant(column[None] % side),
        size,
        tf.constant([[False]]),
        canvas,
    )
    signs = _coins(
        (batch, line[-1] // side + 1, column[-1] // side + 1, canvas.channels), seed
    )
    signs = tf.gather(tf.gather(signs, line // side, axis=1), column // side, axis=2)
    return ops.cast(bump[..., None] * signs, ball.x.dtype)


def _coins(shape: tuple[int, ...], seed: keras.random.SeedGenerator) -> Tensor:
    """Draws 1 or -1."""
    return ops.where(keras.random.uniform(shape, seed=seed) < 0.5, 1.0, -1.0)


def _where_free(ball: Ball, rows: Tensor) -> Tensor:
    return rows if ball.free is None else ops.where(ball.free, rows, 0.0)


def _picture_where_free(ball: Ball, canvas: Canvas, pictures: Tensor) -> Tensor:
    """Cuts pictures of one channel for each channel to what may move there."""
    pictures = ops.cast(pictures, ball.x.dtype)
    if ball.free is None:
        return pictures
    shape = (tf.shape(pictures)[0], *canvas)
    return canvas.hang(_where_free(ball, canvas.lay(ops.broadcast_to(pictures, shape))))


def _unit(rows: Tensor) -> Tensor:
    """Divides each row by its length, a row of zeros by 1."""
    length = l2_norm(rows)
    return rows / ops.where(length > 0, length, 1.0)


def _channels_unit(pictures: Tensor) -> Tensor:
    """Divides each channel by its length, one of zeros by 1."""
    square = ops.sum(ops.square(pictures), axis=(1, 2), keepdims=True)
    return pictures * ops.where(square > 0, ops.rsqrt(ops.maximum(square, 1e-30)), 0.0)
