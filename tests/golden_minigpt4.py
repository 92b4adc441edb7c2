"""The golden set of MiniGPT-4: where it lies, and the ``model`` section of its three variants."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers import GOLDEN, golden_sizes

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
    with_qformer = variant == "vicuna0"
    section: dict[str, Any] = {
        **golden_sizes(with_qformer),
        "template": TEMPLATES[variant],
        "processor": {"name": "vlm"},
        "checkpoint": str(GOLDEN / CHECKPOINTS[variant]) if checkpoint == "" else checkpoint,
    }
    class_token = "keep" if with_qformer else "drop"
    section["vision_encoder"] |= {"name": "eva_clip_g", "class_token": class_token, "freeze": True, "weights": eva}
    section["vision_encoder"] |= vision
    section["language_model"] |= {"name": "hf", "freeze": True}
    if with_qformer:
        section["connector"] |= {"name": "qformer", "freeze": ["qformer*", "query_tokens"], "weights": blip2}
    else:
        section["connector"] |= {"name": "patch_merge", "factor": 4}
    if variant == "v2":
        lora = golden_config()["minigptv2_lora"]
        section["language_model"]["lora"] = {
            "r": lora["r"],
            "alpha": lora["alpha"],
            "dropout": 0.0,
            "target_modules": lora["targets"],
        }
    return section
