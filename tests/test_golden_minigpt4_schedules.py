"""The schedules and the decay groups of the originals, rate by rate."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers import GOLDEN, golden_section

from minivlm import registry
from minivlm.api import assemble
from minivlm.config.experiment import RunConfig
from minivlm.config.loader import list_model_defaults, parse_model
from minivlm.models.tuning import parameter_groups

SCHEDULES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "expected" / "lr_schedules.json").read_text())
COSINE = "linear_warmup_cosine_lr"
KEYS = {"init_lr": "init_lr", "min_lr": "min_lr", "warmup_steps": "warmup_steps", "warmup_start_lr": "warmup_lr"}
KEYS |= {"decay_rate": "lr_decay_rate", "max_epoch": "max_epoch", "iters_per_epoch": "iters_per_epoch"}


def kind(name: str) -> str:
    """The registered schedule of an entry, by its name."""
    return "linear_warmup_step_lr" if "step_lr" in name else "constant_lr" if "constant" in name else COSINE


def test_golden_minigpt4_schedules_are_there() -> None:
    assert {kind(name) for name in SCHEDULES} == set(registry.names("lr_scheduler"))
    assert {name.startswith("lavis") for name in SCHEDULES} == {True, False}


@pytest.mark.parametrize("name", SCHEDULES)
def test_golden_minigpt4_schedule(name: str, record_property: Any) -> None:
    params, rows = SCHEDULES[name]["params"], SCHEDULES[name]["values"]
    assert set(params) <= set(KEYS) and rows
    given = {KEYS[key]: value for key, value in params.items()}
    run = RunConfig(**given, compat="lavis" if name.startswith("lavis") else "minigpt4")
    length = run.iters_per_epoch or max(step for _, step, _ in rows) + 2
    schedule = registry.get("lr_scheduler", kind(name))(run, run.max_epoch * length, length)
    assert [schedule(epoch * length + step) for epoch, step, _ in rows] == pytest.approx(
        [rate for _, _, rate in rows], rel=1e-9, abs=0
    )
    record_property("compared", len(rows))


def test_the_three_ways_to_count_differ() -> None:
    given: dict[str, Any] = {"init_lr": 1e-3, "warmup_lr": 1e-5, "warmup_steps": 3, "max_epoch": 4}
    cosine = registry.get("lr_scheduler", "linear_warmup_cosine_lr")
    assert len({cosine(RunConfig(**given, compat=compat), 20, 5)(8) for compat in (None, "minigpt4", "lavis")}) == 3


@pytest.mark.parametrize(("arch", "model_type"), [a for a in list_model_defaults() if "gpt" in a[0]])
@pytest.mark.parametrize("freeze", ["as packaged", "nothing"])
def test_the_class_of_a_module_decays_what_the_names_of_minigpt4_do(arch: str, model_type: str, freeze: str) -> None:
    """MiniGPT-4: no decay below two dimensions, and for names with bias, ln or bn in them."""
    section = golden_section(arch, model_type)
    if freeze == "nothing":
        for part in ("vision_encoder", "connector"):
            section[part]["freeze"] = False
    seen = 0
    for group in decay_groups(section):
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            spared = parameter.ndim < 2 or any(part in name for part in ("bias", "ln", "bn"))
            assert (group["weight_decay"] == 0) == spared, name
            seen += 1
    assert seen >= 2


def decay_groups(section: dict[str, Any]) -> list[dict[str, Any]]:
    model, _, config = assemble(parse_model(section, "test"), meta=True)
    return parameter_groups(model, config, 1e-4, 0.05)
