"""Which samples make which batch: a pure function of (seed, position), so that resuming is exact."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch

from minivlm.datasets.base import DatasetError
from minivlm.datasets.grouping import Join, group_by_modality

MEGA_BATCHES = 50
"""Samples of this many batches are sorted by length together; more would spoil the shuffling."""


class BatchPlan:
    """Global batches of sample indices, without end.

    ``sizes`` holds the number of samples of every dataset, whose indices are numbered through. Without
    ``ratios`` a pass over the data takes every sample once; with them it draws as many samples, choosing
    the dataset of each by its ratio. ``lengths`` (one per sample) puts similar lengths into one batch.
    A batch holds ``batch_size`` samples for all processes together; a process takes its share by
    :meth:`share`. Raises :class:`DatasetError` when the data does not fill one batch.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_size: int,
        seed: int,
        ratios: Sequence[float] | None = None,
        lengths: Sequence[int] | None = None,
    ):
        self.sizes, self.batch_size, self.seed = list(sizes), batch_size, seed
        self.ratios, self.lengths = ratios, lengths
        self.batches_per_pass = sum(sizes) // batch_size
        if self.batches_per_pass == 0:
            raise DatasetError(
                f"{sum(sizes)} training samples do not fill one batch of {batch_size} "
                "(run.batch_size_train x processes); lower run.batch_size_train or add data"
            )
        self._pass: tuple[int, list[list[int]]] | None = None

    def batch(self, number: int) -> list[int]:
        """Sample indices of a global batch, counted from the start of the training."""
        index = number // self.batches_per_pass
        if self._pass is None or self._pass[0] != index:
            self._pass = (index, self._make_pass(index))
        return self._pass[1][number % self.batches_per_pass]

    def share(self, number: int, rank: int, world: int) -> list[int]:
        """The part of a batch that one process takes; neighbours in length go to different processes."""
        return self.batch(number)[rank::world]

    def _make_pass(self, index: int) -> list[list[int]]:
        rng = random.Random(f"{self.seed}/{index}")
        order = self._mixed(rng) if self.ratios else list(range(sum(self.sizes)))
        if not self.ratios:
            rng.shuffle(order)
        order = order[: self.batches_per_pass * self.batch_size]  # left over are random ones, not the longest
        lengths = self.lengths
        if lengths is not None:
            mega = MEGA_BATCHES * self.batch_size
            order = [
                i
                for start in range(0, len(order), mega)
                for i in sorted(order[start : start + mega], key=lambda i: lengths[i])
            ]
        size = self.batch_size
        batches = [order[k * size : (k + 1) * size] for k in range(self.batches_per_pass)]
        if lengths is not None:
            rng.shuffle(batches)
        return batches

    def _mixed(self, rng: random.Random) -> list[int]:
        starts = [sum(self.sizes[:k]) for k in range(len(self.sizes))]

        def walk(start: int, size: int) -> Iterator[int]:
            while True:
                yield from rng.sample(range(start, start + size), size)

        walks = [walk(start, size) for start, size in zip(starts, self.sizes, strict=True)]
        assert self.ratios is not None
        return [next(rng.choices(walks, self.ratios)[0]) for _ in range(sum(self.sizes))]


class ModalityPlan(BatchPlan):
    """Micro batches of one kind of sample, with pictures or without, and of similar lengths (LLaVA-1.5, Imp).

    ``lengths`` are signed as :func:`~minivlm.datasets.grouping.group_by_modality` takes them. ``world`` counts the
    micro batches of ``batch_size`` samples of an optimiser step, which go to the ``processes`` in turn: a process
    has neighbours.
    """

    def __init__(
        self, sizes: Sequence[int], batch_size: int, seed: int, *, processes: int, accumulation: int, join: Join
    ):
        super().__init__(sizes, batch_size * processes, seed)
        self.micro_batch, self.world, self.join = batch_size, processes * accumulation, join

    def share(self, number: int, rank: int, world: int) -> list[int]:
        """The micro batch of one process."""
        return self.batch(number)[rank * self.micro_batch : (rank + 1) * self.micro_batch]

    def _make_pass(self, index: int) -> list[list[int]]:
        assert self.lengths is not None
        rng = random.Random(f"{self.seed}/{index}")
        inside, between = (torch.Generator().manual_seed(rng.getrandbits(63)) for _ in range(2))
        order = group_by_modality(
            self.lengths, self.micro_batch, self.world, inside=inside, between=between, join=self.join
        )
        size = self.batch_size
        return [order[k * size : (k + 1) * size] for k in range(self.batches_per_pass)]


class RankBatches:
    """The batch sampler of a torch DataLoader: ``(index, pass)`` pairs of one process's batches."""

    def __init__(self, plan: BatchPlan, start: int, stop: int, rank: int, world: int):
        self.plan, self.start, self.stop, self.rank, self.world = plan, start, stop, rank, world

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number in range(self.start, self.stop):
            data_pass = number // self.plan.batches_per_pass
            yield [(index, data_pass) for index in self.plan.share(number, self.rank, self.world)]
