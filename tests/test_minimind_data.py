"""MiniMind-V's data: names and prefixes of pictures, thoughts, tools, random system texts, parquet."""

from __future__ import annotations

import io
import json
import pickle
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from rich.console import Console
from test_template import show, talk, template

from minivlm import registry
from minivlm.config.loader import load_config
from minivlm.datasets.base import DatasetError
from minivlm.datasets.chat_turns import with_thoughts, with_tools
from minivlm.datasets.configs import LlavaJsonConfig, ParquetChatConfig
from minivlm.datasets.doctor import check_dataset, print_report
from minivlm.datasets.llava_json import LlavaJsonBuilder, check_record
from minivlm.datasets.loading import load
from minivlm.datasets.parquet import ParquetChatBuilder, ParquetChatDataset, recut
from minivlm.processors.configs import TemplateConfig
from minivlm.processors.image import image_hash, open_image
from minivlm.processors.template import Template, TemplateError
from minivlm.types import Message, Sample, SampleError

NAMES = [f"minimind_v{generation}_{stage}" for generation in ("", "2", "3") for stage in ("pretrain", "sft")]


def encoded(colour: Any = "red", size: tuple[int, int] = (20, 16), mode: str = "RGB", kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, kind)
    return file.getvalue()


def turns(*texts: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


def json_samples(folder: Path, records: list[dict[str, Any]], **settings: Any) -> list[Sample]:
    (folder / "a.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    return list(
        LlavaJsonBuilder(LlavaJsonConfig(annotations=str(folder / "a.jsonl"), **settings), "mine").build("train")
    )


def contents(sample: Sample) -> list[str | None]:
    return [message.content for message in sample.messages]


# --- JSON and JSONL -------------------------------------------------------------------------------------------------


def test_pictures_get_the_prefix_once(tmp_path: Path) -> None:
    records = [
        {"image": name, "conversations": turns("<image>?", "yes")}
        for name in ("1.jpg", "train/2.jpg", "COCO_train2014_3.jpg")
    ]
    samples = json_samples(tmp_path, records, image_prefix="COCO_train2014_")
    names = [str(sample.images[0].relative_to(tmp_path)) for sample in samples]  # type: ignore[union-attr]
    assert names == ["COCO_train2014_1.jpg", "train/COCO_train2014_2.jpg", "COCO_train2014_3.jpg"]


def test_names_may_share_a_string(tmp_path: Path) -> None:
    record = {"image": "1.jpg, 2.jpg", "conversations": turns("<image>\n<image>\n?", "yes")}
    (sample,) = json_samples(tmp_path, [record], image_separator=",", image_prefix="x_")
    assert [Path(str(image)).name for image in sample.images] == ["x_1.jpg", "x_2.jpg"]
    (sample,) = json_samples(tmp_path, [record])
    assert [Path(str(image)).name for image in sample.images] == ["1.jpg, 2.jpg"]


def test_a_shared_string_cannot_leave_the_folder(tmp_path: Path) -> None:
    records = [{"image": "1.jpg,../2.jpg", "conversations": turns("<image><image>?", "yes")}]
    with pytest.raises(SampleError, match="leaves the folder"):
        json_samples(tmp_path, records, image_separator=",", image_prefix="x_")


def test_only_the_first_turns(tmp_path: Path) -> None:
    talks = turns("<image>a", "b", "<image>c", "d", "e")
    record = {"image": ["1.jpg", "2.jpg"], "conversations": [{"role": "system", "content": "s"}, *talks]}
    for count, texts, pictures in ((1, "sab", 1), (2, "sabcd", 2), (3, "sabcde", 2), (None, "sabcde", 2)):
        (sample,) = json_samples(tmp_path, [record], max_turns=count)
        assert "".join(text or "" for text in contents(sample)).replace("<image>", "") == texts
        assert [Path(str(image)).name for image in sample.images] == ["1.jpg", "2.jpg"][:pictures]


def test_tools_and_thoughts(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "b", "reasoning_content": "because"}
    tools = [{"name": "f", "description": "für"}]
    first, second = json_samples(
        tmp_path,
        [
            {"conversations": [{"role": "user", "content": "a", "functions": tools}, answer]},
            {"conversations": [{"role": "system", "content": "s", "tools": json.dumps(tools)}, *turns("a", "b")]},
        ],
    )
    assert contents(first) == [with_tools("", tools), "a", "<think>\nbecause\n</think>\n\nb"]
    assert contents(second) == [with_tools("s", tools), "a", "b"]
    assert '\n{"name": "f", "description": "für"}\n</tools>' in with_tools("", tools)
    assert with_tools("s", []) == "s" and with_tools("s", tools).startswith("s\n\n# Tools\n")


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"functions": "no json"}, "turn 1: "),
        ({"functions": {}, "tools": "{}"}, "must be a list"),
        ({"reasoning_content": 3}, "`reasoning_content` of turn 1 is not text"),
    ],
)
def test_what_is_wrong_with_tools_and_thoughts(turn: dict[str, Any], reason: str) -> None:
    first, second = turns("a", "b")
    complaints = check_record({"conversations": [first | turn, second]}, 0)
    assert any(reason in text and text.startswith("record") for text in complaints)


