"""EVA-CLIP-g (Sun et al. 2023) as BLIP-2 and MiniGPT-4 use it, built on timm's ``Eva``.

The parameters below ``vit`` have the names and shapes of ``eva_vit_g.pth``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import interpolate
from torch.utils.checkpoint import checkpoint

from minivlm.models.base import DTYPES, ModelError, VisionEncoder
from minivlm.models.configs import EvaClipGConfig


class EvaClipG(VisionEncoder):
    """All blocks but the last of EVA-CLIP-g, without norm and pooling, then ``ln_vision``.

    Weights kept in half precision are computed with under autocast; fp16 on a CPU is computed in fp32,
    block by block, so that the copy stays small. Position embeddings of another image size are
    interpolated when a state dict is loaded.
    """

    def __init__(self, config: EvaClipGConfig):
        super().__init__()
        from timm.models.eva import Eva

        if config.image_size % config.patch_size or config.width % config.num_heads:
            raise ModelError(
                f"model.vision_encoder: image_size {config.image_size} must be a multiple of patch_size "
                f"{config.patch_size}, and width {config.width} one of num_heads {config.num_heads}"
            )
        self.config = config
        self.vit: Any = Eva(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            drop_path_rate=config.drop_path_rate,
            num_classes=0,
            global_pool="",
            use_post_transformer_norm=False,
        )
        self.ln_vision = nn.LayerNorm(config.width)  # eps 1e-5, where those of the blocks have 1e-6
        for module in self.vit.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.to(DTYPES[config.dtype])
        side = config.image_size // config.patch_size
        self.hidden_size = config.width
        self.grid = (side, side)
        self.num_tokens = side * side + (config.class_token == "keep")
        self.image_settings = {
            "size": config.image_size,
            "resize": "squash",
            "interpolation": "bicubic",
            "mean": [0.48145466, 0.4578275, 0.40821073],
            "std": [0.26862954, 0.26130258, 0.27577711],
        }
        self.register_load_state_dict_pre_hook(_fit_positions)

    def fits(self, name: str, shape: torch.Size) -> bool:
        """Positions of another square grid are interpolated when they are loaded."""
        own = self.vit.pos_embed.shape
        alike = name == "vit.pos_embed" and len(shape) == len(own) and shape[::2] == own[::2]
        return alike and shape[1] > 1 and (shape[1] - 1) ** 0.5 % 1 == 0

    def forward(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, num_tokens, width]."""
        stored, kind = self.vit.patch_embed.proj.weight.dtype, pixels.device.type
        plain = stored == torch.float32 or torch.is_autocast_enabled(kind)
        lift = not plain and stored == torch.float16 and kind == "cpu"
        call: Callable[[nn.Module, Tensor], Tensor] = _in_fp32 if lift else nn.Module.__call__
        recompute = self.config.gradient_checkpointing and self.training and torch.is_grad_enabled()
        with nullcontext() if plain or lift else torch.autocast(kind, stored):
            x = call(self.vit.patch_embed, pixels)
            x = torch.cat([self.vit.cls_token.expand(len(x), -1, -1), x], dim=1) + self.vit.pos_embed
            for block in self.vit.blocks:
                x = checkpoint(call, block, x, use_reentrant=False) if recompute else call(block, x)
            x = call(self.ln_vision, x)
        return x if self.config.class_token == "keep" else x[:, 1:]


def _in_fp32(module: nn.Module, x: Tensor) -> Tensor:
    """Call a module with its weights as fp32, without changing them."""
    state = {name: t.float() for name, t in chain(module.named_parameters(), module.named_buffers())}
    return functional_call(module, state, (x.float(),))


def interpolate_positions(positions: Tensor, side: int) -> Tensor:
    """[1, 1 + g * g, C] -> fp32 [1, 1 + side * side, C]: bicubic over the grid; the class token's stays."""
    grid = round((positions.shape[1] - 1) ** 0.5)
    if grid == side:
        return positions
    positions = positions.float()  # files in half precision must not round what is between their values
    patches = positions[:, 1:].unflatten(1, (grid, grid)).permute(0, 3, 1, 2)
    patches = interpolate(patches, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def _fit_positions(module: EvaClipG, state: dict[str, Any], prefix: str, *_: Any) -> None:
    key = f"{prefix}vit.pos_embed"
    if key in state and module.fits("vit.pos_embed", state[key].shape):  # anything else is refused by torch
        state[key] = interpolate_positions(state[key], module.grid[0])
