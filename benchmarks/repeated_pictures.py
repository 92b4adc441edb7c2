"""Pictures that come more than once in a batch encoded once, and large features kept for a few pictures at a time.

Behind two encoders and patch info mining with the widths of Mini-Gemini, few layers and a quarter of the pixels of
Mini-Gemini-HD, in fp32. Prints how long a batch of questions takes to encode with its pictures shared against each
repeated, what finding them costs, and the peak memory (beyond weights and pictures) of different pictures encoded
together against a few at a time. The visual tokens are the same.

    python benchmarks/repeated_pictures.py
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import machine, peak_memory, peak_memory_of, time_side_by_side

import minivlm  # noqa: F401
from minivlm.config.loader import parse_model
from minivlm.models import vlm
from minivlm.models.build import build_model
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.sharing import share_equal
from minivlm.types import Batch

SIDE = 768
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "image_size": 168,
    "patch_size": 14,
}
PARTS: dict[str, Any] = {
    "vision_encoder": {
        "name": "dual",
        "low": {"name": "hf", "config": CLIP, "layer": -2},
        "high": {
            "name": "convnext_multiscale",
            "depths": [1, 1, 1, 1],
            "widths": [192, 384, 768, 1536],
            "image_size": SIDE,
        },
        "grid": 2,
        "global_view": True,
    },
    "connector": {"name": "patch_info_mining"},
    "language_model": {
        "name": "hf",
        "tokenizer": "asset:quickstart",
        "config": {
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    },
    "template": "vicuna_v1",
}
TOGETHER, APART = "together", "a few at a time"


def build(count: int, device: str) -> tuple[VisionLanguageModel, list[torch.Tensor]]:
    """The model and different pictures."""
    torch.manual_seed(0)
    model = build_model(parse_model(PARTS, "benchmark"), 512).to(device).eval()
    return model, [torch.randn(3, SIDE, SIDE) for _ in range(count)]


def batch_of(pictures: list[torch.Tensor], index: list[int] | None, device: str) -> Batch:
    """What `encode_images` looks at of a batch."""
    empty = torch.zeros(1, 0, dtype=torch.long)
    return Batch(empty, empty, pixels={"image": torch.stack(pictures)}, image_index=index).to(device)


def encode(model: VisionLanguageModel, batch: Batch) -> torch.Tensor:
    """The visual tokens of a batch."""
    with torch.no_grad():
        return model.encode_images(batch)


def peak(variant: str, count: int, device: str) -> None:
    """Print the peak memory of encoding different pictures."""
    model, pictures = build(count, device)
    if variant == TOGETHER:
        vlm._FEATURE_BYTES = 2**60
    batch = batch_of(pictures, None, device)
    before = peak_memory()
    encode(model, batch)
    print(peak_memory() - before)


def main() -> None:
    """Time both ways, compare their tokens, measure the memory of each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=2, help="different ones that the questions are about")
    parser.add_argument("--memory", choices=(TOGETHER, APART), help="print the peak memory of one variant")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if given.memory:
        peak(given.memory, given.questions, device)
        return
    print(machine())
    model, pictures = build(given.pictures, device)
    asked = [pictures[n % given.pictures].clone() for n in range(given.questions)]
    unique, index = share_equal([{"image": picture} for picture in asked])
    shared = batch_of([picture["image"] for picture in unique], index, device)
    batches = {"shared": shared, "repeated": batch_of(asked, None, device)}
    difference = float((encode(model, batches["shared"]) - encode(model, batches["repeated"])).abs().max())
    assert difference < 1e-4, "the two variants must compute the same"
    variants = {name: lambda batch=batch: encode(model, batch) for name, batch in batches.items()}
    variants["finding"] = lambda: share_equal([{"image": picture} for picture in asked])
    seconds = time_side_by_side(variants, given.rounds, warm_up=1)
    print(f"{given.questions} questions about {given.pictures} pictures; largest difference {difference:.1e}")
    print(f"  repeated {seconds['repeated']:.2f} s, shared {seconds['shared']:.2f} s", end="")
    print(f" ({seconds['repeated'] / seconds['shared']:.1f} x), finding them {seconds['finding'] * 1e3:.1f} ms")
    memory = {name: peak_memory_of(__file__, "--questions", "8", "--memory", name) for name in (TOGETHER, APART)}
    print(f"8 different pictures: {TOGETHER} {memory[TOGETHER]:.0f} MiB, {APART} {memory[APART]:.0f} MiB", end="")
    print(f" ({memory[TOGETHER] / memory[APART]:.1f} x less)")


if __name__ == "__main__":
    main()
