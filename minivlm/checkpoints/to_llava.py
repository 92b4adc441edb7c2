"""Models in the layouts of LLaVA and Imp: whole folders, LoRA folders, projectors. The way back from ``llava.py``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from minivlm.checkpoints.foreign import Format, matches
from minivlm.checkpoints.llava import FUSED, FUSED_LORA, LLAVA, LLAVA_LORA
from minivlm.checkpoints.report import CheckpointError
from minivlm.checkpoints.to_transformers import picture_settings_of
from minivlm.config.experiment import ModelConfig
from minivlm.io import atomic_folder, write_json
from minivlm.models.lora import is_adapter
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.processor import VLMProcessor

_ASPECT = {"squash": "square", "shortest_edge": "square", "pad": "pad", "crop": "crop"}
"""``square`` is whatever the tower's own settings say, which lie in its folder."""
_SHARD = "1GB"


def write_llava(
    folder: Path, model: VisionLanguageModel, processor: VLMProcessor, config: ModelConfig, *, fused: bool = False
) -> list[str]:
    """Write a model in LLaVA's layout; returns the names of its tensors.

    With adapters it becomes a LoRA folder, with a language model that was not trained beside a base the folder of a
    projector, else a whole model. ``fused`` takes the first layout of Phi-2, as Imp-v1 has it. Raises
    :class:`CheckpointError` for parts that have no place there.
    """
    settings = _settings(model, processor, config, fused)
    language: Any = model.language_model
    state = model.state_dict()
    with atomic_folder(folder) as unfinished:
        if language.adapter_parameters:
            kept = _without_loss(_trained(state), model)
            written = _write_adapters(unfinished, _translated(FUSED_LORA if fused else LLAVA_LORA, kept))
            write_json(unfinished / "adapter_config.json", _adapter_settings(config, written, fused))
        elif language.source is not None:
            form = FUSED if fused else LLAVA
            kept = {n: t for n, t in state.items() if n.startswith("connector.")}
            written = _translated(form, _without_loss(kept, model))
            _save(written, unfinished / "mm_projector.bin")
        else:
            written = _write_whole(unfinished, model, state, fused)
        if not settings["mm_vision_tower"] or language.source is None:  # what the layout's own loader asks for
            settings["mm_vision_tower"] = _write_tower(unfinished, model, processor)
        write_json(unfinished / "config.json", settings)
        processor.tokenizer.save_pretrained(unfinished)
    return list(written)


def _trained(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if is_adapter(name) or name.startswith("connector.")}


def _without_loss(kept: dict[str, Tensor], model: VisionLanguageModel) -> dict[str, Tensor]:
    """What is to be written, if nothing else has been trained."""
    lost = [name for name in model.trained_before if name not in kept]
    if lost:
        raise CheckpointError(
            f"beside a base there is no place for other trained weights ({', '.join(lost[:3])}"
            f"{', ...' if len(lost) > 3 else ''}); `minivlm merge` makes it one model, which can be written as a whole"
        )
    return kept


