"""The splice: visual tokens are scattered into the positions that the processor reserved for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minivlm.types import IMAGE_TOKEN_ID


def splice(
    embeds: Tensor, input_ids: Tensor, visual: Tensor, kept: Sequence[int] | None = None, scale: float = 1.0
) -> Tensor:
    """Put visual tokens, multiplied by ``scale``, in the place of ``IMAGE_TOKEN_ID``, row by row, picture by picture.

    ``embeds`` [B, L, D], ``input_ids`` [B, L], ``visual`` [N, T, D] with N * T image positions in all, or
    ``kept[k]`` of them for picture k, which takes the first of its tokens. Raises ValueError if the counts differ.
    """
    mask = input_ids == IMAGE_TOKEN_ID
    if kept is not None:
        visual = torch.cat([tokens[:count] for tokens, count in zip(visual, kept, strict=True)])
    visual = visual.flatten(0, -2)
    if embeds.device.type != "meta" and int(mask.sum()) != len(visual):
        raise ValueError(f"{int(mask.sum())} image positions in the batch, but {len(visual)} visual tokens")
    visual = visual.to(embeds.dtype)
    if scale != 1.0:
        visual = visual * torch.tensor(scale, dtype=embeds.dtype)  # rounded to that type, as that of text is
    return embeds.masked_scatter(mask.unsqueeze(-1), visual)
