"""Runs the command line as `python -m advreg`."""

import sys

from advreg.apps.cli import main

if __name__ == "__main__":
    sys.exit(main())
