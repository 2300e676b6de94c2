"""Square Attack: a random search that needs no gradient.

How it works ([Andriushchenko et al., 2020](https://arxiv.org/abs/1912.00049)): each
query changes the best point so far inside a window at a random place, and evaluates the
model. If the margin has grown, the new point is the best one. The windows shrink on a
schedule that depends on the number of queries so far.

The two norms differ in what a point is, and how a window changes it:

- L∞: only corners of the ball are tried, as in the paper. A corner is one flag for each
  value: up or down. A window sets all its flags of a channel to the same random value
  (`_flip`). Flags are cheaper than floats, and where the clip range cuts the ball, each
  flag still means one of the two ends (`lowest`, `highest`).
- L2: the norm is a budget, and all of it is used. The norm of one window is moved to
  another, together with what the ball has left. There it takes the shape of two peaks,
  one up and one down (`_move`, `_peaks`).

A picture is `[height, width, channels]`; a batch of displacements is a matrix.
`ImageGrid` converts between both. Features that are no picture are a column of pixels,
and windows are runs of neighbours in it.

The random numbers of a query are drawn in one call (`draws`, one row for each example):
columns 0 and 1 place the window, 2 and 3 the second one, 4 turns the two peaks, and the
others give one sign for each channel.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops, tree

from advreg import backend
from advreg._types import Features, Tensor
from advreg.attacks.attack import Attack
from advreg.attacks.engine.problem import Problem
from advreg.attacks.engine.rows import Batch
from advreg.attacks.engine.solver import Evaluation, Scalars, Solver
from advreg.checks import brief, check_count, describe_value, is_number
from advreg.config.norms import NormType
from advreg.perturbation.ball import Ball
from advreg.perturbation.geometry import l2_norm

P_INIT = 0.8
# The schedule of the paper: after these queries, of 10,000, windows cover half as many
# pixels as before. For other numbers of queries it is scaled.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


class ImageGrid(NamedTuple):
    """The shape of the pictures in which windows are: `[height, width, channels]`.

    Features that are no image are a column of values, one pixel wide.
    """

    height: int
    width: int
    channels: int

    @classmethod
    def of(cls, features: Features, ball: Ball) -> ImageGrid:
        """Makes the grid of a batch: of its image, if it is all that is perturbed."""
        moving = list(itertools.compress(tree.flatten(features), ball.moving))
        if len(moving) == 1 and len(moving[0].shape) == 4:
            return cls(*moving[0].shape[1:])
        return cls(ball.x.shape[1], 1, 1)

    def window(self, share: Tensor, odd: bool) -> tuple[Tensor, Tensor]:
        """Returns the height and width of a window that covers a share of all pixels.

        Args:
            share: The share, a scalar tensor.
            odd: Whether sides must be odd, and 3 at least.
        """
        if self.width == 1:
            return self._side(share * self.height, self.height, odd), 1
        side = self._side(
            ops.sqrt(share * self.height * self.width),
            min(self.height, self.width),
            odd,
        )
        return side, side

    def to_images(self, matrix: Tensor) -> Tensor:
        """Reshapes rows, `[batch, values]`, to pictures."""
        return ops.reshape(matrix, (-1, *self))

    def to_rows(self, pictures: Tensor) -> Tensor:
        """Reshapes pictures to rows, `[batch, values]`."""
        return ops.reshape(pictures, (-1, self.height * self.width * self.channels))

    @staticmethod
    def _side(length: Tensor, limit: int, odd: bool) -> Tensor:
        side = ops.cast(ops.round(length), "int32")
        if odd:  # In L2 a window has two halves and a middle.
            side = ops.maximum(side // 2 * 2 + 1, 3)
        return ops.clip(side, 1, limit)


@dataclasses.dataclass(frozen=True)
class SquareSearch(Solver):
    """A random search that tries one window after another, and keeps improvements.

    `steps` is the number of queries. After the last one the displacement is the best
    point.
    """

    norm: NormType = NormType.INFINITY
    p_init: float = P_INIT

    uses_gradient = False

    def key(self) -> tuple[Any, ...]:
        """Returns the key, with the norm. See `Solver`."""
        return (*super().key(), self.norm)

    def scalars(self, epsilon: float) -> dict[str, float]:
        """Returns the number of queries and `p_init`. See `Solver`."""
        return {"queries": self.steps, "p_init": self.p_init}

    def init(
        self, problem: Problem, batch: Batch, seed: keras.random.SeedGenerator
    ) -> Batch:
        """Makes the first state of each row. See `Solver`."""
        ball = problem.ball(batch)
        grid = ImageGrid.of(batch["features"], ball)
        rows, radius = ball.x.shape[0], problem.threat_model.epsilon
        state = {
            "seed": keras.random.randint((rows,), 0, 2**31 - 1, "int32", seed),
            "best_loss": ops.full_like(ball.x[:, :1], -np.inf),
        }
        if self.norm is NormType.INFINITY:
            # All points that it tries are corners of the ball, cut by the range. A flag
            # for each value says which end it is at: true for `highest`.
            lowest, highest = (
                ball.constrain(_where_free(ball, ops.full_like(ball.x, end)))
                for end in (-radius, radius)
            )
            # As in the paper, the start is vertical stripes of random signs.
            stripes = (rows, 1, grid.width, grid.channels)
            if grid.width == 1:
                stripes = (rows, grid.height, 1, grid.channels)
            up = ops.broadcast_to(_signs(stripes, seed) > 0, (rows, *grid))
            corner = grid.to_rows(up)
            state.update(lowest=lowest, highest=highest, corner=corner, best=corner)
            # A flag has no effect where both ends are the same value.
            state["live"] = ops.not_equal(lowest, highest)
            start = _displacement(corner, state)
        else:
            tiles = _where_free(ball, grid.to_rows(_tiles(grid, rows, seed, ball)))
            start = state["best"] = ball.constrain(radius * _unit(tiles))
        return {**state, "displacement": start}

    def step(self, evaluation: Evaluation, batch: Batch, scalars: Scalars) -> Batch:
        """Computes the next state. See `Solver`."""
        corners = self.norm is NormType.INFINITY
        point = "corner" if corners else "displacement"
        index, dtype = scalars["index"], batch["displacement"].dtype
        loss = ops.cast(evaluation.loss, dtype)[:, None]
        better = loss > batch["best_loss"]
        best = ops.where(better, batch[point], batch["best"])
        grid = ImageGrid.of(batch["features"], evaluation.ball)
        made = ops.cast(index + 1, backend.widest_float())
        # Halved as often as `_HALVINGS` has numbers below the present one.
        share = scalars["p_init"] * 0.5 ** ops.sum(
            ops.cast(
                ops.greater(
                    made * 10_000 / scalars["queries"],
                    np.array(_HALVINGS, backend.widest_float()),
                ),
                backend.widest_float(),
            )
        )
        size = grid.window(share, odd=self.norm is NormType.L2)
        draws = backend.uniform(
            (ops.shape(loss)[0], 5 + grid.channels),
            # The state has one seed for each row, because rows drop out. The seed of
            # the first row that is left serves for all.
            ops.stack([batch["seed"][0], index]),
            dtype,
        )
        if corners:
            tried = _flip(batch, best, grid, size, draws)
        else:
            radius = ops.cast(scalars["epsilon"], dtype)
            tried = evaluation.ball.constrain(
                _move(evaluation.ball, best, radius, grid, size, draws)
            )
        moved = {
            point: ops.where(made >= scalars["queries"], best, tried),
            "best": best,
            "best_loss": ops.where(better, loss, batch["best_loss"]),
        }
        if corners:
            moved["displacement"] = _displacement(moved[point], batch)
        return moved


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Square(Attack):
    """Square Attack: a random search over windows, which needs no gradient.

    See [Andriushchenko et al., 2020](https://arxiv.org/abs/1912.00049). Each query
    changes the best point so far in a window at a random place, and keeps the change if
    the margin grows. Windows shrink during the search. Because it uses no gradient, it
    also works on models that hide theirs.

    Windows are squares if a single feature of shape `[height, width, channels]` is
    perturbed. All other features are one row of values, and a window is a run of
    neighbours.

    Args:
        epsilon: Radius of the ball, in units of the input.
        norm: Norm of the ball, `"infinity"` or `"l2"`.
        queries: Number of points that it tries for each example, from each start.
        p_init: Share of all pixels that the first windows cover, in (0, 1].
        restarts: Number of starts. Each attacks only examples that those before have
            not fooled.
        targeted: Whether `y` is the class to reach. See `FGSM`.
        feature_mask: Features with weight 0 are never changed. Other weights have no
            effect. See `FGSM`.
        clip_value_min: Smallest value of a perturbed feature. See `FGSM`.
        clip_value_max: Largest value of a perturbed feature. See `FGSM`.
        from_logits: Whether the outputs of the model are logits. See `FGSM`.
        seed: Seed of random numbers. See `FGSM`.

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
        self._set("queries", check_count("queries", self.queries))
        self._set("restarts", check_count("restarts", self.restarts))
        if not is_number(self.p_init):
            raise TypeError(
                f"`p_init` must be a number. Received: {describe_value(self.p_init)}"
            )
        if not 0 < self.p_init <= 1:
            raise ValueError(
                f"`p_init` must lie in (0, 1]. Received: {brief(self.p_init)}"
            )
        self._set("p_init", float(self.p_init))

    @property
    def name(self) -> str:
        """Name in reports, with the numbers of queries and restarts."""
        restarts = f" ×{self.restarts}" if self.restarts > 1 else ""
        return f"Square-{self.queries}{restarts}"

    @property
    def iterations_per_start(self) -> int:
        """Number of points that it tries from one start."""
        return self.queries

    def solvers(self, problem: Problem) -> Sequence[Solver]:
        """Makes one solver for each restart."""
        one = SquareSearch(
            self.queries,
            "margin",
            self.targeted,
            norm=NormType(self.norm),
            p_init=self.p_init,
        )
        return [one] * self.restarts


def _displacement(corner: Tensor, batch: Batch) -> Tensor:
    """Returns the displacement of a corner: each value at the end of its flag."""
    return ops.where(corner, batch["highest"], batch["lowest"])


def _flip(
    batch: Batch,
    best: Tensor,
    grid: ImageGrid,
    size: tuple[Tensor, Tensor],
    draws: Tensor,
) -> Tensor:
    """Sets all flags of a window to one random value for each channel."""
    _, _, inside = _place(grid, size, draws[:, 0:2])
    up = draws[:, None, None, 5:] < 0.5
    now = grid.to_images(best)
    changed = ops.logical_and(inside, ops.not_equal(now, up))
    changed = ops.logical_and(changed, grid.to_images(batch["live"]))
    # A query that changes nothing would be lost. The opposite flags are taken then.
    changes = ops.any(changed, axis=(1, 2, 3), keepdims=True)
    # Logical operations, because `where` is slow in TensorFlow if it must broadcast.
    kept = ops.logical_and(ops.logical_not(inside), now)
    return grid.to_rows(
        ops.logical_or(kept, ops.logical_and(inside, ops.equal(up, changes)))
    )


def _move(
    ball: Ball,
    best: Tensor,
    radius: Tensor,
    grid: ImageGrid,
    size: tuple[Tensor, Tensor],
    draws: Tensor,
) -> Tensor:
    """Moves the norm of one window to another, and adds what the ball has left.

    Args:
        ball: The `Ball`.
        best: The best displacements so far, `[batch, values]`.
        radius: Radius of the ball.
        grid: The `ImageGrid`.
        size: Height and width of the windows.
        draws: Random numbers in [0, 1). See the top of this file.

    Returns:
        The displacements to try, before they are constrained.
    """
    now = grid.to_images(best)
    down, right, inside = _place(grid, size, draws[:, 0:2])
    _, _, emptied = _place(grid, size, draws[:, 2:4])
    lying = ops.logical_and(draws[:, 4:5] < 0.5, grid.width > 1)
    bump = _peaks(down, right, size, lying, grid)[..., None]
    bump = _picture_where_free(ball, grid, ops.where(inside, bump, 0.0))
    sign = ops.cast(ops.where(draws[:, None, None, 5:] < 0.5, 1.0, -1.0), best.dtype)
    # The new content of the window: peaks of random sign plus the old content, both of
    # norm 1 before they are added.
    here = _channels_unit(ops.where(inside, now, 0.0))
    shape = _channels_unit(sign * _channels_unit(bump) + here)
    # The norm that it may have: that of both windows, and for each channel an equal
    # share of what the ball has left.
    square = ops.square(now)
    touched = ops.where(ops.logical_or(inside, emptied), square, 0.0)
    left = radius**2 - ops.sum(square, axis=(1, 2, 3), keepdims=True)
    available = ops.sqrt(
        ops.sum(touched, axis=(1, 2), keepdims=True)
        + ops.maximum(left, 0.0) / grid.channels
    )
    return grid.to_rows(
        ops.where(inside, shape * available, ops.where(emptied, 0.0, now))
    )


def _place(
    grid: ImageGrid, size: tuple[Tensor, Tensor], draws: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Places a window at random in each picture.

    Args:
        grid: The `ImageGrid`.
        size: Height and width of the window.
        draws: Two random numbers in [0, 1) for each picture.

    Returns:
        The offset of each line and column from the corner of the window,
        `[batch, height]` and `[batch, width]`, and whether each pixel is in the window,
        `[batch, height, width, 1]`.
    """
    offsets, within = [], []
    for axis in (0, 1):
        rooms = grid[axis] - size[axis] + 1
        corner = ops.cast(
            draws[:, axis : axis + 1] * ops.cast(rooms, draws.dtype), "int32"
        )
        offset = ops.arange(grid[axis]) - ops.minimum(corner, rooms - 1)
        offsets.append(offset)
        within.append(ops.logical_and(offset >= 0, offset < size[axis]))
    inside = ops.logical_and(within[0][:, :, None], within[1][:, None, :])
    return offsets[0], offsets[1], inside[..., None]


def _peaks(
    down: Tensor,
    right: Tensor,
    size: tuple[Tensor, Tensor],
    lying: Tensor,
    grid: ImageGrid,
) -> Tensor:
    """Computes two peaks in a window, one positive and one negative.

    Args:
        down: Offset of each line from the corner of the window, `[batch, height]`.
        right: Offset of each column, `[batch, width]`.
        size: Height and width of the window.
        lying: Whether the peaks are side by side, or one above the other, `[batch, 1]`.
        grid: The `ImageGrid`.

    Returns:
        Tensor of shape `[batch, height, width]`. Values outside of the window have no
        meaning.
    """
    # As in the paper, each pixel further from the middle of a peak is lower by 1/k².
    # The sums for all distances are computed once, and looked up.
    reach = max(grid.height, grid.width) + 2
    heights = np.cumsum([0.0, *(1.0 / np.arange(1, reach) ** 2)])
    slopes = ops.convert_to_tensor(heights, "float32")
    lines, up = _profile(down, size[0], ops.logical_not(lying), slopes)
    columns, left = _profile(right, size[1], lying, slopes)
    # The height of a peak decreases with the larger of the distances along the two
    # axes.
    falloff = ops.maximum(lines[:, :, None], columns[:, None, :])
    top = slopes[ops.maximum(*size) // 2 + 1]
    return (top - falloff) * up[:, :, None] * left[:, None, :]


def _profile(
    offset: Tensor, size: Tensor, split: Tensor, slopes: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns how much a peak has decreased along one axis, and its sign.

    Args:
        offset: Offset from the corner of the window along this axis.
        size: Size of the window along this axis.
        split: Whether two peaks share the axis. The second one is negative.
        slopes: The decrease by distance from the middle of a peak.
    """
    half = size // 2
    second = offset >= half
    middle = ops.where(second, half + (size - half) // 2, half // 2)
    middle = ops.where(split, middle, half)
    distance = ops.clip(ops.abs(offset - middle), 0, slopes.shape[0] - 1)
    sign = ops.where(ops.logical_and(split, second), -1.0, 1.0)
    return backend.gather(slopes, distance), sign


def _tiles(
    grid: ImageGrid, batch: int, seed: keras.random.SeedGenerator, ball: Ball
) -> Tensor:
    """Covers pictures with peaks of random signs: the start in L2.

    There are five windows side by side along the shorter edge.
    """
    edge = grid.height if grid.width == 1 else min(grid.height, grid.width)
    side = max(edge // 5, min(edge, 3))
    size = (side, 1 if grid.width == 1 else side)
    line, column = (np.arange(length, dtype="int32") for length in grid[:2])
    bump = _peaks(
        ops.convert_to_tensor(line[None] % side),
        ops.convert_to_tensor(column[None] % side),
        size,
        ops.convert_to_tensor([[False]]),
        grid,
    )
    signs = _signs(
        (batch, line[-1] // side + 1, column[-1] // side + 1, grid.channels), seed
    )
    signs = ops.take(ops.take(signs, line // side, axis=1), column // side, axis=2)
    return ops.cast(bump[..., None] * signs, ball.x.dtype)


def _signs(shape: tuple[int, ...], seed: keras.random.SeedGenerator) -> Tensor:
    """Draws a tensor of 1 and -1."""
    return ops.where(keras.random.uniform(shape, seed=seed) < 0.5, 1.0, -1.0)


def _where_free(ball: Ball, rows: Tensor) -> Tensor:
    return rows if ball.free is None else ops.where(ball.free, rows, 0.0)


def _picture_where_free(ball: Ball, grid: ImageGrid, pictures: Tensor) -> Tensor:
    """Copies pictures of one channel to all, and sets masked values to 0.

    Without a mask they keep a single channel, which broadcasts.
    """
    pictures = ops.cast(pictures, ball.x.dtype)
    if ball.free is None:
        return pictures
    shape = (ops.shape(pictures)[0], *grid)
    return grid.to_images(
        _where_free(ball, grid.to_rows(ops.broadcast_to(pictures, shape)))
    )


def _unit(rows: Tensor) -> Tensor:
    """Divides each row by its L2 norm, a row of zeros by 1."""
    length = l2_norm(rows)
    return rows / ops.where(length > 0, length, 1.0)


def _channels_unit(pictures: Tensor) -> Tensor:
    """Divides each channel by its L2 norm, and leaves channels of zeros."""
    square = ops.sum(ops.square(pictures), axis=(1, 2), keepdims=True)
    return pictures * ops.where(square > 0, ops.rsqrt(ops.maximum(square, 1e-30)), 0.0)
