"""Loads the data of the demo: scikit-learn's digits, and image datasets of TFDS."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from typing import Any

import numpy as np

from advreg._extras import import_extra

_DIGITS_TEST_IMAGES = 500


class DatasetError(ValueError):
    """Raised if a dataset is unknown, missing, or is not image classification."""


@dataclasses.dataclass(frozen=True, eq=False)
class ImageDataset:
    """Images and their labels, split into training and test data.

    Args:
        name: Name of the dataset, as `load` takes it.
        x_train: Float32 images of shape `[n, height, width, channels]` in [0, 1].
        y_train: Integer labels of shape `[n]`.
        x_test: Images to test on.
        y_test: Labels to test on.
        num_classes: Number of classes.
        class_names: Name of each class.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    num_classes: int
    class_names: tuple[str, ...]


def load(name: str) -> ImageDataset:
    """Loads a dataset for image classification into memory.

    Args:
        name: `"digits"`, scikit-learn's embedded 8×8 digits, which need no download; or
            the name of a dataset of TensorFlow Datasets (TFDS), such as `"mnist"` or
            `"cifar10"`. TFDS downloads a dataset that is not yet in the directory of
            the environment variable TFDS_DATA_DIR, by default `~/tensorflow_datasets`.

    Returns:
        An `ImageDataset`. The split of the digits is stratified and always the same.
        The test images of a TFDS dataset are its split `test`, or `validation` where
        there is no such split.

    Raises:
        DatasetError: The dataset is unknown, cannot be downloaded, or is not
            classification of images of one shape. It is a `ValueError`.
        ImportError: The extra `demo` is not installed.

    Example:
    >>> load("digits").x_train.shape
    (1297, 8, 8, 1)
    """
    return _load_digits() if name == "digits" else _load_tfds(name)


def _load_digits() -> ImageDataset:
    digits = import_extra("sklearn.datasets", "demo").load_digits()
    images = (digits.images[..., np.newaxis] / 16).astype("float32")
    split = import_extra("sklearn.model_selection", "demo").train_test_split
    x_train, x_test, y_train, y_test = split(
        images,
        digits.target.astype("int64"),
        test_size=_DIGITS_TEST_IMAGES,
        stratify=digits.target,
        random_state=0,
    )
    return ImageDataset(
        name="digits",
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
        num_classes=10,
        class_names=tuple(str(digit) for digit in digits.target_names),
    )


def _load_tfds(name: str) -> ImageDataset:
    tfds = import_extra("tensorflow_datasets", "demo")
    if importlib.util.find_spec("tensorflow") is None:
        raise ImportError(
            "TensorFlow Datasets reads its files by TensorFlow, whatever the backend "
            "of Keras: python -m pip install tensorflow, or choose the dataset "
            f"'digits'. Received: the dataset {name!r}, and no TensorFlow"
        )
    builder = _tfds_builder(tfds, name)
    label = _check_features(tfds, name, builder.info)
    _prepare(name, builder)
    x_train, y_train = _read(tfds, builder, "train")
    x_test, y_test = _read(tfds, builder, _test_split(name, builder.info.splits))
    return ImageDataset(
        name=name,
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
        num_classes=label.num_classes,
        class_names=tuple(label.names),
    )


def _tfds_builder(tfds: Any, name: str) -> Any:
    try:
        return tfds.builder(name)
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        similar = difflib.get_close_matches(name, known)
        hint = f" Did you mean: {', '.join(similar)}?" if similar else ""
        raise DatasetError(
            "A dataset must be 'digits' or one of TensorFlow Datasets. Received: "
            f"{name!r}, which is neither.{hint}"
        ) from None
    # Missing versions and missing configurations raise errors of different types.
    except Exception as error:
        raise DatasetError(
            f"TensorFlow Datasets cannot make the dataset {name!r}: {_one_line(error)}"
        ) from error


def _check_features(tfds: Any, name: str, info: Any) -> Any:
    """Checks that a dataset maps images of one shape to classes; returns the label."""
    keys = info.supervised_keys
    # The keys may be missing, or be three, or structures.
    if keys is not None and len(keys) == 2 and all(isinstance(k, str) for k in keys):
        image, label = (info.features[key] for key in keys)
        if (
            isinstance(image, tfds.features.Image)
            and isinstance(label, tfds.features.ClassLabel)
            and image.np_dtype == np.uint8
            and None not in image.shape
            and image.shape[-1] in (1, 3)
        ):
            return label
    raise DatasetError(
        f"The dataset {name!r} is not classification of images: it must map 8-bit "
        "images of one shape, grey or RGB, to a class label. Received: the supervised "
        f"keys {keys} of {_one_line(info.features)}"
    )


def _prepare(name: str, builder: Any) -> None:
    try:
        builder.download_and_prepare()
    # A failed download may raise many types of errors, some of which are no `OSError`.
    except Exception as error:
        raise DatasetError(
            f"The dataset {name!r} is not in {str(builder.data_path)!r} and cannot be "
            "downloaded. Set the environment variable TFDS_DATA_DIR to a directory "
            f"that holds it. Received: {_one_line(error)}"
        ) from error


def _test_split(name: str, splits: Any) -> str:
    for split in ("test", "validation"):
        if "train" in splits and split in splits:
            return split
    raise DatasetError(
        f"The dataset {name!r} must have a split 'train', and 'test' or 'validation'. "
        f"Received: the splits {sorted(splits)}"
    )


def _read(tfds: Any, builder: Any, split: str) -> tuple[np.ndarray, np.ndarray]:
    data = builder.as_dataset(split=split, as_supervised=True, batch_size=-1)
    images, labels = tfds.as_numpy(data)
    return images.astype("float32") / 255, labels


def _one_line(value: Any) -> str:
    return " ".join(str(value).split())
