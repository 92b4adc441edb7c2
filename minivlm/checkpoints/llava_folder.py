"""What a folder of LLaVA's kind says of its model: ``config.json`` and files as a section ``model`` of ours.

Such a folder is a language model of transformers whose ``config.json`` has further keys (``mm_vision_tower``,
``mm_projector_type``, ...). Which files lie in it decides what it is; its name means nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minivlm.checkpoints.files import (
    ADAPTER,
    WeightFile,
    folder_files,
    is_llava_folder,
    read_json,
    read_weights,
)
from minivlm.checkpoints.llava import lora_alpha
from minivlm.checkpoints.llava_hf import describe_config
from minivlm.checkpoints.loading import identify
from minivlm.checkpoints.report import CheckpointError
from minivlm.models.hub import weight_files

_KEY = "model.checkpoint"
_PREFIXES = ("imp", "llava", "mgm", "mini_gemini", "tiny_llava")
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
_HEADS = {768: 12, 1024: 16, 1152: 16, 1280: 16, 1408: 16, 1664: 16}
"""Heads of CLIP and SigLIP by their width, which no shape tells."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_DTYPES = {"float16": "fp16", "bfloat16": "bf16"}


def describe(folder: Path) -> dict[str, Any]:
    """Section ``model`` of a folder.

    A whole model is named as ``weights`` of the parts it holds; adapters and a projector stay the ``checkpoint``,
    and want the language model that they were trained on. Raises :class:`CheckpointError` for what is not known.
    """
    settings = read_json(_KEY, folder / "config.json")
    file = read_weights(_KEY, str(folder), shapes_only=True) if folder_files(folder) else None
    form = identify(_KEY, file) if file else None
    if file is None or form is None:
        raise CheckpointError(f"{_KEY}: {folder} holds no weights of LLaVA's layout beside its config.json")
    if "text_config" in settings:
        return _of_transformers(folder, settings)
    is_whole = form.base
    language = _language_model(folder, settings, file) if is_whole else _base(folder, settings)
    kind = language_type(settings)
    section: dict[str, Any] = {
        "vision_encoder": _vision_encoder(folder, settings, file),
        "connector": _connector(settings),
        "language_model": language,
        "template": _TEMPLATES.get(kind, "vicuna_v1"),  # Imp's own `phi2` has the same strings
        "processor": _processor(settings),
        "checkpoint": None if is_whole else str(folder),
    }
    if is_whole:
        section["connector"]["weights"] = str(folder)
    return section


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
    if not is_llava_folder(folder) and "n_embd" not in settings:
        return None
    if not weight_files(folder) or (folder / ADAPTER).is_file():
        return None
    file = read_weights(_KEY, str(folder), shapes_only=True)
    form = identify(_KEY, file)
    return _language_model(folder, settings, file) if form and form.base and not form.part else None


def language_type(settings: Mapping[str, Any]) -> str:
    """The type that transformers gives the language model, from the ``model_type`` of a system.

    ``imp`` is ``phi``, ``llava_mistral`` is ``mistral``. Raises :class:`CheckpointError` for an unknown one.
    """
    from transformers import CONFIG_MAPPING

    own = str(settings.get("model_type", ""))
    rest = re.sub(rf"^({'|'.join(_PREFIXES)})[_-]?", "", own)
    found = "phi" if own == "imp" else _FAMILIES.get(rest, rest)
    if found not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{_KEY}: config.json has the model_type '{own}', whose language model is not known; describe it under "
            "model.language_model.config, with its model_type"
        )
    return found


def _language_model(folder: Path, settings: Mapping[str, Any], file: WeightFile) -> dict[str, Any]:
    config = _language_config(settings)
    rows = [t.shape[0] for name, t in file.tensors.items() if name.endswith(("embed_tokens.weight", "wte.weight"))]
    if rows:
        config["vocab_size"] = rows[0]  # the first layout of Phi-2 rounds it up
    node: dict[str, Any] = {"name": "hf", "config": config, "weights": str(folder)}
    if _has_tokenizer(folder):
        node["tokenizer"] = str(folder)
    if settings.get("model_type") in _SPECIAL:
        node["special_tokens"] = dict(_SPECIAL[settings["model_type"]])
    stored = {str(t.dtype).removeprefix("torch.") for n, t in file.tensors.items() if n.endswith("layernorm.weight")}
    if len(stored) == 1 and (dtype := _DTYPES.get(stored.pop())):
        node["dtype"] = dtype
    return node


