"""`python -m advreg`."""

import sys

from advreg.cli import main

if __name__ == "__main__":
    sys.exit(main())
