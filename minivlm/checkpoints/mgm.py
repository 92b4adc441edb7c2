"""The layouts of Mini-Gemini (Li et al. 2024), later named MGM: a language model with visual parts put into it.

Whole models, files of the first stage, which hold the visual parts, and LoRA adapters with what trained beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from minivlm.checkpoints import llava
from minivlm.checkpoints.files import WeightFile
from minivlm.checkpoints.foreign import Format, Rule, Size, prefixed
from minivlm.models.vlm import PARTS, VisionLanguageModel

_MINING = {"query": "query", "aux": "key", "val": "value"}
VISUAL = (
    *llava.tower("vision_encoder.low.model."),
    Rule("vision_tower_aux.vision_stem.*", "vision_encoder.high.stem.*"),
    Rule("vision_tower_aux.vision_stages.*", "vision_encoder.high.stages.*"),
    *(Rule(f"vlm_uni_{theirs}_projector.*", f"connector.{ours}.*") for theirs, ours in _MINING.items()),
    *llava.projector("connector.projector."),
)
"""Both encoders, mining and projector: behind ``model.`` in a whole model, behind nothing or a prefix otherwise."""

_LM = "language_model.model."
EXPERTS = "model.layers.#.block_sparse_moe."
_OUR_EXPERTS = _LM + "model.layers.#.mlp."
LANGUAGE = (
    Rule("*.rotary_emb.inv_freq", why="buffers, which are computed anew"),
    Rule(EXPERTS + "gate.*", _OUR_EXPERTS + "gate.*"),
    Rule(EXPERTS + "experts.#.w1.weight", _OUR_EXPERTS + "experts.gate_up_proj", stacked=(0, 2)),
    Rule(EXPERTS + "experts.#.w3.weight", _OUR_EXPERTS + "experts.gate_up_proj", stacked=(1, 2)),
    Rule(EXPERTS + "experts.#.w2.weight", _OUR_EXPERTS + "experts.down_proj", stacked=(0, 1)),
    Rule("model.*", _LM + "model.*"),
    Rule("lm_head.*", _LM + "lm_head.*"),
)
"""Llama, Gemma, Mistral, Mixtral. ``model.*`` takes what is left, so the rules of visual parts stand in front."""

_RULES = (*prefixed("model.", VISUAL), *LANGUAGE)
_UNUSED_NORM = ("vision_encoder.low.model.post_layernorm.*",)
_SIZES = (
    Size("width of the language model", "model.language_model", "connector.projector.layers.2.weight", 0),
    Size("width of the low encoder", "model.vision_encoder.low", "connector.query.0.weight", 0),
    Size("width of the high encoder", "model.vision_encoder.high", "connector.key.0.weight", 0),
)
_CONFIG = ("image_size_aux", "mm_vision_tower_aux")
"""Without one of these in its ``config.json`` a folder is a plain LLaVA."""

_LANGUAGE_SIZES = ("num_hidden_layers", "intermediate_size", "num_local_experts")


def _another_language_model(file: WeightFile, model: VisionLanguageModel) -> str | None:
    """What ``config.json`` tells apart and no shape does: Vicuna-7B, LLaMA-3-8B and Mixtral are of one width."""
    named, own = file.extra.get("config"), getattr(getattr(model.language_model, "model", None), "config", None)
    if not isinstance(named, Mapping) or own is None or named.get("hidden_size") != own.hidden_size:
        return None  # shapes tell of another width
    pairs = {key: (named.get(key), getattr(own, key, None)) for key in _LANGUAGE_SIZES}
    apart = [f"{key} {theirs} against {ours}" for key, (theirs, ours) in pairs.items() if theirs != ours]
    if not apart:
        return None
    return (
        f"by its config.json it was trained with another language model ({', '.join(apart)}); take the one of its size "
        "(model.model_type), or, if it is to be so, name the file of weights in that folder instead of the folder"
    )


MGM = Format(
    "a model of Mini-Gemini",
    "model.checkpoint",
    ("model.vlm_uni_query_projector.*", "model.layers.#.*"),
    _RULES,
    always=(),
    together=tuple(f"{part}.*" for part in PARTS),
    wants=_CONFIG,
    initial=_UNUSED_NORM,
    sizes=(
        *_SIZES,
        Size(
            "layers of the language model",
            "model.language_model",
            "language_model.model.model.layers.#.self_attn.q_proj.weight",
            None,
        ),
        Size("embeddings", "model.language_model", "language_model.model.model.embed_tokens.weight", 0),
    ),
    base=True,
)
PROJECTOR = Format(
    "mining and projector of Mini-Gemini's first stage",
    "model.checkpoint",
    ("**vlm_uni_query_projector.*",),
    prefixed("**", VISUAL),
    always=("connector.*",),
    together=("vision_encoder.low.*", "vision_encoder.high.*"),
    wants=_CONFIG,
    repeats=("vision_encoder.*",),
    sizes=_SIZES,
    explain=_another_language_model,
)
BARE = Format(
    "a bare projector of Mini-Gemini",
    "model.checkpoint",
    ("0.weight", "0.bias", "2.weight"),
    (Rule("#.*", "connector.projector.layers.#.*"),),
    always=("connector.projector.*",),
    sizes=_SIZES[:1],
    explain=_another_language_model,
)
"""What the original takes for one: names without a prefix. Mining stays as it was."""
LORA = replace(
    llava.lora("LoRA in Mini-Gemini's layout", ("*lora_A.*", "*vlm_uni_*"), (*llava.ADAPTERS, *_RULES), _SIZES),
    wants=_CONFIG,
)
FORMATS = (MGM, LORA, PROJECTOR, BARE)
