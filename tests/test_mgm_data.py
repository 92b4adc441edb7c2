"""Mini-Gemini's data: names old and new, pictures under other names, the folder tree, parts merged twice."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT, tiny_model, write_yaml
from PIL import Image

from minivlm.builtins import CONFIGS
from minivlm.cli import main
from minivlm.config import ConfigError, load_config
from minivlm.datasets import roots
from minivlm.datasets.base import DatasetError
from minivlm.datasets.doctor import check_dataset
from minivlm.datasets.overlap import overlaps
from minivlm.datasets.pictures import survey, write_unusable
from minivlm.datasets.records import RecordBuilder, RecordDataset
from minivlm.datasets.training_set import Head, build_datasets
from minivlm.paths import respelled
from minivlm.processors.template import Template, count_slots
from minivlm.types import Message

SPELLINGS = [("MGM", "mgm"), ("MiniGemini", "minigemini"), ("Mini-Gemini", "mini_gemini")]
DATASETS = ("pretrain", "instruction", "generation_pure_text")


def record(name: Any, image: Any = None, question: str = "what?", answer: str = "a thing") -> dict[str, Any]:
    pictures = [] if image is None else image if isinstance(image, list) else [image]
    turns = [{"from": "human", "value": "<image>\n" * len(pictures) + question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns} | ({} if image is None else {"image": image})


def put(file: Path, records: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(records), encoding="utf-8")
    return file


def picture(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), "red").save(file)


def experiment(tmp_path: Path, datasets: dict[str, Any], **model: Any) -> str:
    return str(write_yaml(tmp_path / "x.yaml", {"model": tiny_model() | model, "datasets": datasets}))


def builder(tmp_path: Path, name: str, /, **settings: Any) -> RecordBuilder[Any]:
    stage = load_config(experiment(tmp_path, {name: settings})).stages[0]
    return build_datasets(stage.datasets)[name]  # type: ignore[return-value]


def build(tmp_path: Path, records: list[dict[str, Any]], **settings: Any) -> RecordDataset[Any]:
    file = put(tmp_path / "a.json", records)
    return builder(tmp_path, "llava_json", annotations=str(file), **settings).build("train")


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


# --- names ----------------------------------------------------------------------------------------------------------


def test_spellings_are_words_and_no_parts_of_words() -> None:
    assert respelled("mgm_pretrain") == ["mgm_pretrain", "minigemini_pretrain", "mini_gemini_pretrain"]
    assert respelled("Mini-Gemini-2B")[:2] == ["Mini-Gemini-2B", "MGM-2B"]
    assert respelled("mgmt_data") == ["mgmt_data"]


@pytest.mark.parametrize("dataset", DATASETS)
def test_all_names_of_a_dataset_bring_the_same_settings(tmp_path: Path, dataset: str) -> None:
    first, *others = (builder(tmp_path, name).config for name in respelled(f"mgm_{dataset}"))
    assert others == [first, first]
    assert Path(first.annotations).name == f"mgm_{dataset}.json" and first.source.startswith("https://")
    assert bool(first.layout) == (dataset != "generation_pure_text")


@pytest.mark.parametrize(("folder", "file"), SPELLINGS)
@pytest.mark.parametrize("name", ["mgm_pretrain", "minigemini_pretrain"])
def test_files_are_found_under_any_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, file: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "data" / f"{folder}-Pretrain"
    put(root / f"{file}_pretrain.json", [record("1", "images/1.png")])
    for each in ("images", "ALLaVA-4V"):
        picture(root / each / "1.png")
    (sample,) = builder(tmp_path, name).build("train")
    assert sample.images == [Path("data") / root.name / "images/1.png"]


def test_the_file_is_found_beside_an_empty_folder_of_todays_name(tmp_path: Path) -> None:
    (tmp_path / "MGM-Finetune").mkdir()
    put(tmp_path / "MiniGemini-Finetune/minigemini_generation_pure_text.json", [record("1")])
    asked = str(tmp_path / "MGM-Finetune/mgm_generation_pure_text.json")
    assert len(builder(tmp_path, "mgm_generation_pure_text", annotations=asked).build("train")) == 1


def test_all_that_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"(?s)no annotation file .*mgm_instruction\.json.*MGM-Instruction"):
        builder(tmp_path, "mgm_instruction").build("train")


# --- pictures under other names -------------------------------------------------------------------------------------


def test_pictures_of_visual_genome_and_ocr_vqa_are_found_and_counted(tmp_path: Path) -> None:
    for file in ("vg/images/1.jpg", "vg/images/2.jpg", "vg/VG_100K/3.jpg", "vg/images/3.jpg", "ocr_vqa/images/4.png"):
        picture(tmp_path / file)
    names = ["vg/VG_100K/1.jpg", "vg/VG_100K_2/2.jpg", "vg/VG_100K/3.jpg", "ocr_vqa/images/4.jpg", "vg/VG_100K/5.jpg"]
    records = [record(name, name) for name in names]
    file = put(tmp_path / "a.json", records)
    mine = builder(tmp_path, "mgm_instruction", annotations=str(file), images=str(tmp_path), layout=None)
    found = [str(sample.images[0].relative_to(tmp_path)) for sample in mine.build("train")]
    assert found == ["vg/images/1.jpg", "vg/images/2.jpg", "vg/VG_100K/3.jpg", "ocr_vqa/images/4.png", names[4]]
    report = check_dataset(mine, "train")
    assert report.findings["other name"].count == 2 and report.findings["other ending"].count == 1
    assert report.findings["other name"].examples[0][1].endswith("vg/VG_100K/1.jpg lies there as vg/images/1.jpg")
    assert report.bad == report.findings["missing picture"].count == 1 and not report.ok
    put(file, records[:4])
    assert check_dataset(mine, "train").ok


def test_any_record_dataset_may_rename_but_not_leave_its_folder(tmp_path: Path) -> None:
    picture(tmp_path / "secret.png")
    picture(tmp_path / "in/new/1.png")
    settings = {"images": str(tmp_path / "in"), "renames": {"^old/": "../", "^old/(?=1)": "new/"}}
    data = build(tmp_path, [record("1", "old/1.jpg"), record("2", "old/secret.png")], **settings)
    assert data[0].images == [tmp_path / "in/new/1.png"]
    assert data[1].images == [tmp_path / "in/old/secret.png"]


@pytest.mark.parametrize("renames", [{"(": "x"}, {"a": r"\9"}, {"a": r"\g<x>"}])
def test_a_rename_that_is_none_is_refused(tmp_path: Path, renames: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"x\.yaml:\d+: .*renames: .* is no replacement"):
        builder(tmp_path, "llava_json", annotations="a.json", renames=renames)


# --- leaving records out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_records_of_a_list_are_left_out(tmp_path: Path, ensure_ascii: bool) -> None:
    records = [record(name, answer=str(name)) for name in ("a", 7, "größe 猫", "b", "é")] + [record("", answer="none")]
    file = tmp_path / "a.json"
    file.write_text(json.dumps(records, ensure_ascii=ensure_ascii), encoding="utf-8")
    skip = tmp_path / "skip.jsonl"
    skip.write_text('{"id": "größe 猫", "reason": "x"}\n{"id": 7}\né\n\n', encoding="utf-8")
    data = builder(tmp_path, "llava_json", annotations=str(file), skip=str(skip)).build("train")
    assert [sample.id for sample in data] == ["a", "b", "5"]  # the place in the file, where there is no id
    assert [sample.id for sample in pickle.loads(pickle.dumps(data))] == ["a", "b", "5"]
    assert data[-1].messages[1].content == "none"
    skip.write_text("5\nb\n")
    data = builder(tmp_path, "llava_json", annotations=str(file), skip=str(skip)).build("train")
    assert [sample.id for sample in data] == ["a", "7", "größe 猫", "é"]


@pytest.mark.parametrize("text", [None, '{"name": 1}', "{broken"])
def test_a_list_that_is_none_is_refused(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "skip").write_text(text)
    with pytest.raises(DatasetError, match=r"`skip`: .*skip is no list of ids"):
        build(tmp_path, [record("1")], skip=str(tmp_path / "skip"))


def test_a_survey_counts_every_picture_by_folder(tmp_path: Path) -> None:
    for file in ("coco/train2017/1.jpg", "vg/images/2.jpg", "3.jpg"):
        picture(tmp_path / file)
    records = [record("one", "coco/train2017/1.jpg"), record("renamed", "vg/VG_100K/2.jpg"), record("top", "3.jpg")]
    records += [record(f"gone{n}", f"coco/train2017/x{n}.jpg") for n in range(5)]
    records += [record("two", ["coco/train2017/1.jpg", "vg/VG_100K/9.jpg"]), record("out", "../x.jpg"), record("text")]
    renames = {"VG_100K(_2)?": "images"}
    data = build(tmp_path, records, renames=renames, layout={"coco/train2017": None})
    found = survey(data)
    counts = {folder: (c.found, c.renamed, c.missing) for folder, c in found.folders.items()}
    assert counts == {"coco/train2017": (2, 0, 5), "vg": (1, 1, 1), ".": (1, 0, 0)}
    assert found.folders["coco/train2017"].examples[0] == "coco/train2017/x0.jpg (sample 'gone0')"
    assert len(found.folders["coco/train2017"].examples) == 3
    assert [sample_id for sample_id, _ in found.unusable] == [*(f"gone{n}" for n in range(5)), "two", "out"]
    (file,) = write_unusable(tmp_path / "lists", {"a/b": found.unusable, "whole": []})
    assert file == tmp_path / "lists/a_b.jsonl"
    rest = build(tmp_path, records, renames=renames, skip=str(file))
    assert [sample.id for sample in rest] == ["one", "renamed", "top", "text"]


def test_check_data_finds_every_missing_picture_and_training_leaves_them_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "1.png")
    file = put(tmp_path / "a.json", [record(f"r{n}", "1.png" if n != 7 else "2.png") for n in range(12)])
    path = experiment(tmp_path, {"mine": {"name": "llava_json", "annotations": str(file)}})
    assert main(["check-data", path, "--limit", "2"]) == 0  # neither of these two lacks its picture
    capsys.readouterr()
    assert main(["check-data", path, "--limit", "2", "--write-missing", str(tmp_path / "lists")]) == 1
    text = said(capsys)
    assert "1 of 12 records lack a picture" in text and "missing: 2.png (sample 'r7')" in text
    option = f"datasets.mine.skip={tmp_path}/lists/mine.jsonl"
    assert main(["check-data", path, "--deep", "--options", option]) == 0
    assert "0 of 11 records lack a picture" in said(capsys)


# --- parts merged twice ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("datasets", "noted"),
    [
        ({"mgm_instruction": {}, "mgm_generation_pure_text": {}}, True),
        ({"minigemini_instruction": {}, "mini_gemini_generation_pure_text": {}}, True),
        ({"a": {"name": "mgm_instruction"}, "b": "minigemini_generation_pure_text"}, True),
        (
            {
                "a": {"annotations": "x/minigemini_instruction.json"},
                "b": {"annotations": {"train": "mgm_generation_pure_text.json"}},
            },
            True,
        ),
        (
            {
                "a": {"annotations": "a.json", "part_of": ["mine"]},
                "b": {"annotations": "mine.json"},
            },
            True,
        ),
        ({"mgm_generation_pure_text": {}, "llava_v1_5_mix665k": {}}, False),
        ({"mgm_generation_pure_text": {}, "easy_vqa": {}}, False),
        ({"mgm_instruction": {}, "mgm_pretrain": {}}, False),
    ],
)
def test_a_part_beside_its_whole_is_noted_when_the_file_is_read(
    tmp_path: Path, datasets: dict[str, Any], noted: bool
) -> None:
    for node in datasets.values():
        if isinstance(node, dict) and "annotations" in node:
            node["name"] = "llava_json"
    notes = load_config(experiment(tmp_path, datasets)).notes
    assert any("learned twice" in note and "is a part of datasets." in note for note in notes) == noted
    assert len(notes) == noted


Pair = Callable[..., list[str]]


@pytest.fixture
def compare(tmp_path: Path) -> Pair:
    """What is said of two files of records."""

    def run(small: list[dict[str, Any]], large: list[dict[str, Any]]) -> list[str]:
        built = []
        for key, records in (("large", large), ("small", small)):
            file = put(tmp_path / f"{key}.json", records)
            built.append((key, builder(tmp_path, key, name="llava_json", annotations=str(file)).build("train")))
        return list(overlaps(built))

    return run


def test_records_that_come_twice_are_found_by_their_ids_and_texts(compare: Pair) -> None:
    large = [record(f"r{n}", answer=f"answer {n}") for n in range(200)]
    (text,) = compare(large[50:60], large)
    assert "10 of the 10 records of datasets.small are in datasets.large as well" in text
    assert len(compare([*large[:19], record("new")], large)) == 1
    assert compare([*large[:17], *(record(f"new{n}") for n in range(3))], large) == []


def test_running_numbers_as_ids_and_no_ids_are_no_overlap(compare: Pair) -> None:
    assert compare([record(n, answer="red") for n in range(20)], [record(n, answer="blue") for n in range(99)]) == []
    assert compare([record("", answer="red")] * 5, [record("", answer="red")] * 9) == []


def test_the_same_records_may_be_asked_in_two_directions(tmp_path: Path) -> None:
    whole = [{"id": f"r{n}", "image": "1.png", "phrase": f"thing {n}", "boxes": [[0, 0, n, n]]} for n in range(9)]
    file = put(tmp_path / "a.json", [each | {"width": 16, "height": 16} for each in whole])
    built = [(key, builder(tmp_path, key, annotations=str(file)).build("train")) for key in ("refcoco", "invrefcoco")]
    assert list(overlaps(built)) == []
    assert len(list(overlaps([*built, ("again", built[0][1])]))) == 1


def test_first_samples_and_other_data_are_understood(tmp_path: Path) -> None:
    data = build(tmp_path, [record(f"r{n}") for n in range(9)])
    assert len(list(overlaps([("a", Head(data, 5)), ("b", data)]))) == 1
    assert list(overlaps([("a", data), ("b", [1, 2, 3])])) == []


def test_dry_run_and_check_data_tell_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [record(f"r{n}") for n in range(10)]
    nodes = {}
    for key, part in (("some", records[:4]), ("all", records)):
        nodes[key] = {"name": "llava_json", "annotations": str(put(tmp_path / f"{key}.json", part))}
    path = experiment(tmp_path, nodes)
    for command in (["check-data", path], ["train", path, "--dry-run", "--options", "run.batch_size_train=1"]):
        main(command)
        assert "4 of the 4 records of datasets.some are in datasets.all as well" in said(capsys)


# --- what a template makes of a record ------------------------------------------------------------------------------


def template(name: str) -> Template:
    from minivlm import registry
    from minivlm.processors.configs import TemplateConfig

    return Template(TemplateConfig(**yaml.safe_load(registry.get("template", name).read_text())))


@pytest.mark.parametrize("name", ["plain", "vicuna_v1", "gemma", "llama_3", "chatml_direct", "mistral_instruct"])
@pytest.mark.parametrize("text", ["what?\n<image>", "<image>\nwhat?", "<image> and <image>?"])
def test_markers_of_a_message_become_one_in_front(name: str, text: str) -> None:
    segments = template(name).render([Message("user", text), Message("assistant", "yes")])
    assert count_slots(segments) == 1
    shown = "".join(getattr(segment, "text", "@") for segment in segments)
    assert "@\nwhat?" in shown or "@\nand" in shown or "@\n and" in shown or (name == "plain" and shown == "@yes\n")


def markers_report(tmp_path: Path, name: str, *records: dict[str, Any]) -> tuple[dict[str, int], bool, int]:
    from minivlm.api import assemble_shapes

    picture(tmp_path / "1.png")
    path = experiment(
        tmp_path,
        {"mine": {"name": "llava_json", "annotations": str(put(tmp_path / "a.json", list(records)))}},
        template=name,
    )
    stage = load_config(path).stages[0]
    _, processor, _ = assemble_shapes(stage.model)
    report = check_dataset(build_datasets(stage.datasets)["mine"], "train", processor)
    return {kind: finding.count for kind, finding in report.findings.items()}, report.ok, report.bad


def test_markers_that_are_joined_are_told(tmp_path: Path) -> None:
    twice = record("twice", "1.png", "is <image> red?")
    found = markers_report(tmp_path, "vicuna_v1", record("good", "1.png"), twice, record("text"))
    assert found == ({"joined markers": 1}, True, 0)
    assert markers_report(tmp_path, "plain", record("good", "1.png"), twice)[0] == {"joined markers": 1}


def test_several_pictures_in_several_messages(tmp_path: Path) -> None:
    turns = [*record("", "1.png")["conversations"], *record("", "1.png", "and this?")["conversations"]]
    both = {"id": "2", "image": ["1.png"] * 2, "conversations": turns}
    assert markers_report(tmp_path, "gemma", both) == ({}, True, 0)


def test_questions_that_plain_throws_away_are_told(tmp_path: Path) -> None:
    """It is meant for one picture and its caption: text alone, and further turns, lose what is asked."""
    more = record("more", "1.png")
    more["conversations"] += record("", None, "why?")["conversations"]
    found, fine, bad = markers_report(tmp_path, "plain", record("good", "1.png"), record("text"), more)
    assert found == {"lost question": 2} and not fine and bad == 0


# --- the folder tree ------------------------------------------------------------------------------------------------

SEVEN = "mini_gemini_7b_stage1"


def plant(root: Path, folder: str = "MGM", word: str = "mgm") -> None:
    """The tree that the first stage of 7B needs."""
    models = root / "model_zoo"
    for place, *files in (
        ("OpenAI/clip-vit-large-patch14-336", "config.json", "pytorch_model.bin"),
        (
            "OpenAI/openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup",
            "open_clip_config.json",
            "open_clip_pytorch_model.bin",
        ),
        ("LLM/vicuna/7B-V1.5", "config.json", "pytorch_model-00001-of-00002.bin", "tokenizer.model"),
    ):
        (models / place).mkdir(parents=True)
        for file in files:
            (models / place / file).touch()
    data = root / "data" / f"{folder}-Pretrain"
    put(data / f"{word}_pretrain.json", [record("1", "images/1.png"), record("2", "ALLaVA-4V/1.png")])
    for place in ("images", "ALLaVA-4V"):
        picture(data / place / "1.png")


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(("folder", "word"), SPELLINGS)
def test_a_whole_tree_under_any_spelling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: str, word: str
) -> None:
    plant(tmp_path, folder, word)
    for name in respelled(SEVEN):
        assert main(["check-root", str(tmp_path), "--for", f"train_configs/{name}.yaml", "--system", "mgm"]) == 0
    text = said(capsys)
    assert "all is there that is needed" in text and "13B" not in text
    assert ("renamed" in text and f"as data/{folder}-Pretrain/images" in text) == (folder != "MGM")
    assert "1 file(s), .png" in text


@pytest.mark.usefixtures("wide")
def test_what_lacks_is_named_with_its_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(tmp_path)
    (tmp_path / "data/MGM-Pretrain/images/1.png").unlink()
    (tmp_path / "data/MGM-Pretrain/mgm_pretrain.json").unlink()
    (tmp_path / "model_zoo/LLM/vicuna/7B-V1.5/tokenizer.model").unlink()
    (tmp_path / "data/MGM-Finetune/coco/train2017").mkdir(parents=True)
    assert main(["check-root", str(tmp_path), "--for", SEVEN]) == 1
    text = said(capsys)
    assert f"empty: {tmp_path}/data/MGM-Pretrain/images from https://huggingface.co/datasets/liuhaotian" in text
    assert f"missing: {tmp_path}/data/MGM-Pretrain/mgm_pretrain.json from https://huggingface.co/datasets/Yan" in text
    assert f"incomplete: {tmp_path}/model_zoo/LLM/vicuna/7B-V1.5 (it lacks tokenizer*) from https://" in text
    assert "3 of 6 needed places lack something" in text and "coco" not in text
    assert main(["check-root", str(tmp_path)]) == 1
    text = said(capsys)
    assert "missing, not needed for training:" in text and "MGM-Eval/MMMU" in text
    assert "data/MGM-Finetune/coco found 0 file(s) mini_gemini_*_stage2" in text


def test_the_data_page_shows_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(tmp_path)
    (tmp_path / "data/MGM-Pretrain/ALLaVA-4V/1.png").unlink()
    (tmp_path / "work_dirs/MGM/MGM-7B-Pretrain").mkdir(parents=True)
    (tmp_path / "work_dirs/MGM/MGM-7B-Pretrain/mm_projector.bin").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "118")
    page = (ROOT / "docs/data.md").read_text()
    command = page[page.index("minivlm check-root --for") :].splitlines()[0].split()
    assert main(command[1:]) == 1
    shown = page[page.index("Mini-Gemini (MGM) in .") :].split("```")[0]
    assert [line.rstrip() for line in capsys.readouterr().out.strip().splitlines()] == shown.strip().splitlines()


@pytest.mark.usefixtures("wide")
def test_every_row_is_asked_for_and_knows_its_source() -> None:
    table = roots.read_table("mini_gemini")
    assert all(row.source for row in table.rows.values())
    assert {name.split("/")[0] for name in table.rows} == {"model_zoo", "data"}
    assert len([name for name in table.rows if name.startswith("model_zoo/LLM")]) == 7
    for stage, folder in (("stage1", "Pretrain"), ("stage2", "Finetune"), ("hd_stage2", "Finetune")):
        needed = roots.needed_rows(table, [f"mini_gemini_34b_{stage}.yaml"])
        assert f"data/MGM-{folder}/ALLaVA-4V" in needed and "model_zoo/LLM/Nous-Hermes-2-Yi-34B" in needed
        assert sum(name.startswith("model_zoo") for name in needed) == 3
        assert not any("Eval" in name or "textvqa" in name.split("/") for name in needed)


def test_the_presets_know_the_variables_of_the_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who sets what the command prints trains from the tree; then it is not printed again."""
    presets = "".join(file.read_text() for file in (CONFIGS / "models").glob("mini_gemini_*.yaml"))
    named = {row.variable for row in roots.read_table("mini_gemini").rows.values() if row.variable}
    assert named == set(re.findall(r"\$\{oc\.env:(\w+),", presets))
    plant(tmp_path)
    for variable in named:
        monkeypatch.delenv(variable, raising=False)
    assert main(["check-root", str(tmp_path), "--for", SEVEN]) == 0
    printed = dict(re.findall(r"export (\w+)=(\S+)", capsys.readouterr().out))
    assert printed["MINIVLM_VICUNA_V15"] == str(tmp_path / "model_zoo/LLM/vicuna/7B-V1.5") and len(printed) == 3
    for variable, place in printed.items():
        monkeypatch.setenv(variable, place)
    assert main(["check-root", str(tmp_path), "--for", SEVEN]) == 0
    assert "export" not in capsys.readouterr().out


