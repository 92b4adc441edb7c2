"""What a folder of LLaVA's kind says of its model: ``config.json`` and files as a section ``model`` of ours.

Such a folder is a language model of transformers whose ``config.json`` has further keys (``mm_vision_tower``,
``mm_projector_type``, ...). Which files lie in it decides what it is; its name means nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minivlm.checkpoints.files import (
    ADAPTER,
    MINIMIND,
    WeightFile,
    is_llava_folder,
    json_value,
    read_json,
    read_weights,
)
from minivlm.checkpoints.llava import lora_alpha
from minivlm.checkpoints.llava_hf import describe_config
from minivlm.checkpoints.loading import identify
from minivlm.checkpoints.mgm_folder import names_two_encoders, with_second_encoder
from minivlm.checkpoints.minimind_folder import describe_minimind, is_minimind, minimind_language
from minivlm.checkpoints.report import CheckpointError
from minivlm.checkpoints.towers import find_folder, need_folder
from minivlm.models.hub import weight_files
from minivlm.models.vision.hf import picture_settings

_KEY = "model.checkpoint"
_get = partial(json_value, _KEY)
_PREFIXES = ("imp", "llava", "mgm", "mini_gemini", "minigemini", "tiny_llava")
_FAMILIES = {"": "llama", "qwen": "qwen2", "qwen1.5": "qwen2", "phi-msft": "phi", "mixformer-sequential": "phi"}
"""Types of language models by what stands behind the system's name in ``model_type``, where it is another word."""
_TEMPLATES = {"qwen2": "qwen2", "phi3": "phi3"}
_SPECIAL = {"imp": {"eos_token": "</s>"}}
"""Tokens that the training added, but which the folder's tokenizer may lack, by ``model_type``."""
_OLD_PHI = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_key_value_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
    "activation_function": "hidden_act",
}
_TOWERS = {768: (12, 12), 1024: (16, 24), 1152: (16, 27)}
"""Heads and layers of CLIP and SigLIP by their width, which no shape tells; wider ones differ in their activation."""
_SIDES = {27: 384}
"""Pixels of a side by its patches where they are no multiple: SigLIP-so400m/14 cuts off a rim."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_NO_SIZES = {
    *("model_type", "transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path"),
    "use_cache",  # LLaVA writes false, with which it has trained
}
_MAY_BE_NULL = {"sliding_window", "pad_token_id"}
"""Settings of language models whose null differs from what transformers takes when they are left out."""
_HELD = "vision_tower.vision_tower.vision_model."
_DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def describe(folder: Path, own: Container[str] = (), *, find: bool = True) -> dict[str, Any]:
    """Section ``model`` of a folder.

    A whole model is named as ``weights`` of the parts it holds; adapters and a projector stay the ``checkpoint``,
    and want the language model that they were trained on. What ``config.json`` says of the parts in ``own`` does
    not count, since they are described elsewhere. Encoders that are not in it must be found unless ``find`` is
    false. Raises :class:`CheckpointError` for what is not known.
    """
    settings = read_json(_KEY, folder / "config.json")
    file = read_weights(_KEY, str(folder), shapes_only=True)
    form = identify(_KEY, file)
    if form is None:
        raise CheckpointError(f"{_KEY}: {folder} holds no weights of LLaVA's layout beside its config.json")
    if "text_config" in settings:
        return _of_transformers(folder, settings)
    if MINIMIND in settings:
        return describe_minimind(folder, settings)
    whole = str(folder) if form.base else None
    try:
        kind = language_type(settings)
    except CheckpointError:
        if "language_model" not in own:
            raise
        kind = ""
    if not whole:
        language = _base(folder, settings)
    elif "language_model" in own:
        language = {"name": "hf", "weights": whole}
    else:
        language = _language_model(folder, settings, file)
    name = _get(settings, "mm_vision_tower", str) or _get(settings, "vision_tower", str, "")
    tower, held = find_folder(folder, name), {n: t for n, t in file.tensors.items() if _HELD in n}
    two = names_two_encoders(settings)
    siglip = not any("class_embedding" in name for name in held) if held else "siglip" in tower.lower()
    if "vision_encoder" in own:
        encoder: dict[str, Any] = {"name": "hf", "weights": whole if held else None}
    else:
        encoder = _encoder_settings(settings, siglip)
        if held:
            encoder |= {"config": _tower_config(tower, held, encoder["layer"], siglip), "weights": whole}
        elif find:
            key = "model.vision_encoder.low.path" if two else "model.vision_encoder.path"
            encoder["path"] = need_folder(folder, name, "mm_vision_tower", key, hub=True)
        else:
            encoder["path"] = tower or None
    section = {
        "vision_encoder": encoder,
        "connector": {**_connector(settings), "weights": whole},
        "language_model": language,
        "template": _TEMPLATES.get(kind, "vicuna_v1"),  # Imp's own `phi2` has the same strings
        "processor": _processor(settings, Path(tower), siglip),
        "checkpoint": None if whole else str(folder),
    }
    return with_second_encoder(section, settings, file, kind, own=own, find=find) if two else section


def _of_transformers(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A folder of ``LlavaForConditionalGeneration``."""
    image = next((p for p in ("preprocessor_config.json", "processor_config.json") if (folder / p).is_file()), None)
    found = read_json(_KEY, folder / image) if image else {}
    section = describe_config(settings, found.get("image_processor") or found or None)
    for part in ("vision_encoder", "connector", "language_model"):
        section[part]["weights"] = str(folder)
    section["vision_encoder"]["freeze"] = True
    if _has_tokenizer(folder):
        section["language_model"]["tokenizer"] = str(folder)
    return section


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def describe_language_model(folder: Path) -> dict[str, Any] | None:
    """A folder that holds a language model in one of these layouts as ``model.language_model``; None for any other.

    It may be a whole model, of which the language model is taken, or Phi-2 as it was first published.
    """
    if not (folder / "config.json").is_file():
        return None
    settings = read_json(_KEY, folder / "config.json")
    if not is_llava_folder(folder) and "n_embd" not in settings and not is_minimind(settings):
        return None
    if not weight_files(folder) or (folder / ADAPTER).is_file():
        return None
    file = read_weights(_KEY, str(folder), shapes_only=True)
    form = identify(_KEY, file)
    if is_minimind(settings):
        return minimind_language(folder, settings) if form else None
    return _language_model(folder, settings, file) if form and form.base and not form.part else None


