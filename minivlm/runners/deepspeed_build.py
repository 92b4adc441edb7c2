"""DeepSpeed made ready: imported, and what it compiles at first use prepared once in one process.

torch compiles an operator into a folder of its own and guards it by a file ``lock``. A build that is killed leaves the
lock behind, and every later run would wait for it without a word. Here a lock that nobody holds is an error.

Little is compiled at all: DeepSpeed's operator for shared memory between CPU processes serves inference only, and is
switched off (gloo does the same); its fused AdamW for GPUs is no faster than torch's. What is left is the AdamW for a
state that is offloaded from a GPU to the CPU.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minivlm.runners.engines import EngineError

CPU_ADAM = "CPUAdamBuilder"
SHARED_MEMORY = "ShareMemCommBuilder"
LOCK_SECONDS = 30.0
"""A lock that no process of this machine holds may be another machine's, which takes it for a moment to load."""


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed for the kind of device, quiet, and without what training on a CPU never calls but is compiled.

    Raises :class:`EngineError` if it is not installed, or for another kind.
    """
    if device.type not in ("cpu", "cuda"):
        raise EngineError(f"run.engine: deepspeed runs on cuda and cpu, not on {device.type}; use run.engine: auto")
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        import deepspeed
    except ImportError as error:
        raise EngineError(
            f'run.engine: deepspeed needs the package deepspeed ({error}): pip install "minivlm[deepspeed]"'
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if device.type == "cpu":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__[_builder(SHARED_MEMORY).NAME] = False
    return deepspeed


def load_operator(builder_name: str) -> Any:
    """Load an operator, compiled first if need be, which is said.

    Raises :class:`EngineError` for a lock that was left behind, and where the compiler fails.
    """
    builder = _builder(builder_name)
    folder = build_folder(builder.name)
    refuse_stale_lock(folder)
    _programs_on_path()
    if not list(folder.glob("*.so")):
        print(
            f"compiling DeepSpeed's {builder.name} in {folder}, once, which takes a few minutes "
            "(`minivlm prepare-deepspeed` does it ahead of a run)",
            file=sys.stderr,
            flush=True,
        )
    try:
        return builder.load(verbose=False)
    except (RuntimeError, OSError, ImportError, AttributeError) as error:
        raise EngineError(
            f"DeepSpeed's {builder.name} cannot be compiled or loaded: {error}\nIt needs a C++ compiler, ninja and the "
            "CUDA toolkit of torch's version. Without them use run.deepspeed: zero2 or zero3, or a JSON file with "
            '"zero_force_ds_cpu_optimizer": false, which takes torch\'s slower AdamW'
        ) from error


def build_folder(name: str) -> Path:
    """Where torch compiles an extension: below TORCH_EXTENSIONS_DIR or its own cache."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(name, False))


def refuse_stale_lock(folder: Path) -> None:
    """Raise :class:`EngineError` if the folder's lock was left by a build that is gone; a live one may go on."""
    lock = folder / "lock"
    while (age := _age(lock)) is not None and not _is_held(lock):
        if age > LOCK_SECONDS:
            raise EngineError(
                f"{lock} was left behind {age / 60:.0f} minutes ago by a compilation that was killed: no process of "
                f"this machine holds it, and DeepSpeed would wait for it for ever. Delete it (rm {lock}) and run "
                "`minivlm prepare-deepspeed`; only if another machine compiles there just now, wait for that"
            )
        time.sleep(min(1.0, LOCK_SECONDS))


def _age(file: Path) -> float | None:
    """Seconds since a file was written, None if there is none."""
    try:
        return time.time() - file.stat().st_mtime
    except OSError:
        return None


def _is_held(lock: Path) -> bool:
    """Whether a process of this machine has the file open, which its writer has until it is done."""
    path = os.path.realpath(lock)
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == path:
                return True
        except OSError:  # the process is gone, or another user's
            continue
    return False


def _programs_on_path() -> None:
    """ninja may be installed beside the interpreter, in an environment that is not activated."""
    here = os.path.dirname(sys.executable)
    places = os.environ.get("PATH", "").split(os.pathsep)
    if here not in places:
        os.environ["PATH"] = os.pathsep.join([here, *places])


def _builder(name: str) -> Any:
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().create_op_builder(name)


def main(argv: Sequence[str] | None = None) -> int:
    """``minivlm prepare-deepspeed``: compile what this machine needs, in this one process."""
    parser = argparse.ArgumentParser(
        prog="minivlm prepare-deepspeed",
        description="Compile what DeepSpeed needs here, once, before runs on several processes would wait for it.",
    )
    parser.parse_args(argv)
    if not torch.cuda.is_available():
        import_deepspeed(torch.device("cpu"))
        print("nothing to compile: without a GPU minivlm trains with what DeepSpeed has in Python")
        return 0
    import_deepspeed(torch.device("cuda"))
    start = time.perf_counter()
    load_operator(CPU_ADAM)
    print(f"ready: {build_folder(_builder(CPU_ADAM).name)} ({time.perf_counter() - start:.0f} s)")
    return 0
