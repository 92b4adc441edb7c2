"""Files that are either whole or not there, also when several machines write into one folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from minivlm.io import TEMPORARY, atomic_file, atomic_folder


def test_processes_with_the_same_number_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two nodes the processes may well have equal ids."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    target = tmp_path / "a.txt"
    with atomic_file(target) as first, atomic_file(target) as second:
        assert first != second and first.name.startswith(TEMPORARY) and second.name.startswith(TEMPORARY)
        first.write_text("one")
        second.write_text("two")
    assert target.read_text() == "one" and os.listdir(tmp_path) == ["a.txt"]
    folder = tmp_path / "b"
    with atomic_folder(folder) as first:
        (first / "x").write_text("one")
        with atomic_folder(folder) as second:
            (second / "x").write_text("two")
        assert (first / "x").read_text() == "one" and (folder / "x").read_text() == "two"
    assert (folder / "x").read_text() == "one" and sorted(os.listdir(tmp_path)) == ["a.txt", "b"]
