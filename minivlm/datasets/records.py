"""Files of records, JSON or JSONL, with pictures in a folder: what all formats of that kind share.

A file is scanned once when it is opened, which finds broken JSON; the records are parsed when they are
asked for, so that a file of any length costs its worker processes 16 bytes a record.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Generic, TypeVar

from minivlm.datasets.base import DatasetBuilder, DatasetError
from minivlm.datasets.configs import RecordConfig
from minivlm.datasets.layout import check_layout
from minivlm.paths import find_respelled
from minivlm.registry import suggest
from minivlm.types import Sample, SampleError

UNUSABLE = ("record", "picture path")
"""Kinds of complaints about a record with which it cannot become a sample."""
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp")

ConfigT = TypeVar("ConfigT", bound=RecordConfig)
_BLANK = re.compile(r"[ \t\r\n]*")


class RecordDataset(Sequence[Sample], Generic[ConfigT]):
    """The records of one file, parsed on access; pickles as paths and byte offsets.

    A subclass states :meth:`complaints` and :meth:`sample`. ``ids`` holds a hash of every record's id, 0 for none,
    in the process that opened the file.
    """

    def __init__(self, path: Path, images: Path, config: ConfigT, name: str):
        self.path = path
        self.images = images
        self.config = config
        self.name = name
        self.ids = array("q")
        self._spans = self.scan()
        self._kept: Sequence[int] = range(len(self.ids))
        if config.skip is not None:
            skipped = _read_ids(Path(config.skip).expanduser())
            numbers = (n for n, known in enumerate(self.ids) if (known or hash(str(n))) not in skipped)
            self._kept = array("q", numbers)
            self.ids = array("q", (self.ids[n] for n in self._kept))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"ids": array("q")}  # hashes of strings mean nothing to another process

    def scan(self) -> array[int]:
        """Where the records are, with their ``ids``; raises :class:`DatasetError` for a file that holds none."""
        return scan_records(self.path, lambda record: self.ids.append(_hash_id(record)))

    def complaints(self, record: Any, index: int) -> list[str]:
        """Everything that is wrong with a record, as ``"<kind>: <what>"``; an empty list if nothing is.

        Those of the kinds :data:`UNUSABLE` keep it from becoming a sample.
        """
        raise NotImplementedError

    def sample(self, record: dict[str, Any], sample_id: str) -> Sample:
        """The sample of a record without unusable parts; raises :class:`SampleError` if it cannot be made."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        """Sample ``index``; raises :class:`SampleError` naming the record and what is wrong."""
        record = self.record(index)
        sample_id = self.sample_id(record, index)
        for complaint in self.complaints(record, index):
            if complaint.startswith(UNUSABLE):
                raise SampleError(sample_id, complaint.partition(": ")[2])
        return self.sample(record, sample_id)

    def record(self, index: int) -> Any:
        """The parsed record ``index``, unchecked."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} records, not one at {index}")
        return self.parse(self._kept[index])

    def parse(self, number: int) -> Any:
        """Record ``number`` of the file."""
        start, end = self._spans[2 * number], self._spans[2 * number + 1]
        try:
            with open(self.path, "rb") as file:
                file.seek(start)
                return json.loads(file.read(end - start).decode("utf-8"))
        except (OSError, ValueError) as error:
            raise SampleError(
                str(number),
                f"cannot be read at byte {start} of {self.path} ({error}); "
                "the file is not UTF-8, or it was changed after it was opened",
            ) from error

    def sample_id(self, record: Any, index: int) -> str:
        """The ``id`` of record ``index``, or its place in the file."""
        return record_id(record, self._kept[index])

    def picture(self, name: str) -> Path:
        """The file of a picture: where it is absent, one under a name of ``renames``, or with another ending.

        Records name every picture of OCR-VQA ``.jpg``, while its loader writes ``.gif`` and ``.png``, too.
        """
        return next((file for file in self._places(name) if os.path.exists(file)), self.images / name)

    def _places(self, name: str) -> Iterator[Path]:
        """Where a picture may lie, none of it outside the folder of the pictures."""
        renamed = (re.sub(pattern, to, name) for pattern, to in self.config.renames.items())
        for each in (name, *(other for other in renamed if not _untrusted(other))):
            path = self.images / each
            yield path
            if path.suffix.lower() in PICTURE_ENDINGS:
                yield from (path.with_suffix(ending) for ending in PICTURE_ENDINGS)

    def check(self, index: int) -> list[str]:
        """What the data doctor asks of a record: :meth:`complaints`, and pictures found under another name."""
        try:
            record = self.record(index)
        except SampleError as error:
            return [f"record: {error.reason}"]
        found = self.complaints(record, index)
        if any(text.startswith(UNUSABLE) for text in found):
            return found
        files = [(self.images / name, self.picture(name)) for name in image_names(record)]
        return found + [_renamed(named, file, self.images) for named, file in files if file != named]


