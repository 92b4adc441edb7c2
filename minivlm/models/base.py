"""What a vision encoder, a connector and a language model must tell the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.schema import LoraSettings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Storage types by their names in configurations."""


class ModelError(ValueError):
    """A part that cannot be built, or weights that do not belong to it."""


class PartModule(nn.Module):
    """What the three parts have in common: they know where their weights came from."""

    source: dict[str, str] | None = None
    """The base of the weights (``path``, ``revision``, ``sha256``, ...), None if no base gives them."""
    unsourced: frozenset[str] = frozenset()
    """Names of the tensors that the source does not give, such as a new projection behind a loaded Q-Former."""
    lora: LoraSettings | None = None
    """The settings of the adapters that it has, None without any; see :mod:`minivlm.models.lora`."""
    adapter_parameters: frozenset[str] = frozenset()
    """Names of the parameters of the adapters; empty without them."""
    quantization: str | None = None
    """How its base weights are quantised (int8, nf4); such weights neither train nor take adapters in."""
    built_from: Mapping[str, Any] = {}
    """Settings that say, in place of ``path``, what it is built of, once its weights are elsewhere."""
    can_train: bool = True
    """False if the weights are out of reach, so that the part is frozen whatever happens."""

    @property
    def keeps_source(self) -> bool:
        """Whether checkpoints leave out a base that can be read again: below adapters, and of quantised weights."""
        return self.lora is not None or self.quantization is not None

    @property
    def output_head(self) -> nn.Module | None:
        """The layer that gives the logits, None for a part without one."""
        return None

    @property
    def is_random_when_frozen(self) -> bool:
        """Whether it draws at random in training although nothing of it trains, so that no output can be kept."""
        return False

    def train_frozen(self, mode: bool) -> None:
        """What ``train(mode)`` means while nothing of it trains: eval mode, unless its recipe asks for more."""
        self.eval()

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

    The encoder is only asked for its sizes and not kept. A connector whose beginning may be frozen by itself
    (a Q-Former) offers it as its front: it sets ``front_names`` and ``front_shape`` and writes :meth:`front`
    and :meth:`finish`, whose succession is its :meth:`forward`. The output of a frozen front behind a frozen
    encoder is what a feature cache keeps.
    """

    tokens_per_image: int
    """How many positions of the language model one picture takes."""
    front_names: tuple[str, ...] = ()
    """The children and parameters that the front consists of; empty for a connector without one."""
    front_shape: tuple[int, int]
    """Tokens and channels of the front's output."""

    def forward(self, features: Tensor) -> Tensor:
        """[N, tokens, channels] -> [N, tokens_per_image, output_size]."""
        raise NotImplementedError

    def front(self, features: Tensor) -> Tensor:
        """[N, tokens, channels] -> [N, *front_shape]."""
        raise NotImplementedError

    def finish(self, hidden: Tensor) -> Tensor:
        """[N, *front_shape] -> [N, tokens_per_image, output_size]."""
        raise NotImplementedError

    def front_state(self) -> dict[str, Tensor]:
        """The front's own parameters and buffers by name."""
        state = self.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in state.items() if name.split(".")[0] in self.front_names}

    def move_front(self, device: torch.device | str) -> None:
        """Move the front to another device than the rest."""
        for name in self.front_names:
            part = getattr(self, name)
            if isinstance(part, nn.Module):
                part.to(device)
            else:
                part.data = part.data.to(device)


class LanguageModel(PartModule):
    """Embeddings to hidden states, logits and text; built as ``cls(config, vocab_size)``."""

    hidden_size: int
    vocab_size: int
    embed_scale: float = 1.0
    """What visual tokens are multiplied by, as :meth:`embed` multiplies those of text (Gemma: sqrt(hidden_size))."""
    router_loss: float | None = None
    """Weight of :meth:`forward_balanced`'s loss in training; None: it is not wanted."""
    device_map: str | dict[str, Any] | None = None
    """How its layers are to be spread over several devices; see :mod:`minivlm.models.placement`."""
    main_device: torch.device | None = None
    """Where its inputs belong and its outputs come back, once they have been spread."""

    def embed(self, ids: Tensor) -> Tensor:
        """[B, L] -> [B, L, hidden_size]."""
        raise NotImplementedError

    def forward(self, embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> Tensor:
        """[B, L, hidden_size] -> final hidden states [B, L, hidden_size]."""
        raise NotImplementedError

    def forward_balanced(self, embeds: Tensor, attention_mask: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`forward`, and how unevenly a mixture of experts is used: a scalar, a mean over positions."""
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
