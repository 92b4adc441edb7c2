"""The data of LLaVA-1.5 and Imp: named datasets, folders that lack, other endings, answers that are empty."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_model, write_yaml
from PIL import Image

from minivlm.cli import main
from minivlm.config import load_config
from minivlm.datasets.base import DatasetError
from minivlm.datasets.doctor import check_dataset
from minivlm.datasets.records import RecordBuilder
from minivlm.datasets.training_set import build_datasets

MIX = "llava_v1_5_mix665k"
FOLDERS = {
    "coco/train2017": "train2017.zip",
    "gqa/images": "gqa/images.zip",
    "ocr_vqa/images": "loader script",
    "textvqa/train_images": "train_val_images.zip",
    "vg/VG_100K": "VG_100K_2/images.zip",
    "vg/VG_100K_2": "VG_100K_2/images2.zip",
}


def record(name: str, image: str | None, *answers: str, **others: Any) -> dict[str, Any]:
    turns = []
    for number, answer in enumerate(answers):
        marker = "<image>\n" if image and not number else ""
        turns += [{"from": "human", "value": f"{marker}what?"}, {"from": "gpt", "value": answer}]
    return {"id": name, **({"image": image} if image else {}), "conversations": turns, **others}


def picture(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), "red").save(file)


def experiment(tmp_path: Path, **datasets: Any) -> str:
    return str(write_yaml(tmp_path / "x.yaml", {"model": tiny_model(), "datasets": datasets}))


def builder(tmp_path: Path, name: str = MIX, /, **settings: Any) -> RecordBuilder[Any]:
    stage = load_config(experiment(tmp_path, **{name: settings})).stages[0]
    return build_datasets(stage.datasets)[name]  # type: ignore[return-value]


@pytest.fixture
def mix(tmp_path: Path) -> dict[str, str]:
    """Settings of a mix665k of a few records, whole."""
    for folder in FOLDERS:
        picture(tmp_path / "data" / folder / "1.jpg")
    records = [record(folder, f"{folder}/1.jpg", "a thing") for folder in FOLDERS]
    records.append(record("chat", None, "hello", model="gpt-4"))
    (tmp_path / "data" / "mix.json").write_text(json.dumps(records))
    return {"annotations": str(tmp_path / "data" / "mix.json"), "images": str(tmp_path / "data")}


def test_names_bring_llavas_places(tmp_path: Path) -> None:
    first, second = builder(tmp_path, "blip_laion_cc_sbu_558k").config, builder(tmp_path).config
    assert first.annotations == "data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json"
    assert (first.images, first.layout) == ("data/LLaVA-Pretrain/images", None)
    assert (second.annotations, second.images) == ("data/llava_v1_5_mix665k.json", "data")
    assert list(second.layout) == list(FOLDERS)
    assert all(FOLDERS[folder] in source for folder, source in second.layout.items())


def test_a_whole_layout_is_read_with_all_its_keys(tmp_path: Path, mix: dict[str, str]) -> None:
    report = check_dataset(builder(tmp_path, **mix), "train")
    assert report.ok and report.checked == 7 and report.pictures == {1: 6, 0: 1}
    extra = [record("0", "coco/train2017/1.jpg", "a dog", blip_caption="a dog", url="http://localhost/1.jpg")]
    Path(mix["annotations"]).write_text(json.dumps(extra))
    assert check_dataset(builder(tmp_path, "blip_laion_cc_sbu_558k", **mix), "train").ok


def test_all_that_lacks_is_named_at_once_with_where_it_comes_from(tmp_path: Path, mix: dict[str, str]) -> None:
    data = tmp_path / "data"
    for folder in ("gqa/images", "vg/VG_100K"):
        (data / folder / "1.jpg").unlink()
    (data / "gqa/images").rmdir()
    with pytest.raises(DatasetError) as caught:
        builder(tmp_path, **mix).build("train")
    said = str(caught.value)
    assert f"there is no folder {data}/gqa/images (from https://downloads.cs.stanford.edu/nlp/data/gqa/images" in said
    assert f"the folder {data}/vg/VG_100K is empty (from https://cs.stanford.edu/people/rak248/VG_100K_2/images" in said
    assert not any(folder in said for folder in ("coco", "ocr_vqa", "textvqa", "VG_100K_2 is"))
    assert len(builder(tmp_path, **mix, layout={"gqa/images": None, "vg/VG_100K": None}).build("train")) == 7
    assert len(builder(tmp_path, **mix, layout=None).build("train")) == 7


def test_nothing_there_yet_is_one_list(tmp_path: Path) -> None:
    settings = {"annotations": str(tmp_path / "none.json"), "images": str(tmp_path / "none")}
    with pytest.raises(DatasetError) as caught:
        builder(tmp_path, **settings).build("train")
    said = str(caught.value)
    assert "no annotation file" in said and "liuhaotian/LLaVA-Instruct-150K" in said
    assert all(f"there is no folder {tmp_path}/none/{folder} (from " in said for folder in FOLDERS)
    with pytest.raises(DatasetError) as caught:
        builder(tmp_path, "blip_laion_cc_sbu_558k", **settings).build("train")
    assert str(caught.value).count("liuhaotian/LLaVA-Pretrain") == 2


def test_the_check_does_not_read_folders(tmp_path: Path, mix: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder of a million pictures one entry is asked for."""
    for number in range(50):
        (tmp_path / "data/coco/train2017" / f"x{number}").touch()
    read: list[str] = []
    scandir = os.scandir

    class Counted:
        def __init__(self, path: Any):
            self.entries = scandir(path)

        def __enter__(self) -> Counted:
            return self

        def __exit__(self, *_: Any) -> None:
            self.entries.close()

        def __next__(self) -> Any:
            read.append(next(self.entries).name)
            return read[-1]

        def __iter__(self) -> Counted:
            return self

    built = builder(tmp_path, **mix)
    monkeypatch.setattr(os, "scandir", Counted)
    built.build("train")
    assert len(read) == len(FOLDERS) + 1


