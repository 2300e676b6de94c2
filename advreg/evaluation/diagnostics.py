"""The checks of an honest evaluation, after Carlini et al., 2019.

A robust accuracy is only an upper bound: a stronger attack may give a lower one. Each
check looks for a sign that the attacks of a report were too weak
([Carlini et al., 2019](https://arxiv.org/abs/1902.06705)). Most of them attack again,
with another attack, and compare.

How it works:

- Checks run on a sample: at most `SAMPLE` of the examples that the model classifies
  correctly, drawn at random. So they cost the same however large the data is.
- For each norm one ball is checked (`_most_informative_balls`): the one whose accuracy
  is closest to 50 %. Where all examples are fooled, or none, two attacks cannot be told
  apart.
- In this ball the strongest run is compared with others (`_check_ball`).
- `_affordable` limits the number of examples, so that checks cost no more than `_SHARE`
  of the attacks, or `_SECONDS`.
- The thresholds were measured on reports on honest networks: see the comments beside
  them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from advreg.attacks import FGSM, PGD, Attack, AutoAttack, RandomNoise
from advreg.attacks.engine.rows import Batch, gather_rows
from advreg.config.norms import NormType
from advreg.evaluation.attack_run import AttackRun, balls
from advreg.evaluation.byte_array import FOOLED
from advreg.evaluation.data_checks import TOLERANCE, RunSummary, checked, data_checks
from advreg.evaluation.report import Check

CHECKS = (
    "nan_in_data",
    "nan_outputs",
    "compiled_differs",
    "hidden_logits",
    "standing_integers",
    "code_columns",
    "bypassed_methods",
    "tiny_radius",
    "zero_gradients",
    "single_step_beats_iterative",
    "black_box_beats_white_box",
    "more_effort_lowers_accuracy",
    "robust_at_huge_radius",
    "left_ball",
    "left_range",
)
# Checks that compare which examples an attack fools, and not only how many. They make
# no sense for a model that draws random numbers.
_COMPARE_EXAMPLES = (
    "single_step_beats_iterative",
    "black_box_beats_white_box",
    "more_effort_lowers_accuracy",
)
SAMPLE = 256
# Share of examples that another start with twice the steps may fool in addition. After
# PGD-40 it fooled another 0 to 4 %. It was 5 and 6 % in 2 of 12 reports on digits
# networks that were regularised at a large radius. These deserve the warning, because
# their accuracy is too high by as much. After attacks that are too short, such as
# PGD-10 in the L1 norm, it was 14 % and more.
_GAIN = 0.05
_HUGE = 100  # Number of examples that are attacked at a huge radius.
_FEW = 2  # So many examples prove nothing, however small the sample.
_LEAST = 32  # Smallest number of examples of the sample that are used.
# Limits of the cost of checks: this share of the attacks that they check, or seconds.
_SHARE, _SECONDS = 0.2, 0.8


def check(
    model: keras.Model,
    seen: RunSummary,
    runs: Sequence[AttackRun],
    batch_size: int,
    from_logits: bool | None,
) -> Iterator[Check]:
    """Runs all checks. A check that raises an error is reported as not made.

    Args:
        model: The model.
        seen: Statistics of the data, and the sample.
        runs: The runs of the report, finished.
        batch_size: Number of examples in a batch.
        from_logits: Whether outputs are logits, where an attack does not say.
    """
    yield from _of_what_was_seen(seen, runs)
    if seen.sample is None:
        return
    probes = _Probes(model, seen.sample, batch_size, from_logits)
    yield checked("zero_gradients", lambda: _zero_gradients(seen, runs, probes))
    for norm, epsilon in _most_informative_balls(runs):
        yield from _check_ball(seen, probes, runs, norm, epsilon)


def checks_without_attacks(
    seen: RunSummary, runs: Sequence[AttackRun]
) -> Iterator[Check]:
    """Runs the checks that need no further attack, after an interruption."""
    yield from _of_what_was_seen(seen, runs)
    if seen.right:
        yield _zero_gradients(seen, runs)


def _of_what_was_seen(seen: RunSummary, runs: Sequence[AttackRun]) -> Iterator[Check]:
    """Makes the checks that use results of the attacks themselves."""
    yield from _left_ball(runs)
    yield from _left_range(runs)
    yield from data_checks(seen, runs)


class _Probes:
    """Runs attacks on the sample, or a part of it."""

    def __init__(
        self,
        model: keras.Model,
        rows: Batch,
        batch_size: int,
        from_logits: bool | None,
    ) -> None:
        self.rows, self.index = rows, rows["index"]
        self._model, self._batch_size = model, batch_size
        self._from_logits = from_logits

    def limited(self, count: int) -> _Probes:
        """Returns a copy with the first examples of the sample only."""
        rows = gather_rows(self.rows, np.arange(min(count, len(self.index))))
        return _Probes(self._model, rows, self._batch_size, self._from_logits)

    def run(self, attack: Attack, places: np.ndarray | None = None) -> np.ndarray:
        """Attacks the sample, or some of its rows, and returns which are fooled."""
        rows = self.rows if places is None else gather_rows(self.rows, places)
        if not len(rows["index"]):
            return np.zeros(0, bool)
        run = AttackRun(
            attack, self._model, "probe", self._batch_size, self._from_logits
        )
        run.feed(rows)
        run.flush()
        return run.status.get(rows["index"]) == FOOLED

    def width(self, attack: Attack) -> float:
        """Returns the width of the clip range, or of the data if there is no range.

        It is at least the radius of an attack in the infinity norm, which may be larger
        than the width of the data.
        """
        ball = attack.problem(self._model, self._from_logits).ball(self.rows)
        low, high = map(ops.convert_to_numpy, ball.range)
        widths = (high - low)[np.isfinite(high - low)]
        x = ops.convert_to_numpy(ball.x)
        x = x[np.isfinite(x)]
        width = widths.max(initial=0.0) or np.ptp(x)
        if attack.norm is NormType.INFINITY:
            return max(float(width), attack.epsilon)
        return float(width)

    def fooled(
        self, runs: Sequence[AttackRun], norm: NormType, epsilon: float
    ) -> np.ndarray:
        """Returns which examples of the sample were fooled by runs inside a ball."""
        fallen = [run.fooled_inside(norm, epsilon) for run in runs]
        return np.isin(self.index, np.concatenate([np.zeros(0, "int64"), *fallen]))


def _zero_gradients(
    seen: RunSummary, runs: Sequence[AttackRun], probes: _Probes | None = None
) -> Check:
    """Checks that gradients are not exactly zero, where attacks take no step."""
    name = "zero_gradients"
    if all(run.attack.is_bounded for run in runs):
        return Check(name, None, "Attacks on tokens do not follow this gradient.")
    share = seen.zero_gradient / seen.right
    if share <= TOLERANCE:
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
    ball = next(_most_informative_balls(runs), None)
    finds_more = True
    if ball is not None and probes is not None:
        main = _strongest(runs, *ball)
        attack = PGD(loss="margin", **surroundings(main.attack))
        probes = probes.limited(_affordable(runs, ball, attack.iterations + 1))
        fooled = probes.run(attack)
        left = 1 - fooled.mean()
        finds_more = bool((fooled & ~probes.fooled(runs, *ball)).any())
        message += (
            f" Under a margin loss the accuracy at ε {attack.epsilon:.4g} is "
            f"{100 * left * seen.right / seen.examples:.2f} % (PGD-{attack.iterations} "
            f"on {len(probes.index)} of them)."
        )
    return Check(name, False, f"{message} {_advice(runs, finds_more)}")


def _advice(runs: Sequence[AttackRun], margin_finds_more: bool) -> str:
    """Returns advice on zero gradients: attacks that this report has not tried."""
    ways = []
    if margin_finds_more:
        ways.append("attack with loss='margin'")
    if not any(isinstance(run.attack, AutoAttack) for run in runs):
        ways.append("add AutoAttack")
    if not ways:
        ways.append("transfer examples from another model (attacks.Transfer)")
    advice = ", or ".join(ways)
    found = "" if margin_finds_more else "It finds no more than this report. "
    return f"{found}{advice[0].upper()}{advice[1:]}."


def _check_ball(
    seen: RunSummary,
    probes: _Probes,
    runs: Sequence[AttackRun],
    norm: NormType,
    epsilon: float,
) -> Iterator[Check]:
    """Makes the checks that compare attacks in one ball."""
    inside = [t for t in runs if (t.norm, t.epsilon) == (norm, epsilon)]
    main = _strongest(runs, norm, epsilon)
    ascent = _own_ascent(main)
    steps = (ascent or PGD(epsilon)).iterations
    # A step and an evaluation for the single step, ten evaluations of noise, twice the
    # steps from another start, and as many at a huge radius for a part of the examples.
    cost = 2 + 10 + 2 * steps + 1 + (steps + 1) * _HUGE / SAMPLE
    probes = probes.limited(_affordable(runs, (norm, epsilon), cost))
    if seen.random:
        for name in _COMPARE_EXAMPLES:
            yield Check(
                name,
                None,
                "Which examples an attack fools is chance where the model draws random "
                "numbers: compare the accuracies of the attacks.",
            )
    else:
        yield checked(
            "single_step_beats_iterative", lambda: _single_step(probes, inside, main)
        )
        yield checked(
            "black_box_beats_white_box", lambda: _without_gradient(probes, runs, main)
        )
        yield checked(
            "more_effort_lowers_accuracy", lambda: _more_effort(probes, runs, main)
        )
    yield checked("robust_at_huge_radius", lambda: _huge_radius(probes, main))


def _own_ascent(run: AttackRun) -> Attack | None:
    """Returns the attack of a run if it is advreg's own, iterative and by gradient."""
    is_ascent = run.white_box and run.iterative
    return run.attack if is_ascent and isinstance(run.attack, Attack) else None


