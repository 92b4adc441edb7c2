"""What the shipped files of Mini-Gemini name, for tests: bases at real size without weights, tiny ones, data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from golden_mgm import GOLDEN, golden_json
from imp_parts import record
from safetensors.torch import save_file
from shard_files import COLOURS, picture

TOWERS = {"MINIVLM_CLIP_L_336": "clip", "MINIVLM_CONVNEXT_L_320": "convnext"}
CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_VISION = {"timm_model_name": "convnext_large", "timm_pool": "", "image_size": 320}
_STATISTICS = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
CONVNEXT_L = {"model_cfg": {"embed_dim": 768, "vision_cfg": _VISION}, "preprocess_cfg": _STATISTICS}


def _llama(width: int, layers: int, heads: int, kv: int, inner: int, entries: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": kv, "intermediate_size": inner, "vocab_size": entries}
    return {"model_type": "llama", "max_position_embeddings": 4096, "tie_word_embeddings": False, **sizes, **more}


LANGUAGE_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "2b": (
        "MINIVLM_GEMMA_2B",
        "gemma",
        _llama(2048, 18, 8, 1, 16384, 256000, model_type="gemma", head_dim=256, tie_word_embeddings=True),
    ),
    "7b": ("MINIVLM_VICUNA_V15", "llama", _llama(4096, 32, 32, 32, 11008, 32000)),
    "13b": ("MINIVLM_VICUNA_V15_13B", "llama", _llama(5120, 40, 40, 40, 13824, 32000)),
    "8b": ("MINIVLM_LLAMA3_8B", "llama3", _llama(4096, 32, 32, 8, 14336, 128256)),
    "8x7b": (
        "MINIVLM_MIXTRAL_8X7B",
        "llama_legacy",
        _llama(4096, 32, 32, 8, 14336, 32000, model_type="mixtral", num_local_experts=8, num_experts_per_tok=2),
    ),
    "34b": ("MINIVLM_YI_34B", "yi", _llama(7168, 60, 56, 8, 20480, 64000)),
}
"""By size: the variable that names the folder, a tokenizer of the golden set, the sizes of ``config.json``."""


def write_real_sizes(folder: Path) -> dict[str, str]:
    """Folders of all bases as they are on the hub, without weights; returns the variables that name them."""
    named = {variable: folder / name for variable, name in TOWERS.items()}
    _write(named["MINIVLM_CLIP_L_336"] / "config.json", CLIP_L)
    _write(named["MINIVLM_CONVNEXT_L_320"] / "open_clip_config.json", CONVNEXT_L)
    for size, (variable, tokenizer, config) in LANGUAGE_MODELS.items():
        named[variable] = folder / size
        shutil.copytree(GOLDEN / "tokenizers" / tokenizer, folder / size)
        _write(folder / size / "config.json", config)
    return {variable: str(path) for variable, path in named.items()}


def write_tiny(folder: Path, size: str = "7b") -> dict[str, str]:
    """The bases of one size with weights, as large as those of the golden set."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    variable, tokenizer, config = LANGUAGE_MODELS[size]
    given = golden_json("towers/clip_config.json")
    sizes = {key: given[key] for key in CLIP_L if key in given and key != "model_type"}
    CLIPVisionModel(CLIPVisionConfig(**sizes, hidden_act="quick_gelu")).save_pretrained(folder / "clip")
    write_open_clip(folder / "convnext")
    made = AutoTokenizer.from_pretrained(GOLDEN / "tokenizers" / tokenizer)
    small = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"num_key_value_heads": 2, "vocab_size": len(made)}
    hf = AutoConfig.for_model(**config | small)
    AutoModelForCausalLM.from_config(hf).save_pretrained(folder / size)
    made.save_pretrained(folder / size)
    return {variable: str(folder / size)} | {name: str(folder / tower) for name, tower in TOWERS.items()}


def write_open_clip(folder: Path, **changes: Any) -> Path:
    """A ConvNeXt of the golden set's sizes as OpenCLIP has one, with random weights and a text model beside."""
    from minivlm.models.configs import ConvNeXtMultiscaleConfig
    from minivlm.models.vision.convnext import ConvNeXtMultiscale

    sizes = golden_json("towers/convnext_config.json")
    built = ConvNeXtMultiscale(ConvNeXtMultiscaleConfig(depths=sizes["depths"], widths=sizes["dims"]))
    folder.mkdir(parents=True)
    state = {f"visual.trunk.{name}": tensor.contiguous() for name, tensor in built.state_dict().items()}
    save_file({**state, "text.token_embedding.weight": torch.zeros(3, 2)}, folder / "open_clip_model.safetensors")
    _write(folder / "open_clip_config.json", {**CONVNEXT_L, **changes})
    return folder


def write_data(folder: Path, count: int = 256) -> Path:
    """Both stages' data where the files have them; every fourth conversation is without a picture."""
    captions, talks = [], []
    for stage in ("MGM-Pretrain/images", "MGM-Finetune/coco"):
        (folder / stage).mkdir(parents=True)
        for name in COLOURS:
            (folder / stage / f"{name}.jpg").write_bytes(picture(name))
    for number in range(count):
        colour = list(COLOURS)[number % len(COLOURS)]
        captions.append(record(f"c{number}", f"a {colour} picture", "Describe it.", image=f"images/{colour}.jpg"))
        more = ["Is it bright?", "Yes, it is."] * (number % 3)
        seen = {"image": f"coco/{colour}.jpg"} if number % 4 else {}
        talks.append(record(f"m{number}", f"It is {colour}.", "What colour is it?", *more, **seen))
    (folder / "MGM-Pretrain" / "mgm_pretrain.json").write_text(json.dumps(captions))
    (folder / "MGM-Finetune" / "mgm_instruction.json").write_text(json.dumps(talks))
    return folder


def data_options(file: Path, data: Path) -> list[str]:
    """Where the data of a training file lie."""
    name, place = ("mgm_pretrain", "Pretrain") if "stage1" in file.name else ("mgm_instruction", "Finetune")
    folder = data / f"MGM-{place}"
    settings = {"annotations": folder / f"{name}.json", "images": folder, "layout": "null"}
    return [f"datasets.{name}.{key}={value}" for key, value in settings.items()]


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))
