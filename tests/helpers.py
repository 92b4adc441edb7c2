"""What several tests use: tiny models, experiment files, runs in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
GOLDEN = Path(os.environ.get("MINIVLM_GOLDEN", ROOT / "tests" / "golden")) / "minigpt4"
"""Inputs, original-format files and outputs of the original MiniGPT-4 at tiny sizes; see its README."""


def tiny_model() -> dict[str, Any]:
    """Section ``model`` of a model with a few thousand parameters, none of them downloaded."""
    return {
        "vision_encoder": {
            "name": "hf",
            "freeze": True,
            "config": {
                "model_type": "clip_vision_model",
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 32,
                "patch_size": 16,
            },
        },
        "connector": {"name": "mlp", "depth": 2},
        "language_model": {
            "name": "hf",
            "tokenizer": "asset:quickstart",
            "config": {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": 256,
            },
        },
        "template": "qa",
    }


def write_yaml(path: Path, content: dict[str, Any]) -> Path:
    """Write an experiment file."""
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def run_train(
    config: Path, *options: str, processes: int = 1, timeout: float = 240, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``train.py`` in a process of its own, under torchrun for several processes."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, str(ROOT / "train.py"), "--cfg-path", str(config)]
    if options:
        command += ["--options", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT)


def losses(folder: Path) -> list[float]:
    """The losses of a run's log, step by step."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [r["loss"] for r in records if "lr" in r]


def golden_sizes(with_qformer: bool) -> dict[str, dict[str, Any]]:
    """The parts of section ``model`` at the sizes of the golden set, without weights but Llama's."""
    sizes = json.loads((GOLDEN / "config.json").read_text())
    vit, qformer = sizes["vit"], sizes["qformer"]
    encoder = {key: vit[key] for key in ("image_size", "patch_size", "depth", "num_heads", "mlp_ratio")}
    queries = {
        "num_query_tokens": qformer["num_query_token"],
        "hidden_size": qformer["hidden_size"],
        "num_layers": qformer["num_hidden_layers"],
        "num_heads": qformer["num_attention_heads"],
        "intermediate_size": qformer["intermediate_size"],
        "cross_attention_every": qformer["cross_attention_freq"],
    }
    return {
        "vision_encoder": {**encoder, "width": vit["embed_dim"], "dtype": "fp32", "weights": None},
        "connector": {"weights": None, **(queries if with_qformer else {})},
        "language_model": {"path": str(GOLDEN / "llama"), "dtype": "fp32"},
    }


def golden_section(arch: str, model_type: str) -> dict[str, Any]:
    """Section ``model`` of a packaged MiniGPT-4 at the sizes of the golden set."""
    return {"arch": arch, "model_type": model_type, **golden_sizes("vicuna" in model_type)}


def golden_options(arch: str, model_type: str) -> list[str]:
    """The same as options over a file; the size of the pictures is then that of the encoder."""
    section = golden_section(arch, model_type)
    return [
        f"model.{part}.{key}={'null' if value is None else value}"
        for part, settings in section.items()
        if isinstance(settings, dict)
        for key, value in settings.items()
    ] + ["model.processor.image.size=null"]


RECORD_KINDS = {
    "caption": ("coco_caption", "textcaps_caption"),
    "vqa": ("aok_vqa", "coco_vqa", "gqa", "ocrvqa", "ok_vqa"),
    "phrase": (
        *("invrefcoco", "invrefcocog", "invrefcocop", "refcoco", "refcocog", "refcocop", "refvg"),
        "flickr_ObjectToPhrase",
    ),
    "objects": ("flickr_CaptionToPhrase", "flickr_grounded_caption"),
    "conversation": ("llava_conversation", "llava_detail", "llava_reason", "multitask_conversation"),
    "text": ("unnatural_instruction",),
}
"""The fine-tuning data of MiniGPT-v2 by the format of their records; fixture ``minigpt4_data`` has a file of each."""


def minigpt4_options(file: Path, data: Path) -> list[str]:
    """What a shipped file of MiniGPT-4 leaves to its user, at the sizes of the golden set; others need nothing."""
    if not file.name.startswith("minigpt"):
        return []
    llama2, second = "llama2" in file.name, "minigptv2" in file.name
    arch = "minigpt_v2" if second else "minigpt4"
    model_type = "pretrain" if second else "pretrain_llama2" if llama2 else "pretrain_vicuna0"
    options = [*golden_options(arch, model_type), "model.checkpoint=null"]
    if file.parent.name == "eval_configs":
        return [*options, "model.language_model.quantization=null"]
    if second:
        for kind, names in RECORD_KINDS.items():
            for name in names:
                options += [f"datasets.{name}.annotations={data}/{kind}.json", f"datasets.{name}.images={data}"]
                options += [f"datasets.{name}.batch_size=2"]
        return [*options, "run.batch_size_train=2"]
    if "stage1" in file.name:
        return [*options, *(f"datasets.{name}.storage={data}/00000.tar" for name in ("laion", "cc_sbu"))]
    options += [f"datasets.cc_sbu_align.storage={data}", "datasets.cc_sbu_align.batch_size=2"]
    return [*options, "run.batch_size_train=2"]


def imp_options(file: Path, data: Path) -> list[str]:
    """What a shipped file of Imp or LLaVA-1.5 needs beside its user's data, at the sizes of the golden set."""
    golden = GOLDEN.parent / "imp"
    if not file.name.startswith(("imp", "llava")):
        return []
    if file.parent.name == "eval_configs":
        return [f"model.checkpoint={data}"] if file.name.startswith("llava") else []
    sizes = ["run.batch_size_train=2", "run.global_batch_size=4", "run.num_workers=0"]
    if "custom" in file.name:
        records = [f"datasets.custom.annotations={data}/llava.json", f"datasets.custom.images={data}"]
        return [*sizes, f"model.checkpoint={golden / 'v15' / 'merged'}", *records]
    name = "blip_laion_cc_sbu_558k" if "stage1" in file.name else "llava_v1_5_mix665k"
    records = [f"datasets.{name}.annotations={data}/llava.json", f"datasets.{name}.images={data}"]
    records.append(f"datasets.{name}.layout=null")
    bases = [f"model.vision_encoder.path={golden / 'siglip-tiny'}"]
    bases += [f"model.language_model.path={golden / 'v15'}", f"model.language_model.tokenizer={golden / 'tokenizer'}"]
    return [*sizes, *bases, "model.checkpoint=null", *records]


def minimind_options(file: Path, data: Path) -> list[str]:
    """What a shipped file of MiniMind's language model needs beside its user's data."""
    if not file.name.startswith("minimind_llm"):
        return []
    name, texts = ("text", "texts.txt") if "pretrain" in file.name else ("llava_json", "chats.jsonl")
    records = [f"datasets.{name}.annotations.{split}={data / texts}" for split in ("train", "val")]
    sizes = ["run.batch_size_train=2", "run.global_batch_size=4", "run.num_workers=0"]
    return [*sizes, *records, "model.checkpoint=null", "model.language_model.tokenizer=asset:quickstart"]


def make_lavis_python(folder: Path, versions: dict[str, str | None] | None = None) -> str:
    """An interpreter whose packages are ``tests/fake_lavis`` and, by their metadata, those that LAVIS needs."""
    named = {"salesforce-lavis": "1.0.2", "transformers": "4.26.1", "timm": "0.4.12", "fairscale": "0.4.4"}
    for name, version in {**named, **(versions or {})}.items():
        if version is not None:
            info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    python = folder / "python"
    path = f"{folder}:{ROOT / 'tests' / 'fake_lavis'}"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{path}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return str(python)
