"""Which number format the arithmetic runs in; weights and optimiser stay in fp32."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch


class PrecisionError(ValueError):
    """A precision that the device cannot do at a bearable speed."""


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` to bf16, fp16 or fp32.

    bf16 wherever the hardware multiplies it natively: recent GPUs, and CPUs with AVX512-BF16 or AMX, where
    it is several times faster than fp32. fp16 on a CPU is hundreds of times slower and refused.
    """
    if precision == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return "bf16" if device.type == "cpu" and cpu_has_bf16() else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise PrecisionError("run.precision: fp16 is unusably slow on a CPU; use auto, bf16 or fp32")
    return precision


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bf16 natively (AVX512-BF16 or AMX)."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in checks)


def autocast(precision: str, device: torch.device) -> Any:
    """The context in which forward passes run."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)
