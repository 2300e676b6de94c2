"""The base class of BIM and PGD: attacks of many small steps."""

from __future__ import annotations

import dataclasses

from advreg.attacks.arguments import check_loss
from advreg.attacks.attack import Attack
from advreg.checks import (
    check_count,
    check_nonnegative,
)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class IterativeAttack(Attack):
    """Base class of BIM and PGD, with their common arguments."""

    _: dataclasses.KW_ONLY
    step_size: float | None = None
    iterations: int = 40
    loss: str | None = None

    supports_regression = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_loss(self.loss)
        self._set("iterations", check_count("iterations", self.iterations))
        if self.step_size is not None:
            self._set("step_size", check_nonnegative("step_size", self.step_size))
            if self.epsilon and not self.step_size:
                raise ValueError(
                    "`step_size` must be positive: an attack that cannot move measures "
                    "nothing. Leave it out, or set `epsilon=0`. Received: "
                    f"step_size={self.step_size!r} and epsilon={self.epsilon!r}"
                )

    @property
    def name(self) -> str:
        """Name in reports, with the number of iterations."""
        return f"{type(self).__name__}-{self.iterations}"

    def length_of_step(self) -> float:
        """Returns the step size, by default 2.5 radii over the number of steps."""
        if self.step_size is None:
            return 2.5 * self.epsilon / self.iterations
        return self.step_size
