"""Plain texts as data: files, pieces, template, padding; and pictures left out of the data of a blind twin."""

from __future__ import annotations

import json
import pickle
import random
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_template import template, tokenizer_of

from minivlm.config.experiment import RunConfig
from minivlm.datasets.base import DatasetError
from minivlm.datasets.configs import LlavaJsonConfig, TextConfig
from minivlm.datasets.doctor import check_dataset
from minivlm.datasets.feed import make_feed
from minivlm.datasets.llava_json import LlavaJsonBuilder
from minivlm.datasets.text import TextBuilder, TextDataset, cut
from minivlm.datasets.training_set import Source
from minivlm.processors.configs import ProcessorConfig
from minivlm.processors.processor import VLMProcessor
from minivlm.processors.template import Template
from minivlm.types import IGNORE_INDEX, IMAGE_TOKEN_ID, Message, Sample, SampleError


def texts_of(samples: Sequence[Sample]) -> list[str | None]:
    assert all([m.role for m in sample.messages] == ["assistant"] and not sample.images for sample in samples)
    return [sample.messages[0].content for sample in samples]


def build(annotations: Any, split: str = "train", **more: Any) -> TextDataset:
    return TextBuilder(TextConfig(annotations=annotations, **more), "books").build(split)


def jsonl(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def processor(name: str = "text", kind: str = "quickstart", **settings: Any) -> VLMProcessor:
    return VLMProcessor(ProcessorConfig(**settings), template(name), tokenizer_of(kind), {}, 0)


# --- files ----------------------------------------------------------------------------------------------------------


def test_texts_of_several_files(tmp_path: Path) -> None:
    """A line of .txt and a record of .jsonl is a text; order, line ends and signs of other scripts stay."""
    first = tmp_path / "a.txt"
    first.write_bytes("\ufeffone line\r\n\n  \nzwei Zeilen: ä\n日本語".encode())
    second = jsonl(tmp_path / "b.jsonl", {"text": "a poem\nof two lines"}, {"text": "你好", "source": "web"})
    samples = build([str(first), second])
    assert texts_of(samples) == ["one line", "zwei Zeilen: ä", "日本語", "a poem\nof two lines", "你好"]
    assert len({sample.id for sample in samples}) == 5 and samples[3].id == "books/b.jsonl/0"
    assert texts_of(pickle.loads(pickle.dumps(samples))) == texts_of(samples), "as loading processes get it"
    with pytest.raises(IndexError):
        samples[5]


def test_splits(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"text": "x"})
    assert TextBuilder(TextConfig(annotations=file), "t").splits == ("train",)
    both = TextBuilder(TextConfig(annotations={"train": [file, file], "val": file}), "t")
    assert both.splits == ("train", "val")
    assert (len(both.build("train")), len(both.build("val"))) == (2, 1)
    with pytest.raises(DatasetError, match=r"no split 'vall'.*did you mean 'val'"):
        both.build("vall")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2: broken JSON .*one record a line"),
        ("a.txt", b" \n\n", "has no texts"),
        ("a.csv", b"x", "does not end with .txt or .jsonl"),
        ("absent/a.txt", None, "there is no file"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=reason):
        build(str(tmp_path / name))


def test_broken_texts_are_named_with_their_line(tmp_path: Path) -> None:
    """One by one, when they are wanted; the others can be used."""
    lines = [b'{"text": "good"}', b"", b'{"txt": "x"}', b'["x"]', b'{"text": " "}', b'{"text": "\\ud800"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*lines, b'{"text": "\xff"}']))
    (tmp_path / "b.txt").write_bytes(b"good\nbad \xff\n")
    samples = build([str(tmp_path / "a.jsonl"), str(tmp_path / "b.txt")], max_characters=16)
    reasons = {
        1: r"a.jsonl, line 3: a record \{text: ...\} is wanted, not an object with txt",
        2: "a.jsonl, line 4: .* not a list",
        3: "line 5: the text is empty",
        4: "line 6: .*surrogates",
        5: "line 7: .*utf-8",
        7: "b.txt, line 2: .*utf-8",
    }
    assert len(samples) == 8
    for index in range(8):
        if index in reasons:
            with pytest.raises(SampleError, match=reasons[index]):
                samples[index]
        else:
            assert texts_of([samples[index]]) == ["good"]
    report = check_dataset(
        TextBuilder(TextConfig(annotations=[str(tmp_path / "a.jsonl")]), "books"), "train", processor()
    )
    assert (report.total, report.bad) == (6, 5) and not report.ok


def test_a_file_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", *({"text": "word " * 2000} for _ in range(500)))
    tracemalloc.start()
    samples = build(file, max_characters=1000)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(samples) == 5000 and most < Path(file).stat().st_size / 4


# --- pieces ---------------------------------------------------------------------------------------------------------


def pieces(text: str, limit: int) -> list[str]:
    return [text[first:last] for first, last in cut(text, limit)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("short", ["short"]),
        ("  a b c d e f g h i ", ["a b c d e f g h", "i"]),
        ("0123456789\nab cd ef gh", ["0123456789", "ab cd ef gh"]),
        ("0123456\n\n89\nab cd ef", ["0123456\n\n89", "ab cd ef"]),
        ("01234567\n\n9\nab cd efgh", ["01234567", "9\nab cd efgh"]),
        ("日" * 20, ["日" * 16, "日" * 4]),
    ],
)
def test_where_a_text_is_cut(text: str, found: list[str]) -> None:
    """At a blank line before a line break before a blank, in the second half; else anywhere."""
    assert pieces(text, 16) == found


