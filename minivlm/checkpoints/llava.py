"""The layouts of LLaVA and its kin: whole models, projectors, LoRA adapters with what trained beside them.

A model of this family is one of transformers' language models with ``mm_projector`` and ``vision_tower`` put into
it (LLaVA, Liu et al. 2023; LLaVA-1.5, Liu et al. 2024). Imp has two layouts: that one, and an older one with Phi-2
as it was first published, its attention fused in ``Wqkv``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from minivlm.checkpoints.files import WeightFile
from minivlm.checkpoints.foreign import Format, Row, Rule, Size, prefixed
from minivlm.models.lora import other_alpha
from minivlm.models.vlm import PARTS, VisionLanguageModel

_LM = "language_model.model."
_BUFFER = "buffers, which are computed anew"
UNUSED_LAYERS = "of layers that are not used"


def tower(ours: str) -> tuple[Rule, ...]:
    """CLIP or SigLIP of transformers, which is ours below a prefix."""
    theirs = "vision_tower.vision_tower.vision_model."
    return (
        Rule(theirs + "head.*", why="of the pooling head, which is not used"),
        Rule(theirs + "embeddings.position_ids", why=_BUFFER),
        Rule(theirs + "*.#.*", ours + "*.#.*", UNUSED_LAYERS),
        Rule(theirs + "*", ours + "*"),
    )


def projector(ours: str) -> tuple[Rule, ...]:
    """Connector ``mlp`` or ``linear``, which is ours below a prefix."""
    return (Rule("mm_projector.#.*", ours + "layers.#.*"), Rule("mm_projector.*", ours + "linear.*"))


_SECOND = tuple(
    Rule(name, why="of a second encoder, which config.json does not name")
    for name in ("vision_tower_aux.*", "vlm_uni_*")
)
"""Mini-Gemini, which such a folder makes a plain LLaVA."""
_VISUAL = (*tower("vision_encoder.model."), *projector("connector."), *_SECOND)

_LLAVA = (
    Rule("*.rotary_emb.inv_freq", why=_BUFFER),
    *prefixed("model.", _VISUAL),
    Rule("model.*", _LM + "model.*"),
    Rule("lm_head.*", _LM + "lm_head.*"),
)

_BLOCK, _OUR_BLOCK = "transformer.h.#.", _LM + "model.layers.#."
_QKV = tuple(f"{_OUR_BLOCK}self_attn.{name}_proj." for name in "qkv")
_LINEAR = {
    "mixer.out_proj.": "self_attn.dense.",
    "mlp.fc1.": "mlp.fc1.",
    "mlp.fc2.": "mlp.fc2.",
}
_FUSED = (
    *prefixed("transformer.", _VISUAL),
    Rule("transformer.embd.wte.*", _LM + "model.embed_tokens.*"),
    Rule(_BLOCK + "ln.*", _OUR_BLOCK + "input_layernorm.*"),
    Rule(_BLOCK + "mixer.Wqkv.*", tuple(name + "*" for name in _QKV)),
    *(Rule(f"{_BLOCK}{theirs}*", f"{_OUR_BLOCK}{ours}*") for theirs, ours in _LINEAR.items()),
    Rule("transformer.h.#.mixer.rotary_emb.*", why=_BUFFER),
    Rule("lm_head.ln.*", _LM + "model.final_layernorm.*"),
    Rule("lm_head.linear.*", _LM + "lm_head.*"),
)


def adapters(theirs: str, ours: tuple[str, ...]) -> tuple[Rule, ...]:
    """The two matrices of an adapter, in the spelling that is written and in the one with the adapter's name."""
    return tuple(
        Rule(
            f"{theirs}lora_{ab}{adapter}.weight",
            tuple(f"{name}lora_{ab}.default.weight" for name in ours),
            copied=ab == "A" and len(ours) > 1,
        )
        for adapter in ("", ".default")
        for ab in "AB"
    )


PEFT = "base_model.model."
ADAPTERS = (*adapters("model.*.", (_LM + "model.*.",)), *adapters("lm_head.", (_LM + "lm_head.",)))
"""Adapters on language models whose names are those of transformers."""
_LLAVA_LORA = (*ADAPTERS, *_LLAVA)
_FUSED_LORA = (
    *adapters(_BLOCK + "mixer.Wqkv.", _QKV),
    *(rule for theirs, ours in _LINEAR.items() for rule in adapters(_BLOCK + theirs, (_OUR_BLOCK + ours,))),
    *adapters("lm_head.linear.", (_LM + "lm_head.",)),
    *_FUSED,
)

