"""The page, which Gradio serves. Gradio is imported when the page is opened."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from advreg._extras import import_extra
from advreg.apps.explorer.examples import Examples
from advreg.apps.explorer.pictures import PictureError, read_picture, thumbnail
from advreg.apps.explorer.side_by_side import ATTACKS, SideBySide
from advreg.apps.explorer.view import STYLE, show_message, show_sides
from advreg.config.norms import NormType

_SLIDER_REACHES = 3  # Times the radius that it starts at.
_SLIDER_STEPS = 60
_LARGEST_FILE = "20mb"
_NORMS = {norm.symbol: norm for norm in (NormType.INFINITY, NormType.L2, NormType.L1)}

# Turns off telemetry, the history of runs, and sharing.
_ENVIRONMENT = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_SHARE": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def check_installed() -> None:
    """Checks that the page can be opened.

    Raises:
        ImportError: The extra `app` is not installed.
    """
    # Not imported yet, because Gradio makes directories, which `serve` first redirects.
    for module in ("gradio", "PIL"):
        if importlib.util.find_spec(module) is None:
            import_extra(module, "app")


@contextmanager
def serve(
    models: SideBySide,
    examples: Examples,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
) -> Iterator[str]:
    """Serves the page while the context is open.

    Uploads are deleted from the disk once they are read. All other files of Gradio are
    deleted when the context is left.

    Args:
        models: The models.
        examples: The pictures to choose from.
        host: Address to listen on. Other machines can reach any but `127.0.0.1`.
        port: Port to listen on, by default the first free one from 7860.

    Yields:
        The address of the page.

    Raises:
        ImportError: The extra `app` is not installed.
        OSError: The port is taken, or the address does not belong to this machine.

    Example:
    >>> with serve(SideBySide({"mine": model}, (28, 28, 1)), examples) as url:
    ...     input(f"{url}, until Enter")
    """
    with tempfile.TemporaryDirectory(prefix="advreg-explore-") as folder:
        before = dict(os.environ)
        os.environ.update(_ENVIRONMENT, GRADIO_TEMP_DIR=folder)
        try:
            gradio = import_extra("gradio", "app")
            blocks = _blocks(gradio, models, examples, Path(folder))
            _, url, _ = blocks.launch(
                server_name=host,
                server_port=port,
                share=False,
                ssr_mode=False,
                quiet=True,
                footer_links=[],
                max_file_size=_LARGEST_FILE,
                prevent_thread_lock=True,
                theme=gradio.themes.Default(
                    primary_hue="blue",
                    font=["system-ui", "sans-serif"],
                    font_mono=["ui-monospace", "monospace"],
                ),
                css=STYLE,
            )
            try:
                yield url
            finally:
                _close(blocks)
        finally:
            os.environ.clear()
            os.environ.update(before)


def _close(blocks: Any) -> None:
    """Ends the server, even while pages are open."""
    logger = logging.getLogger("uvicorn.error")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # It reports each task that is cancelled.
    blocks.server.force_exit = True
    blocks.close(verbose=False)
    logger.setLevel(level)


def _blocks(gradio: Any, models: SideBySide, examples: Examples, folder: Path) -> Any:
    """Builds the page, and connects its events."""

    def limits(norm: NormType) -> dict[str, float]:
        start = models.radius(norm)
        highest = start * _SLIDER_REACHES
        return {
            "maximum": float(f"{highest:.3g}"),
            "value": float(f"{start:.3g}"),
            "step": float(f"{highest / _SLIDER_STEPS:.2g}"),
        }

    def show(picture: Any, attack: str, symbol: str, epsilon: float) -> str:
        norm = _NORMS[symbol]
        if norm not in ATTACKS[attack][0].norms:
            norm = NormType.INFINITY  # `norms_of` is about to update the choice.
        epsilon = min(float(epsilon or 0.0), limits(norm)["maximum"])
        try:
            sides = models.explore(picture.pixels, attack, norm, epsilon, picture.label)
        except ValueError as error:
            return show_message(str(error))
        return show_sides(picture, sides, examples.class_names)

    def choose(event: Any) -> tuple[Any, str]:
        return examples.pictures[event.index], ""

    # Gradio reads from the annotation what to pass.
    choose.__annotations__["event"] = gradio.SelectData

    def receive(path: str | None, current: Any) -> tuple[Any, str, None]:
        if path is None:
            return current, "", None
        file = Path(path)
        try:
            content = file.read_bytes()
        finally:
            _delete_upload(file, folder)
        try:
            return read_picture(content, file.name, models.shape), "", None
        except PictureError as error:
            return current, show_message(str(error)), None

    def norms_of(attack: str, symbol: str) -> Any:
        defined = ATTACKS[attack][0].norms
        choices = [name for name, norm in _NORMS.items() if norm in defined]
        chosen = symbol if symbol in choices else choices[0]
        return gradio.Radio(choices=choices, value=chosen)

    bare = {"padding": False, "elem_classes": "adv-bare"}
    with gradio.Blocks(
        title="advreg explorer",
        analytics_enabled=False,
        fill_width=True,
        # Deletes uploads that broke off, once a minute.
        delete_cache=(60, 60),
    ) as blocks:
        picture = gradio.State(examples.pictures[0])
        gradio.Markdown(
            "# advreg explorer\n"
            "What the model predicts for a picture, before and after an attack that "
            "changes it by at most ε."
        )
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                epsilon = gradio.Slider(
                    minimum=0.0,
                    label="Radius ε",
                    elem_id="epsilon",
                    **limits(NormType.INFINITY),
                )
                attack = gradio.Dropdown(
                    list(ATTACKS), value="PGD", label="Attack", elem_id="attack"
                )
                norm = gradio.Radio(
                    list(_NORMS), value="L∞", label="Norm", elem_id="norm"
                )
                upload = gradio.File(
                    label="Upload an image (it is not kept)",
                    height=150,
                    elem_id="upload",
                )
                message = gradio.HTML(elem_id="message", **bare)
            with gradio.Column(scale=4, min_width=420):
                gradio.HTML('<span class="adv-label">Choose a picture</span>', **bare)
                gallery = gradio.Gallery(
                    [thumbnail(one.pixels) for one in examples.pictures],
                    show_label=False,
                    columns=len(examples.pictures),
                    height="auto",
                    object_fit="cover",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    elem_id="examples",
                )
                result = gradio.HTML(elem_id="result", **bare)

        shown = {
            "fn": show,
            "inputs": [picture, attack, norm, epsilon],
            "outputs": result,
            "show_progress": "hidden",
            "trigger_mode": "always_last",
            "concurrency_id": "models",  # One attack at a time.
            "concurrency_limit": 1,
            "api_visibility": "private",
        }
        quick = {"show_progress": "hidden", "api_visibility": "private"}
        gradio.on([blocks.load, epsilon.change], **shown)
        attack.change(norms_of, [attack, norm], norm, **quick).then(**shown)
        norm.change(
            lambda symbol: gradio.Slider(**limits(_NORMS[symbol])),
            norm,
            epsilon,
            **quick,
        ).then(**shown)
        gallery.select(choose, None, [picture, message], **quick).then(**shown)
        upload.upload(
            receive, [upload, picture], [picture, message, upload], **quick
        ).then(**shown)
    return blocks


def _delete_upload(file: Path, folder: Path) -> None:
    """Deletes an upload, and the directory that Gradio made for it."""
    if folder.resolve() in file.resolve().parents:
        shutil.rmtree(file.parent, ignore_errors=True)
