"""Models as the ``.pth`` files of MiniMind-V: the way back from :mod:`minivlm.checkpoints.minimind`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.checkpoints.foreign import Format
from minivlm.checkpoints.minimind import V1, V1_LM, V1_MOE, V1_MOE_LM, V3, V3_LM
from minivlm.checkpoints.report import CheckpointError
from minivlm.io import atomic_file
from minivlm.models.connectors.mlp import LinearConnector
from minivlm.models.lora import is_adapter
from minivlm.models.vlm import VisionLanguageModel
from minivlm.types import IMAGE_MARKER

_FORMATS = {"llama": (V1, V1_LM), "ernie4_5_moe": (V1_MOE, V1_MOE_LM), "qwen3": (V3, V3_LM), "qwen3_moe": (V3, V3_LM)}
"""By the type of the language model: the formats of a whole model and of the language model alone."""
_FIXED: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "rope_type": "default"},
    "ernie4_5_moe": {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "rope_type": "default", "moe_layer_start_index": 0},
    "qwen3": {"rms_norm_eps": 1e-6, "rope_theta": 1e6},
    "qwen3_moe": {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "norm_topk_prob": True},
}
"""What the code of a version takes for granted, so that no file says it."""
_TABLES = ("tok_embeddings.weight", "output.weight", "model.embed_tokens.weight", "lm_head.weight")
_STAGES = {"sft": r"sft|instruct|finetun|stage_?2", "pretrain": r"pretrain|align|stage_?1"}
"""Stages of the original, and how a run's stage or a file is called that belongs to one."""


def write_minimind(
    target: Path, model: VisionLanguageModel, *, alone: bool = False, stage: str = "", tokenizer: Any = None
) -> tuple[Path, list[str]]:
    """Write a ``.pth`` file; returns it and the names of its tensors.

    ``alone`` takes the language model only. A ``target`` that does not end in ``.pth`` is a folder, in which the file
    has the original's name, for which ``stage`` says where the model comes from. The row of embeddings that the export
    as LLaVA of transformers has added for ``<image>``, then the last entry of ``tokenizer``, is left out. Raises
    :class:`CheckpointError` for what the original does not have.
    """
    form = _format(model, alone)
    file = target if target.suffix == ".pth" else target / file_name(model, alone, stage)
    if file.exists():
        raise CheckpointError(f"{file} exists; name another file, or remove it first")
    parts = ("language_model.",) if alone else ("connector.", "language_model.")
    state = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(parts)}
    for name in [name for name in state if name.endswith("e_score_correction_bias")]:
        if bool(state.pop(name).count_nonzero()):
            raise CheckpointError(f"{form.name} has no {name}, which is not zero")
    done, lost = form.back(state, model.language_model.head_dim)
    if tokenizer is not None and tokenizer.get_vocab().get(IMAGE_MARKER) == model.language_model.vocab_size - 1:
        done |= {name: tensor[:-1] for name, tensor in done.items() if name in _TABLES}
    lost += [name for name in done if name.endswith(".bias") and not name.startswith("vision_proj.")]
    if lost:
        more = ", ..." if len(lost) > 3 else ""
        raise CheckpointError(f"{form.name} has no place for {', '.join(lost[:3])}{more}")
    with atomic_file(file) as unfinished:
        torch.save({name: _plain(tensor) for name, tensor in done.items()}, unfinished)
    return file, list(done)


def file_name(model: VisionLanguageModel, alone: bool, stage: str) -> str:
    """The original's name for a file, as ``512_vlm_sft.pth`` or ``sft_vlm_768_moe.pth``.

    Raises :class:`CheckpointError` if ``stage`` does not tell which of the two stages it is.
    """
    kind = _kind(model)
    width, experts = model.language_model.hidden_size, "_moe" if kind.endswith("_moe") else ""
    named = [name for name, words in _STAGES.items() if re.search(words, stage.lower())][:1]
    if not alone and not named:
        raise CheckpointError(
            f"nothing tells whether this is a model of the stage pretrain or sft ('{stage}'): name the file, as "
            f"TARGET/{width}{experts}_vlm_sft.pth"
        )
    if kind.startswith("qwen3"):
        return f"{'llm' if alone else f'{named[0]}_vlm'}_{width}{experts}.pth"
    return f"{width}{experts}_{'llm' if alone else f'vlm_{named[0]}'}.pth"


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _kind(model: VisionLanguageModel) -> str:
    config: Any = getattr(getattr(model.language_model, "model", None), "config", None)
    return str(getattr(config, "model_type", type(model.language_model).__name__))


def _format(model: VisionLanguageModel, alone: bool) -> Format:
    """The format for a model; refuses what its code would compute in another way."""
    kind = _kind(model)
    if kind not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise CheckpointError(f"model.language_model: it is {kind}; MiniMind-V has {known} (config.model_type)")
    if any(map(is_adapter, model.state_dict())):
        raise CheckpointError("MiniMind-V has no adapters; fold them in with `minivlm merge`")
    if model.language_model.quantization:
        raise CheckpointError("model.language_model: its weights are quantised; set quantization: null")
    inner: Any = model.language_model.model
    config, rope = inner.config, inner.config.rope_parameters
    for key, value in _FIXED[kind].items():
        own = rope.get(key) if key.startswith("rope_") else getattr(config, key)
        if own != value:
            raise CheckpointError(f"model.language_model: {key} is {own}, the code of MiniMind-V has {value}")
    if inner.get_output_embeddings().weight is not inner.get_input_embeddings().weight:
        raise CheckpointError("model.language_model: its head is not tied to its embeddings, that of MiniMind-V is")
    if not alone:
        _check_projection(model.connector, is_first=not kind.startswith("qwen3"))
    return _FORMATS[kind][alone]


def _check_projection(connector: Any, *, is_first: bool) -> None:
    if isinstance(connector, LinearConnector):
        kinds = [nn.Linear] if connector.linear.bias is not None else []
    else:
        kinds = [type(layer) for layer in getattr(connector, "layers", [])]
    fits = kinds == ([nn.Linear] if is_first else [nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear])
    if not fits or isinstance(connector, LinearConnector) != is_first or getattr(connector, "merge", 1) > 1:
        wanted = "linear, with a bias" if is_first else "mlp of depth 2 with norm, without merge"
        raise CheckpointError(f"model.connector: it is {type(connector).__name__}, MiniMind-V has {wanted} here")
