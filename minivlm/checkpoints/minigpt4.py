"""MiniGPT-4 and what it is built upon: ``eva_vit_g.pth``, ``blip2_pretrained_*.pth`` and its own ``.pth`` files.

The names and shapes are those of the published files (EVA-CLIP-g; BLIP-2, Li et al. 2023; MiniGPT-4 and
MiniGPT-v2, Zhu et al. and Chen et al. 2023).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from minivlm.checkpoints.files import WeightFile
from minivlm.checkpoints.foreign import Format, Row, Rule, Size, prefixed
from minivlm.models.lora import other_alpha
from minivlm.models.vlm import VisionLanguageModel

LANGUAGE_MODELS = {3200: "3B", 4096: "7B", 5120: "13B", 6656: "33B", 8192: "65B or 70B"}
"""Sizes of LLaMA and Vicuna by their hidden size."""
EVA_WIDTH, QFORMER_WIDTH, OLD_ROWS, LORA_ALPHA = 1408, 768, 32000, 16
_LORA = re.compile(r"\.(\w+)\.lora_A\.(?:default\.)?weight$")
_BUFFER = "buffers, which are computed anew"

_EVA = (
    Rule("cls_token", "vision_encoder.vit.cls_token"),
    Rule("pos_embed", "vision_encoder.vit.pos_embed"),
    Rule("patch_embed.*", "vision_encoder.vit.patch_embed.*"),
    Rule("blocks.#.*", "vision_encoder.vit.blocks.#.*", "of blocks behind the last one that is used"),
    Rule("norm.*", why="of the norm behind the last block, which is not used"),
    Rule("head.*", why="of the head, which is not used"),
)
_LAYER = "Qformer.bert.encoder.layer.#."
_OUR_LAYER = "connector.qformer.encoder.layer.#."
_TEXT = "of the part of the Q-Former that reads text"
_QFORMER = (
    Rule("query_tokens", "connector.query_tokens"),
    Rule("ln_vision.*", "vision_encoder.ln_vision.*"),
    Rule("Qformer.bert.embeddings.LayerNorm.*", "connector.qformer.layernorm.*"),
    Rule("Qformer.bert.embeddings.position_ids", why=_BUFFER),
    Rule("Qformer.bert.embeddings.*", why=_TEXT),
    Rule(_LAYER + "attention.self.*", _OUR_LAYER + "attention.attention.*"),
    Rule(_LAYER + "crossattention.self.*", _OUR_LAYER + "crossattention.attention.*"),
    Rule(_LAYER + "intermediate.*", why=_TEXT),
    Rule(_LAYER + "output.*", why=_TEXT),
    Rule(_LAYER + "*", _OUR_LAYER + "*"),
    Rule("Qformer.cls.*", why=_TEXT),
)
_HEADS = ("t5_proj.*", "opt_proj.*", "llm_proj.*", "vision_proj.*", "text_proj.*", "itm_head.*", "temp")
_BLIP2 = (
    *_QFORMER,
    *prefixed("visual_encoder.", _EVA),
    *(Rule(head, why="of BLIP-2's own heads and projections") for head in _HEADS),
    *(Rule(f"{llm}_model.*", why="of BLIP-2's own language model") for llm in ("t5", "opt", "llm")),
)
_LORA_RULES = tuple(
    # The spelling of peft 0.2 comes first: published files have it, and it is what is written.
    Rule(
        f"llama_model.base_model.model.*.lora_{ab}{adapter}.weight", f"language_model.model.*.lora_{ab}.default.weight"
    )
    for adapter in ("", ".default")
    for ab in "AB"
)
_MINIGPT4 = (
    Rule("llama_proj.*", "connector.linear.*"),
    *_LORA_RULES,
    Rule("llama_model.*.rotary_emb.inv_freq", why=_BUFFER),
    Rule("llama_model.*.SCB", why="of the 8-bit language model"),
    Rule("llama_model.*.weight_format", why="of the 8-bit language model"),
    Rule("llama_model.base_model.model.*", "language_model.model.*"),
    Rule("llama_model.*", "language_model.model.*"),
    *_QFORMER,
    *prefixed("visual_encoder.", _EVA),
    Rule("*", why="that are no part of MiniGPT-4"),
)

_ENCODER = "model.vision_encoder."
_EVA_SIZES = (
    Size("width of the vision encoder", _ENCODER + "width", "vision_encoder.vit.cls_token", 2),
    Size("patch size", _ENCODER + "patch_size", "vision_encoder.vit.patch_embed.proj.weight", 2),
    Size("blocks of the vision encoder", _ENCODER + "depth", "vision_encoder.vit.blocks.#.norm1.weight", None, True),
    Size("width inside of its MLPs", _ENCODER + "mlp_ratio", "vision_encoder.vit.blocks.0.mlp.fc1.weight", 0),
)
_QUERY, _FIRST = "connector.query_tokens", "connector.qformer.encoder.layer.0."
_CONNECTOR = "model.connector."
_QFORMER_SIZES = (
    Size("query tokens", _CONNECTOR + "num_query_tokens", _QUERY, 1),
    Size("width of the Q-Former", _CONNECTOR + "hidden_size", _QUERY, 2),
    Size("layers of the Q-Former", _CONNECTOR + "num_layers", f"{_OUR_LAYER}attention.output.dense.weight", None),
    Size("width inside of its MLPs", _CONNECTOR + "intermediate_size", f"{_FIRST}intermediate_query.dense.weight", 0),
    Size("channels that it reads", _ENCODER + "width", f"{_FIRST}crossattention.attention.key.weight", 1),
    Size("channels of ln_vision", _ENCODER + "width", "vision_encoder.ln_vision.weight", 0),
)
_RANKS = {
    **{"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "fc1.weight": 2},
    **{"query_tokens": 3, "dense.weight": 2, "key.weight": 2, "ln_vision.weight": 1},
    **{"llama_proj.weight": 2, "lora_A.weight": 2, "lora_A.default.weight": 2},
}
_RANK = Size("rank of LoRA", "model.language_model.lora.r", "language_model.*.lora_A.default.weight", 0)


def _explain_eva(file: WeightFile, model: VisionLanguageModel) -> str | None:
    if not hasattr(model.vision_encoder, "vit"):
        return f"the vision encoder is {type(model.vision_encoder).__name__}; set model.vision_encoder.name: eva_clip_g"
    return None


def _explain_blip2(file: WeightFile, model: VisionLanguageModel) -> str | None:
    if not hasattr(model.connector, "query_tokens"):
        name = type(model.connector).__name__
        return f"the connector is {name}, without a Q-Former; leave `weights` out or set model.connector.name: qformer"
    return _explain_eva(file, model)  # ln_vision


def _explain_minigpt4(file: WeightFile, model: VisionLanguageModel) -> str | None:
    return _other_projection(file, model) or _other_lora(file, model) or _other_vicuna(model)


def _other_projection(file: WeightFile, model: VisionLanguageModel) -> str | None:
    linear = getattr(model.connector, "linear", None)
    if not isinstance(linear, nn.Linear):
        return f"the connector is {type(model.connector).__name__}; that of MiniGPT-4 is qformer or patch_merge"
    if "llama_proj.weight" not in file.tensors:
        return "it lacks llama_proj.weight, the layer that MiniGPT-4 trains"
    outputs, inputs = file.tensors["llama_proj.weight"].shape
    width = model.vision_encoder.hidden_size
    if inputs != linear.in_features:
        kind = f"llama_proj takes {inputs} channels, the connector gives it {linear.in_features}"
        if inputs == 4 * width:
            return (
                f"{kind}: the file is of the variant without Q-Former; set model.connector.name: patch_merge "
                "(model_type pretrain_llama2, or arch minigpt_v2)"
            )
        if inputs % width:
            return (
                f"{kind}: the file is of the variant with Q-Former; set model.connector.name: qformer "
                "(model_type pretrain_vicuna0)"
            )
        return f"{kind}: it is for a vision encoder or Q-Former of another width"
    if outputs != linear.out_features:
        known = LANGUAGE_MODELS.get(outputs)
        return f"llama_proj gives {outputs} channels, the language model has {linear.out_features}" + (
            f": this is the {known} file; set model.language_model.path to a {known} model" if known else ""
        )
    return None


def _other_lora(file: WeightFile, model: VisionLanguageModel) -> str | None:
    lora = lora_of(file)
    adapters = model.language_model.adapter_parameters
    if lora and not adapters:
        settings = f"{{r: {lora['r']}, alpha: {lora['alpha']}, target_modules: [{', '.join(lora['targets'])}]}}"
        return f"it holds LoRA weights, the model has no LoRA; set model.language_model.lora: {settings}"
    if adapters and not lora:
        return "the model has LoRA, the file does not (a MiniGPT-4, not a MiniGPT-v2?); leave out lora"
    reason = other_alpha(model.language_model.lora, lora["alpha"]) if lora and lora["alpha_is_written"] else None
    if reason:
        return f"{reason} (model.language_model.lora.alpha)"
    targets = sorted({found[1] for name in adapters if (found := _LORA.search(name))})
    if lora and targets != lora["targets"]:
        return (
            f"LoRA stands at {', '.join(lora['targets'])} in the file, at {', '.join(targets)} in the model "
            "(model.language_model.lora.target_modules)"
        )
    return None


def _other_vicuna(model: VisionLanguageModel) -> str | None:
    """Published files with a Q-Former belong to Vicuna v0, whose pad token is row 32001."""
    settings = getattr(model.language_model, "config", None)
    if not hasattr(model.connector, "query_tokens") or model.language_model.vocab_size != OLD_ROWS:
        return None
    if getattr(settings, "vocab_size", None) is not None:
        return None
    return (
        f"the language model has {OLD_ROWS} embeddings: it is LLaMA or Vicuna v1.1 or v1.5, but published files "
        f"belong to Vicuna v0, which has {OLD_ROWS + 1}. With Vicuna of another version the answers are nonsense; "
        f"set model.language_model.vocab_size: {OLD_ROWS} if this checkpoint was trained on it"
    )


def lora_of(file: WeightFile) -> dict[str, Any] | None:
    """Rank, targets, layers and alpha (from the file's config, else MiniGPT-v2's) of a file's LoRA weights."""
    found = {name: match[1] for name in file.tensors if (match := _LORA.search(name))}
    if not found:
        return None
    written = _section(file, "model").get("lora_alpha")
    return {
        "r": int(file.tensors[next(iter(found))].shape[0]),
        "alpha": LORA_ALPHA if written is None else written,
        "targets": sorted(set(found.values())),
        "layers": len({layer[1] for name in found if (layer := re.search(r"\.layers\.(\d+)\.", name))}),
        "alpha_is_written": written is not None,
    }


