"""A training step of MiniMind-V (512 x 8, CLIP ViT-B/32, batches of 8) against one as its first version published it.

Both train the same modules, with random weights, on the same captions about pictures of 224 pixels. The published step
is written anew here: rows of 200 ids whatever the text, pictures through the encoder one by one, logits everywhere and
an unreduced loss times a mask, Adam, a norm of 1. Ours is the runner's own step, from the files on.

A row of the original's has 73 ids without its caption, 50 of them visual. Captions are made of words of one id each, as
many as a log-normal distribution says (median 21, sigma 0.4, 8 to 110, seed 0): rows then have about 100 ids, as there.
Only ids that are no padding count. The steps take turns; medians of ids a second, by the clock and by CPU time. With
one thread CPU time is steady on a busy machine, so it decides.

    python benchmarks/minimind_v_training.py           # --quick: fewer steps; --threads 2
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from common import machine
from PIL import Image
from rich.console import Console
from torch.nn.functional import cross_entropy

import minivlm  # noqa: F401
from minivlm import registry
from minivlm.api import assemble
from minivlm.config import load_config
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.processor import VLMProcessor
from minivlm.processors.train_tokenizer import TokenizerTokens, train_tokenizer
from minivlm.runners.engines import SingleEngine
from minivlm.runners.experiment import Splits
from minivlm.runners.features import prepare_cache
from minivlm.runners.precision import cpu_has_bf16
from minivlm.types import IGNORE_INDEX, IMAGE_TOKEN_ID

BATCH, LENGTH, PROMPT = 8, 200, 73
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
PUBLISHED = "published, fp32"
GOALS = {"fp32": 1.5, "fp32, features cached": 2.0, "bf16, features cached": 4.0}
"""How many times as many ids a second as the published step; the last where the processor multiplies bf16."""


def make_data(folder: Path, count: int) -> dict[str, Any]:
    """Tokenizer, pictures and captions as files; returns the experiment on them."""
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = sorted({"".join(rng.choices(syllables, k=rng.randint(2, 3))) for _ in range(500)})
    roles = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    lines = (" ".join(rng.sample(words, len(words))) for _ in range(20))
    turns = ["user\n", "assistant\n"] * 50
    tokenizer = train_tokenizer([*lines, *turns], folder / "tokenizer", 4096, tokens=TokenizerTokens(roles))

    def say(size: int) -> str:
        return " ".join(rng.choices(words, k=size))

    bare = len(tokenizer("<s>user\n\n</s>\n<s>assistant")["input_ids"]) + 50
    (folder / "images").mkdir()
    noise = np.random.default_rng(0)
    records = []
    for number in range(count):
        coarse = Image.fromarray(noise.integers(0, 256, (28, 28, 3), dtype=np.uint8))
        coarse.resize((224, 224), Image.Resampling.BICUBIC).save(folder / "images" / f"{number}.jpg", quality=85)
        size = min(max(round(rng.lognormvariate(np.log(21), 0.4)), 8), 110)
        turns_of = [("human", f"<image>\n{say(max(PROMPT - bare, 1))}"), ("gpt", say(size))]
        turns_of = [{"from": role, "value": text} for role, text in turns_of]  # type: ignore[misc]
        records.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns_of})
    (folder / "chat.json").write_text(json.dumps(records))
    return {
        "model": {
            "arch": "minimind_v",
            "model_type": "v1_small",
            "vision_encoder": {"path": None, "config": CLIP},
            "language_model": {"tokenizer": str(folder / "tokenizer")},
        },
        "datasets": {
            "minimind_v_pretrain": {
                "annotations": {"train": str(folder / "chat.json")},
                "images": str(folder / "images"),
            }
        },
        "run": {
            "task": "image_text_pretrain",
            "device": "cpu",
            "batch_size_train": BATCH,
            "max_epoch": 100,
            "init_lr": 4e-4,
            "output_dir": str(folder / "out"),
        },
    }


class Published:
    """The published loop: one step of it a call, which returns its ids that are no padding."""

    def __init__(self, model: VisionLanguageModel, processor: VLMProcessor, samples: Any):
        self.model, self.processor, self.samples = model.train(), processor, samples
        self.optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=4e-4)
        self.place = 0

    def rows(self, numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """Ids, targets and loss mask [B, 199], pixels [B, 3, 224, 224], ids that are no padding."""
        ids = torch.zeros(len(numbers), LENGTH, dtype=torch.long)
        mask = torch.zeros(len(numbers), LENGTH)
        pixels, useful = [], 0
        for row, number in enumerate(numbers):
            encoded = self.processor.encode(self.samples[number], seed=0)
            size = min(len(encoded.input_ids), LENGTH)
            ids[row, :size] = torch.tensor(encoded.input_ids[:size])
            mask[row, :size] = torch.tensor([float(label != IGNORE_INDEX) for label in encoded.labels[:size]])
            pixels += encoded.pixels["image"]
            useful += size
        return ids[:, :-1], ids[:, 1:].clamp(min=0), mask[:, 1:], torch.stack(pixels), useful

    def loss(self, ids: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """The mean over what the mask holds, by way of all logits."""
        model = self.model
        with torch.no_grad():
            features = torch.cat([model.vision_encoder(picture[None]) for picture in pixels])
        visual = model.connector(features)
        embeds = model.language_model.embed(ids.clamp(min=0))
        rows = []
        for row, tokens in zip(range(len(ids)), visual, strict=True):
            start = int((ids[row] == IMAGE_TOKEN_ID).int().argmax())
            rows.append(torch.cat([embeds[row, :start], tokens, embeds[row, start + len(tokens) :]])[: ids.shape[1]])
        positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
        logits = model.language_model.head(model.language_model(torch.stack(rows), None, positions))
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=0, reduction="none")
        return (loss * mask.flatten()).sum() / mask.sum()

    def __call__(self) -> int:
        numbers = [(self.place + k) % len(self.samples) for k in range(BATCH)]
        self.place += BATCH
        *inputs, useful = self.rows(numbers)
        self.loss(*inputs).backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return useful


class Ours:
    """The runner's own step, data included."""

    def __init__(self, config: Path, precision: str, cached: bool):
        cache = config.parent / "cache" if cached else None
        options = [f"run.precision={precision}", f"run.feature_cache={cache or 'null'}"]
        stage = load_config(config, options).stages[0]
        torch.manual_seed(0)
        self.model, self.processor, stage.model = assemble(stage.model)
        engine, console, data = SingleEngine(torch.device("cpu"), precision), Console(quiet=True), Splits(stage)
        self.samples = data.train[0].sized
        if cached:
            prepare_cache(stage, self.model, self.processor, engine, data.all(), console)
        task = registry.get("task", stage.run.task)(stage.run)
        parts = (stage, self.model, self.processor, engine, task, data.train, None, [], console)
        self.runner = registry.get("runner", stage.run.runner)(*parts)
        self.module = engine.prepare(self.model, self.runner.optimizer, cached=cached)
        self.model.train()
        self.batches = self._counted()
        self.useful = 0

    def _counted(self) -> Iterator[Any]:
        for batch in self.runner._batches():
            self.useful = int(batch.attention_mask.sum())
            yield batch

    def __call__(self) -> int:
        self.runner._step(self.module, self.batches)
        return self.useful