@pytest.mark.parametrize("name", NAMES)
def test_names_have_defaults(name: str, tmp_path: Path) -> None:
    """The node of a dataset needs nothing beside its name."""
    registry.get("dataset", name)
    (tmp_path / "a.yaml").write_text(f"model: {{arch: quickstart, model_type: easy_vqa}}\ndatasets: {{{name}: }}\n")
    (stage,) = load_config(tmp_path / "a.yaml").stages
    config: Any = stage.datasets[name].config
    assert config.annotations and config.source
    assert isinstance(config, ParquetChatConfig) == ("v3" in name)
    assert config.image_prefix == ("COCO_train2014_" if name == "minimind_v_sft" else "")
    assert config.image_separator == ("," if "v2" in name else None)


# --- templates ------------------------------------------------------------------------------------------------------


def test_thoughts_stand_in_front_of_every_answer() -> None:
    form = template("minimind_v3")
    block = "<think>\n\n</think>\n\n"
    assert show(form.render(talk("q", "a"))) == (
        f"<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[{block}a<|im_end|>\n]"
    )
    own = show(form.render(talk("q", "<think>hm</think>a", "r", f"{block}b")))
    assert "[<think>\nhm\n</think>\n\na<|im_end|>\n]" in own and f"[{block}b<|im_end|>\n]" in own
    assert show(form.render(talk("q", None))).endswith(f"assistant\n{block}")
    opened = Template(TemplateConfig(**(vars(form.config) | {"think_open": True})))
    assert show(opened.render(talk("q", None))).endswith("assistant\n<think>\n")


def test_blanks_of_thoughts_stay() -> None:
    """Line breaks around them alone go, as in the original's chat template."""
    form = template("minimind_v3")
    for answer in (with_thoughts("a", "\n  x = 1 \n\n"), "<think>\n  x = 1 \n</think>\n\na"):
        assert "[<think>\n  x = 1 \n</think>\n\na<|im_end|>\n]" in show(form.render(talk("q", answer)))
    assert with_thoughts("a", " \n") == "a"
    assert "[<think>\n\n</think>\n\na<|im_end|>" in show(form.render(talk("q", "<think>\n \n</think>\n\na")))


def test_thoughts_need_an_end() -> None:
    with pytest.raises(TemplateError, match="think_suffix"):
        Template(TemplateConfig(think_prefix="<think>"))


def test_what_is_drawn_in_training() -> None:
    """Four of five samples lose their empty thoughts, one of five gets a system text; both depend on the seed alone."""
    form = template("minimind_v3")
    assert len(set(form.config.systems)) == 10
    texts = [show(form.render(talk("q", "a", "r", "b"), draw=random.Random(str(seed)))) for seed in range(1000)]
    assert texts == [show(form.render(talk("q", "a", "r", "b"), draw=random.Random(str(seed)))) for seed in range(1000)]
    thinking = Counter(text.count("<think>\n\n</think>\n\n") for text in texts)
    assert set(thinking) == {0, 2} and 150 < thinking[2] < 250
    systems = Counter(text.split("<|im_end|>")[0] for text in texts if text.startswith("<|im_start|>system\n"))
    assert len(systems) == 10 and 150 < systems.total() < 250
    own = [
        show(form.render(talk("q", "<think>\nx\n</think>\n\na", system="s"), draw=random.Random(s))) for s in range(50)
    ]
    assert set(own) == {
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
        "<|im_start|>assistant\n[<think>\nx\n</think>\n\na<|im_end|>\n]"
    }


