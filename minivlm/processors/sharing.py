"""Pictures that come more than once, so that each is encoded once."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Picture = dict[str, "Tensor"]
"""What the encoder takes of a picture, by name, or its features."""
_SKETCH = 256
"""So many numbers of a tensor are looked at before all of them are."""


def share_equal(pictures: Sequence[Picture]) -> tuple[list[Picture], list[int] | None]:
    """The different ones among ``pictures``, and which of them each is; None if all differ.

    Pictures are the same if all their numbers are: where they come from does not matter, and a picture that was cropped
    twice at random is two.
    """
    unique: list[Picture] = []
    index: list[int] = []
    alike: dict[tuple[float, ...], list[int]] = defaultdict(list)
    for picture in pictures:
        candidates = alike[_sketch(picture)]
        found = next((number for number in candidates if _equal(unique[number], picture)), None)
        if found is None:
            found = len(unique)
            candidates.append(found)
            unique.append(picture)
        index.append(found)
    return unique, index if len(unique) < len(pictures) else None


def content_key(tensors: Iterable[Tensor]) -> bytes:
    """A hash of all numbers, by which a picture is known that is no longer there; tensors are on the CPU."""
    import torch

    found = hashlib.sha1()
    for tensor in tensors:
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.digest()


def _sketch(picture: Picture) -> tuple[float, ...]:
    numbers: list[float] = []
    for tensor in picture.values():
        flat = tensor.flatten()
        numbers += flat[:: max(1, len(flat) // _SKETCH)].tolist()
    return tuple(numbers)


def _equal(one: Picture, other: Picture) -> bool:
    import torch

    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())
