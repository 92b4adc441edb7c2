"""Tiny models whose language model is a Phi, and what tests of adapters do with them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from helpers import tiny_model

from minivlm.api import assemble
from minivlm.config.loader import parse_model
from minivlm.models.lora import is_adapter
from minivlm.models.vlm import VisionLanguageModel
from minivlm.types import IMAGE_TOKEN_ID, Batch

PHI = {
    "model_type": "phi",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 128,
}
QKV = [["q_proj", "k_proj", "v_proj"]]


def section(lora: dict[str, Any] | None = None, **language: Any) -> dict[str, Any]:
    """Section ``model`` with a frozen language model and its adapters."""
    model = tiny_model()
    model["language_model"] |= {"config": PHI, "freeze": True, "lora": lora, **language}
    return model


def build(model: dict[str, Any], meta: bool = False) -> tuple[VisionLanguageModel, Any, Any]:
    """Model, processor and complete section; the same numbers at every call."""
    torch.manual_seed(0)
    return assemble(parse_model(copy.deepcopy(model), "test"), meta=meta)


def batch(model: VisionLanguageModel, seed: int = 0) -> Batch:
    """Two samples with a picture each, drawn with a seed."""
    draw = torch.Generator().manual_seed(seed)
    count = model.connector.tokens_per_image
    ids = torch.randint(5, 300, (2, 8 + count), generator=draw)
    ids[:, 2 : 2 + count] = IMAGE_TOKEN_ID
    labels = torch.where(torch.arange(8 + count) < 2 + count, -100, ids)
    size = model.vision_encoder.image_settings["size"]
    pixels = {"image": torch.randn(2, 3, size, size, generator=draw)}
    return Batch(ids, torch.ones_like(ids), labels=labels, pixels=pixels)


def logits(model: VisionLanguageModel) -> torch.Tensor:
    """Logits of all positions of :func:`batch`."""
    with torch.inference_mode():
        found = model.eval()(batch(model), return_logits=True).logits
    assert found is not None
    return found


def stir(model: VisionLanguageModel) -> None:
    """Give the adapters, whose B begins as zero, something to say."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