def test_nothing_is_drawn_elsewhere() -> None:
    form = template("minimind_v3")
    assert show(form.render(talk("q", "a"))) == show(form.render(talk("q", "a"), chat=True))


@pytest.mark.parametrize(
    ("name", "placeholder"),
    [("minimind_v1", "<" * 25 + ">" * 25), ("minimind_v2", "@" * 196), ("minimind_v3", "<|image_pad|>" * 64)],
)
def test_placeholders_are_pictures(name: str, placeholder: str) -> None:
    form = template(name)
    segments = show(form.render(talk(f"Look: {placeholder}\n{placeholder}?", "ok")))
    assert "user\nLook: @\n@?<" in segments
    assert form.with_images(f"{placeholder}?", 1) == f"{placeholder}?" and form.with_images("?", 1) == "<image>\n?"
    assert placeholder in show(form.render(talk("q", f"a{placeholder}")))


# --- parquet --------------------------------------------------------------------------------------------------------


def rows() -> list[dict[str, Any]]:
    """Bytes, a list of them, grey, and two rows of text alone."""
    ask = turns("<image>\n?", "red")
    return [
        {"conversations": ask, "image_bytes": [encoded()]},
        {"conversations": turns("<image>\n<image>\n?", "two"), "image_bytes": [encoded("blue"), encoded("green")]},
        {"conversations": ask, "image_bytes": [encoded(90, mode="L")]},
        {"conversations": turns("hello", "hi"), "image_bytes": [encoded("black", (8, 8))]},
        {"conversations": turns("hello", "hi"), "image_bytes": None},
        {"conversations": ask, "image_bytes": [encoded("yellow", kind="PNG")]},
    ]


def write(file: Path, records: list[dict[str, Any]], group: int = 2, text: bool = True) -> Path:
    records = [r | {"conversations": json.dumps(r["conversations"]) if text else r["conversations"]} for r in records]
    parquet.write_table(pyarrow.Table.from_pylist(records), file, row_group_size=group)
    return file


def build(file: Path, **settings: Any) -> ParquetChatDataset:
    built = ParquetChatBuilder(ParquetChatConfig(annotations=str(file), **settings), "mine").build("train")
    assert isinstance(built, ParquetChatDataset)
    return built


@pytest.mark.parametrize("text", [True, False])
def test_parquet(tmp_path: Path, text: bool) -> None:
    data = build(write(tmp_path / "a.parquet", rows(), text=text))
    assert len(data) == 6 and [len(sample.images) for sample in data] == [1, 2, 1, 0, 0, 1]
    assert data[1].messages == [Message("user", "<image>\n<image>\n?"), Message("assistant", "two")]
    grey, yellow = open_image(data[2].images[0]), open_image(data[-1].images[0])
    assert (grey.mode, yellow.mode, yellow.getpixel((0, 0))) == ("RGB", "RGB", (255, 255, 0))
    assert image_hash(data[0].images[0]) == image_hash(data[0].images[0]) != image_hash(data[2].images[0])
    with pytest.raises(IndexError):
        data[6]


def test_parquet_one_picture_without_a_list(tmp_path: Path) -> None:
    data = build(
        write(tmp_path / "a.parquet", [{"id": "x", "conversations": turns("<image>?", "a"), "image_bytes": encoded()}])
    )
    assert data[0].id == "x" and open_image(data[0].images[0]).size == (20, 16)


def test_parquet_reads_in_any_order_and_in_processes(tmp_path: Path) -> None:
    data = build(write(tmp_path / "a.parquet", rows()), memory_mb=1)
    straight = [contents(sample) for sample in data]
    order = [5, 0, 3, 1, 4, 2, 5]
    assert [contents(data[index]) for index in order] == [straight[index] for index in order]
    again = pickle.loads(pickle.dumps(data))
    assert [contents(sample) for sample in again] == straight
    read = load(data, order, workers=2)  # type: ignore[arg-type]
    assert [contents(sample) for sample in read] == [straight[index] for index in order]


def test_parquet_holds_as_many_groups_as_fit(tmp_path: Path) -> None:
    noise = random.Random(0)
    records = [{"conversations": turns("a", "b"), "image_bytes": [noise.randbytes(400_000)]} for _ in range(8)]
    data = build(write(tmp_path / "a.parquet", records, group=1), memory_mb=1)
    for index in range(8):
        data.record(index)
        assert sum(table.nbytes for table in data._groups.values()) <= 2**20
    assert list(data._groups) == [6, 7]


