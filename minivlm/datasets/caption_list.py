"""``minivlm prepare-captions``: published lists of ``{url, caption}`` become the TSV that img2dataset downloads.

MiniGPT-4's first stage is described by ``laion_synthetic_filtered_large.json`` and
``ccs_synthetic_filtered_large.json``, which hold many millions of pairs: they are read piece by piece.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from minivlm.datasets.base import DatasetError
from minivlm.io import atomic_file

PIECE = 1 << 20
LONGEST = 1 << 24
"""A record of more characters is no pair of URL and caption, but broken JSON."""


@dataclass
class CaptionCounts:
    """How many pairs were written, and what was left out."""

    written: int = 0
    duplicates: int = 0
    empty: int = 0

    def __str__(self) -> str:
        return (
            f"{self.written:,} pairs written; left out: {self.duplicates:,} with the URL of another, "
            f"{self.empty:,} without URL or caption"
        )


def prepare_captions(inputs: Sequence[Path], output: Path) -> CaptionCounts:
    """Merge lists of ``{url, caption}`` (a JSON array or JSON lines) into ``url<TAB>caption`` with a heading.

    Of several records with one URL the first is kept. A URL takes about 100 bytes of memory. Half a surrogate
    pair becomes a question mark. Raises :class:`DatasetError` naming the file that is missing or broken; ``output``
    is then as it was.
    """
    counts = CaptionCounts()
    known: set[bytes] = set()
    with (
        atomic_file(output) as unfinished,
        unfinished.open("w", encoding="utf-8", errors="replace", newline="") as file,
    ):
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(["url", "caption"])
        for source in inputs:
            for record in records(source):
                url, caption = _field(record, "url"), _field(record, "caption")
                if not url or not caption:
                    counts.empty += 1
                    continue
                digest = hashlib.blake2b(url.encode("utf-8", "replace"), digest_size=8).digest()
                if digest in known:
                    counts.duplicates += 1
                    continue
                known.add(digest)
                table.writerow([url, caption])
                counts.written += 1
        if not counts.written:
            raise DatasetError(f"{', '.join(map(str, inputs))}: no record with `url` and `caption`")
    return counts


def records(file: Path) -> Iterator[Any]:
    """The items of a JSON array, or of JSON lines, one after another.

    Raises :class:`DatasetError` where the file is missing, broken or cut off.
    """
    try:
        with file.open(encoding="utf-8-sig") as stream:
            yield from _items(stream, file)
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{file} cannot be read: {error}") from error


def _items(stream: TextIO, file: Path) -> Iterator[Any]:
    decode = json.JSONDecoder().raw_decode
    text, place, count = stream.read(PIECE), 0, 0
    is_array = text.lstrip().startswith("[")
    place = text.index("[") + 1 if is_array else 0
    while True:
        place = _skip(text, place)
        try:
            if text[place : place + 1] == "]" and is_array:
                break
            item, end = decode(text, place)
            if end == len(text) and not isinstance(item, dict):
                raise ValueError("it may go on")
        except ValueError as error:
            more = stream.read(PIECE) if len(text) - place < LONGEST else ""
            if more:
                text, place = text[place:] + more, 0
                continue
            if not is_array and place == len(text):
                return
            raise DatasetError(f"{file}: broken or cut off behind record {count}: {error}") from error
        yield item
        count, place = count + 1, end
    text = text[place + 1 :]
    while not (behind := text.strip()) and (text := stream.read(PIECE)):
        pass
    if behind:
        raise DatasetError(f"{file}: there is more behind the end of the list: {behind[:40]!r}")


def _skip(text: str, place: int) -> int:
    """The place of the next value: behind blanks and a comma."""
    while text[place : place + 1] in (" ", "\n", "\r", "\t", ","):
        place += 1
    return place


def _field(record: Any, key: str) -> str:
    """A text on one line, or nothing."""
    value = record.get(key) if isinstance(record, dict) else None
    return " ".join(value.split()) if isinstance(value, str) else ""
