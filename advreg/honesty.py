"""The checks of an honest evaluation, after Carlini et al., 2019.

Each looks for a sign that attacks were too weak for the accuracy that they report. They
run on a sample of the examples that the model gets right, so that they cost the same
however large the data is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf
from keras import tree

from advreg.attacks import FGSM, PGD, Attack, AutoAttack, RandomNoise
from advreg.attacks.engine import Rows, take
from advreg.checks import is_number
from advreg.config import NormType
from advreg.report import Check
from advreg.trials import FOOLED, Trial, balls

SAMPLE = 256
_TOLERANCE = 0.01  # Shares of examples that chance may explain.
_GAIN = 0.02  # What twice the effort may still gain.
_HUGE = 100  # Examples that are attacked at a huge radius.


class Seen(Protocol):
    """What the checks need to know of the data."""

    sample: Rows | None
    examples: int
    right: int
    flat: int
    disconnected: bool


def check(
    model: keras.Model,
    seen: Seen,
    trials: Sequence[Trial],
    batch_size: int,
    from_logits: bool | None,
) -> tuple[Check, ...]:
    """Runs all checks.

    Args:
        model: The model.
        seen: What was seen of the data.
        trials: The trials of the report, ended.
        batch_size: Number of examples in a batch.
        from_logits: How outputs are read where an attack does not say.
    """
    if seen.sample is None:
        return ()
    probes = _Probes(model, seen.sample, batch_size, from_logits)
    checks = [_zero_gradients(probes, seen, trials)]
    for norm, epsilon in _telling_balls(trials):
        checks += _check_ball(probes, trials, norm, epsilon)
    return (*checks, *_left_ball(trials), *_left_range(trials))


class _Probes:
    """Runs attacks on the sample, or a part of it."""

    def __init__(
        self,
        model: keras.Model,
        rows: Rows,
        batch_size: int,
        from_logits: bool | None,
    ) -> None:
        self.rows, self.index = rows, rows["index"]
        self._model, self._batch_size = model, batch_size
        self._from_logits = from_logits

    def run(self, attack: Attack, places: np.ndarray | None = None) -> np.ndarray:
        """Attacks the sample, or the rows at some places; tells which are fooled."""
        rows = self.rows if places is None else take(self.rows, places)
        if not len(rows["index"]):
            return np.zeros(0, bool)
        trial = Trial(attack, self._model, "probe", self._batch_size, self._from_logits)
        trial.feed(rows)
        trial.flush()
        return trial.status.get(rows["index"]) == FOOLED

    def span(self) -> tuple[float, float]:
        """The smallest and the largest value of all features that may move."""
        leaves = [
            leaf.numpy()
            for leaf in tree.flatten(self.rows["features"])
            if isinstance(leaf, tf.Tensor) and leaf.dtype.is_floating
        ]
        return (
            min(float(np.nanmin(leaf)) for leaf in leaves),
            max(float(np.nanmax(leaf)) for leaf in leaves),
        )

    def fooled(self, trial: Trial) -> np.ndarray:
        """Tells which examples of the sample a trial has fooled."""
        return trial.status.get(self.index) == FOOLED


def _zero_gradients(probes: _Probes, seen: Seen, trials: Sequence[Trial]) -> Check:
    """Where the gradient is exactly zero, an attack that follows it stands still."""
    name = "zero_gradients"
    share = seen.flat / seen.right
    if share <= _TOLERANCE:
        return Check(name, True)
    message = (
        f"{100 * share:.1f} % of the correctly classified examples have an input "
        "gradient of exactly zero under the cross-entropy"
    )
    if seen.disconnected:
        return Check(
            name,
            False,
            f"{message}: the outputs do not depend on the input in a way that can be "
            "differentiated, as behind a layer that rounds. Attacks that follow the "
            "gradient find nothing. Use attacks that need none, such as Square, and "
            "transfer examples from a model without that layer (attacks.Transfer).",
        )
    message += ", so that attacks which follow it stand still there."
    ball = next(_telling_balls(trials), None)
    if ball is not None:
        attack = PGD(loss="margin", **_strongest(trials, *ball).attack.surroundings())
        left = 1 - probes.run(attack).mean()
        message += (
            f" With a margin loss the accuracy at ε {attack.epsilon:.4g} is "
            f"{100 * left * seen.right / seen.examples:.2f} % (PGD-40 on "
            f"{len(probes.index)} of them)."
        )
    return Check(name, False, f"{message} Attack with loss='margin', or AutoAttack.")


def _check_ball(
    probes: _Probes, trials: Sequence[Trial], norm: NormType, epsilon: float
) -> Iterator[Check]:
    """Makes the checks that compare attacks in one ball."""
    inside = [t for t in trials if (t.norm, t.epsilon) == (norm, epsilon)]
    main = _strongest(trials, norm, epsilon)
    yield _single_step(probes, inside, main)
    yield _without_gradient(probes, inside, main)
    yield _more_effort(probes, main)
    yield _huge_radius(probes, main)


def _single_step(probes: _Probes, inside: Sequence[Trial], main: Trial) -> Check:
    """An iterative attack that loses to a single step is stuck."""
    name = "single_step_beats_iterative"
    iterative = [t for t in inside if t.white_box and t.iterative]
    if not iterative:
        return Check(name, None, "There is no iterative attack to compare with.")
    single = [t for t in inside if t.white_box and not t.iterative]
    if single:
        fast, one = min((_accuracy(trial), trial.name) for trial in single)
        slow, many = max((_accuracy(trial), trial.name) for trial in iterative)
    else:
        fast, one = 1 - probes.run(FGSM(**main.attack.surroundings())).mean(), "FGSM"
        slow, many = max(
            (1 - probes.fooled(trial).mean(), trial.name) for trial in iterative
        )
    if slow - fast <= _TOLERANCE:
        return Check(name, True)
    return Check(
        name,
        False,
        f"A single step ({one}) fools more than an iterative attack ({many}) at ε "
        f"{main.epsilon:.4g}: {100 * fast:.1f} % against {100 * slow:.1f} % of the "
        "correctly classified examples withstand it. The model hides its gradient, or "
        "the steps are too small or too large. Set step_size=None, try loss='margin', "
        "and add AutoAttack.",
    )


def _without_gradient(probes: _Probes, inside: Sequence[Trial], main: Trial) -> Check:
    """What knows the gradient should not lose to what does not."""
    name = "black_box_beats_white_box"
    found = np.any([probes.fooled(t) for t in inside if t.white_box], axis=0)
    others = {t.name: probes.fooled(t) for t in inside if not t.white_box}
    if not any(isinstance(trial.attack, RandomNoise) for trial in inside):
        others["random noise"] = probes.run(RandomNoise(**main.attack.surroundings()))
    share, other = max(((fell & ~found).mean(), who) for who, fell in others.items())
    if share <= _TOLERANCE:
        return Check(name, True)
    return Check(
        name,
        False,
        f"Without knowing the model's gradient, {other} fools {100 * share:.1f} % of "
        f"the examples that withstand the attacks which follow it, at ε "
        f"{main.epsilon:.4g}: the gradient is masked. Add AutoAttack, and examples "
        "transferred from another model (attacks.Transfer).",
    )


def _more_effort(probes: _Probes, main: Trial) -> Check:
    """An accuracy that still falls as the attack works harder is only a bound."""
    name = "more_effort_lowers_accuracy"
    attack = main.attack
    if isinstance(attack, AutoAttack):
        return Check(name, None, "AutoAttack's effort is what its authors set.")
    changes: dict[str, Any] = {}
    if main.iterative:
        changes["iterations"] = 2 * attack.iterations
        if getattr(attack, "random_init", False):
            changes["restarts"] = attack.restarts + 1
        harder = dataclasses.replace(attack, **changes)
    else:
        harder = PGD(**attack.surroundings())
    standing = np.flatnonzero(~probes.fooled(main))
    fell = probes.run(harder, standing).sum() / len(probes.index)
    if fell <= _GAIN:
        return Check(name, True)
    return Check(
        name,
        False,
        f"At ε {main.epsilon:.4g}, {harder.name} fools {100 * fell:.1f} % more of the "
        f"correctly classified examples than {main.name}: the accuracy still falls as "
        "the attack works harder. Raise iterations and restarts until it does not, or "
        "add AutoAttack.",
    )


def _huge_radius(probes: _Probes, main: Trial) -> Check:
    """Where every input can become any other, nothing withstands a working attack."""
    name = "robust_at_huge_radius"
    attack, width = main.attack, _width(main.attack, probes)
    if NormType(attack.norm) is NormType.INFINITY:
        huge = attack.with_epsilon(width)
    else:  # A large enough ball of any norm holds this one.
        changes = {"step_size": None} if hasattr(attack, "step_size") else {}
        huge = dataclasses.replace(
            attack, norm=NormType.INFINITY, epsilon=width, **changes
        )
    places = np.arange(min(_HUGE, len(probes.index)))
    left = int((~probes.run(huge, places)).sum())
    if not left:
        return Check(name, True)
    return Check(
        name,
        False,
        f"{left} of {len(places)} examples withstand {main.name} at a radius of "
        f"{width:.4g}, where every input may become any other: the attack does not "
        "work on this model. Set step_size=None, try loss='margin', more iterations, "
        "and AutoAttack.",
    )


def _left_ball(trials: Sequence[Trial]) -> Iterator[Check]:
    """A perturbation beyond its radius proves nothing at that radius."""
    for trial in trials:
        if trial.left_ball:
            yield Check(
                "left_ball",
                False,
                f"{trial.left_ball} perturbations of {trial.name} are longer than its "
                f"ε of {trial.epsilon:.4g}. The worst case leaves them out. Mend the "
                "attack, or state its true radius and norm.",
            )
    if not any(trial.left_ball for trial in trials):
        yield Check("left_ball", True)


def _left_range(trials: Sequence[Trial]) -> Iterator[Check]:
    """Inputs that cannot occur prove nothing either."""
    for trial in trials:
        if trial.left_range:
            yield Check(
                "left_range",
                False,
                f"{trial.left_range} inputs that {trial.name} perturbed lie outside "
                "its range from clip_value_min to clip_value_max. Give the attack its "
                "own limits, such as clip_values.",
            )
    if not any(trial.left_range for trial in trials):
        yield Check("left_range", True)


def _telling_balls(trials: Sequence[Trial]) -> Iterator[tuple[NormType, float]]:
    """For each norm the ball in which attacks both succeed and fail the most."""
    for norm in NormType:
        radii = [
            (abs(_accuracy(_strongest(trials, norm, epsilon)) - 0.5), epsilon)
            for at, epsilon in balls([t for t in trials if t.white_box])
            if at is norm and epsilon > 0
        ]
        if radii:
            yield norm, min(radii)[1]


def _strongest(trials: Sequence[Trial], norm: NormType, epsilon: float) -> Trial:
    """The best attack of a ball that follows the gradient, an iterative one first."""
    found = [
        trial
        for trial in trials
        if trial.white_box and (trial.norm, trial.epsilon) == (norm, epsilon)
    ]
    return min(found, key=lambda trial: (not trial.iterative, _accuracy(trial)))


def _accuracy(trial: Trial) -> float:
    """Share of the correctly classified examples that withstand an attack."""
    return trial.stands / (trial.stands + trial.fooled)


def _width(attack: Attack, probes: _Probes) -> float:
    """The width of the range, or of the data where no range was stated."""
    low, high = attack.clip_value_min, attack.clip_value_max
    if is_number(low) and is_number(high):
        return high - low
    lowest, highest = probes.span()
    return float(highest - lowest)
