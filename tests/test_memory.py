"""The memory estimate: what is counted, in which type, and that nothing is counted that is not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model, write_yaml
from rich.console import Console

from minivlm.api import assemble
from minivlm.config import load_config
from minivlm.config.loader import parse_model
from minivlm.models.configs import HFLanguageModelConfig
from minivlm.models.language.hf import HFLanguageModel
from minivlm.models.lora import add_lora
from minivlm.models.vlm import VisionLanguageModel
from minivlm.runners.dry_run import dry_run
from minivlm.runners.memory import CUDA_CONTEXT, Sizes, Use, inference_uses, kv_bytes, training_uses, weight_uses
from minivlm.schema import LoraSettings

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 32, 64, 2, 360
LINEAR = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
ROWS = LAYERS * (5 * HIDDEN + 2 * INTERMEDIATE)
REST = 2 * VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN


def build(meta: bool = True, **language: Any) -> VisionLanguageModel:
    section = tiny_model()
    section["language_model"] |= {"freeze": True, **language}
    return assemble(parse_model(section, "test"), meta=meta)[0]


def of_language(uses: list[Use]) -> dict[str, tuple[int, float]]:
    return {use.stored: (use.count, use.bytes) for use in uses if use.part == "language_model"}


def test_weights_are_counted_as_they_are_stored() -> None:
    model = build(meta=False, dtype="bf16")
    uses = weight_uses(model)
    assert sum(use.bytes for use in uses) == sum(p.numel() * p.element_size() for p in model.parameters())
    assert of_language(uses) == {"bfloat16": (LINEAR + REST, 2 * (LINEAR + REST))}
    assert [(use.part, use.stored, use.bytes) for use in weight_uses(build(dtype="bf16"))] == [
        (use.part, use.stored, use.bytes) for use in uses
    ], "shapes are enough"


def test_quantised_layers_are_counted_as_quantised() -> None:
    model = build()
    eight = of_language(weight_uses(model, "int8"))
    assert eight["int8"] == (LINEAR, LINEAR + 4 * ROWS), "a byte a weight and a scale for every row"
    assert eight["float16"] == (REST, 2 * REST), "embeddings, head and norms stay in half precision"
    four = of_language(weight_uses(model, "nf4"))
    assert four["nf4"] == (LINEAR, pytest.approx(LINEAR * (4 + 8 / 64 + 32 / 64 / 256) / 8))


def test_adapters_are_not_quantised() -> None:
    model = build()
    config: dict[str, Any] = tiny_model()["language_model"]["config"]
    model.language_model = HFLanguageModel(HFLanguageModelConfig(config=config), VOCABULARY)
    add_lora("language_model", model.language_model, LoraSettings(r=2, target_modules=["q_proj", "v_proj"]))
    found = of_language(weight_uses(model, "int8"))
    assert found["int8"][0] == LINEAR and found["float32"] == (LAYERS * 2 * 4 * HIDDEN, 4 * LAYERS * 2 * 4 * HIDDEN)


def test_the_dry_run_of_a_quantised_model_needs_no_bitsandbytes(
    tmp_path: Path, tiny_experiment: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(meta=False)
    model.language_model.model.save_pretrained(tmp_path / "llama")
    tiny_experiment["model"]["language_model"] = {
        "name": "hf",
        "path": str(tmp_path / "llama"),
        "tokenizer": "asset:quickstart",
        "quantization": "int8",
        "freeze": True,
    }
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    console = Console(record=True, width=120, quiet=False)
    assert dry_run(load_config(write_yaml(tmp_path / "x.yaml", tiny_experiment)), console)
    said = " ".join(console.export_text().split())
    assert "language_model │ int8 │ 22.2 KiB" in said and "keys and values, 256 tokens x 1" in said
    assert "CUDA context and kernels" in said and "memory of inference, estimated" in said


def test_keys_and_values_grow_with_context_and_beams() -> None:
    model = build(dtype="fp16")

    def cache(**options: Any) -> float:
        return next(use.bytes for use in inference_uses(model, **options) if use.part.startswith("keys"))

    assert cache(context=100) == 2 * LAYERS * 100 * HIDDEN * 2 == kv_bytes(Sizes.of(model), 100)
    assert cache(context=100, beams=5) == 5 * cache(context=100)
    full = build()
    grouped = tiny_model()["language_model"]["config"] | {"num_key_value_heads": 1}
    fewer = inference_uses(build(config=grouped), context=100)
    assert next(u.bytes for u in fewer if u.part.startswith("keys")) == 2 * LAYERS * 100 * (HIDDEN // 2) * 4
    overhead = [use for use in inference_uses(full, context=1) if use.part.startswith("CUDA")]
    assert [use.bytes for use in overhead] == [CUDA_CONTEXT]


def test_eager_attention_holds_its_scores() -> None:
    def activations(attention: str) -> float:
        uses = inference_uses(build(dtype="fp16", attention=attention), context=50)
        return next(use.bytes for use in uses if use.part.startswith("activations"))

    assert activations("eager") - activations("sdpa") == 2 * 50**2 * (4 + 2)


def test_a_cache_spares_the_weights_that_it_replaces() -> None:
    section = tiny_model()
    section["connector"] = {"name": "qformer", "freeze": ["qformer*", "query_tokens"], "hidden_size": 24}
    section["connector"] |= {"num_layers": 1, "num_heads": 2, "intermediate_size": 48}
    model, _, _ = assemble(parse_model(section, "test"), meta=True)
    spared = {use.part: use.count for use in weight_uses(model, cached=True)}
    assert spared["connector"] == sum(p.numel() for p in model.connector.linear.parameters())
    assert "vision_encoder" not in spared
    options: dict[str, Any] = {"tokens": 10, "half": False}
    whole, less = (training_uses(model, cached=cached, **options) for cached in (False, True))
    assert {key for key in whole if whole[key] != less[key]} == {"weights"}
    section["connector"]["freeze"] = False
    trains, _, _ = assemble(parse_model(section, "test"), meta=True)
    parts = {use.part: use.count for use in weight_uses(trains, cached=True)}
    assert parts["connector"] == sum(p.numel() for p in trains.connector.parameters())


def test_only_what_trains_has_gradients_and_moments() -> None:
    model = build()
    uses = training_uses(model, tokens=10, half=True)
    trainable = sum(p.numel() for p in model.connector.parameters())
    assert (uses["gradients"], uses["optimiser"]) == (4 * trainable, 8 * trainable)
    assert training_uses(model, tokens=10, half=True, checkpointing=True)["activations"] < uses["activations"]
    assert torch.device("meta") == model.device
