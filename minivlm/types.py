"""The one vocabulary of data: ``Sample -> Segments -> Encoded -> Batch``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

IMAGE_MARKER = "<image>"
"""Where a picture stands in the text of a message, in every data format of the house."""
IMAGE_TOKEN_ID = -200
"""Stands in ``input_ids`` once for every visual token."""
IGNORE_INDEX = -100
"""Label of a position that is not supervised."""


class SampleError(ValueError):
    """A sample that cannot be used; the message names the sample and the reason."""

    def __init__(self, sample_id: str, reason: str):
        super().__init__(f"sample '{sample_id}': {reason}")
        self.sample_id = sample_id
        self.reason = reason

    def __reduce__(self) -> Any:  # survives the way back from a worker process
        return SampleError, (self.sample_id, self.reason)


@dataclass
class Message:
    """One turn: ``role`` is ``system``, ``user`` or ``assistant``; ``content`` may hold ``<image>``.

    An assistant's ``content`` of None is the open turn that the model is to fill.
    """

    role: str
    content: str | None


@dataclass
class Sample:
    """One record of a dataset, pictures not yet opened.

    ``images`` holds paths, PIL images or files in memory in the order of their markers. ``meta`` is for evaluation:
    ``answers`` (list of accepted strings), ``question``, ``question_type``, ``metric`` (its registered name), ...
    """

    id: str
    messages: list[Message]
    images: list[Path | str | Image | BinaryIO] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass
class Encoded:
    """One sample as numbers; visual tokens are expanded, so ``input_ids`` has its final length.

    ``pixels`` holds for every input name of the encoder (``image``; a dual encoder has two) one tensor
    [3, H, W] per picture; ``features`` holds cached encoder outputs [tokens, channels] instead.
    ``tokens_per_image`` counts the positions of every picture, fewer than its visual tokens where it was cut off.
    """

    input_ids: list[int]
    labels: list[int]
    pixels: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    features: list[torch.Tensor] | None = None
    tokens_per_image: list[int] = field(default_factory=list)
    sample_id: str = ""
    skipped: list[SampleError] = field(default_factory=list)

    @property
    def num_supervised(self) -> int:
        """Number of target tokens (the first position of a sequence is never a target)."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


@dataclass
class Batch:
    """What the model takes. Shapes: B samples, L positions, N pictures of all samples in order.

    ``input_ids``, ``attention_mask``, ``labels``: [B, L] (long, long, long). ``pixels``: name ->
    [N, 3, H, W]; ``features``: [N, tokens, channels] from the cache, then ``pixels`` is empty.
    Pictures that are the same are held once: ``image_index`` then says of each of the N which one it is, of the
    distinct ones in ``pixels`` or ``features`` (None: all differ).
    ``image_tokens`` holds how many visual tokens of each picture have a position (None: all of all pictures).
    Rows are padded on the right for training and on the left for generation.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor | None = None
    pixels: dict[str, torch.Tensor] = field(default_factory=dict)
    features: torch.Tensor | None = None
    image_index: list[int] | None = None
    image_tokens: list[int] | None = None
    padding_side: str = "right"
    sample_ids: list[str] = field(default_factory=list)
    skipped: list[SampleError] = field(default_factory=list)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """A copy with every tensor on ``device``."""

        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: move(item) for key, item in value.items()}
            return value.to(device, non_blocking=non_blocking) if hasattr(value, "to") else value

        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory, which the DataLoader asks for when the device is a GPU."""

        def pin(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: pin(item) for key, item in value.items()}
            return value.pin_memory() if hasattr(value, "pin_memory") else value

        return replace(self, **{f.name: pin(getattr(self, f.name)) for f in fields(self)})

    @property
    def num_images(self) -> int:
        """Number of pictures of all samples, N."""
        return self.num_distinct if self.image_index is None else len(self.image_index)

    @property
    def num_distinct(self) -> int:
        """Number of distinct pictures, which is what an encoder has to do."""
        if self.features is not None:
            return len(self.features)
        return len(next(iter(self.pixels.values()))) if self.pixels else 0

    def pictures(self, rows: Sequence[int] | slice) -> Batch:
        """The same batch with only these of the distinct pictures, each once."""
        features = None if self.features is None else self.features[rows]
        pixels = {name: tensor[rows] for name, tensor in self.pixels.items()}
        return replace(self, pixels=pixels, features=features, image_index=None, image_tokens=None)