def _affordable(
    runs: Sequence[AttackRun], ball: tuple[NormType, float], cost: float
) -> int:
    """Returns the number of examples with which checks stay within their limits.

    Args:
        runs: The runs of the report.
        ball: The ball whose attacks are checked.
        cost: Number of evaluations of the model for each example.
    """
    inside = [run for run in runs if (run.norm, run.epsilon) == ball]
    evaluations = sum(run.evaluations for run in inside)
    if not evaluations:  # Evaluations of foreign attacks are not counted.
        return SAMPLE
    seconds = sum(t.seconds - t.tracing for t in inside if t.evaluations)
    share = _SHARE * evaluations
    fast = _SECONDS * evaluations / max(seconds, 1e-9)
    return int(np.clip(max(share, fast) / cost, _LEAST, SAMPLE))


def _too_many(count: float, total: int, share: float) -> bool:
    """Returns whether a number is above a share of all examples, and above `_FEW`."""
    return count > share * total and count > _FEW


def _single_step(
    probes: _Probes, inside: Sequence[AttackRun], main: AttackRun
) -> Check:
    """Checks that a single step does not fool more than an iterative attack.

    If it does, the iterative attack is stuck.
    """
    name = "single_step_beats_iterative"
    iterative = [t for t in inside if t.iterative and t.may_follow_gradient]
    if not iterative:
        return Check(name, None, "There is no iterative attack to compare with.")
    # A single step of the report is compared on all examples. Without one, FGSM runs on
    # the sample.
    single = [t for t in inside if t.white_box and not t.iterative]
    if single:
        fast, one = min((_accuracy(run), run.name) for run in single)
        slow, many = max((_accuracy(run), run.name) for run in iterative)
    else:
        fast, one = 1 - probes.run(FGSM(**surroundings(main.attack))).mean(), "FGSM"
        slow, many = max(
            (1 - (run.status.get(probes.index) == FOOLED).mean(), run.name)
            for run in iterative
        )
    of = _attacked(main) if single else len(probes.index)
    if not _too_many((slow - fast) * of, of, TOLERANCE):
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


