"""Skipped samples: counted once for all processes, also behind a resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_train, write_yaml
from rich.console import Console

from minivlm.datasets.base import DatasetError
from minivlm.runners.bad_samples import BadSamples
from minivlm.types import Batch, SampleError


def processes(folder: Path, total: int | None, share: float = 0.05) -> list[BadSamples]:
    return [BadSamples(folder, share, total, Console(quiet=True), is_main=rank == 0) for rank in range(2)]


def batch(*bad: str) -> Batch:
    ids = torch.zeros(1, 1, dtype=torch.long)
    return Batch(ids, ids, sample_ids=["good"], skipped=[SampleError(name, "broken") for name in bad])


def step(every: list[BadSamples], *batches: Batch) -> bool:
    """A step of all processes as the runner does it; returns whether something had to be gathered."""
    for bad, own in zip(every, batches, strict=True):
        bad.note([own])
    met = [list(bad.fresh) for bad in every]
    skipped, read = (sum(numbers) for numbers in zip(*(bad.state() for bad in every), strict=True))
    for bad in every:
        if any(met):
            bad.share(met)
        bad.check(skipped, read)
    return any(met)


def named(folder: Path) -> list[str]:
    return [json.loads(line)["id"] for line in (folder / "bad_samples.jsonl").read_text().splitlines()]


def test_a_sample_that_several_processes_meet_counts_once(tmp_path: Path) -> None:
    every = processes(tmp_path, total=20)
    assert step(every, batch("a"), batch("a"))
    assert not step(every, batch("a"), batch()) and not step(every, batch(), batch("a"))
    assert named(tmp_path) == ["a"]
    again = processes(tmp_path, total=20)
    written = again[0].written()
    for old, new in zip(every, again, strict=True):
        new.restore(old.state(), written)
    assert not step(again, batch(), batch("a")), "the second process knows what the first wrote down"
    with pytest.raises(DatasetError, match="2 of 20 samples are bad"):
        step(again, batch(), batch("b"))
    assert named(tmp_path) == ["a", "b"]


def test_in_a_stream_every_visit_counts_against_what_was_read(tmp_path: Path) -> None:
    every = processes(tmp_path, total=None, share=0.004)  # 4 of 1000
    for _ in range(2):
        step(every, batch("a"), batch("a"))
    with pytest.raises(DatasetError, match="6 of the 12 samples read so far"):
        step(every, batch("a"), batch("a"))
    assert named(tmp_path) == ["a"]


@pytest.mark.slow
def test_two_processes_and_a_resume_do_not_add_up(
    tiny_experiment: dict[str, Any], tmp_path: Path, llava_data: Path
) -> None:
    data = Path(shutil.copytree(llava_data, tmp_path / "data"))
    (data / "images" / "3.png").write_bytes(b"no picture")
    tiny_experiment["datasets"]["colours"] |= {"annotations": str(data / "train.json"), "images": str(data / "images")}
    tiny_experiment["run"] |= {"max_epoch": 4, "max_steps": 8, "batch_size_train": 6, "max_bad_share": 0.05}
    config = write_yaml(tmp_path / "x.yaml", tiny_experiment)
    for steps in (4, 8):
        result = run_train(config, f"run.max_steps={steps}", processes=2, timeout=120)
        assert result.returncode == 0, result.stderr
        assert named(tmp_path / "out") == ["r3"]
        (tmp_path / "out" / "done.json").unlink()
    state = json.loads((tmp_path / "out" / "checkpoints" / "step_00000008" / "state.json").read_text())
    assert all(process["bad"][0] > 0 for process in state["processes"]), "both processes met it"
