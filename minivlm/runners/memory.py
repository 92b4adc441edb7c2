"""How much memory a model takes, to train it and to talk to it: counted from its shapes, also on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import nn

from minivlm.config.experiment import StageConfig
from minivlm.io import readable_size
from minivlm.models.lora import file_name
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.processor import VLMProcessor

GIB = 2**30

BYTES_PER_WEIGHT = {
    "int8": 1.0,
    # half a byte, a byte of scale for 64 weights, and fp32 for 256 of those (Dettmers et al. 2023, section 3)
    "nf4": 0.5 + 1 / 64 + 4 / (64 * 256),
}
CUDA_CONTEXT = 0.5 * GIB
"""Driver, CUDA's context and the kernels that are loaded when they are first used: 0.3 to 0.6 GiB a process, by GPU
and version, of which no allocator knows. Versions before CUDA 11.7 loaded all kernels at once, more than 1 GiB."""


@dataclass(frozen=True)
class Use:
    """One line of an estimate: ``count`` numbers of a part, kept in the type ``stored``."""

    part: str
    stored: str
    bytes: float
    count: int = 0


def weight_uses(model: VisionLanguageModel, quantization: str | None = None, *, cached: bool = False) -> list[Use]:
    """Weights by part and storage type.

    ``quantization`` (int8, nf4) counts the linear layers of the language model as bitsandbytes keeps them, all
    but the output head and adapters, and the rest of it in half precision. With ``cached``, what computes the
    features is left out, since a feature cache replaces it.
    """
    left_out: tuple[str, ...] = ()
    if cached and model.is_frozen("vision_encoder"):
        front = model.connector.front_state() if model.has_frozen_front else {}
        left_out = ("vision_encoder.", *(f"connector.{name}" for name in front))
    adapters = model.language_model.adapter_parameters
    quantised = _linear_weights(model.language_model) - adapters if quantization else set()
    found: dict[tuple[str, str], tuple[int, float]] = {}
    for full_name, parameter in model.named_parameters():
        part, _, name = full_name.partition(".")
        if file_name(full_name).startswith(left_out):
            continue
        stored, size = str(parameter.dtype).removeprefix("torch."), float(parameter.element_size())
        if quantization and part == "language_model" and name not in adapters:
            if name in quantised:
                stored, size = quantization, BYTES_PER_WEIGHT[quantization]
                if quantization == "int8":
                    size += 4 / parameter.shape[1]  # a scale for every row
            elif parameter.dtype == torch.float32:
                stored, size = "float16", 2.0
        count, total = found.get((part, stored), (0, 0.0))
        found[part, stored] = count + parameter.numel(), total + size * parameter.numel()
    return [Use(part, stored, total, count) for (part, stored), (count, total) in found.items()]


def _linear_weights(language_model: Any) -> set[str]:
    head = {id(module) for module in language_model.output_head.modules()}  # alone, or below its adapter
    named = language_model.named_modules()
    return {f"{name}.weight" for name, module in named if isinstance(module, nn.Linear) and id(module) not in head}


@dataclass(frozen=True)
class Sizes:
    """What the estimates ask of a language model; of one that is no model of transformers, little is known."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_width: int
    """Channels of the keys of one layer, which are those of the values."""
    positions: int | None
    eager: bool

    @classmethod
    def of(cls, model: VisionLanguageModel) -> Sizes:
        """Read from the configuration of transformers."""
        hidden = model.language_model.hidden_size
        config: Any = getattr(getattr(model.language_model, "model", None), "config", None)
        config = config.get_text_config() if config is not None else None
        heads = getattr(config, "num_attention_heads", 1)
        head_width = getattr(config, "head_dim", None) or hidden // heads
        return cls(
            hidden=hidden,
            intermediate=getattr(config, "intermediate_size", 4 * hidden),
            layers=getattr(config, "num_hidden_layers", 1),
            heads=heads,
            kv_width=head_width * (getattr(config, "num_key_value_heads", None) or heads),
            positions=getattr(config, "max_position_embeddings", None),
            eager=getattr(config, "_attn_implementation", None) == "eager",
        )


def kv_bytes(sizes: Sizes, tokens: int, width: int = 2) -> int:
    """Bytes of the keys and values of all layers, ``width`` bytes a number."""
    return 2 * sizes.layers * sizes.kv_width * tokens * width


