"""Files that are replaced whole or not at all, and parts that are read with care."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import keras

from advreg.config import AdvRegConfig, check_adv_config, deserialize


def save_whole(
    save: Callable[[Any, bool], None], filepath: Any, overwrite: bool, suffix: str
) -> None:
    """Saves beside a file, and then puts the result in its place.

    Keras writes in place: a process that is killed meanwhile leaves a broken file
    where a good one was. Here it leaves the good one, and a directory `.saving-...`
    beside it. What is no writable local file, Keras saves in its own way.

    Args:
        save: Function of a path, and of whether to overwrite what is there.
        filepath: Where the file is to be.
        overwrite: Whether to replace a file without asking the user.
        suffix: How the names end of what Keras saves as one file.
    """
    target = _local_file(filepath, suffix)
    if target is None:
        save(filepath, overwrite)
        return
    if os.path.exists(target) and not overwrite:
        from keras.src.utils import io_utils  # The question has no public name.

        if not io_utils.ask_to_proceed_with_overwrite(filepath):
            return
    with tempfile.TemporaryDirectory(
        prefix=".saving-", dir=os.path.dirname(target)
    ) as beside:
        path = os.path.join(beside, "new" + suffix)
        save(path, True)
        if os.path.exists(target):
            shutil.copymode(target, path)
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
        f"Received: {value!r}"
    )


def deserialize_base(value: Any) -> Any:
    """Reads the argument `base_model` of a saved model."""
    try:
        return keras.saving.deserialize_keras_object(value)
    except Exception as error:  # Any: Keras trusts in what it once wrote.
        raise ValueError(
            "`base_model` must be a serialised Keras 3 model. "
            f"{type(error).__name__}: {error}"
        ) from error


def _local_file(filepath: Any, suffix: str) -> str | None:
    """The file that is to be replaced, behind links, or `None` if it cannot be."""
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
