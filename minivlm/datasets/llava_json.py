"""LLaVA-1.5 records: JSON or JSONL with pictures in a folder.

A record is ``{id, image: path | [paths], conversations: [{from: human|gpt|system, value: text}]}``; one
without ``image`` is text only. A file is scanned once when it is opened, which finds broken JSON; the
records are parsed when they are asked for, so that a file of any length costs its worker processes
16 bytes a record.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from minivlm.datasets.base import DatasetBuilder, DatasetError
from minivlm.datasets.configs import LlavaJsonConfig
from minivlm.registry import suggest
from minivlm.types import IMAGE_MARKER, Message, Sample, SampleError

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""Names of the speakers in a file and their roles in a :class:`Message`."""
KNOWN_KEYS = ("id", "image", "conversations", "answers", "question_type", "model")
"""Keys of a record. ``answers`` and ``question_type`` serve evaluation; LLaVA's own mix has ``model``."""
TURN_KEYS = ("from", "value", "role", "content")
UNUSABLE = ("record", "picture path")
"""Kinds of findings of :func:`check_record` with which a record cannot become a sample."""

_BLANK = re.compile(r"[ \t\r\n]*")


class LlavaJsonBuilder(DatasetBuilder[LlavaJsonConfig]):
    """Records of LLaVA's format, one annotation file a split."""

    @property
    def splits(self) -> Sequence[str]:  # type: ignore[override]
        """The keys of ``annotations``, or ``train`` for a single file."""
        return tuple(self._files())

    def _files(self) -> dict[str, str]:
        given = self.config.annotations
        return dict(given) if isinstance(given, dict) else {"train": given}

    def build(self, split: str) -> LlavaJsonDataset:
        """The records of a split; raises :class:`DatasetError` if a file or folder is not there."""
        files = self._files()
        if split not in files:
            raise DatasetError(
                f"dataset '{self.name}' has no split '{split}'{suggest(split, files)}; it has: {', '.join(files)}"
            )
        path = Path(files[split]).expanduser()
        if not path.is_file():
            raise DatasetError(
                f"dataset '{self.name}': there is no annotation file {path} for split '{split}'; "
                "correct `annotations` or put the file there"
            )
        images = path.parent if self.config.images is None else Path(self.config.images).expanduser()
        if not images.is_dir():
            raise DatasetError(
                f"dataset '{self.name}': there is no folder {images}; correct `images`, the folder of the pictures"
            )
        return LlavaJsonDataset(path, images)


class LlavaJsonDataset(Sequence[Sample]):
    """The records of one file, parsed on access; pickles as paths and byte offsets."""

    def __init__(self, path: Path, images: Path):
        self.path = path
        self.images = images
        self._spans = scan_records(path)

    def __len__(self) -> int:
        return len(self._spans) // 2

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        """Sample ``index``; raises :class:`SampleError` naming the record and what is wrong."""
        record = self.record(index)
        sample_id = record_id(record, index)
        for finding in check_record(record, index):
            if finding.startswith(UNUSABLE):
                raise SampleError(sample_id, finding.partition(": ")[2])
        turns = [turn_of(turn) for turn in record["conversations"]]
        return Sample(
            id=sample_id,
            messages=[Message(ROLES[speaker], text) for speaker, text in turns],
            images=[self.images / name for name in image_names(record)],
            meta={key: record[key] for key in ("answers", "question_type") if key in record},
        )

    def record(self, index: int) -> Any:
        """The parsed record ``index``, unchecked."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} records, not one at {index}")
        start, end = self._spans[2 * (index % len(self)) :][:2]
        try:
            with open(self.path, "rb") as file:
                file.seek(start)
                return json.loads(file.read(end - start).decode("utf-8"))
        except (OSError, ValueError) as error:
            raise SampleError(
                str(index % len(self)),
                f"cannot be read at byte {start} of {self.path} ({error}); "
                "the file is not UTF-8, or it was changed after it was opened",
            ) from error

    def check(self, index: int) -> list[str]:
        """What the data doctor asks of a record: :func:`check_record`."""
        return check_record(self.record(index), index)


def scan_records(path: Path) -> array[int]:
    """First and last byte of every record: ``[start0, end0, start1, end1, ...]``.

    Raises :class:`DatasetError` with the line for broken JSON, and for a file without records.
    """
    # Latin-1 gives one character a byte, so offsets are those of the file, and JSON's own marks are
    # ASCII in UTF-8: the limits of the records are the same. The text itself is decoded on access.
    text = path.read_bytes().decode("latin-1")
    position = _skip(text, 3 if text.startswith("\xef\xbb\xbf") else 0)
    scan = _scan_array if text.startswith("[", position) else _scan_lines
    try:
        spans = scan(text, position)
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{path}, line {error.lineno}, column {error.colno}: broken JSON ({error.msg}); "
            "the file must be one array of records, or hold one record a line"
        ) from error
    if not spans:
        raise DatasetError(f"{path} has no records")
    return spans


def _skip(text: str, position: int) -> int:
    found = _BLANK.match(text, position)
    return found.end() if found else position


def _scan_array(text: str, position: int) -> array[int]:
    decode = json.JSONDecoder().raw_decode
    spans = array("q")
    position = _skip(text, position + 1)
    while not text.startswith("]", position):
        if spans:
            if not text.startswith(",", position):
                raise json.JSONDecodeError("Expecting ',' or ']' behind a record", text, position)
            position = _skip(text, position + 1)
        _, end = decode(text, position)
        spans.extend((position, end))
        position = _skip(text, end)
    behind = _skip(text, position + 1)
    if behind < len(text):
        raise json.JSONDecodeError("Something stands behind the array", text, behind)
    return spans


def _scan_lines(text: str, position: int) -> array[int]:
    decode = json.JSONDecoder().raw_decode
    spans = array("q")
    while position < len(text):
        _, end = decode(text, position)
        spans.extend((position, end))
        position = _skip(text, end)
        if position < len(text) and "\n" not in text[end:position]:
            raise json.JSONDecodeError("Something stands behind a record on its line", text, position)
    return spans


def record_id(record: Any, index: int) -> str:
    """The record's ``id`` as a string, or its place in the file."""
    given = record.get("id") if isinstance(record, dict) else None
    return str(index) if given is None or given == "" else str(given)


