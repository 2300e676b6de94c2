"""What advreg costs beside its peers: the same work on the same data, side by side.

The sides are plain Keras, a hand-written minimal loop, NSL 1.4.0, ART 1.20, Foolbox
3.3, CleverHans 4 (on its TensorFlow 2), and a loop in PyTorch as its tutorials write
it. Each runs in a process of its own, and in an environment of its own that is made by
pip where it is missing (`environments.py`). All start from the same weights, and none
is timed unless its logits are those of plain Keras to 1e-4.

The sides take turns, each time in another order, so that a machine whose speed drifts
slows all of them. A ratio is the median over the turns of advreg's time to the peer's
in that turn, with its quartiles. All sides have as many threads, and the same cores.

    python benchmarks/compare.py [--only step/mnist evaluate] [--json FILE]
    python benchmarks/compare.py --quick        # that everything runs
    python benchmarks/compare.py --curves       # cost against one quantity at a time
    python benchmarks/compare.py --list         # the names for --only

The work:

- `step`: a step of training as `fit` makes it, tracing left out, on the tutorial's
  network for MNIST, a small ResNet with batch normalisation and a perceptron. Plain
  Keras trains on clean examples alone. ART's `AdversarialTrainer` replaces the batch by
  its perturbed examples, which makes as many passes; `art_compiled` is ART with a step
  of training that the user compiled, which it traces anew in each batch otherwise.
- `evaluate`, `predict`: of a compiled model, on random images.
- `first step`: compiling, tracing and making a step by `fit`, in a new process.
- `memory`: the most that a new process has held after five steps, Python and
  TensorFlow included.
- `attack`: PGD-20 and AutoAttack on test images of MNIST, or of scikit-learn's digits
  where MNIST is not there, against the same plainly trained network. What an attack
  traces for a network that it has not seen is counted. The table has the accuracy that
  each side leaves: a ratio counts at equal accuracy only.

The works on the tutorial's network are that of the tutorial on random images, but for
the attacks; the last numbers of a name are the radius, if it is not 0.2, and the batch.

MNIST comes from TensorFlow Datasets, which `python -m pip install -e ".[demo]"` brings.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import environments
from peers import works
from peers.curves import curves, described
from peers.protocol import Worker, WorkerError
from peers.ratios import quartiles, ratios

from advreg.tables import text_table

BENCHMARKS = pathlib.Path(__file__).parent
LOGITS = 1e-4
SECONDS_OF_A_TURN = 0.3


@dataclasses.dataclass
class Sides:
    """The workers, and the files that they share.

    Args:
        pythons: The interpreter of each side that can run.
        folder: Where files and logs are written.
        settings: The options of the command line.
    """

    pythons: dict
    folder: pathlib.Path
    settings: argparse.Namespace
    running: dict = dataclasses.field(default_factory=dict)
    files: dict = dataclasses.field(default_factory=dict)
    versions: dict = dataclasses.field(default_factory=dict)

    def start(self, side):
        """Starts a worker."""
        command = [
            *(self.pythons[side], "-u", BENCHMARKS / "compare_worker.py"),
            *(side, self.settings.threads),
        ]
        return Worker(command, self.folder / f"{side}.log", variables(side))

    def worker(self, side):
        """The worker of a side, which is started unless it runs."""
        if side not in self.running:
            worker = self.running[side] = self.start(side)
            self.versions[side] = worker.ask("hello")["versions"]
        return self.running[side]

    def file(self, work):
        """The file that the sides of a work share: its path, and what it holds."""
        network, sizes = work.job["network"], work.job.get("sizes", {})
        key = (network, json.dumps(sizes), work.trained)
        if key not in self.files:
            wanted = {"network": network, "sizes": sizes}
            if work.trained:
                kept = str(BENCHMARKS / "networks")
                trained = {"epochs": self.settings.epochs, "folder": kept}
                wanted |= {"examples": self.settings.images, "trained": trained}
            else:
                wanted |= {"examples": max(1024, self.settings.evaluated)}
            path = str(self.folder / f"{len(self.files)}.npz")
            told = self.worker("plain").ask("make", path=path, **wanted)
            self.files[key] = path, told
        return self.files[key]

    def keep(self, needed):
        """Ends the workers that nothing needs any more."""
        for side in set(self.running) - set(needed):
            self.running.pop(side).close()

    def close(self):
        """Ends all workers."""
        self.keep(())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def variables(side):
    """The environment variables of a side."""
    found = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    path = found.pop("PYTHONPATH", None)
    if works.SIDES[side] is None:  # The others must not find what is here.
        own = str(BENCHMARKS.parent)
        found["PYTHONPATH"] = os.pathsep.join([own, path]) if path else own
    return found


def prepare(names):
    """The interpreters of sides, and why others have none."""
    known, pythons, failures = environments.known(), {}, []
    for side in names:
        environment = works.SIDES[side]
        try:
            pythons[side] = (
                sys.executable
                if environment is None
                else environments.prepare(known[environment])
            )
        except environments.EnvironmentError as error:
            failures.append(f"{side}: {error}")
    return pythons, failures


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
    values = {
        side: [per_unit(a, work) for a in found] for side, found in answers.items()
    }
    accuracy = {
        side: statistics.median(answer["accuracy"] for answer in found)
        for side, found in answers.items()
        if "accuracy" in found[0]
    }
    result = {
        "work": work.name,
        "measure": work.measure,
        "job": work.job,
        "data": told,
        "counts": {side: found[0]["count"] for side, found in answers.items()},
        "values": values,
        "accuracy": accuracy,
        "ratios": {
            side: ratios(values["advreg"], values[side])
            for side in values
            if side != "advreg"
        },
    }
    if work.fresh:
        result["peak before"] = {
            side: [answer["before"] for answer in found]
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
    answers = {side: [] for side in names}
    for turn in range(sides.settings.turns or work.turns):
        for side in rotated(names, turn):
            answer = attempt(side, "run", job=identity, count=counts[side])
            if answer is not None:
                answers[side].append({**answer, "count": counts[side]})
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
        for side in rotated(tuple(answers), turn):
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


def rotated(names, turn):
    """The order of the sides in a turn."""
    start = turn % max(1, len(names))
    return [*names[start:], *names[:start]]


def table_of(result):
    """The table of a work, a line for each peer."""
    unit, scale, digits = UNITS[unit_of(result)]
    own = statistics.median(result["values"]["advreg"]) * scale
    accuracy = result["accuracy"]
    head = (result["work"], f"its {unit}", f"advreg {unit}", "advreg/it", "quartiles")
    rows = []
    for peer, (low, median, high) in result["ratios"].items():
        theirs = statistics.median(result["values"][peer]) * scale
        row = (peer, f"{theirs:.{digits}f}", f"{own:.{digits}f}", f"{median:.3f}")
        row = (*row, f"{low:.3f}–{high:.3f}")
        if accuracy:
            row = (*row, f"{accuracy[peer]:.4f}", f"{accuracy['advreg']:.4f}")
        rows.append(row)
    if accuracy:
        head = (*head, "its accuracy", "advreg's")
    return text_table(head, rows)


UNITS = {"peak": ("MB", 1e-6, 0), "step": ("ms", 1e3, 2), "whole": ("s", 1, 2)}


def unit_of(result):
    if result["measure"] == "peak":
        return "peak"
    return "step" if result["job"]["kind"] == "step" else "whole"


def targets_table(results):
    """The targets, what was measured, and whether they are met, as JSON can hold it."""
    by_name = {result["work"]: result for result in results}
    for target in works.TARGETS:
        ratio, told = works.verdict(target, by_name.get(target.work))
        yield {**dataclasses.asdict(target), "measured": ratio, "met": told}


def print_targets(found):
    rows = [
        (
            line["work"],
            line["peer"],
            str(line["most"]),
            "" if line["measured"] is None else f"{line['measured']:.3f}",
            line["met"],
        )
        for line in found
    ]
    print(text_table(("target", "peer", "at most", "measured", "met"), rows))


def measure_curve(sides, curve):
    """Measures the points of a curve in turns, and describes it."""
    worker, jobs = sides.worker("advreg"), []
    for number, (_, _, job) in enumerate(curve.points):
        name = f"{curve.name}/{number}"
        path, _ = sides.file(works.Work(name, (), job, 0))
        worker.ask("set_up", job=name, **job, file=path)
        for _ in range(3):
            last = worker.ask("run", job=name, count=1)
        jobs.append((name, steps_of_a_turn(last["seconds"]), []))
    for turn in range(sides.settings.turns or 10):
        for name, count, values in rotated(jobs, turn):
            seconds = worker.ask("run", job=name, count=count)["seconds"]
            values.append(seconds / count * 1e3)
    for name, _, _ in jobs:
        worker.ask("drop", job=name)
    found = described(curve, [statistics.median(values) for *_, values in jobs])
    for point, (*_, values) in zip(found["points"], jobs, strict=True):
        point["quartiles of ms"] = quartiles(values)
    return found


def print_curve(found):
    name = found["curve"]
    rows = [
        (
            str(point[name]),
            f"{point['ms per step']:.2f}",
            "{0:.2f}–{2:.2f}".format(*point["quartiles of ms"]),
            f"{point['µs per example']:.1f}",
        )
        for point in found["points"]
    ]
    head = (name, "ms per step", "quartiles", "µs per example")
    print(f"\n{text_table(head, rows)}")
    print(
        f"{found['ms at 0']:.3g} ms + {found['ms per unit']:.3g} ms × "
        f"{found['straight in']}: no step is further from this line than "
        f"{found['largest residual']:.0%} of its time",
        flush=True,
    )


def machine(threads):
    """What the figures depend on besides the code."""
    command = ["git", "-C", str(BENCHMARKS), "describe", "--always", "--dirty"]
    commit = None
    with contextlib.suppress(OSError):
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": platform.platform(),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "commit": commit,
    }


def processor():
    """The name of the processor, where the system tells it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def chosen(settings):
    """The works that the options ask for."""
    batches = settings.batch
    every = [
        *works.training_steps(batches),
        *works.evaluations(batches, settings.evaluated),
        *works.predictions(batches, settings.evaluated),
        *works.first_steps(batches),
        *works.memory(batches),
        *works.attacks(settings.images, settings.hard_images),
    ]
    return [work for work in every if is_chosen(work.name, settings.only)]