def test_pieces_hold_the_whole_text() -> None:
    draw = random.Random(0)
    for _ in range(50):
        text = "".join(draw.choice("abc  \n日") for _ in range(draw.randint(1, 300)))
        found = pieces(text, 20)
        assert "".join("".join(found).split()) == "".join(text.split())
        assert all(0 < len(piece) <= 20 and piece == piece.strip() for piece in found)


def test_pieces_are_samples(tmp_path: Path) -> None:
    long = " ".join(f"word{n}" for n in range(40))
    samples = build(jsonl(tmp_path / "a.jsonl", {"text": "short"}, {"text": long}), max_characters=50)
    found = texts_of(samples)
    assert found[0] == "short" and " ".join(map(str, found[1:])) == long and len(found) > 5
    assert all(len(str(text)) <= 50 for text in found)


# --- template -------------------------------------------------------------------------------------------------------


def document(text: str) -> Sample:
    return Sample("d", [Message("assistant", text)])


@pytest.mark.parametrize("kind", ["quickstart", "llama3", "gpt2"])
def test_a_document_stands_between_the_tokenizers_own_tokens(kind: str) -> None:
    own = processor(kind=kind)
    text, tokenizer = "The <image of a> cat.\nIt sat.", own.tokenizer
    encoded = own.encode(document(text), seed=1)
    inside = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoded.input_ids == [tokenizer.bos_token_id, *inside, tokenizer.eos_token_id]
    assert encoded.labels == [IGNORE_INDEX, *inside, tokenizer.eos_token_id]


def test_tokenizers_without_these_tokens() -> None:
    """Without a begin token there is none; without an end token nothing could be learned to end."""
    import copy

    own = processor(kind="gpt2")
    own.tokenizer = copy.deepcopy(own.tokenizer)
    own.tokenizer.bos_token = None
    assert own.encode(document("a cat")).input_ids == [
        *own.tokenizer("a cat", add_special_tokens=False)["input_ids"],
        own.tokenizer.eos_token_id,
    ]
    own.tokenizer.eos_token = None
    with pytest.raises(SampleError, match=r"template.eos: always, but the tokenizer has no end token"):
        own.encode(document("a cat"))


def test_a_question_is_a_beginning() -> None:
    own = processor()
    prompt = own.prompt([{"role": "user", "content": "The cat"}])
    ids = own.tokenizer("The cat", add_special_tokens=False)["input_ids"]
    assert prompt.input_ids.tolist() == [[own.tokenizer.bos_token_id, *ids]]
    assert own.generation_options()["eos_token_id"] == [own.tokenizer.eos_token_id]


def test_a_longer_document_loses_its_end() -> None:
    encoded = processor(max_length=6).encode(document("a b c d e f g h i"))
    assert len(encoded.input_ids) == 6 and encoded.labels[1:] == encoded.input_ids[1:]


@pytest.mark.parametrize("name", ["qa", "minimind_v1", "llava_v0"])
def test_other_templates_want_a_question(name: str) -> None:
    with pytest.raises(SampleError, match=r"no user turn|is due"):
        processor(name).encode(document("a b"))


