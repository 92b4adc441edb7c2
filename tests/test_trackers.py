"""Where a run's numbers go beside its own log: packages are stand-ins, since accounts and servers belong to them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minivlm.runners.logs import Trackers


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
