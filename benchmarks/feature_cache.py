"""MiniGPT-4's second stage with a warm feature cache against without one.

A small `cc_sbu_align` of photographs' size is made in a temporary folder; the stage runs as `train.py` runs it,
reading, evaluation of nothing, and saving included. Both variants take turns. Shapes: a tiny model, one whose
language model costs as much as its vision, and a mid-size frozen encoder (ViT-S/14 at 224 pixels), where vision
dominates; there the warm cache must be at least three times as fast.

    python benchmarks/feature_cache.py           # --quick: fewer pictures, one round
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from common import machine
from PIL import Image
from rich.console import Console

import minivlm  # noqa: F401
from minivlm.config import load_config
from minivlm.runners.experiment import run_experiment

VISION_DOMINATES, PROMISE = "mid-size encoder", 3.0


def model(width: int, depth: int, heads: int, language: int, layers: int) -> dict[str, Any]:
    """A MiniGPT-4 of other sizes, with an untrained language model."""
    return {
        "vision_encoder": {"name": "eva_clip_g", "freeze": True, "width": width, "depth": depth, "num_heads": heads},
        "connector": {
            "name": "qformer",
            "freeze": ["qformer*", "query_tokens"],
            "hidden_size": 32 * heads,
            "num_layers": max(depth // 2, 2),
            "num_heads": heads,
            "intermediate_size": 128 * heads,
        },
        "language_model": {
            "name": "hf",
            "tokenizer": "asset:quickstart",
            "freeze": True,
            "config": {
                "model_type": "llama",
                "hidden_size": language,
                "intermediate_size": 4 * language,
                "num_hidden_layers": layers,
                "num_attention_heads": language // 32,
            },
        },
        "template": "minigpt4_vicuna0",
        "processor": {"prompts": ["<Img><image></Img> Describe this image in detail."]},
    }


SHAPES = {
    "tiny": model(64, 3, 2, 64, 2),
    "large language model": model(192, 6, 3, 256, 8),
    VISION_DOMINATES: model(384, 12, 6, 128, 2),
}


def make_data(folder: Path, pictures: int) -> None:
    """``filter_cap.json`` and pictures of 640 x 480 pixels."""
    (folder / "image").mkdir(parents=True)
    rng = np.random.default_rng(0)
    captions = []
    for number in range(pictures):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(folder / "image" / f"{number}.jpg", quality=90)
        captions.append({"image_id": str(number), "caption": f"{number} clouds in red, green and blue"})
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": captions}))


def run(config: Path, output: Path, cache: Path | None) -> tuple[float, float, list[float]]:
    """Seconds of the whole stage, median seconds of a step, and the losses."""
    options = [f"run.output_dir={output}", f"run.feature_cache={cache or 'null'}"]
    start = time.perf_counter()
    run_experiment(load_config(config, options), Console(quiet=True))
    seconds = time.perf_counter() - start
    records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    steps = [record["seconds"] for record in records]
    return seconds, statistics.median(steps), [record["loss"] for record in records]


def measure(name: str, folder: Path, rounds: int, epochs: int) -> dict[str, float]:
    """Seconds without a cache, while it fills and with a warm one, and how often the last fits into the first."""
    experiment = {
        "model": SHAPES[name],
        "datasets": {"align": {"name": "cc_sbu_align", "storage": str(folder / "data")}},
        "run": {"task": "image_text_pretrain", "batch_size_train": 4, "max_epoch": epochs, "save_freq": 10**6},
    }
    home = Path(tempfile.mkdtemp(dir=folder))
    config = home / "stage2.yaml"
    config.write_text(yaml.safe_dump(experiment))
    filling, _, losses = run(config, home / "filling", home / "cache")
    stage: dict[str, list[float]] = {"without": [], "warm": []}
    step: dict[str, list[float]] = {"without": [], "warm": []}
    for number in range(rounds):
        for variant, cache in (("without", None), ("warm", home / "cache")):
            seconds, of_step, own = run(config, home / f"{variant}{number}", cache)
            stage[variant].append(seconds)
            step[variant].append(of_step)
            assert np.allclose(own, losses, rtol=0.02), "both variants must compute the same losses"
    without, warm = (statistics.median(stage[variant]) for variant in ("without", "warm"))
    return {
        "without": without,
        "filling": filling,
        "warm": warm,
        "ratio": without / warm,
        "of a step": statistics.median(step["without"]) / statistics.median(step["warm"]),
    }


def main() -> None:
    """Measure every shape and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer pictures and one round")
    arguments = parser.parse_args()
    pictures, rounds, epochs = (16, 1, 10) if arguments.quick else (32, 3, 8)
    print(f"{machine()}; {pictures} pictures, {epochs} epochs, batches of 4; seconds of the whole stage")
    print(f"{'':<22}{'without':>9}{'filling':>9}{'warm':>9}{'ratio':>9}{'of a step':>11}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_data(folder / "data", pictures)
        measure("tiny", folder, 1, 1)  # imports and first calls
        for name in SHAPES:
            found = measure(name, folder, rounds, epochs)
            seconds = "".join(f"{found[key]:9.1f}" for key in ("without", "filling", "warm"))
            print(f"{name:<22}{seconds}{found['ratio']:7.1f} x{found['of a step']:9.1f} x", flush=True)
            if name == VISION_DOMINATES:
                assert found["ratio"] >= PROMISE, f"a warm cache must be {PROMISE:g} times as fast here"


if __name__ == "__main__":
    main()