_LANGUAGE = "model.language_model.config."
_MODEL_SIZES = (
    Size("width of the language model", _LANGUAGE + "hidden_size", _LM + "model.embed_tokens.weight", 1),
    Size("layers of the language model", _LANGUAGE + "num_hidden_layers", _LM + "model.layers.#.mlp.fc1.weight", None),
    Size(
        "layers of the language model", _LANGUAGE + "num_hidden_layers", _LM + "model.layers.#.mlp.up_proj.weight", None
    ),
    Size("embeddings", _LANGUAGE + "vocab_size", _LM + "model.embed_tokens.weight", 0),
)
_VISION_SIZES = (
    Size("width of the vision encoder", "model.vision_encoder", "connector.layers.0.weight", 1),
    Size("width of the language model", "model.language_model", "connector.layers.2.weight", 0),
)
_RANK = Size("rank of LoRA", "model.language_model.lora.r", "language_model.*.lora_A.default.weight", 0)
_UNUSED_NORM = ("vision_encoder.model.post_layernorm.*",)


def _describe_lora(file: WeightFile) -> list[Row]:
    settings = file.extra.get("adapter")
    if not isinstance(settings, dict):
        return []
    targets = settings.get("target_modules")
    named = ", ".join(sorted(map(str, targets))) if isinstance(targets, list) else str(targets)
    rows = [("LoRA", f"rank {settings.get('r')}, alpha {settings.get('lora_alpha')}, on {named}")]
    base = settings.get("base_model_name_or_path")
    return [*rows, ("base", str(base))] if base else rows


def lora_alpha(adapter: Mapping[str, Any]) -> Any:
    """Our alpha for settings of peft; rank-stabilised LoRA (Kalajdzievski 2023) scales by alpha / sqrt(r)."""
    alpha, rank = adapter.get("lora_alpha"), adapter.get("r")
    if adapter.get("use_rslora") and isinstance(alpha, (int, float)) and isinstance(rank, int):
        return alpha * math.sqrt(rank)
    return alpha


def _other_lora(file: WeightFile, model: VisionLanguageModel) -> str | None:
    adapter = file.extra.get("adapter") or {}
    if adapter.get("alpha_pattern"):
        return "its layers have different alphas (alpha_pattern), which have no place here"
    reason = other_alpha(model.language_model.lora, lora_alpha(adapter))
    return f"{reason} (model.language_model.lora.alpha)" if reason else None


def _whole(name: str, signature: tuple[str, ...], rules: tuple[Rule, ...]) -> Format:
    return Format(
        name,
        "model.checkpoint",
        signature,
        rules,
        always=(),
        together=tuple(f"{part}.*" for part in PARTS),
        initial=_UNUSED_NORM,
        sizes=(*_MODEL_SIZES, *_VISION_SIZES),
        base=True,
    )


def lora(
    name: str, signature: tuple[str, ...], rules: tuple[Rule, ...], sizes: tuple[Size, ...] = _VISION_SIZES
) -> Format:
    """Adapters of peft with what trained beside them; ``rules`` for the names behind those of peft."""
    return Format(
        name,
        "model.checkpoint",
        tuple(PEFT + pattern for pattern in signature),
        prefixed(PEFT, rules),
        always=("language_model.*.lora_*",),
        together=("connector.*",),
        sizes=(_RANK, *sizes),
        explain=_other_lora,
        describe=_describe_lora,
    )


FUSED = _whole("Phi-2 in its first layout", ("transformer.h.#.mixer.Wqkv.weight",), _FUSED)
LLAVA = _whole("a model of LLaVA's layout", ("model.layers.#.*", "*mm_projector.*"), _LLAVA)
FUSED_LORA = lora("LoRA on Phi-2 in its first layout", ("transformer.h.#.*lora_A.*",), _FUSED_LORA)
LLAVA_LORA = lora("LoRA in LLaVA's layout", ("*lora_A.*",), _LLAVA_LORA)
PROJECTOR = Format(
    "a projector of LLaVA's first stage",
    "model.connector.weights",
    ("**mm_projector.*",),
    prefixed("**", (*projector("connector."), *_SECOND)),
    always=("connector.*",),
    sizes=_VISION_SIZES,
)
FORMATS = (FUSED_LORA, LLAVA_LORA, FUSED, LLAVA, PROJECTOR)
