"""Imports of what only an extra installs, where it is used."""

import importlib
from typing import Any


def import_extra(module: str, extra: str) -> Any:
    """Imports a module that an extra brings.

    Args:
        module: Name of the module.
        extra: Name of the extra in the project's metadata.

    Returns:
        The module.

    Raises:
        ImportError: It is not installed. The message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module.split('.')[0]} is needed here, and belongs to the extra "
            f"{extra!r}: python -m pip install 'advreg[{extra}]', or '.[{extra}]' in a "
            f"checkout. Received: {error}"
        ) from error
