"""The data doctor: every kind of flaw is found, counted and named; the mask is shown as it is."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from minivlm.datasets.base import DatasetBuilder, DatasetError
from minivlm.datasets.configs import LlavaJsonConfig
from minivlm.datasets.doctor import (
    ADVICE,
    Report,
    check_dataset,
    histogram,
    length_lines,
    percentile,
    print_report,
    render_mask,
)
from minivlm.datasets.llava_json import LlavaJsonBuilder
from minivlm.processors.configs import ImageConfig, ProcessorConfig, TemplateConfig
from minivlm.types import IGNORE_INDEX, IMAGE_TOKEN_ID, Encoded, Message, Sample, SampleError

Build = Callable[..., LlavaJsonBuilder]


def record(name: str, image: Any = "good.png", question: str = "<image>\nwhat?", answer: str = "a cat") -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns} | ({"image": image} if image else {})


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Builders of records beside one good picture and one broken one."""
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")

    def make(*records: Any, **config: Any) -> LlavaJsonBuilder:
        (tmp_path / "a.json").write_text(json.dumps(records))
        return LlavaJsonBuilder(LlavaJsonConfig(annotations=str(tmp_path / "a.json"), **config), "mine")

    return make


class Letters:
    """A tokenizer of letters, which drops a blank at the start, as those of Llama do."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(token) for token in ids).removeprefix(" ")


@dataclass
class Limits:
    max_length: int = 60
    on_overflow: str = "cut_text"


class FakeProcessor:
    """A token a letter, 16 a picture; cuts and refuses as the real one does."""

    def __init__(self, **limits: Any):
        self.config = Limits(**limits)
        self.tokenizer = Letters()

    def encode(self, sample: Sample) -> Encoded:
        for image in sample.images:
            try:
                with Image.open(image) as file:
                    file.load()
            except (OSError, SyntaxError) as error:
                raise SampleError(sample.id, f"cannot read {image}: {error}") from error
        ids = [IMAGE_TOKEN_ID] * 16 * len(sample.images)
        labels = [IGNORE_INDEX] * len(ids)
        for message in sample.messages:
            letters = [ord(letter) for letter in (message.content or "").replace("<image>", "")]
            ids += letters
            labels += letters if message.role == "assistant" else [IGNORE_INDEX] * len(letters)
        limit = self.config.max_length
        if len(ids) > limit and self.config.on_overflow == "error":
            raise SampleError(sample.id, f"{len(ids)} tokens do not fit into {limit}")
        seen = labels if self.config.on_overflow == "cut_right" else labels[:limit]
        if all(label == IGNORE_INDEX for label in seen):
            raise SampleError(sample.id, "nothing is supervised")
        return Encoded(ids[:limit], labels[:limit], tokens_per_image=[16] * len(sample.images), sample_id=sample.id)


def counts(report: Report) -> dict[str, int]:
    return {kind: finding.count for kind, finding in report.findings.items()}


FLAWED: dict[str, Any] = {
    "missing picture": record("flawed", "none.png"),
    "unreadable picture": record("flawed", "cut.png"),
    "picture path": record("flawed", "../good.png"),
    "record": {"id": "flawed", "image": "good.png"},
    "unknown key": record("flawed") | {"imge": 1},
    "nothing supervised": record("flawed", answer=""),
}


@pytest.mark.parametrize("processor", [None, FakeProcessor()], ids=["bare", "processor"])
@pytest.mark.parametrize("kind", FLAWED)
def test_each_kind_is_found_once_and_named(build: Build, kind: str, processor: Any) -> None:
    report = check_dataset(build(record("a"), FLAWED[kind], record("b")), "train", processor)
    assert counts(report) == {kind: 1}
    (name, text), *_ = report.findings[kind].examples
    assert name == "flawed" and text
    assert (report.checked, report.total, report.ok) == (3, 3, False)
    usable = kind == "unknown key" or (kind == "nothing supervised" and processor is None)
    assert report.bad == (0 if usable else 1)
    assert kind in ADVICE


def test_good_data_has_no_findings(build: Build) -> None:
    report = check_dataset(build(record("a"), record("b", None, "hello"), record("c")), "train", FakeProcessor())
    assert report.ok and report.bad == 0
    assert report.pictures == {1: 2, 0: 1}
    assert report.lengths == [16 + 6 + 5, 10, 16 + 6 + 5] and report.supervised == [5, 5, 5]


def test_markers_are_counted_unless_the_processor_decides(build: Build) -> None:
    builder = build(record("two", question="<image> <image>"), record("none", question="what?"))
    bare = check_dataset(builder, "train")
    assert counts(bare) == {"marker count": 2}
    assert bare.findings["marker count"].examples[0] == ("two", "2 x <image> in the text for 1 picture(s)")
    assert check_dataset(builder, "train", FakeProcessor()).ok


def test_role_order_is_found(build: Build) -> None:
    turns = [{"from": "gpt", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    report = check_dataset(build({"id": "x", "conversations": turns}), "train")
    assert report.findings["role order"].examples == [
        ("x", "the first turn is not the user's; turn 2 is the assistant's again")
    ]


@pytest.mark.parametrize(
    ("limits", "bad", "words"),
    [
        ({}, 0, "its end is cut"),
        ({"on_overflow": "error"}, 1, "not fit into 60"),
        ({"max_length": 40}, 1, "at most 40"),
        ({"max_length": 40, "on_overflow": "cut_right"}, 0, "all of its answers are cut off"),
    ],
    ids=["cut", "refused", "answer cut off", "kept without answer"],
)
def test_long_samples_show_their_true_length(build: Build, limits: Any, bad: int, words: str) -> None:
    long = record("long", question="<image>" + "q" * 40, answer="a" * 10)
    report = check_dataset(build(record("a"), long), "train", FakeProcessor(**limits))
    assert report.lengths == [27, 66] and report.bad == bad
    name, text = report.findings["too long"].examples[0]
    assert name == "long" and text.startswith("66 tokens") and words in text
    assert ("nothing supervised" in report.findings) == ("max_length" in limits and bad > 0)
    assert report.max_length == limits.get("max_length", 60)


def test_counts_all_but_keeps_three_examples(build: Build) -> None:
    report = check_dataset(build(*[record(f"r{n}", "none.png") for n in range(9)]), "train")
    assert report.findings["missing picture"].count == report.bad == 9
    assert [name for name, _ in report.findings["missing picture"].examples] == ["r0", "r1", "r2"]


def test_limit_spreads_over_the_split_and_max_samples_ends_it(build: Build) -> None:
    records = [record(f"r{n}", "none.png") for n in range(30)]
    report = check_dataset(build(*records), "train", limit=3)
    assert (report.checked, report.total) == (3, 30)
    assert [name for name, _ in report.findings["missing picture"].examples] == ["r0", "r10", "r20"]
    assert check_dataset(build(*records, max_samples=6), "train").checked == 6


def test_any_dataset_can_be_checked(tmp_path: Path) -> None:
    class Rows(list):
        def __getitem__(self, index: Any) -> Any:
            if index == 1:
                raise SampleError("row 1", "is torn")
            return super().__getitem__(index)

    class Builder(DatasetBuilder[None]):
        def build(self, split: str) -> Any:
            turns = [Message("user", "<image>"), Message("assistant", "x")]
            return Rows([Sample("s", turns, [Image.new("RGB", (4, 4))]), None, Sample("t", turns)])

    report = check_dataset(Builder(None, "rows"), "train")
    assert counts(report) == {"record": 1, "marker count": 1}
    assert report.findings["record"].examples == [("row 1", "is torn")]


def test_a_missing_file_is_not_a_finding(tmp_path: Path) -> None:
    builder = LlavaJsonBuilder(LlavaJsonConfig(annotations=str(tmp_path / "none.json")))
    with pytest.raises(DatasetError, match=r"none\.json"):
        check_dataset(builder, "train")


def test_the_real_processor_is_understood(build: Build) -> None:
    """Reasons of the processor are sorted by their words: this test fails when those change."""
    import tokenizers
    import transformers

    from minivlm.processors.image import ImageTransform
    from minivlm.processors.processor import VLMProcessor
    from minivlm.processors.template import Template

    words = ["<pad>", "<unk>", "</s>", "what", "?", "a", "cat", ":"]
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: n for n, w in enumerate(words)}, "<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )
    template = Template(TemplateConfig(user_prefix="a: ", assistant_prefix=" a:", assistant_suffix="</s>"))
    settings = {"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
    config = ProcessorConfig(max_length=40, max_answer_tokens=20)
    transforms = {"image": ImageTransform(ImageConfig(), settings)}
    processor = VLMProcessor(config, template, tokenizer, transforms, tokens_per_image=4)
    turns = [{"from": "gpt", "value": "hi"}, {"from": "human", "value": "ho"}]
    records = [
        record("good"),
        record("missing", "none.png"),
        record("broken", "text.png"),
        record("markers", question="<image> <image>"),
        record("long", answer="cat " * 60),
        record("too long", ["good.png"] * 12, question="<image>" * 12),
        record("question too long", question="<image>" + "what " * 60),
        {"id": "order", "conversations": turns},
    ]
    report = check_dataset(build(*records), "train", processor)
    found = {kind: [name for name, _ in finding.examples] for kind, finding in report.findings.items()}
    assert found == {
        "missing picture": ["missing"],
        "unreadable picture": ["broken"],
        "marker count": ["markers"],
        "too long": ["long", "too long", "question too long"],
        "nothing supervised": ["question too long"],
        "role order": ["order"],
    }
    assert report.bad == 6 and max(report.lengths) > 60
    assert processor.config.max_length == 40
    shown = render_mask(processor.encode(build(records[0]).build("train")[0]), tokenizer)
    assert shown.plain.count("[image x 4]") == 1
    assert styled(shown, "bold green").split() == ["a", "cat", "</s>"]


def styled(text: Any, style: str) -> str:
    return "".join(text.plain[span.start : span.end] for span in text.spans if span.style == style)


def test_mask_shows_supervised_text_and_pictures() -> None:
    ids = [ord("U"), ord(":"), *[IMAGE_TOKEN_ID] * 5, ord(" "), ord("q"), ord(" "), ord("["), ord("b"), ord("]")]
    labels = [IGNORE_INDEX] * 9 + ids[9:]
    text = render_mask(Encoded(ids, labels, tokens_per_image=[3, 2]), Letters())
    # only the blank at the start of a run is the tokenizer's to drop; that of the answer must stay
    assert text.plain == "U:[image x 3][image x 2]q [b]"
    assert styled(text, "bold green") == " [b]"
    assert styled(text, "dim") == "U:q"


def test_mask_without_sizes_shows_runs() -> None:
    encoded = Encoded([IMAGE_TOKEN_ID] * 16 + [ord("a")], [IGNORE_INDEX] * 17)
    assert render_mask(encoded, Letters()).plain == "[image x 16]a"


def test_printed_report(build: Build) -> None:
    records = [record("a"), record("[bold]b", "none.png"), record("c") | {"imge": 1}]
    report = check_dataset(build(*records), "train", FakeProcessor(), limit=1000)
    console = Console(file=io.StringIO(), record=True, width=100)
    print_report(report, console)
    text = console.export_text()
    for words in (
        "mine / train: 3 samples read",
        "1 cannot be used",
        "missing picture: 1 samples",
        ADVICE["missing picture"],
        "sample '[bold]b': ",
        "did you mean 'image'",
        "pictures: 3 with 1",
        "tokens: min 27, mean 27.0",
        "(at most 60)",
        "27-27 #######",
    ):
        assert words in text, text
    good = Console(file=io.StringIO(), record=True, width=100)
    print_report(check_dataset(build(record("a")), "train"), good)
    assert "all of them can be used" in good.export_text()


def test_length_statistics() -> None:
    values = list(range(1, 101))
    assert (percentile(values, 50), percentile(values, 95), percentile(values, 100)) == (50, 95, 100)
    assert percentile([7], 50) == percentile([7], 95) == 7
    report = Report("d", "train", 2, lengths=[10, 30], supervised=[5, 5], max_length=None)
    assert length_lines(report) == [
        "tokens: min 10, mean 20.0, p50 10, p95 30, max 30",
        "supervised tokens: 5.0 a sample, 25.0 % of all",
    ]


def test_histogram_counts_every_value_once() -> None:
    lines = histogram([1, 1, 1, 1, 5, 10, 20, 20], bins=4, width=8)
    assert lines == [" 1-5  ######## 5", " 6-10 ##       1", "11-15          0", "16-20 ####     2"]
    assert histogram([3, 3]) == [f"3-3 {'#' * 40} 2"]
