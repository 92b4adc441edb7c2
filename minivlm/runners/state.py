"""Checkpoints of a running training: written whole, found again, exact to the bit."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minivlm.checkpoints.native import CheckpointError
from minivlm.io import TEMPORARY, write_json


@dataclass
class TrainState:
    """Where a training stands. ``consumed`` counts global micro batches, ``best`` the best metric so far.

    ``data`` tells the data and the batches apart whose numbers ``consumed`` counts. ``processes`` holds for every
    process where its streams stand and how many bad samples it met.
    """

    step: int = 0
    consumed: int = 0
    best: float | None = None
    best_step: int | None = None
    precision: str = ""
    world: int = 1
    data: str = ""
    processes: list[dict[str, Any]] = field(default_factory=list)


def random_state() -> dict[str, Any]:
    """The state of every random generator of this process."""
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": json.dumps(random.getstate()),
        "numpy": json.dumps([x.tolist() if hasattr(x, "tolist") else x for x in np.random.get_state()]),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Set every random generator as it was."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = json.loads(state["python"])
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(json.loads(state["numpy"])))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_everything(seed: int) -> None:
    """Seed the generators of this process; the same on every process, since data are drawn by position."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def write_state(folder: Path, state: TrainState, rngs: list[dict[str, Any]]) -> None:
    """Write what resuming needs beside the model and the optimiser: random generators and position."""
    torch.save(rngs, folder / "random.pt")
    write_json(folder / "state.json", asdict(state))


def read_state(folder: Path) -> TrainState:
    """The position of a checkpoint; raises :class:`CheckpointError` if the folder is none."""
    try:
        raw = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no training checkpoint: {error}") from error
    return TrainState(**{key: value for key, value in raw.items() if key in TrainState.__dataclass_fields__})


def restore(folder: Path, engine: Any, optimizer: Any) -> None:
    """Fill optimiser, loss scaler and this process's random generators from a checkpoint."""
    asked = [{key: group[key] for key in ("weight_decay", "betas", "lr_scale")} for group in optimizer.param_groups]
    engine.load_state(folder, optimizer)
    for group, settings in zip(optimizer.param_groups, asked, strict=True):
        group.update(settings)  # this run's, should they have been changed
    rngs = torch.load(folder / "random.pt", weights_only=True)
    restore_random_state(rngs[engine.rank % len(rngs)])


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints below a stage's folder, oldest first."""
    return sorted(p for p in folder.glob("step_*") if (p / "state.json").is_file())


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest checkpoints, and what an interrupted save left behind."""
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    for unfinished in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(unfinished, ignore_errors=True)
