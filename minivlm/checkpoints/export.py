"""A model folder as the ``.pth`` file that the original MiniGPT-4 reads."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from minivlm.checkpoints.files import read_weights
from minivlm.checkpoints.minigpt4 import MINIGPT4, lora_of
from minivlm.checkpoints.native import WEIGHTS, read_config, read_manifest
from minivlm.checkpoints.report import CheckpointError
from minivlm.io import write_atomic


def export_minigpt4(folder: Path, target: Path) -> list[str]:
    """Write what a model folder holds under the original's names, which are returned.

    The file has the original's keys (``model``, ``config``, ``epoch``, and ``optimizer`` and ``scaler``, which
    are empty), plain containers and tensors only, and LoRA in the spelling of peft 0.2. Base weights are
    neither read nor written. Raises :class:`CheckpointError` for a model that is no MiniGPT-4.
    """
    import torch

    manifest = read_manifest(folder)
    settings = _original_settings(folder, read_config(folder))
    # Buffers such as rotary frequencies are computed anew by every reader.
    file = read_weights("convert", str(folder / WEIGHTS))
    state = {name: tensor for name, tensor in file.tensors.items() if not name.endswith("inv_freq")}
    adapters = lora_of(file)
    if adapters:
        settings["lora_target_modules"] = adapters["targets"]
    renamed, lost = MINIGPT4.back(state)
    if "lora_r" not in settings:  # only with LoRA does peft put its own modules around the language model
        renamed = {k.replace("llama_model.base_model.model.", "llama_model."): v for k, v in renamed.items()}
    if lost:
        raise CheckpointError(f"{folder} cannot be written as MiniGPT-4, which has no {', '.join(lost[:3])}")
    content = {
        "model": renamed,
        "optimizer": None,
        "config": {"model": settings, "run": {"steps": manifest.step, "stage": manifest.stage}},
        "scaler": None,
        "epoch": 0,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomic(target, buffer.getvalue())
    return list(renamed)


def _original_settings(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Section ``model`` in the original's words; refuses parts that it does not have."""
    encoder, connector, language = (config[part] for part in ("vision_encoder", "connector", "language_model"))
    if encoder["name"] != "eva_clip_g" or connector["name"] not in ("qformer", "patch_merge"):
        raise CheckpointError(
            f"{folder} is no MiniGPT-4: it has {encoder['name']} and {connector['name']}, "
            "which has eva_clip_g and either qformer or patch_merge"
        )
    further = [f"{part}.lora" for part in ("vision_encoder", "connector") if config[part].get("lora")]
    further += ["language_model.lora.shared_a"] if (language.get("lora") or {}).get("shared_a") else []
    if further:
        raise CheckpointError(f"{folder} is no MiniGPT-4, which has no {', '.join(further)}; see minivlm merge")
    with_qformer, lora = connector["name"] == "qformer", language.get("lora")
    kind = "pretrain_vicuna0" if with_qformer else "pretrain_llama2"
    settings = {
        "arch": "minigpt_v2" if lora else "minigpt4",
        "model_type": "pretrain" if lora else kind,
        "image_size": encoder["image_size"],
        "has_qformer": with_qformer,
    }
    if with_qformer:
        settings["num_query_token"] = connector["num_query_tokens"]
    if lora:
        settings |= {"lora_r": lora["r"], "lora_alpha": lora["alpha"]}
    return settings
