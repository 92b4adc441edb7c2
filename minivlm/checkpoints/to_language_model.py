"""A language model alone as a folder of its own class in transformers, which servers and converters take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minivlm.checkpoints.report import CheckpointError
from minivlm.checkpoints.to_transformers import TOLERANCE, generation_config
from minivlm.io import atomic_folder
from minivlm.models.language.hf import HFLanguageModel
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.chat_template import to_jinja
from minivlm.processors.processor import VLMProcessor
from minivlm.processors.template import adds_bos, begins

_WORDS = 32


def export_language_model(
    model: VisionLanguageModel, processor: VLMProcessor, target: Path, *, check: bool = True
) -> float | None:
    """Write weights, configuration, tokenizer and chat template atomically.

    With ``check`` plain transformers reads the folder back, and the largest difference of its logits in fp32 is
    returned; ``model`` becomes fp32 on the CPU for that. Raises :class:`CheckpointError` for adapters, quantised
    weights, and logits that differ.
    """
    language = model.language_model
    wrong = _wrong(language)
    if wrong:
        raise CheckpointError(f"model.language_model: {wrong}")
    assert isinstance(language, HFLanguageModel)
    with atomic_folder(target) as unfinished:
        language.model.save_pretrained(unfinished)
        generation_config(language, processor).save_pretrained(unfinished)
        _save_tokenizer(processor, unfinished)
        difference = _difference(unfinished, language) if check else None
        if difference is not None and not difference <= TOLERANCE:
            raise CheckpointError(
                f"transformers gives other logits for what was exported, by up to {difference:.3g}; {target} is not "
                "written. This is an error of minivlm: please report it with the configuration of the model"
            )
    return difference


def _wrong(language: Any) -> str | None:
    if not isinstance(language, HFLanguageModel):
        return f"it is {type(language).__name__}, none of transformers (name: hf)"
    if language.adapter_parameters:
        return "its adapters are not merged; run minivlm merge first"
    if language.quantization:
        return "its weights are quantised; set quantization: null"
    return None


def _save_tokenizer(processor: VLMProcessor, folder: Path) -> None:
    import copy

    tokenizer, form = copy.deepcopy(processor.tokenizer), processor.template.chat_config
    adds = adds_bos(tokenizer)
    bos = tokenizer.bos_token if begins(form.bos, tokenizer) else ""
    tokenizer.chat_template = to_jinja(form, bos=bos, bos_always=not adds)
    tokenizer.save_pretrained(folder)


@torch.inference_mode()
def _difference(folder: Path, language: HFLanguageModel) -> float:
    """Of the logits of words drawn with a fixed seed."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(language.vocab_size, (1, _WORDS), generator=torch.Generator().manual_seed(0))
    ours = language.cpu().float().eval()
    hidden = ours(ours.embed(ids), None, torch.arange(_WORDS)[None])
    return float((ours.head(hidden) - theirs(input_ids=ids).logits).abs().max())
