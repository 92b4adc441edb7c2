"""Learning-rate schedules: from a step number to the rate of ``run.init_lr``'s parts.

Each takes the run's settings, the number of steps of the whole run and of an epoch. The warm-up rises
linearly over the whole run's first steps, however long an epoch is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from minivlm.config.experiment import RunConfig

Schedule = Callable[[int], float]


def _with_warmup(run: RunConfig, after: Schedule) -> Schedule:
    start = run.init_lr if run.warmup_lr < 0 else run.warmup_lr

    def rate(step: int) -> float:
        if step < run.warmup_steps:
            return min(run.init_lr, start + (run.init_lr - start) * (step + 1) / run.warmup_steps)
        return after(step)

    return rate


def linear_warmup_cosine_lr(run: RunConfig, total_steps: int, steps_per_epoch: int) -> Schedule:
    """Warm-up, then half a cosine from init_lr to min_lr at the last step (Loshchilov and Hutter 2017)."""
    span = max(total_steps - run.warmup_steps, 1)

    def cosine(step: int) -> float:
        done = min((step - run.warmup_steps) / span, 1.0)
        return run.min_lr + (run.init_lr - run.min_lr) * 0.5 * (1 + math.cos(math.pi * done))

    return _with_warmup(run, cosine)


def linear_warmup_step_lr(run: RunConfig, total_steps: int, steps_per_epoch: int) -> Schedule:
    """Warm-up, then init_lr times ``lr_decay_rate`` to the power of the epoch, not below min_lr."""
    decay = 1.0 if run.lr_decay_rate is None else run.lr_decay_rate
    return _with_warmup(run, lambda step: max(run.min_lr, run.init_lr * decay ** (step // steps_per_epoch)))


def constant_lr(run: RunConfig, total_steps: int, steps_per_epoch: int) -> Schedule:
    """Warm-up, then init_lr."""
    return _with_warmup(run, lambda step: run.init_lr)
