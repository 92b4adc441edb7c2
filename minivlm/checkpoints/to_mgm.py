"""Models with two encoders in the layout of Mini-Gemini (MGM): the way back from ``mgm.py`` and ``mgm_folder.py``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from minivlm.checkpoints.mgm import LORA, MGM
from minivlm.checkpoints.report import CheckpointError
from minivlm.checkpoints.to_llava import (
    Layout,
    Settings,
    language_settings,
    visual_settings,
    wrong_projector,
)
from minivlm.checkpoints.to_transformers import picture_settings_of
from minivlm.config.experiment import ModelConfig
from minivlm.io import write_json
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.processor import VLMProcessor

_ASPECT = {"shortest_edge": "square", "pad": "pad"}
_FAMILIES = {
    "llama": ("mgm", "Llama"),
    **{kind: (f"mgm_{kind}", kind.title()) for kind in ("gemma", "mistral", "mixtral")},
}
"""``model_type`` and the word in the name of the class."""
_LOW, _HIGH, _OPENCLIP = "openai-clip", "openclip-convnext", "open_clip_pytorch_model.bin"
"""Folders of the encoders; the original's loader knows by their words what is in them."""
_SIZES = {192: "large-d-320", 128: "base-w-320", 384: "xxlarge"}
"""ConvNeXts of OpenCLIP by the channels of their first stage."""


def _settings(model: VisionLanguageModel, processor: VLMProcessor, config: ModelConfig) -> Settings:
    """``config.json`` with all keys that the original writes."""
    problems = _problems(model, processor, config)
    if problems:
        raise CheckpointError(f"this model has no place in Mini-Gemini's layout: {'; '.join(problems)}")
    assert config.vision_encoder and config.connector
    encoder: Any = model.vision_encoder
    dual = config.vision_encoder.config
    own, kind = language_settings(model.language_model)
    model_type, family = _FAMILIES[kind]
    if kind == "gemma":
        own["hidden_activation"] = own["hidden_act"]  # where later versions of transformers 4 look
    return own | {
        "model_type": model_type,
        "architectures": [f"MGM{family}ForCausalLM"],
        **visual_settings(dual.low, config.connector.config.projector, processor),
        "mm_vision_tower_aux": dual.high.config.path or "",
        "mm_hidden_size": encoder.low_size,
        "mm_hidden_size_aux": encoder.high_size,
        "mm_projector_lr": None,
        "tune_mm_mlp_adapter": model.language_model.source is not None,
        "freeze_mm_mlp_adapter": False,
        "optimize_vision_tower": False,
        "optimize_vision_tower_aux": False,
        "image_size_aux": dual.high.config.image_size,
        "image_grid": dual.grid,
        "image_global": dual.global_view,
        "image_grid_pinpoints": None,
        "image_aspect_ratio": _ASPECT[next(iter(processor.transforms.values())).resize],
    }


def _problems(model: VisionLanguageModel, processor: VLMProcessor, config: ModelConfig) -> list[str]:
    assert config.vision_encoder and config.connector and config.language_model
    encoder, connector, problems = config.vision_encoder, config.connector, []
    if encoder.name != "dual":
        problems.append(f"the vision encoder is {encoder.name}, wanted is dual")
    else:
        low, high = encoder.config.low, encoder.config.high
        kind = getattr(getattr(model.vision_encoder.low, "model", None), "config", None)
        if low.name != "hf" or getattr(kind, "model_type", "") != "clip_vision_model":
            problems.append(f"the low encoder is {getattr(kind, 'model_type', low.name)}, wanted is CLIP (hf)")
        if high.name != "convnext_multiscale":
            problems.append(f"the high encoder is {high.name}, wanted is convnext_multiscale")
    if connector.name != "patch_info_mining":
        problems.append(f"the connector is {connector.name}, wanted is patch_info_mining")
    else:
        problems += wrong_projector(connector.config.projector)
    language: Any = getattr(model.language_model, "model", None)
    if language is None or language.config.model_type not in _FAMILIES:
        name = config.language_model.name if language is None else language.config.model_type
        problems.append(f"the language model is {name}, wanted is one of {', '.join(_FAMILIES)}")
    resize = next(iter(processor.transforms.values())).resize
    if resize not in _ASPECT:
        problems.append(f"processor.image.resize is {resize}, wanted is one of {', '.join(_ASPECT)}")
    return problems


def _write_towers(
    folder: Path, model: VisionLanguageModel, processor: VLMProcessor, written: Mapping[str, Tensor]
) -> Settings:
    """Both encoders, as transformers and OpenCLIP write them."""
    encoder: Any = model.vision_encoder
    own, _ = MGM.back({f"vision_encoder.{name}": tensor for name, tensor in encoder.state_dict().items()})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in (own | dict(written)).items()}
    size = _SIZES.get(encoder.high.sizes[1][0], _SIZES[192])
    aux = f"{_HIGH}-{size}"
    layer = _write_clip(folder / _LOW, encoder.low, processor, _below("model.vision_tower.vision_tower.", tensors))
    _write_openclip(folder / aux, encoder.high, _below("model.vision_tower_aux.vision_", tensors))
    return {"mm_vision_tower": _LOW, "mm_vision_tower_aux": aux, "mm_vision_select_layer": layer}


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _write_clip(folder: Path, low: Any, processor: VLMProcessor, tensors: dict[str, Tensor]) -> int:
    """Returns the layer to take: the last one, if those behind it are not at hand."""
    from safetensors.torch import save_file

    settings = copy.deepcopy(low.model.config)
    layers = len({name.split(".")[3] for name in tensors if name.startswith("vision_model.encoder.layers.")})
    layer = low.config.layer if layers == settings.num_hidden_layers else -1
    settings.num_hidden_layers = layers
    settings.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    side = low.image_settings["size"]
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    picture = picture_settings_of(next(iter(processor.transforms.values())))
    write_json(folder / "preprocessor_config.json", picture | sizes | {"do_center_crop": True, "do_pad": False})
    return layer


def _write_openclip(folder: Path, high: Any, tensors: Mapping[str, Tensor]) -> None:
    import torch

    folder.mkdir()
    torch.save({f"visual.trunk.{name}": tensor for name, tensor in tensors.items()}, folder / _OPENCLIP)
    statistics = {key: list(high.image_settings[key]) for key in ("mean", "std")}
    write_json(folder / "open_clip_config.json", {"preprocess_cfg": statistics})


MGM_LAYOUT = Layout(MGM, LORA, _settings, _write_towers, visual=("vision_encoder.", "connector."))
"""The file of its first stage holds both encoders as well."""
