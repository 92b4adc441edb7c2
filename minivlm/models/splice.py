"""The splice: visual tokens are scattered into the positions that the processor reserved for them."""

from __future__ import annotations

from torch import Tensor

from minivlm.types import IMAGE_TOKEN_ID


def splice(embeds: Tensor, input_ids: Tensor, visual: Tensor) -> Tensor:
    """Put visual tokens in the place of ``IMAGE_TOKEN_ID``, row by row in the order of the pictures.

    ``embeds`` [B, L, D], ``input_ids`` [B, L], ``visual`` [N, T, D] with N * T image positions in all.
    Raises ValueError if the counts differ.
    """
    mask = input_ids == IMAGE_TOKEN_ID
    visual = visual.flatten(0, -2)
    if embeds.device.type != "meta" and int(mask.sum()) != len(visual):
        raise ValueError(f"{int(mask.sum())} image positions in the batch, but {len(visual)} visual tokens")
    return embeds.masked_scatter(mask.unsqueeze(-1), visual.to(embeds.dtype))