def check_same_loss(published: Published, ours: Ours) -> None:
    """Before any step the two give the same loss of the same samples."""
    numbers = list(range(BATCH))
    *inputs, _ = published.rows(numbers)
    batch = ours.processor.collate([ours.processor.encode(ours.samples[n], seed=0) for n in numbers])
    with torch.no_grad():
        theirs, own = published.loss(*inputs), ours.model(batch).loss
    assert own is not None and abs(float(theirs - own)) < 1e-4, f"the losses differ: {theirs} and {own}"


def measure(variants: dict[str, Callable[[], int]], rounds: int) -> dict[str, tuple[float, float, float]]:
    """Medians of ids a second by the clock and of CPU time, and of CPU seconds a step; variants take turns."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, step in variants.items():
            clock, cpu = time.perf_counter(), time.process_time()
            useful = step()
            clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
            if number:  # the first is a warm-up
                found[name].append((useful / clock, useful / cpu, cpu))
    return {name: tuple(map(statistics.median, zip(*each))) for name, each in found.items()}  # type: ignore[misc]


def main() -> int:
    """Compare the losses, then time the steps; 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three steps of each instead of ten")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rounds = 3 if arguments.quick else 10
    goals = {name: goal for name, goal in GOALS.items() if "bf16" not in name or cpu_has_bf16()}
    with tempfile.TemporaryDirectory() as temporary:
        config = Path(temporary) / "experiment.yaml"
        config.write_text(yaml.safe_dump(make_data(Path(temporary), BATCH * (rounds + 1))))
        ours = {name: Ours(config, name[:4], "cached" in name) for name in goals}
        plain = ours["fp32"]
        torch.manual_seed(0)
        published = Published(assemble(load_config(config).stages[0].model)[0], plain.processor, plain.samples)
        published.model.load_state_dict(plain.model.state_dict())
        check_same_loss(published, plain)
        lengths = [len(plain.processor.encode(sample, seed=0).input_ids) for sample in plain.samples]
        print(f"{machine()}; {len(lengths)} samples of {statistics.mean(lengths):.0f} ids ({min(lengths)} to", end=" ")
        print(f"{max(lengths)}), batches of {BATCH}; {rounds} steps of each")
        found = measure({PUBLISHED: published, **ours}, rounds)
    print(f"{'':<24}{'ids/s':>8}{'ids/CPU s':>11}{'CPU s/step':>12}{'ratio':>9}{'of CPU':>9}{'goal':>7}")
    clock, cpu, seconds = found.pop(PUBLISHED)
    print(f"{PUBLISHED:<24}{clock:8.0f}{cpu:11.0f}{seconds:12.2f}")
    missed = False
    for name, (own_clock, own_cpu, own_seconds) in found.items():
        ratios = own_clock / clock, own_cpu / cpu
        missed |= ratios[1] < goals[name]
        row = f"{name:<24}{own_clock:8.0f}{own_cpu:11.0f}{own_seconds:12.2f}"
        print(f"{row}{ratios[0]:7.2f} x{ratios[1]:7.2f} x{goals[name]:7.1f}")
    if missed:
        print("a goal is missed")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
