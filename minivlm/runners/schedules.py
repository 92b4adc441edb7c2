"""Learning-rate schedules: from a step number to the rate of ``run.init_lr``'s parts.

Each takes the run's settings, the number of steps of the whole run and of an epoch. The warm-up rises
linearly over the whole run's first steps, however long an epoch is.

``run.compat`` brings back how a published system counted. ``minigpt4``: the warm-up counts the steps
inside of an epoch, so one that is longer than an epoch starts again; the cosine counts from the start of
the run, so the rate drops where the warm-up ends. ``lavis``: the warm-up belongs to the first epoch, and
behind it the rate changes from epoch to epoch only. ``llava``, ``imp`` and ``imp_v1``: as transformers counts, whose
first step has the rate 0 (``warmup_lr``) and the first one behind the warm-up init_lr. ``minimind_v1`` counts in the
same way; ``minimind_v3`` counts the steps of the cosine from 1, so that the last one has min_lr.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from minivlm import registry
from minivlm.config.experiment import RunConfig

Schedule = Callable[[int], float]
BY_EPOCH = ("minigpt4", "lavis")
"""Values of ``run.compat`` for systems that warm up in the first epoch only."""
FROM_ZERO = ("llava", "imp", "imp_v1", "minimind_v1")
"""Values of ``run.compat`` for systems whose warm-up begins with the rate 0, as that of transformers does."""


def make_schedule(run: RunConfig, total_steps: int, steps_per_epoch: int) -> Schedule:
    """The schedule ``run.lr_sched``, which is given its warm-up in steps."""
    counted = replace(run, warmup_steps=warmup_steps(run, total_steps), warmup_ratio=None)
    return registry.get("lr_scheduler", run.lr_sched)(counted, total_steps, steps_per_epoch)


def warmup_steps(run: RunConfig, total_steps: int) -> int:
    """Steps of the warm-up; a share of all steps is rounded up, as transformers does."""
    return run.warmup_steps if run.warmup_ratio is None else math.ceil(total_steps * run.warmup_ratio)


def linear_warmup_cosine_lr(run: RunConfig, total_steps: int, steps_per_epoch: int) -> Schedule:
    """Warm-up, then half a cosine from init_lr to min_lr at the last step (Loshchilov and Hutter 2017)."""
    if run.compat == "minigpt4":
        whole = run.max_epoch * steps_per_epoch  # run.max_steps cuts the schedule, it does not squeeze it
        return lambda step: (
            _warm_up(run, step % steps_per_epoch) if step < run.warmup_steps else _cosine(run, step / whole)
        )
    if run.compat == "lavis":
        return _first_epoch(run, steps_per_epoch, lambda epoch: _cosine(run, epoch / run.max_epoch))
    span = max(total_steps - run.warmup_steps, 1)
    first = 1 if run.compat == "minimind_v3" else 0
    return _first_steps(run, lambda step: _cosine(run, (step + first - run.warmup_steps) / span))


def linear_warmup_step_lr(run: RunConfig, total_steps: int, steps_per_epoch: int) -> Schedule:
    """Warm-up, then init_lr times ``lr_decay_rate`` to the power of the epoch, not below min_lr."""
    decay = 1.0 if run.lr_decay_rate is None else run.lr_decay_rate

    def of_epoch(epoch: int) -> float:
        return max(run.min_lr, run.init_lr * decay**epoch)

    if run.compat in BY_EPOCH:
        return _first_epoch(run, steps_per_epoch, of_epoch)
    return _first_steps(run, lambda step: of_epoch(step // steps_per_epoch))


def constant_lr(run: RunConfig, total_steps: int, steps_per_epoch: int) -> Schedule:
    """Warm-up, then init_lr."""
    if run.compat in BY_EPOCH:
        return _first_epoch(run, steps_per_epoch, lambda epoch: run.init_lr)
    return _first_steps(run, lambda step: run.init_lr)


def _first_steps(run: RunConfig, after: Schedule) -> Schedule:
    """The warm-up, whose last step has init_lr, in front of ``after``, which takes the step of the run."""
    first = 0 if run.compat in FROM_ZERO else 1
    return lambda step: _warm_up(run, step + first) if step < run.warmup_steps else after(step)


def _first_epoch(run: RunConfig, steps_per_epoch: int, after: Callable[[int], float]) -> Schedule:
    """The first epoch warms up and then keeps init_lr; ``after`` takes the number of a later epoch."""

    def rate(step: int) -> float:
        epoch, inside = divmod(step, steps_per_epoch)
        return after(epoch) if epoch else _warm_up(run, inside)

    return rate


def _warm_up(run: RunConfig, done: int) -> float:
    """The rate behind ``done`` steps of the warm-up; init_lr once it is over."""
    start = run.init_lr if run.warmup_lr < 0 else run.warmup_lr
    return min(run.init_lr, start + (run.init_lr - start) * done / max(run.warmup_steps, 1))


def _cosine(run: RunConfig, done: float) -> float:
    """From init_lr (``done`` 0) to min_lr (``done`` 1)."""
    return run.min_lr + (run.init_lr - run.min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
