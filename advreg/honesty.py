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

from advreg.attacks import FGSM, PGD, Attack, AutoAttack, RandomNoise
from advreg.attacks.engine import Rows, take
from advreg.config import NormType
from advreg.report import Check
from advreg.trials import FOOLED, Trial, balls

CHECKS = (
    "zero_gradients",
    "single_step_beats_iterative",
    "black_box_beats_white_box",
    "more_effort_lowers_accuracy",
    "robust_at_huge_radius",
    "left_ball",
    "left_range",
)
SAMPLE = 256
# Share of examples by which an attack may lose to a weaker one: which examples at the
# edge of the ball an attack finds is chance. In some 120 reports on honest networks
# (digits and MNIST, plain and regularised, all norms) it never lost by more.
_TOLERANCE = 0.01
# Share that another start and twice the steps may still find. PGD-40 left them 0 to 4 %
# there. It left 5 and 6 % in 2 of 12 reports on digits networks that were regularised
# at a large radius, which deserve the warning: their accuracy is that much too high.
# Attacks that are too short, as PGD-10 in the L1 norm, left 14 % and more.
_GAIN = 0.05
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
) -> Iterator[Check]:
    """Runs all checks.

    Args:
        model: The model.
        seen: What was seen of the data.
        trials: The trials of the report, ended.
        batch_size: Number of examples in a batch.
        from_logits: How outputs are read where an attack does not say.
    """
    yield from _left_ball(trials)
    yield from _left_range(trials)
    if seen.sample is None:
        return
    probes = _Probes(model, seen.sample, batch_size, from_logits)
    yield _zero_gradients(seen, trials, probes)
    for norm, epsilon in _telling_balls(trials):
        yield from _check_ball(probes, trials, norm, epsilon)


def at_hand(seen: Seen, trials: Sequence[Trial]) -> Iterator[Check]:
    """Makes the checks for which nothing has to be run, of data seen in part."""
    yield from _left_ball(trials)
    yield from _left_range(trials)
    if seen.right:
        yield _zero_gradients(seen, trials)


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

    def width(self, attack: Attack) -> float:
        """The width of the range, or of the data where no range was stated.

        A radius in the infinity norm may be larger than the width of the data.
        """
        ball = attack.scene(self._model, self._from_logits).ball(self.rows)
        low, high = (bound.numpy() for bound in ball.range)
        widths = (high - low)[np.isfinite(high - low)]
        x = ball.x.numpy()
        x = x[np.isfinite(x)]
        width = widths.max(initial=0.0) or np.ptp(x)
        if attack.norm is NormType.INFINITY:
            return max(float(width), attack.epsilon)
        return float(width)

    def fooled(
        self, trials: Sequence[Trial], norm: NormType, epsilon: float
    ) -> np.ndarray:
        """Tells which examples of the sample trials have fooled inside a ball."""
        fallen = [trial.fallen(norm, epsilon) for trial in trials]
        return np.isin(self.index, np.concatenate([np.zeros(0, "int64"), *fallen]))


def _zero_gradients(
    seen: Seen, trials: Sequence[Trial], probes: _Probes | None = None
) -> Check:
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
    if ball is not None and probes is not None:
        attack = PGD(loss="margin", **surroundings(_strongest(trials, *ball).attack))
        left = 1 - probes.run(attack).mean()
        message += (
            f" Under a margin loss the accuracy at ε {attack.epsilon:.4g} is "
            f"{100 * left * seen.right / seen.examples:.2f} % (PGD-{attack.iterations} "
            f"on {len(probes.index)} of them)."
        )
    return Check(name, False, f"{message} Attack with loss='margin', or AutoAttack.")


def _check_ball(
    probes: _Probes, trials: Sequence[Trial], norm: NormType, epsilon: float
) -> Iterator[Check]:
    """Makes the checks that compare attacks in one ball."""
    inside = [t for t in trials if (t.norm, t.epsilon) == (norm, epsilon)]
    main = _strongest(trials, norm, epsilon)
    yield _single_step(probes, inside, main)
    yield _without_gradient(probes, trials, main)
    yield _more_effort(probes, trials, main)
    yield _huge_radius(probes, main)


