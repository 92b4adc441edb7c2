"""What a folder of Mini-Gemini says beyond one of LLaVA: the second encoder, patch info mining, the template."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from minivlm.checkpoints.files import WeightFile
from minivlm.checkpoints.report import CheckpointError

_KEY = "model.checkpoint"
_GAMMA = re.compile(r".*vision_tower_aux\.vision_stages\.(\d+)\.blocks\.(\d+)\.gamma")
_TEMPLATES = {"gemma": "gemma", "mixtral": "mistral_instruct", "mistral": "mistral_instruct"}
_LLAMA_TEMPLATES = {128256: "llama_3", 64000: "chatml_direct"}
"""Templates of models on Llama by their vocabulary: LLaMA-3 and Yi; any other is Vicuna's."""


def with_second_encoder(
    section: dict[str, Any], settings: Mapping[str, Any], file: WeightFile, kind: str
) -> dict[str, Any]:
    """A section of LLaVA's kind with the second encoder and the mining that ``config.json`` names.

    ``kind`` is the type of the language model. Raises :class:`CheckpointError` for a file without that encoder.
    """
    low, projector = dict(section["vision_encoder"]), dict(section["connector"])
    held, whole = low.pop("weights", None), projector.pop("weights")
    low.pop("freeze", None)
    high = _high(file) | {"image_size": settings.get("image_size_aux", 320)}
    grid, view = settings.get("image_grid") or 1, bool(settings.get("image_global"))
    encoder = {"name": "dual", "low": low, "high": high, "grid": grid, "global_view": view and grid > 1}
    aspect = settings.get("image_aspect_ratio")
    image = {**section["processor"]["image"], "resize": "pad" if aspect == "pad" else "shortest_edge"}
    image.pop("size", None)
    return {
        **section,
        "vision_encoder": {**encoder, "freeze": True, "weights": held},
        "connector": {"name": "patch_info_mining", "projector": projector, "weights": whole},
        "processor": {**section["processor"], "image": image},
        "template": {
            "name": _TEMPLATES.get(kind) or _LLAMA_TEMPLATES.get(settings.get("vocab_size", 0), "vicuna_v1"),
            "chat": {"image_number": "Image {number}:"},  # only its chat has ever seen several pictures
        },
    }


def _high(file: WeightFile) -> dict[str, Any]:
    """Depths and widths of the ConvNeXt in the file."""
    blocks = {
        (int(found[1]), int(found[2])): t for name, t in file.tensors.items() if (found := _GAMMA.fullmatch(name))
    }
    if not blocks:
        raise CheckpointError(
            f"{_KEY}: {file.path} holds no second vision encoder (vision_tower_aux); describe both under "
            "model.vision_encoder (name: dual)"
        )
    stages = range(1 + max(stage for stage, _ in blocks))
    return {
        "name": "convnext_multiscale",
        "depths": [sum(stage == of for of, _ in blocks) for stage in stages],
        "widths": [blocks[stage, 0].shape[0] for stage in stages],
    }
