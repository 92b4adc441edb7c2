"""Download lists from the published lists of captions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minivlm.cli import main
from minivlm.datasets import caption_list
from minivlm.datasets.base import DatasetError
from minivlm.datasets.caption_list import prepare_captions, records


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_lists_are_merged_cleaned_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    laion = write(
        tmp_path / "laion.json",
        [
            {"url": "http://a/1.jpg", "caption": "a red\tboat\n on water "},
            {"url": "http://a/2.jpg", "caption": 'the "old" bridge'},
            {"url": "http://a/1.jpg", "caption": "the same picture"},
            {"url": "", "caption": "no url"},
            {"url": "http://a/3.jpg", "caption": None},
            "no record",
        ],
    )
    lines = ['{"url": "http://b/1.jpg", "caption": "größer"}', "", '{"url": "http://a/2.jpg", "caption": "again"}']
    ccs = write(tmp_path / "ccs.jsonl", "\n".join(lines))
    output = tmp_path / "list.tsv"
    assert main(["prepare-captions", str(laion), str(ccs), "--output", str(output)]) == 0
    assert output.read_text(encoding="utf-8") == (
        "url\tcaption\n"
        "http://a/1.jpg\ta red boat on water\n"
        'http://a/2.jpg\t"the ""old"" bridge"\n'
        "http://b/1.jpg\tgrößer\n"
    )
    printed = capsys.readouterr().out
    assert "3 pairs written; left out: 2 with the URL of another, 3 without URL or caption" in printed


@pytest.mark.parametrize("piece", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_files_are_read_piece_by_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, indent: int | None
) -> None:
    monkeypatch.setattr(caption_list, "PIECE", piece)
    content = [{"url": f"http://a/{n}.jpg", "caption": 'x ] , } \\" {' * n} for n in range(6)] + [12, None, "text", {}]
    assert list(records(write(tmp_path / "a.json", json.dumps(content, indent=indent) + "\n"))) == content
    dicts = content[:6]
    assert list(records(write(tmp_path / "b.jsonl", "\n".join(map(json.dumps, dicts)) + "\n"))) == dicts
    assert list(records(write(tmp_path / "c.json", "[ ]"))) == []


@pytest.mark.parametrize(
    "text", ['[{"url": "a", "caption": "b"}, {"url"', '[{"url": "a", "caption": "b"}', "[{]", "{", "x"]
)
def test_a_broken_list_is_named_and_leaves_the_old_one(tmp_path: Path, text: str) -> None:
    output = write(tmp_path / "list.tsv", "as it was")
    with pytest.raises(DatasetError, match=r"bad\.json: broken or cut off behind record \d"):
        prepare_captions([write(tmp_path / "bad.json", text)], output)
    assert output.read_text() == "as it was"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.json", "list.tsv"]


@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_text_behind_the_list_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(caption_list, "PIECE", piece)
    for more in ("]", "[{}]", "\n \n x"):
        with pytest.raises(DatasetError, match=r"a\.json: there is more behind the end of the list: '[\[\]x]"):
            list(records(write(tmp_path / "a.json", '[{"url": "a"}]\n' + more)))
    assert list(records(write(tmp_path / "a.json", "[1, 2]\n\n "))) == [1, 2]


def test_half_a_surrogate_pair_does_not_end_the_pass(tmp_path: Path) -> None:
    text = r'[{"url": "a\udc00", "caption": "x \ud83d y"}, {"url": "b", "caption": "\ud83d\ude00"}]'
    prepare_captions([write(tmp_path / "a.json", text)], tmp_path / "list.tsv")
    assert (tmp_path / "list.tsv").read_text(encoding="utf-8") == "url\tcaption\na?\tx ? y\nb\t😀\n"


def test_missing_and_empty_lists_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "list.tsv"
    assert main(["prepare-captions", str(tmp_path / "none.json"), "--output", str(output)]) == 2
    assert "none.json cannot be read" in capsys.readouterr().err
    for text in ("[]", "", '[{"caption": "x"}]'):
        with pytest.raises(DatasetError, match="no record with `url` and `caption`"):
            prepare_captions([write(tmp_path / "a.json", text)], output)
    assert not output.exists()
