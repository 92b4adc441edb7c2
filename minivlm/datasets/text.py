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
from typing import Any

from minivlm.datasets.base import DatasetBuilder, DatasetError
from minivlm.datasets.configs import TextConfig
from minivlm.datasets.records import kind_of, scan_records
from minivlm.paths import find_respelled
from minivlm.registry import suggest
from minivlm.types import Message, Sample, SampleError

ENDINGS = (".txt", ".jsonl")
_BREAKS = tuple(re.compile(pattern) for pattern in (r"\n\s*\n\s*", r"\s*\n\s*", r"\s+"))
"""Where a text is cut, the better places first: blank line, line break, blank."""


class TextFile(Sequence[Sample]):
    """The texts of one file, read on access; pickles as a path and 24 bytes a sample.

    Of a text that is cut into pieces every piece is a sample. Raises :class:`DatasetError` when it is opened for broken
    JSON and for a file without texts, :class:`SampleError` on access for a text that cannot be used, with its line.
    """

    def __init__(self, path: Path, max_characters: int | None, name: str):
        self.path, self.limit, self.name = path, max_characters, name
        self._is_json = path.suffix.lower() == ".jsonl"
        spans = scan_records(path) if self._is_json else _scan_lines(path)
        if not spans:
            raise DatasetError(f"{path} has no texts")
        self._index = array("q")
        """First byte, last byte and number of the piece of every sample."""
        with path.open("rb") as file:
            for start, end in zip(spans[::2], spans[1::2], strict=True):
                for piece in range(self._count(file, start, end)):
                    self._index.extend((start, end, piece))

    def __len__(self) -> int:
        return len(self._index) // 3

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} texts, not one at {index}")
        start, end, piece = self._index[3 * index : 3 * index + 3]
        sample_id = f"{self.name}/{self.path.name}/{index}"
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                pieces = self._pieces(file.read(end - start))
            return Sample(sample_id, [Message("assistant", pieces[piece])])
        except (OSError, ValueError, IndexError) as error:
            raise SampleError(sample_id, f"{self.path}, line {self._line(start)}: {error}") from error

    def _count(self, file: Any, start: int, end: int) -> int:
        """How many pieces the text between two bytes has; a text that cannot be read is one, which tells so later."""
        if self.limit is None or end - start <= self.limit:
            return 1  # it has no more characters than bytes
        file.seek(start)
        try:
            return len(self._pieces(file.read(end - start)))
        except ValueError:
            return 1

    def _pieces(self, content: bytes) -> list[str]:
        """The text of a line in pieces; raises ValueError for what is no text."""
        text: Any = content.decode("utf-8")
        if self._is_json:
            record = json.loads(text)
            text = record.get("text") if isinstance(record, dict) else None
            if not isinstance(text, str):
                keys = f" with {', '.join(record)}" if isinstance(record, dict) else ""
                raise ValueError(f"a record {{text: ...}} is wanted, not {kind_of(record)}{keys}")
        text.encode("utf-8")  # JSON can write half a character, which no tokenizer takes
        if not text.strip():
            raise ValueError("the text is empty")
        return [text] if self.limit is None else list(cut(text, self.limit))

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


def cut(text: str, limit: int) -> Iterator[str]:
    """Pieces of at most ``limit`` characters; each ends at the last blank line, else line break, else blank in it.

    A piece has at least half of ``limit`` characters, but the last. What stands at a cut, blanks and line breaks, is
    left out.
    """
    text = text.strip()
    while len(text) > limit:
        end, begin = _place(text, limit)
        yield text[:end]
        text = text[begin:]
    if text:
        yield text


def _place(text: str, limit: int) -> tuple[int, int]:
    """Where the next piece ends and where the one behind it begins."""
    for pattern in _BREAKS:
        places = [m for m in pattern.finditer(text, limit // 2, limit + 1)]
        if places:
            start = places[-1].start()
            rest = text[start:]
            return start, start + len(rest) - len(rest.lstrip())
    return limit, limit


def _scan_lines(path: Path) -> array[int]:
    """First and last byte of every line that holds more than blanks."""
    spans, position = array("q"), 0
    with path.open("rb") as file:
        for line in file:
            first = position + (3 if position == 0 and line.startswith(b"\xef\xbb\xbf") else 0)
            last = position + len(line.rstrip(b"\r\n"))
            if line[first - position :].strip():
                spans.extend((first, last))
            position += len(line)
    return spans
