"""Imports packages that only an extra installs, at the place where they are used."""

import importlib
from typing import Any


def import_extra(module: str, extra: str) -> Any:
    """Imports a module that an extra installs.

    Args:
        module: Name of the module.
        extra: Name of the extra in the project's metadata.

    Returns:
        The module.

    Raises:
        ImportError: It is not installed. The message says how to install the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module.split('.')[0]} is needed here, and belongs to the extra "
            f"{extra!r}: python -m pip install 'advreg[{extra}]', or '.[{extra}]' in a "
            f"checkout. Received: {error}"
        ) from error
