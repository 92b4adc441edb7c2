"""The golden set of MiniGPT-4: where it lies, and the ``model`` section of its three variants."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

GOLDEN = Path(os.environ.get("MINIVLM_GOLDEN", Path(__file__).parent / "golden")) / "minigpt4"

CHECKPOINTS = {
    "vicuna0": "minigpt4_tiny.pth",
    "llama2": "minigpt4_llama2style_tiny.pth",
    "v2": "minigptv2_tiny.pth",
}
"""The file of each variant: with Q-Former, without it, without it and with LoRA."""
TEMPLATES = {"vicuna0": "minigpt4_vicuna0", "llama2": "minigpt4_llama2", "v2": "minigpt_v2"}


def golden_config() -> dict[str, Any]:
    """Sizes of the golden models."""
    return json.loads((GOLDEN / "config.json").read_text())


def golden_images() -> list[Path]:
    """The pictures, in the order of the batch."""
    return sorted((GOLDEN / "inputs").glob("*.png"))


def golden_minigpt4(
    variant: str = "vicuna0", *, bases: Path | None = None, checkpoint: str | None = "", **vision: Any
) -> dict[str, Any]:
    """Section ``model`` of a variant (``vicuna0``, ``llama2`` or ``v2``) that reads the original's files.

    ``bases`` is a folder with the base files as .safetensors; ``checkpoint`` another one, or None; ``vision`` are
    settings of the vision encoder, such as ``image_size``.
    """
    eva, blip2 = (
        str(bases / f"{name}.safetensors" if bases else GOLDEN / f"{name}.pth")
        for name in ("eva_vit_g", "blip2_pretrained")
    )
    config = golden_config()
    vit, qformer, lora = config["vit"], config["qformer"], config["minigptv2_lora"]
    with_qformer = variant == "vicuna0"
    section: dict[str, Any] = {
        "vision_encoder": {
            "name": "eva_clip_g",
            "image_size": vit["image_size"],
            "patch_size": vit["patch_size"],
            "width": vit["embed_dim"],
            "depth": vit["depth"],
            "num_heads": vit["num_heads"],
            "mlp_ratio": vit["mlp_ratio"],
            "class_token": "keep" if with_qformer else "drop",
            "freeze": True,
            "weights": eva,
            **vision,
        },
        "connector": {"name": "patch_merge", "factor": 4},
        "language_model": {"name": "hf", "path": str(GOLDEN / "llama"), "dtype": "fp32", "freeze": True},
        "template": TEMPLATES[variant],
        "processor": {"name": "vlm"},
        "checkpoint": str(GOLDEN / CHECKPOINTS[variant]) if checkpoint == "" else checkpoint,
    }
    if with_qformer:
        section["connector"] = {
            "name": "qformer",
            "num_query_tokens": qformer["num_query_token"],
            "hidden_size": qformer["hidden_size"],
            "num_layers": qformer["num_hidden_layers"],
            "num_heads": qformer["num_attention_heads"],
            "intermediate_size": qformer["intermediate_size"],
            "cross_attention_every": qformer["cross_attention_freq"],
            "freeze": ["qformer*", "query_tokens"],
            "weights": blip2,
        }
    if variant == "v2":
        section["language_model"]["lora"] = {
            "r": lora["r"],
            "alpha": lora["alpha"],
            "dropout": 0.0,
            "target_modules": lora["targets"],
        }
    return section
