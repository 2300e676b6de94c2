"""One side of `compare.py`, in a process of its own.

Reads requests from its standard input, a line of JSON each, and answers each by one
line. What libraries print goes to its standard error. It ends with its input.

    python compare_worker.py SIDE THREADS
"""

import contextlib
import gc
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import time
import traceback

LIBRARIES = (
    *("advreg", "tensorflow", "keras", "numpy", "neural-structured-learning"),
    *("adversarial-robustness-toolbox", "foolbox", "cleverhans", "torch"),
)


def limit_threads(threads):
    """Keeps the process to as many cores, and pools of threads to as many threads."""
    for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
        os.environ[name] = str(threads)
    # Threads of PyTorch that wait by spinning take each other's core where anything
    # else runs on the machine, and slow it several times. It is faster so.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def versions():
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def peak_memory():
    """The most memory that the process has held so far, in bytes."""
    # What `getrusage` tells may be that of the parent which started the process.
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows has none.
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Side:
    """Answers requests. Each method is one, its arguments those of the request."""

    def __init__(self, name):
        self.module = importlib.import_module(f"peers.{name}")
        self.jobs = {}

    def hello(self):
        """Tells the versions of what is there."""
        return {"versions": versions()}

    def make(self, **wanted):
        """Writes a file with a network's weights and data."""
        from peers import materials

        return materials.make(**wanted)

    def set_up(self, job, **fields):
        """Sets a job up under a name."""
        from peers.job import Job

        wanted = Job(**fields)
        self.jobs[job] = wanted, getattr(self.module, wanted.kind)(wanted)
        return {"peak": peak_memory()}

    def check(self, job):
        """Compares the network's logits to those of the file."""
        import numpy as np

        wanted, task = self.jobs[job]
        expected = wanted.logits()
        x, _ = wanted.data(len(expected))
        found = task.logits(x)
        return {"difference": float(np.max(np.abs(found - expected)))}

    def run(self, job, count):
        """Does a job, and tells the seconds that it took."""
        wanted, task = self.jobs[job]
        work = task.turn()
        gc.collect()
        start = time.perf_counter()
        result = work(count)
        answer = {"seconds": time.perf_counter() - start, "peak": peak_memory()}
        if wanted.kind == "attack":
            check_perturbed(wanted, result, count)
            answer["accuracy"] = accuracy(wanted, task, result)
        return answer

    def drop(self, job):
        """Forgets a job."""
        del self.jobs[job]
        gc.collect()
        return {}


def check_perturbed(job, x_adv, count):
    """Checks that examples are as many as they should be, in the ball and the range."""
    import numpy as np
    from peers.job import CLIP, ROUNDING

    x, _ = job.data(count)
    if x_adv.shape != x.shape:
        raise ValueError(f"not {x.shape}, but {x_adv.shape} came back")
    distance = float(np.max(np.abs(x_adv - x)))
    low, high = float(np.min(x_adv)), float(np.max(x_adv))
    within = CLIP[0] - ROUNDING <= low and high <= CLIP[1] + ROUNDING
    if not (distance <= job.epsilon + ROUNDING and within):  # NaN is not within.
        raise ValueError(
            f"perturbed by {distance:.6g} at radius {job.epsilon}, into "
            f"[{low:.6g}, {high:.6g}]"
        )


def accuracy(job, task, x_adv):
    """The accuracy on perturbed examples, the first ones of the job."""
    _, y = job.data(len(x_adv))
    right = 0
    for start in range(0, len(x_adv), job.batch):
        part = slice(start, start + job.batch)
        right += (task.logits(x_adv[part]).argmax(1) == y[part]).sum()
    return float(right / len(x_adv))


def answer(side, line):
    """What a side answers to a line: the error, if it raises one."""
    try:
        request = json.loads(line)
        return getattr(side, request.pop("do"))(**request)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def main():
    name, threads = sys.argv[1:]
    limit_threads(int(threads))
    # Libraries that print must not print into the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side = Side(name)
    if "tensorflow" in sys.modules:  # A plug-in may have one that CUDA knows not of.
        sys.modules["tensorflow"].config.set_visible_devices([], "GPU")
    for line in sys.stdin:
        print(json.dumps(answer(side, line)), file=answers, flush=True)


if __name__ == "__main__":
    main()
