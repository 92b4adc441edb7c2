"""Models in the layouts of LLaVA and Imp: whole folders, LoRA folders, projectors. The way back from ``llava.py``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from minivlm.checkpoints.files import read_weights
from minivlm.checkpoints.foreign import Format, matches, translate
from minivlm.checkpoints.llava import FUSED, FUSED_LORA, LLAVA, LLAVA_LORA, UNUSED_LAYERS
from minivlm.checkpoints.loading import is_foreign
from minivlm.checkpoints.report import CheckpointError
from minivlm.checkpoints.to_transformers import picture_settings_of
from minivlm.config.experiment import ModelConfig
from minivlm.io import atomic_folder, write_json
from minivlm.models.lora import is_adapter
from minivlm.models.vlm import VisionLanguageModel
from minivlm.paths import is_url
from minivlm.processors.processor import VLMProcessor
from minivlm.schema import Part

_ASPECT = {"squash": "square", "shortest_edge": "square", "pad": "pad", "crop": "crop"}
"""``square`` is whatever the tower's own settings say, which lie in its folder."""
_SHARD = "1GB"
Settings = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """A layout to write.

    ``settings`` is ``config.json``; it raises :class:`CheckpointError` for parts that have no place there. ``towers``
    writes the encoders in folders of their own, which the layout's own loader asks for, and returns what
    ``config.json`` says of them; it is given the tensors that were written, too. ``visual`` says which of our tensors
    the file beside a base holds, ``unused`` which a whole model lacks.
    """

    whole: Format
    lora: Format
    settings: Callable[[VisionLanguageModel, VLMProcessor, ModelConfig], Settings]
    towers: Callable[[Path, VisionLanguageModel, VLMProcessor, Mapping[str, Tensor]], Settings]
    visual: tuple[str, ...] = ("connector.",)
    unused: tuple[str, ...] = ()


def write_folder(
    folder: Path, layout: Layout, model: VisionLanguageModel, processor: VLMProcessor, config: ModelConfig
) -> list[str]:
    """Write a model in a layout of LLaVA's kind; returns the names of its tensors.

    With adapters it becomes a LoRA folder, with a language model that was not trained beside a base the folder of a
    projector, else a whole model. Raises :class:`CheckpointError` for parts that have no place there.
    """
    settings = layout.settings(model, processor, config)
    language: Any = model.language_model
    state = model.state_dict()
    with atomic_folder(folder) as unfinished:
        if language.adapter_parameters:
            kept = _without_loss(_trained(state), model)
            written = _write_adapters(unfinished, _translated(layout.lora, kept))
            write_json(unfinished / "adapter_config.json", _adapter_settings(config, written))
        elif language.source is not None:
            kept = {n: t for n, t in state.items() if n.startswith(layout.visual)}
            written = _translated(layout.whole, _without_loss(kept, model))
            written |= _left_aside(layout.whole, config, state) if "vision_encoder." in layout.visual else {}
            _save(written, unfinished / "mm_projector.bin")
        else:
            written = _write_whole(unfinished, layout, model, state, config)
        if not settings["mm_vision_tower"] or language.source is None:
            settings |= layout.towers(unfinished, model, processor, written)
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
    folder: Path, layout: Layout, model: VisionLanguageModel, state: Mapping[str, Tensor], config: ModelConfig
) -> dict[str, Tensor]:
    from huggingface_hub import save_torch_state_dict

    kept = {name: tensor for name, tensor in state.items() if not any(matches(p, name) for p in layout.unused)}
    language: Any = model.language_model
    if language.model.config.tie_word_embeddings:
        kept.pop("language_model.model.lm_head.weight", None)
    written = _translated(layout.whole, kept) | _left_aside(layout.whole, config, state)
    save_torch_state_dict(written, folder, max_shard_size=_SHARD)
    return written


