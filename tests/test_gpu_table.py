"""Which GPUs fit: what the three ways of tuning take, and the real sizes of Imp."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, write_yaml
from rich.console import Console
from tuning_models import build, section

from minivlm.config import load_config
from minivlm.config.experiment import RunConfig, StageConfig
from minivlm.runners.dry_run import dry_run
from minivlm.runners.gpu_table import CARDS, USABLE, Way, gpu_table, has_base, ways
from minivlm.runners.memory import CUDA_CONTEXT, GIB, weight_uses

IMP: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks" / "imp_size.py"))


@pytest.fixture(scope="module")
def counts() -> dict[str, int]:
    return IMP["counts"]()


@pytest.mark.parametrize(
    ("part", "count"),
    [
        ("vision encoder", 397_747_744),
        ("connector", 9_507_840),
        ("language model", 2_779_683_840),
        ("whole model", 3_186_939_424),
    ],
)
def test_imp_has_the_published_sizes(counts: dict[str, int], part: str, count: int) -> None:
    assert counts[part] == count


@pytest.mark.parametrize(("lora", "millions"), [("v1", 174.7), ("fused, r 256", 349.3), ("v1.5", 391.2)])
def test_its_adapters_have_the_published_sizes(counts: dict[str, int], lora: str, millions: float) -> None:
    assert round(counts[f"LoRA {lora}"] / 1e6, 1) == millions


def test_one_matrix_a_for_each_layer_is_more() -> None:
    split = IMP["build"]({"r": 128, "alpha": 256}).language_model
    assert round(sum(p.numel() for p in split.parameters() if p.requires_grad) / 1e6, 1) == 195.6


def test_stage_two_of_imp(counts: dict[str, int]) -> None:
    lora = IMP["LORAS"]["v1"]
    stage = StageConfig(IMP["config"](lora), run=RunConfig(batch_size_train=4))
    model = IMP["build"](lora)
    found = {way.name: way for way in ways(stage, model, "fp16", 1000)}
    assert list(found) == ["LoRA", "QLoRA", "full"]
    trains = counts["LoRA v1"] + counts["connector"]
    for name in ("LoRA", "QLoRA"):
        assert (found[name].uses["gradients"], found[name].uses["optimiser"]) == (4 * trains, 8 * trains)
    beside = 4 * (counts["vision encoder"] + counts["connector"])
    assert found["LoRA"].uses["weights"] == beside + 2 * counts["language model"] + 4 * counts["LoRA v1"]
    assert found["QLoRA"].uses["weights"] == sum(use.bytes for use in weight_uses(model, "nf4"))
    whole = counts["language model"]
    assert found["full"].uses["weights"] == beside + 4 * whole, "what trains is not kept in fp16"
    assert found["full"].uses["optimiser"] == 8 * (whole + counts["connector"])
    assert [found[name].smallest_card for name in found] == [16, 16, 48]


def test_cards() -> None:
    gib = {"weights": 10.0, "gradients": 1.0, "optimiser": 2.0, "activations": 4.0}
    way = Way("full", {name: size * GIB for name, size in gib.items()}, micro_batch=2)
    assert way.total == 17 * GIB + CUDA_CONTEXT
    fixed = 13 + CUDA_CONTEXT / GIB
    for card in CARDS:
        largest = way.largest_micro_batch(card)
        assert fixed + 2 * largest <= USABLE * card < fixed + 2 * (largest + 1) or largest == 0
    assert way.smallest_card == 24 and way.largest_micro_batch(16) == 0
    huge = Way("full", {**way.uses, "weights": 100 * GIB}, micro_batch=1)
    assert huge.smallest_card is None


def said(config: Path) -> str:
    console = Console(record=True, width=80, quiet=False)
    assert dry_run(load_config(config), console)
    return " ".join(console.export_text().split())


def test_the_dry_run_of_a_stage_on_a_base_prints_it(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    tiny_experiment["model"] = section({"r": 3})
    from_scratch = said(write_yaml(tmp_path / "x.yaml", tiny_experiment))
    assert "which GPUs fit" not in from_scratch
    build(section())[0].language_model.model.save_pretrained(tmp_path / "base")
    base = {"path": str(tmp_path / "base"), "config": None, "gradient_checkpointing": True, "quantization": "nf4"}
    tiny_experiment["model"] = section({"r": 3}, **base)
    text = said(write_yaml(tmp_path / "x.yaml", tiny_experiment))
    assert "which GPUs fit" in text and "LoRA of rank 3, with gradient checkpointing" in text
    assert "┃ LoRA ┃ QLoRA ┃ full ┃" in text and "│ largest micro batch, 16 GB │" in text


def test_what_no_card_holds_says_so() -> None:
    huge = {**IMP["PHI_2"], "hidden_size": 16384, "intermediate_size": 65536, "num_attention_heads": 128}
    model, _, config = build(section(None, config=huge, dtype="bf16"), meta=True)
    stage = StageConfig(config, run=RunConfig(batch_size_train=1))
    assert not has_base(stage.model)
    console = Console(record=True, width=80, quiet=False)
    console.print(gpu_table(stage, model, "bf16", 500))
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in console.export_text().splitlines()]
    _, qlora, full = next(cells for name, *cells in rows if name == "fits")
    assert full == "more than one card" != qlora
