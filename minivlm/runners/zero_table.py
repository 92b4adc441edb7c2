"""What a process holds under each level of ZeRO (Rajbhandari et al. 2020), counted from shapes, by number of processes.

In mixed precision a parameter that trains takes 2 bytes, its gradient 2, and the optimiser's state 12: the weight in
fp32 and two moments (section 3.1). Level 1 shares the state out among all processes, level 2 the gradients as well,
level 3 also the weights, those of frozen parts too (section 5). With offload, what is shared out lies in host memory
(Ren et al. 2021); gradients are kept in fp32 there, as DeepSpeed does.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from rich.table import Table
from torch import nn

from minivlm.config.experiment import StageConfig
from minivlm.io import readable_size
from minivlm.models.vlm import VisionLanguageModel
from minivlm.runners.gpu_table import CARDS, USABLE
from minivlm.runners.memory import CUDA_CONTEXT, GIB, training_uses

PROCESSES = (1, 8, 16, 32)
"""The numbers of GPUs that Mini-Gemini was trained on, and one."""
LARGE = 10**9
"""A model with more parameters is seldom trained without ZeRO."""
LIVE = 10**9
"""DeepSpeed's stage3_max_live_parameters: so many weights, gathered for use, may lie on a device at level 3."""
HOST_GRADIENT = 4


@dataclass(frozen=True)
class Level:
    """A way to share a model out; ``setting`` is its name in ``run.deepspeed``."""

    name: str
    stage: int
    offload: bool = False

    @property
    def setting(self) -> str:
        """Its name in ``run.deepspeed``."""
        return f"zero{self.stage}" + "_offload" * self.offload


LEVELS = (
    Level("no sharding", 0),
    Level("ZeRO-1", 1),
    Level("ZeRO-2", 2),
    Level("ZeRO-2, offload", 2, offload=True),
    Level("ZeRO-3", 3),
    Level("ZeRO-3, offload", 3, offload=True),
)


@dataclass(frozen=True)
class Need:
    """Bytes of one process on its device and in host memory."""

    device: float
    host: float = 0.0

    @property
    def smallest_card(self) -> int | None:
        """The smallest of ``CARDS``, in GiB, that takes it; None if none does."""
        return next((card for card in CARDS if self.device <= USABLE * card * GIB), None)


@dataclass(frozen=True)
class States:
    """What a training holds before anything is shared out: counts of parameters, and bytes."""

    trainable: int
    """Parameters that train."""
    frozen: float
    """Bytes of the weights that do not."""
    activations: float
    """Bytes of a micro batch, which no level shares out."""
    live: float
    """Bytes of the weights that level 3 gathers at a time."""
    width: int = 2
    """Bytes of a weight that trains, and of its gradient; 4 without mixed precision."""

    @classmethod
    def of(cls, stage: StageConfig, model: VisionLanguageModel, precision: str, length: int) -> States:
        """Those of a stage whose samples have ``length`` tokens; ``model`` may lie on the meta device."""
        settings = stage.model.language_model and stage.model.language_model.config
        width = 4 if precision == "fp32" else 2
        uses = training_uses(
            model,
            tokens=stage.run.batch_size_train * length,
            pictures=stage.run.batch_size_train,
            half=width == 2,
            checkpointing=bool(getattr(settings, "gradient_checkpointing", False)),
            quantization=getattr(settings, "quantization", None),
            cached=stage.run.feature_cache is not None,
        )
        trainable = [p for p in model.parameters() if p.requires_grad]
        count = sum(p.numel() for p in trainable)
        frozen = uses["weights"] - sum(p.numel() * p.element_size() for p in trainable)
        whole = frozen + width * count
        live = min(whole, max(width * LIVE, _largest_block(model, width)))
        return cls(count, frozen, uses["activations"], live, width)

    def need(self, level: Level, processes: int) -> Need:
        """What one of so many processes holds."""
        moments = 8 + 4 * (self.width == 2)  # and the weight in fp32, where it is not there already
        weights = self.frozen + self.width * self.trainable
        shared, whole, host = 0.0, self.activations + CUDA_CONTEXT, 0.0
        for begins, size in ((1, moments * self.trainable), (2, self.width * self.trainable), (3, weights)):
            if level.stage < begins:
                whole += size
            elif level.offload:
                host += HOST_GRADIENT * self.trainable if begins == 2 else size
            else:
                shared += size
        if level.stage == 3:
            whole += self.live if level.offload or processes > 1 else 0.0
        return Need(whole + shared / processes, host / processes)


def _largest_block(model: VisionLanguageModel, width: int) -> int:
    """Bytes of the largest block of a list of them, whose weights are all needed at a time."""

    def size(block: nn.Module) -> int:
        return sum(p.numel() * (width if p.requires_grad else p.element_size()) for p in block.parameters())

    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return max((size(block) for blocks in lists for block in blocks), default=0)


def wants_zero_table(stage: StageConfig, model: VisionLanguageModel) -> bool:
    """Whether the levels matter: under DeepSpeed, and where a large model trains."""
    trains = any(parameter.requires_grad for parameter in model.parameters())
    large = sum(parameter.numel() for parameter in model.parameters()) > LARGE
    return trains and (stage.run.engine == "deepspeed" or large)


def zero_table(stage: StageConfig, model: VisionLanguageModel, precision: str, length: int) -> Table:
    """A row for each level, a column for each number of processes, that of torchrun too."""
    states = States.of(stage, model, precision, length)
    counts = sorted({*PROCESSES, int(os.environ.get("WORLD_SIZE", "1"))})
    chosen = stage.run.deepspeed
    headings = (f"{count} process{'es' * (count > 1)}" for count in counts)
    table = Table("", *headings, title="memory of a process under ZeRO, estimated")
    for level in LEVELS:
        needs = [states.need(level, count) for count in counts]
        mark = " (run.deepspeed)" if level.setting == chosen else ""
        table.add_row(f"{level.name}{mark}", *(readable_size(need.device) for need in needs))
        if level.offload:
            table.add_row("  host memory", *(readable_size(need.host) for need in needs))
        cards = (need.smallest_card for need in needs)
        table.add_row("  fits", *(f"{card} GB" if card else "no card" for card in cards), end_section=True)
    table.caption = (
        f"{states.trainable:,} parameters train, {readable_size(states.frozen)} are frozen; of each process "
        f"{readable_size(states.activations)} are activations (micro batch {stage.run.batch_size_train}, samples of "
        f"{length} tokens with one picture, {precision}); host memory counts for every process of a machine"
    )
    return table
