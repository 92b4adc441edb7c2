"""Memory under ZeRO against the sums of the paper, and Mini-Gemini's real sizes."""

from __future__ import annotations

import runpy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, write_yaml
from rich.console import Console

from minivlm.config import load_config
from minivlm.config.experiment import StageConfig
from minivlm.models.vlm import VisionLanguageModel
from minivlm.runners import zero_table as module
from minivlm.runners.dry_run import dry_run
from minivlm.runners.memory import CUDA_CONTEXT, GIB, training_uses
from minivlm.runners.zero_table import LEVELS, Level, Need, States, wants_zero_table, zero_table

MGM: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks" / "mini_gemini_size.py"))


@cache
def built(name: str, stage: int = 2) -> tuple[StageConfig, VisionLanguageModel]:
    return MGM["stage_of"](name, stage), MGM["build"](name, stage)


def needs(states: States, processes: int) -> dict[str, Need]:
    return {level.name: states.need(level, processes) for level in LEVELS}


# --- the sums -------------------------------------------------------------------------------------------------------


def test_the_example_of_the_paper() -> None:
    """Rajbhandari et al. 2020, figure 1: 7.5 B parameters on 64 devices, model states in GB of 10^9 bytes."""
    states = States(trainable=7_500_000_000, frozen=0, activations=0, live=0)
    found = {name: (need.device - CUDA_CONTEXT) / 1e9 for name, need in needs(states, 64).items()}
    for name, published in {"no sharding": 120, "ZeRO-1": 31.4, "ZeRO-2": 16.6, "ZeRO-3": 1.9}.items():
        assert found[name] == pytest.approx(published, abs=0.05), name


def test_frozen_weights_are_shared_out_by_the_third_level_only() -> None:
    states = States(trainable=100, frozen=8000.0, activations=50.0, live=7.0)
    found = {name: need.device - CUDA_CONTEXT - 50 for name, need in needs(states, 4).items()}
    assert found == {
        "no sharding": 8000 + 1600,
        "ZeRO-1": 8000 + 400 + 1200 / 4,
        "ZeRO-2": 8000 + 200 + 1400 / 4,
        "ZeRO-2, offload": 8000 + 200,
        "ZeRO-3": (8000 + 1600) / 4 + 7,
        "ZeRO-3, offload": 7,
    }


def test_what_is_offloaded_lies_in_host_memory() -> None:
    """There with gradients in fp32; 16 and 18 bytes a parameter, as DeepSpeed's own estimate has it."""
    host = {name: need.host for name, need in needs(States(100, 8000.0, 0.0, 0.0), 4).items() if need.host}
    assert host == {"ZeRO-2, offload": 1600 / 4, "ZeRO-3, offload": (1800 + 8000) / 4}


def test_without_mixed_precision_the_weight_is_its_own_master_copy() -> None:
    found = needs(States(100, 0.0, 0.0, 0.0, width=4), 2)
    assert found["no sharding"].device - CUDA_CONTEXT == 1600
    assert found["ZeRO-1"].device - CUDA_CONTEXT == 800 + 800 / 2


def test_one_process_has_nothing_to_gather() -> None:
    states = States(100, 300.0, 0.0, 40.0)
    assert needs(states, 1)["ZeRO-3"] == needs(states, 1)["no sharding"]


@pytest.mark.parametrize(("gib", "card"), [(15.0, 16), (15.5, 24), (76.0, 80), (77.0, None)])
def test_the_smallest_card(gib: float, card: int | None) -> None:
    assert Need(gib * GIB).smallest_card == card


# --- Mini-Gemini at its real sizes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", MGM["SIZES"])
def test_sizes_are_the_published_ones(size: str) -> None:
    model, published = built(size)[1], MGM["SIZES"][size]
    assert MGM["count"](model.language_model) == published.published
    assert MGM["count"](model.connector.projector) == published.projector


def test_what_all_sizes_share_has_the_published_sizes() -> None:
    assert MGM["visual_counts"]() == {"CLIP-L": 303_507_456, "ConvNeXt-L": 196_227_264, "mining": 6_963_456}


