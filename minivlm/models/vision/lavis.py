"""Any model of LAVIS as a frozen encoder, run in an environment of its own."""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
from torch import Tensor

from minivlm.lavis.client import LavisError, absolute, request
from minivlm.models.base import ModelError, VisionEncoder
from minivlm.models.configs import LavisVisionConfig


class LavisVisionEncoder(VisionEncoder):
    """Output of LAVIS's ``extract_features``, ``forward_image`` or ViT; fp32, on the device of the pixels.

    The buffer ``fingerprint`` (32 bytes) is a hash of LAVIS's version, the model's settings and all its weights,
    so that feature caches and checkpoints tell one model from another. Building one for its shapes alone
    starts LAVIS, too, since nobody else knows them.
    """

    can_train = False
    fingerprint: Tensor

    def __init__(self, config: LavisVisionConfig):
        super().__init__()
        self.config = config
        self.spec: dict[str, Any] = {
            "name": config.model,
            "type": config.type,
            "output": config.output,
            "options": config.options,
            "checkpoint": absolute(config.checkpoint) if config.checkpoint else None,
            "image_size": config.image_size,
            "device": config.device,
        }
        info = self._ask("model")[0]
        self.hidden_size: int = info["hidden_size"]
        self.num_tokens: int = info["num_tokens"]
        side = isqrt(self.num_tokens)
        # Queries are no grid; they count as one row of tokens.
        self.grid = (side, side) if self.num_tokens - side * side <= 1 else (1, self.num_tokens)
        self.image_settings = info["image"]
        self.register_buffer("fingerprint", torch.tensor(list(bytes.fromhex(info["fingerprint"])), dtype=torch.uint8))
        self.source = {"path": f"LAVIS {config.model}/{config.type}", "sha256": info["fingerprint"]}

    def forward(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, num_tokens, hidden_size]."""
        _, arrays = self._ask("features", {"pixels": pixels.detach().float().cpu().numpy()})
        return torch.from_numpy(arrays["features"]).to(pixels.device)

    def _ask(self, command: str, arrays: Any = None) -> Any:
        try:
            return request(self.config, command, arrays, model=self.spec)
        except LavisError as error:
            raise ModelError(f"model.vision_encoder: {error}") from error
