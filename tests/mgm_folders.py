"""The golden set of Mini-Gemini as the folders that people have: sharded, in parts, with towers beside, with LoRA."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from golden_mgm import BASES, GOLDEN, HDS, golden_json, weights_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from minivlm.api import assemble
from minivlm.config.loader import parse_model
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.processor import VLMProcessor

LLAMA = next(name for name in BASES if golden_json(f"{name}/config.json")["model_type"] == "mgm")
HD = HDS[0]
MIXTRAL = next(name for name in BASES if "mixtral" in golden_json(f"{name}/config.json")["model_type"])
GEMMA = next(name for name in BASES if "gemma" in golden_json(f"{name}/config.json")["model_type"])
PICTURE = sorted((GOLDEN / "images").glob("*.png"))[-1]
QUESTION = [{"role": "user", "content": "<image>\nwhat is it?"}]
VISUAL = ("vision_tower", "vlm_uni_", "mm_projector")


def tensors_of(name: str) -> dict[str, Tensor]:
    """The tensors of a configuration; HD has those of the base."""
    return load_file(weights_of(name))


def settings_of(name: str, **changes: Any) -> dict[str, Any]:
    """Its config.json with changes; what is ``...`` is left out."""
    settings = golden_json(f"{name}/config.json") | changes
    return {key: value for key, value in settings.items() if value is not ...}


def make_folder(target: Path, name: str, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    """A whole model; the settings of its CLIP lie inside, where config.json points."""
    target.mkdir(parents=True)
    save_file(tensors_of(name) if tensors is None else tensors, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(settings_of(name, **changes)))
    clip_settings(target / settings_of(name)["mm_vision_tower"])
    return target


def clip_settings(folder: Path) -> None:
    """The settings of the low encoder, without weights."""
    folder.mkdir(parents=True)
    shutil.copyfile(GOLDEN / "towers" / "clip_config.json", folder / "config.json")
    shutil.copyfile(GOLDEN / "towers" / "preprocessor_config.json", folder / "preprocessor_config.json")


def make_towers(root: Path, name: str) -> tuple[Path, Path]:
    """Both encoders as folders of transformers and OpenCLIP, called as config.json does."""
    settings, tensors = settings_of(name), tensors_of(name)
    low, high = root / settings["mm_vision_tower"], root / settings["mm_vision_tower_aux"]
    clip_settings(low)
    prefix = "model.vision_tower.vision_tower."
    save_file(
        {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}, low / "model.safetensors"
    )
    high.mkdir()
    prefix = "model.vision_tower_aux.vision_"
    trunk = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    text = {"text.token_embedding.weight": torch.ones(3, 2), "visual.head.proj.weight": torch.ones(2, 2)}
    torch.save({f"visual.trunk.{n}": t for n, t in trunk.items()} | text, high / "open_clip_pytorch_model.bin")
    statistics = {"preprocess_cfg": golden_json("towers/convnext_config.json")["preprocess_cfg"]}
    (high / "open_clip_config.json").write_text(json.dumps(statistics))
    return low, high


def visual_tensors(name: str, *kinds: str) -> dict[str, Tensor]:
    """What the file of the first stage holds, or some kinds of it."""
    return {n: t for n, t in tensors_of(name).items() if any(kind in n for kind in kinds or VISUAL)}


def make_stage1(target: Path, name: str, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    """A folder of the first stage: config.json, mm_projector.bin, and the settings of CLIP."""
    target.mkdir(parents=True)
    torch.save(visual_tensors(name) if tensors is None else tensors, target / "mm_projector.bin")
    settings = settings_of(name, image_aspect_ratio="square", tune_mm_mlp_adapter=True, **changes)
    (target / "config.json").write_text(json.dumps(settings))
    clip_settings(target / settings["mm_vision_tower"])
    return target


def make_language_model(target: Path, name: str) -> Path:
    """The language model alone, as transformers writes it."""
    target.mkdir(parents=True)
    own = {n: t for n, t in tensors_of(name).items() if not any(kind in n for kind in VISUAL)}
    save_file(own, target / "model.safetensors", metadata={"format": "pt"})
    settings = settings_of(name)
    kind = settings["model_type"].removeprefix("mgm").removeprefix("_") or "llama"
    kept = {k: v for k, v in settings.items() if not k.startswith(("mm_", "image_", "architectures"))}
    (target / "config.json").write_text(json.dumps(kept | {"model_type": kind}))
    return target


def make_lora(target: Path, name: str, base: Path, layers: tuple[str, ...] = ("q_proj", "v_proj")) -> Path:
    """A folder as the original's training with LoRA leaves it, its adapters drawn at random."""
    make_stage1(target, name)
    (target / "mm_projector.bin").unlink()
    torch.manual_seed(1)
    rank, adapters = 4, {}
    for n, t in tensors_of(name).items():
        if n.endswith(tuple(f"{layer}.weight" for layer in layers)) and "vision" not in n:
            at = f"base_model.model.{n.removesuffix('.weight')}."
            adapters[f"{at}lora_A.weight"] = torch.randn(rank, t.shape[1]) / 4
            adapters[f"{at}lora_B.weight"] = torch.randn(t.shape[0], rank) / 4
    torch.save(adapters, target / "adapter_model.bin")
    beside = {f"base_model.model.{n}": t + 0.25 for n, t in visual_tensors(name, "vlm_uni_", "mm_projector").items()}
    torch.save(beside, target / "non_lora_trainables.bin")
    adapter = {"r": rank, "lora_alpha": 8, "lora_dropout": 0.05, "target_modules": list(layers)}
    (target / "adapter_config.json").write_text(json.dumps(adapter | {"base_model_name_or_path": str(base)}))
    return target


