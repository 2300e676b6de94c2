"""`advreg explore`: opens the explorer until Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

import keras

from advreg import datasets
from advreg.apps import demo, explorer
from advreg.apps.cli.errors import to_cli_words
from advreg.apps.cli.models import check_pixel_range, load
from advreg.apps.settings import DemoSettings


def run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Opens the explorer, first training the demo's networks if no model is given.

    Args:
        parser: The parser of the sub-command, which ends it where an option is wrong.
        args: The arguments.
    """
    if len(args.models) > 2:
        parser.error(f"two models at most. Received: {len(args.models)}")
    if args.port is not None and not 0 < args.port < 65536:
        parser.error(f"--port must lie between 1 and 65535. Received: {args.port}")
    try:
        check_pixel_range(args.pixel_range)
        dataset = args.dataset or DemoSettings.dataset
        settings = DemoSettings(dataset=dataset, seed=args.seed)
    except (TypeError, ValueError) as error:
        parser.error(to_cli_words(str(error)))
    if not args.models and tuple(args.pixel_range) != (0.0, 1.0):
        parser.error("--pixel-range is for a MODEL.keras: the demo's networks take 0 1")
    explorer.check_installed()  # Before the training, not after.
    networks = {_name_of(path, args.models): load(path) for path in args.models}
    data = None
    if args.dataset is not None or not networks:
        data = datasets.load(settings.dataset)
    if not networks:
        assert data is not None
        networks, _ = demo.train_pair(data, settings)
    shape = _shape_of(networks, data)
    sides = explorer.SideBySide(
        networks,
        shape,
        pixel_range=tuple(args.pixel_range),
        from_logits=args.from_logits,
    )
    examples = explorer.load_examples(data, shape, sides.classes)
    with explorer.serve(sides, examples, host=args.host, port=args.port) as url:
        print(f"The explorer is at {url} (Ctrl-C ends it)", flush=True)
        if args.host not in ("127.0.0.1", "localhost", "::1"):
            print("Whoever reaches this machine can use it.", flush=True)
        wait_for_the_end()


def _name_of(path: Path, paths: Sequence[Path]) -> str:
    """Returns the name of a file, or its whole path if another has the same name."""
    return str(path) if len({one.stem for one in paths}) < len(paths) else path.stem


def _shape_of(
    networks: dict[str, keras.Model], data: datasets.ImageDataset | None
) -> explorer.Shape:
    """Returns the shape of the pictures that all models take.

    Raises:
        ValueError: The models take pictures of different shapes.
    """
    fallback = None if data is None else data.x_test.shape[1:]
    shapes = {
        name: explorer.picture_shape(model, fallback)
        for name, model in networks.items()
    }
    if len(set(shapes.values())) > 1:
        raise ValueError(
            "The models must take pictures of the same shape. Received: "
            + ", ".join(f"{name} takes {shape}" for name, shape in shapes.items())
        )
    return next(iter(shapes.values()))


def wait_for_the_end() -> None:
    """Waits for Ctrl-C or SIGTERM, after which the page is closed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print()
    finally:
        signal.signal(signal.SIGTERM, before)
