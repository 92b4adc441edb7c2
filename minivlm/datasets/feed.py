"""What a process trains on: batches from any place on, and what a checkpoint must keep to find it again."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from minivlm.config.experiment import RunConfig
from minivlm.config.global_batch import accumulation, describe_global_batch
from minivlm.datasets.base import DatasetError
from minivlm.datasets.grouping import in_order, interleaved, longest_first
from minivlm.datasets.loading import load
from minivlm.datasets.sampling import BatchPlan, ModalityPlan
from minivlm.datasets.streams import Cursor, Lane, SampleStream, ShuffledStream
from minivlm.datasets.training_set import MAX_REPLACEMENTS, Source, TrainingSet, make_loader
from minivlm.processors.processor import VLMProcessor
from minivlm.types import Batch, Encoded, SampleError

LEFT_OVERS = {"imp": interleaved, "imp_v1": longest_first}
"""By ``run.compat``: how the left-overs of both modalities are joined; others: as LLaVA-1.5 does."""
STREAM_EPOCH = 10_000
"""Optimiser steps of an epoch of a stream, as in MiniGPT-4."""


class Feed:
    """The micro batches of one process, numbered through from the start of the training.

    ``size`` counts the samples of a pass (None: there is a stream). ``signature`` tells apart what changes the
    content of batches: a checkpoint of another one cannot be continued. ``accumulation`` counts the micro batches
    of an optimiser step.
    """

    size: int | None
    accumulation: int
    signature: str
    steps_per_epoch: int

    def batches(self, start: int, stop: int) -> Generator[Batch]:
        """Batches ``start`` to ``stop``; with ``start`` > 0 the state of that place must have been restored.

        Close the generator: its loading processes end with it.
        """
        raise NotImplementedError

    def state(self) -> Any:
        """What this process must know, beside their number, to go on behind the batches given so far."""
        return None

    def restore(self, state: Any) -> None:
        """Take over a :meth:`state`."""

    def describe(self) -> str:
        """Size and batches in a few words."""
        raise NotImplementedError


def make_feed(
    sources: Sequence[Source],
    processor: VLMProcessor,
    run: RunConfig,
    *,
    rank: int = 0,
    world: int = 1,
    pin: bool = False,
) -> Feed:
    """The feed of process ``rank`` of ``world``; raises :class:`DatasetError` for data too small for a batch."""
    streams = [source.key for source in sources if isinstance(source.samples, SampleStream)]
    if streams and run.group_by_modality_length:
        raise DatasetError(
            f"run.group_by_modality_length needs datasets with a length; {', '.join(streams)} is a stream"
        )
    streamed = run.mix == "batch" or streams
    return (StreamedFeed if streamed else PlannedFeed)(sources, processor, run, rank, world, pin)


class PlannedFeed(Feed):
    """Datasets with a length: every batch is looked up in a plan, so its number is all the state there is."""

    def __init__(
        self, sources: Sequence[Source], processor: VLMProcessor, run: RunConfig, rank: int, world: int, pin: bool
    ):
        self.run, self.rank, self.world, self.pin = run, rank, world, pin
        self.data = TrainingSet([source.sized for source in sources], processor, run.seed, run.on_bad_sample)
        self.size = len(self.data)
        sizes = [len(source.sized) for source in sources]
        self.accumulation = accumulation(run, world)
        self.signature = f"{sizes} {run.batch_size_train * world} {run.seed} "
        if run.group_by_modality_length:
            self.plan: BatchPlan = self._modality_plan(sizes, sources)
            self.signature += f"by modality {self.accumulation} {run.compat if run.compat in LEFT_OVERS else 'llava'}"
        else:
            self.plan = BatchPlan(sizes, run.batch_size_train * world, run.seed, sample_ratios(sources))
            self.signature += f"{self.plan.ratios} {run.group_by_length}"
        self.steps_per_epoch = run.iters_per_epoch or max(self.plan.batches_per_pass // self.accumulation, 1)

    def _modality_plan(self, sizes: list[int], sources: Sequence[Source]) -> ModalityPlan:
        drawn = [f"datasets.{source.key}.sample_ratio" for source in sources if source.ratio]
        if drawn:
            raise DatasetError(
                f"run.group_by_modality_length takes every sample once a pass; leave out it or {', '.join(drawn)}"
            )
        return ModalityPlan(
            sizes,
            self.run.batch_size_train,
            self.run.seed,
            processes=self.world,
            accumulation=self.accumulation,
            join=LEFT_OVERS.get(self.run.compat or "", in_order),
        )

    def batches(self, start: int, stop: int) -> Generator[Batch]:
        """Batches of the plan."""
        by_modality = self.run.group_by_modality_length
        if self.plan.lengths is None and (by_modality or self.run.group_by_length):
            self.plan.lengths = self.data.signed_lengths() if by_modality else self.data.lengths()
        yield from make_loader(
            self.data,
            self.plan,
            start=start,
            stop=stop,
            rank=self.rank,
            world=self.world,
            workers=self.run.num_workers,
            pin=self.pin,
        )

    def describe(self) -> str:
        """Size and batches in a few words."""
        return f"{self.size:,} samples; {describe_global_batch(self.run, self.world)}"


class StreamedFeed(Feed):
    """Streams, and datasets with a length as streams: each batch comes from one, drawn on every process by itself.

    Batch ``n`` of a process is read in lane ``n % workers``; the cursors of a lane travel with its batches.
    """

    def __init__(
        self, sources: Sequence[Source], processor: VLMProcessor, run: RunConfig, rank: int, world: int, pin: bool
    ):
        self.sources, self.processor, self.run = sources, processor, run
        self.rank, self.world, self.pin = rank, world, pin
        self.workers = max(run.num_workers, 1)
        self.ratios = sample_ratios(sources) or [1.0] * len(sources)
        self.batch_sizes = [source.batch_size or run.batch_size_train for source in sources]
        self.accumulation = accumulation(run, world)
        self._refuse_other_sizes()
        self.streams = [
            source.samples if isinstance(source.samples, SampleStream) else ShuffledStream(source.samples, source.key)
            for source in sources
        ]
        for stream in self.streams:
            stream.check_lanes(world * self.workers)
        self.cursors: list[list[Cursor | None]] = [[None] * len(sources) for _ in range(self.workers)]
        lengths = [0 if isinstance(source.samples, SampleStream) else len(source.samples) for source in sources]
        self.size = sum(lengths) if all(lengths) else None
        a_pass = sum(self._batches_of(*each) for each in zip(sources, lengths, self.batch_sizes, strict=True))
        default = max(a_pass // self.accumulation, 1) if self.size else STREAM_EPOCH
        self.steps_per_epoch = run.iters_per_epoch or default
        mixed = zip(sources, self.streams, self.ratios, self.batch_sizes, strict=True)
        listed = [f"{s.key}: {stream.signature}, ratio {ratio}, batch {size}" for s, stream, ratio, size in mixed]
        self.signature = f"{'; '.join(listed)}; {self.workers} workers; seed {run.seed}"

    def _refuse_other_sizes(self) -> None:
        """``run.global_batch_size`` counts batches of ``run.batch_size_train``."""
        size = self.run.batch_size_train
        other = [
            f"datasets.{s.key}.batch_size={s.batch_size}" for s in self.sources if s.batch_size not in (None, size)
        ]
        if other and self.run.global_batch_size:
            raise DatasetError(
                f"run.global_batch_size needs batches of one size, but there are {', '.join(other)} and "
                f"run.batch_size_train={size}; give run.accum_grad_iters instead"
            )

    def _batches_of(self, source: Source, length: int, batch_size: int) -> int:
        """Batches that a dataset holds for each process (a stream: 0)."""
        found = length // (batch_size * self.world)
        if length and not found:
            raise DatasetError(
                f"datasets.{source.key}: {length} samples do not fill one batch of {batch_size} x {self.world} "
                f"processes; lower datasets.{source.key}.batch_size (or run.batch_size_train), or add data"
            )
        return found

    def batches(self, start: int, stop: int) -> Generator[Batch]:
        """Batches from the cursors on, which are moved behind each that is given."""
        made = load(_MixedBatches(self, start, stop), workers=self.run.num_workers, pin=self.pin, seed=self.run.seed)
        with closing(made):
            for batch, lane, number, cursor in made:
                self.cursors[lane][number] = cursor
                yield batch

    def state(self) -> list[list[Cursor | None]]:
        """The cursors by lane and dataset."""
        return [list(lane) for lane in self.cursors]

    def restore(self, state: list[list[Cursor | None]]) -> None:
        """Take over cursors."""
        self.cursors = state

    def describe(self) -> str:
        """Size and batches in a few words."""
        mixed = zip(self.sources, self.batch_sizes, self.ratios, strict=True)
        listed = ", ".join(f"{source.key} {size} per process (ratio {ratio:g})" for source, size, ratio in mixed)
        size = f"{self.size:,} samples" if self.size else "a stream"
        return (
            f"{size}; every batch from one dataset: {listed}; "
            f"x {self.accumulation} accumulation x {self.world} processes"
        )


class _MixedBatches(IterableDataset[Any]):
    """``(batch, lane, number of the dataset, cursor behind it)``, each loading process every n-th of them."""

    def __init__(self, feed: StreamedFeed, start: int, stop: int):
        self.streams, self.ratios, self.batch_sizes = feed.streams, feed.ratios, feed.batch_sizes
        self.keys = [source.key for source in feed.sources]
        self.processor, self.seed, self.skips_bad = feed.processor, feed.run.seed, feed.run.on_bad_sample == "skip"
        self.rank, self.world, self.workers = feed.rank, feed.world, feed.workers
        self.start, self.stop, self.cursors = start, stop, feed.cursors

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        first = self.start + (info.id if info else 0)
        yield from self._batches(first, first % self.workers)

    def _batches(self, first: int, number: int) -> Iterator[tuple[Batch, int, int, Cursor]]:
        lane = Lane(self.rank * self.workers + number, self.world * self.workers, self.seed)
        samples = [self._encoded(k, lane, cursor) for k, cursor in enumerate(self.cursors[number])]
        for batch in range(first, self.stop, self.workers):
            rng = random.Random(f"{self.seed}/{self.rank}/{batch}")
            (k,) = rng.choices(range(len(samples)), self.ratios)
            drawn = [next(samples[k]) for _ in range(self.batch_sizes[k])]
            yield self.processor.collate([encoded for encoded, _ in drawn]), number, k, drawn[-1][1]

    def _encoded(self, k: int, lane: Lane, cursor: Cursor | None) -> Iterator[tuple[Encoded, Cursor]]:
        """The good samples of a lane of a stream; those skipped before each are told with it."""
        skipped: list[SampleError] = []
        for sample, visit, after in self.streams[k].draws(lane, cursor):
            try:
                if isinstance(sample, SampleError):
                    raise sample
                encoded = self.processor.encode(sample, seed=hash((self.seed, visit)))
            except SampleError as error:
                if not self.skips_bad:
                    raise
                skipped.append(error)
                if len(skipped) == MAX_REPLACEMENTS:
                    raise DatasetError(
                        f"datasets.{self.keys[k]}: {len(skipped)} bad samples in a row, the last: {error}"
                    ) from error
                continue
            encoded.skipped, skipped = skipped, []
            yield encoded, after


def sample_ratios(sources: Sequence[Source]) -> list[float] | None:
    """Sample ratios of the datasets, if any states one; those without count by 1."""
    given = [source.ratio for source in sources]
    return [ratio or 1.0 for ratio in given] if any(given) else None
