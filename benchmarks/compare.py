"""Measures what advreg costs beside its peers: the same work, side by side.

Each side runs in a process of its own. Where a peer's script names packages, `uv` makes
it an environment (`python -m pip install uv`). All start from the same weights. Of
those that go on from turn to turn, none is timed unless its logits are those of plain
Keras to 1e-4. The sides take turns, each time in another order. A ratio is that of
advreg's median to the peer's; the quartiles are those of the ratios within the turns.
All sides have two threads, and on Linux the same two cores. docs/costs.md says what
the sides and the works are.

    python benchmarks/compare.py [--only step/mnist evaluate] [--sides plain art]
    python benchmarks/compare.py --json FILE          # goes on where it was interrupted
    python benchmarks/compare.py --json FILE --print  # the tables of what is there
    python benchmarks/compare.py --quick              # small sizes, two turns

MNIST comes from TensorFlow Datasets, which `python -m pip install -e ".[demo]"` brings.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile

import pages
import works
from turns import ratio, steps_of_a_turn, take_turns

FOLDER = pathlib.Path(__file__).parent
THREADS = 2
LOGITS = 1e-4


class PeerError(Exception):
    """A peer cannot run, or has failed. The message says why."""


def command(script):
    """Returns the command that runs a script, and the environment variables for it.

    A script whose head names packages (PEP 723) is run by `uv run`, which makes it an
    environment. Without `uv` it runs here, if the packages are here.

    Raises:
        PeerError: There is no `uv`, and a package of the script is not here.
    """
    path, variables = FOLDER / script, dict(os.environ)
    header, marker, _ = path.read_text(encoding="utf-8").partition("\n# ///\n")
    packages = set(re.findall(r'"([\w-]+)==', header)) if marker else set()
    if packages and (uv := shutil.which("uv")):
        variables.pop("PYTHONPATH", None)  # It must not find what is here.
        return [uv, "run", "--quiet", str(path)], variables
    there = (found.metadata["Name"] for found in importlib.metadata.distributions())
    if missing := packages - set(there):
        raise PeerError(
            f"{script} needs {', '.join(sorted(missing))} here, or uv, which makes it "
            "an environment: `python -m pip install uv`"
        )
    return [sys.executable, str(path)], variables


class Peer:
    """A process that does a job for a side, and answers each line of its input."""

    def __init__(self, side, job, log):
        words, variables = command(works.SIDES[side][0])
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.side, self.log = side, log
        with log.open("w") as file:
            options = {"stderr": file, "env": variables, **pipes}
            self.process = subprocess.Popen([*words, side, json.dumps(job)], **options)
        self.ready = self.answer()

    def ask(self, line):
        """Sends a line, and returns the answer."""
        print(line, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self):
        """Waits for a line of the process."""
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.side} has failed:\n{self.log.read_text()[-2000:]}")
        return json.loads(line)

    def close(self):
        """Ends the process, which ends with its input."""
        self.process.communicate()


def in_new_process(work, start):
    """Takes a turn in a process of its own."""
    peer = start()
    answer = peer.ask(work.count)
    peer.close()
    if work.measure == "peak":
        answer["growth"] = answer["peak"] - peer.ready["peak"]
    return answer


def warmed_up(work, start):
    """Warms a side up, and returns the function that takes its turn."""
    peer, count, moved = start(), work.count, {}
    difference = peer.ask("check")["difference"]
    if not difference <= LOGITS:  # NaN is no agreement.
        sys.exit(f"Logits of {peer.side} differ from plain Keras's by {difference:.2g}")
    for some in work.warm:
        answer = peer.ask(some)
    if work.count is None:
        count = steps_of_a_turn(answer["seconds"])
        moved = {"moved": peer.ask("check")["difference"]}

    def turn():
        answer = peer.ask(count)
        seconds = answer["seconds"] / (1 if work.count else count)
        return {**answer, **moved, "seconds": seconds}

    return turn


def measure(work, jobs, turns, folder):
    """Returns what was measured, as JSON can hold it, and the versions of each side.

    Args:
        work: The `Work`.
        jobs: The sides and complete jobs by label.
        turns: How many turns each side has.
        folder: Where logs are written.
    """
    versions = {}

    def start(label):
        side, job = jobs[label]
        peer = Peer(side, job, folder / f"{label}.log")
        stack.callback(peer.close)
        versions[side] = peer.ready["versions"]
        return peer

    with contextlib.ExitStack() as stack:
        sides = {label: functools.partial(start, label) for label in jobs}
        for label, new in sides.items():
            fresh = functools.partial(in_new_process, work, new)
            sides[label] = fresh if work.fresh else warmed_up(work, new)
        answers = take_turns(sides, turns)
    values = {side: [a[work.measure] for a in found] for side, found in answers.items()}
    result = {"name": work.name, "values": values, "ratios": {}}
    for peer in values:
        if work.line is None and peer != "advreg":
            result["ratios"][peer] = ratio(values["advreg"], values[peer])
    for name in ("accuracy", "growth", "moved"):
        result[name] = {
            side: statistics.median(answer[name] for answer in found)
            for side, found in answers.items()
            if name in found[0]
        }
    return result, versions


def jobs_of(work, sides, folder):
    """Makes the files that the sides share, and returns side and job of each label."""
    from keras_side import make_file  # It brings TensorFlow; printing needs it not.

    jobs = {}
    for label, (side, job) in work.jobs.items():
        network, sizes = job["network"], job.get("sizes", {})
        path = folder / f"{network}-{'-'.join(map(str, sizes.values()))}.npz"
        if side in sides and not path.exists():
            examples = max(1024, job.get("examples", 0))
            make_file(path, network, sizes, examples, work.epochs)
        if side in sides:
            jobs[label] = side, {**job, "file": str(path)}
    return jobs


def is_available(side):
    """Tells whether a side can run, and says why if it cannot."""
    try:
        return bool(command(works.SIDES[side][0]))
    except PeerError as error:
        print(f"{side} is left out: {error}", file=sys.stderr)
        return False


def limit_threads():
    """Limits this process, and those that it starts, to as many threads and cores."""
    for pool in ("OMP_NUM", "TF_NUM_INTRAOP", "TF_NUM_INTEROP"):
        os.environ[f"{pool}_THREADS"] = str(THREADS)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    # Threads of PyTorch that wait by spinning take each other's core where anything
    # else runs on the machine, and slow it several times. It is faster so.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])


def machine():
    """Returns what the figures depend on besides the code."""
    names = []
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if "model name" in line]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": THREADS,
        "system": platform.platform(),
    }


def commit():
    """Returns the last commit of the checkout."""
    words = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        return subprocess.run(words, capture_output=True, text=True).stdout.strip()
    return "no commit"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="how names begin")
    parser.add_argument("--sides", nargs="+", choices=works.SIDES, metavar="SIDE")
    parser.add_argument("--quick", action="store_true", help="small sizes, two turns")
    parser.add_argument("--json", type=pathlib.Path, help="keeps all, and goes on")
    parser.add_argument("--print", action="store_true", help="measure nothing")
    options = parser.parse_args()
    sizes = works.QUICK if options.quick else works.FULL
    found = {"machine": machine(), "sizes": sizes, "versions": {}, "works": {}}
    if options.json and options.json.exists():
        fresh, found = found, json.loads(options.json.read_text(encoding="utf-8"))
        same = all(fresh[name] == found[name] for name in ("machine", "sizes"))
        if not (same or options.print):
            sys.exit(f"{options.json} is of another machine, or of other sizes")
    every = works.all_works(**sizes)
    wanted = [work for work in every if work.name.startswith(tuple(options.only))]
    missing = [work for work in wanted if work.name not in found["works"]]
    if not options.print:
        limit_threads()
        chosen = {"advreg", *(options.sides or works.SIDES)}
        sides = [side for side in chosen if is_available(side)]
        for work in missing:
            print(work.name, file=sys.stderr, flush=True)
            turns = min(work.turns, 2) if options.quick else work.turns
            with tempfile.TemporaryDirectory() as folder:
                jobs = jobs_of(work, sides, pathlib.Path(folder))
                result, versions = measure(work, jobs, turns, pathlib.Path(folder))
            found["versions"] |= versions
            found["works"][work.name] = {**result, "commit": commit()}
            if options.json:
                text = json.dumps(found, indent=1) + "\n"
                options.json.write_text(text, encoding="utf-8")
    curves = {work.name: work for work in every if work.line}
    print("\n\n".join(pages.parts(found, curves)))


if __name__ == "__main__":
    main()
