"""How a step runs on one process or on several; FSDP2 and DeepSpeed will stand beside these two."""

from __future__ import annotations

import os
from contextlib import nullcontext
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from minivlm.runners.precision import autocast

EVALUATION_TIMEOUT = timedelta(hours=6)
"""The other processes wait this long while the first one evaluates."""


class EngineError(ValueError):
    """An engine that cannot run here."""


class SingleEngine:
    """One process, one device."""

    rank = 0
    world = 1

    def __init__(self, device: torch.device, precision: str):
        self.device, self.precision = device, precision
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def prepare(self, model: nn.Module, *, some_unused: bool = False) -> nn.Module:
        """The module whose forward is called in training.

        ``some_unused``: a step may leave out trainable parameters.
        """
        return model

    def autocast(self) -> Any:
        """The context of a forward pass."""
        return autocast(self.precision, self.device)

    def accumulate(self, module: nn.Module, last: bool) -> Any:
        """The context of a micro batch; gradients are exchanged in the last one only."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a summed loss that was divided by the tokens of all processes."""
        self.scaler.scale(loss * self.world).backward()  # DDP averages over processes; we want the sum

    def gradient_norm(self, optimizer: Optimizer, max_norm: float | None) -> float:
        """Norm of all gradients before clipping to ``max_norm``."""
        self.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        return float(nn.utils.clip_grad_norm_(parameters, float("inf") if max_norm is None else max_norm))

    def step(self, optimizer: Optimizer, skip: bool) -> None:
        """Update the weights, unless the step is to be skipped."""
        if not skip:
            self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)

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

    def prepare(self, model: nn.Module, *, some_unused: bool = False) -> nn.Module:
        """The model wrapped; frozen parts have no gradients to exchange and no buffers that change.

        What lies on a device of another type (an encoder whose features are cached) is left to itself.
        """
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


def make_engine(name: str, device: torch.device, precision: str) -> SingleEngine:
    """The engine of ``run.engine``; ``auto`` is ddp under torchrun and single otherwise."""
    under_torchrun = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if name == "single" or (name == "auto" and not under_torchrun):
        return SingleEngine(device, precision)
    if not under_torchrun:
        raise EngineError("run.engine: ddp needs torchrun: torchrun --nproc-per-node N train.py --cfg-path ...")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=EVALUATION_TIMEOUT)
    return DDPEngine(device, precision)
