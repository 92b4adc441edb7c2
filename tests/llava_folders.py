"""Tiny folders in LLaVA's layout, written as the original does, from the modules of transformers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, AutoTokenizer

from minivlm.api import assemble
from minivlm.config.loader import parse_model
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.processor import VLMProcessor
from minivlm.processors.tokenizer import ASSETS

TOKENIZER = ASSETS / "quickstart"
VOCABULARY = 384
WIDTH, SIDE = 32, 32
TINY_LM: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
OTHERS: dict[str, dict[str, Any]] = {
    "phi": {"partial_rotary_factor": 0.5, "attn_implementation": "eager"},
    "phi3": {"pad_token_id": None},
    "mistral": {"sliding_window": None},
}
"""What types of language models have beside :data:`TINY_LM`."""
TINY_TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 16,
}
PUBLISHED = {
    "image_aspect_ratio": "pad",
    "max_length": 4096,
    "mm_hidden_size": TINY_TOWER["hidden_size"],
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "tune_mm_mlp_adapter": False,
    "use_cache": False,
    "use_mm_proj": True,
}
"""Keys of the published config.json of LLaVA-1.5 beside those of its language model."""
_TOWER = "model.vision_tower.vision_tower.vision_model."


def large(module: Any) -> Any:
    """A module with parameters larger than they begin, so that differences show."""
    for name, parameter in module.named_parameters():
        if name.endswith("bias") or parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return module.eval()


def make_tower(folder: Path, kind: str = "clip", **settings: Any) -> Any:
    """A folder of CLIP's or SigLIP's vision model, and the model."""
    config = CONFIG_MAPPING[f"{kind}_vision_model"](**{**TINY_TOWER, **settings})
    tower = large(AutoModel.from_config(config))
    tower.save_pretrained(folder)
    return tower


def make_language_model(kind: str = "llama", **settings: Any) -> Any:
    """A causal language model of transformers."""
    config = CONFIG_MAPPING[kind](**{**TINY_LM, **OTHERS.get(kind, {}), **settings})
    return large(AutoModelForCausalLM.from_config(config))


def projector(prefix: str = "model.", width: int = TINY_TOWER["hidden_size"], out: int = WIDTH) -> dict[str, Tensor]:
    """Two linear layers as ``mm_projector.bin`` names them."""
    layers = {0: torch.nn.Linear(width, out), 2: torch.nn.Linear(out, out)}
    names = {f"{prefix}mm_projector.{n}.{k}": t for n, layer in layers.items() for k, t in layer.state_dict().items()}
    return {name: tensor.clone() for name, tensor in names.items()}


def make_llava(
    folder: Path,
    kind: str = "llama",
    *,
    language: Any = None,
    held: Any = None,
    tokenizer: bool = True,
    **settings: Any,
) -> tuple[Path, dict[str, Tensor]]:
    """A whole model, with its tensors; the CLIP tower lies beside it as ``clip``, or ``held`` goes into the file.

    ``settings`` are laid over config.json; what is ``...`` is left out of it.
    """
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    language = language or make_language_model(kind)
    if held is None and not (folder.parent / "clip").is_dir():
        make_tower(folder.parent / "clip")
    tensors = {**language.state_dict(), **projector()}
    if language.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    if held is not None:
        tensors |= {_TOWER + name: tensor for name, tensor in held.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = {**language.config.to_dict(), **PUBLISHED, "mm_vision_tower": "clip"}
    config |= {"model_type": "llava" if kind == "llama" else f"llava_{kind}"}
    write_config(folder, {**config, **settings})
    if tokenizer:
        AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder, tensors


def first_layout(folder: Path, phi: Any) -> Path:
    """A language model as microsoft/phi-2 first was: fused attention, another config.json, no projector."""
    folder.mkdir()
    ours = phi.state_dict()
    theirs = {"transformer.embd.wte.weight": ours["model.embed_tokens.weight"]}
    for kind in ("weight", "bias"):
        theirs[f"lm_head.ln.{kind}"] = ours[f"model.final_layernorm.{kind}"]
        theirs[f"lm_head.linear.{kind}"] = ours[f"lm_head.{kind}"]
        for n in range(phi.config.num_hidden_layers):
            at, block = f"model.layers.{n}.", f"transformer.h.{n}."
            fused = torch.cat([ours[f"{at}self_attn.{part}_proj.{kind}"] for part in "qkv"])
            theirs[f"{block}mixer.Wqkv.{kind}"] = fused
            theirs[f"{block}mixer.out_proj.{kind}"] = ours[f"{at}self_attn.dense.{kind}"]
            theirs[f"{block}ln.{kind}"] = ours[f"{at}input_layernorm.{kind}"]
            for layer in ("fc1", "fc2"):
                theirs[f"{block}mlp.{layer}.{kind}"] = ours[f"{at}mlp.{layer}.{kind}"]
    save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, folder / "model.safetensors")
    config = phi.config
    head = config.hidden_size // config.num_attention_heads
    settings = {
        "model_type": "phi-msft",
        "n_embd": config.hidden_size,
        "n_head": config.num_attention_heads,
        "n_head_kv": None,
        "n_layer": config.num_hidden_layers,
        "n_inner": None,
        "n_positions": config.max_position_embeddings,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "rotary_dim": head // 2,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def write_config(folder: Path, settings: dict[str, Any]) -> None:
    """``config.json``, without what is ``...``."""
    kept = {key: value for key, value in settings.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))


def change_config(folder: Path, **settings: Any) -> None:
    """Lay ``settings`` over ``config.json``."""
    write_config(folder, json.loads((folder / "config.json").read_text()) | settings)


def reshard(folder: Path, safe: bool) -> list[Path]:
    """The weights of a folder in several files with an index, as safetensors or as torch writes them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    size = sum(t.numel() * t.element_size() for t in tensors.values()) // 3
    pattern = "model{suffix}.safetensors" if safe else "pytorch_model{suffix}.bin"
    save_torch_state_dict(tensors, folder, max_shard_size=size, safe_serialization=safe, filename_pattern=pattern)
    return sorted(folder.glob(pattern.format(suffix="-*")))


def write_empty(file: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file of these shapes, all zeros, that takes no room on the disk."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * 2
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)


def load(section: dict[str, Any], **how: Any) -> tuple[VisionLanguageModel, VLMProcessor, Any]:
    """Model, processor and section, in eval mode."""
    model, processor, config = assemble(parse_model(section, "test"), **how)
    return model.eval(), processor, config


def text_logits(model: VisionLanguageModel, ids: Tensor) -> Tensor:
    """Logits of ids without a picture."""
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        language = model.language_model
        return language.head(language(language.embed(ids), None, positions))


def tiny_llava(tower: str, **vision: Any) -> dict[str, Any]:
    """Section ``model`` of a model of ours that has LLaVA's parts."""
    config = {"model_type": f"{tower}_vision_model", **TINY_TOWER}
    return {
        "vision_encoder": {"name": "hf", "freeze": True, "config": config, **vision},
        "connector": {"name": "mlp"},
        "language_model": {"name": "hf", "tokenizer": str(TOKENIZER), "config": {"model_type": "llama", **TINY_LM}},
        "template": "vicuna_v1",
    }