def merged(name: str, folder: Path) -> dict[str, Tensor]:
    """The tensors of a whole model with the adapters folded in: W + alpha / r * B A."""
    tensors = dict(tensors_of(name))
    beside = torch.load(folder / "non_lora_trainables.bin")
    tensors |= {n.removeprefix("base_model.model."): t for n, t in beside.items()}
    adapters = torch.load(folder / "adapter_model.bin")
    for at in (n.removesuffix("lora_A.weight") for n in adapters if n.endswith("lora_A.weight")):
        change = adapters[f"{at}lora_B.weight"] @ adapters[f"{at}lora_A.weight"]
        weight = f"{at.removeprefix('base_model.model.')}weight"
        tensors[weight] = tensors[weight] + 2 * change
    return tensors


def language(name: str, path: Path | None = None) -> dict[str, Any]:
    """Node ``language_model`` of a folder without tokenizer."""
    tokenizer = GOLDEN / "tokenizers" / golden_json(f"{name}/expected.json")["tokenizer"]
    return {"name": "hf", "tokenizer": str(tokenizer)} | ({"path": str(path)} if path else {})


def section(name: str, checkpoint: Path, path: Path | None = None, **parts: Any) -> dict[str, Any]:
    """Section ``model`` of a folder without tokenizer."""
    return {"checkpoint": str(checkpoint), "language_model": language(name, path), **parts}


def load(node: dict[str, Any], **how: Any) -> tuple[VisionLanguageModel, VLMProcessor, Any]:
    """Model, processor and section, in eval mode."""
    model, processor, config = assemble(parse_model(node, "test"), **how)
    return model.eval(), processor, config


def logits(model: VisionLanguageModel, processor: VLMProcessor) -> Tensor:
    """Of a question about a picture."""
    with torch.no_grad():
        found = model(processor.prompt(QUESTION, [PICTURE]), return_logits=True).logits
    assert found is not None
    return found


def same_model(first: VisionLanguageModel, second: VisionLanguageModel, tolerance: float = 0) -> None:
    """The same names and values."""
    ours, others = first.state_dict(), second.state_dict()
    assert ours.keys() == others.keys()
    far = [n for n, t in ours.items() if (t.float() - others[n].float()).abs().max() > tolerance]
    assert not far, far[:5]
