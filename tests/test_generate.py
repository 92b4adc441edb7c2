"""``minivlm generate``: answers equal those of a conversation, bad records are named, a run goes on."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model, write_yaml
from PIL import Image

from minivlm import cli
from minivlm.api import assemble
from minivlm.config import load_config
from minivlm.datasets.base import DatasetError
from minivlm.serve.chat import Chat
from minivlm.serve.generate import answer_records
from minivlm.serve.records import AnswerFile, read_records

QUESTIONS = ["what is it?", "what color is the shape?", "is there a red circle or a blue triangle in the image?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven pictures, one of them deeper; a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "deep").mkdir()
    draw = random.Random(0)
    for number in range(7):
        colour = tuple(draw.randrange(256) for _ in range(3))
        path = folder / ("deep" if number == 3 else ".") / f"{number}.png"
        Image.new("RGB", (30 + number, 40), colour).save(path)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    demo = {"max_new_tokens": 6, "temperature": 1.0}
    model = tiny_model()
    model["language_model"]["config"]["initializer_range"] = 0.3  # answers that depend on pictures and questions
    return write_yaml(tmp_path_factory.mktemp("config") / "x.yaml", {"model": model, "demo": demo})


@pytest.fixture(scope="module")
def chat(config: Path) -> Chat:
    torch.manual_seed(0)
    model, processor, _ = assemble(load_config(config).stages[-1].model)
    return Chat(model.eval(), processor, max_new_tokens=6)


def write_records(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def generate(config: Path, source: Path, output: Path, *arguments: str) -> int:
    command = ["generate", str(config), "--input", str(source), "--output", str(output), "--device", "cpu", *arguments]
    return cli.main(command)


def answer(chat: Chat, records: list[dict[str, Any]], output: Path, images: Path, batch_size: int = 4) -> AnswerFile:
    with AnswerFile(output, records) as answers:
        answer_records(chat, answers, images, batch_size=batch_size)
    answers.finish()
    return answers


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_answers_are_those_of_a_conversation(chat: Chat, folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    chat = Chat(chat.model, chat.processor, max_new_tokens=6, **options)
    records = [{"id": n, "image": f"{n}.png", "question": QUESTIONS[n % 3] * (1 + n % 2)} for n in (0, 1, 2, 4, 5, 6)]
    records += [
        {"image": ["0.png", "1.png"], "prompt": QUESTIONS[0]},
        {"image": "2.png", "prompt": f"here is <image>: {QUESTIONS[1]}"},
        {"image": [], "prompt": QUESTIONS[2]},
    ]
    answer(chat, records, tmp_path / "out.jsonl", folder)
    found = lines(tmp_path / "out.jsonl")
    assert [{key: line[key] for key in line if key != "answer"} for line in found] == records
    for line in found:
        names = line["image"] if isinstance(line["image"], list) else [line["image"]]
        one = Chat(chat.model, chat.processor, max_new_tokens=6, **options)
        assert line["answer"] == one.ask(line.get("prompt", line.get("question")), [folder / name for name in names])
    assert len({line["answer"] for line in found}) > 3


def test_pictures_of_a_folder_from_the_command_line(
    config: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "out.jsonl"
    assert generate(config, folder, output, "--prompt", "what is it?", "--batch-size", "3") == 0
    names = ["0.png", "1.png", "2.png", "4.png", "5.png", "6.png", "deep/3.png"]
    assert [line["image"] for line in lines(output)] == names
    assert {line["prompt"] for line in lines(output)} == {"what is it?"}
    assert all(set(line) == {"image", "prompt", "answer"} for line in lines(output))
    said = capfd.readouterr()
    assert re.fullmatch(rf"7 answers in {output} \(\d+ tokens, [\d.]+ tokens/s\)\n", said.out)
    assert "7 of 7 records" in said.err and "records/s" in said.err

    before = output.read_bytes()
    assert generate(config, folder, output, "--prompt", "what is it?") == 0
    assert "7 of 7 records were answered before" in (said := capfd.readouterr()).err
    assert "loading" not in said.err and said.out == f"7 answers in {output}\n"
    assert output.read_bytes() == before
    assert generate(config, folder, output, "--prompt", "what else?") == 2
    assert "holds what is no answer to these records" in capfd.readouterr().err
    assert output.read_bytes() == before


def test_greedy_unless_asked_otherwise(
    config: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "minivlm.serve.generate.answer_records", lambda chat, *arguments, **sizes: made.append(chat.options)
    )
    options = ("--options", "demo.repetition_penalty=1.05", "demo.num_beams=2")
    generate(config, folder, tmp_path / "out.jsonl", *options)
    generate(
        config, folder, tmp_path / "out.jsonl", "--temperature", "0.5", "--num-beams", "3", "--max-new-tokens", "9"
    )
    first, second = made
    assert first["temperature"] == 0 and first["num_beams"] == 2 and first["repetition_penalty"] == 1.05
    assert (second["temperature"], second["num_beams"], second["max_new_tokens"]) == (0.5, 3, 9)


def test_bad_records_are_named_and_done_again(
    config: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.png").write_text("no picture")
    Image.new("RGB", (20, 20)).save(tmp_path / "good.png")
    records = [
        {"id": "a", "image": "broken.png"},
        {"id": "b", "image": "good.png", "prompt": "what is <image> in <image>?"},
        {"id": "c", "image": ["good.png", "good.png"], "prompt": "one <image> only"},
        {"id": "d", "image": "../good.png"},
        {"id": "e", "picture": "good.png"},
        {"id": "f", "image": 3},
        {"id": "g", "image": "good.png", "prompt": ["what?"]},
        {"id": "h", "image": "good.png", "prompt": "long " * 300},
        {"id": "i", "image": "later.png"},
        {"id": "j", "image": "good.png"},
    ]
    source, output = write_records(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl"
    assert generate(config, source, output, "--batch-size", "1", "--prompt", "what is it?") == 1
    found = {line["id"]: line for line in lines(output)}
    assert list(found) == list("abcdefghij")
    for name, reason in {
        "a": "cannot read picture",
        "b": "2 <image> markers in the text, but 1 pictures",
        "c": "1 <image> markers in the text, but 2 pictures",
        "d": "leaves the folder",
        "e": "it has no `image`",
        "f": "must be a path or a list of paths, not a number",
        "g": "its `prompt` is not a text",
        "h": "the model takes 256",
        "i": "there is no picture",
    }.items():
        assert reason in found[name]["error"], name
        assert "answer" not in found[name]
    assert "error" not in found["j"] and isinstance(found["j"]["answer"], str)
    said = capfd.readouterr()
    assert said.out.startswith("1 answers in ")
    assert "9 records could not be answered" in said.err and "record 1 (a): cannot read picture" in said.err

    Image.new("RGB", (20, 20)).save(tmp_path / "later.png")
    assert generate(config, source, output, "--prompt", "what is it?") == 1
    again = {line["id"]: line for line in lines(output)}
    assert list(again) == list("abcdefghij")
    assert "answer" in again["i"] and again["j"] == found["j"]
    assert len([line for line in again.values() if "error" in line]) == 8


def test_an_interrupted_run_goes_on(chat: Chat, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"image": f"{n}.png", "prompt": QUESTIONS[n % 3]} for n in (0, 1, 2, 4, 5, 6)] * 2  # also twice the same
    whole = tmp_path / "whole.jsonl"
    answer(chat, records, whole, folder, batch_size=3)
    generated: list[int] = []
    plain = chat.model.generate

    def killed(batch: Any, **options: Any) -> Any:
        if sum(generated) >= 6:
            raise KeyboardInterrupt
        generated.append(len(batch.input_ids))
        return plain(batch, **options)

    part = tmp_path / "part.jsonl"
    monkeypatch.setattr(chat.model, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        answer(chat, records, part, folder, batch_size=3)
    assert len(lines(part)) == sum(generated) == 6
    with open(part, "a") as file:
        file.write('{"image": "5.png", "prom')  # killed while it wrote

    monkeypatch.setattr(
        chat.model, "generate", lambda batch, **o: generated.append(len(batch.input_ids)) or plain(batch, **o)
    )
    generated.clear()
    answers = answer(chat, records, part, folder, batch_size=3)
    assert sum(generated) == 6 and answers.todo == []
    assert part.read_bytes() == whole.read_bytes()


def test_answers_of_any_letters_are_read_again(tmp_path: Path) -> None:
    records = [{"image": f"{n}.png", "prompt": "é\u2028x"} for n in range(3)]
    with AnswerFile(tmp_path / "out.jsonl", records) as answers:
        answers.add(2, "answer", "two\u2028lines\x85\nand \x0b more")
        answers.add(0, "error", "no")
    again = AnswerFile(tmp_path / "out.jsonl", records)
    assert again.todo == [0, 1] and again.failed == {}


@pytest.mark.parametrize(
    "content", ["my notes", '{"image": "0.png", "prompt": "other", "answer": "x"}\n', '{"a": 1}', "[1]\n", "3\n"]
)
def test_no_other_file_is_overwritten(tmp_path: Path, content: str) -> None:
    (tmp_path / "out.jsonl").write_text(content)
    with pytest.raises(DatasetError, match="holds what is no answer"):
        AnswerFile(tmp_path / "out.jsonl", [{"image": "0.png", "prompt": "what?"}])
    assert (tmp_path / "out.jsonl").read_text() == content


def test_what_cannot_begin(config: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    answered = write_records(tmp_path / "answered.jsonl", [{"image": "0.png", "answer": "red"}])
    (tmp_path / "broken.jsonl").write_text('{"image": "0.png"}\n{"image"\n')
    for source, arguments, expected in (
        (tmp_path / "none", (), "there is neither a folder nor a file"),
        (tmp_path / "empty", (), "there is no picture in"),
        (answered, (), "record 1 has a key 'answer'"),
        (tmp_path / "broken.jsonl", (), "broken JSON"),
        (write_records(tmp_path / "list.jsonl", [["0.png"]]), (), "record 1 is not an object"),
        (folder, ("--images", str(tmp_path / "none")), "--images: there is no folder"),
        (folder, ("--options", "demo.titel=x"), "did you mean 'title'"),
    ):
        assert generate(config, source, tmp_path / "out.jsonl", *arguments) == 2
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_records_keep_their_own_prompt(tmp_path: Path) -> None:
    source = write_records(tmp_path / "in.jsonl", [{"image": "a"}, {"image": "b", "question": "q"}, {"prompt": "p"}])
    assert read_records(source, "what?") == [
        {"image": "a", "prompt": "what?"},
        {"image": "b", "question": "q"},
        {"prompt": "p"},
    ]


def test_lack_of_memory_names_a_smaller_batch(
    chat: Chat, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(chat.model, "generate", full)
    with pytest.raises(ValueError, match="--batch-size 2"):
        answer(chat, [{"image": "0.png", "prompt": "what?"}] * 4, tmp_path / "out.jsonl", folder)
