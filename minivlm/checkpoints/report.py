"""What a file held against what a model wanted, and the error for files that do not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.models.base import ModelError

_SHOWN = 5


class CheckpointError(ModelError):
    """A file or folder that is no checkpoint, is damaged, or belongs to another model."""


@dataclass
class LoadReport:
    """Names of tensors: of the model in ``matched`` and ``missing``, of the file in the other lists.

    ``ignored`` maps a reason to the names that were left out for it. ``where`` and ``what`` name the file
    and what it is; ``still_random`` lists the parts that nothing has filled.
    """

    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    wrong_shape: list[str]
    ignored: dict[str, list[str]] = field(default_factory=dict)
    where: str = ""
    what: str = ""
    still_random: list[str] = field(default_factory=list)

    @classmethod
    def compare(
        cls,
        wanted: Mapping[str, Any],
        given: Mapping[str, Any],
        fits: Callable[[str, Any], bool] = lambda name, shape: False,
    ) -> LoadReport:
        """Compare two state dicts by name and shape; another shape is fine where ``fits(name, shape)``."""
        both = [key for key in wanted if key in given]
        wrong = {k for k in both if given[k].shape != wanted[k].shape and not fits(k, given[k].shape)}
        return cls(
            [key for key in both if key not in wrong],
            [key for key in wanted if key not in given],
            [key for key in given if key not in wanted],
            [f"{k} is {tuple(given[k].shape)}, wanted {tuple(wanted[k].shape)}" for k in both if k in wrong],
        )

    @property
    def complete(self) -> bool:
        """Whether every wanted tensor is there in its shape."""
        return not self.missing and not self.wrong_shape

    @property
    def fits(self) -> bool:
        """Whether it is complete and nothing is left over."""
        return self.complete and not self.unexpected

    @property
    def summary(self) -> str:
        """One line for the console."""
        line = f"{self.where} ({self.what}): loaded {len(self.matched)} tensors{_by_module(self.matched)}"
        if self.ignored:
            reasons = "; ".join(f"{len(names)} {reason}" for reason, names in self.ignored.items())
            line += f", ignored {sum(map(len, self.ignored.values()))} ({reasons})"
        if self.still_random:
            keys = " or ".join(f"model.{part}.weights" for part in self.still_random)
            line += f"; NOTE: no file has filled {' and '.join(self.still_random)}, random values stay (see {keys})"
        return line

    def __str__(self) -> str:
        rows = [("matched", self.matched, False), ("missing", self.missing, True)]
        rows += [("unexpected", self.unexpected, True), ("wrong shape", self.wrong_shape, True)]
        rows += [("ignored", [f"{n}: {reason}" for reason, names in self.ignored.items() for n in names], True)]
        lines = []
        for label, keys, shown in rows:
            listed = "; ".join(keys[:_SHOWN]) + ("; ..." if len(keys) > _SHOWN else "")
            if label != "ignored" or keys:
                lines.append(f"  {label:<12} {len(keys)}" + (f"  ({listed})" if keys and shown else ""))
        return "\n".join(lines)


def _by_module(names: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for name in names:
        module = ".".join(name.split(".")[:2])
        counts[module] = counts.get(module, 0) + 1
    return f" [{', '.join(f'{module} {count}' for module, count in counts.items())}]" if counts else ""


def fill(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """``load_state_dict`` of tensors that were compared before; what they lack stays as it is.

    Raises :class:`CheckpointError`, and fills nothing, if they hold two values for what is one tensor of the module: a
    head tied to the embeddings, a shared A. The last one would win without a word.
    """
    own = module.state_dict(keep_vars=True)
    names: dict[int, str] = {}
    for name in tensors.keys() & own.keys():
        other = names.setdefault(id(own[name]), name)
        if other != name and not torch.equal(tensors[other].to(tensors[name].dtype), tensors[name]):
            first, second = sorted((name, other))
            raise CheckpointError(
                f"{where}: {first} and {second} differ there, but are one tensor in this model; set "
                f"{'lora.shared_a as there' if '.lora_' in name else 'config.tie_word_embeddings: false'}"
            )
    module.load_state_dict(dict(tensors), strict=False)
