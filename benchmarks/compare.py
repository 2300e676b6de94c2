"""What advreg costs beside its peers: the same work on the same data, side by side.

The sides are plain Keras, a hand-written minimal loop, NSL 1.4.0, ART 1.20, Foolbox
3.3, CleverHans 4 (on its TensorFlow 2), and a loop in PyTorch as its tutorials write
it; and `plain_nsl`, Keras alone in NSL's environment. Each runs in a process of its
own, and in an environment of its own that is made by pip where it is missing
(`environments.py`). All start from the same weights, and of those that go on from turn
to turn none is timed unless its logits are those of plain Keras to 1e-4.

The sides take turns, each time in another order, so that a machine whose speed drifts
slows all of them. A ratio is that of advreg's median to the peer's; the quartiles are
those of the ratios within the turns. All sides have as many threads, and on Linux the
same cores.

    python benchmarks/compare.py [--only step/mnist evaluate]
    python benchmarks/compare.py --json FILE    # goes on where it was interrupted
    python benchmarks/compare.py --json FILE --markdown  # also the tables of a page
    python benchmarks/compare.py --quick        # that everything runs
    python benchmarks/compare.py --curves       # cost against one quantity at a time
    python benchmarks/compare.py --list         # the names for --only

The work:

- `step`: a step of training as `fit` makes it, tracing left out, on the tutorial's
  network for MNIST, a small ResNet with batch normalisation and a perceptron. Plain
  Keras trains on clean examples alone. ART's `AdversarialTrainer` replaces the batch by
  its perturbed examples, which makes as many passes; `art_compiled` is ART with a step
  of training that the user compiled, which it traces anew in each batch otherwise. How
  far the three steps of warming up have moved the logits stands in the columns `moved`:
  alike where the arithmetic is alike, which is so of advreg, the loop and NSL, and but
  for how Adam's epsilon is meant of PyTorch. With batch normalisation the attack's own
  passes move the averages of NSL and PyTorch as well.
- `evaluate`, `predict`: of a compiled model, on random images.
- `first-step`: compiling, tracing and making a step by `fit`, in a new process.
- `memory`: the most that a new process has held after five steps, Python and
  TensorFlow included, and its growth since the network was there.
- `attack`: PGD-20 and AutoAttack on test images of MNIST, or of scikit-learn's digits
  where MNIST is not there, against the same plainly trained network. What an attack
  traces for a network that it has not seen is counted. advreg is done with an example
  once it is fooled; `advreg_all_steps` is not, and the peers' PGD is not. ART's
  AutoAttack starts APGD five times and Square five times, and has DeepFool besides;
  advreg's is that of its authors without FAB. The table has the accuracy that each side
  leaves: a ratio counts at equal accuracy only.

The works on the tutorial's network are that of the tutorial on random images, but for
the attacks; the last numbers of a name are the radius, if it is not 0.2, and the batch.

MNIST comes from TensorFlow Datasets, which `python -m pip install -e ".[demo]"` brings.
"""

import argparse
import dataclasses
import os
import pathlib
import signal
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from comparison import kept, pages, works
from comparison.curves import curves
from comparison.machine import commit, load, machine
from comparison.measuring import measure, measure_curve
from comparison.printing import print_curve, print_targets, table_of
from comparison.protocol import WorkerError
from comparison.sides import Sides, prepare

FULL = {"images": 2000, "hard_images": 200, "evaluated": 10000, "epochs": 5}
QUICK = {"images": 100, "hard_images": 10, "evaluated": 512, "epochs": 1}


def targets_table(results, full_size):
    """The targets, what was measured, and whether they are met, as JSON can hold it."""
    by_name = {result["name"]: result for result in results}
    for target in works.TARGETS:
        ratio, told = works.verdict(target, by_name.get(target.work), full_size)
        yield {**dataclasses.asdict(target), "measured": ratio, "met": told}


def all_there_is(settings):
    """The works, or the curves."""
    if settings.curves:
        return curves()
    batches = settings.batch
    return [
        *works.training_steps(batches),
        *works.evaluations(batches, settings.evaluated),
        *works.predictions(batches, settings.evaluated),
        *works.first_steps(batches),
        *works.memory(batches),
        *works.attacks(settings.images, settings.hard_images),
    ]


def chosen(settings):
    """The works, or curves, that the options ask for."""
    every = all_there_is(settings)
    for start in settings.only or ():
        if not any(item.name.startswith(start) for item in every):
            sys.exit(
                "`--only` must be how names begin that `--list` prints. "
                f"Received: {start}"
            )
    starts = tuple(settings.only or [""])
    return [item for item in every if item.name.startswith(starts)]


