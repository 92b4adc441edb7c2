"""The layout of Mini-Gemini (Li et al. 2024): a language model of transformers 4 with visual parts put into it."""

from __future__ import annotations

from minivlm.checkpoints.foreign import Rule

# --- language model ---------------------------------------------------------------------------------------------------

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
