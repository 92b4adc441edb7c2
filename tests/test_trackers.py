"""Where a run's numbers go beside its own log: packages are stand-ins, since accounts and servers belong to them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from minivlm.runners.logs import RunLog, Trackers, _smooth, draw_loss_curve


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What SwanLab is told."""
    told: list[tuple[str, Any]] = []
    run = SimpleNamespace(
        log=lambda values, step: told.append(("log", (step, values))), finish=lambda: told.append(("finish", None))
    )
    stand_in = SimpleNamespace(init=lambda **options: told.append(("init", options)) or run)
    monkeypatch.setitem(sys.modules, "swanlab", stand_in)
    monkeypatch.delenv("SWANLAB_MODE", raising=False)
    return told


def test_swanlab_writes_into_the_folder_without_an_account(
    called: list[tuple[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trackers = Trackers(["swanlab"], tmp_path, "tiny")
    trackers.log(3, {"loss": 1.5})
    trackers.close()
    where = {"project": "minivlm", "name": "tiny", "log_dir": str(tmp_path / "swanlab")}
    assert called == [("init", where | {"mode": "offline"}), ("log", (3, {"loss": 1.5})), ("finish", None)]
    monkeypatch.setenv("SWANLAB_MODE", "online")
    Trackers(["swanlab"], tmp_path, "tiny")
    assert called[-1] == ("init", where | {"mode": "online"})


def test_an_evaluation_does_not_hide_the_loss_of_its_step(called: list[tuple[str, Any]], tmp_path: Path) -> None:
    """Both are called loss; a tracker keeps one value a step and name."""
    trackers = Trackers(["swanlab"], tmp_path, "tiny")
    log = RunLog(tmp_path, 2, 0, label="", log_freq=9, trackers=trackers, console=Console(quiet=True))
    log.step({"step": 1, "loss": 2.0, "lr": 0.1, "tokens_per_s": 1.0, "data_wait": 0.0})
    log.event({"step": 1, "loss": 3.0})
    log.close()
    (_, first), (_, second) = (values for name, values in called if name == "log")
    assert first["loss"] == 2.0 and second == {"val/loss": 3.0}
    assert [json.loads(line)["loss"] for line in log.path.read_text().splitlines()] == [2.0, 3.0]


def test_what_a_loss_curve_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the validation's loss; the smoothed one does not lag behind a loss that falls."""
    from matplotlib import pyplot as plt

    steps = [{"step": step, "loss": 5.0 - step / 50, "lr": 1e-3} for step in range(1, 201)]
    records = [*steps, {"step": 10, "loss": 4.5}, {"step": 30, "loss": 4.2}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr(plt, "close", lambda figure: None)
    draw_loss_curve(tmp_path / "log.jsonl", tmp_path / "curve.png", "tiny")
    figure = plt.gcf()
    monkeypatch.undo()
    lines = {str(line.get_label()): line for line in figure.axes[0].get_lines()}
    assert lines["validation"].get_xydata().tolist() == [[10, 4.5], [30, 4.2]]
    one, other = (lines[name].get_ydata() for name in ("loss", "loss, smoothed"))
    assert list(other) == pytest.approx(list(one), abs=0.06)
    assert sum(_smooth([float(step % 2) for step in range(300_000)])) == pytest.approx(150_000, rel=0.01), "in seconds"
    plt.close(figure)
    assert (tmp_path / "curve.png").stat().st_size > 0


def test_a_run_without_trackers_asks_none(called: list[tuple[str, Any]], tmp_path: Path) -> None:
    trackers = Trackers([], tmp_path, "tiny")
    trackers.log(1, {"loss": 1.0})
    trackers.close()
    assert called == []


@pytest.mark.parametrize(("name", "extra"), [("swanlab", "swanlab"), ("wandb", "tracking")])
def test_a_missing_package_names_its_extra(
    name: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf'run\.trackers: .*{name}.*; run pip install "minivlm\[{extra}\]"'):
        Trackers([name], tmp_path, "tiny")