def _without_gradient(
    probes: _Probes, runs: Sequence[AttackRun], main: AttackRun
) -> Check:
    """Checks that attacks without the gradient fool no examples beyond those with it.

    If they do, the gradient is masked, or the attacks are weak.
    """
    name = "black_box_beats_white_box"
    norm, epsilon = _ball(main)
    knowing = [run for run in runs if run.may_follow_gradient]
    if not any((t.norm, t.epsilon) == (norm, epsilon) for t in knowing):
        return Check(name, None, "There is no attack that follows the gradient.")
    # Compared example by example: what counts is what the gradient has missed.
    found = probes.fooled(knowing, norm, epsilon)
    others = {
        run.name: probes.fooled([run], norm, epsilon)
        for run in runs
        if not run.may_follow_gradient
    }
    if not any(
        isinstance(run.attack, RandomNoise) and _ball(run) == (norm, epsilon)
        for run in runs
    ):
        others["random noise"] = probes.run(RandomNoise(**surroundings(main.attack)))
    count, other = max(((fell & ~found).sum(), who) for who, fell in others.items())
    share = count / len(found)
    if not _too_many(count, len(found), TOLERANCE):
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


def _more_effort(probes: _Probes, runs: Sequence[AttackRun], main: AttackRun) -> Check:
    """Checks that more steps from another start do not lower the accuracy much."""
    name = "more_effort_lowers_accuracy"
    attack = main.attack
    if isinstance(attack, AutoAttack):
        return Check(name, None, "AutoAttack's effort is what its authors set.")
    ascent = _own_ascent(main)
    harder: Attack
    if ascent is not None:
        # Another start, and twice as many steps from there.
        changes: dict[str, Any] = {"iterations": 2 * ascent.iterations}
        changes["seed"] = (_seed(ascent) + 1) % 2**32
        harder = dataclasses.replace(ascent, **changes)
        least = _GAIN
    else:
        harder = PGD(**surroundings(main.attack))
        least = TOLERANCE
    # Examples that any attack of the report has fooled are in its worst case already.
    standing = np.flatnonzero(~probes.fooled(runs, *_ball(main)))
    count = probes.run(harder, standing).sum()
    fell = count / len(probes.index)
    if not _too_many(count, len(probes.index), least):
        return Check(name, True)
    return Check(
        name,
        False,
        f"At ε {main.epsilon:.4g}, {harder.name} fools another {100 * fell:.1f} % of "
        f"the correctly classified examples, which withstand {main.name}: the accuracy "
        "still falls as the attack works harder. Raise iterations and restarts until "
        "it does not, or add AutoAttack.",
    )


