"""``LlavaForConditionalGeneration`` of transformers: its names, and its ``config.json`` in our words.

Published folders (``llava-hf``) and those that transformers 5 writes begin the names with ``language_model.model.``,
``vision_tower.`` and ``multi_modal_projector.``; in memory, and in files in between, ``model.`` stands in front.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from minivlm.checkpoints.files import WeightFile
from minivlm.checkpoints.foreign import Format, Rule, Size
from minivlm.checkpoints.report import CheckpointError
from minivlm.models.vlm import PARTS, VisionLanguageModel

_BUFFER = "buffers, which are computed anew"
_UNUSED = "of layers behind the one that is used"
_HEAD = "of the pooling head, which is not used"
_PROJECTOR = "multi_modal_projector.linear_"
_FUSED = f"{_PROJECTOR}1_2"


def _vision(prefix: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{prefix}embeddings.position_ids", why=_BUFFER),
        Rule(f"{prefix}head.*", why=_HEAD),
        Rule(f"{prefix}encoder.layers.#.*", "vision_encoder.model.encoder.layers.#.*", _UNUSED),
        Rule(f"{prefix}*", "vision_encoder.model.*"),
    )


def _experts(prefix: str) -> tuple[Rule, ...]:
    """Each apart, as files have them; in memory transformers holds those of a layer in one tensor."""
    mlp, ours = f"{prefix}layers.#.mlp.", "language_model.model.model.layers.#.mlp."
    return (
        Rule(f"{mlp}experts.#.gate_proj.weight", f"{ours}experts.gate_up_proj", stacked=(0, 2)),
        Rule(f"{mlp}experts.#.up_proj.weight", f"{ours}experts.gate_up_proj", stacked=(1, 2)),
        Rule(f"{mlp}experts.#.down_proj.weight", f"{ours}experts.down_proj", stacked=(0, 1)),
        Rule(f"{mlp}moe_statics.*", f"{ours}gate.moe_statics.*"),
    )


_RULES = (
    *(
        rule
        for prefix in ("model.vision_tower.vision_model.", "model.vision_tower.")
        for rule in _vision(prefix) + _vision(prefix.removeprefix("model."))
    ),
    *(
        Rule(f"{prefix}multi_modal_projector.linear_{number}.*", f"connector.layers.{layer}.*")
        for prefix in ("model.", "")
        for number, layer in ((1, 0), (2, 2))
    ),
    *(Rule(f"{prefix}{_FUSED}.*", "connector.linear.*") for prefix in ("model.", "")),
    *(rule for prefix in ("model.language_model.", "language_model.model.") for rule in _experts(prefix)),
    Rule("model.language_model.*.inv_freq", why=_BUFFER),
    Rule("language_model.*.inv_freq", why=_BUFFER),
    Rule("model.language_model.*", "language_model.model.model.*"),
    Rule("language_model.model.*", "language_model.model.model.*"),
    Rule("language_model.lm_head.*", "language_model.model.lm_head.*"),
    Rule("lm_head.*", "language_model.model.lm_head.*"),
)
_HIDDEN = "model.language_model.config.hidden_size"
_VISION_SIZE = "model.vision_encoder.config.hidden_size"
_SIZES = (
    Size("width of the vision encoder", _VISION_SIZE, "connector.layers.0.weight", 1),
    Size("width of the vision encoder", _VISION_SIZE, "connector.linear.weight", 1),
    Size("width of the language model", _HIDDEN, "language_model.model.model.embed_tokens.weight", 1),
    Size("width of the language model", _HIDDEN, "connector.linear.weight", 0),
    Size("embeddings", "model.language_model.vocab_size", "language_model.model.model.embed_tokens.weight", 0),
    Size(
        "layers of the language model",
        "model.language_model.config.num_hidden_layers",
        "language_model.model.model.layers.#.input_layernorm.weight",
        None,
    ),
)


def _prepare(file: WeightFile) -> Mapping[str, Tensor]:
    """Two layers with nothing between them are one; if the second is the identity, it is the first to the bit."""
    config = file.extra.get("config")
    if not isinstance(config, Mapping) or config.get("projector_hidden_act") != "linear":
        return file.tensors
    kept = {name: tensor for name, tensor in file.tensors.items() if _PROJECTOR not in name}
    start = next(name for name in file.tensors if _PROJECTOR in name).partition(_PROJECTOR)[0]
    layers = [{n: file.tensors.get(f"{start}{_PROJECTOR}{k}.{n}") for n in ("weight", "bias")} for k in (1, 2)]
    (first, inner), (second, outer) = (each.values() for each in layers)
    assert first is not None and second is not None  # by which the format is recognised
    if second.dim() != 2 or first.dim() != 2 or second.shape[1] != first.shape[0]:
        return file.tensors  # which fit no model
    kept[f"{start}{_FUSED}.weight"] = second @ first
    if inner is not None and outer is not None:
        kept[f"{start}{_FUSED}.bias"] = second @ inner + outer
    return kept


def _explain(file: WeightFile, model: VisionLanguageModel) -> str | None:
    language: Any = getattr(model.language_model, "model", None)
    tied = bool(getattr(getattr(language, "config", None), "tie_word_embeddings", False))
    if language is not None and not tied and not any(name.endswith("lm_head.weight") for name in file.tensors):
        return "it lacks the output head (lm_head.weight), and tie_word_embeddings of the language model is not set"
    if (scale := model.language_model.embed_scale) != 1.0:
        return f"its visual tokens are not multiplied by {scale:g}; set model.language_model.scale_visual: false"
    return None


LLAVA_HF = Format(
    "LLaVA of transformers",
    "model.checkpoint",
    ("*_projector.linear_1.weight", "*_projector.linear_2.weight"),
    _RULES,
    always=(),
    together=tuple(f"{part}.*" for part in PARTS),
    initial=("vision_encoder.model.post_layernorm.*",),
    base=True,
    sizes=_SIZES,
    prepare=_prepare,
    ranks={"linear_1.weight": 2, "linear_2.weight": 2, "embed_tokens.weight": 2},
    explain=_explain,
)
FORMATS = (LLAVA_HF,)

VISION_TYPES = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Vision models that LLaVA and we read alike, and how many tokens each puts in front of the patches."""
_NO_SIZES = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")
_DTYPES = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}
_CONFIG = "model.checkpoint: config.json of LLaVA"


