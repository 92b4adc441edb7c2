"""Datasets without a length: an endless order of samples that can be entered anywhere.

A run reads a stream in several lanes, one for every loading process of every training process. What a lane
reads is a pure function of (seed, lane, cursor), so a run that goes on from its cursors sees the same samples.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minivlm.types import Sample, SampleError

Cursor = list[int]
"""A place in a lane of a stream: a few numbers, which fit into JSON."""


@dataclass(frozen=True)
class Lane:
    """One of ``count`` readers that share the streams of a run."""

    number: int = 0
    count: int = 1
    seed: int = 0


class Drawn(NamedTuple):
    """One sample of a lane, or why there is none; ``visit`` differs when the same sample comes again."""

    sample: Sample | SampleError
    visit: int
    after: Cursor


class ShardError(SampleError):
    """A file with many samples that cannot be read (any further)."""


class SampleStream:
    """What a builder's ``build`` may return instead of a sequence of samples.

    ``signature`` tells streams apart whose lanes differ: a checkpoint keeps it beside the cursors.
    """

    signature: str

    def draws(self, lane: Lane, cursor: Cursor | None = None) -> Iterator[Drawn]:
        """Samples of a lane without end, from a cursor on.

        Raises :class:`~minivlm.datasets.base.DatasetError` when nothing at all can be read.
        """
        raise NotImplementedError

    def look(self, limit: int) -> Iterator[Sample | SampleError]:
        """At most ``limit`` samples from several places, for checks and previews."""
        raise NotImplementedError

    def faults(self) -> Iterator[ShardError]:
        """What can be said to be broken without reading all of it."""
        return iter(())

    def check_lanes(self, count: int) -> None:
        """Raise :class:`~minivlm.datasets.base.DatasetError` if so many lanes cannot share the stream."""


class ShuffledStream(SampleStream):
    """A sequence as a stream: shuffled anew for every pass, and dealt out to the lanes in turn."""

    def __init__(self, samples: Sequence[Sample], name: str = ""):
        self.samples, self.name = samples, name
        self.signature = f"{len(samples)} samples"

    def draws(self, lane: Lane, cursor: Cursor | None = None) -> Iterator[Drawn]:
        """Every ``lane.count``-th sample of pass after pass."""
        (turn,) = cursor or [0]
        number, order = -1, list[int]()
        while True:
            data_pass, place = divmod(lane.number + turn * lane.count, len(self.samples))
            if data_pass != number:
                number, order = data_pass, shuffled(len(self.samples), f"{lane.seed}/{self.name}/{data_pass}")
            turn += 1
            yield Drawn(sample_or_error(self.samples, order[place]), data_pass, [turn])

    def look(self, limit: int) -> Iterator[Sample | SampleError]:
        """The first samples."""
        return (sample_or_error(self.samples, index) for index in range(min(limit, len(self.samples))))


def sample_or_error(samples: Sequence[Sample], index: int) -> Sample | SampleError:
    """A sample of a sequence, or why it cannot be made."""
    try:
        return samples[index]
    except SampleError as error:
        return error


def shuffled(size: int, key: str) -> list[int]:
    """The numbers below ``size`` in an order that depends on ``key`` alone."""
    return random.Random(key).sample(range(size), size)
