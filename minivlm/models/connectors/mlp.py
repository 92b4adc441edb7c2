"""Connectors of linear layers."""

from __future__ import annotations

from torch import Tensor, nn

from minivlm.models.base import Connector, ModelError, VisionEncoder
from minivlm.models.configs import LinearConnectorConfig, MLPConnectorConfig, PatchMergeConfig


class LinearConnector(Connector):
    """One linear layer, as in MiniMind-V and in LLaVA (Liu et al. 2023)."""

    def __init__(self, config: LinearConnectorConfig, encoder: VisionEncoder, output_size: int):
        super().__init__()
        self.tokens_per_image = encoder.num_tokens
        self.linear = nn.Linear(encoder.hidden_size, output_size, bias=config.bias)

    def forward(self, features: Tensor) -> Tensor:
        """[N, tokens, channels] -> [N, tokens, output_size]."""
        return self.linear(features)


class MLPConnector(Connector):
    """Linear layers with exact GELU between them (LLaVA-1.5, Liu et al. 2024, section 3.2).

    ``merge`` joins merge x merge neighbours into one token of merge^2 times the channels first, which
    trades tokens for channels (pixel shuffle in Idefics2 and InternVL).
    """

    def __init__(self, config: MLPConnectorConfig, encoder: VisionEncoder, output_size: int):
        super().__init__()
        self.grid, self.merge = encoder.grid, config.merge
        rows, columns = self.grid
        if rows % self.merge or columns % self.merge:
            raise ModelError(
                f"connector mlp: merge {self.merge} does not divide the encoder's grid of {rows} x {columns}; "
                "choose another merge, image size or pool"
            )
        if self.merge > 1 and encoder.num_tokens != rows * columns:
            raise ModelError("connector mlp: merge works on patch tokens only; set class_token: drop")
        self.tokens_per_image = encoder.num_tokens // self.merge**2
        size = encoder.hidden_size * self.merge**2
        hidden = config.hidden_size or output_size
        layers: list[nn.Module] = [nn.LayerNorm(size)] if config.norm else []
        for index in range(config.depth):
            last = index == config.depth - 1
            layers += [nn.Linear(size, output_size if last else hidden)] + ([] if last else [nn.GELU()])
            size = hidden
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """[N, tokens, channels] -> [N, tokens / merge^2, output_size]."""
        if self.merge > 1:
            features = merge_neighbours(features, self.grid, self.merge)
        return self.layers(features)


class PatchMergeConnector(Connector):
    """Consecutive patch tokens joined in raster order, and one linear layer.

    MiniGPT-4 on Llama-2 and MiniGPT-v2 join four neighbours of a row, where ``mlp`` with ``merge: 2``
    joins a square. What the encoder puts in front of the patches (a class token) is left out.
    """

    def __init__(self, config: PatchMergeConfig, encoder: VisionEncoder, output_size: int):
        super().__init__()
        self.factor = config.factor
        self.patches = encoder.grid[0] * encoder.grid[1]
        if self.patches % self.factor:
            raise ModelError(
                f"connector patch_merge: factor {self.factor} does not divide the encoder's {self.patches} patch "
                "tokens; choose another factor or image size"
            )
        self.tokens_per_image = self.patches // self.factor
        self.linear = nn.Linear(encoder.hidden_size * self.factor, output_size)

    def forward(self, features: Tensor) -> Tensor:
        """[N, tokens, channels] -> [N, patches / factor, output_size]."""
        patches = features[:, -self.patches :]
        return self.linear(patches.reshape(len(patches), self.tokens_per_image, -1))


def merge_neighbours(features: Tensor, grid: tuple[int, int], merge: int) -> Tensor:
    """[N, rows * columns, C] -> [N, rows * columns / merge^2, merge^2 * C], square blocks row by row."""
    rows, columns = grid
    blocks = features.unflatten(1, (rows // merge, merge, columns // merge, merge)).transpose(2, 3)
    return blocks.flatten(3).flatten(1, 2)
