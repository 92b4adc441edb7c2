"""The page with OCR and picture generation in headless Chromium; a stand-in answers, the tools are real."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import address, ask, open_page, python, screenshot, toast, upload, wait_until_idle
from helpers import ROOT
from test_ocr import written
from tiny_sdxl import save_tiny_sdxl

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("tools")
    pipeline = save_tiny_sdxl(folder)
    stub = str(ROOT / "tests" / "stub_demo.py")
    with python(stub, "chat", str(pipeline), uploads=folder) as process, open_page(address(process)) as page:
        page.set_default_timeout(60_000)  # the tools are loaded when they are used
        yield page


def test_text_is_read_and_a_picture_drawn(page: Any, tmp_path: Path) -> None:
    assert page.locator("#use-ocr input").is_checked()
    assert not page.locator("#generate-image input").is_checked()
    page.fill("#question textarea, #question input", "what is it?")
    page.press("#question textarea, #question input", "Enter")
    toast(page, "Upload a picture first.")

    # A picture can be asked for without one to look at.
    page.check("#generate-image input")
    page.fill("#question textarea, #question input", "draw a cat")
    page.press("#question textarea, #question input", "Enter")
    page.wait_for_selector("#conversation .message img")
    wait_until_idle(page)
    drawn = page.locator("#conversation .message img")
    assert drawn.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [64, 64]
    text = page.locator("#conversation").inner_text()
    assert "Here is a cat in the snow." in text and "Prompt: " in text
    assert "<h>" not in text and "<GEN>" not in text
    screenshot(page, "tools_drawn")

    written((20, 60, "Exit 21")).save(tmp_path / "sign.png")
    upload(page, tmp_path / "sign.png")
    page.uncheck("#generate-image input")
    assert "Reference OCR Token: Exit 21" in ask(page, "where is it?", 1)
    page.uncheck("#use-ocr input")
    assert ask(page, "and now?", 2) == "I was asked: and now?"
    assert "OCR" not in page.locator("#conversation [data-testid=user]").first.inner_text()
    screenshot(page, "tools_read")
