"""``minivlm compare``: models side by side over a folder of pictures; scores, a page, a run that goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model, write_yaml
from PIL import Image

from minivlm import cli
from minivlm.api import assemble
from minivlm.checkpoints.native import Manifest, save_model
from minivlm.config import load_config
from minivlm.evaluation.comparison import MOST_ROWS, Asked, Comparison, _hang, draw_comparison, pattern, render_html
from minivlm.serve import compare
from minivlm.serve.chat import Chat
from minivlm.serve.flags import ServeError

QUESTION = "what is it?"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models and three pictures; one of them is broken."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        Image.new("RGB", (40, 30), colour).save(tmp_path / "pictures" / f"{name}.png")
    (tmp_path / "pictures" / "broken.png").write_text("no picture")
    model = tiny_model()
    model["language_model"]["config"]["initializer_range"] = 0.3
    for seed, name in enumerate(("a", "b")):
        config = {"model": model, "run": {"seed": seed}, "demo": {"max_new_tokens": 6, "temperature": 1.0}}
        write_yaml(tmp_path / f"{name}.yaml", config)
    monkeypatch.setattr("minivlm.serve.compare.load_model", seeded)
    return tmp_path


def seeded(stage: Any, arguments: Any) -> Any:
    """A model from scratch whose weights depend on ``run.seed``, as those of a checkpoint on its folder."""
    torch.manual_seed(stage.run.seed)
    model, processor, _ = assemble(stage.model)
    return model.eval(), processor


def run(*arguments: str) -> int:
    fixed = ["--images", "pictures", "--question", QUESTION, "--output", "out", "--device", "cpu"]
    return cli.main(["compare", *arguments, *fixed])


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out/answers.jsonl").read_text().splitlines()]


def test_answers_are_those_of_a_conversation(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("a.yaml", "b.yaml") == 1  # a picture is broken
    said = capsys.readouterr()
    assert [(line["model"], line["image"]) for line in lines()] == [
        (model, f"{name}.png") for model in ("a.yaml", "b.yaml") for name in ("blue", "broken", "red")
    ]
    for name in ("a", "b"):
        stage = load_config(f"{name}.yaml").stages[-1]
        model, processor = seeded(stage, None)
        for line in (line for line in lines() if line["model"] == f"{name}.yaml" and "answer" in line):
            chat = Chat(model, processor, max_new_tokens=6)  # greedy, whatever section demo says
            assert line["answer"] == chat.ask(QUESTION, [f"pictures/{line['image']}"])
            assert line["tokens"] == chat.num_tokens <= 6 and line["seconds"] > 0
            assert f"[Image]: {line['image']}\n[Q]: {QUESTION}\n[A]: {line['answer']}\n({line['tokens']} t" in said.out
    assert len({line.get("answer") for line in lines()}) > 3
    assert "2 of 6 answers are missing:\n  broken.png: cannot read" in said.err
    assert said.err.count("cannot read") == 1
    assert {path.name for path in Path("out").iterdir()} == {
        "answers.jsonl",
        "report.html",
        "report.png",
        "results.json",
    }


def test_a_second_run_goes_on(work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[int] = []

    def load(stage: Any, arguments: Any) -> Any:
        loaded.append(stage.run.seed)
        if stage.run.seed == 1 and len(loaded) == 2:
            raise KeyboardInterrupt
        return seeded(stage, arguments)

    monkeypatch.setattr("minivlm.serve.compare.load_model", load)
    assert run("a.yaml", "b.yaml") == 130
    assert "2 answers are left" in capsys.readouterr().err
    kept = [line for line in lines() if "answer" in line]
    assert {line["model"] for line in kept} == {"a.yaml"}

    Path("pictures/broken.png").unlink()
    assert run("a.yaml", "b.yaml") == 0
    assert loaded == [0, 1, 1] and [line for line in lines() if line["model"] == "a.yaml"] == kept
    assert "2 of 4 answers are kept" in capsys.readouterr().err
    assert run("b.yaml", "a.yaml") == 0 and loaded == [0, 1, 1]  # another order of the columns
    assert run("a.yaml", "b.yaml", "--max-new-tokens", "3") == 2  # other answers would be mixed with these
    assert "holds what is no answer" in capsys.readouterr().err


def test_a_model_that_was_trained_anew_is_asked_again(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("pictures/broken.png").unlink()
    stage = load_config("a.yaml").stages[-1]
    for name, seed in (("first", 0), ("second", 1)):
        torch.manual_seed(seed)
        model, processor, config = assemble(stage.model)
        save_model(Path(name), model, config, processor, Manifest())
    monkeypatch.undo()  # the models are read from their folders
    monkeypatch.chdir(work)
    assert run("first", "second", "--max-new-tokens", "4") == 0
    before = {(line["model"], line["image"]): line for line in lines()}
    shutil.rmtree("first")
    shutil.copytree("second", "first", copy_function=shutil.copyfile)  # with new times
    capsys.readouterr()
    assert run("first", "second", "--max-new-tokens", "4") == 0
    said = capsys.readouterr().err
    assert "2 answers of an earlier run are asked for again" in said and "2 of 4 answers are kept" in said
    after = {(line["model"], line["image"]): line for line in lines()}
    assert len(lines()) == len(after) == 4
    for (model, image), line in after.items():
        assert line["answer"] == before["second", image]["answer"]
        assert (line == before[model, image]) == (model == "second")


def test_keywords_are_scored_without_asking_again(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("a.yaml", "b.yaml")
    answers = {(line["model"], line["image"]): line.get("answer") for line in lines()}
    keywords = {"red": answers["a.yaml", "red.png"], "blue.png": ["no such word"], "broken": "x"}
    Path("words.json").write_text(json.dumps(keywords))
    capsys.readouterr()
    assert run("a.yaml", "b.yaml", "--keywords", "words.json") == 1
    assert "a.yaml: 1 of 2 right (50.0 %), 2 answers" in capsys.readouterr().out
    scores = json.loads(Path("out/results.json").read_text())["models"]
    assert [(score["hits"], score["scored"], score["failed"]) for score in scores] == [(1, 2, 1), (0, 2, 1)]
    page = Path("out/report.html").read_text()
    assert page.count('<td class="right">') == 1 and page.count('<td class="wrong">') == 3 and page.count("<mark>") == 1
    assert page.count('src="data:image/jpeg') == 2 and "http" not in page
    assert "Right: of the pictures with" in page
    with Image.open("out/report.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.parametrize(
    ("words", "answer", "right"),
    [
        (["cat"], "A Cat.", True),
        (["cat"], "the location", False),
        (["dog", "grey cat"], "one grey cat", True),
        (["狗"], "一只狗在", True),
        (["狗"], "一只猫", False),
        (["bear"], "一只bear在", True),
        (["c++"], "it is C++!", True),
        (["a.b"], "axb", False),
    ],
)
def test_words(words: list[str], answer: str, right: bool) -> None:
    asked = [Asked("x.png", Path("x.png"), "?", words)]
    found = Comparison("?", asked, ["m"], [[{"answer": answer, "tokens": 1, "seconds": 1}]])
    assert found.verdict(0, 0) is right and pattern(words)


def test_the_page_escapes_and_the_picture_stays_small(tmp_path: Path) -> None:
    asked = [Asked(f"<b>{n}", tmp_path / f"{n}.png", "<u>?", [] if n else ["x_1"]) for n in range(3 * MOST_ROWS)]
    line = {"answer": "<i>$x_1$</i> \x0b" + "long " * 200, "tokens": 1, "seconds": 0.5}
    found = Comparison("<u>?", asked, ["<s>m"], [[line] * len(asked)])
    page = render_html(found, "<title>")
    assert (
        not any(tag in page for tag in ("<b>", "<i>", "<u>", "<s>", "<title><"))
        and "&lt;i&gt;$<mark>x_1</mark>$" in page
    )
    assert found.scores()[0]["tokens_per_second"] == 2
    assert draw_comparison(found, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.height < 230 * (MOST_ROWS + 1)


def test_nothing_is_cut_off(tmp_path: Path) -> None:
    """Neither the last caption of the picture nor, on a narrow screen, a table of the page."""
    Image.new("RGB", (9, 9)).save(tmp_path / "black.png")
    asked = [Asked("x", tmp_path / "black.png", "is there not a green shape in the image?", ["yes"])]
    found = Comparison("data", asked, ["m"], [[{"answer": "yes", "tokens": 1, "seconds": 1}]])
    assert draw_comparison(found, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        edge = picture.convert("L").crop((0, picture.height - 4, *picture.size))
    assert edge.getextrema() == (255, 255)
    page = render_html(found, "x")
    assert page.count("<table") == page.count('<div class="wide"><table') == 2


def test_the_report_is_no_picture_to_ask_about(work: Path) -> None:
    Path("pictures/broken.png").unlink()
    inside = ["--images", "pictures", "--output", "pictures/out", "--question", QUESTION, "--device", "cpu"]
    for _ in range(2):
        assert cli.main(["compare", "a.yaml", *inside]) == 0
        assert len(Path("pictures/out/answers.jsonl").read_text().splitlines()) == 2
    assert Path("pictures/out/report.png").is_file()


def test_no_line_of_the_picture_begins_with_chinese_punctuation() -> None:
    assert _hang("红色的花\n，黄色的花\n。") == "红色的花，\n黄色的花。\n"
    assert _hang("a dog,\n, and a cat") == "a dog,\n, and a cat"


def test_columns_are_named_by_what_differs(tmp_path: Path) -> None:
    assert compare.labels(["runs/one/sft", "runs/two/sft"]) == ["one/sft", "two/sft"]
    assert compare.labels(["runs/one/sft", "runs/one/pretrain"]) == ["sft", "pretrain"]
    assert compare.labels(["runs/sft/"]) == ["sft"]
    with pytest.raises(ServeError, match="named twice"):
        compare.labels(["runs/sft", "runs/./sft/"])


def test_questions_of_a_dataset(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first question of a sample, answers of its own; evenly spaced, and told as they are."""
    turns = [{"from": "human", "value": "<image>\nwhat colour?"}, {"from": "gpt", "value": "red"}]
    more = [{"from": "human", "value": "and what not?"}, {"from": "gpt", "value": "blue"}]
    records = [{"id": str(n), "image": "red.png", "conversations": turns + more} for n in range(6)]
    Path("test.json").write_text(json.dumps(records))
    data = {"mine": {"name": "llava_json", "annotations": {"test": "test.json"}, "images": "pictures"}}
    write_yaml(work / "data.yaml", {"model": tiny_model(), "datasets": data})
    fixed = ["compare", "a.yaml", "b.yaml", "--device", "cpu", "--data", "data.yaml"]
    assert cli.main([*fixed, "--max-samples", "3", "--output", "out"]) == 0
    assert [line["image"] for line in lines()] == ["0", "2", "4"] * 2
    model, processor = seeded(load_config("a.yaml").stages[-1], None)
    assert lines()[0]["answer"] == Chat(model, processor, max_new_tokens=6).ask("what colour?", ["pictures/red.png"])
    page = Path("out/report.html").read_text()
    assert page.count("what colour? (red)<") == 3 and page.count('src="data:image/jpeg') == 3
    assert "Right: of the questions with" in page
    assert [s["scored"] for s in json.loads(Path("out/results.json").read_text())["models"]] == [3, 3]
    records[0]["conversations"][1]["value"] = lines()[0]["answer"]
    Path("test.json").write_text(json.dumps(records))
    capsys.readouterr()
    assert cli.main([*fixed, "--max-samples", "1", "--output", "again"]) == 0
    assert "a.yaml: 1 of 1 right (100.0 %)" in capsys.readouterr().out

    for wrong, said in {
        ("--question", "x"): "--question says nothing with --data",
        ("--keywords", "x"): "--keywords says nothing with --data",
        ("--split", "train"): "no dataset has a split 'train'",
    }.items():
        assert cli.main([*fixed, *wrong, "--output", "none"]) == 2
        assert said in capsys.readouterr().err
    records[0] |= {"image": ["red.png", "blue.png"]}
    records[0]["conversations"][0]["value"] = "<image><image>\nwhat?"
    Path("test.json").write_text(json.dumps(records))
    assert cli.main([*fixed, "--output", "none"]) == 2
    assert "sample '0' is no question about one picture" in capsys.readouterr().err
    assert run("a.yaml", "--split", "test") == 2
    assert "--split says nothing with --images" in capsys.readouterr().err
    assert not Path("none").exists()


def test_wrong_arguments(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {
        "{": "cannot be read",
        "[]": "must hold",
        '{"rid": "x"}': "'rid', which is no picture here",
        '{"red": []}': "needs",
    }
    for content, said in bad.items():
        Path("words.json").write_text(content)
        assert run("a.yaml", "--keywords", "words.json") == 2
        assert said in capsys.readouterr().err
    assert cli.main(["compare", "a.yaml", "--images", "absent", "--output", "out"]) == 2
    assert run("absent") == 2
    assert not Path("out").exists()
