"""Any vision model of timm, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minivlm.models.base import ModelError, VisionEncoder, on_meta_device
from minivlm.models.configs import TimmVisionConfig


class TimmVisionEncoder(VisionEncoder):
    """Output of ``forward_features``, as patch tokens (a feature map is flattened row by row)."""

    def __init__(self, config: TimmVisionConfig):
        super().__init__()
        import timm
        from timm.data import resolve_model_data_config

        arguments: dict[str, Any] = {"num_classes": 0, **config.kwargs}
        self.config = config
        try:
            pretrained = config.pretrained and not on_meta_device()
            self.model: Any = _create(config, pretrained=pretrained, **arguments)
            with torch.device("meta"):
                meta = _create(config, pretrained=False, **arguments)
        except (RuntimeError, TypeError, ValueError) as error:
            near = timm.list_models(f"*{config.model_name.split('.')[0][:12]}*")[:3]
            raise ModelError(
                f"model.vision_encoder: timm cannot build '{config.model_name}': {error}"
                + (f" (near: {', '.join(near)})" if near else "")
            ) from error
        if pretrained:
            self.source = {"timm": config.model_name, "timm_version": timm.__version__}
        if config.gradient_checkpointing:
            self.model.set_grad_checkpointing()
        data = resolve_model_data_config(self.model)
        size = config.image_size or data["input_size"][-1]
        self.image_settings = {
            "size": size,
            "resize": "squash" if data.get("crop_mode") == "squash" else "shortest_edge",
            "interpolation": data["interpolation"],
            "mean": list(data["mean"]),
            "std": list(data["std"]),
        }
        self.num_prefix = getattr(self.model, "num_prefix_tokens", 0)
        shape = meta.eval().forward_features(torch.empty(1, 3, size, size, device="meta")).shape
        if len(shape) == 4:
            channels_last = getattr(meta, "output_fmt", "NCHW") == "NHWC" or shape[-1] == meta.num_features
            self.channels_last = channels_last and shape[1] != meta.num_features
            self.hidden_size = shape[-1] if self.channels_last else shape[1]
            self.grid = (shape[1], shape[2]) if self.channels_last else (shape[2], shape[3])
        else:
            self.hidden_size = shape[-1]
            side = int((shape[1] - self.num_prefix) ** 0.5)
            self.grid = (side, side)
        keep = self.num_prefix if config.class_token == "keep" else 0
        self.num_tokens = self.grid[0] * self.grid[1] + keep

    def forward(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, num_tokens, hidden_size]."""
        features = self.model.forward_features(pixels)
        if features.dim() == 4:
            features = features.flatten(1, 2) if self.channels_last else features.flatten(2).transpose(1, 2)
        return features if self.config.class_token == "keep" else features[:, self.num_prefix :]


def _create(config: TimmVisionConfig, **arguments: Any) -> Any:
    import timm

    if config.image_size is None:
        return timm.create_model(config.model_name, **arguments)
    try:
        return timm.create_model(config.model_name, img_size=config.image_size, **arguments)
    except TypeError:  # a convolutional network takes any size and has no such argument
        return timm.create_model(config.model_name, **arguments)
