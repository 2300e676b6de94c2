"""The page of the explorer in a real browser."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from advreg import datasets
from advreg.apps import demo

pytest.importorskip("gradio", reason="needs the extra app")
pytest.importorskip("sklearn")
image_module = pytest.importorskip("PIL.Image", reason="needs the extra app")
driver = pytest.importorskip(
    "playwright.sync_api", reason="needs the Python package playwright"
)

driver.expect.set_options(timeout=30_000)  # For machines that have much to do.
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None, reason="needs Chromium: apt-get install chromium"
    ),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    settings = demo.DemoSettings(epochs=2)
    networks, _ = demo.train_pair(datasets.load("digits"), settings, verbose=0)
    for name, network in networks.items():
        network.save(folder / f"{name}.keras")
    return [folder / f"{name}.keras" for name in networks]


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """Where the process of the page puts its temporary files."""
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def server(models, disk):
    """The page, as a user opens it: its address, and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "advreg", "explore", *map(str, models)]
    errors = disk.parent / "errors.txt"
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            [*command, "--dataset", "digits", "--port", str(port)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, "TMPDIR": str(disk)},
        ) as process,
    ):
        try:
            address = f"http://127.0.0.1:{port}/"
            assert address in process.stdout.readline(), errors.read_text()
            yield address, process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def browser():
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def opened(browser, server):
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.asked_for, page.broke = [], []
    page.on("request", lambda request: page.asked_for.append(request.url))
    page.on("pageerror", lambda error: page.broke.append(str(error)))
    page.goto(server[0])
    page.wait_for_selector(".adv-side")
    return page


@pytest.fixture
def page(opened):
    """The page with its first example, whatever was done on it before."""
    for digit in (9, 0):  # Once another has been shown, nothing of before is to come.
        opened.locator("#examples button").nth(digit).click()
        heading = opened.locator(".adv-picture")
        driver.expect(heading).to_contain_text(f"True class: {digit}")
    yield opened
    assert not opened.broke


def seen(page):
    """What the page shows of each model at one moment: images and predictions."""
    return page.evaluate(
        """() => Object.fromEntries(
            [...document.querySelectorAll(".adv-side")].map(side => [
                side.dataset.model,
                {
                    images: [...side.querySelectorAll("img")].map(it => it.src),
                    clean: side.querySelector(".adv-clean").innerText
                        .split("\\n").slice(1),
                    perturbed: side.querySelector(".adv-perturbed").innerText
                        .split("\\n").slice(1),
                },
            ])
        )"""
    )


@contextlib.contextmanager
def another_result(page):
    result = "document.querySelector('.adv-sides').outerHTML"
    before = page.evaluate(result)
    yield
    page.wait_for_function(f"before => {result} !== before", arg=before)


def slider(page):
    return page.locator("#epsilon input[type=range]")


def upload(page, path):
    page.set_input_files("#upload input[type=file]", path)


def test_the_page_shows_both_models_and_asks_nobody_else(page, server):
    found = seen(page)
    assert list(found) == ["plain", "regularised"]
    for side in found.values():
        assert len(side["images"]) == 3
        for predictions in (side["clean"], side["perturbed"]):
            assert re.fullmatch(r"(\d \d+(\.\d)? % ?){3}", " ".join(predictions))
    page.wait_for_timeout(500)
    asked = [url for url in page.asked_for if not url.startswith("data:")]
    assert asked
    assert all(url.startswith((server[0], "blob:")) for url in asked)


def test_the_slider_changes_pictures_and_predictions(page):
    slider(page).press("Home")
    driver.expect(page.locator(".adv-side").nth(1)).to_contain_text(
        re.compile(r"up to ±0(?!\.)")
    )
    before = seen(page)
    for side in before.values():  # No perturbation.
        assert side["images"][2] == side["images"][0]
        assert side["perturbed"] == side["clean"]
    with another_result(page):
        slider(page).press("End")
    after = seen(page)
    for name in before:
        clean, _, perturbed = after[name]["images"]
        assert clean == before[name]["images"][0]
        assert perturbed != clean
        assert after[name]["clean"] == before[name]["clean"]
        assert after[name]["perturbed"] != after[name]["clean"]
    assert after["plain"]["images"][1:] != after["regularised"]["images"][1:]


def test_the_attack_and_the_norm_are_chosen(page):
    driver.expect(slider(page)).to_have_attribute("max", "0.45")
    with another_result(page):
        page.get_by_label("L2", exact=True).check()
    driver.expect(slider(page)).to_have_attribute("max", "2.1")
    with another_result(page):
        page.get_by_label("L1", exact=True).check()
    with another_result(page):
        page.locator("#attack input").click()
        page.get_by_role("option", name="APGD").click()
    # It is not defined for L1: the norm has gone back, and the slider with it.
    driver.expect(page.get_by_label("L∞", exact=True)).to_be_checked()
    driver.expect(page.get_by_label("L1", exact=True)).to_have_count(0)
    driver.expect(slider(page)).to_have_attribute("max", "0.45")


def test_an_example_is_chosen(page):
    page.locator("#examples button").nth(3).click()
    driver.expect(page.locator(".adv-picture")).to_contain_text("True class: 3")


def test_an_upload_is_shown_and_not_kept(page, disk, tmp_path):
    files = sorted(path for path in disk.rglob("*") if path.is_file())
    colours = np.random.default_rng(0).integers(0, 255, (48, 64, 3), "uint8")
    path = tmp_path / "mine.png"
    image_module.fromarray(colours).save(path)
    upload(page, path)
    heading = page.locator(".adv-picture")
    driver.expect(heading).to_have_text(
        "mine.png. Cut from 64×48 to 48×48, resized to 8×8, turned grey."
    )
    slider(page).press("Home")  # The picture lives on, without its file.
    with another_result(page):
        slider(page).press("End")
    driver.expect(heading).to_contain_text("mine.png")
    left = {path for path in disk.rglob("*") if path.is_file()} - set(files)
    # Gradio makes an empty file for each upload, of another name.
    assert not [path for path in left if path.stat().st_size]
    assert not list(disk.rglob("mine*"))


@pytest.mark.parametrize("name", ["notes.txt", "notes.png"])
def test_what_is_no_image_is_refused_on_the_page(name, page, disk, tmp_path):
    path = tmp_path / name
    path.write_text("This is no picture.\n")
    before = seen(page)
    upload(page, path)
    message = page.get_by_role("alert").filter(has_text="is no image")
    driver.expect(message).to_have_text(
        f"“{name}” is no image. Choose a PNG, JPEG, WEBP, GIF, BMP or TIFF file."
    )
    assert "Traceback" not in page.content()
    assert seen(page) == before
    assert not list(disk.rglob("notes*"))
    page.locator("#examples button").nth(1).click()
    driver.expect(message).to_have_count(0)


def test_the_end_leaves_nothing_behind(page, server, disk):
    _, process = server
    assert any(disk.iterdir())
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert not list(disk.iterdir())