def inference_uses(
    model: VisionLanguageModel, *, context: int, beams: int = 1, quantization: str | None = None
) -> list[Use]:
    """Bytes by use of a chat whose context has grown to ``context`` tokens, on a CUDA device.

    Activations are those of the largest moment of one forward pass: two hidden states and the three inner
    products of the gated MLP of one layer (eager attention: also its scores in fp32 and their copy).
    """
    sizes = Sizes.of(model)
    weights = weight_uses(model, quantization)
    kinds = {use.stored for use in weights if use.part == "language_model" and use.stored not in BYTES_PER_WEIGHT}
    half = bool(quantization) or bool(kinds & {"float16", "bfloat16"})
    width, stored = (2, "half") if half else (4, "float32")
    tokens = context * beams
    activations = tokens * (2 * sizes.hidden + 3 * sizes.intermediate) * width
    if sizes.eager:
        activations += beams * sizes.heads * context**2 * (4 + width)
    return [
        *weights,
        Use(f"keys and values, {context:,} tokens x {beams}", stored, kv_bytes(sizes, tokens, width)),
        Use("activations of one forward", stored, activations),
        Use("CUDA context and kernels", "", CUDA_CONTEXT),
    ]


def training_uses(
    model: VisionLanguageModel,
    *,
    tokens: int,
    half: bool,
    pictures: int = 0,
    checkpointing: bool = False,
    quantization: str | None = None,
    cached: bool = False,
) -> dict[str, float]:
    """Bytes by use for one process: weights, gradients, AdamW's two moments, activations.

    Activations follow Korthikanti et al. 2022 (about 34 bytes a token, layer and channel in half precision; with
    checkpointing 2, and 34 of the one layer that is computed again) and hold the logits of a quarter of the positions,
    and the features of ``pictures``, which the connector keeps: 1 GiB for one of Mini-Gemini-HD. Those inside of an
    encoder are not counted.
    """
    sizes = Sizes.of(model)
    trainable = sum(float(p.numel() * p.element_size()) for p in model.parameters() if p.requires_grad)
    per_token = (2 * sizes.layers + 34 if checkpointing else 34 * sizes.layers) * (1.0 if half else 2.0)
    features, channels = model.feature_shape
    features *= pictures * channels * (2 if half else 4)
    return {
        "weights": sum(use.bytes for use in weight_uses(model, quantization, cached=cached)),
        "gradients": trainable,
        "optimiser": 2 * trainable,
        "activations": tokens * sizes.hidden * per_token + tokens / 4 * model.language_model.vocab_size * 8 + features,
    }


def training_table(stage: StageConfig, model: VisionLanguageModel, precision: str, length: int) -> Table:
    """The memory of a training step with samples of ``length`` tokens, for one sample and the micro batch."""
    settings = stage.model.language_model and stage.model.language_model.config
    table = Table("micro batch", "weights", "gradients", "optimiser", "activations", "total", title="memory, estimated")
    for batch in sorted({1, stage.run.batch_size_train}):
        uses = training_uses(
            model,
            tokens=batch * length,
            pictures=batch,
            half=precision != "fp32",
            checkpointing=bool(getattr(settings, "gradient_checkpointing", False)),
            quantization=getattr(settings, "quantization", None),
            cached=stage.run.feature_cache is not None,
        )
        table.add_row(str(batch), *(readable_size(v) for v in uses.values()), readable_size(sum(uses.values())))
    if not model.vision_encoder.inputs:
        table.caption = f"samples of {length} tokens, {precision}"
        return table
    table.caption = f"samples of {length} tokens, one picture each, {precision}; an encoder's activations "
    table.caption += "are not kept" if model.is_frozen("vision_encoder") else "are not counted, although it trains"
    if stage.run.feature_cache is not None:
        table.caption += "; with run.feature_cache its weights are not needed either"
    return table


def inference_table(stage: StageConfig, model: VisionLanguageModel, processor: VLMProcessor) -> Table:
    """The memory of a chat that has filled the context."""
    settings = stage.model.language_model and stage.model.language_model.config
    uses = inference_uses(
        model,
        context=min(processor.config.max_length, Sizes.of(model).positions or processor.config.max_length),
        beams=stage.run.num_beams,
        quantization=getattr(settings, "quantization", None),
    )
    table = Table("to talk to it, on a GPU", "stored as", "memory", title="memory of inference, estimated")
    for use in uses:
        table.add_row(use.part, use.stored, readable_size(use.bytes))
    table.add_row("total", "", readable_size(sum(use.bytes for use in uses)))
    return table
