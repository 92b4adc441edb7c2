"""Text in pictures: read by the real models of rapidocr, added to questions as Mini-Gemini does."""

from __future__ import annotations

import io
import json
import sys
import threading
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from helpers import tiny_model, write_yaml
from PIL import Image, ImageDraw, ImageFont
from stub_demo import StubChat

from minivlm import cli
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.tokenizer import load_tokenizer
from minivlm.serve import ocr as ocr_module
from minivlm.serve.assistant import Assistant, Tools
from minivlm.serve.loading import ServeError
from minivlm.serve.ocr import OCR
from minivlm.serve.web_handlers import Handlers
from minivlm.types import IMAGE_TOKEN_ID, Batch

FONT = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), 36)
SIGN = "Invoice No. 48213, TOTAL: $129.50, Paid"
BLANK = Image.new("RGB", (64, 48), (220, 30, 30))


def written(*texts: tuple[int, int, str]) -> Image.Image:
    """Black on white, each text at its place."""
    image = Image.new("RGB", (640, 480), "white")  # a flat one would be enlarged
    for left, top, text in texts:
        ImageDraw.Draw(image).text((left, top), text, fill="black", font=FONT)
    return image


@pytest.fixture(scope="module")
def sign() -> Image.Image:
    return written((400, 112, "Paid"), (20, 110, "TOTAL: $129.50"), (20, 20, "Invoice No. 48213"))


