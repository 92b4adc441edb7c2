"""Files that are either whole or not there, and sizes for people."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY = ".unfinished-"
"""Prefix of what is still being written; such names are never read and may be deleted."""


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Write into the yielded folder; it becomes ``target`` only when the block ends without an error.

    An old ``target`` stays as it is until then. On an error (a full disk, Ctrl-C) nothing is left behind.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(target)
    unfinished.mkdir()
    replaced = None
    try:
        yield unfinished
        for file in unfinished.rglob("*"):
            if file.is_file():
                sync(file)
        if target.exists():
            replaced = _unfinished(target)
            target.rename(replaced)
        unfinished.rename(target)
        if replaced is not None:
            shutil.rmtree(replaced)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        if replaced is not None and replaced.exists() and not target.exists():
            replaced.rename(target)
        raise


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Write the yielded file; it becomes ``target`` only when the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _unfinished(target)
    try:
        yield unfinished
        sync(unfinished)
        unfinished.replace(target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _unfinished(target: Path) -> Path:
    """A name that no other process takes, on this machine or another one of a shared folder."""
    return target.parent / f"{TEMPORARY}{target.name}-{uuid.uuid4().hex}"


def write_atomic(target: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part."""
    with atomic_file(target) as unfinished:
        if isinstance(content, bytes):
            unfinished.write_bytes(content)
        else:
            unfinished.write_text(content, encoding="utf-8")


def write_json(target: Path, value: Any) -> None:
    """Write JSON atomically, readable and with full precision."""
    write_atomic(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def readable_size(number: float) -> str:
    """Bytes in GiB, MiB or KiB."""
    if number >= 2**30 / 10:
        return f"{number / 2**30:.2f} GiB"
    return f"{number / 2**20:.1f} MiB" if number >= 2**20 / 10 else f"{number / 2**10:.1f} KiB"


def sync(file: Path) -> None:
    """Make sure that the content of a file has reached the disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
