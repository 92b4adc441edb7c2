"""Training data that come twice because one dataset holds another: found by the records themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, islice
from typing import Any

import numpy as np

from minivlm.datasets.records import RecordDataset
from minivlm.evaluation.vqa import evenly_spaced
from minivlm.types import SampleError

SHARE = 0.9
"""A dataset counts as part of another that has more than this share of its ids, and the same behind them."""
LOOKED_AT = 20
"""So many records with the same id are compared: running numbers as ids are the same in any two files."""


def overlaps(datasets: Iterable[tuple[str, Any]]) -> Iterator[str]:
    """A sentence for every dataset whose records are in another one, too; ``datasets`` are (key, samples)."""
    records = [(key, found) for key, samples in datasets if (found := _records(samples)) is not None]
    for pair in combinations(records, 2):
        (key, small), (other, large) = sorted(pair, key=lambda item: len(item[1].ids))
        ids, theirs = (np.array(data.ids, dtype=np.int64) for data in (small, large))
        shared = np.flatnonzero((ids != 0) & np.isin(ids, theirs))
        if len(shared) > SHARE * len(ids) and _are_same(small, large, shared, ids, theirs):
            yield (
                f"{len(shared):,} of the {len(ids):,} records of datasets.{key} are in datasets.{other} as well, so "
                "they are learned twice; leave one of the two out"
            )


def _records(samples: Any) -> RecordDataset[Any] | None:
    samples = getattr(samples, "samples", samples)  # `max_samples` takes the first of them
    return samples if isinstance(samples, RecordDataset) else None


def _are_same(small: RecordDataset[Any], large: RecordDataset[Any], shared: Any, ids: Any, theirs: Any) -> bool:
    """Whether most of a few records with the same id are equal, and what is learned from them."""
    chosen: Sequence[int] = [int(shared[n]) for n in evenly_spaced(len(shared), LOOKED_AT)]
    equal = 0
    for number in chosen:
        twins = islice(np.flatnonzero(theirs == ids[number]), LOOKED_AT)
        equal += any(_is_same(small, number, large, int(twin)) for twin in twins)
    return 2 * equal > len(chosen)


def _is_same(one: RecordDataset[Any], number: int, other: RecordDataset[Any], twin: int) -> bool:
    try:
        # Of the same record one dataset may ask for the box of a phrase, another for the phrase of a box.
        return one.record(number) == other.record(twin) and one[number].messages == other[twin].messages
    except SampleError:
        return False
