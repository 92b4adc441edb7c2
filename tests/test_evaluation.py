"""Scores, baselines and the tasks, with a model whose answers are known."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from minivlm import registry
from minivlm.config.experiment import RunConfig
from minivlm.datasets.base import DatasetError
from minivlm.evaluation.report import choose_for_grid, draw_grid, table_rows
from minivlm.evaluation.vqa import (
    Prediction,
    evenly_spaced,
    majority_baseline,
    question_of,
    score,
    shuffle_pictures,
)
from minivlm.tasks.base import Task
from minivlm.tasks.vqa import VQATask
from minivlm.types import IGNORE_INDEX, Batch, Encoded, Message, Sample, SampleError

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
WORDS = ["<pad>", "red", "green", "blue", "yes", "no"]
CODES = {"what color is it?": 10, "is it red?": 11, "what color is it, my friend?": 12}


def vqa_sample(name: str, question: str, answer: str, image: Any, kind: str = "colour") -> Sample:
    turns = [Message("user", f"<image>\n{question}"), Message("assistant", answer)]
    meta = {"question": question, "answers": [answer], "question_type": kind}
    return Sample(name, turns, [image], meta)


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Twelve pictures, two or three questions each, lengths and colours mixed."""
    made = []
    for number in range(12):
        colour = list(COLOURS)[number % 3]
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (8, 8), COLOURS[colour]).save(path)
        made.append(vqa_sample(f"s{number}/a", "what color is it?", colour, path))
        yes = "yes" if colour == "red" else "no"
        made.append(vqa_sample(f"s{number}/b", "is it red?", yes, path, "yes/no"))
        if number % 2:
            made.append(vqa_sample(f"s{number}/c", "what color is it, my friend?", colour, path))
    return made


class FakeProcessor:
    """A sample is the code of its question behind as many ones as it has letters."""

    def prompt_sample(self, sample: Sample) -> Encoded:
        question = sample.meta["question"]
        ids = [1] * len(question) + [CODES[question]]
        pixels = []
        for image in sample.images:
            try:
                with Image.open(image) as file:
                    pixels.append(torch.tensor(file.convert("RGB").getpixel((0, 0))).float().view(3, 1, 1))
            except OSError as error:
                raise SampleError(sample.id, f"picture {image}: {error}") from error
        return Encoded(ids, [IGNORE_INDEX] * len(ids), {"image": pixels}, sample_id=sample.id)

    def encode(self, sample: Sample) -> Encoded:
        encoded = self.prompt_sample(sample)
        answer = [WORDS.index(word) for word in sample.meta["answers"]]
        return replace(
            encoded,
            input_ids=encoded.input_ids + answer,
            labels=[IGNORE_INDEX] * len(encoded.input_ids) + answer,
        )

    def collate(self, encoded: Sequence[Encoded], for_generation: bool = False) -> Batch:
        length = max(len(item.input_ids) for item in encoded)
        ids = torch.zeros(len(encoded), length, dtype=torch.long)
        labels = torch.full_like(ids, IGNORE_INDEX)
        for row, item in enumerate(encoded):
            where = slice(length - len(item.input_ids), None) if for_generation else slice(len(item.input_ids))
            ids[row, where] = torch.tensor(item.input_ids)
            labels[row, where] = torch.tensor(item.labels)
        pixels = torch.stack([image for item in encoded for image in item.pixels["image"]])
        return Batch(ids, (ids != 0).long(), labels, {"image": pixels}, sample_ids=[e.sample_id for e in encoded])

    def decode(self, ids: torch.Tensor) -> list[str]:
        return [" ".join(WORDS[token] for token in row if token) for row in ids.tolist()]


class Seeing(torch.nn.Module):
    """Answers by the colour of the picture; ``blind`` always sees red."""

    def __init__(self, blind: bool = False):
        super().__init__()
        self.blind = blind
        self.shapes: list[tuple[int, int]] = []
        self.options: dict[str, Any] = {}

    def generate(self, batch: Batch, **options: Any) -> torch.Tensor:
        assert not self.training and torch.is_inference_mode_enabled()
        self.shapes.append(tuple(batch.input_ids.shape))  # type: ignore[arg-type]
        self.options = options
        colours = batch.pixels["image"].flatten(1).argmax(1)
        answers = []
        for code, colour in zip(batch.input_ids[:, -1].tolist(), colours.tolist(), strict=True):
            colour = 0 if self.blind else colour
            answers.append([1 + colour, 0] if code != 11 else [4 if colour == 0 else 5, 0])
        return torch.tensor(answers)

    def forward(self, batch: Batch) -> Any:
        """A loss of 1 for every answer of a colour, 4 for yes and no."""
        assert not self.training and batch.labels is not None
        found = batch.labels[batch.labels != IGNORE_INDEX]
        loss = torch.where(found >= 4, 4.0, 1.0)
        return type("Output", (), {"loss_sum": loss.sum(), "token_count": torch.tensor(len(loss))})


