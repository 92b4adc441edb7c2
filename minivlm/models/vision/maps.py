"""Large maps of features: room for one, and writing into it without a second copy of all."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

_CHANNELS = 256
"""So many are in fp32 at a time."""


def new_features(like: Tensor, *shape: int) -> Tensor:
    """Room for features, in the type of ``like`` or that of autocast, to which all that follows would round."""
    kind = like.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    return like.new_empty(shape, dtype=torch.get_autocast_dtype(kind) if autocast else like.dtype)


def resize_into(target: Tensor, source: Tensor) -> None:
    """Write ``source`` [N, C, h, w] into ``target`` [N, H, W, C], bilinear in fp32, without anti-aliasing."""
    size = target.shape[1:3]
    for start in range(0, target.shape[-1], _CHANNELS):
        part = source[:, start : start + _CHANNELS]
        if part.shape[-2:] != size:
            part = interpolate(part.float(), size=size, mode="bilinear", align_corners=False)
        target[..., start : start + _CHANNELS] = part.permute(0, 2, 3, 1)
