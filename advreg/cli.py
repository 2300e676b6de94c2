"""The command line: `advreg demo`, `evaluate`, `explore` and `migrate`.

Each sub-command is a function that adds its parser, and one that runs it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from advreg import attacks, datasets, demo, explorer, migrate, plots
from advreg._version import __version__
from advreg.attacks.base import check_norm
from advreg.checks import count
from advreg.datasets import DatasetError
from advreg.evaluation import evaluate_robustness


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sub-command.

    Args:
        argv: The arguments, by default those of the process.

    Returns:
        The exit status: 0, or 1 where something that the command needs is not there,
        or its output is no longer read.

    Raises:
        SystemExit: An argument is wrong (status 2), or help or the version was asked
            for (status 0).

    Example:
    >>> main(["demo", "--epochs", "2"])
    """
    try:
        try:
            args = _parser().parse_args(argv)
            return args.run(args)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # Such as `advreg migrate ... | less` that was quit.
        # What is left to print goes nowhere, when the process ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="advreg", description="Adversarial regularisation for Keras 3."
    )
    parser.add_argument("--version", action="version", version=f"advreg {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    for add in (_add_demo, _add_evaluate, _add_explore, _add_migrate):
        add(commands)
    return parser


def _add_demo(commands: Any) -> None:
    defaults = demo.DemoSettings()
    parser = commands.add_parser(
        "demo",
        help="train a plain and a regularised network, and attack both",
        description="Train a plain and a regularised copy of the same network, and "
        "compare their accuracies on clean and on perturbed images.",
    )
    digits, mnist = (demo.recipe_for(name) for name in ("digits", "mnist"))

    def by_dataset(name: str) -> str:
        """Says what the recipes of the datasets that have one hold."""
        return (
            f"default: {getattr(digits, name)} for digits, {getattr(mnist, name)} for "
            f"mnist, {getattr(demo.GENERAL_RECIPE, name)} for others"
        )

    parser.add_argument(
        "--dataset",
        metavar="NAME",
        default=defaults.dataset,
        help="'digits', or a dataset of TensorFlow Datasets that classifies images "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help=f"epochs of training ({by_dataset('epochs')})",
    )
    parser.add_argument(
        "--multiplier",
        type=float,
        metavar="X",
        help=f"weight of the adversarial loss ({by_dataset('multiplier')})",
    )
    parser.add_argument(
        "--adv-step-size",
        type=float,
        metavar="X",
        help="step of the perturbation in training, and radius of every attack "
        "(default: depends on dataset and norm; 0.2 for mnist in the infinity norm)",
    )
    parser.add_argument(
        "--adv-grad-norm",
        metavar="NORM",
        default=defaults.adv_grad_norm,
        help="norm of the perturbation: l1, l2 or infinity (default: %(default)s)",
    )
    parser.add_argument(
        "--pgd-iterations",
        type=int,
        metavar="N",
        default=defaults.pgd_iterations,
        help="steps of a perturbation in training (default: %(default)s)",
    )
    parser.add_argument(
        "--random-init",
        action="store_true",
        help="start perturbations in training at random",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="N",
        default=defaults.seed,
        help="seed of weights, batches and random starts (default: %(default)s)",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        default=defaults.output_dir,
        help="where the figure and the numbers go (default: %(default)s)",
    )
    parser.set_defaults(run=lambda args: _run_demo(parser, args))


def _run_demo(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    values = {name: value for name, value in vars(args).items() if name != "run"}
    try:
        settings = demo.DemoSettings(**values)
    except (TypeError, ValueError) as error:
        parser.error(_as_options(str(error)))
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output-dir must be a directory. Received: {error}")
    try:
        result = demo.run(settings)
    except (DatasetError, ImportError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    print(result)
    return 0


def _told(
    parser: argparse.ArgumentParser,
    run: Callable[[argparse.ArgumentParser, argparse.Namespace], None],
    args: argparse.Namespace,
) -> int:
    """Runs a sub-command, and tells in a line what files or models stand against."""
    try:
        run(parser, args)
    except BrokenPipeError:
        raise  # It is of the output, for `main`.
    except (
        OSError,
        TypeError,
        ValueError,
        ImportError,
        tf.errors.InvalidArgumentError,
    ) as error:
        print(f"{parser.prog}: error: {_as_options(str(error))}", file=sys.stderr)
        return 1
    return 0


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="attack a saved model, and report how accurate it stays",
        description="Attack a saved Keras model on the test images of a dataset, and "
        "report its accuracy with the checks of an honest evaluation.",
    )
    parser.add_argument(
        "model", type=Path, metavar="MODEL.keras", help="the saved model"
    )
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        default="digits",
        help="'digits', or a dataset of TensorFlow Datasets that classifies images "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--attacks",
        nargs="+",
        metavar="ATTACK",
        choices=sorted(_ATTACKS),
        default=["fgsm", "pgd"],
        help=f"which attacks, of {', '.join(sorted(_ATTACKS))} (default: fgsm pgd)",
    )
    parser.add_argument(
        "--epsilons",
        nargs="+",
        type=float,
        metavar="X",
        help="radii, in units of the model's input (default: that of the demo on "
        "this dataset)",
    )
    parser.add_argument(
        "--norm",
        metavar="NORM",
        default="infinity",
        help="norm of the radius: l1, l2 or infinity (default: %(default)s)",
    )
    parser.add_argument(
        "--iterations",
        type=int,
        metavar="N",
        help="steps of each iterative attack (default: its own)",
    )
    parser.add_argument(
        "--restarts",
        type=int,
        metavar="N",
        help="random starts of pgd, apgd and others that have them",
    )
    parser.add_argument(
        "--pixel-range",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        default=(0.0, 1.0),
        help="what black and white are in the model's input (default: 0 1)",
    )
    parser.add_argument(
        "--examples",
        type=int,
        metavar="N",
        help="how many test images, the first ones (default: all)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        default=250,
        help="images that go through the model at once (default: %(default)s)",
    )
    parser.add_argument(
        "--from-logits",
        action=argparse.BooleanOptionalAction,
        help="whether the model's outputs are logits (default: told by their values)",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", default=0, help="seed of random starts"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the report to a file as JSON"
    )
    parser.add_argument(
        "--figure",
        type=Path,
        metavar="FILE",
        help="draw accuracy against radius into a file, such as report.png",
    )
    parser.set_defaults(run=lambda args: _told(parser, _run_evaluate, args))


def _run_evaluate(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    low, high = args.pixel_range
    try:
        chosen = _chosen_attacks(args)
        count("batch_size", args.batch_size)
        if args.examples is not None:
            count("examples", args.examples)
    except (TypeError, ValueError) as error:
        parser.error(_as_options(str(error)))
    for option, path in (("--json", args.json), ("--figure", args.figure)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            parser.error(
                f"{option} must be a file in a directory that exists. Received: {path}"
            )
    if args.figure is not None:
        # Without Matplotlib, or for a format that it cannot write, fail before the
        # attack.
        plots.check_format(args.figure)
    model = _load(args.model)
    data = datasets.load(args.dataset)
    x, y = data.x_test[: args.examples], data.y_test[: args.examples]
    _check_fits(model, x, args)
    if (low, high) != (0.0, 1.0):
        x = (low + (high - low) * x).astype("float32")
    report = evaluate_robustness(
        model,
        x,
        y,
        attacks=chosen,
        epsilons=_radii(args),
        batch_size=args.batch_size,
        from_logits=args.from_logits,
    )
    print(f"\n{report}")
    if args.json is not None:
        args.json.write_text(f"{report.to_json()}\n", encoding="utf-8")
    if args.figure is not None:
        report.plot().figure.savefig(args.figure, dpi=150)


def _add_explore(commands: Any) -> None:
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
    parser.add_argument(
        "--pixel-range",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        default=(0.0, 1.0),
        help="what black and white are in the models' input (default: 0 1)",
    )
    parser.add_argument(
        "--from-logits",
        action=argparse.BooleanOptionalAction,
        help="whether the models' outputs are logits (default: told by their values)",
    )
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
    parser.set_defaults(run=lambda args: _told(parser, _run_explore, args))


def _run_explore(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if len(args.models) > 2:
        parser.error(f"two models at most. Received: {len(args.models)}")
    if args.port is not None and not 0 < args.port < 65536:
        parser.error(f"--port must lie between 1 and 65535. Received: {args.port}")
    try:
        _check_pixel_range(args.pixel_range)
        settings = demo.DemoSettings(dataset=args.dataset or "digits", seed=args.seed)
    except (TypeError, ValueError) as error:
        parser.error(_as_options(str(error)))
    if not args.models and tuple(args.pixel_range) != (0.0, 1.0):
        parser.error("--pixel-range is for a MODEL.keras: the demo's networks take 0 1")
    explorer.check_installed()  # Before the training, not after.
    named = {_name_of(path, args.models): _load(path) for path in args.models}
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


def _add_migrate(commands: Any) -> None:
    parser = commands.add_parser(
        "migrate",
        help="move code from Neural Structured Learning to advreg",
        description="Move Python files and notebooks from Neural Structured Learning "
        "to advreg.nsl. Print what would change as a diff, and list what needs a "
        "person. Cells of notebooks are counted from 1, those of text included.",
    )
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="FILE_OR_FOLDER",
        help="files that end in .py or .ipynb, and folders to search for them",
    )
    parser.add_argument("--write", action="store_true", help="change the files")
    parser.set_defaults(run=lambda args: _run_migrate(parser, args))


def _run_migrate(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    for path in args.paths:
        if not os.path.isdir(path) and not os.path.isfile(path):
            parser.error(
                f"FILE_OR_FOLDER must be a file or folder that exists. Received: {path}"
            )
        if os.path.isfile(path) and path.suffix not in migrate.SUFFIXES:
            parser.error(
                f"a file must end in {' or '.join(migrate.SUFFIXES)}. Received: {path}"
            )
    files, errors = migrate.find(args.paths)
    places: list[str] = []
    failures = [f"{error.filename}: {error.strerror}" for error in errors]
    changed = 0
    for file in files:
        try:
            text, encoding = migrate.read(file)
            migration = migrate.migrate(file, text)
            places += [place.at(file) for place in migration.places]
            failures += [f"{file}, {failure}" for failure in migration.failures]
            if args.write and migration.after != text:
                migrate.write(file, migration.after, encoding)
        except ImportError as error:
            print(f"{parser.prog}: error: {error}", file=sys.stderr)
            return 1
        except (OSError, ValueError) as error:
            failures.append(f"{file}: {getattr(error, 'strerror', None) or error}")
        else:
            changed += migration.after != text
            if not args.write:
                _say(migrate.diff(migration, file), end="")
            elif migration.after != text:
                _say(f"changed {file}")
    for line in places:
        _say(line)
    for line in failures:
        _say(f"not done: {line}")
    _say(
        f"{_counted(len(files), 'file')} looked at, {changed} "
        f"{'' if args.write else 'would be '}changed, "
        f"{_counted(len(places), 'place')} for a person, {len(failures)} not done"
    )
    return 1 if failures else 0


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _say(text: str, end: str = "\n") -> None:
    """Prints what may hold characters that the terminal does not have."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), end=end)


_ATTACKS: dict[str, type[attacks.Attack]] = {
    "fgsm": attacks.FGSM,
    "bim": attacks.BIM,
    "pgd": attacks.PGD,
    "apgd": attacks.APGD,
    "square": attacks.Square,
    "noise": attacks.RandomNoise,
    "autoattack": attacks.AutoAttack,
}


def _radii(args: argparse.Namespace) -> list[float]:
    """The radii: those asked for, or that of the demo in the units of the input."""
    if args.epsilons is not None:
        return args.epsilons
    low, high = args.pixel_range
    step = demo.recipe_for(args.dataset).adv_step_size[check_norm(args.norm)]
    return [step * (high - low)]


def _chosen_attacks(args: argparse.Namespace) -> list[attacks.Attack]:
    """Makes the attacks, each with those options that it has.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option has a wrong value, or none of the attacks has it.
    """
    low, high = args.pixel_range
    _check_pixel_range(args.pixel_range)
    wanted = {
        option: getattr(args, option)
        for option in ("iterations", "restarts")
        if getattr(args, option) is not None
    }
    for option in wanted:
        if not any(_has(name, option) for name in args.attacks):
            able = ", ".join(name for name in sorted(_ATTACKS) if _has(name, option))
            raise ValueError(
                f"`{option}` is for {able}, and means nothing to the attacks that are "
                f"asked for. Received: {', '.join(args.attacks)}"
            )
    chosen = []
    for name in args.attacks:
        options = {key: value for key, value in wanted.items() if _has(name, key)}
        for epsilon in _radii(args):  # Each is checked here, before anything is read.
            attack = _ATTACKS[name](
                epsilon,
                norm=args.norm,
                clip_value_min=low,
                clip_value_max=high,
                seed=args.seed,
                **options,
            )
        chosen.append(attack)
    return chosen


def _check_pixel_range(value: Sequence[float]) -> None:
    low, high = value
    if not -math.inf < low < high < math.inf:
        raise ValueError(
            f"`pixel_range` must be two numbers that grow. Received: {low:g} {high:g}"
        )


def _has(attack: str, option: str) -> bool:
    return any(field.name == option for field in dataclasses.fields(_ATTACKS[attack]))


def _load(path: Path) -> keras.Model:
    """Loads a saved model."""
    if not path.is_file():
        raise FileNotFoundError(
            "MODEL.keras must be a file that Keras saved a model in. Received: "
            f"{str(path)!r}, which {'is a directory' if path.is_dir() else 'is absent'}"
        )
    try:
        with warnings.catch_warnings():
            # No optimizer is needed here.
            warnings.filterwarnings("ignore", "Skipping variable loading for optimi")
            model = keras.models.load_model(path)
    # What a damaged or foreign file raises depends on what is wrong with it.
    except Exception as error:
        # Between what Keras says are configurations, pages of them.
        said = " ".join(str(error).split()).split("Exception encountered: ")[-1]
        said = said.split(" Full object config")[0]
        hint = ""
        if "register_keras_serializable" in said:
            hint = (
                " The command knows Keras's and advreg's classes only: for others call "
                "advreg.evaluate_robustness in Python."
            )
        raise ValueError(
            f"{str(path)!r} is no model that Keras can load.{hint} Keras says: "
            f"{said[:500]}"
        ) from error
    if not isinstance(model, keras.Model):
        raise TypeError(f"{str(path)!r} holds no model. Received: {model!r}")
    return model


def _check_fits(model: keras.Model, x: np.ndarray, args: argparse.Namespace) -> None:
    """Checks that images have the shape that a model declares."""
    declared = getattr(model, "base_model", model)
    shapes = [tuple(tensor.shape[1:]) for tensor in getattr(declared, "inputs", ())]
    if not shapes:
        return
    known = len(shapes) == 1 and len(shapes[0]) == 3
    if not known or any(
        size not in (None, found)
        for size, found in zip(shapes[0], x.shape[1:], strict=True)
    ):
        raise ValueError(
            f"The model does not take the images of {args.dataset!r}: its inputs are "
            f"of shape {', '.join(map(str, shapes))}. Choose another --dataset. "
            f"Received: images of shape {x.shape[1:]}"
        )


_WORDS = {
    "epsilon": "--epsilons",
    "clip_value_min": "LOW",
    "clip_value_max": "HIGH",
    "from_logits=True": "--from-logits",
    "from_logits=False": "--no-from-logits",
    "model": "The model",
    "x": "The images",
    "y": "The labels of the dataset",
}


def _as_options(message: str) -> str:
    """Names the options of the command line, where a message names arguments."""

    def option(match: re.Match[str]) -> str:
        return _WORDS.get(match[1], "--" + match[1].replace("_", "-"))

    return re.sub(r"`(\w+(?:=\w+)?)`", option, message)
