"""The pages of MiniGPT-4 and MiniGPT-v2 in headless Chromium: the golden models, and known answers for boxes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import (
    ANSWERS,
    QUESTION,
    address,
    ask,
    open_page,
    python,
    screenshot,
    serve,
    toast,
    upload,
    wait_until_idle,
)
from golden_minigpt4 import golden_minigpt4
from helpers import ROOT, write_yaml
from PIL import Image, ImageDraw

pytestmark = pytest.mark.browser

HEAD = {"temperature": 1.0, "repetition_penalty": 1.05, "max_new_tokens": 60, "min_new_tokens": 8}
IMAGES = "#conversation [data-testid=bot] img"


@pytest.fixture(scope="module")
def cart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A red cart under a sun, twice as wide as high."""
    image = Image.new("RGB", (640, 320), (190, 220, 245))
    draw = ImageDraw.Draw(image)
    draw.rectangle((64, 96, 576, 240), fill=(200, 50, 50))
    for left in (96, 416):
        draw.ellipse((left, 192, left + 128, 288), fill=(60, 60, 60))
    draw.ellipse((480, 6, 620, 86), fill=(250, 210, 60))
    path = tmp_path_factory.mktemp("cart") / "cart.png"
    image.save(path)
    return path


@pytest.fixture(scope="module")
def minigpt4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    demo = {"title": "MiniGPT-4", **HEAD}
    file = write_yaml(tmp_path_factory.mktemp("v1") / "x.yaml", {"model": golden_minigpt4(), "demo": demo})
    with serve(file) as process:
        yield address(process)


@pytest.fixture(scope="module")
def minigpt_v2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    demo = {"title": "MiniGPT-v2", "page": "grounding", **HEAD, "temperature": 0.6, "max_temperature": 1.5}
    file = write_yaml(tmp_path_factory.mktemp("v2") / "x.yaml", {"model": golden_minigpt4("v2"), "demo": demo})
    with serve(file) as process:
        yield address(process)


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    command = str(ROOT / "tests" / "stub_demo.py"), "grounding"
    with python(*command, uploads=tmp_path_factory.mktemp("stub")) as process:
        yield address(process)


def test_a_conversation_with_minigpt4(minigpt4: str, cart: Path, tmp_path: Path) -> None:
    with open_page(minigpt4) as page:
        assert page.input_value("input[aria-label*=Temperature][type=number]") == "1"
        (tmp_path / "text.png").write_text("this is no picture")
        upload(page, tmp_path / "text.png")
        toast(page, "This file cannot be read as a picture.")
        page.wait_for_selector("#picture img", state="detached")  # what cannot be read is taken away
        page.wait_for_selector("#picture input[type=file]", state="attached")
        upload(page, cart)
        page.wait_for_selector("#picture img")

        greedily(page)
        watch_answers(page)
        assert ask(page, "Describe this image in detail.", 1)
        assert page.evaluate("new Set(window.lengths).size") > 3  # it was streamed

        page.fill("input[aria-label*=Beam][type=number]", "3")
        page.evaluate("window.lengths = []")
        assert ask(page, "What else?", 2)
        screenshot(page, "minigpt4")
        page.click("#restart")
        page.wait_for_function(f"document.querySelectorAll('{ANSWERS}').length == 0")
        assert page.locator("#picture img").count() == 1
        assert ask(page, "And now?", 1)
        assert page.locator("#tasks").count() == 0


def greedily(page: Any) -> None:
    """Answers of tiny models, when they are sampled, may end at once."""
    page.fill("input[aria-label*=Temperature][type=number]", "0")


def watch_answers(page: Any) -> None:
    """Keep the length of the first answer whenever it changes."""
    page.evaluate(
        """selector => {
            window.lengths = [];
            new MutationObserver(() => {
                const length = (document.querySelector(selector)?.innerText ?? "").length;
                if (length && length !== window.lengths.at(-1)) window.lengths.push(length);
            }).observe(document.body, {subtree: true, childList: true, characterData: true});
        }""",
        ANSWERS,
    )


def test_a_conversation_with_minigpt_v2(minigpt_v2: str, cart: Path) -> None:
    with open_page(minigpt_v2) as page:
        assert page.input_value("input[aria-label*=Temperature][type=number]") == "0.6"
        greedily(page)
        upload(page, cart)
        page.wait_for_selector("#picture img")
        page.click("#tasks >> text=VQA")
        page.wait_for_function("document.activeElement.closest('#question')")
        page.keyboard.type("what is it?")
        assert page.input_value(QUESTION) == "[vqa] what is it?"
        page.keyboard.press("Enter")
        page.wait_for_selector(ANSWERS)
        wait_until_idle(page)
        assert ask(page, "[caption] and now?", 2)


