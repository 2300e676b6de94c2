"""Runs solvers on a problem, batch by batch, on the rows that are not yet fooled.

`run` runs one solver from one start. Each step evaluates the model at the present
displacements of all rows. This one forward and backward pass does two things: it says
which rows are fooled there, and it gives the gradient for the next step. So k steps
cost k passes, and one more evaluation at the end.

The loop is Python's, not TensorFlow's, because rows drop out between steps. One
compiled function serves all steps, batches and radii: the number of the step and the
radius are its arguments.

`Pipeline` runs several solvers one after another: the restarts of PGD, or the parts of
AutoAttack. Late solvers get few rows of each batch. So rows wait until there are enough
for a full batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from advreg import backend
from advreg._types import Features, Tensor
from advreg.attacks.engine.problem import Problem
from advreg.attacks.engine.rows import (
    INPUTS,
    Batch,
    Result,
    concat_rows,
    gather_rows,
    num_rows,
    only,
    rows_to_keep,
    same_signature,
)
from advreg.attacks.engine.solver import Evaluation, Scalars, Solver
from advreg.network.gradients import value_and_gradients
from advreg.network.precision import Precision


def run(
    solver: Solver,
    problem: Problem,
    batch: Batch,
    seed: keras.random.SeedGenerator,
    batch_size: int = 0,
) -> Result:
    """Runs a solver from one start.

    Args:
        solver: The `Solver`.
        problem: The model, and the threat model.
        batch: `features`, and `classes` or `labels`: tensors.
        seed: The generator of random starts.
        batch_size: Number of rows of a full batch, 0 if no other batch is larger.

    Returns:
        A `Result` with a row for each row of the batch.
    """
    target, epsilon = problem.target, problem.threat_model.epsilon
    count = num_rows(batch)
    place = np.arange(count)  # For each row of the state, its row in `batch`.
    # The start is not compiled. So on JAX it is made for a full batch, because each
    # operation would be compiled for each number of rows.
    padding = backend.padding(count, batch_size)
    start = solver.init(problem, gather_rows(batch, padding), seed)
    state = {**batch, **gather_rows(start, None if padding is None else place)}
    scalars = {
        name: ops.convert_to_tensor(value, backend.widest_float())
        for name, value in {**solver.scalars(epsilon), "epsilon": epsilon}.items()
    }
    scalars["index"] = ops.convert_to_tensor(0, "int32")
    displacement = ops.convert_to_numpy(state["displacement"])
    result = Result(
        np.zeros(count, bool),
        np.zeros_like(displacement),
        np.full(count, -np.inf),
        np.zeros(count, bool),
    )
    # A solver without steps is only judged at its start.
    step = _compiled_step(solver, problem, state, scalars) if solver.steps else None
    for index in range(solver.steps):
        scalars["index"] = ops.convert_to_tensor(index, "int32")
        assert step is not None
        (fooled, not_finite), moved = step(state, scalars)
        target.evaluations += len(place) * target.draws
        there = state["displacement"]  # Where the rows were evaluated, before the step.
        state = {**state, **moved}
        if not problem.drops_out:
            continue
        # Fooled rows that only fill up the batch stay in the state, and may be fooled
        # again. Their first result counts.
        newly_fooled = np.flatnonzero(
            ops.convert_to_numpy(fooled) & ~result.fooled[place]
        )
        if not len(newly_fooled):
            continue
        out = place[newly_fooled]
        result.displacement[out] = ops.convert_to_numpy(
            backend.gather(there, newly_fooled)
        )
        result.fooled[out], result.closeness[out] = True, np.inf
        result.not_finite[out] = ops.convert_to_numpy(not_finite)[newly_fooled]
        if result.fooled.all():
            return result
        kept = rows_to_keep(result.fooled[place], count)
        if len(kept) < len(place):
            place, state = place[kept], gather_rows(state, kept)
    # The rows that are left have taken a step since their last evaluation.
    target.evaluations += len(place) * target.draws
    judge = _compiled_judge(solver, problem, state)
    fooled, not_finite, closeness = judge(state, scalars["epsilon"])
    last = np.flatnonzero(~result.fooled[place])
    out = place[last]
    result.closeness[out] = ops.convert_to_numpy(closeness)[last]
    result.fooled[out] = ops.convert_to_numpy(fooled)[last]
    result.not_finite[out] = ops.convert_to_numpy(not_finite)[last]
    result.displacement[out] = ops.convert_to_numpy(
        backend.gather(state["displacement"], last)
    )
    # Two losses of a random model differ by chance, so that its rows are not compared.
    if not problem.classify and not target.random:
        target.evaluations += count * target.draws
        unmoved = {**batch, "displacement": backend.to_tensor(0 * result.displacement)}
        _, _, clean = judge(unmoved, scalars["epsilon"])
        result = _or_unmoved(result, ops.convert_to_numpy(clean))
    return result


def _or_unmoved(result: Result, clean: np.ndarray) -> Result:
    """Returns a result in which rows whose loss has not grown are where they began.

    Args:
        result: Where the rows ended. A loss that is NaN counts as the largest.
        clean: The loss where they began, `[batch]`.
    """
    closeness = np.where(np.isnan(result.closeness), np.inf, result.closeness)
    grown = closeness > clean
    return result._replace(
        displacement=np.where(grown[:, None], result.displacement, 0),
        closeness=np.where(grown, closeness, clean),
    )


def _compiled_step(
    solver: Solver, problem: Problem, state: Batch, scalars: Scalars
) -> Callable:
    """Compiles the evaluation of a batch together with the step that follows it."""
    target, threat_model = problem.target, problem.threat_model

    def step(batch: Batch, scalars: Scalars) -> tuple[tuple[Tensor, Tensor], Batch]:
        ball = threat_model.ball(target, batch["features"], scalars["epsilon"])
        features = ball.perturbed(batch["displacement"])
        precision = Precision(target.base, features)

        def evaluated(features: Features) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            outputs = problem.outputs(features)
            loss = _loss(solver, problem, outputs, batch)
            return loss, problem.fooled(outputs, batch, solver.targeted)

        def evaluate() -> tuple[Tensor, ...]:
            if not solver.uses_gradient:
                loss, judged = evaluated(features)
                return (loss, *judged)
            loss, judged, gradients = value_and_gradients(
                evaluated, features, ball.moving, precision
            )
            return (loss, *judged, ball.gradient(gradients))

        loss, fooled, not_finite, *gradient = target.mean(evaluate)
        found = Evaluation(loss, gradient[0] if gradient else None, ball)
        return (fooled, not_finite), solver.step(found, batch, scalars)

    key = ("step", solver.key(), threat_model.key(), problem.classify)
    return target.compile(key, step, state, scalars, features=state["features"])


def _compiled_judge(solver: Solver, problem: Problem, state: Batch) -> Callable:
    """Compiles the last evaluation of a run: which rows are fooled, and the margin."""
    target, threat_model = problem.target, problem.threat_model

    def judge(batch: Batch, epsilon: Tensor) -> tuple[Tensor, ...]:
        ball = threat_model.ball(target, batch["features"], epsilon)
        features = ball.perturbed(batch["displacement"])

        def evaluate() -> tuple[Tensor, ...]:
            outputs = problem.outputs(features)
            judged = problem.fooled(outputs, batch, solver.targeted)
            if problem.classify:
                closeness = problem.margin(outputs, batch, solver.targeted)
            else:
                closeness = _loss(solver, problem, outputs, batch)
            return (*judged, closeness)

        return target.mean(evaluate)

    names = (*INPUTS, "displacement")
    compiled = target.compile(
        ("judge", solver.targeted, threat_model.key(), problem.classify),
        judge,
        only(state, names),
        ops.convert_to_tensor(0.0, backend.widest_float()),
        features=state["features"],
    )
    return lambda batch, epsilon: compiled(only(batch, names), epsilon)


def _loss(solver: Solver, problem: Problem, outputs: Any, batch: Batch) -> Tensor:
    """Computes the loss that a solver maximises, for each row."""
    target = problem.target
    if solver.loss == "model":
        loss = target.compiled_loss(batch["labels"], outputs)
        return -loss if solver.targeted else loss
    return solver.objective(target.known_form.logits(outputs), batch)


class Pipeline:
    """A sequence of solvers, each for the rows that those before it have not fooled.

    Rows wait before each solver until there are enough for a full batch. So late
    solvers run as efficiently as the first, and memory does not grow with the data.

    Args:
        run: Function that runs a solver: it takes a `Solver` and a `Batch`, and returns
            a `Result`.
        solvers: The `Solver`s.
        batch_size: Number of rows of a batch.
        drops_out: Whether rows are finished once they are fooled.
        done: Function that is called with finished rows: their `Batch`, and their
            `Result`.
    """

    def __init__(
        self,
        run: Callable[[Solver, Batch], Result],
        solvers: Sequence[Solver],
        batch_size: int,
        drops_out: bool,
        done: Callable[[Batch, Result], None],
    ) -> None:
        self._run_solver, self._solvers = run, solvers
        self._batch_size, self._drops_out, self._done = batch_size, drops_out, done
        self._waiting: list[list[tuple[Batch, Result | None]]] = [[] for _ in solvers]

    def feed(self, batch: Batch) -> None:
        """Adds rows to those that wait before the first solver.

        Args:
            batch: `features`, and `classes` or `labels`, which solvers get. Other
                entries are passed on to `done`.
        """
        self._push(0, batch, None)

    def flush(self) -> None:
        """Runs all rows that wait, also in batches that are not full."""
        for stage in range(len(self._solvers)):
            while self._waiting[stage]:
                self._run(stage)

    def _push(self, stage: int, batch: Batch, before: Result | None) -> None:
        waiting = self._waiting[stage]
        if waiting and not same_signature(waiting[-1][0], batch):
            self._run(stage)  # Sequences of another length need a batch of their own.
        waiting.append((batch, before))
        while sum(num_rows(rows) for rows, _ in waiting) >= self._batch_size:
            self._run(stage)

    def _run(self, stage: int) -> None:
        """Runs the next batch that waits before a solver."""
        batch, before = self._next_batch(stage)
        result = self._run_solver(self._solvers[stage], only(batch, INPUTS))
        if before is not None:  # The best of all solvers so far counts.
            result = result.best_of(before)
        ended = result.fooled & self._drops_out
        if stage + 1 == len(self._solvers):
            ended[:] = True
        out, on = np.flatnonzero(ended), np.flatnonzero(~ended)
        if len(out):
            self._done(gather_rows(batch, out), result.rows(out))
        if len(on):
            self._push(stage + 1, gather_rows(batch, on), result.rows(on))

    def _next_batch(self, stage: int) -> tuple[Batch, Result | None]:
        """Takes up to `batch_size` rows from those that wait before a solver."""
        waiting = self._waiting[stage]
        batch, before = waiting[0]
        if len(waiting) > 1:
            batch = concat_rows([rows for rows, _ in waiting])
            results = [result for _, result in waiting if result is not None]
            if results:
                before = Result(
                    *(np.concatenate(p) for p in zip(*results, strict=True))
                )
        waiting.clear()
        if num_rows(batch) > self._batch_size:
            now = np.arange(self._batch_size)
            rest = np.arange(self._batch_size, num_rows(batch))
            left = None if before is None else before.rows(rest)
            waiting.append((gather_rows(batch, rest), left))
            batch = gather_rows(batch, now)
            before = None if before is None else before.rows(now)
        return batch, before