def test_results_are_recognised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = tmp_path / "work_dirs"
    for file in (
        "MGM/MGM-7B-Pretrain/mm_projector.bin",
        "MGM/MGM-7B/model-00001-of-00003.safetensors",
        "MGM/MGM-13B/checkpoint-1000/model.safetensors",
        "ours/done.json",
        "ours/model/model.safetensors",
        "Mini-Gemini-2B-lora/adapter_config.json",
        "notes/a.txt",
    ):
        (work / file).parent.mkdir(parents=True, exist_ok=True)
        (work / file).touch()
    main(["check-root", str(tmp_path)])
    text = said(capsys)
    for folder, what in (
        ("MGM/MGM-7B-Pretrain", "the first stage"),
        ("MGM/MGM-7B", "a whole model"),
        ("MGM/MGM-13B", "not finished; it has 1 checkpoint(s)"),
        ("ours", "a stage of minivlm"),
        ("Mini-Gemini-2B-lora", "adapters (LoRA)"),
    ):
        assert f"result: work_dirs/{folder}: {what}" in text
    assert text.count("result: ") == 5


@pytest.mark.usefixtures("wide")
def test_deep_looks_for_the_pictures_of_all_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(tmp_path)
    assert main(["check-root", str(tmp_path), "--for", SEVEN, "--deep"]) == 0
    assert "0 of 2 records lack a picture" in said(capsys)
    (tmp_path / "data/MGM-Pretrain/images/1.png").rename(tmp_path / "data/MGM-Pretrain/images/2.png")
    assert main(["check-root", str(tmp_path), "--for", SEVEN]) == 0
    lists = tmp_path / "lists"
    assert main(["check-root", str(tmp_path), "--for", SEVEN, "--write-missing", str(lists)]) == 1
    text = said(capsys)
    assert "missing: images/1.png (sample '1')" in text and f"written: {lists}/mgm_pretrain.jsonl" in text
    assert json.loads((lists / "mgm_pretrain.jsonl").read_text())["id"] == "1"
    (tmp_path / "data/MGM-Pretrain/mgm_pretrain.json").write_text("[{]")
    assert main(["check-root", str(tmp_path), "--for", SEVEN, "--deep"]) == 1
    assert "broken JSON" in said(capsys)