def has_qformer(file: WeightFile) -> bool:
    """Whether a MiniGPT-4 file belongs to the variant with Q-Former, as far as it tells."""
    written = _section(file, "model").get("has_qformer")
    if isinstance(written, bool):
        return written
    weight = file.tensors.get("llama_proj.weight")
    return any(name.startswith("Qformer.") for name in file.tensors) or (
        weight is not None and weight.shape[1] == QFORMER_WIDTH
    )


def _section(file: WeightFile, name: str) -> Mapping[str, Any]:
    config = file.extra.get("config")
    section = config.get(name) if isinstance(config, dict) else None
    return section if isinstance(section, dict) else {}


def _describe_eva(file: WeightFile) -> list[Row]:
    positions = max(file.tensors["pos_embed"].shape[1] - 1, 0)
    patch = file.tensors["patch_embed.proj.weight"].shape[2]
    rows = [("image size", f"{round(positions**0.5) * patch} px (others are interpolated)")]
    if "norm.weight" in file.tensors:  # all of EVA-CLIP-g
        rows.append(("last block", "left out by BLIP-2 and MiniGPT-4: their depth is one less"))
    return rows


def _describe_minigpt4(file: WeightFile) -> list[Row]:
    lora = lora_of(file)
    variant = "with Q-Former" if has_qformer(file) else "without Q-Former, four patches become one token"
    rows = [("variant", "MiniGPT-v2 (LoRA), " * bool(lora) + variant)]
    if "llama_proj.weight" in file.tensors:
        outputs, inputs = file.tensors["llama_proj.weight"].shape
        known = f" (LLaMA or Vicuna {LANGUAGE_MODELS[outputs]})" if outputs in LANGUAGE_MODELS else ""
        rows += [("projection", f"{inputs} -> {outputs} channels"), ("language model", f"hidden size {outputs}{known}")]
    if lora:
        alpha = f"alpha {lora['alpha']}" if lora["alpha_is_written"] else f"alpha not in the file ({LORA_ALPHA} in v2)"
        rows.append(("LoRA", f"rank {lora['r']}, {alpha}, on {', '.join(lora['targets'])} in {lora['layers']} layers"))
    return rows


