"""The data of MiniGPT-4's second stage: ``filter_cap.json`` and ``image/<image_id>.jpg``.

``{"annotations": [{"image_id": "2", "caption": "..."}]}``, or the bare list. A sample holds the caption
alone; the prompt is drawn from ``model.processor.prompts``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minivlm.datasets.base import DatasetBuilder, DatasetError
from minivlm.datasets.configs import CCSBUAlignConfig
from minivlm.registry import suggest
from minivlm.types import Message, Sample, SampleError


class CCSBUAlignBuilder(DatasetBuilder[CCSBUAlignConfig]):
    """One split, ``train``."""

    def build(self, split: str) -> CCSBUAlignDataset:
        """The samples; raises :class:`DatasetError` if a file is missing, broken or empty."""
        if split not in self.splits:
            raise DatasetError(
                f"dataset '{self.name}' has no split '{split}'{suggest(split, self.splits)}; it has: train"
            )
        folder = Path(self.config.storage).expanduser()
        file = folder / "filter_cap.json"
        for needed in (file, folder / "image"):
            if not needed.exists():
                raise DatasetError(
                    f"dataset '{self.name}': there is no {needed}; `storage` must be the folder with filter_cap.json "
                    "and the pictures image/<image_id>.jpg"
                )
        return CCSBUAlignDataset(folder, read_captions(file))


class CCSBUAlignDataset(Sequence[Sample]):
    """Pictures with one long caption each."""

    def __init__(self, folder: Path, records: list[Any]):
        self.folder = folder
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        """Sample ``index``; raises :class:`SampleError` for a record without picture or caption."""
        record = self.records[index]
        image_id = record.get("image_id") if isinstance(record, dict) else None
        if isinstance(image_id, bool) or not isinstance(image_id, (str, int)) or image_id == "":
            raise SampleError(str(index), "it has no `image_id`, the name of its picture without .jpg")
        name = str(image_id)
        if any(mark in name for mark in "/\\:\0"):
            raise SampleError(name, "its `image_id` is no plain name")
        caption = record.get("caption")
        if not isinstance(caption, str) or not caption.strip():
            raise SampleError(name, "it has no `caption`")
        return Sample(name, [Message("assistant", caption)], [self.folder / "image" / f"{name}.jpg"])


def read_captions(file: Path) -> list[Any]:
    """The records of a file of captions; raises :class:`DatasetError` for broken JSON and another layout."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{file} cannot be read: {error}") from error
    records = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(records, list):
        raise DatasetError(f"{file}: expected {{'annotations': [{{image_id, caption}}, ...]}} or the bare list")
    if not records:
        raise DatasetError(f"{file} has no records")
    return records
