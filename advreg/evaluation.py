"""Robust accuracy that can be trusted: attacks, the worst case, and honest checks."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from advreg import honesty
from advreg.attacks.base import Attack
from advreg.attacks.engine import Rows, fit, join, size, take
from advreg.attacks.losses import cross_entropy
from advreg.attacks.transfer import Transfer
from advreg.attacks.victim import Victim
from advreg.checks import count, is_number, length, show
from advreg.distribution import check_outside_of_scope
from advreg.geometry import Tensor
from advreg.packing import Features
from advreg.perturbation import differentiable, select
from advreg.report import (
    INTERRUPTED,
    OF_EACH_FEATURE,
    Accuracy,
    Check,
    RobustnessReport,
    in_words,
)
from advreg.trials import STANDS, UNKNOWN, Marks, Trial, balls, sample


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
) -> RobustnessReport:
    """Measures how accurate a classifier stays under attack, and says if that is sure.

    Every attack meets every example that the model gets right, at every radius.
    Examples that are fooled are left alone from then on, and the others gathered into
    full batches again. The data is read once, batch by batch: memory does not grow
    with it, but for some bytes per example.

    At the end the checks of [Carlini et al., 2019](https://arxiv.org/abs/1902.06705)
    look for signs that the attacks were too weak, on 256 examples drawn at random from
    those that the model gets right. What they find are the report's `warnings`.

    Args:
        model: A Keras 3 model that gives class scores, wrapped or not, compiled or
            not. It runs in inference mode, and nothing of it changes.
        x: The data, in any form that `evaluate` takes: arrays or structures of them, a
            `tf.data.Dataset`, a `PyDataset`, a generator that ends. Sample weights in
            it count nothing.
        y: Labels, where they are not in `x`: class numbers or one-hot rows.
        attacks: An attack or a list of them: objects of `advreg.attacks`, or any
            callable `attack(model, x, y) -> x_adv`. What such a callable has as
            `name`, `epsilon` and `norm` is reported.
        epsilons: Radii that replace those of all attacks, their step sizes scaling
            along. Attacks without a radius run once.
        batch_size: Number of examples that go through the model at once.
        verbose: `"auto"` or 1 for a progress bar, 2 for one line, 0 for nothing.
        from_logits: Whether the model's outputs are logits rather than probabilities,
            for attacks that do not say. See `advreg.attacks.FGSM` for what `None`
            does.

    Returns:
        A `RobustnessReport`. After Ctrl-C, one of the examples up to the first that
        some attack has not finished: those that it had yet to finish further on are
        the robust ones, so that counting the others would tell too low an accuracy.

    Raises:
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
    check_outside_of_scope("`evaluate_robustness`")
    count("batch_size", batch_size)
    if verbose not in ("auto", 0, 1, 2):
        raise ValueError(f"`verbose` must be 'auto', 0, 1 or 2. Received: {verbose!r}")
    began = time.perf_counter()
    listed = _listed(attacks)
    trials = [
        Trial(at_radius, model, name, batch_size, from_logits)
        for attack, name in zip(listed, _names(listed), strict=True)
        for at_radius in _at_radii(attack, epsilons)
    ]
    survey = Survey(classifier(model, from_logits), trials)
    checks: list[Check] = []
    complete = False
    try:
        survey.read(x, y, batch_size, verbose)
        complete = True
        for check in honesty.check(model, survey, trials, batch_size, from_logits):
            checks.append(check)
    except KeyboardInterrupt:
        if not survey.decided():
            raise
        made = {check.name for check in checks}
        checks += [c for c in honesty.at_hand(survey, trials) if c.name not in made]
        checks.append(Check(INTERRUPTED, None, "Ctrl-C came before the other checks."))
    seconds = time.perf_counter() - began
    return _report(model, survey, trials, tuple(checks), seconds, complete)


class Survey:
    """Reads data once, and lets every trial see what the model gets right.

    Args:
        victim: The model.
        trials: The attacks.
        sample_size: Number of examples to keep, drawn at random from all that the
            model gets right; 0 for none, which saves the gradient too.
    """

    def __init__(
        self,
        victim: Victim,
        trials: Sequence[Trial],
        sample_size: int = honesty.SAMPLE,
    ) -> None:
        self.victim, self._trials, self._sample_size = victim, trials, sample_size
        self.seconds = 0.0
        self.examples = self.flat = self.right = 0
        self.disconnected = False
        self._correct = Marks()
        self._random = np.random.default_rng(0)
        self.sample: Rows | None = None
        self._keys = np.zeros(0)

    def read(self, x: Any, y: Any, batch_size: int, verbose: int | str) -> None:
        """Reads all data, in any form that Keras knows, and ends the trials."""
        batch_size = min(batch_size, self.victim.fixed_batch or batch_size)
        with warnings.catch_warnings():
            # That a generator ends is how its data ends.
            warnings.filterwarnings("ignore", "Your input ran out of data")
            _Reader(self._see).evaluate(x, y, batch_size=batch_size, verbose=verbose)
        if not self.examples:
            raise ValueError(f"`x` must hold examples. Received: {x!r}")
        for trial in self._trials:
            trial.flush()

    def correct(self, index: np.ndarray) -> np.ndarray:
        """Tells which examples the model gets right as they are."""
        return self._correct.get(index) > 0

    def decided(self) -> int:
        """The number of examples before the first that some trial has not ended."""
        index = np.arange(self.examples)
        decided = np.full(self.examples, True)
        for trial in self._trials:
            decided &= trial.status.get(index) != UNKNOWN
        decided |= ~self.correct(index)
        return self.examples if decided.all() else int(np.argmin(decided))

    def _see(self, data: Any) -> dict[str, float]:
        began = time.perf_counter()
        features, y = self.victim.unpack(data)
        form = self.victim.output_form(features)
        classes = self.victim.classes(y, form)
        seen = size(features)
        correct, flat = self._clean(features, classes)
        index = np.arange(self.examples, self.examples + seen)
        self._correct.set(index, correct.astype("uint8"))
        rows = {"features": features, "classes": classes, "labels": y, "index": index}
        right = np.flatnonzero(correct)
        self.seconds += time.perf_counter() - began
        if len(right):
            rows = rows if len(right) == seen else take(rows, right)
            self._keep(rows)
            for trial in self._trials:
                trial.feed(rows)
        self.examples += seen
        self.right += len(right)
        self.flat += int((flat & correct).sum())
        return self._progress()

    def _clean(
        self, features: Features, classes: Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tells what is right, and where the gradient is exactly zero."""
        victim = self.victim
        with_gradient = self._sample_size > 0

        def look(features: Features, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            wanted = differentiable(features, victim.form.fixed_keys)
            leaves = select(features, wanted)
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(leaves)
                outputs = victim.outputs(features)
                loss = cross_entropy(victim.known_form.logits(outputs), classes)
            correct = victim.known_form.predicted(outputs) == classes
            gradients = tape.gradient(loss, leaves) if with_gradient else []
            flat = tf.fill(tf.shape(classes), with_gradient)
            for gradient in gradients:
                if gradient is not None:
                    gradient = tf.convert_to_tensor(gradient)
                    axes = list(range(1, gradient.shape.rank))
                    flat &= tf.reduce_all(tf.equal(gradient, 0), axis=axes)
            return correct, flat, tf.constant(all(g is None for g in gradients))

        key = ("clean", with_gradient)
        compiled = victim.compile(key, look, features, classes)
        correct, flat, disconnected = compiled(features, classes)
        self.disconnected = with_gradient and bool(disconnected)
        return correct.numpy(), flat.numpy()

    def _keep(self, rows: Rows) -> None:
        """Keeps a sample of all rows so far, each as likely as any other."""
        if not self._sample_size:
            return
        keys = self._random.random(size(rows))
        if self.sample is None:
            self.sample, self._keys = sample(rows, keys, self._sample_size)
            return
        if len(self._keys) == self._sample_size:
            better = np.flatnonzero(keys < self._keys.max())
            rows, keys = take(rows, better), keys[better]
        if len(keys) and fit(self.sample, rows):
            joined = join([self.sample, rows])
            keys = np.concatenate([self._keys, keys])
            self.sample, self._keys = sample(joined, keys, self._sample_size)

    def _progress(self) -> dict[str, float]:
        """What the progress bar shows: accuracies on what has been decided so far."""
        clean = self.right / self.examples
        shown = {"clean": clean}
        for trial in self._trials:
            if trial.stands + trial.fooled:
                share = trial.stands / (trial.stands + trial.fooled)
                shown[_label(trial)] = clean * share
        return shown


class _Reader(keras.Model):
    """Lets Keras bring data of any form, batch by batch, with its progress bar."""

    def __init__(self, see: Callable[[Any], dict[str, float]]) -> None:
        super().__init__(name="evaluate_robustness")
        self._see = see
        self.built = True
        self.compile(run_eagerly=True)

    def test_step(self, data: Any) -> dict[str, float]:
        """Hands on a batch."""
        return self._see(data)


def classifier(model: keras.Model, from_logits: bool | None) -> Victim:
    """Checks that accuracy is what to ask of a model, and sets it up as a victim."""
    victim = Victim(model, from_logits)
    if victim.fits_values:
        raise ValueError(
            "`model` must be a classifier: its loss is one of regression, which knows "
            "no accuracy. If the outputs are class scores even so, compile the model "
            f"with a loss of classification. Received: loss={model.loss!r}"
        )
    return victim


def _listed(attacks: Any) -> list[Any]:
    """Checks attacks, and makes a list of one."""
    found = list(attacks) if isinstance(attacks, (list, tuple)) else [attacks]
    for attack in found:
        if isinstance(attack, type) or not callable(attack):
            raise TypeError(
                "`attacks` must be attacks, such as `advreg.attacks.PGD(epsilon=0.1)`, "
                "or a list of them; not their classes or names. Received: "
                f"{attack!r} (of type {type(attack).__name__})"
            )
        if getattr(attack, "targeted", False):
            raise ValueError(
                "`attacks` must not be targeted: a robust accuracy counts whatever an "
                "example is mistaken for. Call a targeted attack with the targets, "
                f"`x_adv = attack(model, x, targets)`. Received: {attack!r}"
            )
    if not found:
        raise ValueError("`attacks` must name one attack at least. Received: none")
    return found


def _at_radii(attack: Any, epsilons: Any) -> list[Any]:
    """Sets an attack that has a radius to each of the radii."""
    if epsilons is None:
        return [attack]
    if is_number(epsilons) or isinstance(epsilons, (str, bytes)):
        epsilons = [epsilons]
    if not isinstance(epsilons, Iterable):
        raise TypeError(
            f"`epsilons` must be a sequence of radii. Received: {show(epsilons)}"
        )
    radii = list(epsilons)
    if not radii:
        raise ValueError("`epsilons` must hold one radius at least. Received: none")
    radii = sorted({length("epsilons", radius) for radius in radii})
    if getattr(attack, "epsilon", None) is None or not hasattr(attack, "with_epsilon"):
        return [attack]
    return [attack.with_epsilon(radius) for radius in radii]


def _names(attacks: Sequence[Any]) -> list[str]:
    """Names attacks so that no two share a name that differ in more than the ball."""
    known: dict[str, list[str]] = {}
    names = []
    for attack in attacks:
        name = getattr(attack, "name", None) or getattr(attack, "__name__", None)
        name = str(name or type(attack).__name__)
        settings = _settings_but_ball(attack)
        others = known.setdefault(f"{name} {getattr(attack, 'norm', None)}", [])
        if settings not in others:
            others.append(settings)
        place = others.index(settings)
        names.append(name if not place else f"{name} ({place + 1})")
    return names


def _settings_but_ball(attack: Any) -> str:
    if isinstance(attack, Transfer):
        return f"{_settings_but_ball(attack.attack)} on {id(attack.source_model)}"
    if not isinstance(attack, Attack):
        return repr(attack)
    settings = {
        field.name: repr(getattr(attack, field.name))
        for field in dataclasses.fields(attack)
        if field.name not in ("epsilon", "norm", "step_size")
    }
    step_size = getattr(attack, "step_size", None)
    if step_size is not None and attack.epsilon:
        settings["step_size"] = f"{step_size / attack.epsilon:.6g}"
    return repr(settings)


def _label(trial: Trial) -> str:
    """What the progress bar calls a trial."""
    norm = "" if trial.norm is None else trial.norm.symbol
    radius = "" if trial.epsilon is None else f"{trial.epsilon:.3g}"
    return " ".join(part for part in (trial.name, norm, radius) if part)


def _report(
    model: keras.Model,
    survey: Survey,
    trials: Sequence[Trial],
    checks: tuple[Check, ...],
    seconds: float,
    complete: bool,
) -> RobustnessReport:
    examples = survey.decided()
    correct = survey.correct(np.arange(examples))

    def stands(trial: Trial) -> int:
        return int((trial.status.get(np.arange(examples)) == STANDS).sum())

    def without(fallen: Sequence[np.ndarray]) -> int:
        """Number of examples that are right and have not fallen."""
        left = correct.copy()
        for index in fallen:
            left[index[index < examples]] = False
        return int(left.sum())

    # What falls in a ball falls in it, whatever radius the attack had, if any.
    fallen = {ball: [trial.fallen(*ball) for trial in trials] for ball in balls(trials)}
    worst_cases = tuple(
        Accuracy("worst case", without(index), examples, epsilon, norm.value)
        for (norm, epsilon), index in fallen.items()
    )
    everywhere = [index for ball in fallen.values() for index in ball]
    overall = without(everywhere or [trial.fallen() for trial in trials])
    return RobustnessReport(
        model=model.name,
        clean=Accuracy("clean", int(correct.sum()), examples, seconds=survey.seconds),
        results=tuple(trial.result(examples, stands(trial)) for trial in trials),
        worst_cases=worst_cases,
        overall=Accuracy("overall", overall, examples),
        threat_model=_threat_model(trials),
        checks=checks,
        seconds=seconds,
        complete=complete,
    )


def _threat_model(trials: Sequence[Trial]) -> str:
    radii: dict[str, float] = {}
    for norm, epsilon in balls(trials):
        radii[norm.value] = max(epsilon, radii.get(norm.value, 0.0))
    ranges = {
        (_shown(trial.attack, "clip_value_min"), _shown(trial.attack, "clip_value_max"))
        for trial in trials
    }
    names = {trial.name: trial for trial in trials}

    def which(rule: Callable[[Trial], bool]) -> list[str]:
        return [name for name, trial in names.items() if rule(trial)]

    return in_words(
        radii,
        ranges,
        white_box=which(lambda trial: trial.white_box),
        black_box=which(lambda trial: not trial.may_follow_gradient),
        unbounded=which(lambda trial: trial.norm is None),
    )


def _shown(attack: Any, name: str) -> str:
    value = getattr(attack, name, None)
    if value is None:
        return ""
    return f"{value:g}" if is_number(value) else OF_EACH_FEATURE
