"""Sub-models as one: base, encoder, connector and adapters in a folder that needs no other.

Adapters are folded into their weights part by part and in place. A probe before and after, text and a picture drawn
with a fixed seed, shows that the model still says the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minivlm.checkpoints.native import Manifest, save_model
from minivlm.checkpoints.report import CheckpointError
from minivlm.config.experiment import ModelConfig
from minivlm.models.base import DTYPES
from minivlm.models.hub import hash_tensors
from minivlm.models.lora import merge_lora
from minivlm.models.vlm import PARTS, VisionLanguageModel
from minivlm.processors.processor import VLMProcessor
from minivlm.types import IMAGE_TOKEN_ID, Batch

TOLERANCE = 1e-3
"""The largest difference of logits in fp32 that merging may make."""
_WORDS = 16


@dataclass
class Merged:
    """``layers``: how many adapters were folded in, by part. ``difference``: the largest of the probe's logits.

    ``encoder``: hash of the vision encoder before and after.
    """

    layers: dict[str, int]
    difference: float
    encoder: tuple[str, str]

    def __str__(self) -> str:
        found = ", ".join(f"{count} of {part}" for part, count in self.layers.items() if count)
        before, after = (text.rpartition(":")[2][:12] for text in self.encoder)
        state = "unchanged" if before == after else f"{after} after the merge of its adapters"
        return (
            f"adapters folded in: {found or 'none, the model has no adapters'}\n"
            f"largest difference of the probe's logits, in fp32: {self.difference:.2g}\n"
            f"vision encoder: {before} {state}"
        )


def merge_model(
    model: VisionLanguageModel,
    config: ModelConfig,
    processor: VLMProcessor,
    target: Path,
    dtype: str | None = None,
) -> Merged:
    """Fold all adapters in and write a self-contained model folder.

    It is computed in fp32, which takes four bytes a parameter, and stored in ``dtype`` (fp32, bf16, fp16) or as it
    was. ``config`` becomes that of the folder. Raises :class:`CheckpointError` if the logits change by more than
    ``TOLERANCE``, and for an encoder whose weights are out of reach; then nothing is written.
    """
    if not model.vision_encoder.can_train:
        raise CheckpointError("model.vision_encoder: its weights are out of reach, so that no folder can hold them")
    stored = {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    model.float().eval()
    before, encoder = probe(model, processor), _hash(model)
    trained = set(model.trained_before)
    layers = {}
    for part in PARTS:
        merged = merge_lora(part, getattr(model, part))
        layers[part] = len(merged)
        trained.update(f"{part}.{path}.weight" for path in merged)
    report = Merged(layers, _difference(before, probe(model, processor)), (encoder, _hash(model)))
    if not report.difference <= TOLERANCE:
        raise CheckpointError(f"the merged model differs from what it was made of, so nothing is written:\n{report}")
    state = model.state_dict(keep_vars=True)  # without adapters
    for name in stored.keys() & state.keys():
        state[name].data = state[name].data.to(DTYPES[dtype] if dtype else stored[name])
    for part in PARTS:
        getattr(model, part).source, getattr(model, part).unsourced = None, frozenset()
    _describe(model, config, dtype)
    save_model(target, model, config, processor, Manifest(trained=sorted(trained & state.keys())))
    return report


@torch.inference_mode()
def probe(model: VisionLanguageModel, processor: VLMProcessor) -> Tensor:
    """Logits [L, vocabulary] of a picture and words, both drawn with a fixed seed."""
    draw = torch.Generator().manual_seed(0)
    sizes = {name: settings["size"] for name, settings in model.vision_encoder.inputs.items()}
    pixels = {name: torch.randn(1, 3, size, size, generator=draw) for name, size in sizes.items()}
    words = torch.randint(min(model.language_model.vocab_size, len(processor.tokenizer)), (_WORDS,), generator=draw)
    image = torch.full((model.connector.tokens_per_image,), IMAGE_TOKEN_ID)
    ids = torch.cat([words[: _WORDS // 2], image, words[_WORDS // 2 :]])[None]
    logits = model(Batch(ids, torch.ones_like(ids), pixels=pixels), return_logits=True).logits
    return logits[0]


def _difference(before: Tensor, after: Tensor) -> float:
    return float((before - after).abs().max())


def _hash(model: VisionLanguageModel) -> str:
    return hash_tensors(model.vision_encoder.state_dict().items())


def _describe(model: VisionLanguageModel, config: ModelConfig, dtype: str | None) -> None:
    """Let the configuration say what the folder holds: no adapters, no base, a head that may have left its tie."""
    for part in PARTS:
        node = getattr(config, part)
        node.lora = node.weights = None
        for name in ("revision", "tokenizer", "quantization"):
            if hasattr(node.config, name):
                setattr(node.config, name, None)
        if dtype and hasattr(node.config, "dtype"):
            node.config.dtype = dtype
    inner: Any = getattr(model.language_model, "model", None)
    hf = getattr(inner, "config", None)
    if hf is None or not getattr(hf.get_text_config(), "tie_word_embeddings", False):
        return
    if inner.get_output_embeddings().weight is not inner.get_input_embeddings().weight:
        hf.tie_word_embeddings = hf.get_text_config().tie_word_embeddings = False
        scratch = config.language_model and config.language_model.config.config
        if scratch:
            scratch["tie_word_embeddings"] = False
