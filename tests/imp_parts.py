"""Tiny base models for the shipped files of Imp and LLaVA-1.5, and data in the places that the files name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from golden_imp import GOLDEN, golden_json
from shard_files import COLOURS, picture

_PREPROCESSOR = {"image_processor_type": "SiglipImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


def write_siglip(folder: Path) -> Path:
    """The golden set's SigLIP as the hub has one."""
    shutil.copytree(GOLDEN / "siglip-tiny", folder)
    size = golden_json("siglip-tiny/config.json")["image_size"]
    settings = {**_PREPROCESSOR, "size": {"height": size, "width": size}, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def write_clip(folder: Path) -> Path:
    """A CLIP with a class token, as LLaVA-1.5 has it."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    sizes = {key: golden_json("siglip-tiny/config.json")[key] for key in ("image_size", "patch_size")}
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=16, **sizes
    )
    CLIPVisionModel(config).save_pretrained(folder)
    return folder


def write_phi(folder: Path, layout: str = "v15") -> Path:
    """A Phi of the golden set's sizes with the golden tokenizer, in today's names."""
    from transformers import AutoTokenizer, PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    raw = golden_json(f"{layout}/config.json")
    known = PhiConfig().to_dict().keys() - {"model_type", "transformers_version", "architectures"}
    PhiForCausalLM(PhiConfig(**{key: raw[key] for key in known & raw.keys()})).save_pretrained(folder)
    AutoTokenizer.from_pretrained(GOLDEN / "tokenizer").save_pretrained(folder)
    return folder


MIX = ("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2")
"""The folders of the second stage's pictures."""


def write_data(folder: Path) -> Path:
    """Both stages' data under the names that the shipped files have: 24 captions, 36 conversations, 12 without picture.

    What is said follows from the picture, so that it can be learned.
    """
    stage1 = folder / "LLaVA-Pretrain"
    for place in (stage1 / "images", *(folder / name for name in MIX)):
        place.mkdir(parents=True)
    captions, talks = [], []
    for number in range(24):
        colour = list(COLOURS)[number % len(COLOURS)]
        (stage1 / "images" / f"{number}.jpg").write_bytes(picture(colour))
        captions.append(record(f"c{number}", f"a {colour} picture", "Describe it.", image=f"{number}.jpg"))
        place = f"{MIX[number % len(MIX)]}/{number}.jpg"
        (folder / place).write_bytes(picture(colour))
        more = ["Is it bright?", "Yes, it is."] * (number % 3)
        talks.append(record(f"m{number}", f"It is {colour}.", "What colour is it?", *more, image=place))
    for number in range(12):
        talks.append(record(f"t{number}", "The old river.", "Name a river.", *["And another?", "No."] * (number % 2)))
    (stage1 / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(captions))
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(talks))
    return folder


def record(name: str, answer: str, question: str, *more: str, image: str | None = None) -> dict[str, Any]:
    """A record of LLaVA-1.5's format; ``more`` are further questions and answers."""
    turns = [("<image>\n" if image else "") + question, answer, *more]
    talk = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(turns)]
    return {"id": name, **({"image": image} if image else {}), "conversations": talk}
