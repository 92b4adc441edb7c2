"""What a folder of Mini-Gemini says beyond one of LLaVA: the second encoder, patch info mining, the template."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from functools import partial
from typing import Any

from minivlm.checkpoints.files import WeightFile, json_value
from minivlm.checkpoints.mgm import MGM
from minivlm.checkpoints.report import CheckpointError
from minivlm.checkpoints.towers import find_folder, need_folder
from minivlm.models.lora import is_adapter

_KEY = "model.checkpoint"
_get = partial(json_value, _KEY)
_BLOCK = re.compile(r".*vision_tower_aux\.vision_stages\.(\d+)\.blocks\.(\d+)\.(?:gamma|norm\.weight)")
_TEMPLATES = {"gemma": "gemma", "mixtral": "mistral_instruct", "mistral": "mistral_instruct"}
_LLAMA_TEMPLATES = {128256: "llama_3", 64000: "chatml_direct"}
"""Templates of models on Llama by their vocabulary: LLaMA-3 and Yi; any other is Vicuna's."""


def names_two_encoders(settings: Mapping[str, Any]) -> bool:
    """Whether ``config.json`` is one of Mini-Gemini; without a second encoder and its size it is a plain LLaVA."""
    return all(settings.get(key) is not None for key in MGM.wants)


def with_second_encoder(
    section: dict[str, Any],
    settings: Mapping[str, Any],
    file: WeightFile,
    kind: str,
    *,
    own: Container[str] = (),
    find: bool = True,
) -> dict[str, Any]:
    """A section of LLaVA's kind with the second encoder and the mining that ``config.json`` names.

    ``kind`` is the type of the language model; ``own`` and ``find`` are those of ``llava_folder.describe``. Raises
    :class:`CheckpointError` for an encoder that is nowhere.
    """
    _check_adapters(file)
    low, projector = dict(section["vision_encoder"]), dict(section["connector"])
    low.pop("freeze", None)
    low.pop("weights", None)
    whole = projector.pop("weights")
    holds = any(f".vision_tower{aux}.vision_" in name for name in file.tensors for aux in ("", "_aux"))
    high: dict[str, Any] = {"name": "convnext_multiscale"}
    if "vision_encoder" not in own:
        high |= _high(file, _get(settings, "mm_vision_tower_aux", str), find)
        high["image_size"] = _get(settings, "image_size_aux", int)
    grid, view = _get(settings, "image_grid", int, 1), bool(settings.get("image_global"))
    encoder = {"name": "dual", "low": low, "high": high, "grid": grid, "global_view": view and grid > 1}
    aspect = settings.get("image_aspect_ratio")
    image = {**section["processor"]["image"], "resize": "pad" if aspect == "pad" else "shortest_edge"}
    image.pop("size", None)
    return {
        **section,
        "vision_encoder": {**encoder, "freeze": True, "weights": whole if holds else None},
        "connector": {"name": "patch_info_mining", "projector": projector, "weights": whole},
        "processor": {**section["processor"], "image": image},
        "template": {
            "name": _TEMPLATES.get(kind) or _LLAMA_TEMPLATES.get(_get(settings, "vocab_size", int, 0), "vicuna_v1"),
            "chat": {"image_number": "Image {number}:"},  # only its chat has ever seen several pictures
        },
    }


def _high(file: WeightFile, name: str, find: bool) -> dict[str, Any]:
    """Depths and widths of the ConvNeXt in the file, else the folder ``name`` of OpenCLIP."""
    widths: dict[int, int] = {}
    depths: dict[int, int] = {}
    for tensor_name, tensor in file.tensors.items():
        found = _BLOCK.fullmatch(tensor_name)
        if found and tensor.dim() == 1:
            stage, block = int(found[1]), int(found[2])
            widths.setdefault(stage, tensor.shape[0])
            depths[stage] = max(depths.get(stage, 0), block + 1)
    if not widths:
        find_it = partial(need_folder, key="mm_vision_tower_aux", setting="model.vision_encoder.high.path")
        return {"path": (find_it if find else find_folder)(file.local, name)}
    return {name: [sizes[stage] for stage in sorted(sizes)] for name, sizes in (("depths", depths), ("widths", widths))}


def _check_adapters(file: WeightFile) -> None:
    """Refuse adapters on experts, which are one tensor here and no layers."""
    lost = [name for name in file.tensors if ".block_sparse_moe." in name and is_adapter(name)]
    if lost:
        raise CheckpointError(
            f"{_KEY}: {file.path} has adapters on experts or routers ({lost[0]}), which are one tensor here and take "
            "none; merge them where they were trained and give the merged folder"
        )
