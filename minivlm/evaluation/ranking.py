"""Choosing among given answers by their likelihood instead of generating one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from minivlm.types import IGNORE_INDEX, Batch, Encoded, Message, Sample

if TYPE_CHECKING:
    from torch import Tensor


class RankingProcessor(Protocol):
    """What ranking asks of a processor."""

    def encode(self, sample: Sample) -> Encoded:
        """A training sample as numbers."""

    def collate(self, samples: Sequence[Encoded]) -> Batch:
        """A batch, padded on the right."""


@torch.inference_mode()
def rank_candidates(
    model: Any,
    processor: RankingProcessor,
    samples: Sequence[Sample],
    candidates: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    per: str = "token",
) -> list[list[int]]:
    """The numbers of the candidates for every sample, the likeliest first.

    A candidate takes the place of the sample's last answer. Its loss is the mean over the supervised tokens;
    ``per: position`` divides by all positions instead, see :func:`sample_losses`. Raises
    :class:`~minivlm.types.SampleError` for samples that cannot be encoded.
    """
    losses = []
    for candidate in candidates:
        batch = processor.collate([processor.encode(_answered(sample, candidate)) for sample in samples]).to(device)
        losses.append(sample_losses(model, batch, per=per))
    return torch.stack(losses, dim=1).argsort(dim=1).tolist()


def sample_losses(model: Any, batch: Batch, *, per: str = "token") -> Tensor:
    """Loss of every sample [B]: the sum over its supervised tokens, divided by their number.

    ``per: position`` divides by the positions of the longest prompt and the longest answer of the batch instead,
    as MiniGPT-4 does to rank answers (``multi_select``): a sample's loss then depends on its neighbours.
    """
    logits = model(batch, return_logits=True).logits[:, :-1].float()
    targets = batch.labels[:, 1:]  # type: ignore[index]
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), targets, ignore_index=IGNORE_INDEX, reduction="none"
    )
    supervised = targets != IGNORE_INDEX
    if per == "token":
        return losses.sum(1) / supervised.sum(1)
    prompts = supervised.long().argmax(1)
    answers = batch.attention_mask.sum(1) - 1 - prompts
    return losses.sum(1) / (prompts.max() + answers.max())


def _answered(sample: Sample, answer: str) -> Sample:
    messages = list(sample.messages)
    if messages and messages[-1].role == "assistant":
        messages.pop()
    return dataclasses.replace(sample, messages=[*messages, Message("assistant", answer)])