def _translated(form: Format, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    done, lost = form.back(tensors)
    if lost:
        hint = "; fold adapters in with `minivlm merge`" if any(map(is_adapter, lost)) else ""
        raise CheckpointError(
            f"{form.name} has no place for {', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}{hint}"
        )
    return {name: tensor.detach().cpu().clone() for name, tensor in done.items()}


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    import torch

    torch.save(tensors, file)


def _write_adapters(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    _save({n: t for n, t in tensors.items() if is_adapter(n)}, folder / "adapter_model.bin")
    _save({n: t for n, t in tensors.items() if not is_adapter(n)}, folder / "non_lora_trainables.bin")
    return tensors


def _write_whole(
    folder: Path, model: VisionLanguageModel, state: Mapping[str, Tensor], fused: bool
) -> dict[str, Tensor]:
    from huggingface_hub import save_torch_state_dict

    form = FUSED if fused else LLAVA
    # Imp's second layout leaves out the norm that is not used.
    unused = () if fused else form.initial
    kept = {name: tensor for name, tensor in state.items() if not any(matches(p, name) for p in unused)}
    language: Any = model.language_model
    if language.model.config.tie_word_embeddings:
        kept.pop("language_model.model.lm_head.weight", None)
    written = _translated(form, kept)
    save_torch_state_dict(written, folder, max_shard_size=_SHARD)
    return written


def _write_tower(folder: Path, model: VisionLanguageModel, processor: VLMProcessor) -> str:
    """The vision encoder in a folder of its own, which the original's loader asks for; returns its name."""
    encoder: Any = model.vision_encoder.model
    name = "siglip" if "siglip" in encoder.config.model_type else "clip"
    encoder.save_pretrained(folder / name)
    transform = next(iter(processor.transforms.values()))
    write_json(folder / name / "preprocessor_config.json", picture_settings_of(transform) | {"do_pad": False})
    return name


def _settings(model: VisionLanguageModel, processor: VLMProcessor, config: ModelConfig, fused: bool) -> dict[str, Any]:
    """``config.json``: that of the language model, and what the layout adds to it."""
    assert config.vision_encoder and config.connector and config.language_model
    encoder, connector = config.vision_encoder, config.connector
    language: Any = model.language_model
    problems = []
    if encoder.name != "hf":
        problems.append(f"the vision encoder is {encoder.name}, wanted is hf (CLIP or SigLIP)")
    if connector.name not in ("linear", "mlp") or getattr(connector.config, "norm", False):
        problems.append(f"the connector is {connector.name}, wanted is linear, or mlp without norm")
    elif getattr(connector.config, "merge", 1) != 1:
        problems.append("the connector merges neighbouring tokens")
    if not hasattr(language, "model"):
        problems.append(f"the language model is {config.language_model.name}, wanted is hf")
    elif fused and language.model.config.model_type != "phi":
        problems.append(f"the language model is a {language.model.config.model_type}, wanted is phi")
    if problems:
        raise CheckpointError(f"this model has no place in LLaVA's layout: {'; '.join(problems)}")
    own = json.loads(language.model.config.to_json_string(use_diff=False))
    kind = own.pop("model_type")
    rope = own.pop("rope_parameters", None) or {}
    own |= {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    own["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    transform = next(iter(processor.transforms.values()))
    depth = getattr(connector.config, "depth", 0)
    own |= {
        "model_type": "imp" if kind == "phi" else f"llava_{kind}",
        "mm_vision_tower": encoder.config.path or "",
        "mm_vision_select_layer": encoder.config.layer,
        "mm_vision_select_feature": "patch" if encoder.config.class_token == "drop" else "cls_patch",
        "mm_hidden_size": model.vision_encoder.hidden_size,
        "mm_projector_type": f"mlp{depth}x_gelu" if depth else "linear",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": _ASPECT[transform.resize],
        "tokenizer_model_max_length": processor.config.max_length,
        "tokenizer_padding_side": "right",
    }
    return own | (_first_names(own) if fused else {})


def _first_names(own: Mapping[str, Any]) -> dict[str, Any]:
    """The names that Phi-2 had for its sizes in its first layout."""
    head = own["hidden_size"] // own["num_attention_heads"]
    return {
        "n_embd": own["hidden_size"],
        "n_head": own["num_attention_heads"],
        "n_head_kv": None,
        "n_layer": own["num_hidden_layers"],
        "n_inner": own["intermediate_size"],
        "n_positions": own["max_position_embeddings"],
        "layer_norm_epsilon": own["layer_norm_eps"],
        "activation_function": own["hidden_act"],
        "rotary_dim": int(own["partial_rotary_factor"] * head),
    }


def _adapter_settings(config: ModelConfig, written: Mapping[str, Tensor], fused: bool) -> dict[str, Any]:
    assert config.language_model and config.language_model.lora
    lora = config.language_model.lora
    layers = {name.split(".lora_")[0].split(".")[-1] for name in written if is_adapter(name)}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": lora.r,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted(layers),
        "base_model_name_or_path": getattr(config.language_model.config, "path", None) or "",
    }
