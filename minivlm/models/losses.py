"""Cross entropy over the supervised positions only.

The output head is the largest matrix of a small language model, and most positions of a vision-language
sample (picture, prompt, padding) have no target. So hidden states are picked before the head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from minivlm.types import IGNORE_INDEX

CHUNK_TOKENS = 4096
"""Logits of more tokens than this are never held at once."""


def supervised_loss(
    hidden: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], chunk: int = CHUNK_TOKENS
) -> tuple[Tensor, Tensor]:
    """Summed next-token loss and the number of targets.

    ``hidden`` [B, L, D] and unshifted ``labels`` [B, L] (IGNORE_INDEX where not supervised). Both results
    are scalars; the sum is differentiable and fp32 also when there is no target at all.
    """
    targets = labels[:, 1:]
    mask = targets != IGNORE_INDEX
    picked, targets = hidden[:, :-1][mask], targets[mask]

    def loss_of(states: Tensor, ids: Tensor) -> Tensor:
        return cross_entropy(head(states).float(), ids, reduction="sum")

    if len(targets) <= chunk:
        return loss_of(picked, targets), mask.sum()
    total = hidden.new_zeros((), dtype=torch.float32)
    for states, ids in zip(picked.split(chunk), targets.split(chunk), strict=True):
        total = total + checkpoint(loss_of, states, ids, use_reentrant=False)
    return total, mask.sum()
