"""The ``.pth`` files of MiniMind-V: a language model of its own names, and the projection in front of it.

The first version (October 2024) is a Llama whose rotary embeddings turn neighbouring rows, or with experts an
ERNIE-4.5-MoE, which turns them so itself. The newest (2026) has the names of Qwen3 and Qwen3-MoE, each expert apart.
The vision encoder is in none of these files.
"""

from __future__ import annotations

from minivlm.checkpoints.files import WeightFile
from minivlm.checkpoints.foreign import Format, Rule, Size, prefixed
from minivlm.models.vlm import VisionLanguageModel

_COMPILED = "_orig_mod."
"""What torch.compile puts in front of every name."""
_LM = "language_model.model."
_LAYER, _OURS = "layers.#.", _LM + "model.layers.#."

_BUFFERS = (
    Rule("**mask**", why="buffers, which are computed anew"),
    Rule("**vision_encoder.*", why="of the vision encoder, which model.vision_encoder names"),
)
_PROJECTION = (
    Rule("vision_proj.vision_proj.0.*", "connector.linear.*"),
    Rule("vision_proj.mlp.#.*", "connector.layers.#.*"),
)
_V1 = (
    Rule("tok_embeddings.*", _LM + "model.embed_tokens.*"),
    Rule("output.*", _LM + "lm_head.*"),
    Rule("norm.*", _LM + "model.norm.*"),
    Rule(_LAYER + "attention_norm.*", _OURS + "input_layernorm.*"),
    Rule(_LAYER + "ffn_norm.*", _OURS + "post_attention_layernorm.*"),
    Rule(_LAYER + "attention.wv.*", _OURS + "self_attn.v_proj.*"),
    Rule(_LAYER + "attention.wo.*", _OURS + "self_attn.o_proj.*"),
)
_V1_DENSE = (
    *_V1,
    *(Rule(f"{_LAYER}attention.w{x}.*", f"{_OURS}self_attn.{x}_proj.*", interleaved=True) for x in "qk"),
    Rule(_LAYER + "feed_forward.w1.*", _OURS + "mlp.gate_proj.*"),
    Rule(_LAYER + "feed_forward.w2.*", _OURS + "mlp.down_proj.*"),
    Rule(_LAYER + "feed_forward.w3.*", _OURS + "mlp.up_proj.*"),
)
_V1_MOE = (
    *_V1,
    *(Rule(f"{_LAYER}attention.w{x}.*", f"{_OURS}self_attn.{x}_proj.*") for x in "qk"),
    Rule(_LAYER + "feed_forward.gate.*", _OURS + "mlp.gate.*"),
    Rule(_LAYER + "feed_forward.shared_experts.w1.*", _OURS + "mlp.shared_experts.gate_proj.*"),
    Rule(_LAYER + "feed_forward.shared_experts.w2.*", _OURS + "mlp.shared_experts.down_proj.*"),
    Rule(_LAYER + "feed_forward.shared_experts.w3.*", _OURS + "mlp.shared_experts.up_proj.*"),
    Rule(_LAYER + "feed_forward.experts.#.w1.weight", _OURS + "mlp.experts.gate_up_proj", stacked=(0, 2)),
    Rule(_LAYER + "feed_forward.experts.#.w3.weight", _OURS + "mlp.experts.gate_up_proj", stacked=(1, 2)),
    Rule(_LAYER + "feed_forward.experts.#.w2.weight", _OURS + "mlp.experts.down_proj", stacked=(0, 1)),
)
_EXPERT = "model.layers.#.mlp.experts.#."
_V3 = (
    Rule(_EXPERT + "gate_proj.weight", _OURS + "mlp.experts.gate_up_proj", stacked=(0, 2)),
    Rule(_EXPERT + "up_proj.weight", _OURS + "mlp.experts.gate_up_proj", stacked=(1, 2)),
    Rule(_EXPERT + "down_proj.weight", _OURS + "mlp.experts.down_proj", stacked=(0, 1)),
    Rule("model.layers.#.mlp.moe_statics.*", _OURS + "mlp.gate.moe_statics.*"),  # ERNIE in the names of transformers
    Rule("model.*", _LM + "model.*"),
    Rule("lm_head.*", _LM + "lm_head.*"),
)

