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
_FEATURE_BYTES = 2**30
"""Pictures are encoded a few at a time where their features would take more than this: one of Mini-Gemini-HD has 1 GiB
in half precision, one of CLIP 1 MiB."""
_FULL_PRECISION = ("cpu", "meta")
"""Devices that are not faster in half precision."""


@dataclass
class VLMOutput:
    """``loss`` is ``loss_sum / token_count`` (scalars); ``logits`` [B, L, vocabulary] only on request.

    ``router_loss`` is the load-balancing loss of experts, in training with one. ``loss`` then holds it times its
    weight, ``loss_sum`` times the tokens of the batch as well: a sum over batches and processes divided by the
    tokens of all then holds the mean of the router losses, each weighted by the tokens of its batch.
    """

    loss: Tensor | None = None
    loss_sum: Tensor | None = None
    token_count: Tensor | None = None
    logits: Tensor | None = None
    router_loss: Tensor | None = None


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
        self.always_encodes = False
        """Whether in training a batch without pictures sends a blank one through the encoder, so that all processes
        run the same modules and have the same gradients."""

    def fits(self, name: str, shape: torch.Size) -> bool:
        """Whether ``load_state_dict`` takes a tensor of another shape; see :meth:`PartModule.fits`."""
        part, _, rest = name.partition(".")
        return part in PARTS and getattr(self, part).fits(rest, shape)

    @property
    def device(self) -> torch.device:
        """Device of the language model, of its first layers if it has several, where inputs should be sent."""
        return self.language_model.main_device or next(self.language_model.parameters()).device

    def is_frozen(self, part: str) -> bool:
        """Whether no parameter of the part trains."""
        return not any(p.requires_grad for p in getattr(self, part).parameters())

    @property
    def has_frozen_front(self) -> bool:
        """Whether the connector's front is frozen behind a frozen encoder, and so belongs to the features."""
        return (
            bool(self.connector.front_names)
            and self.is_frozen("vision_encoder")
            and not any(p.requires_grad for p in self.connector.front_state().values())
        )

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Tokens and channels of what :meth:`extract_features` gives for a picture."""
        if self.has_frozen_front:
            return self.connector.front_shape
        return self.vision_encoder.num_tokens, self.vision_encoder.hidden_size

    def move_features(self, device: torch.device | str) -> None:
        """Move what :meth:`extract_features` runs to another device than the rest.

        Where a cache holds every picture, it need not lie on the GPU.
        """
        self.vision_encoder.to(device)
        if self.has_frozen_front:
            self.connector.move_front(device)

    def train(self, mode: bool = True) -> VisionLanguageModel:
        """Set train mode, except for parts that are frozen as a whole; see :meth:`PartModule.train_frozen`."""
        super().train(mode)
        for part in PARTS:
            if self.is_frozen(part):
                getattr(self, part).train_frozen(mode)
        return self

    def extract_features(self, pixels: dict[str, Tensor]) -> Tensor:
        """Features [N, tokens, channels] of named inputs [N, 3, H, W]; those of frozen parts can be cached.

        They are the output of the last frozen module: of the connector's front if that is frozen as well as
        the encoder, else of the encoder.
        """
        here = next(iter(pixels.values())).device
        there = next((p.device for p in self.vision_encoder.parameters()), here)
        pixels = {name: tensor.to(there) for name, tensor in pixels.items()}
        with torch.no_grad() if self.is_frozen("vision_encoder") else nullcontext():
            features = self.vision_encoder.encode(pixels)
            if self.has_frozen_front:
                features = self.connector.front(features.to(_dtype(self.connector, features.dtype)))
        return features.to(here)

    def encode_images(self, batch: Batch) -> Tensor:
        """Visual tokens [N, tokens_per_image, hidden_size] of all N pictures of a batch, each encoded once.

        Where nothing needs gradients, large features are there for a few pictures at a time only. An encoder that draws
        at random in training draws for each.
        """
        if self.training and batch.image_index is not None and self.vision_encoder.is_random_when_frozen:
            batch = batch.pictures(batch.image_index)
        if batch.features is None and self._may_split():
            size, total = self._pictures_at_once(), batch.num_distinct
            parts = [self._encode(batch.pictures(slice(k, k + size))) for k in range(0, total, size)]
            visual = parts[0] if len(parts) == 1 else torch.cat(parts)
        else:
            visual = self._encode(batch)
        return visual if batch.image_index is None else visual[batch.image_index]

    def _encode(self, batch: Batch) -> Tensor:
        return self._connect(batch.features if batch.features is not None else self.extract_features(batch.pixels))

    def _may_split(self) -> bool:
        """Whether no features are kept for a backward pass, and no other process counts on one call of the encoder."""
        if self.training and self.always_encodes:
            return False
        return not torch.is_grad_enabled() or (self.is_frozen("vision_encoder") and self.is_frozen("connector"))

    def _pictures_at_once(self) -> int:
        encoder = self.vision_encoder
        width = _dtype(encoder, torch.float32).itemsize
        return max(1, _FEATURE_BYTES // (encoder.num_tokens * encoder.hidden_size * width))

    def _connect(self, features: Tensor) -> Tensor:
        kind, dtype = features.device.type, _dtype(self.connector, features.dtype)
        # Autocast casts to the narrower type where it must, but no operator that has narrow weights and wide inputs.
        if kind == "meta" or not torch.is_autocast_enabled(kind) or dtype != torch.float32:
            features = features.to(dtype)
        return self.connector.finish(features) if self.has_frozen_front else self.connector(features)

    def embed(self, batch: Batch, visual: Tensor | None = None) -> Tensor:
        """Input embeddings [B, L, hidden_size], visual tokens in place.

        ``visual`` may hold the tokens of :meth:`encode_images`, computed before.
        """
        is_image = batch.input_ids == IMAGE_TOKEN_ID
        embeds = self.language_model.embed(batch.input_ids.masked_fill(is_image, 0))
        if visual is None and batch.num_images:
            visual = self.encode_images(batch)
        if visual is not None:
            return splice(embeds, batch.input_ids, visual, batch.image_tokens, self.language_model.embed_scale)
        if embeds.device.type != "meta" and bool(is_image.any()):
            raise ValueError(f"{int(is_image.sum())} image positions in the batch, but no picture")
        if self.training and (self.always_encodes or not self.is_frozen("connector")):
            # Gradients of the connector must exist on every process, also where no sample has a picture.
            embeds = embeds + 0.0 * self._dummy_visual(embeds).sum()
        return embeds

    def _dummy_visual(self, like: Tensor) -> Tensor:
        if self.always_encodes:
            sides = {name: int(settings["size"]) for name, settings in self.vision_encoder.inputs.items()}
            blank = {name: torch.zeros(1, 3, side, side, device=like.device) for name, side in sides.items()}
            features = self.extract_features(blank)
        else:
            features = torch.zeros(1, *self.feature_shape, device=like.device)
        return self._connect(features).to(like.dtype)

    def forward(self, batch: Batch, return_logits: bool = False) -> VLMOutput:
        """Loss over the supervised positions; the output head runs only there.

        With ``return_logits`` it runs everywhere and the logits [B, L, vocabulary] are returned as well.
        """
        mask, language_model = batch.attention_mask, self.language_model
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        # Right padding stands behind every real token, so a causal model needs no mask for it.
        seen = mask if batch.padding_side == "left" else None
        output = VLMOutput()
        if self.training and language_model.router_loss is not None:
            hidden, output.router_loss = language_model.forward_balanced(self.embed(batch), mask, positions)
        else:
            hidden = language_model(self.embed(batch), seen, positions)
        if return_logits:
            output.logits = language_model.head(hidden)
        if batch.labels is not None:
            loss_sum, count = supervised_loss(hidden, batch.labels, language_model.head)
            if output.router_loss is not None and language_model.router_loss is not None:
                loss_sum = loss_sum + language_model.router_loss * output.router_loss * count
            output.loss_sum, output.token_count = loss_sum, count
            output.loss = loss_sum / count.clamp(min=1)
        return output

    def as_trained(self) -> Any:
        """The context in which pictures are encoded to talk about them.

        Beside a language model in half precision, a GPU computes in that type what is stored in fp32, as in training
        and evaluation; a CPU would not be faster.
        """
        kind, dtype = self.device.type, getattr(self.language_model, "dtype", torch.float32)
        half = dtype in (torch.bfloat16, torch.float16) and kind not in _FULL_PRECISION
        return torch.autocast(kind, dtype) if half else nullcontext()

    @torch.inference_mode()
    def generate(
        self, batch: Batch, *, visual: Tensor | None = None, keep_last: int | None = None, **options: Any
    ) -> Tensor:
        """New token ids [B, T] for left-padded prompts, greedy unless ``options`` say otherwise.

        ``keep_last`` leaves out all but so many of the last positions. Options are those of transformers'
        ``generate`` (max_new_tokens, num_beams, do_sample, temperature, top_p, streamer, stop_strings with
        tokenizer, ...).
        """
        with self.as_trained():
            embeds, mask = self.embed(batch, visual), batch.attention_mask
        if keep_last is not None:
            embeds, mask = embeds[:, -keep_last:], mask[:, -keep_last:]
        return self.language_model.generate(embeds, mask, **options)


def _dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    parameter = next(module.parameters(), None)
    return default if parameter is None else parameter.dtype