def test_large_row_groups_are_refused_and_recut(tmp_path: Path) -> None:
    noise = random.Random(0)
    records = [{"conversations": turns("a", "b"), "image_bytes": [noise.randbytes(20_000)]} for _ in range(100)]
    file = write(tmp_path / "a.parquet", records, group=100)
    with pytest.raises(DatasetError, match=r"a row group has .*python -m minivlm.datasets.parquet .*memory_mb"):
        build(file, memory_mb=1)
    command = [sys.executable, "-m", "minivlm.datasets.parquet", str(file), str(tmp_path / "b.parquet")]
    subprocess.run(command, check=True)
    data = build(tmp_path / "b.parquet", memory_mb=2)
    assert [record["image_bytes"] for record in map(data.record, range(100))] == [r["image_bytes"] for r in records]
    assert [end for end in data._spans] == [64, 100]
    done = subprocess.run([*command[:3], str(tmp_path / "none"), "x"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "none is no parquet file" in done.stderr and "Traceback" not in done.stderr


def test_recut_keeps_columns(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [row | {"score": 1.5} for row in rows()], group=6)
    recut(tmp_path / "a.parquet", tmp_path / "b.parquet", rows=4)
    one, other = parquet.ParquetFile(tmp_path / "a.parquet"), parquet.ParquetFile(tmp_path / "b.parquet")
    assert one.read().equals(other.read()) and other.num_row_groups == 2


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"conversations": "no json", "image_bytes": [b"x"]}, "is not JSON"),
        ({"conversations": "[]", "image_bytes": [b"x"]}, "an empty `conversations`"),
        ({"conversations": json.dumps(turns("<image>", "a")), "image_bytes": ["x"]}, "encoded picture"),
        ({"conversations": json.dumps([{"role": "robot", "content": "x"}])}, "from 'robot'"),
        ({"conversations": None}, "no list `conversations`"),
    ],
)
def test_what_is_wrong_with_a_row(tmp_path: Path, record: dict[str, Any], reason: str) -> None:
    parquet.write_table(pyarrow.Table.from_pylist([record, {"conversations": "[]"}]), tmp_path / "a.parquet")
    data = build(tmp_path / "a.parquet")
    with pytest.raises(SampleError, match=f"'0'.*{reason}"):
        data[0]
    (complaint,) = data.check(0)  # what the data doctor reports, and goes on
    assert complaint.startswith("record: ") and reason in complaint


def test_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(DatasetError, match=r"text\.parquet is no parquet file"):
        build(tmp_path / "text.parquet")
    with pytest.raises(DatasetError, match="there is no annotation file"):
        build(tmp_path / "none.parquet")
    parquet.write_table(pyarrow.table({"a": [1], "b": [2]}), tmp_path / "other.parquet")
    with pytest.raises(DatasetError, match="no column `conversations`; it has: a, b"):
        build(tmp_path / "other.parquet")
    parquet.write_table(pyarrow.table({"conversations": pyarrow.array([], "string")}), tmp_path / "empty.parquet")
    with pytest.raises(DatasetError, match="has no records"):
        build(tmp_path / "empty.parquet")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.parquet", rows())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DatasetError, match=r'pip install "minivlm\[parquet\]"'):
        build(file)


def test_the_doctor_reads_parquet(tmp_path: Path) -> None:
    broken = {"conversations": turns("<image>?", "a"), "image_bytes": [b"no picture"]}
    several = {"conversations": turns("?", "a"), "image_bytes": [encoded()]}
    builder = ParquetChatBuilder(
        ParquetChatConfig(annotations=str(write(tmp_path / "a.parquet", [*rows(), broken, several]))), "mine"
    )
    report = check_dataset(builder, "train")
    console = Console(file=io.StringIO(), width=200)
    print_report(report, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert report.checked == 8 and set(report.findings) == {"unreadable picture", "marker count"}
    assert f"1 of sample '6' in {tmp_path / 'a.parquet'}" in text and "0 x <image> in the text for 1 picture(s)" in text
    assert report.pictures == {0: 2, 1: 5, 2: 1}
    skimmed = check_dataset(builder, "train", limit=2)
    assert skimmed.skimmed == 6
