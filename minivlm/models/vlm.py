"""The one model class: vision encoder -> connector -> language model."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.models.base import Connector, LanguageModel, VisionEncoder
from minivlm.models.losses import supervised_loss
from minivlm.models.splice import splice
from minivlm.types import IMAGE_TOKEN_ID, Batch

PARTS = ("vision_encoder", "connector", "language_model")


@dataclass
class VLMOutput:
    """``loss`` is ``loss_sum / token_count`` (scalars); ``logits`` [B, L, vocabulary] only on request."""

    loss: Tensor | None = None
    loss_sum: Tensor | None = None
    token_count: Tensor | None = None
    logits: Tensor | None = None


class VisionLanguageModel(nn.Module):
    """Three parts that were built first and are passed in.

    A part whose parameters are all frozen stays in eval mode; a frozen encoder runs without gradients.
    """

    def __init__(self, vision_encoder: VisionEncoder, connector: Connector, language_model: LanguageModel):
        super().__init__()
        self.vision_encoder = vision_encoder
        self.connector = connector
        self.language_model = language_model
        self.load_reports: list[Any] = []
        """What the files held that have filled the parts, for printing (``.summary``) or a closer look."""
        self.trained_before: list[str] = []
        """Names of the parameters that the checkpoint has trained, in this or an earlier stage."""

    def fits(self, name: str, shape: torch.Size) -> bool:
        """Whether ``load_state_dict`` takes a tensor of another shape; see :meth:`PartModule.fits`."""
        part, _, rest = name.partition(".")
        return part in PARTS and getattr(self, part).fits(rest, shape)

    @property
    def device(self) -> torch.device:
        """Device of the connector, where inputs should be sent."""
        return next(self.parameters()).device

    def is_frozen(self, part: str) -> bool:
        """Whether no parameter of the part trains."""
        return not any(p.requires_grad for p in getattr(self, part).parameters())

    def train(self, mode: bool = True) -> VisionLanguageModel:
        """Set train mode, except for parts that are frozen as a whole."""
        super().train(mode)
        for part in PARTS:
            if self.is_frozen(part):
                getattr(self, part).eval()
        return self

    def extract_features(self, pixels: dict[str, Tensor]) -> Tensor:
        """Encoder output [N, tokens, channels] of named inputs [N, 3, H, W]; this is what is cached."""
        with torch.no_grad() if self.is_frozen("vision_encoder") else nullcontext():
            return self.vision_encoder.encode(pixels)

    def encode_images(self, batch: Batch) -> Tensor:
        """Visual tokens [N, tokens_per_image, hidden_size] of all pictures of a batch."""
        features = batch.features if batch.features is not None else self.extract_features(batch.pixels)
        return self.connector(features.to(_dtype(self.connector, features.dtype)))

    def embed(self, batch: Batch, visual: Tensor | None = None) -> Tensor:
        """Input embeddings [B, L, hidden_size], visual tokens in place.

        ``visual`` may hold the tokens of :meth:`encode_images`, computed before.
        """
        is_image = batch.input_ids == IMAGE_TOKEN_ID
        embeds = self.language_model.embed(batch.input_ids.masked_fill(is_image, 0))
        if visual is None and batch.num_images:
            visual = self.encode_images(batch)
        if visual is not None:
            return splice(embeds, batch.input_ids, visual)
        if embeds.device.type != "meta" and bool(is_image.any()):
            raise ValueError(f"{int(is_image.sum())} image positions in the batch, but no picture")
        if self.training and not self.is_frozen("connector"):
            # Gradients of the connector must exist on every process, also where no sample has a picture.
            embeds = embeds + 0.0 * self._dummy_visual(embeds).sum()
        return embeds

    def _dummy_visual(self, like: Tensor) -> Tensor:
        size = self.vision_encoder.num_tokens, self.vision_encoder.hidden_size
        zeros = torch.zeros(1, *size, device=like.device, dtype=_dtype(self.connector, like.dtype))
        return self.connector(zeros).to(like.dtype)

    def forward(self, batch: Batch, return_logits: bool = False) -> VLMOutput:
        """Loss over the supervised positions; the output head runs only there.

        With ``return_logits`` it runs everywhere and the logits [B, L, vocabulary] are returned as well.
        """
        mask = batch.attention_mask
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        # Right padding stands behind every real token, so a causal model needs no mask for it.
        seen = mask if batch.padding_side == "left" else None
        hidden = self.language_model(self.embed(batch), seen, positions)
        output = VLMOutput(logits=self.language_model.head(hidden) if return_logits else None)
        if batch.labels is not None:
            loss_sum, count = supervised_loss(hidden, batch.labels, self.language_model.head)
            output.loss_sum, output.token_count = loss_sum, count
            output.loss = loss_sum / count.clamp(min=1)
        return output

    @torch.inference_mode()
    def generate(
        self, batch: Batch, *, visual: Tensor | None = None, keep_last: int | None = None, **options: Any
    ) -> Tensor:
        """New token ids [B, T] for left-padded prompts, greedy unless ``options`` say otherwise.

        ``keep_last`` leaves out all but so many of the last positions. Options are those of transformers'
        ``generate`` (max_new_tokens, num_beams, do_sample, temperature, top_p, streamer, stop_strings with
        tokenizer, ...).
        """
        embeds, mask = self.embed(batch, visual), batch.attention_mask
        if keep_last is not None:
            embeds, mask = embeds[:, -keep_last:], mask[:, -keep_last:]
        return self.language_model.generate(embeds, mask, **options)


def _dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    parameter = next(module.parameters(), None)
    return default if parameter is None else parameter.dtype