def _single_step(probes: _Probes, inside: Sequence[Trial], main: Trial) -> Check:
    """An iterative attack that loses to a single step is stuck."""
    name = "single_step_beats_iterative"
    iterative = [t for t in inside if t.iterative and t.may_follow_gradient]
    if not iterative:
        return Check(name, None, "There is no iterative attack to compare with.")
    single = [t for t in inside if t.white_box and not t.iterative]
    if single:
        fast, one = min((_accuracy(trial), trial.name) for trial in single)
        slow, many = max((_accuracy(trial), trial.name) for trial in iterative)
    else:
        fast, one = 1 - probes.run(FGSM(**surroundings(main.attack))).mean(), "FGSM"
        slow, many = max(
            (1 - (trial.status.get(probes.index) == FOOLED).mean(), trial.name)
            for trial in iterative
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


def _without_gradient(probes: _Probes, trials: Sequence[Trial], main: Trial) -> Check:
    """What knows the gradient should not lose to what does not."""
    name = "black_box_beats_white_box"
    norm, epsilon = _ball(main)
    knowing = [trial for trial in trials if trial.may_follow_gradient]
    if not any((t.norm, t.epsilon) == (norm, epsilon) for t in knowing):
        return Check(name, None, "There is no attack that follows the gradient.")
    found = probes.fooled(knowing, norm, epsilon)
    others = {
        trial.name: probes.fooled([trial], norm, epsilon)
        for trial in trials
        if not trial.may_follow_gradient
    }
    if not any(
        isinstance(trial.attack, RandomNoise) and _ball(trial) == (norm, epsilon)
        for trial in trials
    ):
        others["random noise"] = probes.run(RandomNoise(**surroundings(main.attack)))
    share, other = max(((fell & ~found).mean(), who) for who, fell in others.items())
    if share <= _TOLERANCE:
        return Check(name, True)
    return Check(
        name,
        False,
        f"Without following the model's gradient, {other} fools {100 * share:.1f} % of "
        "the correctly classified examples beyond those that fall to the attacks which "
        f"follow it, at ε {epsilon:.4g}: the gradient is masked, or the attacks are "
        "weak. Add AutoAttack, and examples transferred from another model "
        "(attacks.Transfer).",
    )


def _more_effort(probes: _Probes, trials: Sequence[Trial], main: Trial) -> Check:
    """An accuracy that still falls as the attack works harder is only a bound."""
    name = "more_effort_lowers_accuracy"
    attack = main.attack
    if isinstance(attack, AutoAttack):
        return Check(name, None, "AutoAttack's effort is what its authors set.")
    if main.white_box and main.iterative:
        # Another start, and twice as many steps from there.
        twice, seed = 2 * attack.iterations, (_seed(attack) + 1) % 2**32
        harder = dataclasses.replace(attack, iterations=twice, seed=seed)
        least = _GAIN
    else:
        harder = PGD(**surroundings(main.attack))
        least = _TOLERANCE
    # What any attack of the report has found is in its worst case already.
    standing = np.flatnonzero(~probes.fooled(trials, *_ball(main)))
    fell = probes.run(harder, standing).sum() / len(probes.index)
    if fell <= least:
        return Check(name, True)
    return Check(
        name,
        False,
        f"At ε {main.epsilon:.4g}, {harder.name} fools another {100 * fell:.1f} % of "
        f"the correctly classified examples, which withstand {main.name}: the accuracy "
        "still falls as the attack works harder. Raise iterations and restarts until "
        "it does not, or add AutoAttack.",
    )


def _huge_radius(probes: _Probes, main: Trial) -> Check:
    """Where every input can become any other, nothing withstands a working attack."""
    name = "robust_at_huge_radius"
    # A single step is not expected to get there, nor is what does without a gradient.
    attack: Attack = (
        main.attack
        if main.white_box and main.iterative
        else PGD(**surroundings(main.attack))
    )
    width = probes.width(attack)
    if NormType(attack.norm) is NormType.INFINITY:
        huge = attack.with_epsilon(width)
    else:
        # A ball of another norm that holds the whole range has far corners, to which
        # no few steps lead. In the infinity norm it holds nothing but the range.
        changes: dict[str, Any] = {"norm": NormType.INFINITY, "epsilon": width}
        if hasattr(attack, "step_size"):
            changes["step_size"] = None
        huge = dataclasses.replace(attack, **changes)
    huge = dataclasses.replace(huge, seed=_seed(huge))
    places = np.arange(min(_HUGE, len(probes.index)))
    left = int((~probes.run(huge, places)).sum())
    if left <= _TOLERANCE * len(places):
        return Check(name, True)
    return Check(
        name,
        False,
        f"{left} of {len(places)} examples withstand {attack.name} at a radius of "
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
        inside = [trial for trial in trials if trial.norm is norm and trial.epsilon]
        inside = [trial for trial in inside if trial.white_box] or inside
        shares = {
            epsilon: _accuracy(_strongest(trials, norm, epsilon))
            for _, epsilon in balls(inside)
        }
        if shares:
            # Where all is won or lost alike, the radius at which that tells the most.
            yield (
                norm,
                min(
                    shares,
                    key=lambda at: (abs(shares[at] - 0.5), -at * (shares[at] - 0.5)),
                ),
            )


def _strongest(trials: Sequence[Trial], norm: NormType, epsilon: float) -> Trial:
    """The best attack of a ball, an iterative one that follows the gradient first."""
    found = [
        trial for trial in trials if (trial.norm, trial.epsilon) == (norm, epsilon)
    ]
    return min(
        found,
        key=lambda trial: (not trial.white_box, not trial.iterative, _accuracy(trial)),
    )


def _accuracy(trial: Trial) -> float:
    """Share of the correctly classified examples that withstand an attack."""
    return trial.stands / (trial.stands + trial.fooled)


def _ball(trial: Trial) -> tuple[NormType, float]:
    """The ball of a trial that has one."""
    assert trial.norm is not None
    assert trial.epsilon is not None
    return trial.norm, trial.epsilon


def surroundings(attack: Any) -> dict[str, Any]:
    """The arguments that let another attack do what this one may do.

    Args:
        attack: An attack that has a radius and a norm.
    """
    names = ("feature_mask", "clip_value_min", "clip_value_max", "from_logits")
    return {
        **{name: getattr(attack, name, None) for name in names},
        "norm": attack.norm,
        "epsilon": attack.epsilon,
        "seed": _seed(attack),
    }


def _seed(attack: Any) -> int:
    """The attack's seed, or 0: checks draw nothing from Keras's random state."""
    if isinstance(attack, Attack) and attack.seed is not None:
        return attack.seed
    return 0