def drag(page: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    """From one place of the picture to another, in parts of its size (the cart fills the width of its frame)."""
    frame = page.locator("#picture img").bounding_box()
    height = frame["width"] / 2
    top = frame["y"] + (frame["height"] - height) / 2
    places = [(frame["x"] + x * frame["width"], top + y * height) for x, y in (start, end)]
    page.mouse.move(*places[0])
    page.mouse.down()
    page.mouse.move(*places[1], steps=4)
    page.mouse.up()


def test_marking_a_box(stub: str, cart: Path) -> None:
    with open_page(stub) as page:
        upload(page, cart)
        page.wait_for_selector("#picture img")
        page.click("#tasks >> text=Identify")
        page.wait_for_function("document.querySelector('#question textarea, #question input').value.startsWith('[id')")
        assert page.input_value(QUESTION) == "[identify] what is this"
        page.press(QUESTION, "Enter")
        toast(page, "Drag over the picture to mark what to identify.")

        drag(page, (0.75, 0.25), (0.25, 0.75))  # in any direction
        assert page.input_value(QUESTION) == "[identify] what is this {<25><25><75><75>}"
        frame, mark = (page.locator(name).bounding_box() for name in ("#picture img", "#marked"))
        assert mark["width"] == pytest.approx(frame["width"] / 2, abs=8)
        assert mark["height"] == pytest.approx(frame["width"] / 4, abs=8)
        assert mark["y"] + mark["height"] / 2 == pytest.approx(frame["y"] + frame["height"] / 2, abs=4)
        screenshot(page, "grounding_marked")

        drag(page, (0.5, 0.5), (1.5, 1.5))  # over the edge
        assert page.input_value(QUESTION) == "[identify] what is this {<50><50><100><100>}"
        page.fill(QUESTION, "[identify] what is this {<0><0><10><20>}")
        page.wait_for_function("document.querySelector('#marked').offsetWidth < 60")  # the frame follows the text
        drag(page, (0.5, 0.5), (0.5, 0.5))  # a click
        assert page.input_value(QUESTION) == "[identify] what is this"
        assert page.locator("#marked").count() == 0

        drag(page, (0.1, 0.3), (0.9, 0.75))
        page.press(QUESTION, "Enter")
        page.wait_for_selector("#conversation [data-testid=user] img")  # the question shows its box, too
        page.wait_for_selector(IMAGES)
        box = "{<10><30><90><75>}"
        assert page.locator(ANSWERS).inner_text().startswith(f"I was asked: [identify] what is this {box}")
        assert page.locator("#marked").count() == 0


def test_answers_with_boxes(stub: str, cart: Path) -> None:
    with open_page(stub) as page:
        upload(page, cart)
        page.wait_for_selector("#picture img")
        page.click("#tasks >> text=Grounding")
        page.wait_for_function("document.querySelector('#question textarea, #question input').value.length > 20")
        page.press(QUESTION, "Enter")
        page.wait_for_function(f"document.querySelector('{IMAGES}')?.naturalWidth == 640")
        assert page.locator(ANSWERS).inner_text().strip() == "a red cart stands on two wheels beside the sun"
        colours = page.locator(f"{ANSWERS} b").evaluate_all("all => all.map(each => getComputedStyle(each).color)")
        assert len(set(colours)) == 3
        screenshot(page, "grounding")

        said = ask(page, "[refer] nonsense", 2)
        assert "<b onclick=alert(1)>x</b>" in said and "<p>bad</p>" in said
        assert page.locator("[onclick]").count() == 0
        assert page.locator(IMAGES).count() == 1
        ask(page, "[refer] the sun", 3)
        page.wait_for_function(f"document.querySelectorAll('{IMAGES}').length == 2")
        page.set_viewport_size({"width": 400, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        screenshot(page, "grounding_narrow")
        page.set_viewport_size({"width": 1200, "height": 800})
        page.click("#picture button[aria-label*=Remove], #picture button[aria-label*=Clear]")
        page.wait_for_function(f"document.querySelectorAll('{ANSWERS}').length == 0")
