"""The splice: visual tokens are scattered into the positions that the processor reserved for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minivlm.types import IMAGE_TOKEN_ID


def splice(embeds: Tensor, input_ids: Tensor, visual: Tensor, kept: Sequence[int] | None = None) -> Tensor:
    """Put visual tokens in the place of ``IMAGE_TOKEN_ID``, row by row in the order of the pictures.

    ``embeds`` [B, L, D], ``input_ids`` [B, L], ``visual`` [N, T, D] with N * T image positions in all, or
    ``kept[k]`` of them for picture k, which takes the first of its tokens. Raises ValueError if the counts differ.
    """
    mask = input_ids == IMAGE_TOKEN_ID
    if kept is not None:
        visual = torch.cat([tokens[:count] for tokens, count in zip(visual, kept, strict=True)])
    visual = visual.flatten(0, -2)
    if embeds.device.type != "meta" and int(mask.sum()) != len(visual):
        raise ValueError(f"{int(mask.sum())} image positions in the batch, but {len(visual)} visual tokens")
    return embeds.masked_scatter(mask.unsqueeze(-1), visual.to(embeds.dtype))
