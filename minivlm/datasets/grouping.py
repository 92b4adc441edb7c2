"""The sampler of LLaVA-1.5 and Imp: orders in which neighbours have similar lengths and are of one kind.

An order consists of mega-batches, one for an optimiser step: ``world`` (processes x accumulation) micro batches
of ``batch_size`` samples, which hold about as much work each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, zip_longest

import torch

Join = Callable[[list[int], list[int], Sequence[int]], list[int]]
"""What becomes of the last mega-batch with pictures and the last of text, given the lengths of all samples."""


def group_by_length(lengths: Sequence[int], batch_size: int, world: int, generator: torch.Generator) -> list[list[int]]:
    """Mega-batches that hold every index of ``lengths`` once; the last one may be short.

    The indices are shuffled and cut; each mega-batch is dealt out to its micro batches, the longest sample first.
    """
    order = torch.randperm(len(lengths), generator=generator).tolist()
    size = batch_size * world
    cuts = [order[start : start + size] for start in range(0, len(order), size)]
    return [_dealt(sorted(cut, key=lambda i: lengths[i], reverse=True), lengths, world) for cut in cuts]


def group_by_modality(
    lengths: Sequence[int],
    batch_size: int,
    world: int,
    *,
    inside: torch.Generator,
    between: torch.Generator,
    join: Join,
) -> list[int]:
    """The order of a pass; the length of a sample without picture is negative, none may be 0.

    Each kind is grouped by length with ``inside``. The mega-batches are shuffled with ``between``, except for the
    last one of each kind: these two come at the end, joined by ``join``. Samples that are all of one kind are
    grouped with ``between``.
    """
    sizes = [abs(length) for length in lengths]
    kinds = [[i for i, length in enumerate(lengths) if (length > 0) == pictures] for pictures in (True, False)]
    if not all(kinds):
        return list(chain.from_iterable(group_by_length(sizes, batch_size, world, between)))
    pictures, text = (
        [[kind[i] for i in mega] for mega in group_by_length([sizes[i] for i in kind], batch_size, world, inside)]
        for kind in kinds
    )
    whole = pictures[:-1] + text[:-1]
    order = torch.randperm(len(whole), generator=between).tolist()
    return [*chain.from_iterable(whole[k] for k in order), *join(pictures[-1], text[-1], sizes)]


def in_order(pictures: list[int], text: list[int], lengths: Sequence[int]) -> list[int]:
    """As they stand in the data (LLaVA-1.5)."""
    return sorted(pictures + text)


def interleaved(pictures: list[int], text: list[int], lengths: Sequence[int]) -> list[int]:
    """One by one in turn (Imp v1.5)."""
    return [i for pair in zip_longest(pictures, text) for i in pair if i is not None]


def longest_first(pictures: list[int], text: list[int], lengths: Sequence[int]) -> list[int]:
    """By length (Imp v1)."""
    return sorted(pictures + text, key=lambda i: lengths[i], reverse=True)


def _dealt(indices: list[int], lengths: Sequence[int], count: int) -> list[int]:
    """Each index, the longest first, into the micro batch with the least in it that is not full.

    What cannot be shared out evenly is dealt in turn.
    """
    if len(indices) % count:
        return [i for k in range(count) for i in indices[k::count]]
    batches: list[list[int]] = [[] for _ in range(count)]
    held = [0.0] * count
    for index in indices:
        k = held.index(min(held))
        batches[k].append(index)
        held[k] = held[k] + lengths[index] if len(batches[k]) < len(indices) // count else float("inf")
    return list(chain.from_iterable(batches))
