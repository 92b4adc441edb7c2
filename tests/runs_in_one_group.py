"""Several experiments one after the other in one process group, for importing takes longer than they do.

``torchrun --nproc-per-node N tests/runs_in_one_group.py LIST.json``, a list of [experiment file, [option, ...]].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import minivlm  # noqa: F401  (first, for the torchvision guard)

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
