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
