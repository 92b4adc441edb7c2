"""The demo page in headless Chromium, served by ``demo.py`` in a process of its own."""

from __future__ import annotations

import json
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import ANSWERS, QUESTION, address, ask, open_page, screenshot, serve, toast, upload, visit
from helpers import ROOT, tiny_model, write_yaml
from PIL import Image, ImageDraw

from minivlm.api import assemble
from minivlm.checkpoints.native import Manifest, save_model
from minivlm.config import load_config

pytestmark = pytest.mark.browser


def demo_of(section: dict[str, Any], folder: Path) -> Path:
    """The file of a demo of a random model, which talks long nonsense."""
    torch.manual_seed(3)
    model, processor, config = assemble(
        load_config(write_yaml(folder / "model.yaml", {"model": section})).stages[-1].model
    )
    save_model(folder / "model", model, config, processor, Manifest())
    demo = {"title": "Shapes", "examples": ["what color is it?"], "max_new_tokens": 60, "max_upload_mb": 1}
    return write_yaml(folder / "demo.yaml", {"model": {"checkpoint": str(folder / "model")}, "demo": demo})


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a demo."""
    with serve(demo_of(tiny_model(), tmp_path_factory.mktemp("demo"))) as process:
        yield address(process)


@pytest.fixture
def page(server: str) -> Iterator[Any]:
    with open_page(server) as page:
        yield page


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    image = Image.new("RGB", (64, 64), (230, 236, 240))
    ImageDraw.Draw(image).rectangle((16, 20, 44, 50), fill=(200, 30, 40))
    image.save(tmp_path / "shape.png")
    return tmp_path / "shape.png"


def test_picture_question_streamed_answer_restart(page: Any, picture: Path) -> None:
    upload(page, picture)
    page.wait_for_selector("#picture img")
    page.evaluate(
        """selector => {
            window.seen = [];
            new MutationObserver(() => {
                const found = document.querySelector(selector);
                const text = found ? found.innerText : "";
                if (text && text !== window.seen.at(-1)) window.seen.push(text);
            }).observe(document.body, {subtree: true, childList: true, characterData: true});
        }""",
        ANSWERS,
    )
    page.fill(QUESTION, "what color is the shape?")
    page.press(QUESTION, "Enter")
    page.wait_for_function("window.seen.length > 3")
    page.wait_for_function("window.seen.at(-1).length > 40")
    seen = page.evaluate("window.seen")
    assert all(later.startswith(earlier.rstrip()) for earlier, later in zip(seen, seen[1:]))  # noqa: RUF007
    assert page.input_value(QUESTION) == ""
    page.wait_for_selector("#conversation [data-testid=user] >> text=what color is the shape?")

    page.wait_for_selector("#speed >> text=/\\d+ tokens, [0-9.]+ tokens.s/")
    page.click("#examples button")
    page.wait_for_function(f"document.querySelectorAll('{ANSWERS}').length == 2")
    screenshot(page, "chat")
    page.click("#restart")
    page.wait_for_function(f"document.querySelectorAll('{ANSWERS}').length == 0")
    assert page.locator("#picture img").count() == 1
    page.wait_for_timeout(500)  # an answer on its way must not come back
    assert page.locator(ANSWERS).count() == 0


def test_a_new_picture_begins_a_new_conversation(page: Any, picture: Path) -> None:
    upload(page, picture)
    page.wait_for_selector("#picture img")
    page.fill(QUESTION, "what is it?")
    page.click("#send")
    page.wait_for_selector(ANSWERS)
    page.click("#picture button[aria-label*=Remove], #picture button[aria-label*=Clear]")
    page.wait_for_function(f"document.querySelectorAll('{ANSWERS}').length == 0")
    page.fill(QUESTION, "and now?")
    page.press(QUESTION, "Enter")
    toast(page, "Upload a picture first.")
    assert page.input_value(QUESTION) == "and now?"


def test_mistakes_are_told(page: Any, picture: Path, tmp_path: Path) -> None:
    page.press(QUESTION, "Enter")
    toast(page, "Type a question first.")
    (tmp_path / "text.png").write_text("this is no picture")
    upload(page, tmp_path / "text.png")
    toast(page, "This file cannot be read as a picture.")
    page.wait_for_selector("#picture input[type=file]", state="attached")
    (tmp_path / "large.png").write_bytes(picture.read_bytes() + bytes(1_100_000))
    upload(page, tmp_path / "large.png")
    toast(page, "exceed the maximum allowed size")
    upload(page, picture)
    page.wait_for_selector("#picture img")
    page.fill(QUESTION, "where is <image>, and <image>?")
    page.press(QUESTION, "Enter")
    toast(page, "2 <image> markers in the text, but 1 pictures")
    assert page.locator(ANSWERS).count() == 0


def test_two_visitors_share_nothing(page: Any, server: str, picture: Path) -> None:
    upload(page, picture)
    page.wait_for_selector("#picture img")
    page.fill(QUESTION, "what is it?")
    page.press(QUESTION, "Enter")
    page.wait_for_selector(ANSWERS)
    other = page.context.browser.new_page()
    visit(other, server)
    assert other.locator(ANSWERS).count() == 0
    assert other.locator("#picture img").count() == 0


def test_a_language_model_alone_is_only_asked(tmp_path: Path) -> None:
    blind = {"vision_encoder": {"name": "none", "pictures": "drop"}, "connector": "none"}
    with serve(demo_of(tiny_model() | blind, tmp_path)) as process, open_page(address(process), sees=False) as page:
        assert page.locator("#picture").count() == 0
        assert ask(page, "what color is it?", 1)
        page.wait_for_selector("#speed >> text=/\\d+ tokens, [0-9.]+ tokens.s/")
        page.click("#examples button")
        page.wait_for_function(f"document.querySelectorAll('{ANSWERS}').length == 2")
        screenshot(page, "text_only")


def test_narrow_page_needs_no_sideways_scrolling(page: Any) -> None:
    page.set_viewport_size({"width": 420, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 420


def test_forged_requests_reach_no_file_and_no_address(server: str) -> None:
    config = json.load(urllib.request.urlopen(f"{server}config"))
    events = {target[1]: d["id"] for d in config["dependencies"] for target in d["targets"]}
    for path in ("/etc/hostname", str(ROOT / "setup.py"), "http://127.0.0.1:9/x.png", "https://example.com/x.png"):
        forged = {"path": path, "meta": {"_type": "gradio.FileData"}}
        body = {"data": [forged, None], "fn_index": events["input"], "session_hash": "forged"}
        request = urllib.request.Request(
            f"{server}gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request)
        with urllib.request.urlopen(f"{server}gradio_api/queue/data?session_hash=forged") as answer:
            messages = [json.loads(line[5:]) for line in answer.read().decode().splitlines() if line[:5] == "data:"]
        done = next(m for m in messages if m["msg"] == "process_completed")
        assert done["success"] is False
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{server}gradio_api/file={path}")


def test_taken_port_and_private_uploads(server: str, tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "x.yaml", {"model": tiny_model()})
    port = server.rstrip("/").rpartition(":")[2]
    with serve(config, "--port", port) as process:
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert port in output and "Traceback" not in output

    with serve(config) as process:
        assert address(process) != server
        (uploads,) = tmp_path.glob("minivlm-demo-*")
        assert uploads.stat().st_mode & 0o077 == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert not list(tmp_path.glob("minivlm-demo-*"))
