"""The texts of plain files, records of conversations and datasets, in order: what a tokenizer learns from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minivlm.config.experiment import Experiment
from minivlm.datasets.base import DatasetError
from minivlm.datasets.records import kind_of, scan_records
from minivlm.processors.configs import TemplateConfig
from minivlm.processors.template import Template, TemplateError, Text
from minivlm.types import IMAGE_MARKER, SampleError

TURNS = ("conversations", "messages")
_TEXT_KEYS = ("value", "content", "reasoning_content")


def read_texts(paths: Sequence[Path]) -> Iterator[str]:
    """All texts of ``.txt`` (a line each), ``.jsonl`` and ``.json`` files, in order; a file is read as it is asked for.

    A record holds ``text``, or under ``conversations`` or ``messages`` turns with from/value or role/content; a
    record may also be the list of its turns. Raises :class:`DatasetError` with file and line for what cannot be read.
    """
    for path in paths:
        suffix = path.suffix.lower()
        if suffix not in _READERS:
            raise DatasetError(f"{path}: files of text end with {', '.join(_READERS)}")
        if not path.is_file():
            raise DatasetError(f"there is no file {path}")
        yield from _READERS[suffix](path)


def experiment_texts(experiment: Experiment, template: TemplateConfig) -> Iterator[str]:
    """Every training sample of an experiment as its template writes it; no picture is opened.

    ``template`` is for stages that get theirs from a checkpoint, which need not be there yet. Raises
    :class:`DatasetError` for a dataset that cannot be used, and for the first bad sample, with its name.
    """
    from minivlm.datasets.training_set import build_datasets, build_split  # needs torch

    for stage in experiment.stages:
        form = Template(stage.model.template.config if stage.model.template else template)
        for source in build_split(build_datasets(stage.datasets), stage.run.train_splits):
            samples = source.sized
            for number in range(len(samples)):
                try:
                    sample = samples[number]
                    segments = form.render(sample.messages, pictures=len(sample.images))
                except SampleError as error:
                    raise DatasetError(f"datasets.{source.key}: {error}") from error
                except TemplateError as error:
                    raise DatasetError(f"datasets.{source.key}: sample '{sample.id}': {error}") from error
                yield "".join(segment.text for segment in segments if isinstance(segment, Text))


def _read_lines(path: Path) -> Iterator[str]:
    for number, line in _lines(path):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DatasetError(f"{path}, line {number}: it is not UTF-8 ({error.reason})") from error


def _read_jsonl(path: Path) -> Iterator[str]:
    for number, line in enumerate(_read_lines(path), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DatasetError(f"{path}, line {number}: broken JSON ({error})") from error
            yield from _texts_of(record, f"{path}, line {number}")


def _read_json(path: Path) -> Iterator[str]:
    spans, content = scan_records(path), path.read_bytes()
    line, counted = 1, 0
    for start, end in zip(spans[::2], spans[1::2], strict=True):
        line, counted = line + content.count(b"\n", counted, start), start
        try:
            record = json.loads(content[start:end].decode("utf-8"))
        except ValueError as error:
            raise DatasetError(f"{path}, line {line}: {error}") from error
        yield from _texts_of(record, f"{path}, line {line}")


def _read_txt(path: Path) -> Iterator[str]:
    return (text for line in _read_lines(path) if (text := line.rstrip("\r\n")).strip())


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".json": _read_json}


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        yield from enumerate(file, 1)


def _texts_of(record: Any, where: str) -> list[str]:
    """The texts of a record; the places of its pictures are no text."""
    turns = record
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return [_whole(record["text"], where)]
        turns = next((record[key] for key in TURNS if key in record), None)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        keys = f" with {', '.join(record)}" if isinstance(record, dict) else ""
        wanted = "a record with `text` or a list `conversations`"
        raise DatasetError(f"{where}: {wanted} is wanted, not {kind_of(record)}{keys}")
    found = [turn[key] for turn in turns for key in _TEXT_KEYS if isinstance(turn.get(key), str)]
    if not found:
        raise DatasetError(f"{where}: its turns have neither `value` nor `content`")
    return [_whole(text.replace(IMAGE_MARKER, ""), where) for text in found]


def _whole(text: str, where: str) -> str:
    """A text without half characters, which JSON can write as escapes and nothing can encode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DatasetError(f"{where}: it holds half a character, {text[error.start]!r}") from error
    return text