MINIGPT4 = Format(
    "MiniGPT-4",
    "model.checkpoint",
    ("llama_proj.*",),
    _MINIGPT4,
    always=("connector.linear.*", "language_model.*.lora_*"),
    together=("connector.qformer.*", "vision_encoder.vit.*", "vision_encoder.ln_vision.*"),
    sizes=(_RANK, *_QFORMER_SIZES, *_EVA_SIZES),
    ranks=_RANKS,
    explain=_explain_minigpt4,
    describe=_describe_minigpt4,
)
FORMATS = (
    MINIGPT4,
    Format(
        "BLIP-2's Q-Former",
        "model.connector.weights",
        ("query_tokens", "Qformer.bert.encoder.layer.#.*"),
        _BLIP2,
        always=("connector.query_tokens", "connector.qformer.*", "vision_encoder.ln_vision.*"),
        together=("vision_encoder.vit.*",),
        sizes=(*_QFORMER_SIZES, *_EVA_SIZES),
        ranks=_RANKS,
        base=True,
        explain=_explain_blip2,
    ),
    Format(
        "EVA-CLIP-g's vision encoder",
        "model.vision_encoder.weights",
        ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.#.attn.q_bias"),
        _EVA,
        always=("vision_encoder.vit.*",),
        initial=("vision_encoder.ln_vision.*",),
        sizes=_EVA_SIZES,
        ranks=_RANKS,
        base=True,
        explain=_explain_eva,
        describe=_describe_eva,
    ),
)
