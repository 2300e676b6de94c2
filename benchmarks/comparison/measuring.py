"""Has the sides take turns, and collects what they answer."""

import random
import statistics

from comparison.curves import described
from comparison.protocol import WorkerError
from comparison.ratios import quartiles, ratio
from comparison.works import Work

LOGITS = 1e-4
SECONDS_OF_A_TURN = 0.3


def measure(sides, work, names):
    """Measures a work.

    Args:
        sides: The `Sides`.
        work: The `Work`.
        names: The sides that take part, of those of the work.

    Returns:
        A dictionary that JSON can hold, and the failures.
    """
    # Trained on fewer images there may be fewer to attack.
    path, told = sides.file(work)
    job = {**work.job, "file": path}
    if job.get("examples"):
        job["examples"] = min(job["examples"], told["examples"])
    count = work.count and min(work.count, told["examples"])
    run = fresh_turns if work.fresh else turns
    answers, failures = run(sides, work, names, job, count)
    if "advreg" not in answers:
        return None, failures
    if answers["advreg"][0][work.measure] is None:
        raise WorkerError("nothing tells the memory of a process on this system")
    values = {
        side: [per_unit(a, work) for a in found] for side, found in answers.items()
    }
    accuracy = {
        side: statistics.median(answer["accuracy"] for answer in found)
        for side, found in answers.items()
        if "accuracy" in found[0]
    }
    result = {
        "name": work.name,
        "measure": work.measure,
        "job": work.job,
        "data": told,
        "counts": {side: found[0]["count"] for side, found in answers.items()},
        "values": values,
        "accuracy": accuracy,
        "ratios": {
            side: ratio(values["advreg"], values[side])
            for side in values
            if side != "advreg"
        },
    }
    if all("moved" in found[0] for found in answers.values()):
        result["moved"] = {side: found[0]["moved"] for side, found in answers.items()}
    if work.measure == "peak":
        result["growth"] = {
            side: statistics.median(
                answer["peak"] - answer["before"] for answer in found
            )
            for side, found in answers.items()
        }
    return result, failures


def per_unit(answer, work):
    """What an answer measured: of a step, or of the whole."""
    value = answer[work.measure]
    is_steps = work.measure == "seconds" and work.count is None
    return value / answer["count"] if is_steps else value


def turns(sides, work, names, job, count):
    """What workers that go on answer in each turn, by side, and the failures."""
    failures, names, identity = [], list(names), work.name

    def attempt(side, request, **arguments):
        """Asks a side, which drops out if it fails."""
        try:
            return sides.worker(side).ask(request, **arguments)
        except WorkerError as error:
            names.remove(side)
            failures.append(f"{work.name}: {side}: {error}")
            sides.keep(set(sides.running) - {side})
            return None

    for side in tuple(names):
        if attempt(side, "set_up", job=identity, **job) is None:
            continue
        checked = attempt(side, "check", job=identity)
        # NaN is no agreement.
        if checked is not None and not checked["difference"] <= LOGITS:
            names.remove(side)
            failures.append(
                f"{work.name}: {side}: its logits must be those of plain Keras to "
                f"{LOGITS}. Received: a difference of {checked['difference']:.2g}"
            )
    counts = dict.fromkeys(names, count)
    for some in work.warm:
        for side in tuple(names):
            answer = attempt(side, "run", job=identity, count=some)
            if count is None and answer is not None:
                counts[side] = steps_of_a_turn(answer["seconds"])
    moved = {}
    if job["kind"] == "step":
        for side in tuple(names):
            moved[side] = attempt(side, "check", job=identity)
    answers = {side: [] for side in names}
    for turn in range(sides.settings.turns or work.turns):
        for side in order(names, turn):
            answer = attempt(side, "run", job=identity, count=counts[side])
            if answer is not None:
                answer["count"] = counts[side]
                if side in moved:
                    answer["moved"] = moved[side]["difference"]
                answers[side].append(answer)
    for side in tuple(names):
        attempt(side, "drop", job=identity)
    return {side: answers[side] for side in names}, failures


def steps_of_a_turn(seconds):
    """As many steps as a turn is long, of so many seconds each."""
    return max(1, min(200, round(SECONDS_OF_A_TURN / seconds)))


def fresh_turns(sides, work, names, job, count):
    """What new processes answer in each turn, by side, and the failures."""
    answers, failures = {side: [] for side in names}, []
    for turn in range(sides.settings.turns or work.turns):
        for side in order(answers, turn):
            try:
                with sides.start(side) as worker:
                    versions = worker.ask("hello")["versions"]
                    sides.versions[side] = versions
                    before = worker.ask("set_up", job=work.name, **job)["peak"]
                    answer = worker.ask("run", job=work.name, count=count)
            except WorkerError as error:
                del answers[side]
                failures.append(f"{work.name}: {side}: {error}")
            else:
                answers[side].append({**answer, "before": before, "count": count})
    return answers, failures


def order(names, turn):
    """The order of the sides in a turn: another one in each, the same in each run."""
    return random.Random(turn).sample(list(names), len(names))


def measure_curve(sides, curve):
    """Measures the points of a curve in turns, and describes it."""
    worker, jobs = sides.worker("advreg"), []
    for number, (_, _, job) in enumerate(curve.points):
        name = f"{curve.name}/{number}"
        path, _ = sides.file(Work(name, (), job, 0))
        worker.ask("set_up", job=name, **job, file=path)
        for _ in range(3):
            last = worker.ask("run", job=name, count=1)
        jobs.append((name, steps_of_a_turn(last["seconds"]), []))
    for turn in range(sides.settings.turns or 10):
        for name, count, values in order(jobs, turn):
            seconds = worker.ask("run", job=name, count=count)["seconds"]
            values.append(seconds / count * 1e3)
    for name, _, _ in jobs:
        worker.ask("drop", job=name)
    found = described(curve, [statistics.median(values) for *_, values in jobs])
    for point, (*_, values) in zip(found["points"], jobs, strict=True):
        point["quartiles of ms"] = quartiles(values)
    return found