def _left_aside(form: Format, config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layers of an encoder that are not used, out of the file of this layout that it came from."""
    assert config.vision_encoder
    source = config.vision_encoder.weights or config.checkpoint
    if not source or is_url(source) or not is_foreign(source):
        return {}
    tensors = read_weights("model.vision_encoder.weights", source).tensors  # only what is looked at gets read
    return {name: tensors[name].clone() for name in translate(form, tensors, state).ignored.get(UNUSED_LAYERS, ())}


def _write_tower(
    folder: Path, model: VisionLanguageModel, processor: VLMProcessor, written: Mapping[str, Tensor]
) -> Settings:
    encoder: Any = model.vision_encoder.model
    name = "siglip" if "siglip" in encoder.config.model_type else "clip"
    encoder.save_pretrained(folder / name)
    transform = next(iter(processor.transforms.values()))
    write_json(folder / name / "preprocessor_config.json", picture_settings_of(transform) | {"do_pad": False})
    return {"mm_vision_tower": name}


def _settings(
    model: VisionLanguageModel, processor: VLMProcessor, config: ModelConfig, fused: bool = False
) -> Settings:
    """``config.json``: that of the language model, and what the layout adds to it."""
    assert config.vision_encoder and config.connector and config.language_model
    encoder, connector = config.vision_encoder, config.connector
    language: Any = model.language_model
    problems = []
    if encoder.name != "hf":
        problems.append(f"the vision encoder is {encoder.name}, wanted is hf (CLIP or SigLIP)")
    problems += wrong_projector(connector)
    if not hasattr(language, "model"):
        problems.append(f"the language model is {config.language_model.name}, wanted is hf")
    elif fused and language.model.config.model_type != "phi":
        problems.append(f"the language model is a {language.model.config.model_type}, wanted is phi")
    if problems:
        raise CheckpointError(f"this model has no place in LLaVA's layout: {'; '.join(problems)}")
    own, kind = language_settings(language)
    transform = next(iter(processor.transforms.values()))
    own |= {
        "model_type": "imp" if kind == "phi" else f"llava_{kind}",
        "mm_hidden_size": model.vision_encoder.hidden_size,
        "image_aspect_ratio": _ASPECT[transform.resize],
        **visual_settings(encoder, connector, processor),
    }
    return own | (_first_names(own) if fused else {})


def wrong_projector(connector: Part) -> list[str]:
    """Why a connector is none of the projectors of these layouts; empty if it is one."""
    if connector.name not in ("linear", "mlp") or getattr(connector.config, "norm", False):
        return [f"the connector is {connector.name}, wanted is linear, or mlp without norm"]
    return ["the connector merges neighbouring tokens"] if getattr(connector.config, "merge", 1) != 1 else []


def language_settings(language: Any) -> tuple[Settings, str]:
    """``config.json`` of a language model by the names that transformers 4 has, without its type, and that."""
    own = json.loads(language.model.config.to_json_string(use_diff=False))
    kind = own.pop("model_type")
    rope = own.pop("rope_parameters", None) or {}
    own |= {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    own["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    return own, kind


def visual_settings(encoder: Part, projector: Part, processor: VLMProcessor) -> Settings:
    """What the layouts share of a tower, a projector and lengths."""
    depth = getattr(projector.config, "depth", 0)
    return {
        "mm_vision_tower": encoder.config.path or "",
        "mm_vision_select_layer": encoder.config.layer,
        "mm_vision_select_feature": "patch" if encoder.config.class_token == "drop" else "cls_patch",
        "mm_projector_type": f"mlp{depth}x_gelu" if depth else "linear",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "tokenizer_model_max_length": processor.config.max_length,
        "tokenizer_padding_side": "right",
    }


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


def _adapter_settings(config: ModelConfig, written: Mapping[str, Tensor]) -> dict[str, Any]:
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


LLAVA_LAYOUT = Layout(LLAVA, LLAVA_LORA, _settings, _write_tower, unused=LLAVA.initial)
"""Imp's second layout, too; that leaves out the norm which is not used."""
IMP_V1_LAYOUT = Layout(FUSED, FUSED_LORA, partial(_settings, fused=True), _write_tower)
"""The first layout of Phi-2."""
