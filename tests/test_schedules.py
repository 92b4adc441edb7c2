"""Schedules that count as transformers does, and warm-ups given as a share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import write_yaml
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from minivlm.config import ConfigError, load_config
from minivlm.config.experiment import RunConfig
from minivlm.runners.schedules import FROM_ZERO, make_schedule, warmup_steps

COSINE, CONSTANT = "linear_warmup_cosine_lr", "constant_lr"


def rates_of(make: Any, steps: int, rate: float, **settings: int) -> list[float]:
    """The rates with which a schedule of transformers takes its steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=rate)
    schedule = make(optimizer, **settings)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("compat", FROM_ZERO)
@pytest.mark.parametrize(("total", "ratio"), [(100, 0.03), (7, 0.03), (50, 0.0), (33, 1.0), (1, 0.5)])
def test_rates_are_those_of_transformers(compat: str, total: int, ratio: float) -> None:
    run = RunConfig(init_lr=2e-4, warmup_ratio=ratio, compat=compat)
    warmup = warmup_steps(run, total)
    cosine = rates_of(get_cosine_schedule_with_warmup, total, 2e-4, num_warmup_steps=warmup, num_training_steps=total)
    ours = make_schedule(run, total, total)
    assert [ours(step) for step in range(total)] == pytest.approx(cosine, rel=1e-14, abs=0)
    run.lr_sched = CONSTANT
    constant = rates_of(get_constant_schedule_with_warmup, total, 2e-4, num_warmup_steps=warmup)
    ours = make_schedule(run, total, total)
    assert [ours(step) for step in range(total)] == pytest.approx(constant, rel=1e-14, abs=0)


@pytest.mark.parametrize(("total", "ratio", "steps"), [(5197, 0.03, 156), (100, 0.03, 3), (10, 0.01, 1), (10, 0.0, 0)])
def test_a_share_is_rounded_up(total: int, ratio: float, steps: int) -> None:
    assert warmup_steps(RunConfig(warmup_ratio=ratio), total) == steps
    shared, counted = RunConfig(warmup_ratio=ratio), RunConfig(warmup_steps=steps)
    for lr_sched in (COSINE, CONSTANT, "linear_warmup_step_lr"):
        shared.lr_sched = counted.lr_sched = lr_sched
        one, other = (make_schedule(run, total, total) for run in (shared, counted))
        assert [one(step) for step in range(10)] == [other(step) for step in range(10)]
    assert shared.warmup_ratio == ratio, "the settings stay as they were given"


def test_without_compat_the_first_step_moves() -> None:
    assert make_schedule(RunConfig(init_lr=1.0, warmup_steps=4), 10, 10)(0) == 0.25
    assert make_schedule(RunConfig(init_lr=1.0, warmup_steps=4, compat="llava"), 10, 10)(0) == 0


def test_only_one_of_both_can_be_given(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    tiny_experiment["run"] |= {"warmup_ratio": 0.03, "warmup_steps": 10}
    message = re.escape("run: warmup_ratio 0.03 and warmup_steps 10: give one only")
    with pytest.raises(ConfigError, match=message):
        load_config(write_yaml(tmp_path / "x.yaml", tiny_experiment))