_CONFIG = "model.language_model.config."
_LANGUAGE_SIZES = (
    Size("width of the language model", _CONFIG + "hidden_size", _OURS + "input_layernorm.weight", 0),
    Size("layers of the language model", _CONFIG + "num_hidden_layers", _OURS + "input_layernorm.weight", None),
    Size("embeddings", _CONFIG + "vocab_size", _LM + "model.embed_tokens.weight", 0),
    Size("embeddings", _CONFIG + "vocab_size", _LM + "lm_head.weight", 0),
    Size("width inside the MLPs", _CONFIG + "intermediate_size", _OURS + "mlp.gate_proj.weight", 0),
    Size("rows of the keys", _CONFIG + "num_key_value_heads", _OURS + "self_attn.k_proj.weight", 0),
    Size("experts", _CONFIG + "num_experts", _OURS + "mlp.gate.weight", 0),
)
_VISION_SIZES = (
    Size("width of the vision encoder", "model.vision_encoder", "connector.linear.weight", 1),
    Size("width of the vision encoder", "model.vision_encoder", "connector.layers.0.weight", 0),
)
_KINDS = {
    "llama": "v1 or v1_small",
    "ernie4_5_moe": "v1_moe or v1_small_moe",
    "qwen3": "v3",
    "qwen3_moe": "v3_moe",
}
"""Types of language models, and of the packaged models of the architecture ``minimind_v`` that have them."""


def kind_of(file: WeightFile) -> str:
    """The type of transformers' language model that computes what a file's does."""
    is_v3 = any("model.layers." in name for name in file.tensors)
    if any(".experts." in name for name in file.tensors):
        is_qwen = is_v3 and not any("moe_statics" in name for name in file.tensors)
        return "qwen3_moe" if is_qwen else "ernie4_5_moe"
    if is_v3:
        return "qwen3" if any("q_norm" in name for name in file.tensors) else "llama"
    return "llama"


def _explain(file: WeightFile, model: VisionLanguageModel) -> str | None:
    config = getattr(getattr(model.language_model, "model", None), "config", None)
    own, kind = getattr(config, "model_type", None), kind_of(file)
    if own == kind or own not in _KINDS:
        return None
    preset = f"arch minimind_v, model_type {_KINDS[kind]}"
    if kind == "llama" and any("self_attn" in name for name in file.tensors):
        preset = "as MiniMind2 of 2025, rope_theta 1e6, of which there is no packaged model"
    return (
        f"its language model is of the type {kind} ({preset}), that of this model is "
        f"{own} (model.language_model.config.model_type)"
    )


def _whole(name: str, signature: tuple[str, ...], rules: tuple[Rule, ...]) -> Format:
    rules = (*_PROJECTION, *rules)
    return Format(
        f"MiniMind-V, {name}",
        "model.checkpoint",
        (*signature, "**vision_proj.*"),
        (*_BUFFERS, *rules, *prefixed(_COMPILED, rules)),
        always=("connector.*", "language_model.*"),
        initial=("*.e_score_correction_bias",),
        sizes=(*_LANGUAGE_SIZES, *_VISION_SIZES),
        base=True,
        explain=_explain,
    )


def _language(name: str, signature: tuple[str, ...], rules: tuple[Rule, ...]) -> Format:
    return Format(
        f"a language model of MiniMind, {name}",
        "model.language_model.weights",
        signature,
        (*_BUFFERS, *rules, *prefixed(_COMPILED, rules)),
        always=("language_model.*",),
        initial=("*.e_score_correction_bias",),
        sizes=_LANGUAGE_SIZES,
        base=True,
        explain=_explain,
    )


_OF_V1, _OF_V1_MOE = ("**layers.#.feed_forward.w1.weight",), ("**layers.#.feed_forward.experts.#.w1.weight",)
_ENDS = ("**model.embed_tokens.weight", "**model.norm.weight")
"""Both are in a file of a whole language model, and never in one of several shards."""
_OF_V3 = ("**model.layers.#.self_attn.q_proj.weight",)
V1, V1_MOE = _whole("first version", _OF_V1, _V1_DENSE), _whole("first version with experts", _OF_V1_MOE, _V1_MOE)
V3 = _whole("newest version", _OF_V3, _V3)
V1_LM = _language("first version", _OF_V1, _V1_DENSE)
V1_MOE_LM = _language("first version with experts", _OF_V1_MOE, _V1_MOE)
V3_LM = _language("newest version, or another one in the names of transformers", (*_OF_V3, *_ENDS), _V3)
FORMATS = (V1, V1_MOE, V3, V1_LM, V1_MOE_LM, V3_LM)