def test_large_folders_and_circles_of_links_are_not_walked_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/back").symlink_to(tmp_path / "a")
    for number in range(30):
        (tmp_path / "a" / f"{number}.jpg").touch()
    monkeypatch.setattr(roots, "MANY", 20)
    assert roots.look(tmp_path, "a", roots.Row()).note == "20+ file(s), .jpg"
    (tmp_path / "far").symlink_to(tmp_path / "a/b")
    assert roots.look(tmp_path, "far", roots.Row()).state == "found"


def test_a_spelling_is_not_looked_for_outside_the_root(tmp_path: Path) -> None:
    (tmp_path / "MGM").mkdir()
    (tmp_path / "MiniGemini/data").mkdir(parents=True)
    assert roots.look(tmp_path / "MGM", "data", roots.Row()).state == "missing"


def test_a_system_of_ones_own_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/1.png").touch()
    rows = {"pictures": {"source": "our server", "used_by": ["mine_*"]}, "model": {"used_by": ["mine_*"]}}
    file = write_yaml(tmp_path / "mine.yaml", {"title": "Mine", "rows": rows})
    assert main(["check-root", str(tmp_path), "--system", str(file)]) == 1
    assert "1 of 2 needed places lack something" in said(capsys)
    (tmp_path / "model").touch()
    assert main(["check-root", str(tmp_path), "--system", str(file)]) == 0
    write_yaml(file, {"title": "Mine", "rows": {"a": {"sorce": "x"}}})
    assert main(["check-root", str(tmp_path), "--system", str(file)]) == 2
    assert "did you mean 'source'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "there is no folder nowhere"),
        ([".", "--system", "mini_gemni"], "no system 'mini_gemni' (did you mean 'mini_gemini'?)"),
        (["--for", "mini_gemini_7b_stage1", "."], "(a folder to look in stands in front of --for); known are"),
        ([".", "--for", "llava_v1_5_7b_stage1.yaml"], "no training file 'llava_v1_5_7b_stage1'; known are mini_"),
    ],
)
def test_wrong_questions_are_answered(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-root", *arguments]) == 2
    assert words in capsys.readouterr().err
