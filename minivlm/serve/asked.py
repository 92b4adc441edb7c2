"""What ``minivlm compare`` asks: one question about a folder of pictures, or the questions of a dataset."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from minivlm.config.loader import load_config
from minivlm.evaluation.comparison import Asked
from minivlm.registry import suggest
from minivlm.serve.flags import ServeError
from minivlm.serve.records import read_records
from minivlm.types import Sample


def ask_folder(folder: Path, question: str, keywords: Path | None, report: Path) -> list[Asked]:
    """One question about every picture of a folder, at any depth, but that of an earlier ``report``.

    Raises :class:`ServeError` or DatasetError.
    """
    if not folder.is_dir():
        raise ServeError(f"--images: there is no folder {folder}")
    names = [record["image"] for record in read_records(folder, question)]
    names = [name for name in names if (folder / name).resolve() != report.resolve()]
    words = read_keywords(keywords, names)
    return [Asked(name, folder / name, question, words.get(name, [])) for name in names]


def ask_dataset(path: str, split: str, count: int) -> list[Asked]:
    """``count`` questions, evenly spaced over a split of the last stage of an experiment file, with their answers.

    A question is the first of its sample, and right is what holds one of ``meta["answers"]``, or else the first answer.
    Raises ConfigError, DatasetError, SampleError for a bad sample, or :class:`ServeError` for one that is no question
    about one picture.
    """
    from minivlm.datasets.training_set import build_datasets, build_split  # needs torch
    from minivlm.evaluation.vqa import evenly_spaced

    sources = build_split(build_datasets(load_config(path).stages[-1].datasets), [split])
    places = [(source.sized, number) for source in sources for number in range(len(source.sized))]
    return [_asked(samples[n]) for samples, n in (places[place] for place in evenly_spaced(len(places), count))]


def _asked(sample: Sample) -> Asked:
    turns = [message for message in sample.messages if message.role != "system"]
    if len(sample.images) != 1 or [turn.role for turn in turns[:2]] != ["user", "assistant"]:
        raise ServeError(f"--data: sample '{sample.id}' is no question about one picture, with an answer")
    answers = sample.meta.get("answers") or [turns[1].content or ""]
    return Asked(sample.id, sample.images[0], turns[0].content or "", [str(answer) for answer in answers])


def read_keywords(path: Path | None, pictures: Sequence[str]) -> dict[str, list[str]]:
    """The words of every picture, which the file names with or without its ending. Raises :class:`ServeError`."""
    if path is None:
        return {}
    try:
        written = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ServeError(f"--keywords: {path} cannot be read: {error}") from error
    if not isinstance(written, dict):
        raise ServeError(f"--keywords: {path} must hold {{picture: [words]}}")
    known = {os.path.splitext(name)[0]: name for name in pictures} | {name: name for name in pictures}
    found: dict[str, list[str]] = {}
    for name, words in written.items():
        if name not in known:
            raise ServeError(f"--keywords: {path} names '{name}', which is no picture here{suggest(name, known)}")
        words = [words] if isinstance(words, str) else words
        if not isinstance(words, list) or not words or not all(isinstance(w, str) and w.strip() for w in words):
            raise ServeError(f"--keywords: {path}: '{name}' needs a word or a list of words")
        found[known[name]] = [word.strip() for word in words]
    return found
