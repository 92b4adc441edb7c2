"""MiniGPT-4 at the sizes of the golden set, with random weights: the same parts, template and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parent / "golden" / "minigpt4"


def tiny_minigpt4(version: int = 1) -> dict[str, Any]:
    """Section ``model`` of MiniGPT-4 on Vicuna with a Q-Former, or of MiniGPT-v2."""
    sizes = json.loads((GOLDEN / "config.json").read_text())
    vit, qformer = sizes["vit"], sizes["qformer"]
    qformer_connector = {
        "name": "qformer",
        "num_query_tokens": qformer["num_query_token"],
        "hidden_size": qformer["hidden_size"],
        "num_layers": qformer["num_hidden_layers"],
        "num_heads": qformer["num_attention_heads"],
        "intermediate_size": qformer["intermediate_size"],
        "cross_attention_every": qformer["cross_attention_freq"],
    }
    return {
        "vision_encoder": {
            "name": "eva_clip_g",
            "image_size": vit["image_size"],
            "patch_size": vit["patch_size"],
            "width": vit["embed_dim"],
            "depth": vit["depth"],
            "num_heads": vit["num_heads"],
            "mlp_ratio": vit["mlp_ratio"],
            "class_token": "keep" if version == 1 else "drop",
        },
        "connector": qformer_connector if version == 1 else {"name": "patch_merge"},
        "language_model": {"name": "hf", "path": str(GOLDEN / "llama")},
        "template": "minigpt4_vicuna0" if version == 1 else "minigpt_v2",
    }
