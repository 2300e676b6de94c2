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
    """What git calls the code that runs, where it is a checkout."""
    folder = str(pathlib.Path(__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError):
        told = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        return told or None
    return None


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
