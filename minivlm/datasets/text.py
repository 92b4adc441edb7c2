"""Plain texts to train a language model on: ``.txt`` files with a text a line, ``.jsonl`` files of ``{text}``.

A text is a sample of its own, between begin and end token (template ``text``). Nothing is packed: texts of similar
length come into one batch (``run.group_by_length``), so no text sees another one, and little of a batch is padding.
"""

from __future__ import annotations

import json
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from minivlm.datasets.base import DatasetBuilder, DatasetError
from minivlm.datasets.configs import TextConfig
from minivlm.datasets.records import kind_of
from minivlm.paths import find_respelled
from minivlm.registry import suggest
from minivlm.types import Message, Sample, SampleError

ENDINGS = (".txt", ".jsonl")
_END = -1
"""Stands for the last character of a text that is not cut."""
_BLANKS = re.compile(r"\s*")
_BREAKS = tuple(re.compile(pattern) for pattern in (r"\n\s*\n\s*", r"\s*\n\s*", r"\s+"))
"""Where a text is cut, the better places first: blank line, line break, blank."""


class TextFile(Sequence[Sample]):
    """The texts of one file, read on access; pickles as a path and 32 bytes a sample.

    Of a text that is cut every piece is a sample. Raises :class:`DatasetError` when it is opened for broken JSON and
    for a file without texts, :class:`SampleError` on access for a text that cannot be used, with its line.
    """

    def __init__(self, path: Path, max_characters: int | None, name: str):
        self.path, self.limit, self.name = path, max_characters, name
        self._is_json = path.suffix.lower() == ".jsonl"
        spans = _scan_lines(path, self._is_json)
        if not spans:
            raise DatasetError(f"{path} has no texts")
        self._index = array("q")
        """Of every sample the first and last byte of its line, the first and last character of its piece."""
        with path.open("rb") as file:
            for start, end in zip(spans[::2], spans[1::2], strict=True):
                for piece in self._pieces(file, start, end):
                    self._index.extend((start, end, *piece))

    def __len__(self) -> int:
        return len(self._index) // 4

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} texts, not one at {index}")
        start, end, first, last = self._index[4 * index : 4 * index + 4]
        sample_id = f"{self.name}/{self.path.name}/{index}"
        try:
            with self.path.open("rb") as file:
                text = self._read(file, start, end)
        except (OSError, ValueError) as error:
            raise SampleError(sample_id, f"{self.path}, line {self._line(start)}: {error}") from error
        return Sample(sample_id, [Message("assistant", text if last == _END else text[first:last])])

    def _pieces(self, file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The pieces of the text between two bytes; one that cannot be read is whole, and tells so on access."""
        if self.limit is not None and end - start > self.limit:  # it has no more characters than bytes
            try:
                return cut(self._read(file, start, end), self.limit)
            except ValueError:
                pass
        return iter([(0, _END)])

    def _read(self, file: BinaryIO, start: int, end: int) -> str:
        """The text between two bytes; raises ValueError for what is none."""
        file.seek(start)
        text: Any = file.read(end - start).decode("utf-8")
        if self._is_json:
            record = json.loads(text)
            text = record.get("text") if isinstance(record, dict) else None
            if not isinstance(text, str):
                keys = f" with {', '.join(record)}" if isinstance(record, dict) else ""
                raise ValueError(f"a record {{text: ...}} is wanted, not {kind_of(record)}{keys}")
        text.encode("utf-8")  # JSON can write half a character, which no tokenizer takes
        if not text.strip():
            raise ValueError("the text is empty")
        return text

    def _line(self, start: int) -> int:
        with self.path.open("rb") as file:
            return file.read(start).count(b"\n") + 1


class TextDataset(Sequence[Sample]):
    """The texts of several files, one after the other."""

    def __init__(self, files: Sequence[TextFile]):
        self.files = list(files)
        self._ends = list(accumulate(map(len, files)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        k = bisect_right(self._ends, index)
        return self.files[k][index - (self._ends[k] - len(self.files[k]))]


class TextBuilder(DatasetBuilder[TextConfig]):
    """Files of texts, one or several a split."""

    @property
    def splits(self) -> Sequence[str]:  # type: ignore[override]
        """The keys of ``annotations``, or ``train`` for files without a split."""
        return tuple(self._files())

    def build(self, split: str) -> TextDataset:
        """The texts of a split; raises :class:`DatasetError` for files that are not there or hold no texts."""
        files = self._files()
        if split not in files:
            raise DatasetError(
                f"dataset '{self.name}' has no split '{split}'{suggest(split, files)}; it has: {', '.join(files)}"
            )
        paths = [find_respelled(Path(name).expanduser()) for name in files[split]]
        for path in paths:
            if path.suffix.lower() not in ENDINGS:
                raise DatasetError(f"dataset '{self.name}': {path} does not end with {' or '.join(ENDINGS)}")
            if not path.is_file():
                raise DatasetError(f"dataset '{self.name}': there is no file {path}")
        if not paths:
            raise DatasetError(f"dataset '{self.name}': split '{split}' names no files")
        return TextDataset([TextFile(path, self.config.max_characters, self.name) for path in paths])

    def _files(self) -> dict[str, list[str]]:
        given = self.config.annotations
        by_split = given if isinstance(given, dict) else {"train": given}
        return {split: [files] if isinstance(files, str) else list(files) for split, files in by_split.items()}


def cut(text: str, limit: int) -> Iterator[tuple[int, int]]:
    """First and last character of pieces of at most ``limit``; blanks and line breaks between them are left out.

    A piece ends at the last blank line in its second half, else line break, else blank, else at the limit.
    """
    start = _skip(text, 0)
    while start < len(text):
        end = start + limit
        if end < len(text):
            found = ([m.start() for m in p.finditer(text, start + limit // 2, end + 1)] for p in _BREAKS)
            end = next((places[-1] for places in found if places), end)
        yield start, start + len(text[start:end].rstrip())
        start = _skip(text, end)


def _skip(text: str, start: int) -> int:
    found = _BLANKS.match(text, start)
    return found.end() if found else start


def _scan_lines(path: Path, is_json: bool) -> array[int]:
    """First and last byte of every line that holds more than blanks; the file is never in memory as a whole."""
    spans, position = array("q"), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            first = position + (3 if position == 0 and line.startswith(b"\xef\xbb\xbf") else 0)
            last = position + len(line.rstrip(b"\r\n"))
            if (content := line[first - position :]).strip():
                if is_json:
                    _check_json(content, f"{path}, line {number}")
                spans.extend((first, last))
            position += len(line)
    return spans


def _check_json(line: bytes, where: str) -> None:
    try:
        json.loads(line.decode("latin-1"))  # whether its strings are UTF-8 shows on access
    except ValueError as error:
        raise DatasetError(f"{where}: broken JSON ({error}); the file must hold one record a line") from error
