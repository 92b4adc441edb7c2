"""Settings of DeepSpeed: packaged ones by name, or a JSON file of the user's; what they leave open comes from the run.

The packaged files hold what the published Mini-Gemini and LLaVA recipes were trained with. The value "auto" means
here what it means to transformers' integration; a number that contradicts the run is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minivlm.config.errors import ConfigError, Problem
from minivlm.config.experiment import RunConfig
from minivlm.config.global_batch import accumulation, counted

PACKAGED = Path(__file__).resolve().parent.parent / "configs" / "deepspeed"
AUTO = "auto"
EPSILON = 1e-8
"""That of torch's AdamW, which all engines train with."""


def names() -> list[str]:
    """The packaged settings by name."""
    return sorted(file.stem for file in PACKAGED.glob("*.json"))


def read_deepspeed(run: RunConfig) -> dict[str, Any]:
    """What ``run.deepspeed`` names, as it is written.

    Raises :class:`ConfigError` if it is not set, no file, no JSON, or of no ZeRO stage from 1 to 3.
    """
    if run.deepspeed is None:
        raise _error(f"run.engine: deepspeed needs it: one of {', '.join(names())}, or the path of a JSON file")
    file = PACKAGED / f"{run.deepspeed}.json" if run.deepspeed in names() else Path(run.deepspeed)
    if not file.is_file():
        raise _error(f"there is no file {run.deepspeed}, and the packaged ones are {', '.join(names())}")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _error(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(settings, dict) or zero_stage(settings) not in (1, 2, 3):
        raise _error(f"{file}: zero_optimization.stage must be 1, 2 or 3 (without ZeRO, use run.engine: ddp)")
    return settings


def fill_deepspeed(run: RunConfig, *, processes: int, precision: str) -> dict[str, Any]:
    """:func:`read_deepspeed` with every ``auto`` that follows from the run; sizes of buckets stay open.

    The sections ``optimizer`` and ``scheduler`` are taken out, since the run has both. Raises :class:`ConfigError`
    with both values where the file says something else than the run.
    """
    settings = read_deepspeed(run)
    micro, accumulate = run.batch_size_train, accumulation(run, processes)
    product = f"{micro} per process x {accumulate} accumulation x {counted(processes)}"
    problems = []
    for key, value, source in (
        ("train_micro_batch_size_per_gpu", micro, "run.batch_size_train"),
        ("gradient_accumulation_steps", accumulate, "run.accum_grad_iters"),
        ("train_batch_size", micro * accumulate * processes, product),
        ("gradient_clipping", run.max_grad_norm or 0.0, "run.max_grad_norm"),
        ("bf16.enabled", precision == "bf16", f"run.precision ({precision})"),
        ("fp16.enabled", precision == "fp16", f"run.precision ({precision})"),
    ):
        problems += _settle(settings, key, value, source)
    if settings["zero_optimization"].get("compute_grad_norm") is False:
        problems.append("zero_optimization.compute_grad_norm is false, but the log and the guard need the norm")
    if settings["bf16"].get("check_grad_overflow") is False:
        problems.append("bf16.check_grad_overflow is false, but a step that is not finite must change no weight")
    problems += _check_optimizer(settings.pop("optimizer", None) or {}, run)
    params = (settings.pop("scheduler", None) or {}).get("params", {})
    given = [key for key, value in params.items() if value != AUTO]
    if given:
        problems.append(f"scheduler.params.{given[0]} is {params[given[0]]}, but the rate follows run.lr_sched")
    if problems:
        raise ConfigError([Problem("", None, "run.deepspeed", f"{run.deepspeed}: {text}") for text in problems])
    return settings


def fill_sizes(settings: dict[str, Any], hidden_size: int) -> None:
    """Give the buckets that are ``auto`` the sizes that suit a language model, as transformers' integration does."""
    zero = settings["zero_optimization"]
    square = hidden_size * hidden_size
    for key, value in (
        ("reduce_bucket_size", square),
        ("stage3_prefetch_bucket_size", int(0.9 * square)),
        ("stage3_param_persistence_threshold", 10 * hidden_size),
    ):
        if zero.get(key) == AUTO:
            zero[key] = value


def zero_stage(settings: dict[str, Any]) -> int | None:
    """The ZeRO stage, None if there is none."""
    zero = settings.get("zero_optimization")
    return zero.get("stage") if isinstance(zero, dict) else None


def offloads_optimizer(settings: dict[str, Any]) -> bool:
    """Whether the optimiser's state lies in the memory of the CPU."""
    device = (settings["zero_optimization"].get("offload_optimizer") or {}).get("device", "none")
    return device not in (None, "none")


def _settle(settings: dict[str, Any], key: str, value: Any, source: str) -> list[str]:
    """Set what is open to ``value``; the answer tells of another one."""
    section, _, leaf = key.rpartition(".")
    node = settings.setdefault(section, {}) if section else settings
    given = node.get(leaf, AUTO)
    if given == AUTO:
        node[leaf] = value
    elif given != value:
        return [f'{key} is {json.dumps(given)}, but {source} makes it {json.dumps(value)}; write "auto", or change one']
    return []


def _check_optimizer(section: dict[str, Any], run: RunConfig) -> list[str]:
    kind = section.get("type", "AdamW")
    if kind not in ("Adam", "AdamW"):
        return [f"optimizer.type is {kind}, but minivlm trains with AdamW; leave out the section"]
    own = {"lr": run.init_lr, "betas": [run.beta1, run.beta2], "eps": EPSILON, "weight_decay": run.weight_decay}
    given = section.get("params", {})
    return [text for key, value in own.items() for text in _settle(dict(given), key, value, "the run")]


def _error(message: str) -> ConfigError:
    return ConfigError([Problem("", None, "run.deepspeed", message)])
