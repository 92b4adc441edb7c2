"""An exported folder, read back by plain transformers, against the model that it was written from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.processor import VLMProcessor
from minivlm.types import IMAGE_MARKER, IMAGE_TOKEN_ID

_QUESTION, _ANSWER = "What is in the picture?", "Two colours."


@dataclass
class Comparison:
    """Largest differences of logits and pixels, and the kinds of prompts whose ids differ."""

    logits: float
    pixels: float
    other_ids: list[str]


@torch.inference_mode()
def compare(folder: Path, model: VisionLanguageModel, processor: VLMProcessor) -> Comparison:
    """Three short talks through both, in fp32 on the CPU; ``model`` must be there already.

    The logits are those of the same ids, whether or not the chat template gives them.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    picture = _picture()
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    their_processor: Any = AutoProcessor.from_pretrained(folder, backend="pil")
    image_token = theirs.config.image_token_id
    other_ids, logits, pixels = [], [], []
    asked = {"role": "user", "content": processor.template.with_images(_QUESTION, 1)}
    more = [{"role": "assistant", "content": _ANSWER}, {"role": "user", "content": _QUESTION}]
    talks = {"without a picture": more[1:], "of several turns": [asked, *more], "with a picture": [asked]}
    for name, talk in talks.items():
        batch = processor.prompt(talk, [picture] if asked in talk else [])
        if not batch.input_ids.numel():  # of a template that drops the user's text
            continue
        ids = batch.input_ids.masked_fill(batch.input_ids == IMAGE_TOKEN_ID, image_token)
        inputs = their_processor.apply_chat_template(
            [_in_parts(turn, picture) for turn in talk],
            **{"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"},
        )
        if not torch.equal(inputs["input_ids"], ids):
            other_ids.append(name)
        ours = model(batch, return_logits=True).logits
        seen = {"pixel_values": inputs["pixel_values"]} if "pixel_values" in inputs else {}
        found = theirs(input_ids=ids, **seen).logits[..., : ours.shape[-1]]
        logits.append((found - ours).abs().max())
        if seen:
            pixels.append((seen["pixel_values"] - batch.pixels["image"]).abs().max())
    return Comparison(float(torch.stack(logits).max()), float(torch.stack(pixels).max()), other_ids)


def _in_parts(turn: dict[str, str], picture: Image.Image) -> dict[str, Any]:
    """A message as transformers has it, its picture in front of the text."""
    has_picture = IMAGE_MARKER in turn["content"]
    parts: list[dict[str, Any]] = [{"type": "image", "image": picture}] if has_picture else []
    text = _QUESTION if has_picture else turn["content"]
    return {"role": turn["role"], "content": [*parts, {"type": "text", "text": text}]}


def _picture() -> Image.Image:
    """A picture of two colours that shade into each other, wider than high."""
    red = Image.linear_gradient("L").resize((120, 80))
    return Image.merge("RGB", (red, red.rotate(180), Image.new("L", red.size, 90)))
