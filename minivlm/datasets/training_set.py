"""The training data of a stage: several datasets, numbered through and encoded in worker processes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch.utils.data import Dataset

from minivlm import registry
from minivlm.datasets.base import DatasetBuilder, DatasetError
from minivlm.datasets.loading import load
from minivlm.datasets.sampling import BatchPlan, RankBatches
from minivlm.datasets.streams import SampleStream, ShuffledStream
from minivlm.processors.processor import VLMProcessor
from minivlm.schema import Part
from minivlm.types import Batch, Encoded, Sample, SampleError

MAX_REPLACEMENTS = 100
"""So many bad samples in a row end a run."""


def build_datasets(nodes: Mapping[str, Part]) -> dict[str, DatasetBuilder[Any]]:
    """The dataset builders of section ``datasets``, by the key of their node."""
    return {key: registry.get("dataset", part.name)(part.config, key) for key, part in nodes.items()}


@dataclass
class Source:
    """One split of the dataset ``key`` of an experiment, and how it takes part in the mix."""

    key: str
    samples: Sequence[Sample] | SampleStream
    ratio: float | None = None
    batch_size: int | None = None

    @property
    def sized(self) -> Sequence[Sample]:
        """The samples where a length is needed; raises :class:`DatasetError` for a stream."""
        if isinstance(self.samples, SampleStream):
            raise DatasetError(f"datasets.{self.key} is a stream, which has no length: it can only be trained on")
        return self.samples


def build_split(builders: Mapping[str, DatasetBuilder[Any]], splits: Sequence[str]) -> list[Source]:
    """The samples of every dataset that offers one of the splits.

    Raises :class:`DatasetError` for a split that no dataset offers, for an empty one, and for a stream that is
    to end after ``max_samples``.
    """
    for split in splits:
        if not any(split in builder.splits for builder in builders.values()):
            offered = ", ".join(f"{key}: {'/'.join(b.splits)}" for key, b in builders.items()) or "no datasets"
            raise DatasetError(f"no dataset has a split '{split}' ({offered})")
    found = []
    for key, builder in builders.items():
        for split in splits:
            if split in builder.splits:
                samples = builder.build(split)
                ratio, size, limit = (
                    getattr(builder.config, name, None) for name in ("sample_ratio", "batch_size", "max_samples")
                )
                if isinstance(samples, SampleStream):
                    if limit is not None:
                        raise DatasetError(f"datasets.{key}: a stream has no first samples; leave out max_samples")
                elif len(samples) == 0:
                    raise DatasetError(f"datasets.{key}: split '{split}' is empty")
                elif limit is not None and len(samples) > limit:
                    samples = Head(samples, limit)
                found.append(Source(key, samples, ratio, size))
    return found


def preview(samples: Sequence[Sample] | SampleStream, processor: VLMProcessor, seed: int) -> Iterator[Any]:
    """Samples as training sees them: :class:`Encoded`, or the :class:`SampleError` of a bad one."""
    stream = samples if isinstance(samples, SampleStream) else ShuffledStream(samples)
    for sample in stream.look(MAX_REPLACEMENTS):
        try:
            yield sample if isinstance(sample, SampleError) else processor.encode(sample, seed=hash((seed, 0)))
        except SampleError as error:
            yield error


class Head(Sequence[Sample]):
    """The first samples of a sequence, without copying it."""

    def __init__(self, samples: Sequence[Sample], size: int):
        self.samples, self.size = samples, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < self.size:
            raise IndexError(index)
        return self.samples[index]


class TrainingSet(Dataset[Encoded]):
    """Samples of several sequences as :class:`Encoded`.

    With ``on_bad_sample: skip`` a bad sample is replaced by the next good one and reported in the result's
    ``skipped``, so every batch is full and every process takes as many steps.
    """

    def __init__(self, sources: Sequence[Sequence[Sample]], processor: VLMProcessor, seed: int, on_bad_sample: str):
        self.sources, self.processor, self.seed = list(sources), processor, seed
        self.skips_bad = on_bad_sample == "skip"
        self.ends = list(accumulate(len(source) for source in self.sources))

    def __len__(self) -> int:
        return self.ends[-1]

    def sample(self, index: int) -> Sample:
        """The sample of a number; raises :class:`SampleError` if it cannot be made."""
        k = bisect_right(self.ends, index)
        return self.sources[k][index - (self.ends[k] - len(self.sources[k]))]

    def __getitem__(self, key: tuple[int, int]) -> Encoded:
        index, data_pass = key
        skipped: list[SampleError] = []
        for step in range(min(MAX_REPLACEMENTS, len(self))):
            try:
                sample = self.sample((index + step) % len(self))
                encoded = self.processor.encode(sample, seed=hash((self.seed, data_pass)))
                encoded.skipped = skipped
                return encoded
            except SampleError as error:
                if not self.skips_bad:
                    raise
                skipped.append(error)
        raise DatasetError(f"{len(skipped)} bad samples in a row, the last: {skipped[-1]}")

    def lengths(self) -> list[int]:
        """Length of every sample in characters, pictures counted as their tokens (4 characters each)."""
        image = 4 * self.processor.tokens_per_image
        return [sum(map(len, _texts(sample))) + image * len(sample.images) if sample else 0 for sample in self._all()]

    def signed_lengths(self) -> list[int]:
        """Length of every sample in words and visual tokens, at least 1; negative without pictures (LLaVA-1.5)."""
        result = []
        for sample in self._all():
            words = sum(len(text.split()) for text in _texts(sample)) if sample else 0
            pictures = len(sample.images) if sample else 0
            size = max(words + pictures * self.processor.tokens_per_image, 1)
            result.append(size if pictures or not sample else -size)
        return result

    def _all(self) -> Iterator[Sample | None]:
        """Every sample; None for one that cannot be made."""
        for index in range(len(self)):
            try:
                yield self.sample(index)
            except SampleError:
                yield None


def _texts(sample: Sample) -> list[str]:
    return [message.content or "" for message in sample.messages]


def make_loader(
    data: TrainingSet, plan: BatchPlan, *, start: int, stop: int, rank: int, world: int, workers: int, pin: bool
) -> Generator[Batch]:
    """Batches ``start`` to ``stop`` of a plan for one process, made by ``workers`` processes."""
    batches = RankBatches(plan, start, stop, rank, world)
    return load(_Batches(data), batches, workers=workers, pin=pin, seed=plan.seed)


class _Batches(Dataset[Batch]):
    """The batch of a list of numbers."""

    def __init__(self, data: TrainingSet):
        self.data = data

    def __getitem__(self, keys: list[tuple[int, int]]) -> Batch:
        return self.data.processor.collate([self.data[key] for key in keys])
