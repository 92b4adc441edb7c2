"""Pictures from text: prompts found in answers, drawn by a tiny SDXL pipeline; without it the answer still comes."""

from __future__ import annotations

import errno
import io
import itertools
import json
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model, write_yaml
from PIL import Image
from stub_demo import StubChat
from tiny_sdxl import save_tiny_sdxl

from minivlm import cli
from minivlm.config import ConfigError, load_config
from minivlm.config.experiment import NEGATIVE_PROMPT, DemoConfig
from minivlm.processors.processor import VLMProcessor
from minivlm.serve import web_handlers
from minivlm.serve.assistant import Assistant, Reply, Tools
from minivlm.serve.image_generation import (
    GenerationError,
    ImageGenerator,
    device_beside,
    picture_prompt,
    readable,
    save_picture,
)
from minivlm.serve.terminal import run_terminal
from minivlm.serve.web_handlers import Handlers
from minivlm.types import Message

ANSWER = "Sure, here it is. <h> a red cat, 4k </h>"
SHOWN = "Sure, here it is. \nPrompt:  a red cat, 4k "
RED = Image.new("RGB", (40, 30), (220, 30, 30))


class Talker(StubChat):
    """Always the same answer, word by word."""

    answer = ANSWER

    def stream(self, text: str, images: Sequence[Any] = (), **options: Any) -> Iterator[str]:
        for end in range(1, len(self.answer) + 1):
            yield self.answer[:end]
        self.messages += [Message("user", text), Message("assistant", self.answer)]
        self.num_images += len(images)


class Reader:
    """Stands in for the OCR."""

    def reference(self, pictures: Sequence[Any]) -> str:
        return "\nReference OCR Token: STOP\n" if pictures else ""


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sdxl(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def generator(sdxl: Path) -> ImageGenerator:
    return ImageGenerator(str(sdxl), negative_prompt="ugly", steps=2, seed=1)


@pytest.mark.parametrize(
    ("answer", "prompt"),
    [
        ("no tag", None),
        ("<h>cat</h>", "cat"),
        ("a <h> cat\non a mat </h> b", " cat\non a mat "),
        ("<h>one</h> and <h>two</h>", "two"),
        ("<h>one<h>two</h>", "two"),
        ("<h>one</h> two</h>", "one"),
        ("</h>one<h>", None),
        ("<h>one", None),
        ("<h>one</h><h> </h>", "one"),
        ("<h></h>", None),
    ],
)
def test_the_prompt_is_that_of_the_last_pair(answer: str, prompt: str | None) -> None:
    assert picture_prompt(answer) == prompt


def test_answers_are_readable_while_they_grow() -> None:
    assert readable(ANSWER) == SHOWN
    assert readable("<h>cat</h>") == "Prompt: cat"
    assert readable("1 < 2, <b> <") == "1 < 2, <b> <"
    grown = [readable(ANSWER[:end], growing=True) for end in range(len(ANSWER) + 1)]
    assert all(after.startswith(before) for before, after in itertools.pairwise(grown))
    assert grown[-1] == SHOWN
    assert not any("<" in text for text in grown)


def test_a_pipeline_draws_what_the_settings_say(sdxl: Path, generator: ImageGenerator) -> None:
    steps: list[tuple[int, int]] = []
    picture = generator.draw("a cat", lambda *step: steps.append(step))
    assert picture.size == (16, 16)
    assert steps == [(1, 2), (2, 2)]
    assert generator.draw("a cat").tobytes() == picture.tobytes()
    assert generator.draw("a dog").tobytes() != picture.tobytes()
    other = ImageGenerator(str(sdxl), negative_prompt="blue", steps=2, size=32, seed=1)
    assert other.draw("a cat").size == (32, 32)
    other.size = None
    assert other.draw("a cat").tobytes() != picture.tobytes()


def test_the_negative_prompt_is_that_of_mini_gemini(sdxl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import StableDiffusionXLPipeline

    given: dict[str, Any] = {}
    encode = StableDiffusionXLPipeline.encode_prompt

    def encode_prompt(self: Any, **options: Any) -> Any:
        given.update(options)
        return encode(self, **options)

    monkeypatch.setattr(StableDiffusionXLPipeline, "encode_prompt", encode_prompt)
    demo = DemoConfig(generation=True, image_generator=str(sdxl), image_steps=1)
    assistant = Assistant(Talker(), Tools.of(demo))  # type: ignore[arg-type]
    *_, reply = assistant.stream("draw a cat")
    assert reply.picture is not None and not reply.note
    assert (given["prompt"], given["negative_prompt"]) == (" a red cat, 4k ", NEGATIVE_PROMPT)
    assert NEGATIVE_PROMPT.startswith("out of frame, lowres, ") and NEGATIVE_PROMPT.endswith(", watermark, signature")
    assert len(NEGATIVE_PROMPT.split(", ")) == 38


def test_ocr_comes_before_the_request_in_every_turn(generator: ImageGenerator) -> None:
    assistant = Assistant(Talker(), Tools(Reader(), generator))  # type: ignore[arg-type]
    *growing, reply = assistant.stream("what is it?", [RED])
    assert all(each.growing for each in growing) and not reply.growing
    assert reply.text == SHOWN and reply.picture is not None
    notes = list(dict.fromkeys(each.note for each in growing))
    assert notes == ["", "drawing the picture", *(f"drawing the picture: step {n} of 2" for n in (1, 2))]
    list(assistant.stream("and now?"))
    list(assistant.stream("just talk", generate=False, ocr=False))
    assert [message.content for message in assistant.messages] == [
        "what is it?\nReference OCR Token: STOP\n <GEN>",
        ANSWER,
        "and now?\nReference OCR Token: STOP\n <GEN>",
        ANSWER,
        "just talk",
        ANSWER,
    ]
    seen = [(exchange.question, exchange.reply.text) for exchange in assistant.exchanges]
    assert seen == [("what is it?", SHOWN), ("and now?", SHOWN), ("just talk", ANSWER)]


def chat(config: Path, monkeypatch: pytest.MonkeyPatch, *typed: str, arguments: Sequence[str] = ()) -> int:
    """``minivlm chat --gen`` with a model that always says the same."""
    monkeypatch.setattr(VLMProcessor, "decode", lambda self, ids: [ANSWER])
    monkeypatch.setattr(VLMProcessor, "decode_partial", lambda self, ids: ANSWER[: len(ids)])
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*typed, ""])))
    return cli.main(["chat", str(config), "--gen", "--device", "cpu", *arguments])


