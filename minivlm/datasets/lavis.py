"""Datasets of LAVIS, read by its own builders.

LAVIS is only asked when a split is built: what then remains are the texts and the paths of the pictures, which are
opened here like those of every other dataset.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minivlm.datasets.base import DatasetBuilder, DatasetError
from minivlm.datasets.configs import LavisDatasetConfig
from minivlm.datasets.records import check_images
from minivlm.lavis.client import LavisError, absolute, request
from minivlm.registry import suggest
from minivlm.types import IMAGE_MARKER, Message, Sample, SampleError

ANSWERS = ("answers", "answer", "text_output")
RECORDS_PER_REQUEST = 4096


class LavisBuilder(DatasetBuilder[LavisDatasetConfig]):
    """The splits that LAVIS's builder makes (train, val, test)."""

    def __init__(self, config: LavisDatasetConfig, name: str = ""):
        super().__init__(config, name)
        files = config.annotations
        self.spec: dict[str, Any] = {
            "builder": config.builder,
            "config": absolute(config.config) if config.config else None,
            "annotations": files and {split: _absolute(file) for split, file in files.items()},
            "images": absolute(config.images) if config.images else None,
            "text_processor": config.text_processor,
            "options": config.options,
        }
        self._sizes: dict[str, int] | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Number of items of every split; raises :class:`DatasetError` if LAVIS cannot build the dataset."""
        if self._sizes is None:
            self._sizes = self._ask("dataset")["splits"]
        return self._sizes

    @property
    def splits(self) -> Sequence[str]:  # type: ignore[override]
        """What LAVIS's configuration of the dataset names."""
        return tuple(self.sizes)

    def build(self, split: str) -> LavisDataset:
        """The samples of a split; raises :class:`DatasetError` if LAVIS cannot build them."""
        if split not in self.splits:
            raise DatasetError(
                f"dataset '{self.name}' has no split '{split}'{suggest(split, self.splits)}; "
                f"it has: {', '.join(self.splits)}"
            )
        stop = min(self.sizes[split], self.config.max_samples or self.sizes[split])
        records: list[str] = []
        while len(records) < stop:
            end = min(len(records) + RECORDS_PER_REQUEST, stop)
            records += self._ask("records", split=split, start=len(records), stop=end)["records"]
        return LavisDataset(f"{self.config.builder}/{split}", records, self.config.answer, self.spec["images"])

    def _ask(self, command: str, **fields: Any) -> Any:
        try:
            return request(self.config, command, dataset=self.spec, **fields)[0]
        except LavisError as error:
            raise DatasetError(f"dataset '{self.name}': {error}") from error


class LavisDataset(Sequence[Sample]):
    """Items of one split as samples; the records are kept as JSON, which is small and quick to pickle.

    With ``folder``, the absolute path of the pictures, a picture elsewhere is refused.
    """

    def __init__(self, name: str, records: list[str], answer: str | None, folder: str | None = None):
        self.name, self.records, self.answer, self.folder = name, records, answer, folder

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        """Sample ``index``; raises :class:`SampleError` if LAVIS could not read it, or for a wrong picture or text."""
        sample_id = f"{self.name}/{index}"
        record = json.loads(self.records[index])
        if "error" in record:
            raise SampleError(sample_id, f"LAVIS cannot read it: {record['error']}")
        fields = record["fields"]
        images = [Path(path) for path in record["images"]]
        if not images:
            raise SampleError(sample_id, f"LAVIS's item has no picture (its keys: {', '.join(sorted(fields))})")
        if self.folder is not None:
            for complaint in check_images([os.path.relpath(path, self.folder) for path in images]):
                raise SampleError(sample_id, complaint)
        meta = {key: fields[key] for key in ("image_id", "question_id") if key in fields}
        keys = [key for key in ([self.answer] if self.answer else ANSWERS) if fields.get(key) not in (None, "", [])]
        if keys:
            question = str(fields.get("text_input", fields.get("question", "")))
            answers = fields[keys[0]] if isinstance(fields[keys[0]], list) else [fields[keys[0]]]
            answers = [str(answer) for answer in answers]
            turns = [
                Message("user", f"{IMAGE_MARKER * len(images)}\n{question}"),
                Message("assistant", _best(answers, fields)),
            ]
            return Sample(sample_id, turns, list(images), {**meta, "question": question, "answers": answers})
        captions = fields.get("text_input") or fields.get("caption")
        captions = captions if isinstance(captions, list) else [captions]
        if not captions or not isinstance(captions[0], str) or not captions[0].strip():
            raise SampleError(sample_id, f"LAVIS's item has no text (its keys: {', '.join(sorted(fields))})")
        return Sample(sample_id, [Message("assistant", captions[0])], list(images), {**meta, "answers": captions})


def _best(answers: list[str], fields: dict[str, Any]) -> str:
    """The answer with the largest weight; without weights, the most frequent one, and the first of equals."""
    weights = fields.get("weights")
    if isinstance(weights, list) and len(weights) == len(answers):
        return max(zip(answers, weights), key=lambda pair: pair[1])[0]
    return max(answers, key=answers.count)


def _absolute(files: str | list[str]) -> str | list[str]:
    return absolute(files) if isinstance(files, str) else [absolute(file) for file in files]