def image_names(record: dict[str, Any]) -> list[str]:
    """The paths under ``image``: none, one or several."""
    image = record.get("image")
    return [] if image is None else [image] if isinstance(image, str) else list(image)


def turn_of(turn: dict[str, Any]) -> tuple[Any, Any]:
    """Speaker and text of a turn, under the keys of LLaVA or of OpenAI."""
    return turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))


def check_record(record: Any, index: int) -> list[str]:
    """Everything that is wrong with a record, as ``"<kind>: <what>"``; an empty list if nothing is.

    Kinds: ``record`` and ``picture path`` (it cannot be used), ``unknown key``, ``role order`` and
    ``marker count`` (it may become a sample, but hardly the one that was meant).
    """
    if not isinstance(record, dict):
        return [f"record: record {index} is not an object {{...}} but {_kind_of(record)}"]
    known = {*KNOWN_KEYS, "messages"}  # not a key of the format: reported with the right name below
    found = [f"unknown key: '{key}'{suggest(key, KNOWN_KEYS)}" for key in record if key not in known]
    found += check_images(record.get("image"))
    answers = record.get("answers", [])
    if not (isinstance(answers, list) and all(isinstance(answer, str) for answer in answers)):
        found.append("record: `answers` must be a list of strings")
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        hint = ", but `messages`: rename the key" if "messages" in record else ""
        state = "an empty `conversations`" if turns == [] else "no list `conversations`"
        return [*found, f"record: it has {state}{hint}"]
    found += [text for number, turn in enumerate(turns, 1) for text in _check_turn(turn, number)]
    if not any(text.startswith(UNUSABLE) for text in found):
        found += _check_order([ROLES[turn_of(turn)[0]] for turn in turns])
        markers = sum(turn_of(turn)[1].count(IMAGE_MARKER) for turn in turns)
        pictures = len(image_names(record))
        if markers != pictures:
            found.append(f"marker count: {markers} x {IMAGE_MARKER} in the text for {pictures} picture(s)")
    return found


def check_images(image: Any) -> list[str]:
    if image is None:
        return []
    names = [image] if isinstance(image, str) else image
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return [f"record: `image` must be a path or a list of paths, not {_kind_of(image)}"]
    return [f"picture path: {reason}" for name in names if (reason := _untrusted(name))]


def _untrusted(name: str) -> str:
    """Why a path of a record must not be opened, or an empty string."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if not name.strip() or "\0" in name:
        return f"{name!r} is not a path"
    if posix.is_absolute() or windows.drive or windows.root:
        return f"'{name}' is absolute; paths are relative to the folder `images`"
    if ".." in posix.parts or ".." in windows.parts:
        return f"'{name}' leaves the folder `images`"
    return ""


def _check_turn(turn: Any, number: int) -> list[str]:
    if not isinstance(turn, dict):
        return [f"record: turn {number} is not an object {{from, value}} but {_kind_of(turn)}"]
    found = [f"unknown key: '{key}'{suggest(key, TURN_KEYS)} in turn {number}" for key in turn if key not in TURN_KEYS]
    speaker, text = turn_of(turn)
    if not isinstance(speaker, str) or speaker not in ROLES:
        hint = suggest(speaker, ROLES) if isinstance(speaker, str) else ""
        found.append(f"record: turn {number} is from {speaker!r}{hint}; known are {', '.join(ROLES)}")
    if text is None:
        found.append(f"record: turn {number} has no `value`")
    elif not isinstance(text, str):
        found.append(f"record: the `value` of turn {number} is not text but {_kind_of(text)}")
    return found


def _check_order(roles: Sequence[str]) -> list[str]:
    found = [
        f"role order: turn {number} is a system text, which stands first"
        for number, role in enumerate(roles, 1)
        if role == "system" and number > 1
    ]
    spoken = [(number, role) for number, role in enumerate(roles, 1) if role != "system"]
    if not spoken or spoken[0][1] != "user":
        found.append("role order: the first turn is not the user's")
    for (_, before), (number, role) in pairwise(spoken):
        if before == role:
            found.append(f"role order: turn {number} is the {role}'s again")
    if spoken and spoken[-1][1] != "assistant":
        found.append("role order: the last turn is not the assistant's")
    return found


def _kind_of(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