def _language_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the language model alone, by the names of transformers."""
    from transformers import CONFIG_MAPPING

    kind = language_type(settings)
    given = {**settings}
    for old, new in _OLD_PHI.items():
        if given.get(old) is not None:
            given.setdefault(new, given[old])
    if "n_embd" in given:  # Phi-2 in its first layout
        given.setdefault("intermediate_size", 4 * given["hidden_size"])
        head = given["hidden_size"] // given["num_attention_heads"]
        given.setdefault("partial_rotary_factor", given.get("rotary_dim", 32) / head)
        given.setdefault("tie_word_embeddings", False)
        given["vocab_size"] = 64 * math.ceil(given["vocab_size"] / 64)
    known = {*CONFIG_MAPPING[kind]().to_dict(), "rope_theta", "rope_scaling", "partial_rotary_factor"}
    left_out = {"model_type", "transformers_version", "architectures", "dtype", "torch_dtype", "_name_or_path"}
    kept = {key: value for key, value in given.items() if key in known - left_out and value is not None}
    return {"model_type": kind, **kept}


def _base(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The language model that adapters or a projector belong to, which the user may have to name."""
    node: dict[str, Any] = {"name": "hf"}
    adapter = read_json(_KEY, folder / ADAPTER) if (folder / ADAPTER).is_file() else {}
    named = adapter.get("base_model_name_or_path") or settings.get("_name_or_path")
    if named:
        node["path"] = str(named)
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


def _vision_encoder(folder: Path, settings: Mapping[str, Any], file: WeightFile) -> dict[str, Any]:
    """The tower: from the file if it is in there, else from where ``mm_vision_tower`` points."""
    tower = str(settings.get("mm_vision_tower") or settings.get("vision_tower") or "")
    local = next((p for p in (folder, *folder.resolve().parents[:3]) if tower and (p / tower).is_dir()), None)
    path = str(local / tower) if local else tower
    held = {n: t for n, t in file.tensors.items() if ".vision_tower.vision_tower.vision_model." in n}
    layer = settings.get("mm_vision_select_layer", -2)
    keeps = settings.get("mm_vision_select_feature", "patch") != "patch"
    node: dict[str, Any] = {"name": "hf", "layer": layer, "freeze": True}
    node["class_token"] = "keep" if keeps and not _is_siglip(tower, held) else "drop"
    if not held:
        return {**node, "path": path}
    return {**node, "config": _tower_config(path, held, layer), "weights": str(folder)}


def _is_siglip(tower: str, held: Mapping[str, Any]) -> bool:
    if held:
        return not any("class_embedding" in name for name in held)
    return "siglip" in tower.lower()


def _tower_config(path: str, held: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """The tower's own config.json if it is at hand, else what the shapes tell."""
    file = Path(path) / "config.json"
    if file.is_file():
        whole = read_json(_KEY, file)
        inner = {**(whole.get("vision_config") or whole)}
        kind = str(whole.get("model_type", "")).removesuffix("_vision_model")
        left_out = ("architectures", "torch_dtype", "dtype", "transformers_version")
        kept = {key: value for key, value in inner.items() if key not in left_out}
        return {**kept, "model_type": f"{kind}_vision_model"}
    shapes = {name.split(".vision_model.")[1]: tuple(tensor.shape) for name, tensor in held.items()}
    width, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
    siglip = "embeddings.class_embedding" not in shapes
    positions = shapes["embeddings.position_embedding.weight"][0] - (not siglip)
    layers = 1 + max(int(found[1]) for name in shapes if (found := re.match(r"encoder\.layers\.(\d+)\.", name)))
    if width not in _HEADS:
        raise CheckpointError(
            f"{_KEY}: there is no folder '{path}' (mm_vision_tower), which tells how many heads the vision encoder "
            f"of width {width} has; describe it under model.vision_encoder.config"
        )
    return {
        "model_type": "siglip_vision_model" if siglip else "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        # the file may hold no more layers than are used
        "num_hidden_layers": layers - 1 - layer if layer < 0 and siglip else layers,
        "num_attention_heads": _HEADS[width],
        "image_size": round(positions**0.5) * patch,
        "patch_size": patch,
        "hidden_act": "gelu_pytorch_tanh" if siglip else "quick_gelu",
        "layer_norm_eps": 1e-6 if siglip else 1e-5,
    }


def _connector(settings: Mapping[str, Any]) -> dict[str, Any]:
    kind = str(settings.get("mm_projector_type") or "linear")
    mlp = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if kind != "linear" and not mlp:
        raise CheckpointError(
            f"{_KEY}: the projector '{kind}' is not known (linear, mlpNx_gelu); describe it under model.connector"
        )
    return {"name": "mlp", "depth": int(mlp[1])} if mlp else {"name": "linear"}


def _processor(settings: Mapping[str, Any]) -> dict[str, Any]:
    resize = {"square": "squash", "pad": "pad", "crop": "crop"}.get(str(settings.get("image_aspect_ratio")))
    node: dict[str, Any] = {"name": "vlm", "image": {"name": "image"}}
    if resize:
        node["image"]["resize"] = resize
    longest = settings.get("tokenizer_model_max_length")
    return {**node, "max_length": longest} if isinstance(longest, int) and longest > 0 else node
