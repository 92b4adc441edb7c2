"""Global batch = samples per process x accumulation x processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import write_yaml

from minivlm.cli import main
from minivlm.config import ConfigError
from minivlm.config.experiment import RunConfig
from minivlm.config.global_batch import accumulation, describe_global_batch
from minivlm.datasets.base import DatasetError
from minivlm.datasets.feed import make_feed
from minivlm.datasets.training_set import Source
from minivlm.types import Sample


def run(batch: int = 4, **settings: Any) -> RunConfig:
    return RunConfig(batch_size_train=batch, **settings)


@pytest.mark.parametrize(("processes", "expected"), [(1, 32), (2, 16), (8, 4), (32, 1)])
def test_accumulation_follows_from_the_global_batch(processes: int, expected: int) -> None:
    assert accumulation(run(global_batch_size=128), processes) == expected
    assert accumulation(run(global_batch_size=128, accum_grad_iters=expected), processes) == expected


def test_without_a_global_batch_accumulation_is_what_is_given() -> None:
    assert accumulation(run(), 8) == 1
    assert accumulation(run(accum_grad_iters=3), 8) == 3


def test_a_batch_that_does_not_divide_is_answered_with_those_that_do() -> None:
    message = r"run\.global_batch_size: 128 is not 5 per process x a whole number x 2 processes; "
    with pytest.raises(ConfigError, match=message + r"run\.batch_size_train of 1, 2, 4, 8 would fit"):
        accumulation(run(5, global_batch_size=128), 2)
    with pytest.raises(ConfigError, match=r"run\.batch_size_train of 8, 16, 32, 64 would fit"):
        accumulation(run(100, global_batch_size=128), 2)
    with pytest.raises(ConfigError, match="128 samples cannot be shared evenly by 3 processes"):
        accumulation(run(global_batch_size=128), 3)


def test_a_contradiction_is_refused() -> None:
    message = r"run\.accum_grad_iters: 4, but a global batch of 128 is 4 per process x 16 accumulation x 2 processes"
    with pytest.raises(ConfigError, match=message):
        accumulation(run(global_batch_size=128, accum_grad_iters=4), 2)


def test_the_rule_in_words() -> None:
    assert describe_global_batch(run(global_batch_size=128), 1) == (
        "global batch 128 = 4 per process x 32 accumulation x 1 process "
        "(the same: accumulation 16 on 2 processes, 8 on 4 processes, 4 on 8 processes)"
    )
    assert describe_global_batch(run(accum_grad_iters=1), 2) == (
        "global batch 8 = 4 per process x 1 accumulation x 2 processes (the same: accumulation 2 on 1 process)"
    )
    assert describe_global_batch(run(5), 1) == "global batch 5 = 5 per process x 1 accumulation x 1 process"


def test_batches_of_several_sizes_make_no_global_batch() -> None:
    source = Source("a", [Sample(str(k), []) for k in range(20)], batch_size=2)
    settings = run(mix="batch", global_batch_size=8)
    with pytest.raises(DatasetError, match=r"datasets\.a\.batch_size=2 and run\.batch_size_train=4"):
        make_feed([source], None, settings)  # type: ignore[arg-type]
    source.batch_size = 4
    assert make_feed([source], None, settings).accumulation == 2  # type: ignore[arg-type]


def test_the_command_line_states_the_rule_and_refuses_what_breaks_it(
    tiny_experiment: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_experiment["run"] |= {"global_batch_size": 8, "batch_size_train": 2, "warmup_ratio": 0.5}
    config = write_yaml(tmp_path / "x.yaml", tiny_experiment)
    assert main(["train", "--cfg-path", str(config), "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "global batch 8 = 2 per process x 4 accumulation x 1 process (the same: accumulation 2 on 2" in shown
    assert "3 steps (3 an epoch) schedule: step 0: 2.50e-03, step 1: 5.00e-03, step 2: 5.00e-03" in shown
    assert main(["train", "--cfg-path", str(config), "--options", "run.batch_size_train=3"]) == 2
    assert "run.global_batch_size: 8 is not 3 per process" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