def is_chosen(name, only):
    """Whether a name has one of the parts, or there are none."""
    return not only or any(part in name for part in only)


def parse(arguments=None):
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="parts of the names of works")
    parser.add_argument(
        "--sides", nargs="+", choices=works.SIDES, metavar="SIDE", help="some sides"
    )
    parser.add_argument("--batch", type=positive, nargs="+", default=works.BATCHES)
    parser.add_argument("--turns", type=positive, help="turns of each work")
    parser.add_argument(
        "--images", type=positive, help="images for PGD-20 (default: 2000)"
    )
    parser.add_argument(
        "--hard-images", type=positive, help="images for AutoAttack (default: 200)"
    )
    parser.add_argument(
        "--evaluated", type=positive, help="images for `evaluate` (default: 4096)"
    )
    parser.add_argument(
        "--epochs", type=positive, help="training of the attacked network (default: 5)"
    )
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--quick", action="store_true", help="small sizes, two turns")
    parser.add_argument("--curves", action="store_true", help="curves, not the table")
    parser.add_argument("--list", action="store_true", help="the names of the works")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE")
    settings = parser.parse_args(arguments)
    quick = {"images": 100, "hard_images": 10, "evaluated": 512, "epochs": 1}
    full = {"images": 2000, "hard_images": 200, "evaluated": 4096, "epochs": 5}
    for name, value in (quick if settings.quick else full).items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)
    if settings.quick and settings.turns is None:
        settings.turns = 2
    if settings.hard_images > settings.images:
        parser.error(
            f"`--hard-images` must be at most `--images`, {settings.images}. "
            f"Received: {settings.hard_images}"
        )
    return settings


