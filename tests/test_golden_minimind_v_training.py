"""Training of the original MiniMind-V, reproduced: schedules, what trains, losses and gradient norms step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_minimind import (
    MODELS,
    Compared,
    compared,
    expected,
    golden_json,
    has_experts,
    is_first,
    is_whole,
    section,
    v1_batch,
    v3_batch,
    weights,
)

from minivlm.api import assemble
from minivlm.checkpoints.minimind import V3
from minivlm.config.experiment import ModelConfig, RunConfig
from minivlm.config.loader import parse_model
from minivlm.models.tuning import parameter_groups
from minivlm.models.vlm import VisionLanguageModel
from minivlm.runners.schedules import make_schedule

__all__ = ["compared"]
CURVE = 1e-3
BALANCE: dict[str, Any] = {"router_loss": 5e-4, "router_loss_form": "per_layer"}


@pytest.mark.parametrize("generation", sorted({name.split("/")[0] for name in MODELS}))
def test_golden_minimind_v_schedules(compared: Compared, generation: str) -> None:
    """The rate of a step, down to a tenth; the newest counts from 1."""
    for case in golden_json(f"{generation}/expected.json").get("lr_schedule", []):
        first = "warmup" in case
        run = RunConfig(
            init_lr=case["base"],
            min_lr=case["base"] / 10,
            warmup_steps=case.get("warmup", 0),
            compat="minimind_v1" if first else "minimind_v3",
        )
        schedule = make_schedule(run, case["total"], case["total"])
        for step in map(int, case["values"]):
            if first or step:
                compared.close(schedule(step if first else step - 1), case["values"][str(step)], 1e-12, relative=1e-9)


FROZEN: dict[int, Any] = {0: None, 1: ["*", "!*.layers.0.*", "!*.layers.-1.*"], 2: True}
"""``language_model.freeze`` for the original's freeze_llm."""


def training(name: str, mode: int = 0, **language: Any) -> tuple[VisionLanguageModel, ModelConfig]:
    """A golden model in train mode and its section."""
    given = section(name, **language)
    given["language_model"]["freeze"] = FROZEN[mode]
    config = parse_model(given, "golden set")
    config.checkpoint = str(weights(name))
    model, _, config = assemble(config)
    return model.train(), config


def trajectory(name: str, mode: int = 0) -> Any:
    """What the original found step by step; None if the set has none for this model."""
    numbers, _, own = expected(name)
    if is_first(name):
        return numbers.get(f"{own}/train_trajectory") if not mode else None
    return numbers.get("train_trajectory", {}).get(f"{own}_freeze{mode}")


TRAJECTORIES = [(name, mode) for name in MODELS for mode in range(3) if trajectory(name, mode)]
"""Models and freeze modes."""


@pytest.mark.parametrize(("name", "mode"), [(n, m) for n, m in TRAJECTORIES if not is_first(n)])
def test_golden_minimind_v_freeze_modes(compared: Compared, name: str, mode: int) -> None:
    """What trains, by the original's names."""
    about = trajectory(name, mode)
    model, _ = training(name, mode)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    compared.equal(sum(p.numel() for p in trained.values()), about["trainable"])
    compared.equal(sorted(V3.back(trained)[0]), sorted(about["trainable_names"]))


@pytest.mark.parametrize(("name", "mode"), [(name, mode) for name, mode in TRAJECTORIES if is_whole(name)])
def test_golden_minimind_v_training(compared: Compared, name: str, mode: int) -> None:
    """Six steps: Adam and a first rate of 0, or AdamW with a rate counted from 1 and the experts' balance loss."""
    about = trajectory(name, mode)
    base = about.get("base_lr", 4e-4)
    run = RunConfig(
        init_lr=base,
        min_lr=base / 10,
        warmup_steps=about.get("warmup_iters", 0),
        compat="minimind_v1" if is_first(name) else "minimind_v3",
        weight_decay=0.0 if is_first(name) else 0.01,
    )
    balanced = has_experts(name) and not is_first(name)
    model, config = training(name, mode, **(BALANCE if balanced else {}))
    batch, mask = v1_batch(name, "pretrain") if is_first(name) else (v3_batch(name, "single"), None)
    schedule = make_schedule(run, len(about["steps"]), len(about["steps"]))
    optimizer = torch.optim.AdamW(parameter_groups(model, config, base, run.weight_decay))
    for number, step in enumerate(about["steps"]):
        lr = schedule(number)
        compared.close(lr, step["lr"], 1e-12, relative=1e-9)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        optimizer.zero_grad()
        output = model(batch)
        assert output.loss_sum is not None
        loss = output.loss_sum / (output.token_count if mask is None else mask.sum())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        if balanced:
            compared.close(output.router_loss * BALANCE["router_loss"], step["aux"], 1e-6, "balance", CURVE)
        compared.close(loss, step["loss"], 0, "loss", CURVE)
        compared.close(norm, step["grad_norm_before_clip"], 0, "gradient norm", CURVE)
        optimizer.step()


def test_what_no_gradient_reaches_does_not_train() -> None:
    """The bias of ERNIE's router, which MiniMind-V has not; else every process would wait for its gradient."""
    for name in (name for name in MODELS if is_first(name) and has_experts(name)):
        model, _ = training(name)
        model(v1_batch(name, "sft")[0]).loss.backward()
        without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert without == []
        fixed = [n for n, p in model.language_model.named_parameters() if not p.requires_grad]
        assert fixed and all(n.endswith("e_score_correction_bias") for n in fixed)