class RecordBuilder(DatasetBuilder[ConfigT]):
    """One annotation file a split; a subclass states the class of its ``dataset``."""

    dataset: type[RecordDataset[ConfigT]]

    @property
    def splits(self) -> Sequence[str]:  # type: ignore[override]
        """The keys of ``annotations``, or ``train`` for a single file."""
        return tuple(self._files())

    def _files(self) -> dict[str, str]:
        given = self.config.annotations
        return dict(given) if isinstance(given, dict) else {"train": given}

    def build(self, split: str) -> RecordDataset[ConfigT]:
        """The records of a split; raises :class:`DatasetError` that names all files and folders which are not there."""
        files = self._files()
        if split not in files:
            raise DatasetError(
                f"dataset '{self.name}' has no split '{split}'{suggest(split, files)}; it has: {', '.join(files)}"
            )
        path = find_respelled(Path(files[split]).expanduser())
        images = path.parent if self.config.images is None else find_respelled(Path(self.config.images).expanduser())
        check_layout(self.name, split, path, images, self.config)
        return self.dataset(path, images, self.config, self.name)


def _renamed(named: Path, file: Path, images: Path) -> str:
    if (named.parent, named.stem) == (file.parent, file.stem):
        return f"other ending: {named} lies there as {file.name}"
    return f"other name: {named} lies there as {file.relative_to(images)}"


def _hash_id(record: Any) -> int:
    """The hash of a record's id as :func:`scan_records` shows it, 0 for a record without one."""
    known = record_id(record, -1)
    if known == "-1":
        return 0
    try:
        known = known.encode("latin-1").decode("utf-8")
    except ValueError:  # it was written in escapes
        pass
    return hash(known) or 1


def _read_ids(path: Path) -> set[int]:
    """The hashes of the ids in a file for ``skip``; raises :class:`DatasetError` if it cannot be read."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        found = [str(json.loads(line)["id"]) if line.startswith("{") else line for line in lines if line]
    except (OSError, ValueError, KeyError) as error:
        raise DatasetError(f"`skip`: {path} is no list of ids, one a line or {{id: ...}} a line ({error!r})") from error
    return {hash(known) or 1 for known in found}


def scan_records(path: Path, each: Callable[[Any], object] = lambda record: None) -> array[int]:
    """First and last byte of every record: ``[start0, end0, start1, end1, ...]``.

    ``each`` is called with every record, in whose strings a character stands for a byte of the file. Raises
    :class:`DatasetError` with the line for broken JSON, and for a file without records.
    """
    # Latin-1 gives one character a byte, so offsets are those of the file, and JSON's own marks are
    # ASCII in UTF-8: the limits of the records are the same. The text itself is decoded on access.
    text = path.read_bytes().decode("latin-1")
    position = _skip(text, 3 if text.startswith("\xef\xbb\xbf") else 0)
    scan = _scan_array if text.startswith("[", position) else _scan_lines
    try:
        spans = scan(text, position, each)
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


def _scan_array(text: str, position: int, each: Callable[[Any], object]) -> array[int]:
    decode = json.JSONDecoder().raw_decode
    spans = array("q")
    position = _skip(text, position + 1)
    while not text.startswith("]", position):
        if spans:
            if not text.startswith(",", position):
                raise json.JSONDecodeError("Expecting ',' or ']' behind a record", text, position)
            position = _skip(text, position + 1)
        record, end = decode(text, position)
        each(record)
        spans.extend((position, end))
        position = _skip(text, end)
    behind = _skip(text, position + 1)
    if behind < len(text):
        raise json.JSONDecodeError("Something stands behind the array", text, behind)
    return spans


def _scan_lines(text: str, position: int, each: Callable[[Any], object]) -> array[int]:
    decode = json.JSONDecoder().raw_decode
    spans = array("q")
    while position < len(text):
        record, end = decode(text, position)
        each(record)
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


def unknown_keys(keys: Iterable[str], known: Sequence[str]) -> list[str]:
    """A complaint for every key that has no meaning."""
    return [f"unknown key: '{key}'{suggest(key, known)}" for key in keys if key not in known]


def check_images(image: Any) -> list[str]:
    """Complaints about the value of ``image``: a path below the folder of the pictures, or a list of them."""
    if image is None:
        return []
    names = [image] if isinstance(image, str) else image
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return [f"record: `image` must be a path or a list of paths, not {kind_of(image)}"]
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


def kind_of(value: Any) -> str:
    """A value of JSON in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
