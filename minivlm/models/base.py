"""What a vision encoder, a connector and a language model must tell the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class ModelError(ValueError):
    """A part that cannot be built, or weights that do not belong to it."""


class PartModule(nn.Module):
    """What the three parts have in common: they know where their weights came from."""

    source: dict[str, str] | None = None
    """The base of the weights (``path``, ``revision``, ``sha256``, ...), None if no base gives them."""
    unsourced: frozenset[str] = frozenset()
    """Names of the tensors that the source does not give, such as a new projection behind a loaded Q-Former."""

    def fits(self, name: str, shape: torch.Size) -> bool:
        """Whether ``load_state_dict`` takes a tensor of another shape, as positions of another picture size."""
        return False


class VisionEncoder(PartModule):
    """Pixels to features. A subclass sets the attributes below and writes :meth:`forward`.

    Built as ``cls(config)``; a subclass that can load weights does so in its constructor, unless torch's
    default device is ``meta`` (then only the shapes are wanted).
    """

    hidden_size: int
    """Channels of the features."""
    grid: tuple[int, int]
    """Rows and columns of the patch tokens."""
    num_tokens: int
    """Tokens of a picture; the patch tokens are the last ``grid[0] * grid[1]`` of them."""
    image_settings: Mapping[str, Any]
    """``size``, ``resize``, ``interpolation``, ``mean``, ``std``: how a picture becomes its input."""

    def forward(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, tokens, channels]."""
        raise NotImplementedError

    @property
    def inputs(self) -> Mapping[str, Mapping[str, Any]]:
        """Name and settings of every picture input; an encoder of two resolutions has two."""
        return {"image": self.image_settings}

    def encode(self, pixels: Mapping[str, Tensor]) -> Tensor:
        """Features from the named inputs; the usual encoder has one, called ``image``."""
        return self(pixels["image"])


class Connector(PartModule):
    """Features to visual tokens; built as ``cls(config, encoder, output_size)``.

    The encoder is only asked for its sizes and not kept.
    """

    tokens_per_image: int
    """How many positions of the language model one picture takes."""

    def forward(self, features: Tensor) -> Tensor:
        """[N, tokens, channels] -> [N, tokens_per_image, output_size]."""
        raise NotImplementedError


class LanguageModel(PartModule):
    """Embeddings to hidden states, logits and text; built as ``cls(config, vocab_size)``."""

    hidden_size: int
    vocab_size: int

    def embed(self, ids: Tensor) -> Tensor:
        """[B, L] -> [B, L, hidden_size]."""
        raise NotImplementedError

    def forward(self, embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> Tensor:
        """[B, L, hidden_size] -> final hidden states [B, L, hidden_size]."""
        raise NotImplementedError

    def head(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] -> logits [..., vocab_size]."""
        raise NotImplementedError

    def generate(self, embeds: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """Left-padded [B, L, hidden_size] -> new ids [B, T]."""
        raise NotImplementedError


def on_meta_device() -> bool:
    """Whether parts are being built for their shapes only."""
    return torch.get_default_device().type == "meta"