def test_any_format_may_state_a_layout(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"image": "b/1.png", "caption": "red"}]))
    settings = {"name": "caption_json", "annotations": str(tmp_path / "a.json"), "layout": {"b": "the server"}}
    with pytest.raises(DatasetError, match=r"'mine' is not complete:\n  there is no folder .*b \(from the server\)"):
        builder(tmp_path, "mine", **settings).build("train")


def test_a_picture_with_another_ending_is_taken_and_counted(tmp_path: Path, mix: dict[str, str]) -> None:
    folder = tmp_path / "data/ocr_vqa/images"
    picture(folder / "2.gif")
    picture(folder / "3.jpg")
    (folder / "4.txt").touch()
    names = ["1.jpg", "2.jpg", "3.png", "4.jpg"]
    Path(mix["annotations"]).write_text(json.dumps([record(n, f"ocr_vqa/images/{n}", "a book") for n in names]))
    built = builder(tmp_path, **mix)
    paths = [sample.images[0] for sample in built.build("train")]
    assert [path.name for path in paths] == ["1.jpg", "2.gif", "3.jpg", "4.jpg"]
    report = check_dataset(built, "train")
    assert report.findings["other ending"].count == 2
    assert report.findings["other ending"].examples[0] == ("2.jpg", f"{folder}/2.jpg lies there as 2.gif")
    assert report.findings["missing picture"].count == report.bad == 1 and not report.ok
    picture(folder / "4.webp")
    report = check_dataset(built, "train")
    assert report.ok and report.bad == 0 and report.findings["other ending"].count == 3


def test_other_formats_find_other_endings_too(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    (tmp_path / "a.json").write_text(json.dumps([{"image": "1.jpg", "phrase": "it", "boxes": [[0, 0, 16, 32]]}]))
    built = builder(tmp_path, "mine", name="refcoco", annotations=str(tmp_path / "a.json"))
    assert built.build("train")[0].images == [tmp_path / "1.png"]
    assert "<50>" in built.build("train")[0].messages[1].content


def test_empty_answers_are_found_in_all_records_whatever_the_limit(tmp_path: Path, mix: dict[str, str]) -> None:
    records = [record(f"r{n}", None, "yes", "no") for n in range(40)]
    records[17] = record("bad", None, "yes", " \n")
    records[23] = {"id": "worse"}
    Path(mix["annotations"]).write_text(json.dumps(records))
    report = check_dataset(builder(tmp_path, **mix), "train", limit=4)
    assert (report.checked, report.skimmed, report.bad) == (4, 36, 0)
    assert report.findings["nothing supervised"].examples == [("bad", "the answer in turn 4 is empty")]
    assert report.findings["record"].examples[0][0] == "worse"


def test_check_data_tells_all_of_it(tmp_path: Path, mix: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    path = experiment(tmp_path, **{MIX: mix})
    records = json.loads(Path(mix["annotations"]).read_text())
    records += [record("bad", None, "yes", ""), record("ending", "gqa/images/1.gif", "a thing")]
    Path(mix["annotations"]).write_text(json.dumps(records))
    assert main(["check-data", path]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "9 samples read 1 cannot be used nothing supervised: 1 samples" in said
    assert "sample 'bad': turn 4: the answer is empty" in said
    assert "other ending: 1 samples - nothing to do" in said
    Path(mix["annotations"]).write_text(json.dumps([*records[:7], records[8]]))
    assert main(["check-data", path]) == 0
    capsys.readouterr()
    (tmp_path / "data/gqa/images/1.jpg").rename(tmp_path / "1.jpg")
    assert main(["check-data", path]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "'llava_v1_5_mix665k' is not complete:" in said
    assert "gqa/imagesisempty(fromhttps://" in said.replace(" ", "")  # a long path is broken across lines
