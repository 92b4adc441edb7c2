"""Conversations: pictures encoded once, streamed answers, stop strings, errors; the terminal and the program."""

from __future__ import annotations

import asyncio
import io
import itertools
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, tiny_model, write_yaml
from PIL import Image

from minivlm.api import assemble
from minivlm.config import load_config
from minivlm.config.experiment import DemoConfig
from minivlm.serve.chat import Chat
from minivlm.serve.terminal import run_terminal
from minivlm.types import SampleError

RED = Image.new("RGB", (40, 30), (220, 30, 30))
BLUE = Image.new("RGB", (40, 30), (40, 60, 220))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A random model whose answers end at ``###``, which is three tokens, and its processor."""
    section = tiny_model() | {"template": {"name": "qa", "stop": ["###"], "assistant_suffix": "###"}}
    file = write_yaml(tmp_path_factory.mktemp("chat") / "x.yaml", {"model": section})
    torch.manual_seed(0)
    model, processor, _ = assemble(load_config(file).stages[-1].model)
    return model.eval(), processor


@pytest.fixture
def chat(parts: tuple[Any, Any]) -> Chat:
    return Chat(*parts, max_new_tokens=12)


@pytest.fixture
def says(parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the model answer given texts, one call after the other; generation itself stays as it is."""
    model, processor = parts

    def script(*texts: str) -> None:
        answers = iter(texts)
        generate = model.generate

        def scripted(batch: Any, **options: Any) -> torch.Tensor:
            ids = processor.tokenizer(next(answers), add_special_tokens=False)["input_ids"]

            def force(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
                forced = torch.full_like(scores, -1e9)
                forced[:, ids[min(input_ids.shape[1], len(ids) - 1)]] = 0.0
                return forced

            return generate(batch, **options, logits_processor=[force])

        monkeypatch.setattr(model, "generate", scripted)

    return script


def count_calls(monkeypatch: pytest.MonkeyPatch, target: Any, name: str) -> list[Any]:
    calls: list[Any] = []
    function = getattr(target, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return function(*arguments, **options)

    monkeypatch.setattr(target, name, counted)
    return calls


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"temperature": 0.8}])
def test_streamed_and_whole_answers_agree(parts: tuple[Any, Any], options: dict[str, Any]) -> None:
    model, processor = parts
    torch.manual_seed(1)
    whole = Chat(model, processor, max_new_tokens=20).ask("what is it?", [RED], **options)
    torch.manual_seed(1)
    streamed = list(Chat(model, processor, max_new_tokens=20).stream("what is it?", [RED], **options))
    assert streamed[-1] == whole
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(streamed))
    assert len(streamed) == 1 if "num_beams" in options else len(streamed) > 1


def test_answer_is_that_of_the_plain_model(parts: tuple[Any, Any]) -> None:
    model, processor = parts
    batch = processor.prompt([{"role": "user", "content": "<image>\nwhat is it?"}], [RED])
    plain = processor.decode(model.generate(batch, max_new_tokens=12, **processor.generation_options()))[0]
    assert Chat(model, processor, max_new_tokens=12).ask("what is it?", [RED]) == plain != ""


def test_pictures_are_encoded_once(
    chat: Chat, parts: tuple[Any, Any], says: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = parts
    says("red###", "no###", "blue###", "red###")
    encoded = count_calls(monkeypatch, model, "extract_features")
    opened = count_calls(monkeypatch, processor, "load_pixels")
    prompts = count_calls(monkeypatch, model, "embed")
    assert chat.ask("what color?", [RED]) == "red"
    assert list(chat.stream("is it blue?"))[-1] == "no"
    assert chat.ask("and this?", [BLUE]) == "blue"
    assert chat.ask("the first was <image>, wasn't it?", [RED]) == "red"
    assert (len(encoded), len(opened)) == (2, 3)
    assert chat.num_images == 3
    assert [m.content for m in chat.messages][4:7] == [
        "<image>\nand this?",
        "blue",
        "the first was <image>, wasn't it?",
    ]

    # The last prompt, kept tokens and all, is the one that is built from all pictures at once.
    fresh = processor.prompt(chat.messages[:-1], [RED, BLUE, RED])
    batch, visual = prompts[-1]
    assert torch.equal(batch.input_ids, fresh.input_ids)
    with torch.inference_mode():
        assert torch.allclose(visual, model.encode_images(fresh), atol=1e-6)


def test_stop_strings_and_half_characters_are_held_back(chat: Chat, says: Callable[..., None]) -> None:
    says("red ##é🙂 #x###blue", "é###")
    seen = list(chat.stream("?", [RED], max_new_tokens=40))
    assert seen == ["re", "red", "red ##é", "red ##é🙂", "red ##é🙂 #x"]
    assert chat.ask("?", max_new_tokens=40) == "é"


def test_errors_leave_the_conversation(
    chat: Chat, parts: tuple[Any, Any], says: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    says("red###", "lost###", "fine###")
    chat.ask("what color?", [RED])
    before = chat.messages
    for arguments in (
        ("two <image>?", []),
        ("gone?", [tmp_path / "none.png"]),
        ("long " * 200, []),
    ):
        with pytest.raises(SampleError):
            chat.ask(*arguments)
        with pytest.raises(SampleError):
            list(chat.stream(*arguments))
        assert chat.messages == before

    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(parts[0].language_model, "generate", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(chat.stream("and now?", [BLUE]))
    assert chat.messages == before
    assert chat.num_images == 1
    assert chat.ask("and now?") == "fine"


def test_long_conversation_says_so(chat: Chat) -> None:
    with pytest.raises(SampleError, match="tokens and the model takes 256; begin a new conversation"):
        for _ in range(50):
            chat.ask("what is it? what is it? what is it?")
    assert len(chat.messages) >= 4
    assert chat.messages[-1].role == "assistant"


def test_long_conversation_can_lose_its_beginning(
    parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen = count_calls(monkeypatch, parts[0].language_model, "generate")
    chat = Chat(*parts, max_new_tokens=6, max_length=30, on_overflow="cut_left")
    for _ in range(3):
        chat.ask("what is it?", [] if chat.num_images else [RED])
    assert [call[0].shape[1] for call in seen][-1] == 24
    assert "visual tokens" in caplog.text
    with pytest.raises(SampleError, match="max_new_tokens leaves no room"):
        chat.ask("and now?", max_new_tokens=30)


def test_the_processors_limit_is_the_conversations(parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is the smallest, as in a folder of MiniMind-V, a long conversation ends or goes on as with others."""
    monkeypatch.setattr(parts[1].config, "max_length", 40)
    chat = Chat(*parts, max_new_tokens=6)
    with pytest.raises(SampleError, match=r"the conversation has .* and the model takes 40; begin a new"):
        for _ in range(10):
            chat.ask("what is it?")
    chat = Chat(*parts, max_new_tokens=6, on_overflow="cut_left")
    for _ in range(10):
        assert chat.ask("what is it?")


def test_only_options_with_an_effect_reach_the_model(parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise transformers warns of every one that it does not use."""
    given: list[dict[str, Any]] = []
    plain = parts[0].language_model.generate
    monkeypatch.setattr(
        parts[0].language_model, "generate", lambda *a, **options: given.append(options) or plain(*a, **options)
    )
    chat = Chat(*parts, max_new_tokens=4)
    chat.ask("what is it?")
    chat.ask("what is it?", repetition_penalty=1.05, length_penalty=2.0, num_beams=2, temperature=0.5, min_new_tokens=2)
    chat.ask("what is it?", length_penalty=2.0)
    names = {"repetition_penalty", "length_penalty", "min_new_tokens", "temperature", "top_p", "keep_last"}
    assert [names & set(options) for options in given] == [set(), names - {"keep_last"}, set()]
    assert [options["do_sample"] for options in given] == [False, True, False]


def test_empty_answer_is_not_kept(chat: Chat, says: Callable[..., None]) -> None:
    says("###", "red###")
    assert list(chat.stream("what color?", [RED])) == [""]
    assert (chat.messages, chat.num_images) == ([], 0)
    assert chat.ask("what color?", [RED]) == "red"


def test_closing_the_stream_stops_the_model(
    chat: Chat, parts: tuple[Any, Any], says: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    says("one two three four five six seven eight nine ten " * 3, "red###")
    steps = count_calls(monkeypatch, parts[0].language_model.model, "forward")
    stream = chat.stream("count", [RED], max_new_tokens=150)
    next(stream)
    stream.close()
    assert not [t for t in threading.enumerate() if t.name == "minivlm-answer"]
    assert len(steps) < 100
    assert (chat.messages, chat.num_images) == ([], 0)
    assert chat.ask("what color?", [RED]) == "red"


def test_reset_while_answering_starts_clean(chat: Chat, says: Callable[..., None]) -> None:
    says("red###")
    for _ in chat.stream("what color?", [RED]):
        chat.reset()
    assert (chat.messages, chat.num_images) == ([], 0)


def test_shared_lock_keeps_models_apart(parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = parts
    running: list[int] = []
    most: list[int] = []
    generate = model.generate

    def watched(*arguments: Any, **options: Any) -> Any:
        running.append(1)
        most.append(len(running))
        try:
            return generate(*arguments, **options)
        finally:
            running.pop()

    monkeypatch.setattr(model, "generate", watched)
    lock = threading.Lock()
    chats = [Chat(model, processor, max_new_tokens=12, lock=lock) for _ in range(3)]
    streams = [c.stream("what is it?", [image]) for c, image in zip(chats, [RED, BLUE, RED], strict=True)]
    firsts = [next(s) for s in streams]
    lasts = [[first, *rest][-1] for first, rest in zip(firsts, streams, strict=True)]
    assert max(most) == 1
    assert lasts[0] == lasts[2]
    assert [len(c.messages) for c in chats] == [2, 2, 2]


def terminal(chat: Chat, *lines: str | type[BaseException]) -> str:
    """What the terminal writes for lines that are typed."""
    script: Iterator[str | type[BaseException]] = iter(lines)
    output = io.StringIO()

    def typed(prompt: str) -> str:
        line = next(script, EOFError)
        if not isinstance(line, str):
            raise line
        output.write(f"{prompt}{line}\n")
        return line

    run_terminal(chat, DemoConfig(title="colours", examples=["what color?"]), input=typed, output=output)
    return output.getvalue()


def test_terminal(chat: Chat, says: Callable[..., None], tmp_path: Path) -> None:
    says("red###", "two words###", "blue###")
    picture = tmp_path / "a picture.png"
    RED.save(picture)
    BLUE.save(tmp_path / "blue.png")
    (tmp_path / "broken.png").write_text("no picture")
    text = terminal(
        chat,
        "/help",
        "/image",
        "/image /nowhere/x.png",
        f"/image {tmp_path}/broken.png",
        f"/image {picture}",
        "what color?",
        "more?",
        "what is <image>?",
        "/nonsense",
        f"/image {tmp_path}/blue.png '{picture}'",
        "what color?",
        "/reset",
    )
    assert text.startswith("colours\n")
    assert "for example: what color?" in text
    for expected in (
        "which picture?",
        "there is no picture /nowhere/x.png",
        f"cannot read picture {tmp_path}/broken.png",
        "a new conversation about this picture (40 x 30)",
        "what color?\nmodel: red\n",
        "more?\nmodel: two words\n",
        "(no answer) 2 <image> markers in the text, but 1 pictures",
        "unknown command /nonsense",
        "a new conversation about these pictures (40 x 30, 40 x 30)",
        "what color?\nmodel: blue\n",
    ):
        assert expected in text
    assert text.endswith("\nbye\n")
    assert chat.messages == []


def test_terminal_interrupts(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **options: Any) -> Iterator[str]:
        yield "on"
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "stream", interrupted)
    text = terminal(chat, "what color?", "what color?", KeyboardInterrupt)
    assert text.count("model: on ... broken off") == 2
    assert text.endswith("\nbye\n")


def test_unreadable_and_foreign_uploads_are_refused(tmp_path: Path) -> None:
    import gradio as gr
    from gradio.data_classes import ImageData
    from gradio.processing_utils import async_move_files_to_cache

    from minivlm.serve import web

    picture = web._picture()
    (tmp_path / "x.png").write_text("no picture")
    assert isinstance(picture.preprocess(ImageData(path=str(tmp_path / "x.png"))), OSError)
    Image.new("1", (17000, 5000)).save(tmp_path / "bomb.png")
    assert "85 megapixels" in str(picture.preprocess(ImageData(path=str(tmp_path / "bomb.png"))))
    assert isinstance(picture.preprocess(ImageData(url="data:image/png;base64,AAAA")), OSError)
    RED.save(tmp_path / "good.png")
    assert picture.preprocess(ImageData(path=str(tmp_path / "good.png"))).size == RED.size
    assert picture.preprocess(None) is None

    forged = {"path": "http://example.com/x.png", "meta": {"_type": "gradio.FileData"}}
    with pytest.raises(gr.Error, match="have to be uploaded"):
        asyncio.run(async_move_files_to_cache(forged, picture, check_in_upload_folder=True))


def run_demo(*arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "demo.py"), *arguments]
    return subprocess.run(command, input=typed, capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_demo_explains_what_is_missing(tmp_path: Path) -> None:
    missing = write_yaml(tmp_path / "a.yaml", {"model": {"checkpoint": str(tmp_path / "none")}})
    for arguments, expected in (
        (["--cfg-path", str(tmp_path / "no.yaml")], "no such file"),
        ([str(tmp_path / "output" / "sft")], "neither a folder nor a file"),
        (["--cfg-path", str(missing)], "train it first"),
        (["--cfg-path", str(missing), "--options", "demo.titel=x"], "did you mean 'title'"),
        (["--cfg-path", str(tmp_path), "--options", "demo.title=x"], "is a folder"),
    ):
        done = run_demo(*arguments)
        assert done.returncode == 2
        assert expected in done.stderr
        assert "Traceback" not in done.stderr


def test_demo_in_the_terminal(tmp_path: Path) -> None:
    file = write_yaml(tmp_path / "x.yaml", {"model": tiny_model(), "demo": {"title": "hello", "max_new_tokens": 3}})
    picture = tmp_path / "red.png"
    RED.save(picture)
    done = run_demo(
        "--cfg-path", str(file), "--cli", "--device", "cpu", typed=f"/image {picture}\nwhat color?\n/quit\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("hello\n")
    assert "a new conversation about this picture" in done.stdout
    assert done.stdout.endswith("bye\n")