@pytest.fixture
def config(tmp_path: Path, sdxl: Path) -> Path:
    demo = {"max_new_tokens": 3, "image_generator": str(sdxl), "image_steps": 1}
    return write_yaml(tmp_path / "x.yaml", {"model": tiny_model(), "demo": demo})


def test_chat_writes_pictures_and_overwrites_none(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert chat(config, monkeypatch, "draw a cat", "again") == 0
    said = capsys.readouterr().out
    assert f"model: {SHOWN}\n(drawing the picture)\npicture: generate.png (16 x 16)\n" in said
    assert "picture: generate_2.png (16 x 16)\n" in said
    assert "step" not in said  # a file is told the beginning and the end
    assert chat(config, monkeypatch, "draw", arguments=["--output-file", "new/cat.jpg"]) == 0
    found = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.*g"))
    assert found == ["generate.png", "generate_2.png", "new/cat.jpg"]
    for name, kind in zip(found, ("PNG", "PNG", "JPEG")):
        with Image.open(tmp_path / name) as opened:
            assert (opened.format, opened.size) == (kind, (16, 16))


def test_an_output_file_that_is_no_picture_is_refused(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(config, monkeypatch, arguments=["--output-file", "cat.txt"]) == 2
    assert "--output-file: generated_image cat.txt must end in one of .png" in capsys.readouterr().err
    assert cli.main(["chat", str(config), "--output-file", "cat.png"]) == 2
    assert "add --gen" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"demo.*cat\.txt"):
        load_config(config, ["demo.generated_image=cat.txt"])
    with pytest.raises(ConfigError, match="image_size 20 is no multiple of 8"):
        load_config(config, ["demo.image_size=20"])


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_picture_that_cannot_be_written_is_kept_elsewhere(
    generator: ImageGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("temporary" if elsewhere else "file")))
    output = io.StringIO()
    given = iter(["draw", "/quit"])
    demo = DemoConfig(generated_image=str(tmp_path / "file" / "x.png"))
    run_terminal(
        Talker(),  # type: ignore[arg-type]
        demo,
        tools=Tools(generator=generator),
        input=lambda prompt: next(given),
        output=output,
    )
    told = f"(drawing the picture)\n(the picture cannot be written to {demo.generated_image}: File exists)\n"
    kept = tmp_path / "temporary" / "x.png"
    told += f"picture: {kept} (16 x 16)\n" if elsewhere else "(nor to the folder for temporary files)\n"
    assert told in output.getvalue()
    assert output.getvalue().endswith("bye\n")
    assert kept.exists() == elsewhere


