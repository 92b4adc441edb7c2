"""``minivlm train-tokenizer``: from files to a folder that transformers and the configuration take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_model, write_yaml

from minivlm import cli
from minivlm.datasets.base import DatasetError
from minivlm.datasets.texts import read_texts
from minivlm.processors.tokenizer import TokenizerError, load_tokenizer

TEXTS = [f"a {colour} {shape} on the table" for colour in ("red", "green") for shape in ("dog", "cat", "cup")] * 4


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    """The same sentences in every form."""
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "这是一只狗"}]
    roles = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "a dog", "reasoning_content": "so"}]
    records: list[Any] = [{"conversations": turns}, {"conversations": roles}, {"text": "plain text"}, roles[:1]]
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1, ensure_ascii=False))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n\n" for text in TEXTS))
    (tmp_path / "c.txt").write_text("one line\ntwo lines\n")
    return [str(tmp_path / name) for name in ("a.json", "b.jsonl", "c.txt")]


def train(inputs: list[str], output: Path, *arguments: str) -> int:
    return cli.main(["train-tokenizer", *inputs, "--output", str(output), *arguments])


def test_texts_of_all_files_in_order(corpus: list[str]) -> None:
    found = list(read_texts([Path(path) for path in corpus]))
    assert found[:7] == ["\nwhat is it?", "这是一只狗", "what?", "a dog", "so", "plain text", "what?"]
    assert found[7:] == [*TEXTS, "one line", "two lines"]


@pytest.mark.parametrize(
    ("template", "special", "words"),
    [
        ("minimind_v1", ["<unk>", "<s>", "</s>", "<more>"], []),
        (
            "minimind_v3",
            ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<more>"],
            ["<think>", "</think>"],
        ),
    ],
)
def test_special_tokens_of_a_template(
    corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str, special: list[str], words: Any
) -> None:
    (tmp_path / "out").mkdir()  # empty: taken
    assert train(corpus, tmp_path / "out", "--vocab-size", "300", "--template", template, "--special", "<more>") == 0
    said = capsys.readouterr()
    assert "300 entries, " in said.out and "bytes per token on 1 held-out texts" in said.out
    assert "33 texts" in said.err
    made = load_tokenizer(str(tmp_path / "out"))
    assert len(made) == 300
    assert made.convert_ids_to_tokens(range(len(special) + len(words))) == special + words
    assert (made.unk_token_id, made.bos_token_id, made.eos_token_id, made.pad_token_id) == (0, 1, 2, 0)
    ids = made("".join(special) + "the dog 狗é" + "".join(words))["input_ids"]
    assert ids[: len(special)] == list(range(len(special)))
    assert made.decode(ids, skip_special_tokens=True) == "the dog 狗é" + "".join(words)


def test_the_same_texts_give_the_same_files(corpus: list[str], tmp_path: Path) -> None:
    for name in ("x", "y"):
        assert train(corpus, tmp_path / name, "--vocab-size", "290") == 0
    files = sorted(path.name for path in (tmp_path / "x").iterdir())
    assert "tokenizer.json" in files
    assert all((tmp_path / "x" / name).read_bytes() == (tmp_path / "y" / name).read_bytes() for name in files)


def test_too_little_text_is_told(corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(corpus[2:], tmp_path / "out") == 0
    said = capsys.readouterr()
    size = len(load_tokenizer(str(tmp_path / "out")))
    assert f"set the model's vocab_size to {size}" in said.err and "too few texts to hold some out" in said.out


def test_texts_are_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their words are not learned: of 20 lines the last."""
    (tmp_path / "a.txt").write_text("aaaa bbbb\n" * 19 + "zzzz\n")
    assert train([str(tmp_path / "a.txt")], tmp_path / "out") == 0
    made = load_tokenizer(str(tmp_path / "out"))
    assert made.tokenize("aaaa") == ["aaaa"] and made.tokenize("zzzz") == ["z"] * 4
    assert "1.00 bytes per token on 1 held-out texts" in capsys.readouterr().out


def test_data_of_an_experiment(
    corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the template writes them: its words are learned, its special tokens and the pictures are not."""
    records = [
        {"image": f"absent{n}.png", "conversations": [{"from": "human", "value": "<image>\nis it?"}, *ANSWER]}
        for n in range(25)
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    mine = {"name": "llava_json", "annotations": {"train": "data.json", "test": "absent.json"}}
    write_yaml(tmp_path / "x.yaml", {"model": tiny_model() | {"template": "minimind_v1"}, "datasets": {"mine": mine}})
    monkeypatch.chdir(tmp_path)
    assert train(["x.yaml"], tmp_path / "out", "--vocab-size", "290") == 0
    assert "1 held-out texts" in capsys.readouterr().out
    made = load_tokenizer(str(tmp_path / "out"))
    ids = made("<s>assistant\nyes</s>")["input_ids"]
    assert made.convert_ids_to_tokens(ids) == ["<s>", "assistant", "Ċ", "yes", "</s>"]
    assert not [entry for entry in made.get_vocab() if set("<>") & set(entry) and len(entry) > 1][3:]
    assert train(["c.txt", "x.yaml"], tmp_path / "both", "--vocab-size", "280") == 0
    assert "27 texts" in capsys.readouterr().err

    (tmp_path / "data.json").write_text(json.dumps([*records, {"id": "odd", "conversations": [*ANSWER]}]))
    assert train(["x.yaml"], tmp_path / "bad") == 2
    assert "datasets.mine: sample 'odd'" in capsys.readouterr().err
    assert train(["absent.yaml"], tmp_path / "bad") == 2 and not (tmp_path / "bad").exists()


ANSWER = [{"from": "gpt", "value": "yes"}]
BAD = [
    ("x.jsonl", b'{"text": "a"}\n{"text": \n', "x.jsonl, line 2: broken JSON"),
    ("x.jsonl", b'{"text": "a"}\n\n{"txt": "a"}\n', "x.jsonl, line 3: a record with `text`"),
    ("x.jsonl", b'{"text": "\\ud800"}\n', "x.jsonl, line 1: it holds half a character"),
    ("x.json", b'[{"text": "a"},\n\n {"conversations": [{"who": "me"}]}]', "x.json, line 3: its turns have neither"),
    ("x.json", b'[{"text": "a"}\n', "broken JSON"),
    ("x.txt", b"fine\n\xff\xfe\n", "x.txt, line 2: it is not UTF-8"),
    ("x.txt", b"", "there is no text in"),
    ("x.txt", b"\n \r\n", "there is no text in"),
    ("x.csv", b"a,b", "files of text end with .txt, .jsonl, .json"),
]


@pytest.mark.parametrize(("name", "content", "said"), BAD)
def test_bad_input_names_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert train([str(tmp_path / name)], tmp_path / "out") == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_wrong_arguments(corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DatasetError, match="there is no file"):
        list(read_texts([tmp_path / "absent.txt"]))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("mine")
    assert train(corpus, tmp_path / "kept") == 2
    assert (tmp_path / "kept" / "file").read_text() == "mine"
    assert train(corpus, tmp_path / "out", "--template", "qa") == 2
    assert train(corpus, tmp_path / "out", "--template", "minimind_v9") == 2
    assert train(corpus, tmp_path / "out", "--vocab-size", "258") == 2
    said = capsys.readouterr().err
    for text in ("not an empty folder", "--template qa: its turns", "unknown template 'minimind_v9'", "take 259"):
        assert text in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(TokenizerError, match="there is no folder 'output/first/tokenizer'; `minivlm train-tokenizer`"):
        load_tokenizer("output/first/tokenizer")  # not a question to the hub
