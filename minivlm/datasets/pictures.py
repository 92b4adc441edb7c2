"""Every picture that the records of a dataset name: whether its file is there, counted by folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from minivlm.datasets.records import UNUSABLE, RecordDataset, image_names
from minivlm.io import write_atomic
from minivlm.types import SampleError

EXAMPLES = 3

Unusable = list[tuple[str, str]]
"""Ids of records and what is wrong with them."""


@dataclass
class FolderCount:
    """The pictures that records name in one folder; ``renamed`` ones are there under another name or ending."""

    found: int = 0
    renamed: int = 0
    missing: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Survey:
    """What :func:`survey` has found, by folder; records that lack a picture or are broken are ``unusable``."""

    records: int = 0
    folders: dict[str, FolderCount] = field(default_factory=dict)
    unusable: Unusable = field(default_factory=list)


def survey(data: RecordDataset[Any], tick: Callable[[int], object] = lambda done: None) -> Survey:
    """Look for the file of every picture; none is opened. ``tick`` is told the number of records that are done.

    A folder is one of ``layout``, or else the first one of a picture's path.
    """
    result = Survey(len(data))
    layout = sorted(data.config.layout or (), key=len, reverse=True)
    for index in range(len(data)):
        sample_id, names, reason = _pictures(data, index)
        for name in names:
            file = data.picture(name)
            count = result.folders.setdefault(_folder(name, layout), FolderCount())
            if os.path.isfile(file):
                count.found += 1
                count.renamed += file != data.images / name
                continue
            count.missing += 1
            reason = reason or f"there is no picture {file}"
            if len(count.examples) < EXAMPLES:
                count.examples.append(f"{name} (sample '{sample_id}')")
        if reason:
            result.unusable.append((sample_id, reason))
        if index % 1000 == 999:
            tick(index + 1)
    return result


def write_unusable(folder: Path, found: Mapping[str, Unusable]) -> list[Path]:
    """Write ids and reasons of each dataset to ``<its key>.jsonl``, which its setting ``skip`` reads.

    Returns the files. The ids of two datasets may be the same, so each has a file of its own.
    """
    files = []
    for key, unusable in found.items():
        if unusable:
            files.append(folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', key)}.jsonl")
            files[-1].parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps({"id": sample_id, "reason": reason}) + "\n" for sample_id, reason in unusable)
            write_atomic(files[-1], "".join(lines))
    return files


def _pictures(data: RecordDataset[Any], index: int) -> tuple[str, list[str], str]:
    """A record's id, its pictures, and why it is unusable without a look at them, if it is."""
    try:
        record = data.record(index)
    except SampleError as error:
        return error.sample_id, [], error.reason
    wrong = [text.partition(": ")[2] for text in data.complaints(record, index) if text.startswith(UNUSABLE)]
    return data.sample_id(record, index), [] if wrong else image_names(record), "; ".join(wrong)


def _folder(name: str, layout: list[str]) -> str:
    path = PurePosixPath(name)
    return next((folder for folder in layout if path.is_relative_to(folder)), path.parts[0] if path.parts[1:] else ".")