def parse(arguments=None):
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="how names of works begin")
    parser.add_argument(
        "--sides", nargs="+", choices=works.SIDES, metavar="SIDE", help="some sides"
    )
    parser.add_argument("--batch", type=positive, nargs="+", default=[*works.BATCHES])
    parser.add_argument("--turns", type=positive, help="turns of each work")
    parser.add_argument(
        "--images", type=positive, help="images for PGD-20 (default: 2000)"
    )
    parser.add_argument(
        "--hard-images", type=positive, help="images for AutoAttack (default: 200)"
    )
    parser.add_argument(
        "--evaluated", type=positive, help="images for `evaluate` (default: 10000)"
    )
    parser.add_argument(
        "--epochs", type=positive, help="training of the attacked network (default: 5)"
    )
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--quick", action="store_true", help="small sizes, two turns")
    parser.add_argument("--curves", action="store_true", help="curves, not the table")
    parser.add_argument("--list", action="store_true", help="the names of the works")
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="keeps all, and goes on"
    )
    parser.add_argument(
        "--markdown", action="store_true", help="all there is, as tables of a page"
    )
    settings = parser.parse_args(arguments)
    for name, value in (QUICK if settings.quick else FULL).items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)
    settings.full_size = settings.turns is None and all(
        getattr(settings, name) == value
        for name, value in {**FULL, "threads": 2, "quick": False}.items()
    )
    if settings.quick and settings.turns is None:
        settings.turns = 2
    file = settings.json and settings.json.absolute()
    if file and (file.is_dir() or not file.parent.is_dir()):
        parser.error(
            "`--json` must be a file in a folder that exists. "
            f"Received: {settings.json}"
        )
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


def compare(sides, wanted):
    """Measures works one after the other, and prints the rows of each.

    Args:
        sides: The `Sides`.
        wanted: Every `Work`.

    Yields:
        The result of a work, or `None`, and its failures.
    """
    for number, work in enumerate(wanted):
        names = [name for name in work.sides if name in sides.pythons]
        print(f"{work.name}: {', '.join(names)}", file=sys.stderr, flush=True)
        try:
            result, failed = measure(sides, work, names)
        except WorkerError as error:
            result, failed = None, [f"{work.name}: {error}"]
            sides.keep(())  # One of them may be dead.
        if result is not None:
            print(f"{table_of(result)}\n", flush=True)
        yield result, failed
        later = [work for work in wanted[number + 1 :] if not work.fresh]
        needed = {name for work in later for name in work.sides}
        sides.keep({*needed, "plain"})


def draw(sides, wanted):
    """Measures curves one after the other, and prints each. Yields as `compare`."""
    for curve in wanted:
        print(f"{curve.name}: advreg", file=sys.stderr, flush=True)
        try:
            result, failed = measure_curve(sides, curve), []
        except WorkerError as error:
            result, failed = None, [f"{curve.name}: {error}"]
            sides.keep(())
        if result is not None:
            print_curve(result)
        yield result, failed


def run(settings, wanted):
    """Measures what is wanted, and keeps all that is there after each of it.

    Args:
        settings: The options.
        wanted: Works, or curves.

    Returns:
        All that is there at the end, as JSON can hold it.
    """
    needed = {"advreg", "plain"}
    if not settings.curves:
        needed |= {name for work in wanted for name in work.sides}
    if settings.sides:
        needed &= {*settings.sides, "advreg", "plain"}
    found = kept.read(settings.json, beginning(settings))
    pythons, failures = prepare([name for name in works.SIDES if name in needed])
    tell(failures)
    kind, measured = ("curves", draw) if settings.curves else ("works", compare)
    results, code = {result["name"]: result for result in found[kind]}, commit()
    wanted = [item for item in wanted if not kept.is_finished(item, results, pythons)]
    with (
        tempfile.TemporaryDirectory() as folder,
        Sides(pythons, pathlib.Path(folder), settings) as sides,
    ):
        for result, failed in measured(sides, wanted):
            kept.check_versions(found["versions"], sides.versions)
            found["versions"] |= sides.versions
            if result is not None:
                failed += kept.put({**result, "commit": code}, results)
            tell(failed)
            failures += failed
            found[kind] = in_order(results, settings)
            kept.write(settings.json, found)
    found["failures"] = failures
    found["targets"] = list(targets_table(found["works"], settings.full_size))
    kept.write(settings.json, found)
    return found


def in_order(results, settings):
    """Results in the order of `--list`, whenever they were measured."""
    names = [item.name for item in all_there_is(settings)]
    return [results[name] for name in names if name in results]


def beginning(settings):
    """What a run begins with."""
    names = ("batch", "turns", *FULL)
    sizes = {name: getattr(settings, name) for name in names}
    empty = {"versions": {}, "works": [], "curves": [], "failures": []}
    return {"machine": machine(settings.threads), "sizes": sizes, **empty}


def tell(failures):
    for failure in failures:
        print(f"Failed: {failure}", file=sys.stderr, flush=True)


def main():
    # Whoever ends this ends the workers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Terminated"))
    settings = parse()
    wanted = chosen(settings)
    if settings.list:
        print(*(item.name for item in wanted), sep="\n")
        return
    busy = load()
    found = run(settings, wanted)
    if not settings.curves:
        names = {work.name for work in wanted}
        print_targets([line for line in found["targets"] if line["work"] in names])
    told = [f"{name}: {value}" for name, value in found["machine"].items()]
    print(f"\n{'; '.join(told)}; load before: {busy}; load after: {load()}")
    if settings.markdown:
        print(f"\n{pages.page(found)}")
    tell(found["failures"])
    sys.exit(1 if found["failures"] else 0)


if __name__ == "__main__":
    main()
