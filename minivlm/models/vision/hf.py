"""Any vision model of transformers: CLIP, SigLIP, DINOv2, ViT, ConvNeXt, ..."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.models.base import ModelError, VisionEncoder, on_meta_device
from minivlm.models.configs import HFVisionConfig
from minivlm.models.hub import from_pretrained, load_hf_config, source_of

_OPENAI_CLIP = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


class HFVisionEncoder(VisionEncoder):
    """Hidden state of one layer, as patch tokens; layers behind it are not kept."""

    def __init__(self, config: HFVisionConfig):
        super().__init__()
        from transformers import AutoModel

        part = "model.vision_encoder"
        hf = load_hf_config(part, config.path, config.config, config.revision)
        hf = getattr(hf, "vision_config", hf)  # a CLIP or SigLIP folder also holds a text model
        if hasattr(hf, "vision_use_head"):
            hf.vision_use_head = False  # SigLIP's pooling head is never used
        self.config = config
        if config.path is None or on_meta_device():
            self.model: Any = AutoModel.from_config(hf)
        else:
            self.model = from_pretrained(part, AutoModel, config.path, config=hf, revision=config.revision)
            self.source = source_of(config.path, config.revision)
        self.image_size = config.image_size or _image_size(part, hf)
        self.interpolate = self.image_size != getattr(hf, "image_size", self.image_size)
        kept = self._keep_layers(part, hf)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self._measure(kept, AutoModel)
        self.image_settings = _image_settings(config, self.image_size, hf.model_type)

    def _keep_layers(self, part: str, hf: Any) -> Any:
        """Drop the layers behind the chosen one; returns the configuration of what is kept.

        The model's own configuration still tells of all layers, so that ``layer`` means the same when a
        checkpoint builds the encoder from it again.
        """
        count, layer = getattr(hf, "num_hidden_layers", None), self.config.layer
        if count is None:  # a convolutional network: its stages are not dropped
            if layer != -1:
                raise ModelError(
                    f"{part}.layer: {type(self.model).__name__} has no layers to choose from; leave it out"
                )
            return hf
        index = layer if layer >= 0 else count + 1 + layer
        if not 1 <= index <= count or (self.config.final_norm and index != count):
            raise ModelError(
                f"{part}.layer: {layer} of a model with {count} layers"
                + ("; final_norm needs the last one" if self.config.final_norm else "")
            )
        if index == count:
            return hf
        for module in self.model.modules():
            for name, child in module.named_children():
                if isinstance(child, nn.ModuleList) and len(child) == count:
                    setattr(module, name, child[:index])
                    kept = copy.deepcopy(hf)
                    kept.num_hidden_layers = index
                    return kept
        raise ModelError(f"{part}: cannot find the {count} layers of {type(self.model).__name__}")

    def _measure(self, hf: Any, auto_class: Any) -> None:
        """Sizes of the output, from a forward pass on the meta device."""
        with torch.device("meta"):
            pixels = torch.empty(1, 3, self.image_size, self.image_size)
            model = auto_class.from_config(hf).eval()
            shape = _hidden_state(model, pixels, self.config.final_norm, self.interpolate).shape
        self.hidden_size = shape[-1]
        is_vit = hasattr(hf, "num_attention_heads") and isinstance(getattr(hf, "patch_size", None), int)
        rows = self.image_size // hf.patch_size if is_vit else 0
        if not 0 < rows * rows <= shape[1]:  # a convolutional network, or a hierarchy such as Swin
            rows = round(shape[1] ** 0.5)
            if rows * rows != shape[1]:
                raise ModelError(f"model.vision_encoder: the {shape[1]} tokens of a {hf.model_type} are no square grid")
        self.grid = (rows, rows)
        self.num_prefix = shape[1] - rows * rows
        if self.config.class_token != "drop" and self.num_prefix == 0:
            raise ModelError("model.vision_encoder.class_token: this model has no class token; use drop")
        self.num_tokens = {"drop": rows * rows, "keep": shape[1], "only": 1}[self.config.class_token]

    def forward(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, num_tokens, hidden_size]."""
        hidden = _hidden_state(self.model, pixels, self.config.final_norm, self.interpolate)
        if self.config.class_token == "only":
            return hidden[:, :1]
        return hidden[:, self.num_prefix :] if self.config.class_token == "drop" else hidden


def _hidden_state(model: nn.Module, pixels: Tensor, final_norm: bool, interpolate: bool) -> Tensor:
    options = {"interpolate_pos_encoding": True} if interpolate else {}
    output = model(pixel_values=pixels, output_hidden_states=not final_norm, **options)
    hidden = output.last_hidden_state if final_norm else output.hidden_states[-1]
    return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden


def _image_size(part: str, hf: Any) -> int:
    size = getattr(hf, "image_size", None)
    if isinstance(size, (list, tuple)):
        size = size[0]
    if not isinstance(size, int):
        raise ModelError(f"{part}.image_size: the model's configuration names no size; set it")
    return size


def _image_settings(config: HFVisionConfig, size: int, model_type: str) -> dict[str, Any]:
    """The checkpoint's own preprocessor_config.json in our words; SigLIP's or CLIP's values without one."""
    statistics = {"mean": [0.5] * 3, "std": [0.5] * 3} if "siglip" in model_type else _OPENAI_CLIP
    settings: dict[str, Any] = {"size": size, "resize": "squash", "interpolation": "bicubic", **statistics}
    own = {key: value for key, value in (("mean", config.mean), ("std", config.std)) if value}
    if config.path is None:
        return settings | own
    from transformers.utils import cached_file

    try:
        file = cached_file(config.path, "preprocessor_config.json", revision=config.revision)
    except OSError:  # it has none
        return settings | own
    return settings | picture_settings(json.loads(Path(str(file)).read_text(encoding="utf-8"))) | own


def picture_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What the settings of a picture processor of transformers are in our words; the size is the encoder's."""
    edges = raw.get("size")  # older files hold a number
    crops = raw.get("do_center_crop", False) or (isinstance(edges, dict) and "shortest_edge" in edges)
    # Of LLaVA `do_pad` means to a square, before all else; then there is nothing to crop.
    pads = raw.get("do_pad", False) and str(raw.get("image_processor_type")).startswith("Llava")
    resize = "pad" if pads else "shortest_edge" if crops else "squash"
    statistics = {"mean": raw.get("image_mean"), "std": raw.get("image_std")}
    return {
        "resize": resize,
        "interpolation": _RESAMPLE.get(raw.get("resample", 3), "bicubic"),
        **{key: value for key, value in statistics.items() if value is not None},
    }
