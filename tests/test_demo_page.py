"""What the demo page does without a browser: tasks, boxes, the conversation with its pictures, the settings."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from golden_minigpt4 import GOLDEN, golden_minigpt4
from helpers import ROOT, tiny_model, write_yaml
from PIL import Image
from stub_demo import ANSWERS, StubChat

from minivlm.config import ConfigError, load_config
from minivlm.processors.tokenizer import load_tokenizer
from minivlm.serve import web
from minivlm.serve.boxes import COLOURS, coloured, draw_boxes, preview
from minivlm.serve.chat import Chat
from minivlm.serve.loading import decoding, load_model
from minivlm.serve.web_handlers import TASKS, Handlers, choose_task

GREY = Image.new("RGB", (200, 100), (128, 128, 128))


@pytest.mark.parametrize(
    ("name", "question", "expected"),
    [
        ("Grounding", "", "[grounding] describe this image in detail"),
        ("Refer", "", "[refer] "),
        ("Refer", "[grounding] describe this image in detail", "[refer] "),
        ("Detection", "the red car", "[detection] the red car"),
        ("Detection", "[refer] the red car", "[detection] the red car"),
        ("Identify", "[vqa] ", "[identify] what is this"),
        ("Identify", "{<1><2><3><4>}", "[identify] {<1><2><3><4>}"),
        ("VQA", "[identify] what is this {<1><2><3><4>}", "[vqa] what is this {<1><2><3><4>}"),
        ("No Tag", "[vqa] is it red?", "is it red?"),
    ],
)
def test_task_shortcuts(name: str, question: str, expected: str) -> None:
    (task,) = (task for task in TASKS if task.name == name)
    assert choose_task(task, question) == expected


def colours_of(image: Image.Image) -> set[str]:
    found = image.getcolors(image.width * image.height)
    return {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in found}


def test_boxes_are_drawn_where_they_belong_each_phrase_in_its_colour() -> None:
    text = "<p>left</p> {<0><0><40><100>} and <p>right</p> {<60><50><80><100>}<delim>{<90><50><100><100>}"
    text += ", {<45><0><55><9>}"
    drawn = draw_boxes(GREY, text)
    assert drawn is not None and drawn.size == GREY.size
    assert colours_of(GREY) == {"#808080"}  # a copy
    assert set(COLOURS[:3]) <= colours_of(drawn)
    assert not set(COLOURS[3:]) & colours_of(drawn)

    def at(x: int, y: int) -> str:
        return "#{:02x}{:02x}{:02x}".format(*drawn.getpixel((x, y)))

    assert at(0, 90) == at(79, 90) == at(40, 99) == COLOURS[0]  # 40 % of 199 is 79.6
    assert at(120, 90) == at(159, 95) == at(198, 95) == COLOURS[1]
    assert at(40, 60) == at(140, 90) == at(100, 50) == "#808080"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no box",
        "<p>bad</p> {<90><10><20><300>}",
        "{<5><5><5><5>}",
        "{<0><0>}",
        "{<<><p></p>",
        "<p>" * 50,
        "{<99999999999999999999><0><1><1>}",
        "<p>line\nbreak</p> {<0><0><100><100>}",
        f"<p>{'long ' * 100}</p> {{<98><98><100><100>}}",
        "<p></p> {<0><0><100><1>}",
        "<p>日本語 é</p> {<0><0><1><1>}<delim><delim>{<1>",
    ],
)
@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (640, 400)])
def test_no_box_breaks_the_page(text: str, size: tuple[int, int]) -> None:
    image = preview(Image.new("RGB", size))
    assert max(image.size) == 640
    drawn = draw_boxes(image, text)
    assert drawn is None or drawn.size == image.size
    assert "<p>" not in coloured(text)


def test_phrases_take_the_colour_of_their_boxes_and_nothing_is_html() -> None:
    text = "<p>a dog & co</p> {<1><2><3><4>}<delim>{<5><6><7><8>} & <p>a cat</p>{<1><1><2><2>}; <i>no</i> <p>bird</p>"
    assert coloured(text) == (
        f'<b style="color: {COLOURS[0]}">a dog &amp; co</b> &amp; <b style="color: {COLOURS[1]}">a cat</b>; '
        "&lt;i&gt;no&lt;/i&gt; &lt;p&gt;bird&lt;/p&gt;"
    )
    assert coloured("{<1><2><3><4>}") == "{&lt;1&gt;&lt;2&gt;&lt;3&gt;&lt;4&gt;}"


def conversation(handlers: Handlers, *questions: str, picture: Any = GREY) -> tuple[list[list[Any]], Any]:
    """The conversations that the page shows while the questions are asked, and the session."""
    shown, session = [], None
    for question in questions:
        events = list(handlers.ask(question, picture, 1, 0.0, session))
        shown += [messages for messages, _, _ in events]
        session = events[-1][-1]
    return shown, session


def test_answers_with_boxes_come_with_their_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    question = "[detection] wheel"
    shown, session = conversation(Handlers(StubChat, grounding=True), question, "hello", "what is in {<0><0><50><50>}")
    first, hello, third = (shown[-1][number : number + 2] for number in (0, 2, 4))
    text, picture = first[1]["content"]
    assert text == f'<b style="color: {COLOURS[0]}">wheel</b>'
    with Image.open(picture["path"]) as opened:
        assert opened.size == (640, 320)
    assert [len(message["content"]) for message in (*first, *hello, *third)] == [1, 2, 1, 1, 2, 2]
    # While an answer grows there is no picture; the last question and its answer have the same one.
    assert all(len(messages[-1]["content"]) == 1 for messages in shown[:3])
    assert len(list(tmp_path.rglob("*.webp"))) == 2
    # What the model said is what it is told the next time, not what is shown.
    assert session.chat.messages[1].content == ANSWERS[question]


def test_the_ordinary_page_shows_text_as_it_is() -> None:
    shown, _ = conversation(Handlers(StubChat), "[detection] wheel")
    assert shown[-1][1]["content"] == ANSWERS["[detection] wheel"].replace("<", "&lt;").replace(">", "&gt;")


@pytest.mark.parametrize(
    ("question", "said"),
    [("[refer] ", "behind the task"), ("[identify] what is this", "Drag over the picture"), ("", "Type a question")],
)
def test_unfinished_tasks_are_told(question: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(gr, "Warning", warnings.append)
    shown, session = conversation(Handlers(StubChat, grounding=True), question)
    assert len(shown) == 1 and session is None
    assert said in warnings[0]
    assert conversation(Handlers(StubChat, grounding=True), "[identify] what is this {<1><2><3><4>}")[1].chat.messages


def test_a_new_picture_forgets_the_drawings() -> None:
    handlers = Handlers(StubChat, grounding=True)
    _, session = conversation(handlers, "[refer] the sun")
    assert session.drawn
    handlers.change_picture(Image.new("RGB", (10, 20)), session)
    assert (session.drawn, session.chat.messages, session.image.size) == ({}, [], (320, 640))
    handlers.change_picture(None, session)
    assert session.image is None


def labels(page: gr.Blocks) -> list[str]:
    return [block.value for block in page.blocks.values() if isinstance(block, gr.Button)]


def test_one_page_with_options(tmp_path: Path) -> None:
    text = {"model": tiny_model(), "demo": {"examples": ["what?"], "page": "grounding", "max_temperature": 1.5}}
    demo = load_config(write_yaml(tmp_path / "x.yaml", text)).stages[-1].demo
    assert labels(web.build_page(StubChat, demo)) == [*(task.name for task in TASKS), "Send", "Restart", "what?"]
    sliders = [b for b in web.build_page(StubChat, demo).blocks.values() if isinstance(b, gr.Slider)]
    assert [(slider.minimum, slider.maximum) for slider in sliders] == [(1, 10), (0, 1.5), (0, 100)]
    demo.page = "chat"
    assert labels(web.build_page(StubChat, demo)) == ["Send", "Restart", "what?"]


def test_settings_of_both_eras_reach_the_chat(tmp_path: Path) -> None:
    head = {"temperature": 1.0, "max_new_tokens": 300, "repetition_penalty": 1.05, "min_new_tokens": 1, "top_p": 0.9}
    for demo in (head, {**head, "repetition_penalty": 1.0, "num_beams": 5, "length_penalty": -1, "top_p": 0.5}):
        file = write_yaml(tmp_path / "x.yaml", {"model": golden_minigpt4(), "demo": demo})
        stage = load_config(file).stages[-1]
        where = argparse.Namespace(gpu_id=None, device="cpu", conv_mode=None)
        chat = partial(Chat, *load_model(stage, where))(**decoding(stage.demo))
        assert demo.items() <= chat.options.items()


def test_a_temperature_outside_of_its_slider_is_refused(tmp_path: Path) -> None:
    text = {"model": tiny_model(), "demo": {"temperature": 1.0, "max_temperature": 0.5}}
    with pytest.raises(ConfigError, match=r"temperature 1 is above max_temperature 0\.5"):
        load_config(write_yaml(tmp_path / "x.yaml", text))


@pytest.mark.parametrize("name", ["minigpt4_eval", "minigpt4_13b_eval", "minigpt4_llama2_eval", "minigptv2_eval"])
def test_shipped_files_have_the_published_settings(name: str, tmp_path: Path) -> None:
    options = [f"model.checkpoint={tmp_path}", f"model.language_model.path={tmp_path}"]
    demo = load_config(ROOT / "eval_configs" / f"{name}.yaml", options).stages[-1].demo
    v2 = name == "minigptv2_eval"
    assert decoding(demo) == {
        "max_new_tokens": 500 if v2 else 300,
        "min_new_tokens": 1,
        "temperature": 0.6 if v2 else 1.0,
        "top_k": 50,
        "top_p": 0.9,
        "num_beams": 1,
        "repetition_penalty": 1.05,
        "no_repeat_ngram_size": 0,
        "length_penalty": 1.0,
        "max_length": 2000,
        "on_overflow": "error",
    }
    assert (demo.page, demo.max_temperature) == (("grounding", 1.5) if v2 else ("chat", 2.0))


def test_a_saved_model_reads_questions_as_before(tmp_path: Path) -> None:
    """Behind ``<s>``, with which MiniGPT-v2's questions begin, Llama's tokenizer has two ways to split a text."""
    tokenizer = load_tokenizer(str(GOLDEN / "llama"))
    tokenizer.save_pretrained(tmp_path / "once")
    load_tokenizer(str(tmp_path / "once")).save_pretrained(tmp_path / "twice")
    text = "<s>[INST] <Img></Img> [vqa] what?"
    for name in ("once", "twice"):
        assert load_tokenizer(str(tmp_path / name))(text)["input_ids"] == tokenizer(text)["input_ids"]