def language_type(settings: Mapping[str, Any]) -> str:
    """The type that transformers gives the language model, from the ``model_type`` of a system.

    ``imp`` is ``phi``, ``llava_mistral`` is ``mistral``. Raises :class:`CheckpointError` for an unknown one.
    """
    from transformers import CONFIG_MAPPING

    own = _get(settings, "model_type", str, "")
    rest = re.sub(rf"^({'|'.join(_PREFIXES)})[_-]?", "", own)
    found = "phi" if own == "imp" else _FAMILIES.get(rest, rest)
    if found not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{_KEY}: config.json has the model_type '{own}', whose language model is not known; describe it under "
            "model.language_model.config, with its model_type, or write that there, as llava_qwen2"
        )
    return found


def _language_model(folder: Path, settings: Mapping[str, Any], file: WeightFile) -> dict[str, Any]:
    config = _language_config(settings)
    table = next((t for n, t in file.tensors.items() if n.endswith(("embed_tokens.weight", "wte.weight"))), None)
    if table is not None and table.dim():
        config["vocab_size"] = table.shape[0]  # the first layout of Phi-2 rounds it up
    node: dict[str, Any] = {"name": "hf", "config": config, "weights": str(folder)}
    if _has_tokenizer(folder):
        node["tokenizer"] = str(folder)
    if settings.get("model_type") in _SPECIAL:
        node["special_tokens"] = dict(_SPECIAL[settings["model_type"]])
    if table is not None and table.dtype in _DTYPES:
        node["dtype"] = _DTYPES[table.dtype]
    return node


def _language_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the language model alone, by the names of transformers."""
    from transformers import CONFIG_MAPPING

    kind = language_type(settings)
    given = {**settings, **(_first_phi(settings) if "n_embd" in settings else {})}
    known = {*CONFIG_MAPPING[kind]().to_dict(), "rope_theta", "rope_scaling", "partial_rotary_factor"}
    kept = {k: v for k, v in given.items() if k in known - _NO_SIZES and (v is not None or k in _MAY_BE_NULL)}
    try:
        CONFIG_MAPPING[kind](**kept)
    except Exception as error:  # its strict classes raise errors of many kinds
        text = " ".join(str(error).split())
        raise CheckpointError(f"{_KEY}: config.json does not describe a language model: {text}") from error
    return {"model_type": kind, **kept}


def _first_phi(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of Phi-2 in its first layout by the names of today."""
    given = {new: settings.get(new, settings.get(old)) for old, new in _OLD_PHI.items()}
    width, heads = _get(given, "hidden_size", int), _get(given, "num_attention_heads", int)
    rows, rotated = _get(settings, "vocab_size", int), _get(settings, "rotary_dim", int, 32)
    if not width or not heads or not rows:
        raise CheckpointError(f"{_KEY}: config.json lacks one of n_embd, n_head and vocab_size")
    given["intermediate_size"] = given["intermediate_size"] or 4 * width
    given["partial_rotary_factor"] = rotated * heads / width
    return {**given, "vocab_size": 64 * math.ceil(rows / 64)}