def test_stage_two_of_a_real_size() -> None:
    """Language model, mining and projector train; both encoders are frozen, in fp32."""
    stage, model = built("7b")
    states = States.of(stage, model, "bf16", 2048)
    assert states.trainable == 6_738_415_616 + 6_963_456 + 20_979_712
    assert states.frozen == 4 * MGM["count"](model.vision_encoder)
    assert states.live == 2 * 10**9
    found = needs(states, 16)
    sharded, host = found["ZeRO-3"].device - states.activations - CUDA_CONTEXT, found["ZeRO-2, offload"].host
    assert sharded == pytest.approx((16 * states.trainable + states.frozen) / 16 + states.live)
    assert host == states.trainable
    assert found["ZeRO-2"].smallest_card == 40 and found["no sharding"].smallest_card is None


def test_stage_one_of_a_real_size() -> None:
    """The language model is frozen in half precision."""
    states = States.of(*built("34b", 1), "bf16", 2048)
    assert states.trainable == 6_963_456 + 58_734_592
    assert states.frozen > 2 * 34_388_917_248
    assert needs(states, 32)["ZeRO-2"].smallest_card is None, "which is why its script takes level 3"
    assert needs(states, 32)["ZeRO-3"].smallest_card is not None


def test_a_layer_of_experts_is_gathered_as_a_whole() -> None:
    stage, model = built("8x7b")
    layer = sum(p.numel() for p in model.language_model.model.model.layers[0].parameters())
    assert States.of(stage, model, "bf16", 2048).live == 2 * layer > 2 * 10**9


def test_the_features_of_a_picture_in_high_resolution_count() -> None:
    _, model = built("2b_hd")
    options: dict[str, Any] = {"tokens": 1000, "half": True}
    without, four = (training_uses(model, pictures=n, **options)["activations"] for n in (0, 4))
    assert four - without == 4 * 2 * 2880 * 185_344
    assert training_uses(model, pictures=4, tokens=1000, half=False)["activations"] > 4 * 4 * 2880 * 185_344


# --- the table ------------------------------------------------------------------------------------------------------


def printed(table: Any) -> dict[str, list[str]]:
    console = Console(record=True, width=140, quiet=False)
    console.print(table)
    lines = (line.strip("│").split("│") for line in console.export_text().splitlines() if line.startswith("│"))
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_the_table_marks_the_level_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "64")
    stage, model = built("13b_hd")
    table = zero_table(stage, model, "bf16", 4096)
    heads = [str(column.header) for column in table.columns]
    assert heads == ["", "1 process", "8 processes", "16 processes", "32 processes", "64 processes"]
    rows = printed(table)
    assert "ZeRO-2 (run.deepspeed)" in rows and "ZeRO-2" not in rows
    sizes = [float(cell.split()[0]) for cell in rows["ZeRO-3"]]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == 5
    assert len(set(rows["no sharding"])) == 1


def test_settings_by_their_names_in_deepspeed() -> None:
    assert {level.setting for level in LEVELS} >= {"zero2", "zero2_offload", "zero3", "zero3_offload"}
    assert Level("x", 3, offload=True).setting == "zero3_offload"


def test_where_the_levels_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, model = MGM["stage_of"]("2b", 1), MGM["build"]("2b", 1)
    assert wants_zero_table(stage, model)
    monkeypatch.setattr(module, "LARGE", 10**12)
    assert not wants_zero_table(stage, model)
    monkeypatch.setattr(stage.run, "engine", "deepspeed")
    assert wants_zero_table(stage, model)
    model.requires_grad_(False)
    assert not wants_zero_table(stage, model)


def test_the_dry_run_prints_it_also_before_the_data_are_there(
    tiny_experiment: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said() -> str:
        console = Console(record=True, width=120, quiet=False)
        dry_run(load_config(write_yaml(tmp_path / "x.yaml", tiny_experiment)), console)
        return " ".join(console.export_text().split())

    tiny_experiment["model"]["processor"] = {"name": "vlm", "max_length": 77}
    assert "under ZeRO" not in said()
    monkeypatch.setattr(module, "LARGE", 1000)
    assert "memory of a process under ZeRO" in said() and "samples of 77 tokens" in said()
    tiny_experiment["datasets"]["colours"]["annotations"] = {"train": str(tmp_path / "none.json")}
    assert "memory of a process under ZeRO" in said()
