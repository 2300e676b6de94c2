"""`evaluate_robustness`: accuracies under attack, the worst case, and checks of both.

The worst case is computed example by example: an example is right in a ball only if no
attack has fooled it inside this ball. So all perturbations of all attacks are compared
with each ball of the report, also those that were found at another radius (`_report`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from advreg import backend
from advreg.attacks.arguments import check_runs_eagerly
from advreg.attacks.substitution import Substitution
from advreg.checks import brief, check_count, is_number
from advreg.evaluation import diagnostics as diagnostics
from advreg.evaluation.arguments import at_radii, listed_attacks, unique_names
from advreg.evaluation.attack_run import AttackRun, EndPoints, balls
from advreg.evaluation.evaluation_run import EvaluationRun, classifier
from advreg.evaluation.report import (
    INTERRUPTED,
    OF_EACH_FEATURE,
    Accuracy,
    Check,
    RobustnessReport,
    in_words,
)
from advreg.network.preprocessing import (
    describe_preprocessing,
)

_MOST_DRAWS = 255  # The count of each example is kept in one byte.


def evaluate_robustness(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    attacks: Any,
    epsilons: Sequence[float] | None = None,
    batch_size: int = 32,
    verbose: int | str = "auto",
    from_logits: bool | None = None,
    draws: int | None = None,
) -> RobustnessReport:
    """Measures the accuracy of a classifier under attack, and checks the result.

    Every attack runs at every radius, on every example that the model classifies
    correctly. Once an example is fooled, the attack stops for it, and the others are
    gathered into full batches again. The data is read once, batch by batch: memory does
    not grow with it, except for some bytes per example.

    At the end the checks of [Carlini et al., 2019](https://arxiv.org/abs/1902.06705)
    look for signs that the attacks were too weak, on 256 examples drawn at random from
    those that the model classifies correctly. Their findings are the report's
    `warnings`.

    Args:
        model: A Keras 3 model that gives class scores, wrapped or not, compiled or
            not. It runs in inference mode, and nothing of it changes.
        x: The data, in any form that `evaluate` takes: arrays or structures of them, a
            `tf.data.Dataset`, a `PyDataset`, a finite generator. Sample weights in it
            are ignored.
        y: Labels, where they are not in `x`: class numbers or one-hot rows.
        attacks: An attack or a list of them: objects of `advreg.attacks`, or any
            callable `attack(model, x, y) -> x_adv`. The report uses the attributes
            `name`, `epsilon` and `norm` of such a callable, if it has them.
        epsilons: Radii that replace those of all attacks. Step sizes are scaled by the
            same factor. Attacks without a radius run once.
        batch_size: Number of examples that go through the model at once.
        verbose: `"auto"` or 1 for a progress bar, 2 for one line, 0 for nothing.
        from_logits: Whether the model's outputs are logits rather than probabilities,
            for attacks that do not say. With `None` it is guessed: see
            `advreg.attacks.FGSM`.
        draws: Number of calls of the model on each example, at most 255, if it draws
            random numbers when it predicts. Accuracies are means over these draws, and
            attacks use the mean of as many gradients
            ([Athalye et al., 2018](https://arxiv.org/abs/1707.07397)). `None` is 10 for
            such a model. Other models are always called once.

    Returns:
        A `RobustnessReport`. After Ctrl-C, it is a report on the examples before the
        first one that an attack has not finished. Later ones are left out: of those,
        the fooled examples are finished first, so that counting them would give too low
        an accuracy.

    Raises:
        RuntimeError: It is called inside a `tf.function`.
        TypeError: An argument has the wrong type.
        ValueError: The model gives no class scores or is compiled for regression,
            labels do not fit it, data lies outside an attack's clip range, a radius is
            negative or larger than the range, or an attack is targeted.
        KeyboardInterrupt: Ctrl-C came before all attacks had finished one example.

    Example:
    >>> report = advreg.evaluate_robustness(
    ...     model, x_test, y_test, epsilons=[0.05, 0.1, 0.2], attacks=[
    ...         attacks.FGSM(epsilon=0.1, clip_value_min=0.0, clip_value_max=1.0),
    ...         attacks.AutoAttack(epsilon=0.1, clip_value_min=0.0, clip_value_max=1.0),
    ...     ])
    >>> print(report)
    """
    backend.check_outside_of_scope("`evaluate_robustness`")
    check_runs_eagerly("`evaluate_robustness`")
    check_count("batch_size", batch_size)
    check_draws(draws)
    if verbose not in ("auto", 0, 1, 2):
        raise ValueError(
            f"`verbose` must be 'auto', 0, 1 or 2. Received: {brief(verbose)}"
        )
    began = time.perf_counter()
    listed = listed_attacks(attacks)
    runs = [
        AttackRun(at_radius, model, name, batch_size, from_logits, draws)
        for attack, name in zip(listed, unique_names(listed), strict=True)
        for at_radius in at_radii(attack, epsilons)
    ]
    evaluation = EvaluationRun(
        classifier(model, from_logits), runs, diagnostics.SAMPLE, draws
    )
    checks: list[Check] = []
    complete = False
    try:
        evaluation.read(x, y, batch_size, verbose)
        complete = True
        for check in diagnostics.check(
            model, evaluation, runs, batch_size, from_logits
        ):
            checks.append(check)
    except KeyboardInterrupt:
        if not evaluation.decided():
            raise KeyboardInterrupt(
                "Ctrl-C came before all attacks had finished one example: there is no "
                "report."
            ) from None
        made = {check.name for check in checks}
        checks += [
            c
            for c in diagnostics.checks_without_attacks(evaluation, runs)
            if c.name not in made
        ]
        checks.append(Check(INTERRUPTED, None, "Ctrl-C came before the other checks."))
    seconds = time.perf_counter() - began
    return _report(model, evaluation, runs, tuple(checks), seconds, complete)


def check_draws(draws: Any) -> None:
    """Checks the number of draws.

    Raises:
        ValueError: It is less than 1, or more than 255.
    """
    if draws is not None and check_count("draws", draws) > _MOST_DRAWS:
        raise ValueError(f"`draws` must be at most {_MOST_DRAWS}. Received: {draws!r}")


def _report(
    model: keras.Model,
    evaluation: EvaluationRun,
    runs: Sequence[AttackRun],
    checks: tuple[Check, ...],
    seconds: float,
    complete: bool,
) -> RobustnessReport:
    """Makes the report of finished runs.

    Args:
        model: The model.
        evaluation: The pass over the data.
        runs: The runs.
        checks: The checks that were made.
        seconds: Time of the whole evaluation.
        complete: Whether all data were read.
    """
    examples, draws = evaluation.decided(), evaluation.draws
    index = np.arange(examples)
    chosen, right = evaluation.right_draws(index)

    def worst(endings: Iterable[EndPoints]) -> int:
        """Counts the draws in which examples are right under their worst attack."""
        # For a random model the worst of the attacks is taken, even if by chance the
        # clean example was right in fewer draws.
        lowest = np.full(examples, draws + 1) if evaluation.random else chosen
        lowest, found = lowest.copy(), right.copy()
        for ended in endings:
            seen = ended.examples < examples
            places = ended.examples[seen]
            lower = ended.chosen[seen] < lowest[places]
            places = places[lower]
            lowest[places] = ended.chosen[seen][lower]
            found[places] = ended.right[seen][lower]
        return int(found.sum())

    # A perturbation that lies in a ball counts there, whatever the radius of its
    # attack.
    endings = {
        ball: [ended for run in runs for ended in run.end_points(*ball)]
        for ball in balls(runs)
    }
    worst_cases = tuple(
        Accuracy(
            "worst case", worst(inside), examples, epsilon, norm.value, draws=draws
        )
        for (norm, epsilon), inside in endings.items()
    )
    # The balls of all norms together.
    everywhere = [ended for inside in endings.values() for ended in inside]
    everywhere += [
        ended for run in runs if run.attack.is_bounded for ended in run.end_points()
    ]
    if not endings:
        everywhere = [ended for run in runs for ended in run.end_points()]
    overall = worst(everywhere)
    clean = Accuracy(
        "clean", int(right.sum()), examples, seconds=evaluation.seconds, draws=draws
    )
    return RobustnessReport(
        model=model.name,
        clean=clean,
        results=tuple(
            run.result(examples, float(run.shares(index).sum())) for run in runs
        ),
        worst_cases=worst_cases,
        overall=Accuracy("overall", overall, examples, draws=draws),
        threat_model=_threat_model(runs),
        checks=checks,
        seconds=seconds,
        complete=complete,
        features=evaluation.features,
        notes=tuple(_notes(evaluation)),
    )


def _notes(evaluation: EvaluationRun) -> Iterator[str]:
    """Yields facts that a reader of the accuracies must know."""
    said = describe_preprocessing(evaluation.target.base)
    if said is not None:
        yield said
    if evaluation.random:
        yield (
            "The model draws random numbers when it predicts: each accuracy is a mean "
            f"over {evaluation.draws} draw{'s' * (evaluation.draws > 1)}, and attacks "
            "follow the mean of as many gradients (expectation over transformation)."
        )


def _threat_model(runs: Sequence[AttackRun]) -> str:
    """Returns the description of what the attacks were allowed to do."""
    radii: dict[str, float] = {}
    for norm, epsilon in balls(runs):
        radii[norm.value] = max(epsilon, radii.get(norm.value, 0.0))
    ranges = {
        (_shown(run.attack.clip_value_min), _shown(run.attack.clip_value_max))
        for run in runs
    }
    names = {run.name: run for run in runs}

    def which(rule: Callable[[AttackRun], bool]) -> list[str]:
        return [name for name, run in names.items() if rule(run)]

    return in_words(
        radii,
        ranges,
        white_box=which(lambda run: run.white_box),
        black_box=which(lambda run: not run.may_follow_gradient),
        unbounded=which(lambda run: run.norm is None and not run.attack.is_bounded),
        most_changes=max(
            (
                run.attack.max_changes
                for run in runs
                if isinstance(run.attack, Substitution)
            ),
            default=0,
        ),
    )


def _shown(end: Any) -> str:
    """Formats an end of the clip range."""
    if end is None:
        return ""
    return f"{end:g}" if is_number(end) else OF_EACH_FEATURE