def evaluate(model: Any, samples: Sequence[Sample], run: RunConfig | None = None, **options: Any) -> VQATask:
    task = VQATask(run or RunConfig(batch_size_eval=5))
    task.evaluate(model, FakeProcessor(), samples, device="cpu", **options)
    return task


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Red", ["red"], 1.0),
        (" red. ", ["blue", "red"], 1.0),
        ("red", ["Red."], 1.0),
        ("red..", ["red"], 0.0),
        ("dark red", ["red"], 0.0),
        ("", ["red"], 0.0),
        ("red", [], 0.0),
    ],
)
def test_exact_match(prediction: str, answers: list[str], expected: float) -> None:
    assert registry.get("metric", "exact_match")(prediction, answers) == expected


def test_score_per_type() -> None:
    records = [Prediction(str(n), "q", kind, "", [], value) for n, (kind, value) in enumerate(
        [("colour", 1.0), ("colour", 0.0), ("yes/no", 1.0), ("yes/no", 1.0), ("yes/no", 0.0), ("yes/no", 1.0)]
    )]  # fmt: skip
    found = score(iter(records))
    assert (found.accuracy, found.balanced, found.count) == (4 / 6, 0.625, 6)
    assert found.flat("x/") == {
        "x/accuracy": 4 / 6, "x/accuracy_balanced": 0.625, "x/accuracy/colour": 0.5, "x/accuracy/yes/no": 0.75
    }  # fmt: skip
    assert score(records[:1]).flat() == {"accuracy": 1.0}
    with pytest.raises(ValueError, match="no prediction"):
        score([])


def test_question_of_falls_back_on_the_turns() -> None:
    turns = [("user", "<image>\nfirst?"), ("assistant", "1"), ("user", "second?"), ("assistant", "2")]
    sample = Sample("s", [Message(role, text) for role, text in turns])
    asked = question_of(sample)
    assert (asked.text, asked.type, asked.answers) == ("second?", "all", ["2"])
    with pytest.raises(SampleError, match=r"sample 's': .*no question"):
        question_of(Sample("s", [Message("assistant", "a caption")]))


def test_majority_takes_the_most_frequent_answer_of_the_question() -> None:
    def ask(question: str, *answers: str) -> list[Sample]:
        return [vqa_sample(f"{question}{n}", question, answer, None) for n, answer in enumerate(answers)]

    conversation = Sample("c", [Message("user", "<image>\na?"), Message("assistant", "x"),
                                Message("user", "b?"), Message("assistant", "n")])  # fmt: skip
    caption = [Sample(f"k{n}", [Message("user", "<image>"), Message("assistant", "a cat")]) for n in range(20)]
    train = [*ask("a?", "y", "x", "y"), conversation, *ask("b?", "m"), *ask("c?", "z", "z", "z"), *caption]
    found = majority_baseline(train, [*ask("a?", "x"), *ask("b?", "m"), *ask("A?", "x"), *ask("never?", "z")])
    # a?: y and x twice each and b?: n and m once each, the first counts; never?: z is most frequent of all
    assert [record.prediction for record in found] == ["y", "n", "y", "z"]
    assert [record.correct for record in found] == [0.0, 0.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="no answered question"):
        majority_baseline(caption, ask("a?", "x"))


def test_majority_on_easy_vqa_is_the_known_number() -> None:
    from minivlm.datasets.configs import EasyVQAConfig
    from minivlm.datasets.easy_vqa import EasyVQABuilder

    builder = EasyVQABuilder(EasyVQAConfig(val_images=0))
    found = score(majority_baseline(builder.build("train"), builder.build("test")))
    assert round(100 * found.accuracy, 1) == 67.0
    percent = {kind: round(100 * part.accuracy, 1) for kind, part in found.by_type.items()}
    assert percent == {"colour": 12.0, "shape": 34.8, "yes/no": 82.5}