def describe_config(config: Mapping[str, Any], image: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Section ``model`` (without ``checkpoint``) for a ``config.json`` of LLaVA.

    ``image`` are the settings of its picture processor: ``preprocessor_config.json``, or ``image_processor`` of
    ``processor_config.json``. The template, of which ``config.json`` says nothing, is that of LLaVA-1.5. Raises
    :class:`CheckpointError` for what our parts do not do, such as features of several layers.
    """
    from transformers import LlavaConfig

    try:
        llava = LlavaConfig.from_dict(dict(config))
    except Exception as error:  # its strict classes raise errors of many kinds
        raise CheckpointError(f"{_CONFIG} cannot be read: {' '.join(str(error).split())}") from error
    layer = llava.vision_feature_layer
    wrong = [] if isinstance(layer, int) else [f"vision_feature_layer {layer}: one layer is taken here"]
    is_linear = llava.projector_hidden_act == "linear"
    if llava.projector_hidden_act not in ("gelu", "linear"):
        wrong.append(f"projector_hidden_act {llava.projector_hidden_act}: connector mlp has gelu, linear has none")
    if not llava.multimodal_projector_bias and not is_linear:
        wrong.append("multimodal_projector_bias false: connector mlp has biases")
    kind = llava.vision_config.model_type
    if kind not in VISION_TYPES:
        wrong.append(f"vision_config.model_type {kind}: {' and '.join(VISION_TYPES)} are known")
    if wrong:
        raise CheckpointError(f"{_CONFIG}: {'; '.join(wrong)}")
    keeps = llava.vision_feature_select_strategy == "full" and VISION_TYPES[kind]
    linear = {"name": "linear", "bias": bool(llava.multimodal_projector_bias)}
    language = {"name": "hf", "config": _settings(llava.text_config)}
    dtype = _DTYPES.get(str(llava.dtype)) or _DTYPES.get(str(llava.text_config.dtype))
    section: dict[str, Any] = {
        "vision_encoder": {
            "name": "hf",
            "config": _settings(llava.vision_config),
            "layer": layer,
            "class_token": "keep" if keeps else "drop",
        },
        "connector": linear if is_linear else {"name": "mlp", "depth": 2},
        "language_model": language | ({"dtype": dtype} if dtype else {}),
        "template": "vicuna_v1",
    }
    if image is not None:
        from minivlm.models.vision.hf import picture_settings

        section["processor"] = {"name": "vlm", "image": {"name": "image", **picture_settings(image)}}
    return section


def _settings(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.to_diff_dict().items() if key not in _NO_SIZES}
