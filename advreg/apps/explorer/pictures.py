"""Pictures: reads uploads, fits them to a model, and draws them for the page.

Pillow is imported where it is used: it comes with the extra `app`.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import warnings
from typing import Any

import numpy as np

from advreg._extras import import_extra

# Pillow knows more formats, some of which start other programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

_MOST_PIXELS = 50_000_000
_LEAST_SHOWN = 96  # Pixels of the shorter side, below which browsers blur thumbnails.

Shape = tuple[int, int, int]


class PictureError(ValueError):
    """An upload is no picture. The page shows the message."""


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A picture in the size and the colours that a model takes.

    Args:
        pixels: Float32 of shape `[height, width, channels]` in [0, 1].
        name: The name on the page.
        label: The true class, if it is known.
        note: A sentence that says how the picture was changed to fit, or nothing.
    """

    pixels: np.ndarray
    name: str
    label: int | None = None
    note: str = ""


def read_picture(content: bytes, name: str, shape: Shape) -> Picture:
    """Reads an image file, and fits it to a model.

    Args:
        content: The bytes of the file.
        name: Name of the file.
        shape: Height, width and channels, 1 or 3, that the model takes.

    Returns:
        A `Picture`. An image of another aspect ratio is cut to its middle. Then it is
        resized, and turned grey or to RGB. `note` says what of this was done.

    Raises:
        ImportError: The extra `app` is not installed.
        PictureError: The file is no image of a known format, is damaged, or has too
            many pixels.

    Example:
    >>> picture = read_picture(path.read_bytes(), path.name, (28, 28, 1))
    >>> picture.note
    'Cut from 640×480 to 480×480, resized to 28×28, turned grey.'
    """
    pillow = import_extra("PIL.Image", "app")
    if not content:
        raise PictureError(f"“{name}” is empty. Choose an image.")
    try:
        with warnings.catch_warnings():
            # Of damaged metadata, and of sizes, which are checked below.
            warnings.simplefilter("ignore")
            image = pillow.open(io.BytesIO(content), formats=FORMATS)
            if image.width * image.height > _MOST_PIXELS:
                raise pillow.DecompressionBombError
            return _fit_image(image, name, shape)
    except pillow.DecompressionBombError:  # Pillow raises it too.
        raise PictureError(
            f"“{name}” has more than {_MOST_PIXELS // 1_000_000} million pixels. "
            "Choose a smaller image."
        ) from None
    except pillow.UnidentifiedImageError:
        raise PictureError(
            f"“{name}” is no image. Choose a {', '.join(FORMATS[:-1])} or "
            f"{FORMATS[-1]} file."
        ) from None
    # The type of the error depends on the format and on the damage.
    except Exception as error:
        raise PictureError(
            f"“{name}” is an image that cannot be read, it may be damaged: {error}"
        ) from error


def fit(pixels: np.ndarray, name: str, shape: Shape, label: int | None) -> Picture:
    """Fits pixels to a model.

    Args:
        pixels: Floats of shape `[height, width, channels]` in [0, 1], with one or three
            channels.
        name: The name on the page.
        shape: Height, width and channels that the model takes.
        label: The true class, if it is known.

    Returns:
        A `Picture`, with unchanged pixels if they already have the shape.
    """
    if pixels.shape == shape:
        return Picture(pixels.astype("float32"), name, label)
    pillow = import_extra("PIL.Image", "app")
    picture = _fit_image(pillow.fromarray(_to_bytes(pixels)), name, shape)
    return dataclasses.replace(picture, label=label)


def png_url(pixels: np.ndarray) -> str:
    """Encodes pixels as a PNG file in a data URL.

    Args:
        pixels: Floats of shape `[height, width, channels]`, which are clipped to
            [0, 1].
    """
    pillow = import_extra("PIL.Image", "app")
    file = io.BytesIO()
    pillow.fromarray(_to_bytes(pixels)).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """Enlarges a small picture by repeating its pixels, which then stay square.

    Returns:
        Bytes of shape `[height, width, 3]`.
    """
    times = max(1, -(-_LEAST_SHOWN // min(pixels.shape[:2])))
    drawn = np.repeat(np.repeat(_to_bytes(pixels), times, axis=0), times, axis=1)
    return drawn if drawn.ndim == 3 else np.stack([drawn] * 3, axis=-1)


def magnify(perturbation: np.ndarray, largest: float) -> np.ndarray:
    """Magnifies a perturbation, in the colours of `plots.perturbation_panels`.

    Args:
        perturbation: It has the shape `[height, width, channels]`.
        largest: The change of a pixel that gets full colour.

    Returns:
        Pixels of shape `[height, width, 3]` in [0, 1]. For grey pictures, white means
        no change, red lighter, and blue darker. For RGB pictures, the perturbation is
        magnified around grey.
    """
    scaled = np.clip(perturbation / (largest or 1.0), -1.0, 1.0)
    if scaled.shape[-1] == 3:
        return 0.5 + scaled / 2
    lighter, darker = np.array([0.70, 0.09, 0.17]), np.array([0.13, 0.40, 0.67])
    return 1 - np.abs(scaled) * (1 - np.where(scaled > 0, lighter, darker))


def _fit_image(image: Any, name: str, shape: Shape) -> Picture:
    pillow = import_extra("PIL.Image", "app")
    tools = import_extra("PIL.ImageOps", "app")
    done = []
    if getattr(image, "n_frames", 1) > 1:
        done.append(f"the first of {image.n_frames} frames")
    image = _to_eight_bits(tools.exif_transpose(image))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = pillow.new("RGBA", image.size, "white")
        image = pillow.alpha_composite(paper, image).convert("RGB")
        done.append("put on white")
    height, width, channels = shape
    wanted = "L" if channels == 1 else "RGB"
    turned = image.mode != wanted
    image = image.convert(wanted)
    scale = min(image.width / width, image.height / height)
    middle = max(1, round(width * scale)), max(1, round(height * scale))
    if middle != image.size:
        done.append(f"cut from {image.width}×{image.height} to {middle[0]}×{middle[1]}")
        image = tools.fit(image, middle)
    if image.size != (width, height):
        done.append(f"resized to {width}×{height}")
        image = image.resize((width, height), pillow.Resampling.BICUBIC)
    if turned:
        done.append("turned grey" if channels == 1 else "turned to RGB")
    pixels = np.asarray(image, "float32").reshape(shape) / 255
    note = ", ".join(done)
    return Picture(pixels, name, note=f"{note[:1].upper()}{note[1:]}." if note else "")


def _to_eight_bits(image: Any) -> Any:
    """Scales grey values of more bits, which Pillow would clip at 255."""
    if not image.mode.startswith(("I", "F")):
        return image
    pillow = import_extra("PIL.Image", "app")
    values = np.asarray(image, "float64")
    top = 1.0 if image.mode == "F" and values.max(initial=0) <= 1 else 65535.0
    return pillow.fromarray(_to_bytes(values / top))


def _to_bytes(pixels: np.ndarray) -> np.ndarray:
    """Converts floats to bytes as Pillow takes them: grey without a channel axis."""
    values = np.nan_to_num(np.asarray(pixels, "float64"))
    drawn = np.round(np.clip(values, 0.0, 1.0) * 255).astype("uint8")
    return drawn[..., 0] if drawn.ndim == 3 and drawn.shape[-1] == 1 else drawn
