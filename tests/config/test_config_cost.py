"""A typo is answered before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys
import time

from config_texts import MODEL

SCRIPT = """
import sys
from minivlm.config import ConfigError, load_config
try:
    load_config("x.yaml")
except ConfigError as error:
    print(error)
print(sorted({"torch", "transformers", "numpy", "timm", "PIL"} & set(sys.modules)))
"""


def test_a_typo_costs_less_than_a_second_and_imports_nothing_heavy(write, tmp_path):
    write("x.yaml", MODEL + "datasets: {easy_vqa: }\nrun:\n  inti_lr: 1\n  lr_sched: nope\n")
    seconds = []
    for _ in range(3):  # the machine may be busy with something else
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - started)
    typo, unknown, heavy = done.stdout.strip().split("\n")
    assert typo == "x.yaml:8: run.inti_lr: unknown key (did you mean 'init_lr'?)"
    assert unknown.startswith("x.yaml:9: run.lr_sched: unknown lr_scheduler 'nope'")
    assert heavy == "[]"
    assert min(seconds) < 1