@pytest.mark.parametrize("keys", [("from", "value", "human", "gpt"), ("role", "content", "user", "assistant")])
def test_chats_without_pictures(tmp_path: Path, keys: tuple[str, str, str, str]) -> None:
    """Several turns of a JSONL file, in either spelling, each answer supervised."""
    who, what, user, model = keys
    turns = [{who: user, what: "a?"}, {who: model, what: "b"}, {who: user, what: "c?"}, {who: model, what: "d"}]
    file = jsonl(tmp_path / "chats.jsonl", {"conversations": turns})
    (sample,) = LlavaJsonBuilder(LlavaJsonConfig(annotations=file), "chats").build("train")
    own = processor("minimind_v1")
    encoded = own.encode(sample)
    learned = [token for token in encoded.labels if token != IGNORE_INDEX]
    assert own.tokenizer.decode(encoded.input_ids) == (
        "<s>user\na?</s>\n<s>assistant\nb</s>\n<s>user\nc?</s>\n<s>assistant\nd</s>\n"
    )
    assert own.tokenizer.decode(learned) == "\nb</s>\n\nd</s>\n"


# --- padding --------------------------------------------------------------------------------------------------------


def test_little_of_a_batch_is_padding(tmp_path: Path) -> None:
    """Of texts from 5 to 400 characters, lognormal as in nature: some percent; without grouping more than half."""
    draw = random.Random(0)
    sizes = [min(400, 5 + int(draw.lognormvariate(4, 1))) for _ in range(800)]
    texts = [{"text": "".join(draw.choice("abcde ") for _ in range(size))} for size in sizes]
    source = Source("t", build(jsonl(tmp_path / "a.jsonl", *texts)))

    def padding(grouped: bool) -> float:
        run = RunConfig(batch_size_train=16, group_by_length=grouped)
        feed = make_feed([source], processor(), run)
        batches = list(feed.batches(0, 50))
        assert sum(len(batch.input_ids) for batch in batches) == 800
        cells = sum(batch.attention_mask.numel() for batch in batches)
        return 1 - sum(int(batch.attention_mask.sum()) for batch in batches) / cells

    assert padding(True) < 0.07 < 0.5 < padding(False)


# --- pictures left out ----------------------------------------------------------------------------------------------


PICTURE = Image.new("RGB", (8, 8), (200, 0, 0))


@pytest.mark.parametrize(
    ("question", "left"),
    [
        ("<image>\nwhat is it?", "what is it?"),
        ("what is it?\n<image>", "what is it?"),
        ("what is it? <image>\n", "what is it?"),
        ("look <image> here", "look here"),
        ("<image>what is it?", "what is it?"),
        ("<image>", ""),
        (f"{'<' * 25}{'>' * 25}\nwhat is it?", "what is it?"),
    ],
)
def test_a_blind_twin_is_asked_the_text_alone(question: str, left: str) -> None:
    blind = processor("minimind_v1")
    blind.pictures = "drop"
    ours = blind.encode(Sample("s", [Message("user", question), Message("assistant", "a cat")], [PICTURE]))
    text = blind.encode(Sample("s", [Message("user", left), Message("assistant", "a cat")]))
    assert ours == text and IMAGE_TOKEN_ID not in ours.input_ids
    prompt = blind.prompt([Message("user", question)], [PICTURE])
    assert prompt.num_images == 0 and blind.tokenizer.decode(prompt.input_ids[0]).startswith(f"<s>user\n{left}</s>")


def test_several_pictures_with_a_separator_of_their_own() -> None:
    form = Template(template("qa").config)
    form.config.image_separator = " | "
    message = Message("user", form.with_images("why?", 2))
    assert message.content == "<image> | <image> | why?"
    assert form.without_images(message).content == "why?"
    assert form.without_images(Message("assistant", "no picture")).content == "no picture"
    form.config.image_separator = "\n"


def test_captions_are_still_asked_for(tmp_path: Path) -> None:
    blind = processor("minimind_v1", prompts=["<image>\nwhat is it?"])
    blind.pictures = "drop"
    caption = blind.encode(Sample("s", [Message("assistant", "a cat")], [PICTURE]), seed=0)
    asked = blind.encode(Sample("s", [Message("user", "what is it?"), Message("assistant", "a cat")]), seed=0)
    assert caption == asked


def test_a_wrong_number_of_markers_stays_an_error() -> None:
    """So that a model and its blind twin see the same samples."""
    blind = processor("minimind_v1")
    blind.pictures = "drop"
    for text, pictures in (("what?", [PICTURE]), ("<image> what?", [])):
        with pytest.raises(SampleError, match="markers in the text, but"):
            blind.encode(Sample("s", [Message("user", text), Message("assistant", "a cat")], pictures))


def test_a_picture_for_a_model_without_encoder_is_refused() -> None:
    own = processor("minimind_v1")
    own.pictures = "refuse"
    with pytest.raises(SampleError, match=r"no vision encoder \(model.vision_encoder: none\); `pictures: drop`"):
        own.encode(Sample("s", [Message("user", "<image>\nwhat?"), Message("assistant", "a")], [PICTURE]))
