"""The machine that a run was on."""

import contextlib
import os
import pathlib
import platform
import subprocess


def machine(threads):
    """What the figures depend on besides the code."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": platform.platform(),
    }


def commit():
    """The last commit that changed the code, and whether it has changed since."""
    code = ["advreg", ":(glob)benchmarks/**/*.py"]
    last = git("log", "-1", "--format=%h", "--", *code)
    if last and git("status", "--porcelain", "--", *code):
        return f"{last}-dirty"
    return last or "no commit"


def git(*words):
    """What git says in the checkout, or nothing where there is none."""
    folder = str(pathlib.Path(__file__).parents[2])
    with contextlib.suppress(OSError):
        command = ["git", "-C", folder, *words]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return ""


def load():
    """How many processes want to run, where the system tells it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def processor():
    """The name of the processor, where the system tells it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
