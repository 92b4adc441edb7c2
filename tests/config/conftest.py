"""Files in a fresh folder, packaged defaults of the test's own, and a registry that forgets afterwards."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from config_texts import PROMPTS

from minivlm import registry
from minivlm.config import ConfigError, defaults, load_config


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file below the working directory; returns its name as a user would give it."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> str:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(textwrap.dedent(text), encoding="utf-8")
        return name

    return write


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """An empty folder in place of minivlm/configs; a function that writes into it."""
    folder = tmp_path / "packaged"
    monkeypatch.setattr(defaults, "FOLDER", folder)

    def write(name: str, text: str) -> Path:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text), encoding="utf-8")
        return file

    return write


@pytest.fixture
def parts(monkeypatch):
    """Parts that are registered during the test are forgotten after it."""
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    return registry.register


@pytest.fixture
def faults(write):
    """The lines of the error that loading a text (as x.yaml) gives."""

    def faults(text: str, options=()) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load_config(write("x.yaml", text), options)
        lines = str(caught.value).split("\n")
        assert len(lines) == len(caught.value.problems)
        return lines

    return faults


@pytest.fixture
def prompts(write):
    return write("prompts.txt", PROMPTS)
