"""easy-VQA (Victor Zhou, 2019, MIT): questions about drawn shapes, from the package ``easy-vqa``.

4,000 pictures with 38,575 questions for training and 1,000 with 9,673 for testing. Every picture shows
one of three shapes in one of eight colours. The package is looked up and never imported.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

from minivlm.datasets.base import DatasetBuilder, DatasetError
from minivlm.datasets.configs import EasyVQAConfig
from minivlm.registry import suggest
from minivlm.types import IMAGE_MARKER, Message, Sample

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
QUESTION_TYPES = ("colour", "shape", "yes/no")

QA = tuple[str, str]
"""A question and its answer."""


class EasyVQABuilder(DatasetBuilder[EasyVQAConfig]):
    """Official train and test split; the last ``val_images`` training pictures are split ``val``."""

    splits = ("train", "val", "test")

    def build(self, split: str) -> EasyVQADataset:
        """The samples of a split; raises :class:`DatasetError` if the package is not installed."""
        if split not in self.splits:
            known = ", ".join(self.splits)
            raise DatasetError(f"easy_vqa has no split '{split}'{suggest(split, self.splits)}; it has: {known}")
        folder = find_data() / ("test" if split == "test" else "train")
        pictures = len(read_questions(folder))
        border = pictures - self.config.val_images
        part = {"train": range(border), "val": range(border, pictures), "test": range(pictures)}[split]
        if not part:
            raise DatasetError(f"easy_vqa: split '{split}' is empty, since val_images is {self.config.val_images}")
        form = self.config.form if split == "train" or self.config.form == "text" else "question"
        return EasyVQADataset(folder, split, part, form, self.config.max_turns)


class EasyVQADataset(Sequence[Sample]):
    """One split in one form; pickles as a path and a few numbers."""

    def __init__(self, folder: Path, split: str, part: range, form: str, max_turns: int):
        self.folder = folder
        self.split = split
        self.part = part
        self.form = form
        self.max_turns = max_turns

    def __len__(self) -> int:
        return len(self._places())

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        place, number = self._places()[index]
        image_id, turns = read_questions(self.folder)[place]
        if self.form == "caption":
            return self._sample(image_id, "", [("", caption(turns))])
        shuffled = random.Random(image_id).sample(turns, len(turns))
        if self.form == "text":
            said = Message("assistant", document(caption(turns), shuffled))
            return Sample(f"easy_vqa/{self.split}/{image_id}", [said], meta={"image_id": image_id})
        if self.form == "conversation":
            return self._sample(image_id, f"/{number}", shuffled[number : number + self.max_turns])
        sample = self._sample(image_id, f"/{number}", [turns[number]])
        question, answer = turns[number]
        sample.meta |= {"question": question, "answers": [answer], "question_type": question_type(answer)}
        return sample

    def _places(self) -> tuple[tuple[int, int], ...]:
        step = {"question": 1, "conversation": self.max_turns, "caption": 0, "text": sys.maxsize}
        return _places(self.folder, self.part, step[self.form])

    def _sample(self, image_id: int, suffix: str, turns: Iterable[QA]) -> Sample:
        messages = []
        for number, (question, answer) in enumerate(turns):
            marker = "" if number else f"{IMAGE_MARKER}\n" if question else IMAGE_MARKER
            messages += [Message("user", marker + question), Message("assistant", answer)]
        return Sample(
            id=f"easy_vqa/{self.split}/{image_id}{suffix}",
            messages=messages,
            images=[self.folder / "images" / f"{image_id}.png"],
            meta={"image_id": image_id},
        )


def find_data() -> Path:
    """The folder ``data`` of the installed package; raises :class:`DatasetError` without it."""
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or not spec.submodule_search_locations:
        raise DatasetError(
            'dataset easy_vqa needs the package easy-vqa, which holds its pictures: pip install "minivlm[quickstart]"'
        )
    return Path(spec.submodule_search_locations[0]) / "data"


@lru_cache(maxsize=4)
def read_questions(folder: Path) -> tuple[tuple[int, tuple[QA, ...]], ...]:
    """Picture number and its questions with answers, in the order of the file; read once a process."""
    file = folder / "questions.json"
    found: dict[int, list[QA]] = {}
    try:
        for question, answer, image_id in json.loads(file.read_text(encoding="utf-8")):
            found.setdefault(image_id, []).append((question, answer))
    except (OSError, ValueError, TypeError) as error:
        raise DatasetError(f"easy_vqa: {file} cannot be read ({error}); install easy-vqa again") from error
    return tuple((image_id, tuple(turns)) for image_id, turns in sorted(found.items()))


@lru_cache(maxsize=12)
def _places(folder: Path, part: range, step: int) -> tuple[tuple[int, int], ...]:
    """For every sample: the place of its picture and the number of its first question there.

    A sample takes ``step`` questions; 0 stands for captions, one for every picture of which something is known.
    """
    questions = read_questions(folder)
    if step == 0:
        return tuple((place, 0) for place in part if caption(questions[place][1]))
    return tuple((place, number) for place in part for number in range(0, len(questions[place][1]), step))


def question_type(answer: str) -> str:
    """``colour``, ``shape`` or ``yes/no``, as the answer tells."""
    return "colour" if answer in COLOURS else "shape" if answer in SHAPES else "yes/no"


def known_facts(turns: Iterable[QA]) -> tuple[str | None, str | None]:
    """Colour and shape of a picture as far as its questions and answers tell them.

    A positive answer tells a property directly ("is there a circle?" yes; "what color is the circle?"),
    and so does the only value that was not denied.
    """
    is_so: set[str] = set()
    is_not: set[str] = set()
    for question, answer in turns:
        words = re.findall(r"[a-z]+", question.lower())
        named = {word for word in words if word in COLOURS or word in SHAPES}
        if answer not in ("yes", "no"):
            is_so |= named | {answer}
            continue
        negated = "not" in words or "no" in words
        (is_so if (answer == "yes") != negated else is_not).update(named)
    return _settle(COLOURS, is_so, is_not), _settle(SHAPES, is_so, is_not)


def _settle(values: Sequence[str], is_so: set[str], is_not: set[str]) -> str | None:
    left = [value for value in values if value in is_so] or [v for v in values if v not in is_not]
    return left[0] if len(left) == 1 else None


def caption(turns: Iterable[QA]) -> str:
    """``a blue circle``; only what is known: ``a blue shape``, ``a circle``; empty if nothing is."""
    colour, shape = known_facts(turns)
    if colour is None and shape is None:
        return ""
    return " ".join(word for word in ("a", colour, shape or "shape") if word)


def document(caption: str, turns: Iterable[QA]) -> str:
    """What is known about a picture, to be read without it: its caption, then a line for every question with answer."""
    return "\n".join([*([f"{caption}."] if caption else []), *(f"{question} {answer}" for question, answer in turns)])
