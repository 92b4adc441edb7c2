"""Captions, questions, boxes and instructions in JSON: from a record to a sample, and what is wrong with one."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import RECORD_KINDS, ROOT, write_yaml
from PIL import Image
from rich.console import Console

from minivlm import registry
from minivlm.config import load_config
from minivlm.datasets.base import DatasetError
from minivlm.datasets.boxes import parse_boxes
from minivlm.datasets.doctor import check_dataset
from minivlm.datasets.training_set import build_datasets
from minivlm.evaluation.vqa import predict
from minivlm.evaluation.vqa_accuracy import vqa_accuracy
from minivlm.runners.experiment import run_experiment
from minivlm.types import Sample, SampleError

MODEL = "model: {vision_encoder: efficientnet_lite0, connector: linear, language_model: {name: hf, path: x}}\n"
BOAT = [10, 20, 30, 30]
Build = Callable[..., Any]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """The samples of a dataset as an experiment file names it, with its packaged defaults."""
    Image.new("RGB", (40, 50)).save(tmp_path / "1.png")

    def make(name: str, *records: Any, **settings: Any) -> Any:
        (tmp_path / "records.json").write_text(json.dumps(records))
        settings = {"annotations": str(tmp_path / "records.json")} | settings
        file = tmp_path / "x.yaml"
        file.write_text(MODEL.replace("}}", "}, template: qa}") + f"datasets: {{{name}: {json.dumps(settings)}}}\n")
        (builder,) = build_datasets(load_config(file).stages[0].datasets).values()
        return builder.build("train")

    return make


def turns(sample: Sample) -> tuple[str | None, str | None]:
    user, assistant = sample.messages
    assert (user.role, assistant.role) == ("user", "assistant")
    return user.content, assistant.content


def test_every_name_of_minigpt_v2_is_there_with_its_identifier(build: Build) -> None:
    of_kind = {"caption": ["[caption]"], "vqa": ["[vqa]"], "objects": ["[grounding]", "[detection]"]}
    of_kind["phrase"] = ["[refer]", "[identify]", "[detection]"]
    records = {
        "caption": {"image": "1.png", "caption": "a boat"},
        "vqa": {"image": "1.png", "question": "what?", "answers": "a boat"},
        "phrase": {"image": "1.png", "phrase": "a boat", "boxes": BOAT},
        "objects": {"image": "1.png", "caption": "a boat", "objects": [{"phrase": "a boat", "boxes": BOAT}]},
    }
    seen = set()
    for kind, identifiers in of_kind.items():
        for name in RECORD_KINDS[kind]:
            asked, _ = turns(build(name, records[kind])[0])
            assert asked and asked.startswith("<image> [")
            seen.add(asked.split()[1])
            assert asked.split()[1] in identifiers
    assert seen == {"[vqa]", "[caption]", "[grounding]", "[refer]", "[identify]", "[detection]"}


def test_captions(build: Build, tmp_path: Path) -> None:
    (sample,) = build("caption_json", {"id": 7, "image": "1.png", "caption": ["A boat.", "A red boat."]}, prompts=["?"])
    assert turns(sample) == ("<image> ?", "A boat.") and sample.id == "7"
    assert sample.images == [tmp_path / "1.png"] and sample.meta["answers"] == ["A boat.", "A red boat."]


def test_the_wording_belongs_to_the_record(build: Build) -> None:
    records = [{"image": "1.png", "caption": "a boat"}] * 40
    data = build("coco_caption", *records)
    asked = [turns(sample)[0] for sample in data]
    assert len(set(asked)) == 3 and asked == [turns(sample)[0] for sample in pickle.loads(pickle.dumps(data))]


def test_questions(build: Build) -> None:
    record = {"image": "1.png", "question": "what {text}?", "answers": ["ship", "boat", "boat"]}
    (sample,) = build("vqa_json", record, identifier="[vqa]")
    assert turns(sample) == ("<image> [vqa] what {text}?", "boat")
    assert sample.meta == {
        "question": "what {text}?",
        "answers": ["ship", "boat", "boat"],
        "question_type": "vqa_json",
        "metric": "exact_match",
    }
    (typed,) = build("vqa_json", record | {"question_type": "what"})
    assert typed.meta["question_type"] == "what"


def test_instructions_without_pictures(build: Build) -> None:
    data = build(
        "unnatural_instruction",
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"instruction": "Say hi.", "output": "hi"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
    )
    assert [turns(sample) for sample in data] == [("Add.\n1, 2", "3"), ("Say hi.", "hi"), ("Say hi.", "hi")]
    assert data[0].images == []


# --- boxes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "given", "answer"),
    [
        ("refer", "a boat", "{<25><40><75><60>}"),
        ("identify", "{<25><40><75><60>}", "a boat"),
        ("detect", "a boat", "<p>a boat</p> {<25><40><75><60>}"),
    ],
)
def test_phrases_in_every_direction(build: Build, form: str, given: str, answer: str) -> None:
    (sample,) = build("grounding_json", {"image": "1.png", "phrase": "a boat", "boxes": BOAT}, form=form)
    assert turns(sample) == (f"<image> {given}", answer)


def test_the_size_of_a_picture_comes_from_the_record_the_file_or_the_unit(build: Build) -> None:
    def box(record: dict[str, Any], **settings: Any) -> Any:
        (sample,) = build("grounding_json", {"phrase": "a boat", "boxes": [BOAT, [0, 0, 9, 9]]} | record, **settings)
        return parse_boxes(turns(sample)[1] or "")[0][1]

    assert box({"image": "1.png"}) == [(25, 40, 75, 60), (0, 0, 22, 18)]
    assert box({"image": "none.png", "width": 100, "height": 200}) == [(10, 10, 30, 15), (0, 0, 9, 4)]
    assert box({"image": "none.png"}, box_unit="percent") == [(10, 20, 30, 30), (0, 0, 9, 9)]
    with pytest.raises(SampleError, match=r"there is no picture .*none\.png"):
        box({"image": "none.png"})


def test_captions_with_boxes(build: Build) -> None:
    record = {
        "image": "1.png",
        "caption": "a boat and a boat",
        "objects": [{"phrase": "a boat", "boxes": BOAT}, {"phrase": "boat", "boxes": [[0, 0, 40, 50], BOAT]}],
    }
    (sample,) = build("flickr_grounded_caption", record, prompts=["Describe."])
    marked = "<p>a boat</p> {<25><40><75><60>} and a <p>boat</p> {<0><0><100><100>}<delim>{<25><40><75><60>}"
    assert turns(sample) == ("<image> [grounding] Describe.", marked)
    (sample,) = build("flickr_CaptionToPhrase", record)
    asked, said = turns(sample)
    assert asked == "<image> [detection] a boat and a boat" and said == marked.replace(" and a ", " ")


@pytest.mark.parametrize(
    ("name", "record", "reason"),
    [
        ("caption_json", {"image": "1.png"}, "`caption` must be a text or a list of texts"),
        ("caption_json", {"caption": "a"}, "it has no `image`"),
        ("caption_json", {"caption": "a", "image": "../1.png"}, "leaves the folder"),
        ("caption_json", {"caption": " ", "image": "1.png"}, "`caption` must be"),
        ("caption_json", 5, "is not an object"),
        ("vqa_json", {"image": "1.png", "question": "?", "answers": []}, "`answers` must be"),
        ("vqa_json", {"image": "1.png", "question": ["?"], "answers": "a"}, "`question` must be a text"),
        ("text_json", {"instruction": "say", "output": 3}, "`output` must be a text"),
        ("grounding_json", {"image": "1.png", "phrase": "a"}, "`boxes` must be"),
        ("grounding_json", {"image": "1.png", "phrase": "a", "boxes": [1, 2, 3]}, "`boxes` must be"),
        ("grounding_json", {"image": "1.png", "phrase": "a", "boxes": [[1, 2, 3, "4"]]}, "`boxes` must be"),
        ("grounding_json", {"image": "1.png", "phrase": "a", "boxes": [30, 2, 3, 4]}, "inside of 40 x 50"),
        ("grounding_json", {"image": "1.png", "phrase": "a", "boxes": BOAT, "width": 0, "height": 1}, "above 0"),
        ("flickr_grounded_caption", {"image": "1.png", "caption": "a"}, "`objects` must be a list"),
        (
            "flickr_grounded_caption",
            {"image": "1.png", "caption": "a boat", "objects": [{"phrase": "a ship", "boxes": BOAT}]},
            "'a ship', does not follow in the caption",
        ),
        ("flickr_grounded_caption", {"image": "1.png", "caption": "a", "objects": [{}]}, "object 1 has no `phrase`"),
    ],
)
def test_bad_records_are_named_and_do_not_stop_the_others(build: Build, name: str, record: Any, reason: str) -> None:
    data = build(name, record)
    with pytest.raises(SampleError, match=reason) as caught:
        data[0]
    assert caught.value.sample_id == "0"
    impossible = "inside of" in reason  # only the size of the picture tells
    assert any(reason in complaint for complaint in data.check(0)) != impossible


def test_unknown_keys_are_told_by_the_doctor_and_do_no_harm(build: Build) -> None:
    data = build("vqa_json", {"image": "1.png", "question": "?", "answers": "a", "anwsers": "b"})
    assert data.check(0) == ["unknown key: 'anwsers' (did you mean 'answers'?)"] and turns(data[0])[1] == "a"


def test_the_doctor_reads_them(build: Build, tmp_path: Path) -> None:
    good = {"image": "1.png", "phrase": "a boat", "boxes": BOAT}
    build("refcoco", good, good | {"boxes": []}, good | {"boxes": [90, 90, 99, 99]}, good | {"image": "2.png"})
    (builder,) = build_datasets(load_config(tmp_path / "x.yaml").stages[0].datasets).values()
    report = check_dataset(builder, "train")
    assert report.bad == 3 and report.findings["record"].count == 3


def test_a_missing_file_is_an_error_of_the_dataset(build: Build) -> None:
    with pytest.raises(DatasetError, match=r"dataset 'refcoco': there is no annotation file /nowhere\.json"):
        build("refcoco", annotations="/nowhere.json")


# --- scores -----------------------------------------------------------------------------------------------------------


def test_every_sample_is_scored_by_the_metric_of_its_dataset(build: Build) -> None:
    (box,) = build("refcoco", {"image": "1.png", "phrase": "a boat", "boxes": BOAT})
    assert predict(box, "{<26><41><75><60>}").correct == 1 and predict(box, "{<1><1><9><9>}").correct == 0
    (name,) = build("invrefcoco", {"image": "1.png", "phrase": "a boat", "boxes": BOAT})
    assert predict(name, "A boat.").correct == 1
    answers = ["boat"] * 2 + ["ship"] * 8
    (asked,) = build("ok_vqa", {"image": "1.png", "question": "?", "answers": answers})
    assert predict(asked, "boat").correct == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert predict(asked, "Ship.").correct == 1 and predict(asked, "car").correct == 0


def test_fewer_than_ten_answers_are_all_right() -> None:
    assert vqa_accuracy("boat", ["ship", "Boat"]) == 1 and vqa_accuracy("car", ["ship", "boat"]) == 0
    assert {"exact_match", "vqa_accuracy", "box_iou"} <= set(registry.names("metric"))


def test_benchmarks_are_evaluated_together_and_scored_apart(
    tiny_experiment: dict[str, Any], minigpt4_data: Path, tmp_path: Path
) -> None:
    tiny_experiment["run"]["max_steps"] = 1
    run_experiment(load_config(write_yaml(tmp_path / "train.yaml", tiny_experiment)), Console(quiet=True))
    names = {"refcoco": "phrase", "invrefcoco": "phrase", "gqa": "vqa"}
    content = {
        "model": {"checkpoint": tiny_experiment["run"]["output_dir"]},
        "datasets": {name: {"annotations": {"test": f"{minigpt4_data}/{kind}.json"}} for name, kind in names.items()},
        "run": {"task": "vqa", "evaluate": True, "test_splits": ["test"], "output_dir": str(tmp_path / "eval")},
    }
    content["run"] |= {"device": "cpu", "precision": "fp32", "max_len": 4}
    (metrics,) = run_experiment(load_config(write_yaml(tmp_path / "eval.yaml", content)), Console(quiet=True)).values()
    assert {f"accuracy/{name}" for name in names} < set(metrics) and metrics["accuracy/refcoco"] == 0
    records = [json.loads(line) for line in (tmp_path / "eval/report/predictions.jsonl").read_text().splitlines()]
    assert len(records) == 12


def test_the_records_of_the_data_page_are_records(build: Build, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "data.md").read_text()
    rows = re.findall(r"^\| (?:`(\w+)`|\.\.\. for whole captions) \| `({.*?})`(?:;| \|)", page, flags=re.MULTILINE)
    assert [name for name, _ in rows] == ["caption_json", "vqa_json", "grounding_json", "", "text_json"]
    Image.new("RGB", (300, 220)).save(tmp_path / "1.jpg")
    for name, record in rows:
        settings = {} if name else {"form": "grounded_caption"}
        data = build(name or "grounding_json", json.loads(record), **settings)
        assert data.check(0) == [] and data[0].messages[1].content
    said = re.search(r"its boxes `<p>a red boat</p> ({.*?})`", page)
    (boat,) = build("refcoco", json.loads(rows[2][1]))
    assert said and turns(boat)[1] == said[1]