def _huge_radius(probes: _Probes, main: AttackRun) -> Check:
    """Checks that a huge radius leaves no example robust.

    At such a radius every input can become any other, so that a working attack fools
    all.
    """
    name = "robust_at_huge_radius"
    # A single step, or an attack without gradient, need not succeed there.
    attack = _own_ascent(main) or PGD(**surroundings(main.attack))
    width = probes.width(attack)
    if NormType(attack.norm) is NormType.INFINITY:
        huge = attack.with_epsilon(width)
    else:
        # In another norm, a ball that contains the whole range has corners so far away
        # that a few steps do not reach them. In the infinity norm it is just the range.
        changes: dict[str, Any] = {"norm": NormType.INFINITY, "epsilon": width}
        if attack.step_size is not None:
            changes["step_size"] = None
        huge = dataclasses.replace(attack, **changes)
    huge = dataclasses.replace(huge, seed=_seed(huge))
    places = np.arange(-(-_HUGE * len(probes.index) // SAMPLE))
    left = int((~probes.run(huge, places)).sum())
    if not _too_many(left, len(places), TOLERANCE):
        return Check(name, True)
    return Check(
        name,
        False,
        f"{left} of {len(places)} examples withstand {attack.name} at a radius of "
        f"{width:.4g}, where every input may become any other: the attack does not "
        "work on this model. Set step_size=None, try loss='margin', more iterations, "
        "and AutoAttack.",
    )


def _left_ball(runs: Sequence[AttackRun]) -> Iterator[Check]:
    """Checks that perturbations stay in the ball, because longer ones do not count."""
    for run in runs:
        if run.left_ball:
            yield Check(
                "left_ball",
                False,
                f"{run.left_ball} perturbations of {run.name} are longer than its "
                f"ε of {run.epsilon:.4g}. The worst case leaves them out. Mend the "
                "attack, or state its true radius and norm.",
            )
    if not any(run.left_ball for run in runs):
        yield Check("left_ball", True)


def _left_range(runs: Sequence[AttackRun]) -> Iterator[Check]:
    """Checks that perturbed inputs stay in the range, because others do not count."""
    for run in runs:
        if run.left_range:
            yield Check(
                "left_range",
                False,
                f"{run.left_range} inputs that {run.name} perturbed lie outside "
                "its range from clip_value_min to clip_value_max. Give the attack its "
                "own limits, such as clip_values.",
            )
    if not any(run.left_range for run in runs):
        yield Check("left_range", True)


def _most_informative_balls(
    runs: Sequence[AttackRun],
) -> Iterator[tuple[NormType, float]]:
    """Yields for each norm the ball whose accuracy is closest to 50 %.

    There the comparison of two attacks tells the most.
    """
    for norm in NormType:
        inside = [run for run in runs if run.norm is norm and run.epsilon]
        inside = [run for run in inside if run.white_box] or inside
        shares = {
            epsilon: _accuracy(_strongest(runs, norm, epsilon))
            for _, epsilon in balls(inside)
        }
        if shares:
            # Of equally close ones, the largest radius if most examples are robust
            # there, and the smallest if few are.
            yield (
                norm,
                min(
                    shares,
                    key=lambda at: (abs(shares[at] - 0.5), -at * (shares[at] - 0.5)),
                ),
            )


def _strongest(runs: Sequence[AttackRun], norm: NormType, epsilon: float) -> AttackRun:
    """Returns the strongest run of a ball.

    White-box runs come first, then iterative ones, then those of the lowest accuracy.
    """
    found = [run for run in runs if (run.norm, run.epsilon) == (norm, epsilon)]
    return min(
        found,
        key=lambda run: (not run.white_box, not run.iterative, _accuracy(run)),
    )


def _accuracy(run: AttackRun) -> float:
    """Returns the share of the correctly classified examples that are robust."""
    return run.robust / (run.robust + run.fooled)


def _attacked(run: AttackRun) -> int:
    """Returns the number of examples that a run has attacked."""
    return run.robust + run.fooled


def _ball(run: AttackRun) -> tuple[NormType, float]:
    """Returns the ball of a run that has one."""
    assert run.norm is not None
    assert run.epsilon is not None
    return NormType(run.norm), run.epsilon


def surroundings(attack: Any) -> dict[str, Any]:
    """Returns arguments that give another attack the same threat model.

    Args:
        attack: An attack that has a radius and a norm.
    """
    names = ("feature_mask", "clip_value_min", "clip_value_max", "from_logits")
    return {
        **{name: getattr(attack, name) for name in names},
        "norm": attack.norm,
        "epsilon": attack.epsilon,
        "seed": _seed(attack),
    }


def _seed(attack: Any) -> int:
    """Returns the attack's seed, or 0. Checks must not use Keras's global one."""
    if isinstance(attack, Attack) and attack.seed is not None:
        return attack.seed
    return 0
