"""Mini-Gemini at its real sizes, on the meta device: parameters against the published counts, memory under ZeRO.

Each model stands in its stage as the recipe trains it: samples of the full length, gradient checkpointing, micro batch
and ZeRO level of the published scripts, which are marked.

    python benchmarks/mini_gemini_size.py
    python benchmarks/mini_gemini_size.py --models 34b 34b_hd --stage 1
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

import minivlm  # noqa: F401
from minivlm.config.experiment import ModelConfig, RunConfig, StageConfig
from minivlm.config.loader import parse_model
from minivlm.models.build import build_model, build_part
from minivlm.models.vlm import VisionLanguageModel
from minivlm.runners.zero_table import zero_table

CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "projection_dim": 768,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Size:
    """A language model and how its recipes train: micro batch and ZeRO level of stage 1, stage 2 and HD stage 2."""

    language: dict[str, Any]
    published: int
    """Parameters of the language model."""
    projector: int
    recipes: tuple[tuple[int, str], tuple[int, str], tuple[int, str]]


def _llama(hidden: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
    }


GEMMA = {**_llama(2048, 16384, 18, 8, 1, 256_000), "model_type": "gemma", "head_dim": 256}
MIXTRAL = {**_llama(4096, 14336, 32, 32, 8, 32_000), "model_type": "mixtral", "num_local_experts": 8}
SIZES = {
    "2b": Size(GEMMA, 2_506_172_416, 6_295_552, ((8, "zero2_offload"), (8, "zero2"), (4, "zero2"))),
    "7b": Size(
        _llama(4096, 11008, 32, 32, 32, 32_000),
        6_738_415_616,
        20_979_712,
        ((16, "zero2_offload"), (8, "zero2_offload"), (4, "zero2")),
    ),
    "13b": Size(
        _llama(5120, 13824, 40, 40, 40, 32_000),
        13_015_864_320,
        31_467_520,
        ((8, "zero2"), (4, "zero2"), (4, "zero2")),
    ),
    "8b": Size(
        _llama(4096, 14336, 32, 32, 8, 128_256),
        8_030_261_248,
        20_979_712,
        ((16, "zero2_offload"), (8, "zero2_offload"), (4, "zero3")),
    ),
    "8x7b": Size(MIXTRAL, 46_702_792_704, 20_979_712, ((8, "zero3"), (4, "zero3"), (4, "zero3"))),
    "34b": Size(
        _llama(7168, 20480, 60, 56, 8, 64_000),
        34_388_917_248,
        58_734_592,
        ((8, "zero3"), (4, "zero3"), (4, "zero3")),
    ),
}
PUBLISHED = {"CLIP-L": 303_507_456, "ConvNeXt-L": 196_227_264, "mining": 6_963_456}
MODELS = [*SIZES, *(f"{size}_hd" for size in SIZES)]


def config(name: str, stage: int = 2) -> ModelConfig:
    """Section ``model`` of a stage: encoders frozen in both, the language model in the first."""
    size, hd = SIZES[name.removesuffix("_hd")], name.endswith("_hd")
    encoder = {
        "name": "dual",
        "low": {"name": "hf", "config": CLIP_L, "layer": -2},
        "high": {"name": "convnext_multiscale", "image_size": 1536 if hd else 768},
        **({"grid": 2, "global_view": True} if hd else {}),
        "freeze": True,
    }
    language = {"name": "hf", "config": size.language, "dtype": "bf16", "gradient_checkpointing": True}
    section = {
        "vision_encoder": encoder,
        "connector": {"name": "patch_info_mining"},
        "language_model": {**language, "freeze": stage == 1, "tokenizer": "asset:quickstart"},
        "template": "vicuna_v1",
        "processor": {"name": "vlm", "max_length": 4096 if hd else 2048},
    }
    return parse_model(section, "benchmark")


def build(name: str, stage: int = 2) -> VisionLanguageModel:
    """Nothing but shapes."""
    vocabulary = SIZES[name.removesuffix("_hd")].language["vocab_size"]
    return build_model(config(name, stage), vocabulary, meta=True)


def count(module: torch.nn.Module) -> int:
    """Parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def visual_counts() -> dict[str, int]:
    """Parameters of what all sizes share; CLIP with its last layer, which the tokens do not pass."""
    node = config("7b")
    assert node.vision_encoder is not None and node.connector is not None
    low = node.vision_encoder.config.low
    low.config.layer = -1
    with torch.device("meta"):
        whole = build_part("vision_encoder", low)
        encoder = build_part("vision_encoder", node.vision_encoder)
        connector = build_part("connector", node.connector, encoder, 1)
    mining = sum(count(module) for module in (connector.query, connector.key, connector.value))
    return {"CLIP-L": count(whole), "ConvNeXt-L": count(encoder.high), "mining": mining}


def stage_of(name: str, number: int) -> StageConfig:
    """The stage with the micro batch and the ZeRO level of the published script."""
    recipe = SIZES[name.removesuffix("_hd")].recipes[2 if name.endswith("_hd") else number - 1]
    run = RunConfig(batch_size_train=recipe[0])
    run.deepspeed = recipe[1]
    return StageConfig(config(name, number), run=run)


def compare(what: str, found: int, published: int) -> None:
    """One line; refuses a difference."""
    print(f"{what:<28}{found:>16,}   published {published:>16,}")
    assert found == published, what


def main() -> None:
    """Count, compare, estimate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="NAME")
    parser.add_argument("--stage", type=int, choices=(1, 2), default=2)
    given = parser.parse_args()
    if given.stage == 1:
        given.models = [name for name in given.models if not name.endswith("_hd")]  # they go on from that of the base
    for what, found in visual_counts().items():
        compare(what, found, PUBLISHED[what])
    for name in given.models:
        size = SIZES[name.removesuffix("_hd")]
        stage, model = stage_of(name, given.stage), build(name, given.stage)
        print()
        compare(f"{name}: language model", count(model.language_model), size.published)
        compare(f"{name}: projector", count(model.connector.projector), size.projector)
        table = zero_table(stage, model, "bf16", stage.model.processor.config.max_length)  # type: ignore[union-attr]
        table.title = f"{name}, stage {given.stage}: {table.title}"
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
