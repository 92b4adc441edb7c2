"""Whether the files of a dataset lie where its settings say, asked before anything is read.

A dataset of several archives fails halfway into a run when one of them was never unpacked. So all that lacks
is listed at once, each with where it comes from; no folder is listed further than its first entry.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from minivlm.datasets.base import DatasetError
from minivlm.datasets.configs import RecordConfig


def check_layout(name: str, split: str, annotations: Path, images: Path, config: RecordConfig) -> None:
    """Raise :class:`DatasetError` that names every file and folder of a split which is absent or empty."""
    folders = {images / folder: source for folder, source in (config.layout or {}).items() if source}
    lacking = list(_lacking(split, annotations, images, config.source))
    for folder, source in folders.items():
        if not folder.is_dir():
            lacking.append(f"there is no folder {folder}{_from(source)}")
        elif is_empty(folder):
            lacking.append(f"the folder {folder} is empty{_from(source)}")
    if not lacking:
        return
    if len(lacking) == 1 and not folders:
        raise DatasetError(f"dataset '{name}': {lacking[0]}")
    text = "\n  ".join([f"dataset '{name}' is not complete:", *lacking])
    if folders:
        text += "\nif no record needs one of them, leave it out: `layout: {FOLDER: null}`; `layout: null` asks for none"
    raise DatasetError(text)


def _lacking(split: str, annotations: Path, images: Path, source: str | None) -> Iterator[str]:
    if not annotations.is_file():
        yield (
            f"there is no annotation file {annotations} for split '{split}'; "
            f"correct `annotations` or put the file there{_from(source)}"
        )
    if images != annotations.parent or annotations.is_file():
        if not images.is_dir():
            yield f"there is no folder {images}; correct `images`, the folder of the pictures{_from(source)}"
        elif source and is_empty(images):
            yield f"the folder {images} is empty; the pictures belong into it{_from(source)}"


def _from(source: str | None) -> str:
    return f" (from {source})" if source else ""


def is_empty(folder: Path) -> bool:
    """Whether nothing lies in a folder."""
    with os.scandir(folder) as entries:
        return next(entries, None) is None
