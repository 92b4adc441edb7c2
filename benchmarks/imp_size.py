"""Imp at its real size, on the meta device: parameters against the published counts, and which GPUs fit stage 2.

python benchmarks/imp_size.py
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console

import minivlm  # noqa: F401
from minivlm.config.experiment import ModelConfig, RunConfig, StageConfig
from minivlm.config.loader import parse_model
from minivlm.models.build import build_model, build_part
from minivlm.models.vlm import VisionLanguageModel
from minivlm.runners.gpu_table import gpu_table

VOCABULARY = 51_200
TOKENS = 729 + 250
"""A picture and what is said of it: an average sample of llava_v1_5_mix665k is no longer."""
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
PHI_2 = {
    "model_type": "phi",
    "vocab_size": VOCABULARY,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "partial_rotary_factor": 0.4,
    "max_position_embeddings": 2048,
}
QKV = [["q_proj", "k_proj", "v_proj"]]
LORAS: dict[str, dict[str, Any]] = {
    "v1": {"r": 128, "alpha": 256, "shared_a": QKV},
    "fused, r 256": {"r": 256, "alpha": 256, "shared_a": QKV},
    "v1.5": {"r": 256, "alpha": 256},
}
PUBLISHED = {
    "vision encoder": 397_747_744,
    "connector": 9_507_840,
    "language model": 2_779_683_840,
    "whole model": 3_186_939_424,
}
PUBLISHED_LORA = {"v1": 174.7, "fused, r 256": 349.3, "v1.5": 391.2}
"""Millions."""


def config(lora: dict[str, Any] | None = None) -> ModelConfig:
    """Imp with the adapters of stage 2, its language model stored in half precision."""
    language = {"name": "hf", "config": PHI_2, "dtype": "fp16", "lora": lora, "gradient_checkpointing": True}
    section = {
        "vision_encoder": {"name": "hf", "config": SIGLIP, "layer": -2, "freeze": True},
        "connector": {"name": "mlp", "depth": 2},
        "language_model": {**language, "freeze": True, "tokenizer": "asset:quickstart"},
        "template": "qa",
    }
    return parse_model(section, "benchmark")


def build(lora: dict[str, Any] | None = None) -> VisionLanguageModel:
    """Nothing but shapes."""
    return build_model(config(lora), VOCABULARY, meta=True)


def counts() -> dict[str, int]:
    """Parameters of the parts, of the whole, and of the adapters."""
    model = build()
    found = {
        part.replace("_", " "): sum(p.numel() for p in getattr(model, part).parameters())
        for part in ("vision_encoder", "connector", "language_model")
    }
    found["whole model"] = sum(found.values())
    for name, lora in LORAS.items():
        with torch.device("meta"):
            tuned = build_part("language_model", config(lora).language_model, VOCABULARY)
        found[f"LoRA {name}"] = sum(tuned.get_parameter(name).numel() for name in tuned.adapter_parameters)
    return found


def main() -> None:
    """Count, compare, estimate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    found = counts()
    for name, count in PUBLISHED.items():
        print(f"{name:<18}{found[name]:>14,}   published {count:>14,}")
        assert found[name] == count, name
    for name, millions in PUBLISHED_LORA.items():
        count = found[f"LoRA {name}"]
        print(f"{'LoRA ' + name:<18}{count:>14,}   published {millions:>12} M")
        assert round(count / 1e6, 1) == millions, name
    stage = StageConfig(config(LORAS["v1"]), run=RunConfig(batch_size_train=4))
    Console(width=120).print(gpu_table(stage, build(LORAS["v1"]), "fp16", TOKENS))


if __name__ == "__main__":
    main()
