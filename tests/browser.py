"""Demo pages in headless Chromium, for the tests under the marker ``browser``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUESTION = "#question textarea, #question input"
ANSWERS = "#conversation [data-testid=bot]:not(:has(img))"
LOCAL = re.compile(r"(http|ws)://127\.0\.0\.1:\d+/|data:|blob:")


@contextmanager
def serve(config: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """``demo.py`` in a process that does not outlive the test."""
    command = [str(ROOT / "demo.py"), "--cfg-path", str(config), "--device", "cpu", *options]
    with python(*command, uploads=config.parent) as process:
        yield process


@contextmanager
def python(*command: str, uploads: Path) -> Iterator[subprocess.Popen[str]]:
    """A program whose uploads go to a folder that the test can look into."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(uploads)}
    with subprocess.Popen(
        [sys.executable, "-u", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=ROOT,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def address(process: subprocess.Popen[str]) -> str:
    """What the program prints when it is ready."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"the page is at (http\S+)", line):
            return found[1]
    raise AssertionError("".join(lines))


@contextmanager
def open_page(server: str, width: int = 1200, height: int = 800, *, sees: bool = True) -> Iterator[Any]:
    """The open page; afterwards no request may have left this machine, and no script may have failed."""
    from playwright import sync_api

    assert CHROMIUM is not None, "install Chromium, e.g. apt-get install chromium"
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(20_000)
        requests: list[str] = []
        failures: list[Any] = []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: failures.append(error))
        visit(page, server, sees)
        yield page
        browser.close()
    assert len(requests) > 5
    assert [url for url in requests if not LOCAL.match(url)] == []
    assert failures == []


def visit(page: Any, server: str, sees: bool = True) -> None:
    page.goto(server)
    page.wait_for_selector(QUESTION)
    if sees:
        page.wait_for_selector("#picture input[type=file]", state="attached")
    page.wait_for_timeout(300)  # the listeners of the page come last


def upload(page: Any, file: Path) -> None:
    page.set_input_files("#picture input[type=file]", file)


def ask(page: Any, question: str, number: int) -> str:
    """Ask, and wait until answer ``number`` is whole."""
    page.fill(QUESTION, question)
    page.press(QUESTION, "Enter")
    page.wait_for_function(f"document.querySelectorAll('{ANSWERS}').length == {number}")
    wait_until_idle(page)
    return page.locator(ANSWERS).nth(number - 1).inner_text()


def wait_until_idle(page: Any) -> None:
    """Wait until nothing is being answered; gradio drops what is asked before."""
    page.wait_for_function("!document.querySelector('[data-testid=status-tracker]:not(.hide)')")


def toast(page: Any, text: str) -> None:
    page.wait_for_selector(f".toast-body >> text={text}")


def screenshot(page: Any, name: str) -> None:
    """Keep a picture of the page in the folder $MINIVLM_SCREENSHOTS, if there is one."""
    if folder := os.environ.get("MINIVLM_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png")