def test_shuffled_samples_all_lose_their_own_picture(samples: list[Sample]) -> None:
    moved = shuffle_pictures(samples, seed=3)
    assert list(moved) == list(range(len(samples)))
    for number, sample in moved.items():
        assert sample.images != samples[number].images
        assert (sample.id, sample.messages) == (samples[number].id, samples[number].messages)
    pictures = [str(sample.images[0]) for sample in samples]
    assert sorted(str(sample.images[0]) for sample in moved.values()) == sorted(pictures)
    assert moved == shuffle_pictures(samples, seed=3) != shuffle_pictures(samples, seed=4)
    assert [str(sample.images[0]) for sample in samples] == pictures


def test_shuffling_leaves_out_what_cannot_move() -> None:
    def sample(name: str, *images: str) -> Sample:
        return Sample(name, [], list(images))

    assert shuffle_pictures([sample("a"), sample("b", "1"), sample("c", "1")]) == {}
    mixed = [sample("a", "1"), sample("b", "2"), sample("c", "1", "2"), sample("d", "3", "4"), sample("e")]
    found = {number: s.images for number, s in shuffle_pictures(mixed).items()}
    assert found == {0: ["2"], 1: ["1"], 2: ["3", "4"], 3: ["1", "2"]}
    most = [sample(str(n), "same") for n in range(8)] + [sample("x", "1"), sample("y", "2")]
    for number, other in shuffle_pictures(most).items():
        assert other.images != most[number].images


def test_evenly_spaced() -> None:
    assert evenly_spaced(10, 3) == [0, 3, 6]
    assert evenly_spaced(3, 10) == evenly_spaced(3, None) == [0, 1, 2]
    assert evenly_spaced(0, 5) == []


def test_seeing_model_is_right_and_shuffling_shows_that_it_looks(samples: list[Sample]) -> None:
    model = Seeing().train()
    task = evaluate(model, samples, full=True, train_samples=samples)
    found = task.results["metrics"]
    assert model.training  # the mode of before
    assert found["accuracy"] == found["accuracy/colour"] == found["accuracy/yes/no"] == 1.0
    assert found["majority/accuracy/yes/no"] == pytest.approx(8 / 12)  # "no" to two of three colours
    assert found["majority/accuracy/colour"] == pytest.approx(6 / 18)
    assert found["shuffled/accuracy/colour"] < 0.7
    assert task.results["model"]["count"] == 30 and task.results["shuffled"]["count"] == 30
    assert task.metric_name in found and task.higher_is_better


def test_blind_model_loses_nothing_by_shuffling(samples: list[Sample]) -> None:
    found = evaluate(Seeing(blind=True), samples, full=True).results["metrics"]
    assert found["shuffled/accuracy"] == found["accuracy"] < 0.5
    assert "majority/accuracy" not in found  # no training split given


def test_batches_hold_prompts_of_similar_length_and_options_arrive(samples: list[Sample]) -> None:
    model = Seeing()
    evaluate(model, samples, RunConfig(batch_size_eval=4, max_len=7, num_beams=2))
    assert [rows for rows, _ in model.shapes] == [4] * 7 + [2]
    lengths = [length for _, length in model.shapes]
    assert lengths == sorted(lengths, reverse=True)
    assert model.options == {"max_new_tokens": 7, "num_beams": 2}


def test_score_does_not_depend_on_batch_size_or_workers(samples: list[Sample], tmp_path: Path) -> None:
    for name, run in {
        "one": RunConfig(batch_size_eval=1),
        "many": RunConfig(batch_size_eval=64),
        "workers": RunConfig(batch_size_eval=7, num_workers=2),
    }.items():
        evaluate(Seeing(), samples, run, report_dir=tmp_path / name)
    texts = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("one", "many", "workers")]
    assert texts[0] == texts[1] == texts[2]
    assert [json.loads(line)["sample_id"] for line in texts[0].splitlines()] == [s.id for s in samples]


def test_evaluation_leaves_the_random_state_of_training_alone(samples: list[Sample]) -> None:
    before = torch.get_rng_state()
    evaluate(Seeing(), samples, full=True)
    assert torch.equal(before, torch.get_rng_state())


