"""Connectors: values against formulas written out, and the number of tokens that they promise."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minivlm.models.base import ModelError
from minivlm.models.configs import LinearConnectorConfig, MLPConnectorConfig
from minivlm.models.connectors.mlp import LinearConnector, MLPConnector, merge_neighbours


def encoder(rows: int = 4, columns: int = 4, prefix: int = 0, channels: int = 6) -> Any:
    """Stands for a vision encoder, of which a connector reads three sizes."""
    return SimpleNamespace(grid=(rows, columns), num_tokens=rows * columns + prefix, hidden_size=channels)


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    connector = LinearConnector(LinearConnectorConfig(bias=bias), encoder(prefix=1), 10)
    features = torch.randn(3, 17, 6)
    assert connector.tokens_per_image == 17
    assert len(list(connector.parameters())) == 1 + bias
    expected = features @ connector.linear.weight.T + (connector.linear.bias if bias else 0)
    torch.testing.assert_close(connector(features), expected)


def test_the_default_mlp_is_that_of_llava() -> None:
    connector = MLPConnector(MLPConnectorConfig(), encoder(prefix=1), 10)
    names = {name: tuple(p.shape) for name, p in connector.named_parameters()}
    assert names == {
        "layers.0.weight": (10, 6),
        "layers.0.bias": (10,),
        "layers.2.weight": (10, 10),
        "layers.2.bias": (10,),
    }
    one, two = connector.layers[0], connector.layers[2]
    features = torch.randn(2, 17, 6)
    expected = gelu(features @ one.weight.T + one.bias) @ two.weight.T + two.bias
    torch.testing.assert_close(connector(features), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("depth", "hidden", "widths"),
    [(1, None, [(6, 10)]), (1, 7, [(6, 10)]), (2, 7, [(6, 7), (7, 10)]), (3, None, [(6, 10), (10, 10), (10, 10)])],
)
def test_depth_and_width(depth: int, hidden: int | None, widths: list[tuple[int, int]]) -> None:
    connector = MLPConnector(MLPConnectorConfig(depth=depth, hidden_size=hidden), encoder(), 10)
    linear = [m for m in connector.layers if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == widths
    assert sum(isinstance(m, nn.GELU) for m in connector.layers) == depth - 1
    assert not isinstance(connector.layers[-1], nn.GELU)
    assert connector(torch.randn(2, 16, 6)).shape == (2, 16, 10)


def test_the_norm_stands_before_the_first_layer_and_behind_the_merge() -> None:
    connector = MLPConnector(MLPConnectorConfig(depth=1, norm=True, merge=2), encoder(), 10)
    features = torch.randn(2, 16, 6) * 5 + 3
    merged = merge_neighbours(features, (4, 4), 2)
    centred = merged - merged.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    linear = connector.layers[1]
    torch.testing.assert_close(connector(features), normed @ linear.weight.T + linear.bias, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "columns", "merge"), [(4, 4, 2), (6, 4, 2), (2, 6, 2), (3, 6, 3), (4, 4, 4), (4, 4, 1)]
)
def test_neighbours_are_joined_square_by_square(rows: int, columns: int, merge: int) -> None:
    features = torch.arange(2 * rows * columns * 3, dtype=torch.float32).view(2, rows * columns, 3)
    merged = merge_neighbours(features, (rows, columns), merge)
    expected = []
    for picture in features:
        for top in range(0, rows, merge):
            for left in range(0, columns, merge):
                square = [(top + down) * columns + left + right for down in range(merge) for right in range(merge)]
                expected.append(torch.cat([picture[index] for index in square]))
    count = rows * columns // merge**2
    assert torch.equal(merged, torch.stack(expected).view(2, count, merge**2 * 3))
    connector = MLPConnector(MLPConnectorConfig(merge=merge), encoder(rows, columns, channels=3), 10)
    assert connector.tokens_per_image == count
    assert connector(features).shape == (2, count, 10)


def test_merges_that_do_not_fit() -> None:
    with pytest.raises(ModelError, match="merge 3 does not divide the encoder's grid of 4 x 4"):
        MLPConnector(MLPConnectorConfig(merge=3), encoder(), 10)
    with pytest.raises(ModelError, match="merge 2 does not divide the encoder's grid of 4 x 5"):
        MLPConnector(MLPConnectorConfig(merge=2), encoder(4, 5), 10)
    with pytest.raises(ModelError, match="merge works on patch tokens only; set class_token: drop"):
        MLPConnector(MLPConnectorConfig(merge=2), encoder(prefix=1), 10)


@pytest.mark.parametrize("config", [MLPConnectorConfig(norm=True, merge=2), LinearConnectorConfig()])
def test_every_parameter_and_the_features_get_gradients(config: Any) -> None:
    cls = LinearConnector if isinstance(config, LinearConnectorConfig) else MLPConnector
    connector = cls(config, encoder(), 10)
    features = torch.randn(2, 16, 6, requires_grad=True)
    connector(features).square().sum().backward()
    assert features.grad is not None and features.grad.abs().min() > 0
    for name, parameter in connector.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_the_encoder_is_not_kept() -> None:
    class Encoder(nn.Module):
        grid, num_tokens, hidden_size = (4, 4), 16, 6

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1000))

    for cls, config in ((LinearConnector, LinearConnectorConfig()), (MLPConnector, MLPConnectorConfig())):
        connector = cls(config, Encoder(), 10)  # type: ignore[arg-type]
        assert sum(p.numel() for p in connector.parameters()) < 500
