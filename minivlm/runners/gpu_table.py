"""Which GPUs fit a stage: the language model tuned by LoRA, by QLoRA and as a whole, counted on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from rich.table import Table

from minivlm.config.experiment import ModelConfig, StageConfig
from minivlm.io import readable_size
from minivlm.models.build import build_part
from minivlm.models.tuning import apply_freeze
from minivlm.models.vlm import VisionLanguageModel
from minivlm.runners.memory import CUDA_CONTEXT, GIB, training_uses
from minivlm.schema import LoraSettings

CARDS = (16, 24, 40, 48, 80)
"""Memory of common GPUs in GiB."""
USABLE = 0.95
"""The share of a card that tensors can fill; the rest is lost between blocks of different sizes."""


@dataclass(frozen=True)
class Way:
    """One way to tune: bytes by use at ``micro_batch`` samples, of which only the activations depend on it."""

    name: str
    uses: dict[str, float]
    micro_batch: int

    @property
    def total(self) -> float:
        """Bytes of a process, with CUDA's own."""
        return sum(self.uses.values()) + CUDA_CONTEXT

    def largest_micro_batch(self, card: int) -> int:
        """Samples that a card of so many GiB takes at a time, 0 if it takes none."""
        per_sample = self.uses["activations"] / self.micro_batch
        fixed = self.total - self.uses["activations"]
        return max(int((USABLE * card * GIB - fixed) / per_sample), 0)

    @property
    def smallest_card(self) -> int | None:
        """The smallest of ``CARDS`` that takes at least one sample, None if none does."""
        return next((card for card in CARDS if self.largest_micro_batch(card)), None)


def has_base(config: ModelConfig) -> bool:
    """Whether there is a trained language model to tune."""
    part = config.language_model
    known = part is not None and hasattr(part.config, "quantization")
    return known and bool(part.config.path or part.weights or config.checkpoint)  # type: ignore[union-attr]


def ways(stage: StageConfig, model: VisionLanguageModel, precision: str, length: int) -> Iterator[Way]:
    """LoRA (with the stage's own settings, or the defaults), QLoRA and full tuning of a stage.

    Everything else is the stage's own; ``model`` may lie on the meta device.
    """
    part = stage.model.language_model
    assert part is not None
    for name, lora, quantization in (
        ("LoRA", part.lora or LoraSettings(), None),
        ("QLoRA", part.lora or LoraSettings(), "nf4"),
        ("full", None, None),
    ):
        node = replace(part, lora=lora, config=replace(part.config, quantization=None))
        with torch.device("meta"):
            language_model = build_part("language_model", node, model.language_model.vocab_size)
        apply_freeze("language_model", language_model, None)
        uses = training_uses(
            VisionLanguageModel(model.vision_encoder, model.connector, language_model),
            tokens=stage.run.batch_size_train * length,
            pictures=stage.run.batch_size_train,
            half=precision != "fp32",
            checkpointing=part.config.gradient_checkpointing,
            quantization=quantization,
            cached=stage.run.feature_cache is not None,
        )
        yield Way(name, uses, stage.run.batch_size_train)


def gpu_table(stage: StageConfig, model: VisionLanguageModel, precision: str, length: int) -> Table:
    """A column for each way: bytes by use, the smallest card that takes one sample, and what each card takes."""
    found = list(ways(stage, model, precision, length))
    table = Table("", *(way.name for way in found), title="which GPUs fit, estimated")
    for use in found[0].uses:
        table.add_row(use, *(readable_size(way.uses[use]) for way in found))
    table.add_row("total", *(readable_size(way.total) for way in found), end_section=True)
    smallest = (way.smallest_card for way in found)
    table.add_row("fits", *(f"{card} GB" if card else "more than one card" for card in smallest), end_section=True)
    for card in CARDS:
        largest = (way.largest_micro_batch(card) for way in found)
        table.add_row(f"largest micro batch, {card} GB", *(str(size or "-") for size in largest))
    lora = (stage.model.language_model and stage.model.language_model.lora) or LoraSettings()
    checkpointing = stage.model.language_model and stage.model.language_model.config.gradient_checkpointing
    table.caption = (
        f"bytes at micro batch {stage.run.batch_size_train}, samples of {length} tokens, {precision}, LoRA of rank "
        f"{lora.r}, {'with' if checkpointing else 'without'} gradient checkpointing"
    )
    return table
