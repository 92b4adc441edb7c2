"""An interrupted run goes on as if nothing had happened."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, losses, run_train, write_yaml
from rich.console import Console
from safetensors.torch import load_file

from minivlm.config import load_config
from minivlm.runners.experiment import run_experiment
from minivlm.runners.runner import Runner

QUIET = Console(quiet=True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


class Killed(BaseException):
    """Stands for a process that is gone."""


def kill_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    after_step = Runner._after_step

    def dying(self: Runner, log: Any) -> None:
        after_step(self, log)
        if self.state.step == step:
            raise Killed

    monkeypatch.setattr(Runner, "_after_step", dying)


@pytest.mark.parametrize("workers", [0, 2])
def test_twenty_steps_equal_ten_a_kill_and_a_resume(
    tiny_experiment: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    tiny_experiment["run"] |= {"max_epoch": 4, "max_steps": 20, "save_freq": 5, "num_workers": workers}
    tiny_experiment["run"]["accum_grad_iters"] = 1 + workers // 2
    tiny_experiment["model"]["language_model"]["config"]["attention_dropout"] = 0.2
    config = write_yaml(tmp_path / "x.yaml", tiny_experiment)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_experiment(load_config(config, [f"run.output_dir={whole}", "run.max_epoch=8"]), QUIET)
    with monkeypatch.context() as patch:
        kill_after(patch, 12)  # two steps behind the checkpoint of step 10
        with pytest.raises(Killed):
            run_experiment(load_config(config, [f"run.output_dir={broken}", "run.max_epoch=8"]), QUIET)
    torch.manual_seed(0)  # whatever another process would have done meanwhile
    run_experiment(load_config(config, [f"run.output_dir={broken}", "run.max_epoch=8"]), QUIET)
    assert len(losses(whole)) == 20
    assert losses(broken) == losses(whole)
    assert_same_weights(whole, broken)


def test_sigkill_in_the_second_stage_continues_there(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    tiny_experiment["run"] |= {"output_dir": str(tmp_path / "out"), "save_freq": 5}
    tiny_experiment["stages"] = [
        {"name": "first", "run": {"max_steps": 3}},
        {"name": "second", "run": {"max_epoch": 100, "max_steps": 150}},
    ]
    config = write_yaml(tmp_path / "x.yaml", tiny_experiment)
    second = tmp_path / "out" / "second" / "checkpoints"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--cfg-path", str(config)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    wait_for(lambda: any(second.glob("step_*/state.json")), process)
    process.kill()
    process.wait()
    reached = max(json.loads(p.read_text())["step"] for p in second.glob("step_*/state.json"))
    result = run_train(config, "stages.second.run.max_steps=160")
    assert result.returncode == 0, result.stderr
    assert "first: done before" in result.stdout
    assert "resuming from" in result.stdout
    assert reached < 160 and len(losses(tmp_path / "out" / "second")) == 160
    assert not list((tmp_path / "out").rglob(".unfinished-*"))


def test_ctrl_c_saves_and_prints_how_to_go_on(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    tiny_experiment["run"] |= {"max_epoch": 1000, "save_freq": 100000}
    config = write_yaml(tmp_path / "x.yaml", tiny_experiment)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--cfg-path", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    wait_for(lambda: (out / "log.jsonl").is_file() and len(losses(out)) > 3, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the state is saved" in stderr and f"--cfg-path {config}" in stderr
    saved = sorted((out / "checkpoints").glob("step_*/state.json"))
    assert json.loads(saved[-1].read_text())["step"] == len(losses(out))


def test_disk_full_while_saving_leaves_the_old_checkpoint_whole(
    tiny_experiment: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minivlm.runners import runner

    tiny_experiment["run"] |= {"max_epoch": 2, "save_freq": 3}
    config = write_yaml(tmp_path / "x.yaml", tiny_experiment)
    write_state = runner.write_state

    def full(folder: Path, state: Any, *rest: Any) -> None:
        if state.step == 6:
            (folder / "optimizer.pt").write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write_state(folder, state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "write_state", full)
        with pytest.raises(OSError, match="free some space") as error:
            run_experiment(load_config(config), QUIET)
    assert "No space left" in str(error.value)
    folder = tmp_path / "out" / "checkpoints"
    assert [p.name for p in folder.iterdir()] == ["step_00000003"]
    run_experiment(load_config(config), QUIET)  # goes on from step 3
    assert len(losses(tmp_path / "out")) == 12


def test_a_finished_run_is_not_trained_again(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "x.yaml", tiny_experiment)
    run_experiment(load_config(config), QUIET)
    before = (tmp_path / "out" / "model" / "model.safetensors").stat().st_mtime_ns
    run_experiment(load_config(config), QUIET)
    assert (tmp_path / "out" / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_settings_changed_after_the_end_are_told(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    tiny_experiment["run"] |= {"max_steps": 1}
    config = write_yaml(tmp_path / "x.yaml", tiny_experiment)
    run_experiment(load_config(config), QUIET)
    said = []
    for options in ([], ["run.init_lr=0.5", "model.connector.depth=3"]):
        console = Console(record=True, width=200, file=io.StringIO())
        run_experiment(load_config(config, options), console)
        said.append(console.export_text())
    assert "done before" in said[0] and "since then" not in said[0]
    changes = [line.partition("without effect: ")[2] for line in said[1].splitlines() if "changed since then" in line]
    assert [change.split(":")[0] for change in changes] == ["model.connector.depth", "run.init_lr"]
    assert changes[1].endswith("-> 0.5")


def test_resume_none_starts_anew_and_keeps_the_old_state(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "x.yaml", tiny_experiment)
    run_experiment(load_config(config), QUIET)
    first = losses(tmp_path / "out")
    run_experiment(load_config(config, ["run.resume=none"]), QUIET)
    assert losses(tmp_path / "out") == first  # same seed, from the start, logged once
    assert (tmp_path / "out" / "checkpoints.old1").is_dir()


def test_resume_with_other_trainable_parts_is_refused(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    tiny_experiment["run"] |= {"max_epoch": 2, "save_freq": 3, "max_steps": 4}
    config = write_yaml(tmp_path / "x.yaml", tiny_experiment)
    run_experiment(load_config(config), QUIET)
    options = [
        "run.max_steps=8",
        "model.language_model.freeze=true",
        f"run.resume={tmp_path}/out/checkpoints/step_00000004",
    ]
    with pytest.raises(ValueError, match="trainable parameters"):
        run_experiment(load_config(config, options), QUIET)


def test_only_the_newest_checkpoints_are_kept(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    tiny_experiment["run"] |= {"save_freq": 1, "keep_last": 3}
    run_experiment(load_config(write_yaml(tmp_path / "x.yaml", tiny_experiment)), QUIET)
    names = sorted(p.name for p in (tmp_path / "out" / "checkpoints").iterdir())
    assert names == ["step_00000004", "step_00000005", "step_00000006"]


def wait_for(condition: Any, process: Any, seconds: float = 120) -> None:
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, "the run ended too early"
        assert time.time() < end, "the run did not get that far in time"
        time.sleep(0.05)


def test_resume_with_other_batches_is_refused(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    tiny_experiment["run"] |= {"max_steps": 3, "save_freq": 2}
    config = write_yaml(tmp_path / "x.yaml", tiny_experiment)
    run_experiment(load_config(config), QUIET)
    (tmp_path / "out" / "done.json").unlink()
    with pytest.raises(ValueError, match="other data"):
        run_experiment(load_config(config, ["run.batch_size_train=2", "run.max_steps=9"]), QUIET)


def test_going_back_to_an_earlier_checkpoint_leaves_the_later_ones(
    tiny_experiment: dict[str, Any], tmp_path: Path
) -> None:
    tiny_experiment["run"] |= {"save_freq": 2, "keep_last": 5}
    config = write_yaml(tmp_path / "x.yaml", tiny_experiment)
    run_experiment(load_config(config), QUIET)
    first = losses(tmp_path / "out")
    folder = tmp_path / "out" / "checkpoints"
    run_experiment(load_config(config, [f"run.resume={folder}/step_00000002"]), QUIET)
    assert losses(tmp_path / "out") == first
    assert {"left_step_00000004", "left_step_00000006", "step_00000006"} <= {p.name for p in folder.iterdir()}


def test_full_disk_in_any_library_says_what_to_do(
    tiny_experiment: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch
    from safetensors import SafetensorError

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="free some space"):
        run_experiment(load_config(write_yaml(tmp_path / "x.yaml", tiny_experiment)), QUIET)
