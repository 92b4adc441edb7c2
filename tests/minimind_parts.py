"""What the shipped files of MiniMind-V name, for tests: encoders at real size without weights, tiny ones, data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from golden_minimind import vision_folder
from helpers import ROOT
from imp_parts import record
from shard_files import COLOURS, picture

from minivlm.api import assemble
from minivlm.checkpoints.to_minimind import write_minimind
from minivlm.config.loader import parse_model
from minivlm.processors.tokenizer import load_tokenizer
from minivlm.processors.train_tokenizer import tokens_of_template, train_tokenizer

CONFIGS = ROOT / "train_configs"
_VISION = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP = {"model_type": "clip_vision_model", "image_size": 224, "patch_size": 32, **_VISION}
SIGLIP = {"model_type": "siglip_vision_model", "image_size": 256, "patch_size": 32, **_VISION}
TOKENIZERS = {"v1": "MINIVLM_MINIMIND_V1_TOKENIZER", "v3": "MINIVLM_MINIMIND_V3_TOKENIZER"}
_QUESTION = {"v1": "这个图片描述的是什么内容？", "v3": "What is it?"}


def version_of(name: str) -> str:
    """``v1`` or ``v3`` of a model type, or of a shipped file's name."""
    return "v3" if "v3" in name else "v1"


def write_real_sizes(folder: Path) -> dict[str, str]:
    """The encoders' folders without weights, small tokenizers; returns the variables that name them."""
    named = {}
    for variable, config in (("MINIVLM_CLIP_B_32", CLIP), ("MINIVLM_SIGLIP2_B_32", SIGLIP)):
        (folder / variable).mkdir(parents=True)
        (folder / variable / "config.json").write_text(json.dumps(config))
        named[variable] = str(folder / variable)
    return named | _write_tokenizers(folder)


def write_tiny(folder: Path) -> dict[str, str]:
    """The golden set's encoders and small tokenizers; returns the variables that name them."""
    encoders = {"MINIVLM_CLIP_B_32": vision_folder("v1"), "MINIVLM_SIGLIP2_B_32": vision_folder("head")}
    return {name: str(path) for name, path in encoders.items()} | _write_tokenizers(folder)


def _write_tokenizers(folder: Path) -> dict[str, str]:
    texts = [text for question in _QUESTION.values() for colour in COLOURS for text in (question, f"It is {colour}.")]
    for version in TOKENIZERS:
        template = parse_model({"checkpoint": "", "template": {"name": f"minimind_{version}"}}, "test").template
        assert template
        train_tokenizer(texts * 3, folder / version, 340, tokens=tokens_of_template(template.config))
    return {variable: str(folder / version) for version, variable in TOKENIZERS.items()}


def tiny_sizes(model_type: str, tokenizer: str) -> dict[str, Any]:
    """Settings of the language model, to be laid over those of a preset."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "vocab_size": len(load_tokenizer(tokenizer))}
    sizes |= {"head_dim": 16} if "v3" in model_type else {}
    return sizes | ({"moe_intermediate_size": 64} if "moe" in model_type else {})


def size_options(model_type: str, tokenizer: str) -> list[str]:
    """The same as options."""
    sizes = tiny_sizes(model_type, tokenizer).items()
    return [f"model.model_type={model_type}", *(f"model.language_model.config.{key}={value}" for key, value in sizes)]


def write_language_model(file: Path, model_type: str, bases: Mapping[str, str]) -> Path:
    """A language model as the original's file, from nothing; the variables of ``bases`` are set."""
    torch.manual_seed(0)
    sizes = tiny_sizes(model_type, bases[TOKENIZERS[version_of(model_type)]])
    section = {"arch": "minimind_v", "model_type": model_type, "language_model": {"config": sizes}}
    model, _, _ = assemble(parse_model(section, "test"))
    return write_minimind(file, model, alone=True)[0]


def write_data(folder: Path, count: int = 128) -> Path:
    """Both versions' data under the names that the shipped files have; what is said follows from the picture."""
    import pyarrow
    from pyarrow import parquet

    for place in ("LLaVA-Pretrain", "LLaVA-Instruct", "pretrain_images", "sft_images"):
        (folder / place).mkdir(parents=True)
    captions, talks, rows = [], [], []
    for number in range(count):
        colour = list(COLOURS)[number % len(COLOURS)]
        (folder / "pretrain_images" / f"{number}.jpg").write_bytes(picture(colour))
        (folder / "sft_images" / f"COCO_train2014_{number}.jpg").write_bytes(picture(colour))
        answer, more = f"It is {colour}.", ["And now?", f"Still {colour}."] * (number % 3)
        captions.append(record(f"c{number}", answer, _QUESTION["v1"], image=f"{number}.jpg"))
        talks.append(record(f"t{number}", answer, _QUESTION["v1"], *more, image=f"{number}.jpg"))
        texts = [f"<image>\n{_QUESTION['v3']}", answer, *more]
        turns = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]
        rows.append({"conversations": json.dumps(turns), "image_bytes": [picture(colour)]})
    (folder / "LLaVA-Pretrain" / "chat-translated.json").write_text(json.dumps(captions))
    (folder / "LLaVA-Instruct" / "llava_instruct_230k.json").write_text(json.dumps(talks))
    blank = {
        "conversations": json.dumps([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "No."}])
    }
    for name, held in (("pretrain", rows), ("sft", [*rows, blank | {"image_bytes": []}])):
        table = pyarrow.Table.from_pylist(held)
        parquet.write_table(table, folder / f"{name}_i2t.parquet", row_group_size=8)
    return folder


def data_options(stem: str, data: Path) -> list[str]:
    """Where the data of a training file lie."""
    if "v3" in stem:
        return [f"datasets.{stem}.annotations={data}/{stem.removeprefix('minimind_v3_')}_i2t.parquet"]
    file, images = {
        "minimind_v_pretrain": ("LLaVA-Pretrain/chat-translated.json", "pretrain_images"),
        "minimind_v_sft": ("LLaVA-Instruct/llava_instruct_230k.json", "sft_images"),
    }[stem]
    return [f"datasets.{stem}.annotations={data}/{file}", f"datasets.{stem}.images={data}/{images}"]
