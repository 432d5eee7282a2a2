"""The explorer in a real browser: `pip install -e .[browser]`, a Chromium, then `make browser`. Skipped if one is missing.

JupyterLab and Voila run the notebook; percentile, layer, strip, class and an upload must change the figure.
"""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
CHROMIUM = (
    os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
QUIET = "no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update disable-sync"
FLAGS = [f"--{flag}" for flag in QUIET.split()]
WAITS = 1200  # of 100 ms: a busy machine computes a map in a minute

pytestmark = [
    pytest.mark.skipif(not os.environ.get("SCANLIB_BROWSER"), reason="set SCANLIB_BROWSER=1, or call `make browser`"),
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium found; install one, or set CHROMIUM to its path"),
]


def start_server(arguments: list[str], address: str, environment: dict[str, str]) -> subprocess.Popen:
    """Start a server and wait until it answers."""
    with open(ROOT / "out" / "server.log", "w") as log:
        server = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    for _ in range(480):
        try:
            urllib.request.urlopen(address, timeout=2)
            return server
        except urllib.error.HTTPError:
            return server
        except OSError:
            time.sleep(0.5)
    server.kill()
    raise RuntimeError(f"no answer from {address}; see out/server.log")


@pytest.fixture
def page(tmp_path):
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    with api.sync_playwright() as playwright:
        options = {"executable_path": CHROMIUM, "args": FLAGS, "headless": True, "viewport": {"width": 1500, "height": 1400}}
        context = playwright.chromium.launch_persistent_context(str(tmp_path / "profile"), **options)
        page = context.new_page()
        page.set_default_timeout(120_000)
        yield page
        context.close()


def find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def use_every_control(page, box, folder: Path, name: str) -> None:
    """Use every control of the explorer in ``box``; its figure must change each time."""
    picture = box.locator(".widget-image, img.jupyter-widgets").last

    def expect_change(what, act):
        before = picture.get_attribute("src")
        act()
        for _ in range(WAITS):
            if picture.get_attribute("src") != before:
                return
            page.wait_for_timeout(100)
        raise AssertionError(f"{what} changed nothing")

    handle = box.locator(".noUi-handle").first
    expect_change("the percentile", lambda: (handle.focus(), page.keyboard.press("ArrowLeft")))
    dropdowns = box.locator("select")
    expect_change("the layer", lambda: dropdowns.nth(0).select_option(index=2))
    expect_change("the film", lambda: box.get_by_role("button", name="percentile film").click())
    box.screenshot(path=folder / f"{name}.png")
    expect_change("the class", lambda: dropdowns.nth(1).select_option(index=3))
    upload = folder / "upload.png"
    Image.new("RGB", (80, 60), "orange").save(upload)
    with page.expect_file_chooser() as chooser:
        box.locator(".widget-upload").first.click()
    expect_change("an upload", lambda: chooser.value.set_files(str(upload)))
    saved = set((ROOT / "data" / "cache").glob("explorer_*.png"))
    box.get_by_role("button", name="save").click()
    for _ in range(WAITS):
        if new := set((ROOT / "data" / "cache").glob("explorer_*.png")) - saved:
            break
        page.wait_for_timeout(100)
    assert new, "save wrote nothing"
    new.pop().unlink()
    box.screenshot(path=folder / f"{name}_saved.png")


@pytest.fixture
def folder():
    folder = ROOT / "out"
    folder.mkdir(exist_ok=True)
    shutil.copy(ROOT / "notebooks" / "10_explorer.ipynb", folder)  # JupyterLab saves what it ran
    return folder


def test_in_jupyterlab(page, folder):
    port = find_free_port()
    address = f"http://127.0.0.1:{port}"
    quiet = ["--ServerApp.token=", "--ServerApp.password=", "--no-browser", "--allow-root", f"--ServerApp.port={port}"]
    quiet += ["--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    arguments = [sys.executable, "-m", "jupyterlab", "out", *quiet]
    server = start_server(arguments, f"{address}/api", {"SCANLIB_FAST": "1"} | os.environ)
    try:
        page.goto(f"{address}/lab/tree/10_explorer.ipynb?reset")
        page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=120_000)
        page.wait_for_timeout(2000)
        page.locator(".lm-MenuBar-itemLabel").get_by_text("Run", exact=True).click()
        page.locator(".lm-Menu-itemLabel").get_by_text("Run All Cells", exact=True).click()
        box = page.locator(".jp-OutputArea-output", has=page.locator(".widget-upload")).first
        box.wait_for(timeout=240_000)
        box.scroll_into_view_if_needed()
        is_done = "() => ![...document.querySelectorAll('.jp-InputPrompt')].some(p => p.textContent.includes('*'))"
        page.wait_for_function(is_done, timeout=240_000)
        use_every_control(page, box, folder, "explorer_jupyterlab")
        assert page.get_by_text("Traceback (most recent call last)").count() == 0
    finally:
        server.kill()


def test_in_voila(page, folder):
    pytest.importorskip("voila", reason="pip install voila")
    port = find_free_port()
    address = f"http://127.0.0.1:{port}"
    arguments = [sys.executable, "-m", "voila", "out/10_explorer.ipynb", "--no-browser", f"--port={port}"]
    server = start_server(arguments, f"{address}/static/", {"SCANLIB_FAST": "1"} | os.environ)
    try:
        page.goto(address, timeout=300_000)
        box = page.locator(".jp-OutputArea-output", has=page.locator(".widget-upload")).first
        box.wait_for(timeout=300_000)
        page.wait_for_timeout(3000)
        use_every_control(page, box, folder, "explorer_voila")
        assert page.get_by_text("Traceback (most recent call last)").count() == 0
    finally:
        server.kill()
