"""Mini-Gemini's patch info mining (Li et al. 2024, section 3.2): tokens look for detail in cells of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minivlm.models.base import Connector, ModelError, VisionEncoder
from minivlm.models.build import build_inner
from minivlm.models.configs import PatchInfoMiningConfig

_CELLS = {"cpu": 2**10}
"""So many have an fp32 copy at a time, which a CPU keeps in its cache; elsewhere 2**14."""


class PatchInfoMining(Connector):
    """Attention of every low-resolution token to its cells, added to the token; then another connector.

    Queries, keys and values are each a LayerNorm and a linear layer, and the softmax is over the cells of one token.
    Cells are never projected, nor is a normalised copy of them made: with one query per token its product with all
    keys is that of ``W_k^T q`` with the normalised cells, and the mean of the values is ``W_v`` times that of the
    normalised cells. Norms leave a scale per cell, which goes into the weights, and a mean, which goes away when
    the other factor is centred.
    """

    def __init__(self, config: PatchInfoMiningConfig, encoder: VisionEncoder, output_size: int):
        super().__init__()
        low, high = getattr(encoder, "low_size", None), getattr(encoder, "high_size", None)
        if low is None or high is None:
            raise ModelError(
                "connector patch_info_mining: the encoder gives no cells of a higher resolution; take "
                "model.vision_encoder.name: dual"
            )
        self.low_size, self.high_size = low, high
        self.query: Any = nn.Sequential(nn.LayerNorm(low), nn.Linear(low, low))
        self.key: Any = nn.Sequential(nn.LayerNorm(high), nn.Linear(high, low))
        self.value: Any = nn.Sequential(nn.LayerNorm(high), nn.Linear(high, low))
        tokens = VisionEncoder()  # what the projector sees of the encoder
        tokens.hidden_size, tokens.grid, tokens.num_tokens = low, encoder.grid, encoder.num_tokens
        self.projector: Connector = build_inner(
            "model.connector.projector", "connector", config.projector, tokens, output_size
        )
        self.tokens_per_image = self.projector.tokens_per_image

    def forward(self, features: Tensor) -> Tensor:
        """[N, tokens, low_size + cells * high_size] -> [N, tokens_per_image, output_size].

        Features without cells are projected as they are.
        """
        tokens = features[..., : self.low_size]
        if features.shape[-1] > self.low_size:
            tokens = tokens + self.mine(tokens, features[..., self.low_size :].unflatten(-1, (-1, self.high_size)))
        return self.projector(tokens)

    def mine(self, tokens: Tensor, cells: Tensor) -> Tensor:
        """[N, T, low_size] and their cells [N, T, M, high_size] -> what is found there, [N, T, low_size]."""
        (key_norm, key), (value_norm, value) = self.key, self.value
        weight, bias = _matrix(key)
        query = self.query(tokens) * self.low_size**-0.5
        direction = _centred((query @ weight) * key_norm.weight).to(cells.dtype)
        constant = query @ (weight @ key_norm.bias + bias)
        scale = _inverse_deviation(cells, key_norm.eps)
        products = (direction[..., None, :] @ cells.transpose(-1, -2))[..., 0, :]
        logits = products.float() * scale + constant.float()[..., None]
        shares = torch.nan_to_num(logits).softmax(-1) * scale
        mean = _centred((shares.to(cells.dtype)[..., None, :] @ cells)[..., 0, :])
        return value((mean * value_norm.weight + value_norm.bias).to(tokens.dtype))


def _centred(x: Tensor) -> Tensor:
    x = x.float()
    return x - x.mean(-1, keepdim=True)


def _inverse_deviation(cells: Tensor, eps: float) -> Tensor:
    """[N, T, M, A] -> fp32 [N, T, M], as a LayerNorm over the last dimension has it."""
    step = max(1, _CELLS.get(cells.device.type, 2**14) // cells[:, 0, :, 0].numel())
    norms = torch.empty(cells.shape[:-1], device=cells.device)  # small results in between would scatter the memory
    for start in range(0, cells.shape[1], step):
        norms[:, start : start + step] = torch.linalg.vector_norm(_centred(cells[:, start : start + step]), dim=-1)
    return (norms.square() / cells.shape[-1] + eps).rsqrt()


def _matrix(layer: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer, with the adapters that it may have."""
    if type(layer) is nn.Linear:
        return layer.weight, layer.bias
    base, width = next(layer.parameters()), layer.in_features  # where weights are shared out, they have no shape
    bias = layer(base.new_zeros(1, width))[0]
    return (layer(torch.eye(width, dtype=base.dtype, device=base.device)) - bias).T, bias