def _base(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The language model that adapters or a projector belong to, which the user may have to name."""
    node: dict[str, Any] = {"name": "hf"}
    adapter = read_json(_KEY, folder / ADAPTER) if (folder / ADAPTER).is_file() else {}
    named = adapter.get("base_model_name_or_path") or settings.get("_name_or_path")
    if named:
        node["path"] = find_folder(folder, str(named))
    if settings.get("model_type") in _SPECIAL:
        node["special_tokens"] = dict(_SPECIAL[settings["model_type"]])
    if adapter:
        node["lora"] = _lora(adapter)
    return node


def _lora(adapter: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of peft in our words; Wqkv is three layers here, which share one A matrix."""
    targets = adapter.get("target_modules") or []
    if isinstance(targets, str):
        targets = [targets]
    ours = {"Wqkv": ["q_proj", "k_proj", "v_proj"], "out_proj": ["dense"], "linear": ["lm_head"]}
    is_fused = "Wqkv" in targets
    named = [name for target in sorted(targets) for name in (ours.get(target, [target]) if is_fused else [target])]
    lora = {"r": adapter["r"], "alpha": lora_alpha(adapter), "dropout": adapter.get("lora_dropout", 0.0)}
    return {**lora, "target_modules": named} | ({"shared_a": [ours["Wqkv"]]} if is_fused else {})


def _encoder_settings(settings: Mapping[str, Any], siglip: bool) -> dict[str, Any]:
    """What is taken of the tower; its weights are in the file or where ``mm_vision_tower`` points."""
    layer = _get(settings, "mm_vision_select_layer", int, -2)
    keeps = _get(settings, "mm_vision_select_feature", str, "patch") != "patch"
    return {"name": "hf", "layer": layer, "freeze": True, "class_token": "keep" if keeps and not siglip else "drop"}


def _tower_config(tower: str, held: Mapping[str, Tensor], layer: int, siglip: bool) -> dict[str, Any]:
    """The tower's own config.json if it is at hand, else what the shapes tell."""
    file = Path(tower) / "config.json"
    if file.is_file():
        whole = read_json(_KEY, file)
        inner = whole.get("vision_config") or whole
        if not isinstance(inner, dict):
            raise CheckpointError(f"{_KEY}: {file} does not describe a vision encoder")
        kind = str(whole.get("model_type", "")).removesuffix("_vision_model")
        kept = {key: value for key, value in inner.items() if key not in _NO_SIZES}
        return {**kept, "model_type": f"{kind}_vision_model"}
    shapes = {name.split(_HELD)[1]: tuple(tensor.shape) for name, tensor in held.items()}
    try:
        width, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
        rows = math.isqrt(shapes["embeddings.position_embedding.weight"][0])  # a class token does not change it
        inside = shapes["encoder.layers.0.mlp.fc1.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{_KEY}: the vision encoder in the file lacks its embeddings or all layers") from error
    if width not in _TOWERS:
        raise CheckpointError(
            f"{_KEY}: there is no folder '{tower}' (mm_vision_tower), which tells how many heads the vision encoder "
            f"of width {width} has: put its config.json there, or describe it under model.vision_encoder (config and "
            "layer)"
        )
    heads, depth = _TOWERS[width]
    layers = 1 + max(int(found[1]) for name in shapes if (found := re.match(r"encoder\.layers\.(\d+)\.", name)))
    return {
        "model_type": "siglip_vision_model" if siglip else "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": inside,
        # the file may hold no more layers than are used
        "num_hidden_layers": layers - 1 - layer if layer < 0 and layers < depth else layers,
        "num_attention_heads": heads,
        "image_size": _SIDES.get(rows, rows * patch),
        "patch_size": patch,
        "hidden_act": "gelu_pytorch_tanh" if siglip else "quick_gelu",
        "layer_norm_eps": 1e-6 if siglip else 1e-5,
    }


def _connector(settings: Mapping[str, Any]) -> dict[str, Any]:
    kind = _get(settings, "mm_projector_type", str) or "linear"
    mlp = re.fullmatch(r"mlp([1-9]\d*)x_gelu", kind)
    if kind != "linear" and not mlp:
        raise CheckpointError(
            f"{_KEY}: the projector '{kind}' is not known (linear, mlpNx_gelu); the other parts can be taken by "
            "themselves, as model.language_model.path"
        )
    return {"name": "mlp", "depth": int(mlp[1])} if mlp else {"name": "linear"}


def _processor(settings: Mapping[str, Any], tower: Path, siglip: bool) -> dict[str, Any]:
    """How pictures are prepared: ``square`` is what the tower's own processor does."""
    aspect = _get(settings, "image_aspect_ratio", str) or "square"
    if aspect not in ("square", "pad", "crop"):
        raise CheckpointError(
            f"{_KEY}: config.json has image_aspect_ratio '{aspect}'; square, pad and crop are known here"
        )
    image: dict[str, Any] = {"name": "image", "resize": "squash" if siglip else "shortest_edge"}
    if (tower / "preprocessor_config.json").is_file():
        image |= picture_settings(read_json(_KEY, tower / "preprocessor_config.json"))
    if aspect != "square":
        image["resize"] = aspect
    longest = _get(settings, "tokenizer_model_max_length", int, 0)
    return {"name": "vlm", "image": image, **({"max_length": longest} if longest > 0 else {})}
