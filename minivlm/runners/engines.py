"""How a step runs on one process or on several; :mod:`minivlm.runners.deepspeed_engine` stands beside these two."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from minivlm.checkpoints.native import CheckpointError, load_weights
from minivlm.config.experiment import RunConfig
from minivlm.models.vlm import VisionLanguageModel
from minivlm.runners.precision import autocast

EVALUATION_TIMEOUT = timedelta(hours=6)
"""The other processes wait this long while the first one evaluates."""


STATE = "optimizer.pt"


class EngineError(ValueError):
    """An engine that cannot run here."""


def trained(groups: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The names of what trains, group by group."""
    return [group["param_names"] for group in groups]


def check_trained(folder: Path, then: list[list[str]], now: list[list[str]]) -> None:
    """Raise :class:`CheckpointError` if a state is kept for other parameters, or for other groups of them.

    It is kept by number, so that the sizes alone may fit.
    """
    if then == now:
        return
    regrouped = set(chain.from_iterable(then)) == set(chain.from_iterable(now))
    what, setting = ("groups of ", "run.lr_multi") if regrouped else ("", "freeze settings")
    raise CheckpointError(
        f"{folder}: the optimiser's state belongs to other {what}trainable parameters; resume with the same "
        f"{setting}, or start anew with run.resume=none"
    )


class SingleEngine:
    """One process, one device."""

    rank = 0
    world = 1
    evaluates_together = False
    """Whether an evaluation needs all processes, since each holds only a part of the weights."""

    def __init__(self, device: torch.device, precision: str):
        self.device, self.precision = device, precision
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def place(self, model: VisionLanguageModel) -> None:
        """Bring a model that was just built to where it is trained."""
        model.to(self.device)

    def optimizer(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> Optimizer:
        """AdamW over parameter groups, each with its ``lr``."""
        return AdamW(groups, betas=betas, fused=self.device.type in ("cpu", "cuda"))

    def prepare(self, model: VisionLanguageModel, optimizer: Optimizer, *, cached: bool = False) -> Any:
        """What is called with a batch in training and gives a :class:`VLMOutput` with its ``loss_sum``.

        ``cached``: the features come from a cache, so that what computes them is not run.
        """
        return model

    def autocast(self) -> Any:
        """The context of a forward pass."""
        return autocast(self.precision, self.device)

    def evaluation(self, model: VisionLanguageModel) -> Any:
        """The context of an evaluation during a training or behind it."""
        return self.autocast()

    def accumulate(self, module: nn.Module, last: bool) -> Any:
        """The context of a micro batch; gradients are exchanged in the last one only."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a summed loss that was divided by the tokens of all processes."""
        self.scaler.scale(loss * self.world).backward()  # DDP averages over processes; we want the sum

    def step(self, optimizer: Optimizer, max_norm: float | None, finite: bool) -> float:
        """Clip the gradients and update the weights; returns the norm of all gradients before clipping.

        A step without a ``finite`` loss, or with a norm that is not, changes no weight.
        """
        self.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm))
        if finite and math.isfinite(norm):
            self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def weights(self, model: VisionLanguageModel, keys: Sequence[str]) -> dict[str, Tensor]:
        """Tensors of the model by their names in its state, whole, where they are to be written (the first process)."""
        state = model.state_dict()
        return {key: state[key] for key in keys}

    def load_weights(self, model: VisionLanguageModel, folder: Path) -> None:
        """Fill a model that has been trained with weights that this run has written."""
        load_weights(model, folder)

    def save_state(self, folder: Path, optimizer: Optimizer) -> None:
        """Write the state of optimiser and loss scaler; every process is asked."""
        if self.rank == 0:
            torch.save({"optimizer": optimizer.state_dict(), "scaler": self.scaler.state_dict()}, folder / STATE)

    def load_state(self, folder: Path, optimizer: Optimizer) -> None:
        """Read what :meth:`save_state` wrote, behind :meth:`prepare`.

        Raises :class:`CheckpointError` for the state of another engine or of other trainable parameters.
        """
        if not (folder / STATE).is_file():
            raise CheckpointError(f"{folder} was written with run.engine: deepspeed; {go_on_with(folder)}")
        saved = torch.load(folder / STATE, map_location="cpu", weights_only=True)
        check_trained(folder, trained(saved["optimizer"]["param_groups"]), trained(optimizer.param_groups))
        optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])

    def close(self) -> None:
        """Give back what a stage has held."""

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes, in double precision."""
        return list(values)

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in the order of their ranks."""
        return [value]

    def barrier(self) -> None:
        """Wait for all processes."""


class DDPEngine(SingleEngine):
    """Several processes with a copy of the model each (torch DistributedDataParallel, Li et al. 2020)."""

    def __init__(self, device: torch.device, precision: str):
        super().__init__(device, precision)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def prepare(self, model: VisionLanguageModel, optimizer: Optimizer, *, cached: bool = False) -> Any:
        """The model wrapped; frozen parts have no gradients to exchange and no buffers that change.

        What lies on a device of another type (an encoder whose features are cached) is left to itself. An encoder that
        trains has norms behind the layer that is taken, and sees no batch of text alone: parameters may be left out.
        """
        some_unused = not model.is_frozen("vision_encoder")
        named = chain(model.named_parameters(), model.named_buffers())
        elsewhere = [name for name, tensor in named if tensor.device.type != self.device.type]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, elsewhere)
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=some_unused)

    def accumulate(self, module: nn.Module, last: bool) -> Any:
        """No exchange of gradients before the last micro batch."""
        return nullcontext() if last else module.no_sync()  # type: ignore[operator]

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes, in double precision."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in the order of their ranks."""
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value)
        return gathered

    def barrier(self) -> None:
        """Wait for all processes."""
        dist.barrier()


def make_engine(run: RunConfig, device: torch.device, precision: str, *, trains: bool = True) -> SingleEngine:
    """The engine of ``run.engine``; ``auto`` is ddp under torchrun and single otherwise.

    DeepSpeed only trains; what else is done holds the whole model.
    """
    name = "auto" if run.engine == "deepspeed" and not trains else run.engine
    under_torchrun = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if name == "single" or (name == "auto" and not under_torchrun):
        return SingleEngine(device, precision)
    if name == "deepspeed":
        from minivlm.runners.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(join_processes(device), precision, run)
    if not under_torchrun:
        raise EngineError("run.engine: ddp needs torchrun: torchrun --nproc-per-node N train.py --cfg-path ...")
    return DDPEngine(join_processes(device), precision)


def join_processes(device: torch.device) -> torch.device:
    """Make this process one of its group, which may have no other member; returns its own device."""
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        others = alone if "WORLD_SIZE" not in os.environ else {}
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=EVALUATION_TIMEOUT, **others)
    return device


def go_on_with(folder: Path) -> str:
    """What to do with a checkpoint that this run cannot go on from."""
    return f"go on with that, or start anew from its weights with model.checkpoint={folder} run.resume=none"
