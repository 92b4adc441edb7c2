"""Conversations in parquet with their pictures inside, as the newest MiniMind-V has them.

A row is a record of LLaVA's format: ``conversations`` as JSON text or as a list, and under ``image_bytes`` an
encoded picture or a list of them. A row is read with its whole row group, so groups should be small::

    python -m minivlm.datasets.parquet SOURCE TARGET    # the same rows in groups of 64
"""

from __future__ import annotations

import io
import json
import os
import sys
from array import array
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL import Image

from minivlm.datasets.base import DatasetError
from minivlm.datasets.configs import ParquetChatConfig
from minivlm.datasets.llava_json import KNOWN_KEYS, LlavaJsonDataset, check_record, renamed, turn_of
from minivlm.datasets.records import RecordBuilder, image_names
from minivlm.io import atomic_file, readable_size
from minivlm.types import IMAGE_MARKER, SampleError

PICTURES = "image_bytes"
"""Column of the pictures."""
COLUMNS = (*KNOWN_KEYS, PICTURES)
NO_PICTURE = 8
"""A row of text alone holds a black picture of so many pixels a side."""
ROWS = 64
"""Rows of a group that :func:`recut` writes: a few MB of pictures of 256 x 256."""


class StoredPicture(io.BytesIO):
    """An encoded picture in memory that says in messages where it comes from."""

    def __init__(self, content: bytes, origin: str):
        super().__init__(content)
        self.origin = origin

    def __repr__(self) -> str:
        return self.origin


class ParquetChatDataset(LlavaJsonDataset):
    """The rows of one file, read group by group on access; pickles as path and lengths of the groups.

    Every process keeps the groups it read last, as many as fit into ``memory_mb``.
    """

    config: ParquetChatConfig

    def scan(self) -> array[int]:
        """Last row (exclusive) of every row group."""
        metadata = _open(self.path, self.name).metadata
        names = {metadata.schema.column(number).path.split(".")[0] for number in range(metadata.num_columns)}
        if "conversations" not in names:
            raise DatasetError(f"{self.path} has no column `conversations`; it has: {', '.join(sorted(names))}")
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        if not metadata.num_rows:
            raise DatasetError(f"{self.path} has no records")
        size, limit = max(group.total_byte_size for group in groups), self.config.memory_mb * 2**20
        if size > limit:
            raise DatasetError(
                f"{self.path}: a row group has {readable_size(size)}, and a record is read with its whole group; write "
                f"it in small groups (python -m minivlm.datasets.parquet {self.path} TARGET), or raise memory_mb"
            )
        self.columns = [name for name in COLUMNS if name in names]
        self._forget()
        self.ids = array("q", (0 for _ in range(metadata.num_rows)))  # rows are known by their places
        return array("q", accumulate(group.num_rows for group in groups))

    def _forget(self) -> None:
        self._file: Any = None
        self._process = 0
        self._groups: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_file": None, "_process": 0, "_groups": OrderedDict()}

    def parse(self, index: int) -> Any:
        """The row ``index`` as a record, unchecked; a blank picture of a text without markers is left out."""
        number = bisect_right(self._spans, index)
        row = index - (self._spans[number - 1] if number else 0)
        group = self._group(number, index)
        record = {name: group[name][row].as_py() for name in self.columns}
        record = {name: value for name, value in record.items() if value is not None}
        turns = record.get("conversations")
        try:
            record |= {"conversations": json.loads(turns)} if isinstance(turns, str) else {}
        except ValueError as error:
            raise SampleError(str(index), f"`conversations` of row {index} is not JSON: {error}") from error
        return _without_blank(renamed(record, self.config))

    def _group(self, number: int, index: int) -> Any:
        """A row group, from memory or from the file."""
        if self._process != os.getpid():  # a file opened before a fork is that of the parent
            self._forget()
            self._process, self._file = os.getpid(), _open(self.path, self.name)
        if number in self._groups:
            self._groups.move_to_end(number)
            return self._groups[number]
        try:
            # threads of the parent process do not live on in a loading process
            table = self._file.read_row_group(number, columns=self.columns, use_threads=False)
        except (OSError, ValueError) as error:  # Arrow's own errors are both
            raise SampleError(str(index), f"row group {number} of {self.path} cannot be read: {error}") from error
        self._groups[number] = table
        while len(self._groups) > 1 and sum(t.nbytes for t in self._groups.values()) > self.config.memory_mb * 2**20:
            self._groups.popitem(last=False)
        return table

    def complaints(self, record: Any, index: int) -> list[str]:
        """As of LLaVA's records, and whether the pictures are bytes."""
        encoded = _encoded(record)
        rest = {key: value for key, value in record.items() if key != PICTURES}
        found = check_record(rest, index, len(encoded) + len(image_names(rest)))
        if not all(isinstance(picture, bytes) and picture for picture in encoded):
            found.append(f"record: `{PICTURES}` must be an encoded picture or a list of them")
        return found

    def pictures(self, record: dict[str, Any], sample_id: str) -> list[Any]:
        """The pictures inside the row, then those it names."""
        origin = f"of sample '{sample_id}' in {self.path}"
        inside = [StoredPicture(content, f"{k} {origin}") for k, content in enumerate(_encoded(record), 1)]
        return [*inside, *super().pictures(record, sample_id)]


class ParquetChatBuilder(RecordBuilder[Any]):
    """Conversations with pictures inside, one parquet file a split."""

    dataset = ParquetChatDataset


def _open(path: Path, name: str) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DatasetError(f"dataset '{name}': parquet needs pyarrow; run pip install \"minivlm[parquet]\"") from error
    try:
        return parquet.ParquetFile(path, memory_map=True)
    except (OSError, ArrowException) as error:
        raise DatasetError(f"{path} is no parquet file that can be read: {error}") from error


def _encoded(record: dict[str, Any]) -> list[Any]:
    pictures = record.get(PICTURES)
    return [] if pictures is None else pictures if isinstance(pictures, list) else [pictures]


def _without_blank(record: dict[str, Any]) -> dict[str, Any]:
    """The record without the picture that fills the column of a row of text alone."""
    encoded, turns = _encoded(record), record.get("conversations")
    texts = [turn_of(turn)[1] for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    if len(encoded) != 1 or any(IMAGE_MARKER in text for text in texts if isinstance(text, str)):
        return record
    return {key: value for key, value in record.items() if key != PICTURES} if _is_blank(encoded[0]) else record


def _is_blank(content: Any) -> bool:
    try:
        with Image.open(io.BytesIO(content)) as picture:
            return max(picture.size) <= NO_PICTURE and not picture.convert("L").getbbox()
    except (OSError, TypeError, ValueError, SyntaxError):  # no picture, of which is told later
        return False


def recut(source: Path, target: Path, rows: int = ROWS) -> None:
    """Write the rows of a parquet file anew in row groups of ``rows``; pictures are not compressed a second time.

    Raises :class:`DatasetError` for a file that cannot be read.
    """
    file = _open(source, str(source))
    from pyarrow import parquet

    with (
        atomic_file(target) as unfinished,
        parquet.ParquetWriter(unfinished, file.schema_arrow, compression="none") as out,
    ):
        for batch in file.iter_batches(rows):
            out.write_batch(batch, row_group_size=rows)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m minivlm.datasets.parquet SOURCE TARGET")
    try:
        recut(Path(sys.argv[1]), Path(sys.argv[2]))
    except DatasetError as problem:
        sys.exit(str(problem))
