"""The pictures that the page offers besides uploads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from advreg._extras import import_extra
from advreg.apps.explorer.pictures import Picture, Shape, fit
from advreg.datasets import DatasetError, ImageDataset, load

_PICTURES = 12


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Pictures to choose from.

    Args:
        pictures: The pictures, in the size and the colours that the models take.
        class_names: Name of each class of the models.
    """

    pictures: Sequence[Picture]
    class_names: Sequence[str]


def load_examples(data: ImageDataset | None, shape: Shape, classes: int) -> Examples:
    """Chooses pictures that the models take.

    Args:
        data: The dataset that the models were trained on, or `None`: then the pictures
            are scikit-learn's digits, or its photographs for models of RGB images,
            and their classes count as unknown.
        shape: Height, width and channels that the models take.
        classes: Number of the models' classes.

    Returns:
        `Examples`, the first test pictures of as many classes as possible.

    Raises:
        DatasetError: The dataset has another number of classes. It is a `ValueError`.
        ImportError: scikit-learn is not installed.
    """
    if data is not None:
        if data.num_classes != classes:
            raise DatasetError(
                f"The models must have the {data.num_classes} classes of "
                f"{data.name!r}: choose another --dataset. Received: models of "
                f"{classes} classes"
            )
        return Examples(_pictures_of(data, shape, known=True), data.class_names)
    names = [str(index) for index in range(classes)]
    if shape[2] == 1:
        return Examples(_pictures_of(load("digits"), shape, known=False), names)
    photographs = import_extra("sklearn.datasets", "app").load_sample_images()
    return Examples(
        [
            fit(image / 255, f"scikit-learn's {file}", shape, None)
            for image, file in zip(
                photographs.images, ("china.jpg", "flower.jpg"), strict=True
            )
        ],
        names,
    )


def _pictures_of(data: ImageDataset, shape: Shape, known: bool) -> list[Picture]:
    return [
        fit(
            data.x_test[place],
            f"Test image {place} of {data.name}",
            shape,
            int(data.y_test[place]) if known else None,
        )
        for place in _indices_by_class(data.y_test)
    ]


def _indices_by_class(labels: np.ndarray) -> list[int]:
    """Returns the index of the first image of each class, then of the second, ..."""
    order = np.argsort(labels, kind="stable")
    _, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    rank = np.arange(len(labels)) - np.repeat(starts, counts)
    return [int(order[at]) for at in np.argsort(rank, kind="stable")[:_PICTURES]]
