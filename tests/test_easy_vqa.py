"""easy-VQA: official counts, the three forms, and captions that agree with the pixels."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from PIL import Image

from minivlm.datasets import easy_vqa
from minivlm.datasets.base import DatasetError
from minivlm.datasets.configs import EasyVQAConfig
from minivlm.datasets.easy_vqa import EasyVQABuilder, EasyVQADataset, caption, known_facts

RGB = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}


def build(split: str, **config: Any) -> EasyVQADataset:
    return EasyVQABuilder(EasyVQAConfig(**config), "easy_vqa").build(split)


def test_official_counts() -> None:
    test = build("test")
    kinds = Counter(test[index].meta["question_type"] for index in range(len(test)))
    assert kinds == {"colour": 1280, "shape": 1257, "yes/no": 7136}
    assert len(test) == 9673
    assert len(build("train", val_images=0)) == 38575


@pytest.mark.parametrize("form", ["question", "conversation"])
def test_val_is_cut_off_from_train(form: str) -> None:
    train, val = build("train", form=form, val_images=300), build("val", form=form, val_images=300)
    in_train = {train[index].meta["image_id"] for index in range(len(train))}
    in_val = {val[index].meta["image_id"] for index in range(len(val))}
    assert len(in_train) == 3700 and in_val == set(range(3700, 4000))
    assert not in_train & in_val
    if form == "question":
        assert len(train) + len(val) == 38575


def test_a_question() -> None:
    sample = build("test")[1]
    assert sample.id == "easy_vqa/test/0/1"
    assert sample.messages[0].content == "<image>\nwhat is the color of the triangle?"
    assert (sample.messages[0].role, sample.messages[1].role) == ("user", "assistant")
    assert sample.messages[1].content == "red"
    assert sample.meta == {
        "image_id": 0,
        "question": "what is the color of the triangle?",
        "answers": ["red"],
        "question_type": "colour",
    }
    with Image.open(sample.images[0]) as picture:
        assert picture.size == (64, 64)


def test_documents_tell_all_without_the_picture() -> None:
    data, turns = build("train", form="text", val_images=3900), build("train", form="conversation", max_turns=100)
    assert len(data) == 100
    for place in (0, 57):
        sample = data[place]
        assert sample.images == [] and sample.id == f"easy_vqa/train/{sample.meta['image_id']}"
        (said,) = sample.messages
        assert said.role == "assistant"
        known, *lines = (said.content or "").splitlines()
        talk = [message.content or "" for message in turns[place].messages]
        pairs = zip(talk[::2], talk[1::2], strict=True)
        assert known == caption(list(zip(talk[::2], talk[1::2], strict=True))) + "."
        assert lines == [f"{question.removeprefix('<image>')} {answer}".strip() for question, answer in pairs]
    assert data[3] == build("train", form="text", val_images=3900)[3]
    held_out = build("val", form="text")
    assert len(held_out) == 200 and not any(held_out[place].images for place in range(200))
    assert not {data[n].id for n in range(100)} & {held_out[n].id for n in range(200)}


def test_ids_are_unique() -> None:
    test = build("test")
    assert len({test[index].id for index in range(len(test))}) == len(test)


@pytest.mark.parametrize("max_turns", [1, 3, 100])
def test_conversations_hold_every_question_once(max_turns: int) -> None:
    data = build("train", form="conversation", max_turns=max_turns, val_images=3900)
    asked: dict[int, list[tuple[str, str]]] = {}
    for index in range(len(data)):
        sample = data[index]
        contents = [message.content or "" for message in sample.messages]
        assert [message.role for message in sample.messages] == ["user", "assistant"] * (len(contents) // 2)
        assert len(contents) <= 2 * max_turns
        assert contents[0].startswith("<image>\n") and sum(text.count("<image>") for text in contents) == 1
        assert [path.name for path in sample.images] == [f"{sample.meta['image_id']}.png"]
        contents[0] = contents[0].removeprefix("<image>\n")
        asked.setdefault(sample.meta["image_id"], []).extend(zip(contents[::2], contents[1::2], strict=True))
    singles = build("train", val_images=3900)
    wanted: dict[int, list[tuple[str, str]]] = {}
    for index in range(len(singles)):
        meta = singles[index].meta
        wanted.setdefault(meta["image_id"], []).append((meta["question"], meta["answers"][0]))
    assert len(wanted) == 100
    assert {key: sorted(turns) for key, turns in asked.items()} == {key: sorted(t) for key, t in wanted.items()}
    if max_turns == 100:
        assert len(data) == 100
    assert data[5] == build("train", form="conversation", max_turns=max_turns, val_images=3900)[5]


@pytest.mark.parametrize("form", ["caption", "conversation"])
@pytest.mark.parametrize("split", ["val", "test"])
def test_only_training_takes_another_form(form: str, split: str) -> None:
    data, questions = build(split, form=form), build(split)
    assert len(data) == len(questions) and data[3] == questions[3]


def test_captions_agree_with_the_pixels() -> None:
    """Colour by the picture's own pixels; what share of its bounding box is filled tells the shape."""
    filled = {"rectangle": (0.93, 1.0), "circle": (0.7, 0.93), "triangle": (0.4, 0.72)}
    data = build("train", form="caption", val_images=3000)
    coloured = shaped = 0
    for index in range(0, len(data), 3):
        sample = data[index]
        assert sample.messages[0].content == "<image>"
        _, *words = (sample.messages[1].content or "").split()
        with Image.open(sample.images[0]) as file:
            picture = file.convert("RGB")
        counts = picture.getcolors(64 * 64) or []
        paint = max((count, colour) for count, colour in counts if min(colour) < 220)[1]  # type: ignore[type-var]
        for colour in set(words) & set(RGB):
            coloured += 1
            assert paint == RGB[colour], sample.id
        for shape in set(words) & set(filled):
            shaped += 1
            # pixels are at least half paint, to count the smoothed edge once
            near = [all(abs(a - b) < 60 for a, b in zip(pixel, paint, strict=True)) for pixel in _pixels(picture)]
            columns = [place % 64 for place, hit in enumerate(near) if hit]
            rows = [place // 64 for place, hit in enumerate(near) if hit]
            box = (max(columns) - min(columns) + 1) * (max(rows) - min(rows) + 1)
            low, high = filled[shape]
            assert low <= sum(near) / box <= high, sample.id
    assert coloured > 300 and shaped > 300


def _pixels(picture: Image.Image) -> list[tuple[int, ...]]:
    raw = picture.tobytes()
    return [tuple(raw[place : place + 3]) for place in range(0, len(raw), 3)]


def test_captions_skip_only_pictures_of_which_nothing_is_known() -> None:
    """Of 29 training pictures only what they are not is told."""
    assert len(build("train", form="caption", val_images=0)) == 3971


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([("what color is the circle?", "red")], "a red circle"),
        ([("what is the teal shape?", "triangle")], "a teal triangle"),
        ([("is there a circle?", "yes"), ("what is the color of the shape?", "gray")], "a gray circle"),
        ([("is there not a circle?", "no")], "a circle"),
        ([("is no blue shape present?", "no")], "a blue shape"),
        ([("is there a circle?", "no"), ("does the image not contain a rectangle?", "yes")], "a triangle"),
        ([("is there a circle?", "no"), ("is no blue shape present?", "yes")], ""),
        ([], ""),
    ],
)
def test_captions_follow_from_the_answers(turns: list[tuple[str, str]], expected: str) -> None:
    assert caption(turns) == expected


def test_seven_denied_colours_leave_one() -> None:
    denied = [(f"is there a {colour} shape?", "no") for colour in easy_vqa.COLOURS if colour != "teal"]
    assert known_facts(denied) == ("teal", None)
    assert known_facts(denied[1:]) == (None, None)


def test_cheap_to_send_to_workers() -> None:
    data = build("train")
    last = data[len(data) - 1]
    sent = pickle.dumps(data)
    assert len(sent) < 1000
    assert pickle.loads(sent)[len(data) - 1] == last


def test_package_is_found_without_importing_it() -> None:
    code = (
        "import sys; from minivlm.datasets.easy_vqa import find_data; "
        "assert find_data().is_dir(); assert 'easy_vqa' not in sys.modules; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(easy_vqa.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DatasetError, match=r'pip install "minivlm\[quickstart\]"'):
        build("test")


def test_unknown_and_empty_splits() -> None:
    with pytest.raises(DatasetError, match=r"no split 'tets' .*did you mean 'test'.*train, val, test"):
        build("tets")
    with pytest.raises(DatasetError, match="'val' is empty, since val_images is 0"):
        build("val", val_images=0)
