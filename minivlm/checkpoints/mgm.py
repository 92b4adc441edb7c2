"""The layout of Mini-Gemini (Li et al. 2024), later named MGM: a language model with visual parts put into it."""

from __future__ import annotations

from minivlm.checkpoints import llava
from minivlm.checkpoints.foreign import Format, Rule, Size, prefixed

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
_MOE, _OUR_MOE = "model.layers.#.block_sparse_moe.", _LM + "model.layers.#.mlp."
LANGUAGE = (
    Rule("*.rotary_emb.inv_freq", why="buffers, which are computed anew"),
    Rule(_MOE + "gate.*", _OUR_MOE + "gate.*"),
    Rule(_MOE + "experts.#.w1.weight", _OUR_MOE + "experts.gate_up_proj", stacked=(0, 2)),
    Rule(_MOE + "experts.#.w3.weight", _OUR_MOE + "experts.gate_up_proj", stacked=(1, 2)),
    Rule(_MOE + "experts.#.w2.weight", _OUR_MOE + "experts.down_proj", stacked=(0, 1)),
    Rule("model.*", _LM + "model.*"),
    Rule("lm_head.*", _LM + "lm_head.*"),
)
"""Llama, Gemma, Mistral, Mixtral. ``model.*`` takes what is left, so the rules of visual parts stand in front."""

_RULES = (*prefixed("model.", VISUAL), *LANGUAGE)
_UNUSED_NORM = ("vision_encoder.low.model.post_layernorm.*",)
MGM = Format(
    "a model of Mini-Gemini",
    "model.checkpoint",
    ("model.vlm_uni_query_projector.*", "model.layers.#.*"),
    _RULES,
    always=(),
    initial=_UNUSED_NORM,
    sizes=(
        Size("width of the language model", "model.language_model", "connector.projector.layers.2.weight", 0),
        Size("width of the low encoder", "model.vision_encoder.low", "connector.query.0.weight", 0),
        Size("width of the high encoder", "model.vision_encoder.high", "connector.key.0.weight", 0),
    ),
    base=True,
)
PROJECTOR = Format(
    "mining and projector of Mini-Gemini's first stage",
    "model.checkpoint",
    ("**vlm_uni_query_projector.*",),
    prefixed("**", VISUAL),
    always=("connector.*",),
)
FORMATS = (MGM, PROJECTOR)
