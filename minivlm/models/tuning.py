"""What trains: freezing by part and by glob, learning rates by glob, and the optimiser's parameter groups.

Globs match the names of checkpoints, in which layers may also be counted from the end: ``*.layers.-1.*`` is the last.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
_NUMBER = re.compile(r"(?<![^.])\d+(?=\.)")


def apply_freeze(part: str, module: PartModule, freeze: bool | list[str] | None) -> None:
    """Set ``requires_grad`` of a part's parameters: all, or those that a list of globs leaves out.

    Of several globs that match a name the last one counts, and one behind ``!`` lets it train, as in a .gitignore
    file: ``["*", "!high.stages.*"]`` freezes all but those. Of a part with adapters (its ``adapter_parameters``) the
    base never trains, and the adapters train unless a glob names them: ``freeze: true`` means the base. What trains is
    not kept in half precision, where small updates vanish (of bf16 the most): the whole part becomes fp32. Raises
    :class:`ModelError` for a glob that matches nothing, and for a part that is asked to train and cannot.
    """
    if not module.can_train:
        if freeze not in (None, True):
            raise ModelError(f"model.{part}.freeze: this part cannot train; leave `freeze` out or set it to true")
        return
    named = list(module.named_parameters())
    spelled = spellings(name for name, _ in named)
    globs = freeze if isinstance(freeze, list) else []
    for glob in globs:
        if not any(_matches(names, glob.removeprefix("!")) for names in spelled.values()):
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
        trains = name in adapters if adapters else freeze is not True and name not in module.fixed_parameters
        parameter.requires_grad_(trains and not _is_frozen_by(globs, spelled[name]))
    if any(parameter.requires_grad and parameter.dtype in _HALF for _, parameter in named):
        module.float()


def spellings(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """By parameter: its name in a checkpoint, and that with its (outermost) layer counted from the end."""
    found = {name: file_name(name) for name in names}
    layers = {name: match for name, own in found.items() if (match := _NUMBER.search(own))}
    counts: Counter[str] = Counter()
    for match in layers.values():
        before = match.string[: match.start()]
        counts[before] = max(counts[before], int(match[0]) + 1)

    def from_end(match: re.Match[str]) -> str:
        before = match.string[: match.start()]
        return f"{before}{int(match[0]) - counts[before]}{match.string[match.end() :]}"

    return {name: (own, *([from_end(layers[name])] if name in layers else [])) for name, own in found.items()}


def _matches(names: Sequence[str], glob: str) -> bool:
    return any(fnmatchcase(name, glob) for name in names)


def _is_frozen_by(globs: Sequence[str], names: Sequence[str]) -> bool:
    last = next((glob for glob in reversed(globs) if _matches(names, glob.removeprefix("!"))), "!")
    return not last.startswith("!")


def lr_factors(model: VisionLanguageModel, lr_multi: Mapping[str, float]) -> dict[str, float]:
    """Factor on the learning rate by the name of a trainable parameter; those that no glob matches are left out.

    Names are those of checkpoints, and the first glob that matches counts. Raises :class:`ModelError` for a glob that
    matches no trainable parameter, unless its factor is 1, by which a stage undoes what a file below it says.
    """
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    spelled = spellings(name for name, _ in model.named_parameters())
    factors: dict[str, float] = {}
    for glob, factor in lr_multi.items():
        matched = [name for name in trainable if _matches(spelled[name], glob)]
        if not matched and factor != 1:
            raise ModelError(
                f"run.lr_multi: '{glob}' matches no parameter that trains; names look like "
                + (", ".join(file_name(name) for name in trainable[:3]) or "nothing, since all is frozen")
            )
        for name in matched:
            factors.setdefault(name, factor)
    return factors


@dataclass
class PartRow:
    """One line of the table of what trains; ``rates`` says how many parameters have each peak learning rate."""

    part: str
    parameters: int
    trainable: int
    dtype: str
    rates: dict[float, int]


def part_table(
    model: VisionLanguageModel, model_config: Any, init_lr: float, lr_multi: Mapping[str, float] | None = None
) -> list[PartRow]:
    """Part by part: parameters, how many train, their type and their learning rates."""
    factors = lr_factors(model, lr_multi or {})
    rows = []
    for part in PARTS:
        named = list(getattr(model, part).named_parameters())
        lr = getattr(model_config, part).init_lr or init_lr
        rates: Counter[float] = Counter()
        for name, p in named:
            if p.requires_grad:
                rates[lr * factors.get(f"{part}.{name}", 1.0)] += p.numel()
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for _, p in named})
        count = sum(p.numel() for _, p in named)
        rows.append(PartRow(part, count, rates.total(), ", ".join(dtypes), dict(sorted(rates.items()))))
    return rows


def parameter_groups(
    model: VisionLanguageModel,
    model_config: Any,
    init_lr: float,
    weight_decay: float,
    lr_multi: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Groups for AdamW: per part with and without weight decay and by factor of its rate, each with ``lr_scale``.

    Biases, norms and embeddings' one-dimensional parameters do not decay; the module's class decides,
    not a part of its name. ``lr_multi`` is that of :func:`lr_factors`. Raises :class:`ModelError` when nothing trains.
    """
    factors = lr_factors(model, lr_multi or {})
    groups = []
    for part in PARTS:
        module = getattr(model, part)
        undecayed = _undecayed(module)
        found: dict[tuple[bool, float], list[tuple[str, nn.Parameter]]] = {}
        for name, p in module.named_parameters():
            if p.requires_grad:
                full = f"{part}.{name}"
                found.setdefault((id(p) not in undecayed, factors.get(full, 1.0)), []).append((full, p))
        for (decays, factor), named in sorted(found.items(), key=lambda item: (not item[0][0], item[0][1])):
            lr = (getattr(model_config, part).init_lr or init_lr) * factor
            groups.append(
                {
                    "name": f"{part}{'' if factor == 1 else f' x {factor:g}'}{'' if decays else ' (no decay)'}",
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