def last_note(generator: ImageGenerator) -> str:
    """What is said about the picture; the text must be there."""
    assistant = Assistant(Talker(), Tools(generator=generator))  # type: ignore[arg-type]
    reply = assistant.ask("draw")
    assert reply == Reply(SHOWN, None, reply.note)
    assert assistant.exchanges[0].reply == reply
    return reply.note


def test_without_diffusers_the_text_still_comes(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert chat(config, monkeypatch, "draw a cat") == 0
    said = capsys.readouterr().out
    assert f"model: {SHOWN}\n(drawing the picture)\n(no picture: " in said
    assert 'run pip install "minivlm[generation]")' in said


@pytest.mark.parametrize("path", ["/nowhere/sdxl", "./sdxl", "nowhere", "a/b/c"])
def test_a_missing_folder_is_told(path: str) -> None:
    assert last_note(ImageGenerator(path)) == f"no picture: there is no folder {path}; correct demo.image_generator"


def test_a_folder_that_is_no_pipeline_is_told(sdxl: Path, tmp_path: Path) -> None:
    assert f"no picture: {tmp_path} cannot be loaded: " in last_note(ImageGenerator(str(tmp_path)))
    # Weights as pickles are not read, and code beside them is not run.
    shutil.copytree(sdxl, tmp_path / "pickled")
    weights = tmp_path / "pickled" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert "demo.image_generator" in last_note(ImageGenerator(str(tmp_path / "pickled")))
    shutil.copytree(sdxl, tmp_path / "code")
    index = json.loads((tmp_path / "code" / "model_index.json").read_text())
    index["unet"] = ["evil", "Evil"]
    (tmp_path / "code" / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "code" / "unet" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    assert last_note(ImageGenerator(str(tmp_path / "code"))).startswith("no picture: ")
    assert not (tmp_path / "ran").exists()


def test_a_folder_of_half_precision_alone_is_drawn_with(sdxl: Path, tmp_path: Path, capfd: Any) -> None:
    shutil.copytree(sdxl, tmp_path / "half")
    for file in (tmp_path / "half").rglob("*.safetensors"):
        file.rename(file.with_suffix(".fp16.safetensors"))
    assert ImageGenerator(str(tmp_path / "half"), steps=1).draw("a cat").size == (16, 16)
    assert "%|" not in capfd.readouterr().err  # no bars of the parts that are loaded


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_cannot_draw_is_told(sdxl: Path, device: str) -> None:
    note = last_note(ImageGenerator(str(sdxl), device=device))
    assert note.startswith(f"no picture: device {device} cannot be used: ")
    assert note.endswith("; correct demo.image_device")


def test_a_lack_of_memory_is_told(sdxl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = ImageGenerator(str(sdxl), steps=1)

    def full(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    generator._pipeline = full
    note = last_note(generator)
    assert "needs more memory than cpu has; set demo.image_device" in note


def test_an_answer_cut_within_its_prompt_is_told(generator: ImageGenerator) -> None:
    talker = Talker()
    talker.answer = "Yes. <h> a red c"
    assistant = Assistant(talker, Tools(generator=generator))  # type: ignore[arg-type]
    *_, reply = assistant.stream("draw")
    assert reply.text == "Yes. \nPrompt:  a red c" and "raise demo.max_new_tokens" in reply.note


def test_drawing_stops_when_nobody_waits(generator: ImageGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    draw = generator.draw

    def watched(prompt: str, progress: Any) -> Any:
        try:
            return draw(prompt, progress)
        finally:
            ended.set()

    monkeypatch.setattr(generator, "draw", watched)
    monkeypatch.setattr(generator, "steps", 10_000)
    assistant = Assistant(Talker(), Tools(generator=generator))  # type: ignore[arg-type]
    stream = assistant.stream("draw")
    assert next(reply for reply in stream if "step" in reply.note)
    stream.close()  # type: ignore[attr-defined]
    assert ended.wait(10)
    assert assistant.exchanges[0].reply == Reply(SHOWN, note="no picture: broken off")
    with pytest.raises(GenerationError):
        ImageGenerator("nowhere").draw("x")


def test_ctrl_c_while_drawing_keeps_the_answer(generator: ImageGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> Any:
        yield Reply(SHOWN, note="drawing the picture", growing=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("minivlm.serve.assistant._draw", interrupted)
    output, talker = io.StringIO(), Talker()
    given = iter(["draw", "/quit"])
    run_terminal(
        talker,  # type: ignore[arg-type]
        DemoConfig(),
        tools=Tools(generator=generator),
        input=lambda prompt: next(given),
        output=output,
    )
    assert "(drawing the picture) ... broken off; there is no picture\n" in output.getvalue()
    assert len(talker.messages) == 2


def test_the_page_shows_the_picture_in_the_conversation(
    generator: ImageGenerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    handlers = Handlers(Talker, Tools(generator=generator))  # type: ignore[arg-type]
    events = list(handlers.ask("draw a cat", None, 1, 0.0, None, False, True))
    shown, _, session = events[-1]
    text, picture = shown[1]["content"]
    assert text == SHOWN
    with Image.open(picture["path"]) as opened:
        assert opened.size == (16, 16) and opened.format == "PNG"
    assert any("(drawing the picture: step 2 of 2)" in str(messages[-1]["content"]) for messages, _, _ in events)
    # A question that asks for none gets none, and the first one keeps its own.
    *_, (shown, _, session) = handlers.ask("hello", RED, 1, 0.0, session, False, False)
    assert [type(message["content"]) for message in shown] == [str, str]  # another picture: a new conversation
    *_, (shown, _, session) = handlers.ask("draw", RED, 1, 0.0, session, False, True)
    *_, (shown, _, session) = handlers.ask("hello", RED, 1, 0.0, session, False, False)
    assert [isinstance(message["content"], list) for message in shown] == [False] * 3 + [True] + [False] * 2
    assert session.chat.messages[0].content == "hello"


def test_the_page_goes_on_without_a_picture(generator: ImageGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(web_handlers, "save_pil_to_cache", full)
    warnings: list[str] = []
    monkeypatch.setattr(web_handlers, "_warn", warnings.append)
    handlers = Handlers(Talker, Tools(generator=generator))  # type: ignore[arg-type]
    *_, (_, _, session) = handlers.ask("hello", None, 1, 0.0, None)
    assert warnings == ["Upload a picture first."] and session is None
    *_, (shown, _, session) = handlers.ask("draw a cat", None, 1, 0.0, None, False, True)
    assert warnings[1:] == ["The picture cannot be kept: No space left on device."]
    assert [message["content"] for message in shown] == ["draw a cat", SHOWN]
    *_, (shown, _, session) = handlers.ask("why red?", None, 1, 0.0, session)
    assert len(shown) == 4 and len(warnings) == 2
    handlers.restart(session)
    *_, (_, _, session) = handlers.ask("hello", None, 1, 0.0, session)
    assert warnings[2:] == ["Upload a picture first."]


def test_names_of_pictures(tmp_path: Path) -> None:
    names = [save_picture(RED, tmp_path / "a.b.webp").name for _ in range(3)]
    with pytest.raises(OSError, match=r"the picture cannot be written to .*a\.b\.webp/x\.png: "):
        save_picture(RED, tmp_path / "a.b.webp" / "x.png")
    assert names == ["a.b.webp", "a.b_2.webp", "a.b_3.webp"]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(names)


def test_pictures_are_drawn_beside_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_beside(torch.device("cpu")) == "cpu"
    assert device_beside(torch.device("mps", 0)) == "mps:0"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert device_beside(torch.device("cuda", 0)) == "cuda:3"
