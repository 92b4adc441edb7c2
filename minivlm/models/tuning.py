"""What trains: freezing by part and by glob, and the optimiser's parameter groups."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from minivlm.models.base import ModelError, PartModule
from minivlm.models.lora import file_name
from minivlm.models.vlm import PARTS, VisionLanguageModel

_HALF = (torch.float16, torch.bfloat16)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def apply_freeze(part: str, module: PartModule, freeze: bool | list[str] | None) -> None:
    """Set ``requires_grad`` of a part's parameters: all, or those whose name no glob matches.

    Of a part with adapters (its ``adapter_parameters``) the base never trains, and the adapters train
    unless a glob names them: ``freeze: true`` means the base. What trains is not kept in half precision,
    where small updates vanish (of bf16 the most): the whole part becomes fp32. Raises :class:`ModelError` for a glob
    that matches nothing, and for a part that is asked to train and cannot.
    """
    if not module.can_train:
        if freeze not in (None, True):
            raise ModelError(f"model.{part}.freeze: this part cannot train; leave `freeze` out or set it to true")
        return
    named = list(module.named_parameters())
    globs = freeze if isinstance(freeze, list) else []
    for glob in globs:
        if not any(fnmatchcase(file_name(name), glob) for name, _ in named):
            raise ModelError(
                f"model.{part}.freeze: '{glob}' matches no parameter; names look like "
                + ", ".join(file_name(name) for name, _ in named[:3])
            )
    adapters = module.adapter_parameters
    if module.quantization and not adapters and freeze is not True:
        raise ModelError(
            f"model.{part}: quantised weights cannot train; set freeze: true, lora (which is QLoRA), or "
            "quantization: null"
        )
    for name, parameter in named:
        trains = name in adapters if adapters else freeze is not True
        parameter.requires_grad_(trains and not any(fnmatchcase(file_name(name), glob) for glob in globs))
    if any(parameter.requires_grad and parameter.dtype in _HALF for _, parameter in named):
        module.float()


@dataclass
class PartRow:
    """One line of the table of what trains."""

    part: str
    parameters: int
    trainable: int
    dtype: str
    init_lr: float | None


def part_table(model: VisionLanguageModel, model_config: Any, init_lr: float) -> list[PartRow]:
    """Part by part: parameters, how many train, their type and their learning rate."""
    rows = []
    for part in PARTS:
        parameters = list(getattr(model, part).parameters())
        trainable = sum(p.numel() for p in parameters if p.requires_grad)
        lr = getattr(model_config, part).init_lr or init_lr
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
        rows.append(
            PartRow(part, sum(p.numel() for p in parameters), trainable, ", ".join(dtypes), lr if trainable else None)
        )
    return rows


def parameter_groups(
    model: VisionLanguageModel, model_config: Any, init_lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for AdamW: per part with and without weight decay, each with ``lr_scale``.

    Biases, norms and embeddings' one-dimensional parameters do not decay; the module's class decides,
    not a part of its name. Raises :class:`ModelError` when nothing trains.
    """
    groups = []
    for part in PARTS:
        module = getattr(model, part)
        lr = getattr(model_config, part).init_lr or init_lr
        undecayed = _undecayed(module)
        for decays in (True, False):
            named = [
                (f"{part}.{name}", p)
                for name, p in module.named_parameters()
                if p.requires_grad and (id(p) not in undecayed) == decays
            ]
            if named:
                groups.append(
                    {
                        "name": f"{part}{'' if decays else ' (no decay)'}",
                        "params": [p for _, p in named],
                        "param_names": [name for name, _ in named],
                        "weight_decay": weight_decay if decays else 0.0,
                        "lr": lr,
                        "lr_scale": lr / init_lr,
                    }
                )
    if not groups:
        raise ModelError("nothing trains: every part is frozen; set model.<part>.freeze: false for one")
    return groups


def _undecayed(module: nn.Module) -> set[int]:
    def is_norm(child: nn.Module) -> bool:
        return isinstance(child, _NORMS) or type(child).__name__.endswith("RMSNorm")

    found: set[int] = set()
    for child in module.modules():
        parameters: Iterable[tuple[str, nn.Parameter]] = child.named_parameters(recurse=False)
        found.update(id(p) for name, p in parameters if p.ndim < 2 or is_norm(child) or name.endswith("bias"))
    return found
