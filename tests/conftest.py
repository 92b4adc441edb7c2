"""Tiny data, models and experiments that the tests build upon."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

import minivlm  # noqa: F401  (first, for the torchvision guard)

ROOT = Path(__file__).parent.parent
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (230, 220, 40)}

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llava_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 24 pictures of one colour and LLaVA records about them (train.json, test.json)."""
    folder = tmp_path_factory.mktemp("llava_data")
    (folder / "images").mkdir()
    records = []
    for index in range(24):
        name, colour = list(COLOURS.items())[index % len(COLOURS)]
        size = (40 + index, 64 - index)
        Image.new("RGB", size, colour).save(folder / "images" / f"{index}.png")
        turns = [
            {"from": "human", "value": "<image>\nwhat color is the shape?"},
            {"from": "gpt", "value": name},
        ]
        if index % 3 == 0:
            turns += [{"from": "human", "value": "is there a red shape?"}, {"from": "gpt", "value": "yes and no"}]
        records.append({"id": f"r{index}", "image": f"{index}.png", "conversations": turns})
    records.append(
        {
            "id": "text",
            "conversations": [
                {"from": "human", "value": "what is a triangle?"},
                {"from": "gpt", "value": "a shape with three sides"},
            ],
        }
    )
    (folder / "train.json").write_text(json.dumps(records))
    (folder / "test.json").write_text(json.dumps(records[:8]))
    return folder


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


@pytest.fixture
def tiny_experiment(tmp_path: Path, llava_data: Path) -> dict[str, Any]:
    """An experiment of six steps as a plain dict; change it and give it to ``write_yaml``."""
    return {
        "model": tiny_model(),
        "datasets": {
            "colours": {
                "name": "llava_json",
                "annotations": {split: str(llava_data / f"{split}.json") for split in ("train", "test")},
                "images": str(llava_data / "images"),
            }
        },
        "run": {
            "task": "instruction_tuning",
            "output_dir": str(tmp_path / "out"),
            "batch_size_train": 4,
            "max_epoch": 1,
            "init_lr": 5e-3,
            "precision": "fp32",
            "device": "cpu",
        },
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
