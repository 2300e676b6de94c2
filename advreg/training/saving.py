"""Replaces files as a whole, and reads the arguments of a saved model with care."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import keras

from advreg.checks import brief
from advreg.config.configs import AdvRegConfig, check_adv_config
from advreg.config.serialization import deserialize


def save_whole(
    save: Callable[[Any, bool], None], filepath: Any, overwrite: bool, suffix: str
) -> None:
    """Saves to a temporary file beside the target, then replaces the target by it.

    Keras writes in place. If the process is killed meanwhile, a broken file is left
    where a good one was. Here the good one is left, and a directory `.saving-...`
    beside it. Paths that are no writable local file are left to Keras.

    Args:
        save: Function of a path, and of whether to overwrite an existing file.
        filepath: Path of the file.
        overwrite: Whether to replace an existing file without asking the user.
        suffix: End of the names that Keras saves as one file.
    """
    target = _local_file(filepath, suffix)
    if target is None:
        save(filepath, overwrite)
        return
    exists = os.path.exists(target)
    if exists and not overwrite and not _asked_to_overwrite(filepath):
        return
    with tempfile.TemporaryDirectory(
        prefix=".saving-", dir=os.path.dirname(target)
    ) as beside:
        path = os.path.join(beside, "new" + suffix)
        save(path, True)
        if os.path.exists(target):
            shutil.copymode(target, path)
        # In the same directory, so in the same file system, a rename replaces the file
        # in one moment.
        os.replace(path, target)


def deserialize_adv_config(value: Any) -> AdvRegConfig:
    """Reads the argument `adv_config` of a saved model."""
    config = deserialize("adv_config", value)
    if config is None:
        raise TypeError(
            "`adv_config` must be a serialised `AdvRegConfig`. Received: None"
        )
    return check_adv_config(config)


def deserialize_dtype(value: Any) -> keras.DTypePolicy:
    """Reads the argument `dtype` of a saved model."""
    try:
        policy = keras.dtype_policies.get(value)
        if value is not None and isinstance(policy, keras.DTypePolicy):
            return policy
    except Exception:
        policy = None
    raise TypeError(
        "`dtype` must be a serialised `keras.DTypePolicy`, or the name of one. "
        f"Received: {brief(value)}"
    )


def deserialize_base(value: Any) -> Any:
    """Reads the argument `base_model` of a saved model."""
    try:
        return keras.saving.deserialize_keras_object(value)
    except Exception as error:  # Keras may raise any error on a file it did not write.
        raise ValueError(
            "`base_model` must be a serialised Keras 3 model. "
            f"{type(error).__name__}: {error}"
        ) from error


def _asked_to_overwrite(filepath: Any) -> bool:
    """Asks the user, as Keras does, until the answer is "y" or "n"."""
    while True:
        answer = input(f"{filepath} exists already. Overwrite it? [y/n] ")
        if answer.strip().lower() in ("y", "n"):
            return answer.strip().lower() == "y"


def _local_file(filepath: Any, suffix: str) -> str | None:
    """Returns the file to replace, links resolved, or `None` if that cannot be done."""
    if not isinstance(filepath, (str, os.PathLike)):
        return None
    if not str(filepath).endswith(suffix):
        return None
    target = os.path.realpath(os.fspath(filepath))
    if os.path.exists(target) and not (
        os.path.isfile(target) and os.access(target, os.W_OK)
    ):
        return None
    return target if os.access(os.path.dirname(target), os.W_OK | os.X_OK) else None
