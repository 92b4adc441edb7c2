"""The files of ``minivlm generate``: pictures or records that ask, and the answers to them, one a line."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from minivlm.datasets.base import DatasetError
from minivlm.datasets.records import check_images, image_names, scan_records
from minivlm.io import write_atomic
from minivlm.types import Message, Sample, SampleError

PICTURES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"))
"""Names of files that count as pictures in a folder."""
RESULTS = ("answer", "error")
"""The keys that a line of the output adds to its record."""

Record = dict[str, Any]


def read_records(source: Path, prompt: str) -> list[Record]:
    """The records ``{image, prompt, ...}`` of a folder of pictures, at any depth, or of a JSON or JSONL file.

    A record that has neither ``prompt`` nor ``question`` gets ``prompt``. Raises :class:`DatasetError` for what
    is not there, is empty or cannot be read.
    """
    if source.is_dir():
        files = sorted(file.relative_to(source) for file in source.rglob("*") if file.suffix.lower() in PICTURES)
        records = [{"image": file.as_posix()} for file in files if not any(part[0] == "." for part in file.parts)]
        if not records:
            raise DatasetError(f"there is no picture in {source} ({', '.join(sorted(PICTURES))})")
    elif source.is_file():
        records = list(_parse(source))
    else:
        raise DatasetError(f"--input: there is neither a folder nor a file {source}")
    return [
        record if "prompt" in record or "question" in record else {**record, "prompt": prompt} for record in records
    ]


def _parse(file: Path) -> Iterator[Record]:
    spans = scan_records(file)
    content = file.read_bytes()
    for number, (start, end) in enumerate(zip(spans[::2], spans[1::2], strict=True), 1):
        try:
            record = json.loads(content[start:end].decode("utf-8"))
        except ValueError as error:
            raise DatasetError(f"{file}, record {number}: {error}") from error
        if not isinstance(record, dict):
            raise DatasetError(f"{file}, record {number} is not an object {{...}}")
        if taken := [key for key in RESULTS if key in record]:
            raise DatasetError(f"{file}, record {number} has a key '{taken[0]}', which the output needs; rename it")
        yield record


def record_name(number: int, record: Record) -> str:
    """What messages call a record: its place, and its id or picture."""
    label = record.get("id", record.get("image"))
    return f"record {number + 1}" + (f" ({label})" if label else "")


def to_sample(name: str, record: Record, images: Path, with_images: Any, *, sees: bool = True) -> Sample:
    """The sample of a record; ``with_images(text, count)`` gives a text its markers.

    Only for a model that ``sees`` must a record say that there is no picture. Raises :class:`SampleError` for one
    without text or without a word of pictures, or with a path that leaves ``images``.
    """
    if "image" not in record and not sees:
        record = {**record, "image": []}
    if "image" not in record:
        raise SampleError(name, "it has no `image` (a path, a list of paths, or [] for none)")
    for finding in check_images(record["image"]):
        raise SampleError(name, finding.partition(": ")[2])
    text = record.get("prompt", record.get("question"))
    if not isinstance(text, str) or not text.strip():
        raise SampleError(name, "its `prompt` is not a text")
    paths: list[Any] = [images / path for path in image_names(record)]
    return Sample(name, [Message("user", with_images(text, len(paths)))], paths)


class AnswerFile:
    """The output. Lines are written as they come; :meth:`finish` puts them into the order of the records.

    What an earlier run has answered is kept, what failed is to be done again if it is still there, and a last line
    that was cut off is dropped. Raises :class:`DatasetError` if the file holds something else than answers to these
    records. ``facts`` are keys of what a line may say of its answer. An answer that differs from its record
    in ``versions`` alone, keys of the record, is of another time: it is dropped and counted in ``outdated``.
    """

    def __init__(self, path: Path, records: list[Record], facts: tuple[str, ...] = (), versions: tuple[str, ...] = ()):
        self.path = path
        self.records = records
        self._added = (*RESULTS, *facts)
        self._versions = versions
        self.failed: dict[int, str] = {}
        self.outdated = 0
        self._lines: dict[int, str] = {}
        self._file: IO[str] | None = None
        if path.exists():
            self._read()

    @property
    def todo(self) -> list[int]:
        """Numbers of the records that have no answer yet."""
        return [number for number in range(len(self.records)) if number not in self._lines]

    def lines(self) -> list[Record | None]:
        """The line of every record, None where there is none."""
        return [json.loads(self._lines[n]) if n in self._lines else None for n in range(len(self.records))]

    def __enter__(self) -> AnswerFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            write_atomic(self.path, "".join(self._lines.values()))  # without failures and the half line
        self._file = open(self.path, "a", encoding="utf-8", newline="\n")
        return self

    def __exit__(self, *error: object) -> None:
        assert self._file is not None
        self._file.close()

    def add(self, number: int, key: str, text: str, **facts: Any) -> None:
        """Write the line of a record with its ``answer`` or ``error``; it survives a kill."""
        assert self._file is not None
        if key == "error":
            self.failed[number] = text
        self._lines[number] = json.dumps({**self.records[number], key: text, **facts}, ensure_ascii=False) + "\n"
        self._file.write(self._lines[number])
        self._file.flush()

    def finish(self) -> None:
        """Put the lines into the order of the records."""
        if list(self._lines) != sorted(self._lines):
            write_atomic(self.path, "".join(self._lines[number] for number in sorted(self._lines)))

    def _failed_before(self, line: Record) -> bool:
        """Whether a line tells of a failure with a record that is no longer there, as a broken picture."""
        return "error" in line and line.keys() - self._added == self.records[0].keys()

    def _key(self, line: Record) -> str:
        """What makes the record of a line the same."""
        return json.dumps({k: line[k] for k in line if k not in (*self._added, *self._versions)}, sort_keys=True)

    def _read(self) -> None:
        numbers = defaultdict(list)
        for number, record in reversed(list(enumerate(self.records))):
            numbers[self._key(record)].append(number)
        *lines, rest = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        if rest and not _is_cut_off(rest):
            lines.append(rest)
        for line in lines:
            try:
                found = json.loads(line)
                number = numbers[self._key(found)].pop()
            except (ValueError, TypeError, IndexError) as error:
                if isinstance(error, IndexError) and self._failed_before(found):
                    continue
                raise DatasetError(
                    f"--output: {self.path} holds what is no answer to these records: {line.strip()[:200]}\n"
                    "name another output, or delete that file if it was made with other input, prompts or flags"
                ) from error
            if any(found.get(key) != self.records[number].get(key) for key in self._versions):
                self.outdated += "answer" in found
            elif "answer" in found:
                self._lines[number] = f"{line}\n"


def _is_cut_off(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return line.startswith("{")
    return False