@pytest.fixture(scope="module")
def reader(sign: Image.Image) -> OCR:
    reader = OCR()
    reader.read(sign)
    return reader


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_yaml(tmp_path_factory.mktemp("ocr") / "x.yaml", {"model": tiny_model(), "demo": {"max_new_tokens": 3}})


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every prompt that a model is given, as text."""
    given: list[str] = []
    tokenizer = load_tokenizer("asset:quickstart")
    generate = VisionLanguageModel.generate

    def recorded(self: VisionLanguageModel, batch: Batch, **options: Any) -> torch.Tensor:
        for row in batch.input_ids:
            given.append(tokenizer.decode(row[row != IMAGE_TOKEN_ID], skip_special_tokens=True))
        return generate(self, batch, **options)

    monkeypatch.setattr(VisionLanguageModel, "generate", recorded)
    return given


def test_lines_are_read_in_order_with_their_places(reader: OCR, sign: Image.Image) -> None:
    lines = reader.read(sign)
    assert ", ".join(line.text for line in lines) == reader.text([sign]) == SIGN
    assert all(line.confidence > 0.9 for line in lines)
    (left, top), (right, _), (_, bottom), _ = lines[2].box
    assert 380 < left < 410 < 460 < right < 500 and 100 < top < 125 < 140 < bottom < 170


def test_a_picture_is_read_once_and_what_is_doubtful_left_out(
    reader: OCR, sign: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign.save(tmp_path / "sign.png")
    assert reader.text([tmp_path / "sign.png"]) == SIGN
    confidences = {line.text: line.confidence for line in reader.read(sign)}
    least = min(confidences, key=lambda text: confidences[text])
    surer = OCR(confidences[least])
    assert [line.text for line in surer.read(sign)] == [text for text in confidences if text != least]
    monkeypatch.setattr(ocr_module, "_engine", None)
    assert reader.text([sign.copy(), sign]) == f"{SIGN}, {SIGN}"


def test_pictures_without_text_add_nothing(reader: OCR, caplog: pytest.LogCaptureFixture) -> None:
    assert reader.read(BLANK) == reader.read(Image.new("RGB", (1, 1))) == []
    assert reader.reference([BLANK]) == ""
    assert not caplog.messages
    assert reader.read(Image.new("RGB", (6000, 2))) == []
    assert "no text is read in a picture of 6000 x 2" in caplog.text
    with pytest.raises(OSError, match=r"no\.png"):
        reader.read("no.png")


def test_a_picture_of_the_marker_is_no_picture(reader: OCR) -> None:
    assert reader.reference([written((20, 60, "see <image> here"))]) == "\nReference OCR Token: see image here\n"


def test_threads_share_the_engine(reader: OCR) -> None:
    pictures = [written((20, 60, f"number {number}")) for number in range(2)]
    found: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: reader.text([pictures[n]])}))  # type: ignore[misc]
        for n in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: f"number {n}" for n in range(2)}


def test_without_the_extra_its_name_is_told_before_the_model_is_loaded(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ServeError, match="rapidocr"):
        OCR()
    assert cli.main(["chat", str(config), "--ocr"]) == 2
    said = capsys.readouterr().err
    assert 'pip install "minivlm[ocr]"' in said and "loading" not in said


def test_every_turn_of_a_chat_holds_the_text(
    config: Path,
    sign: Image.Image,
    tmp_path: Path,
    prompts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sign.save(tmp_path / "sign.png")
    BLANK.save(tmp_path / "blank.png")
    typed = [f"/image {tmp_path}/sign.png", "what is it?", "and what else?", f"/image {tmp_path}/blank.png", "hm?", ""]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(typed)))
    assert cli.main(["chat", str(config), "--ocr", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert f"OCR Token: {SIGN}\n" in said and "(no text in it)" in said
    first, second, third = prompts
    added = f"\nReference OCR Token: {SIGN}\n".lower()  # as all text of this tokenizer
    assert f"what is it?{added}" in first
    assert f"and what else?{added}" in second
    assert "hm?" in third and "ocr" not in third


def test_batches_are_asked_with_the_text_of_their_pictures(
    config: Path, sign: Image.Image, tmp_path: Path, prompts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    sign.save(tmp_path / "a.png")
    BLANK.save(tmp_path / "b.png")
    (tmp_path / "c.png").write_text("no picture")
    command = ["generate", str(config), "--input", str(tmp_path), "--output", str(tmp_path / "out.jsonl")]
    assert cli.main([*command, "--prompt", "what is it?", "--ocr", "--num-workers", "1", "--device", "cpu"]) == 1
    with_text = [f"what is it?\nReference OCR Token: {SIGN}\n".lower() in prompt for prompt in prompts]
    assert sorted(with_text) == ["ocr" in prompt for prompt in sorted(prompts, key=len)] == [False, True]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {(line["image"], line["prompt"], "error" in line) for line in lines} == {
        ("a.png", "what is it?", False),
        ("b.png", "what is it?", False),
        ("c.png", "what is it?", True),
    }


def test_the_page_shows_the_question_as_it_was_typed(reader: OCR, sign: Image.Image) -> None:
    handlers = Handlers(StubChat, Tools(ocr=reader))  # type: ignore[arg-type]
    *_, (shown, _, session) = handlers.ask("what is it?", sign, 1, 0.0, None)
    assert shown[0]["content"] == "what is it?"
    assert session.chat.messages[0].content == f"what is it?\nReference OCR Token: {SIGN}\n"
    *_, (shown, _, session) = handlers.ask("and now?", sign, 1, 0.0, session, False)
    assert session.chat.messages[2].content == "and now?"
    *_, (shown, _, session) = handlers.ask("and now?", sign, 1, 0.0, session, True)
    assert session.chat.messages[4].content == f"and now?\nReference OCR Token: {SIGN}\n"


def test_several_pictures_one_after_the_other(reader: OCR, sign: Image.Image) -> None:
    assistant = Assistant(StubChat(), Tools(ocr=reader))  # type: ignore[arg-type]
    list(assistant.stream("one", [sign]))
    list(assistant.stream("two", [BLANK, written((20, 60, "number 1"))]))
    assert assistant.messages[2].content == f"two\nReference OCR Token: {SIGN}, number 1\n"
    assistant.reset()
    list(assistant.stream("three", [BLANK]))
    assert assistant.messages[0].content == "three"