def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1. Received: {number}")
    return number


def compare(sides, wanted, failures):
    """Measures works one after the other, and prints the rows of each."""
    results = []
    for number, work in enumerate(wanted):
        names = [name for name in work.sides if name in sides.pythons]
        try:
            result, failed = measure(sides, work, names)
        except WorkerError as error:
            result, failed = None, [f"{work.name}: {error}"]
        failures.extend(failed)
        if result is not None:
            results.append(result)
            print(f"{table_of(result)}\n", flush=True)
        needed = {name for later in wanted[number + 1 :] for name in later.sides}
        sides.keep({*needed, "plain"})
    return results


def main():
    settings = parse()
    wanted = [] if settings.curves else chosen(settings)
    if settings.list:
        print(*(work.name for work in wanted), sep="\n")
        return
    if not wanted and not settings.curves:
        sys.exit(
            "`--only` must be parts of names that `--list` prints. "
            f"Received: {' '.join(settings.only)}"
        )
    needed = {name for work in wanted for name in work.sides} | {"advreg", "plain"}
    if settings.sides:
        needed &= {*settings.sides, "advreg", "plain"}
    pythons, failures = prepare([name for name in works.SIDES if name in needed])
    found = {"machine": machine(settings.threads)}
    with (
        tempfile.TemporaryDirectory() as folder,
        Sides(pythons, pathlib.Path(folder), settings) as sides,
    ):
        if settings.curves:
            found["curves"] = []
            for curve in curves():
                if is_chosen(curve.name, settings.only):
                    found["curves"].append(measure_curve(sides, curve))
                    print_curve(found["curves"][-1])
        else:
            found["works"] = compare(sides, wanted, failures)
            found["targets"] = list(targets_table(found["works"]))
            print_targets(found["targets"])
        found["versions"] = sides.versions
    found["failures"] = failures
    if settings.json:
        settings.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    told = [f"{name}: {value}" for name, value in found["machine"].items()]
    print(f"\n{'; '.join(told)}")
    for failure in failures:
        print(f"\nFailed: {failure}", file=sys.stderr)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
