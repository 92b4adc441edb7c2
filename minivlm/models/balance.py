"""Losses that keep the experts of a mixture evenly used.

All of them multiply how often an expert is chosen with its mean probability, summed over the experts and scaled so that
perfect balance gives the number of experts per token, or one (Switch Transformer, Fedus et al. 2022, equations 4 to
6). They differ in what is averaged first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from minivlm.models.base import ModelError

Balance = Callable[[tuple[Tensor, ...], Tensor], Tensor]
"""From the router logits of all layers (one [B * L, experts] a layer) and the mask [B, L] to a scalar."""


def load_balancing(model: Any, form: str) -> Balance:
    """The loss of a model of transformers in one of the forms of ``router_loss_form``.

    Raises :class:`ModelError` for a model without experts.
    """
    pooled = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    experts, top_k = getattr(model, "num_experts", None), getattr(model, "num_experts_per_tok", None)
    if pooled is None or experts is None or top_k is None:
        raise ModelError(
            f"model.language_model.router_loss: {type(model).__name__} has no mixture of experts with a "
            "load-balancing loss; set it to null"
        )
    if form == "pooled":
        return lambda logits, mask: pooled(logits, experts, top_k, mask)
    of_layer = per_layer if form == "per_layer" else per_sequence
    return lambda logits, mask: torch.stack([of_layer(each, mask, top_k) for each in logits]).sum()


def per_layer(logits: Tensor, mask: Tensor, top_k: int) -> Tensor:
    """One layer of the newest MiniMind: counts and probabilities over the tokens of the batch.

    ``logits`` [B * L, experts], ``mask`` [B, L]; ``top_k`` where the experts are in balance.
    """
    chosen, scores = _counted(logits, mask, top_k)
    share, mean = (each.sum((0, 1)) / mask.sum() for each in (chosen, scores))
    return (share * mean).sum() * logits.shape[-1]


def per_sequence(logits: Tensor, mask: Tensor, top_k: int) -> Tensor:
    """One layer of the first MiniMind, and of DeepSeek-V2 (section 2.2.3): each sequence by itself, then their mean.

    Shapes are those of :func:`per_layer`; 1 where the experts are in balance.
    """
    chosen, scores = _counted(logits, mask, top_k)
    lengths = mask.sum(1, keepdim=True).clamp(min=1)
    share, mean = chosen.sum(1) / (lengths * top_k), scores.sum(1) / lengths
    return (share * mean).sum(-1).mean() * logits.shape[-1]


def _counted(logits: Tensor, mask: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Whether an expert is chosen, and its probability, both [B, L, experts] and 0 at padding."""
    scores = logits.float().softmax(-1)
    chosen = one_hot(scores.topk(top_k, dim=-1).indices, logits.shape[-1]).sum(1)
    seen = mask.unsqueeze(-1)
    return chosen.view(*mask.shape, -1) * seen, scores.view(*mask.shape, -1) * seen
