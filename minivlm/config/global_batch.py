"""The rule of the published recipes: global batch = samples per process x accumulation x processes."""

from __future__ import annotations

from minivlm.config.errors import ConfigError, Problem
from minivlm.config.experiment import RunConfig


def accumulation(run: RunConfig, processes: int) -> int:
    """Micro batches per optimiser step of each process: ``accum_grad_iters``, or what ``global_batch_size`` asks for.

    Raises :class:`ConfigError` if no whole number of them makes up the global batch, or another is given.
    """
    if run.global_batch_size is None:
        return run.accum_grad_iters or 1
    asked, rest = divmod(run.global_batch_size, run.batch_size_train * processes)
    if rest or not asked:
        raise ConfigError([Problem("", None, "run.global_batch_size", _misfit(run, processes))])
    if run.accum_grad_iters not in (None, asked):
        message = (
            f"{run.accum_grad_iters}, but a global batch of {run.global_batch_size} is {run.batch_size_train} per "
            f"process x {asked} accumulation x {counted(processes)}; leave out run.accum_grad_iters or "
            "run.global_batch_size"
        )
        raise ConfigError([Problem("", None, "run.accum_grad_iters", message)])
    return asked


def describe_global_batch(run: RunConfig, processes: int) -> str:
    """The rule with its numbers, and the accumulation with which other numbers of processes have the same batch."""
    here = accumulation(run, processes)
    whole = run.batch_size_train * here * processes
    others = []
    for count in (1, 2, 4, 8):
        share, rest = divmod(whole, run.batch_size_train * count)
        if count != processes and not rest:
            others.append(f"{share} on {counted(count)}")
    rule = f"global batch {whole} = {run.batch_size_train} per process x {here} accumulation x {counted(processes)}"
    return f"{rule} (the same: accumulation {', '.join(others)})" if others else rule


def _misfit(run: RunConfig, processes: int) -> str:
    share, rest = divmod(run.global_batch_size or 0, processes)
    if rest:
        return f"{run.global_batch_size} samples cannot be shared evenly by {processes} processes"
    fitting = sorted((n for n in range(1, share + 1) if share % n == 0), key=lambda n: abs(n - run.batch_size_train))
    proposed = ", ".join(map(str, sorted(fitting[:4])))
    return (
        f"{run.global_batch_size} is not {run.batch_size_train} per process x a whole number x {counted(processes)}; "
        f"run.batch_size_train of {proposed} would fit"
    )


def counted(processes: int) -> str:
    """So many processes, in words."""
    return f"{processes} process{'es' if processes > 1 else ''}"
