"""What a folder of MiniMind or MiniMind-V says of its model: ``config.json`` in the original's words as ours.

Such a folder has code of its own beside its weights, which is never run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minivlm.checkpoints.report import CheckpointError
from minivlm.config.experiment import to_container
from minivlm.config.loader import parse_model

_KEY = "model.checkpoint: config.json of MiniMind"
_POSITIONS = 1024
"""What the first version was evaluated with; its ``max_seq_len`` is the length of training."""
_V3_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id"),
)
_V3_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
_V3_DEFAULTS: dict[str, Any] = {
    "vocab_size": 6400,
    "hidden_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "num_experts_per_tok": 1,
    "norm_topk_prob": True,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 2048,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.0,
}
"""The table of long positions that ``inference_rope_scaling`` switches on."""


def is_minimind(settings: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is that of a language model of MiniMind, with or without pictures."""
    return str(settings.get("model_type", "")).replace("_", "-") in ("minimind", "minimind-v")


def describe_minimind(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Section ``model`` of a folder of MiniMind-V, which holds projection and language model.

    The vision encoder is that of the packaged model, unless another is named. Raises :class:`CheckpointError` for
    sizes that make no model.
    """
    kind = ("v1" if "dim" in settings else "v3") + ("_moe" if settings.get("use_moe") else "")
    parts = {"language_model": minimind_language(folder, settings), "connector": {"weights": str(folder)}}
    section = parse_model({"arch": "minimind_v", "model_type": kind, **parts}, str(folder))
    section.arch = section.model_type = None
    return to_container(section)


def minimind_language(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Node ``language_model`` of a folder of MiniMind or MiniMind-V."""
    node = {"name": "hf", "config": language_config(settings), "weights": str(folder)}
    return node | ({"tokenizer": str(folder)} if (folder / "tokenizer.json").is_file() else {})


def language_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the language model by the names of transformers, with its ``model_type``.

    Raises :class:`CheckpointError` for sizes that are no numbers, and for experts that transformers does not have.
    """
    try:
        return _first(settings) if "dim" in settings else _newest(settings)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{_KEY} does not describe a language model: {type(error).__name__}: {error}") from error


def _first(given: Mapping[str, Any]) -> dict[str, Any]:
    width, multiple = int(given["dim"]), int(given.get("multiple_of") or 64)
    inside = given.get("hidden_dim") or multiple * math.ceil(int(2 * 4 * width / 3) / multiple)
    config = {
        "model_type": "llama",
        "vocab_size": given["vocab_size"],
        "hidden_size": width,
        "intermediate_size": inside,
        "num_hidden_layers": given["n_layers"],
        "num_attention_heads": given["n_heads"],
        "num_key_value_heads": given.get("n_kv_heads") or given["n_heads"],
        "max_position_embeddings": max(_POSITIONS, given.get("max_seq_len") or 0),
        "rms_norm_eps": given.get("norm_eps", 1e-5),
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if not given.get("use_moe"):
        return config
    wrong = [f"{key} {given[key]!r}" for key, usual in _USUAL.items() if given.get(key, usual) != usual]
    if wrong:
        raise CheckpointError(f"{_KEY}: no model of transformers has experts with {', '.join(wrong)}")
    return config | {
        "model_type": "ernie4_5_moe",
        "moe_intermediate_size": inside,
        "moe_num_experts": given["n_routed_experts"],
        "moe_k": given["num_experts_per_tok"],
        "moe_num_shared_experts": int(given.get("n_shared_experts") or 0),
        "moe_layer_start_index": 0,
        "moe_norm_min": 1e-20,
        "pad_token_id": None,  # 0 would keep that row of the embeddings from training
    }


_USUAL = {"scoring_func": "softmax", "norm_topk_prob": True}
"""How the first version's experts are chosen and weighted."""


def _newest(given: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    values |= {
        key: _V3_DEFAULTS.get(key) if given.get(key) is None else given[key] for key in (*_V3_KEYS, *_V3_EXPERTS)
    }
    width = values["hidden_size"]
    values["head_dim"] = values["head_dim"] or width // values["num_attention_heads"]
    values["intermediate_size"] = values["intermediate_size"] or 64 * math.ceil(width * math.pi / 64)
    values["moe_intermediate_size"] = values["moe_intermediate_size"] or values["intermediate_size"]
    config = {key: values[key] for key in _V3_KEYS if values[key] is not None}
    if given.get("inference_rope_scaling"):
        config["rope_scaling"] = {**_YARN, "rope_theta": config["rope_theta"]}
    if not given.get("use_moe"):
        return {"model_type": "qwen3", **config}
    return {"model_type": "qwen3_moe", **config, **{key: values[key] for key in _V3_EXPERTS}}
