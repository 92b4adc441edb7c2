"""Whole folders of the original Mini-Gemini, read by their config.json: losses, logits and greedy ids."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from golden_compared import Compared
from golden_mgm import FOLDERS, GOLDEN, compared, golden_json, golden_tensors, weights_of

from minivlm.api import assemble
from minivlm.config.loader import parse_model
from minivlm.datasets.configs import LlavaJsonConfig
from minivlm.datasets.llava_json import LlavaJsonBuilder
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.processor import VLMProcessor
from minivlm.types import IMAGE_TOKEN_ID, Message

LOSSES, LOGITS = 1e-4, 1e-4
each_folder = pytest.mark.parametrize("folder", FOLDERS)
__all__ = ["compared"]


def as_published(folder: str) -> Path:
    """A checkpoint as a folder of its own, the settings of the CLIP tower where its config.json points."""
    target = Path(mkdtemp())
    source = GOLDEN / folder
    (target / "model.safetensors").symlink_to(weights_of(folder).resolve())
    (target / "config.json").symlink_to((source / "config.json").resolve())
    tower = target / golden_json(f"{folder}/config.json")["mm_vision_tower"]
    tower.mkdir()
    (tower / "config.json").symlink_to((GOLDEN / "towers" / "clip_config.json").resolve())
    (tower / "preprocessor_config.json").symlink_to((GOLDEN / "towers" / "preprocessor_config.json").resolve())
    return target


@cache
def load(folder: str) -> tuple[VisionLanguageModel, VLMProcessor]:
    """The model of a folder; only its tokenizer lies elsewhere."""
    about = golden_json(f"{folder}/expected.json")
    language = {"name": "hf", "tokenizer": str(GOLDEN / "tokenizers" / about["tokenizer"])}
    section = {"checkpoint": str(as_published(folder)), "language_model": language}
    model, processor, _ = assemble(parse_model(section, "golden set"))
    return model.eval(), processor


@each_folder
def test_golden_mini_gemini_whole_folder(compared: Compared, folder: str) -> None:
    model, processor = load(folder)
    about, golden = golden_json(f"{folder}/expected.json"), golden_tensors(f"{folder}/expected.safetensors")
    settings = LlavaJsonConfig(annotations=str(GOLDEN / "train_samples.json"), images=str(GOLDEN / "images"))
    rows = golden["splice.labels"].shape[0]
    samples = list(LlavaJsonBuilder(settings, "train").build("train"))[:rows]
    batch = processor.collate([processor.encode(sample) for sample in samples])
    with torch.no_grad():
        output = model(batch, return_logits=True)
    assert output.loss is not None and output.logits is not None and batch.labels is not None
    assert int((batch.labels != -100).sum()) == about["n_supervised"]
    compared.close(output.loss, torch.tensor(about["loss"]), LOSSES)
    mask = golden["splice.attention_mask"].bool()
    for row in range(rows):
        seen = int(mask[row].sum())
        compared.close(output.logits[row, seen - 1], golden["logits_last"][row], LOGITS)
        if "logits_stride8" in golden:
            every = output.logits[row, :seen:8]
            compared.close(every, golden["logits_stride8"][row, : len(every)], LOGITS)


@each_folder
def test_golden_mini_gemini_greedy_with_pictures(compared: Compared, folder: str) -> None:
    model, processor = load(folder)
    for record in golden_json(f"{folder}/expected.json")["generation"]:
        images = [GOLDEN / "images" / record["image"]] if record.get("image") else []
        text = ("<image>\n" if images else "") + record["question"]
        batch = processor.prompt([Message("user", text)], images)
        ids = [int(i) for i in batch.input_ids[0]]
        begins = [n == 0 or ids[n - 1] != i for n, i in enumerate(ids)]
        collapsed = [i for i, begin in zip(ids, begins, strict=True) if i != IMAGE_TOKEN_ID or begin]
        collapsed = [-200 if i == IMAGE_TOKEN_ID else i for i in collapsed]
        assert collapsed == record["input_ids"]
        new: Any = model.generate(batch, max_new_tokens=len(record["new_ids"]), eos_token_id=None, pad_token_id=0)
        compared.close(new[0], torch.tensor(record["new_ids"]), 0)