def test_max_samples_are_spread_over_the_split(samples: list[Sample]) -> None:
    task = evaluate(Seeing(), samples, max_samples=3)
    assert task.results["model"]["count"] == 3
    seen: list[tuple[int, int]] = []
    evaluate(Seeing(), samples, full=True, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (60, 60) and seen == sorted(seen)


def test_shuffled_baseline_is_capped(samples: list[Sample]) -> None:
    task = VQATask(RunConfig())
    task.shuffled_samples = 10
    task.evaluate(Seeing(), FakeProcessor(), samples, device="cpu", full=True)
    shuffled = task.results["shuffled"]
    assert shuffled["count"] == shuffled["model_on_same_samples"]["count"] == 10
    assert "tried on 10 samples" in str(task.render_table().caption)
    task.evaluate(Seeing(blind=True), FakeProcessor(), samples, device="cpu", full=True)
    shuffled = task.results["shuffled"]
    same = shuffled.pop("model_on_same_samples")
    assert shuffled == same and 0 < same["accuracy"] < 1  # each answer is scored against its own question


def test_bad_pictures_are_skipped_counted_or_refused(samples: list[Sample], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    bad = [*samples, vqa_sample("bad", "is it red?", "no", broken)]
    task = evaluate(Seeing(), bad, RunConfig(max_bad_share=0.05), full=True)
    assert task.results["model"]["count"] == 30
    assert task.results["skipped"]["count"] == 1 and "'bad'" in task.results["skipped"]["first"][0]
    with pytest.raises(DatasetError, match=r"1 of the 31 samples .*max_bad_share = 0\.01.*'bad'"):
        evaluate(Seeing(), bad)
    with pytest.raises(SampleError, match="'bad'"):
        evaluate(Seeing(), bad, RunConfig(on_bad_sample="raise", max_bad_share=1.0))
    model = Seeing().train()
    with pytest.raises(DatasetError, match="no sample that can be used"):
        evaluate(model, bad[-1:], RunConfig(max_bad_share=1.0))
    assert model.training


def test_samples_that_the_dataset_cannot_read_count_as_bad(samples: list[Sample]) -> None:
    class Flawed(list[Sample]):
        def __getitem__(self, index: Any) -> Any:
            if index == 4:
                raise SampleError("four", "is flawed")
            return super().__getitem__(index)

    task = evaluate(Seeing(), Flawed(samples), RunConfig(max_bad_share=0.1))
    assert task.results["model"]["count"] == 29
    assert task.results["skipped"] == {"count": 1, "first": ["sample 'four': is flawed"]}
    evaluate(Seeing(), samples, RunConfig(), full=True, train_samples=Flawed(samples))


def test_samples_of_one_id_are_kept_apart(samples: list[Sample], tmp_path: Path) -> None:
    same = [replace(sample, id="0") for sample in samples]
    task = evaluate(Seeing(), same, full=True, train_samples=same, report_dir=tmp_path / "r")
    assert task.results["shuffled"]["count"] == task.results["shuffled"]["model_on_same_samples"]["count"] == 30
    lines = [json.loads(line) for line in (tmp_path / "r" / "predictions.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in lines] == [sample.meta["answers"][0] for sample in samples]
    assert {line["shuffled_prediction"] for line in lines} >= {"red", "green", "blue"}


class Links(HTMLParser):
    """Collects whatever a page would fetch, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.fetched: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe")
        self.fetched += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report(samples: list[Sample], tmp_path: Path) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "loss_curve.png")
    run = RunConfig(job_name="<b>mine</b> & yours", max_bad_share=0.1)
    bad = vqa_sample("<i>bad</i>", "is it red?", "no", tmp_path / "none.png")
    folder = tmp_path / "report"
    task = evaluate(Seeing(), [*samples, bad], run, full=True, train_samples=samples, report_dir=folder)
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(task.results))
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 30
    assert lines[0] | {"majority_prediction": "", "shuffled_prediction": ""} == {
        "sample_id": "s0/a", "question": "what color is it?", "question_type": "colour", "prediction": "red",
        "answers": ["red"], "correct": 1.0, "images": [str(tmp_path / "0.png")],
        "majority_prediction": "", "shuffled_prediction": "",
    }  # fmt: skip
    with Image.open(folder / "grid.png") as grid:
        assert min(grid.size) > 800
    page = Links((folder / "report.html").read_text())
    assert len(page.fetched) == 2 and all(src.startswith("data:image/png;base64,") for src in page.fetched)
    assert "<b>mine</b> & yours" in page.text and "<i>bad</i>" in page.text  # as text, not as tags
    assert "http" not in (folder / "report.html").read_text().replace("data:image", "")[:4000]
    for word in ("majority answer", "shuffled pictures", "colour", "yes/no", "100.0 %", "66.7 %"):
        assert word in page.text


def test_numbers_survive_a_missing_matplotlib(
    samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    evaluate(Seeing(), samples, report_dir=tmp_path / "r")
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["predictions.jsonl", "results.json"]


def predictions(*groups: tuple[str, int, int]) -> list[Prediction]:
    """Records of (type, number right, number wrong)."""
    return [
        Prediction(f"{kind}{n}", "q", kind, "p", ["a"], float(n < right))
        for kind, right, wrong in groups
        for n in range(right + wrong)
    ]


@pytest.mark.parametrize(
    ("groups", "per_type", "wrong"),
    [
        ([("a", 100, 100), ("b", 100, 100)], {"a": 8, "b": 8}, 8),
        ([("a", 1000, 1), ("b", 10, 0)], {"a": 8, "b": 8}, 1),
        ([("a", 0, 50), ("b", 2, 0)], {"a": 14, "b": 2}, 14),
        ([("a", 3, 1)], {"a": 4}, 1),
        ([(kind, 5, 5) for kind in "abcde"], {"a": 4, "b": 3, "c": 3, "d": 3, "e": 3}, 6),
    ],
)
def test_grid_is_balanced_and_shows_wrong_answers(groups: Any, per_type: dict[str, int], wrong: int) -> None:
    records = predictions(*groups)
    chosen = choose_for_grid(records)
    assert len(chosen) == len(set(chosen)) == sum(per_type.values())
    found = [records[number] for number in chosen]
    assert {k: sum(record.question_type == k for record in found) for k in per_type} == per_type
    assert sum(not record.is_right for record in found) == wrong


def test_grid_frames_tell_right_from_wrong_and_text_is_not_tex(tmp_path: Path) -> None:
    from minivlm.evaluation.report import RIGHT, WRONG

    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    for name, value in (("right", 1.0), ("wrong", 0.0)):
        record = Prediction("s", "what costs $1_000 or $^2?", "t", "$\\frac$", ["<pad>"], value)
        draw_grid([(record, Sample("s", [], [picture]))], tmp_path / f"{name}.png")
    rgb = {colour: tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5)) for colour in (RIGHT, WRONG)}
    for name, colour, other in (("right", RIGHT, WRONG), ("wrong", WRONG, RIGHT)):
        with Image.open(tmp_path / f"{name}.png") as file:
            colours = {pixel for _, pixel in file.convert("RGB").getcolors(10**6) or []}
        assert rgb[colour] in colours and rgb[other] not in colours


def test_grid_without_readable_pictures(tmp_path: Path) -> None:
    record = Prediction("s", "q?", "t", "", ["a"], 0.0)
    cells = [(record, Sample("s", [], images)) for images in ([], [tmp_path / "none.png"])]
    draw_grid(cells, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 1000


def test_tables(samples: list[Sample]) -> None:
    from rich.console import Console

    task = evaluate(Seeing(), samples, full=True, train_samples=samples)
    heading, rows = table_rows(task.results)
    assert heading == ["question type", "questions", "model", "majority answer", "shuffled pictures"]
    assert [row[:3] for row in rows] == [
        ["colour", "18", "100.0 %"], ["yes/no", "12", "100.0 %"], ["mean of the types", "", "100.0 %"],
        ["all", "30", "100.0 %"],
    ]  # fmt: skip
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(task.render_table())
    assert re.search(r"all\s.*30\s.*100\.0 %\s.*46\.7 %", console.export_text())


def test_loss_is_the_mean_over_tokens_not_over_batches(samples: list[Sample]) -> None:
    model = Seeing().train()
    task = Task(RunConfig(batch_size_eval=7))
    # 18 answers of loss 1 and 12 of loss 4, in batches of different make-up
    assert task.evaluate(model, FakeProcessor(), samples, device="cpu") == {"loss": pytest.approx(2.2)}
    assert model.training and not task.higher_is_better and task.metric_name == "loss"
    with pytest.raises(DatasetError, match="no supervised token"):
        task.evaluate(model, FakeProcessor(), [], device="cpu")
