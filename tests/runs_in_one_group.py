"""Several experiments one after the other in one process group, for importing takes longer than they do.

``torchrun --nproc-per-node N tests/runs_in_one_group.py LIST.json``, a list of [experiment file, [option, ...]].
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import minivlm  # noqa: F401  (first, for the torchvision guard)


def on_two_processes(folder: Path, listed: Sequence[Sequence[object]], timeout: float = 900) -> str:
    """Run a list of (experiment file, options), written into ``folder``; what the first process prints."""
    (folder / "list.json").write_text(json.dumps(listed))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, __file__, str(folder / "list.json")],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


if __name__ == "__main__":
    import torch
    from rich.console import Console

    from minivlm.config import load_config
    from minivlm.runners.experiment import run_experiment

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    console = Console(quiet=torch.distributed.get_rank() != 0)
    for config, options in json.loads(Path(sys.argv[1]).read_text()):
        run_experiment(load_config(config, options), console)
    torch.distributed.destroy_process_group()
