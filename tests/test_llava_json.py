"""LLaVA records: reading JSON and JSONL, roles, pictures, and what is said of broken ones."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from minivlm.datasets.base import DatasetError
from minivlm.datasets.configs import LlavaJsonConfig
from minivlm.datasets.llava_json import LlavaJsonBuilder, LlavaJsonDataset, check_record
from minivlm.types import SampleError

RECORDS: list[dict[str, Any]] = [
    {
        "id": "first",
        "image": "a/1.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWas ist das? 猫 ü"},
            {"from": "gpt", "value": "Ein Käse – “teuer”."},
        ],
    },
    {
        "image": ["1.png", "2.png"],
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"role": "user", "content": "<image><image> which?"},
            {"role": "assistant", "content": "the second"},
        ],
    },
    {"id": 7, "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]},
]


def turns(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"from": speaker, "value": text} for speaker, text in pairs]


GOOD = turns(("human", "<image>\nwhat?"), ("gpt", "a cat"))


def write_json(path: Path, records: Any, *, lines: bool = False, indent: int | None = None) -> Path:
    if lines:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    else:
        text = json.dumps(records, ensure_ascii=False, indent=indent)
    path.write_text(text, encoding="utf-8")
    return path


def build(path: Path, **config: Any) -> LlavaJsonDataset:
    return LlavaJsonBuilder(LlavaJsonConfig(annotations=str(path), **config), "mine").build("train")


@pytest.mark.parametrize(
    "style", [{"lines": True}, {"lines": False}, {"indent": 2}], ids=["jsonl", "json", "indented json"]
)
def test_both_formats_give_the_same_samples(tmp_path: Path, style: dict[str, Any]) -> None:
    data = build(write_json(tmp_path / "a.json", RECORDS, **style))
    assert len(data) == 3
    first, second, third = (data[index] for index in range(3))
    assert (first.id, second.id, third.id) == ("first", "1", "7")
    assert [m.role for m in second.messages] == ["system", "user", "assistant"]
    assert first.messages[0].content == "<image>\nWas ist das? 猫 ü"
    assert first.messages[1].content == "Ein Käse – “teuer”."
    assert first.images == [tmp_path / "a" / "1.png"]
    assert second.images == [tmp_path / "1.png", tmp_path / "2.png"]
    assert third.images == []
    with pytest.raises(IndexError):
        data[3]
    assert data[-1].id == "7"


def test_marks_of_other_programs_do_no_harm(tmp_path: Path) -> None:
    """A byte order mark, Windows line ends, blank lines and no line end at the last record."""
    lines = [json.dumps(record) for record in RECORDS]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + "\r\n\r\n".join(lines).encode())
    assert [sample.id for sample in build(path)] == ["first", "1", "7"]


def test_a_dict_of_annotations_names_the_splits(tmp_path: Path) -> None:
    files = {
        "train": str(write_json(tmp_path / "t.json", RECORDS)),
        "val": str(write_json(tmp_path / "v.json", RECORDS[:1])),
    }
    builder = LlavaJsonBuilder(LlavaJsonConfig(annotations=files), "mine")
    assert tuple(builder.splits) == ("train", "val")
    assert (len(builder.build("train")), len(builder.build("val"))) == (3, 1)
    with pytest.raises(DatasetError, match=r"'mine' has no split 'vla' .*did you mean 'val'.*train, val"):
        builder.build("vla")


def test_pictures_come_from_the_named_folder(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    data = build(write_json(tmp_path / "a.json", RECORDS), images=str(tmp_path / "pictures"))
    assert data[0].images == [tmp_path / "pictures" / "a" / "1.png"]
    with pytest.raises(DatasetError, match=r"no folder .*picturse.*`images`"):
        build(tmp_path / "a.json", images=str(tmp_path / "picturse"))


def test_pickles_small_and_reads_on_the_other_side(tmp_path: Path) -> None:
    long = [{"conversations": turns(("human", "x" * 5000), ("gpt", "y"))}] * 200
    data = build(write_json(tmp_path / "a.json", long))
    data[0]
    sent = pickle.dumps(data)
    assert len(sent) < 200 * 16 + 1000
    assert pickle.loads(sent)[199].messages[0].content == "x" * 5000


def test_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"'mine'.*no annotation file .*nothing\.json.*`annotations`"):
        build(tmp_path / "nothing.json")


@pytest.mark.parametrize("text", ["", "  \n\n", "[]", " [ \n ] "])
def test_a_file_without_records_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DatasetError, match=r"a\.json has no records"):
        build(tmp_path / "a.json")


ONE = json.dumps(RECORDS[2])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"{ONE}\n{ONE[:-3]}\n{ONE}\n", 3),  # the parser misses the brace where the next record starts
        (f'{ONE}\n{{"id": 1,}}\n', 2),
        (f"{ONE}\n\n{ONE} {ONE}\n", 3),
        (f"[\n{ONE},\n{ONE}\n{ONE}]", 4),
        (f"[\n{ONE},\n]", 3),
        (f"[\n{ONE},\n{ONE}\n", 4),
        (f"[\n{ONE}\n]\nmore", 4),
        ('{\n "a": [{}],\n oops\n}', 3),
    ],
    ids=[
        "line cut off",
        "comma in object",
        "two on a line",
        "no comma",
        "comma at the end",
        "array not closed",
        "text behind",
        "no array",
    ],
)
def test_broken_json_names_the_line(tmp_path: Path, text: str, line: int) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DatasetError, match=rf"a\.json, line {line}, column \d+: broken JSON"):
        build(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"id": "bad"}, "no list `conversations`"),
        ({"id": "bad", "messages": GOOD}, "`messages`: rename the key"),
        ({"id": "bad", "conversations": []}, "an empty `conversations`"),
        ({"id": "bad", "conversations": ["hello"]}, "turn 1 is not an object .* but a string"),
        ({"id": "bad", "conversations": turns(("humna", "a"))}, "turn 1 is from 'humna' .*'human'"),
        ({"id": "bad", "conversations": [{"value": "a"}]}, "turn 1 is from None"),
        ({"id": "bad", "conversations": [{"from": ["gpt"], "value": "a"}]}, "turn 1 is from"),
        ({"id": "bad", "conversations": [*GOOD, {"from": "gpt"}]}, "turn 3 has no `value`"),
        ({"id": "bad", "conversations": turns(("human", 3))}, "`value` of turn 1 is not text but a number"),
        ({"id": "bad", "image": 5, "conversations": GOOD}, "`image` must be a path or a list"),
        ({"id": "bad", "image": [None], "conversations": GOOD}, "`image` must be a path or a list"),
        ({"id": "bad", "image": "", "conversations": GOOD}, "'' is not a path"),
        ({"id": "bad", "image": "a\0.png", "conversations": GOOD}, "is not a path"),
        ({"id": "bad", "image": "/etc/passwd", "conversations": GOOD}, "'/etc/passwd' is absolute"),
        ({"id": "bad", "image": "C:\\secret.png", "conversations": GOOD}, "is absolute"),
        ({"id": "bad", "image": "a/../../x.png", "conversations": GOOD}, "leaves the folder"),
        ({"id": "bad", "image": "..\\x.png", "conversations": GOOD}, "leaves the folder"),
        ({"id": "bad", "image": ["ok.png", "../x.png"], "conversations": GOOD}, "leaves the folder"),
        ({"id": "bad", "answers": "cat", "conversations": GOOD}, "`answers` must be a list of strings"),
    ],
)
def test_a_bad_record_is_an_error_when_it_is_used(tmp_path: Path, record: Any, reason: str) -> None:
    good = {"id": "good", "image": "a.png", "conversations": GOOD}
    data = build(write_json(tmp_path / "a.json", [good, record, good]))  # not at build
    with pytest.raises(SampleError, match=f"sample 'bad': .*{reason}"):
        data[1]
    assert data[2].id == "good"


def test_a_record_that_is_no_object_is_named_by_its_place(tmp_path: Path) -> None:
    data = build(write_json(tmp_path / "a.json", [RECORDS[0], [1, 2]]))
    with pytest.raises(SampleError, match=r"sample '1': record 1 is not an object .* but a list"):
        data[1]


def test_a_file_that_changes_afterwards_is_noticed(tmp_path: Path) -> None:
    path = write_json(tmp_path / "a.json", RECORDS)
    data = build(path)
    path.write_text("[]")
    with pytest.raises(SampleError, match=r"sample '1': cannot be read at byte \d+ of .*changed"):
        data[1]


def test_what_is_not_utf8_is_the_fault_of_one_sample(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(ONE.encode() + b"\n" + ONE.replace("hello", "h\xe9llo").encode("latin-1"))
    data = build(path)
    assert data[0].id == "7"
    with pytest.raises(SampleError, match=r"sample '1': .*not UTF-8"):
        data[1]


def test_keys_for_evaluation_reach_the_sample(tmp_path: Path) -> None:
    record = {**RECORDS[0], "answers": ["cheese", "gouda"], "question_type": "food"}
    sample = build(write_json(tmp_path / "a.json", [record]))[0]
    assert sample.meta == {"answers": ["cheese", "gouda"], "question_type": "food"}


@pytest.mark.parametrize("record", RECORDS)
def test_check_finds_nothing_in_good_records(record: Any) -> None:
    assert check_record(record, 0) == []


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"imgae": "x", "conversations": RECORDS[2]["conversations"]}, "unknown key: 'imgae' (did you mean 'image'?)"),
        ({"conversations": [{"form": "human", "from": "human", "value": "a"}]}, "unknown key: 'form' (did you mean"),
        ({"conversations": turns(("gpt", "a"))}, "role order: the first turn is not the user's"),
        ({"conversations": turns(("human", "a"))}, "role order: the last turn is not the assistant's"),
        ({"conversations": turns(("human", "a"), ("user", "b"), ("gpt", "c"))}, "role order: turn 2 is the user's"),
        ({"conversations": turns(("human", "a"), ("system", "b"), ("gpt", "c"))}, "role order: turn 2 is a system"),
        ({"conversations": GOOD}, "marker count: 1 x <image> in the text for 0 picture(s)"),
    ],
)  # fmt: skip
def test_check_finds_what_getitem_lets_pass(tmp_path: Path, record: Any, expected: str) -> None:
    found = check_record(record, 0)
    assert any(text.startswith(expected) for text in found), found
    build(write_json(tmp_path / "a.json", [record]))[0]
