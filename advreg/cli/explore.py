"""`advreg explore`."""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras

from advreg import datasets, demo, explorer
from advreg.cli.common import (
    add_from_logits,
    add_pixel_range,
    as_options,
    check_pixel_range,
    load,
    told,
)


def add(commands: Any) -> None:
    """Adds the parser to those of the other sub-commands."""
    parser = commands.add_parser(
        "explore",
        help="open a page to attack pictures on, and watch what models see",
        description="Open a page in the browser: choose or upload a picture, move the "
        "radius, and see what a saved Keras model, or two side by side, make of the "
        "clean and of the perturbed picture. Without a model, first train the demo's "
        "plain and regularised networks.",
    )
    parser.add_argument(
        "models",
        nargs="*",
        type=Path,
        metavar="MODEL.keras",
        help="one saved model, or two",
    )
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        help="where the pictures and the names of the classes come from: 'digits', or "
        "a dataset of TensorFlow Datasets that classifies images (default: pictures of "
        "scikit-learn's; without a model, digits)",
    )
    add_pixel_range(parser, "the models'")
    add_from_logits(parser, "the models'")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s, this machine alone)",
    )
    parser.add_argument(
        "--port",
        type=int,
        metavar="N",
        help="port to listen on (default: the first free one from 7860)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        default=0,
        help="seed of the training, without a model (default: %(default)s)",
    )
    parser.set_defaults(run=lambda args: told(parser, _run, args))


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if len(args.models) > 2:
        parser.error(f"two models at most. Received: {len(args.models)}")
    if args.port is not None and not 0 < args.port < 65536:
        parser.error(f"--port must lie between 1 and 65535. Received: {args.port}")
    try:
        check_pixel_range(args.pixel_range)
        settings = demo.DemoSettings(dataset=args.dataset or "digits", seed=args.seed)
    except (TypeError, ValueError) as error:
        parser.error(as_options(str(error)))
    if not args.models and tuple(args.pixel_range) != (0.0, 1.0):
        parser.error("--pixel-range is for a MODEL.keras: the demo's networks take 0 1")
    explorer.check_installed()  # Before the training, not after.
    named = {_name_of(path, args.models): load(path) for path in args.models}
    data = None
    if args.dataset is not None or not named:
        data = datasets.load(settings.dataset)
    if not named:
        assert data is not None
        named, _ = demo.train_pair(data, settings)
    shape = _shape_of(named, data)
    sides = explorer.SideBySide(
        named,
        shape,
        pixel_range=tuple(args.pixel_range),
        from_logits=args.from_logits,
    )
    examples = explorer.load_examples(data, shape, sides.classes)
    with explorer.serve(sides, examples, host=args.host, port=args.port) as url:
        print(f"The explorer is at {url} (Ctrl-C ends it)", flush=True)
        if args.host not in ("127.0.0.1", "localhost", "::1"):
            print("Whoever reaches this machine can use it.", flush=True)
        _wait_for_the_end()


def _name_of(path: Path, paths: Sequence[Path]) -> str:
    """The name of a file, and the way to it where that of another is the same."""
    return str(path) if len({one.stem for one in paths}) < len(paths) else path.stem


def _shape_of(
    named: dict[str, keras.Model], data: datasets.ImageDataset | None
) -> explorer.Shape:
    """Tells what pictures the models take: all of them the same."""
    open_ = None if data is None else data.x_test.shape[1:]
    shapes = {
        name: explorer.picture_shape(model, open_) for name, model in named.items()
    }
    if len(set(shapes.values())) > 1:
        raise ValueError(
            "The models must take the same pictures, to stand side by side. Received: "
            + ", ".join(f"{name} takes {shape}" for name, shape in shapes.items())
        )
    return next(iter(shapes.values()))


def _wait_for_the_end() -> None:
    """Waits for Ctrl-C, or for a request to end, so that all is tidied up after it."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print()
    finally:
        signal.signal(signal.SIGTERM, before)
