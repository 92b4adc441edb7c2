"""The golden set of Imp: where it lies, and what is in it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from golden_compared import Compared
from helpers import ROOT
from safetensors.torch import load_file
from torch import Tensor

DEFAULT = ROOT / "tests" / "golden" / "imp"
GOLDEN = Path(os.environ.get("MINIVLM_GOLDEN", ROOT / "tests" / "golden")) / "imp"
GENERATIONS = sorted(folder.name for folder in GOLDEN.glob("v*") if (folder / "config.json").is_file())
"""The layouts of checkpoints: ``v1`` (fused Wqkv) and ``v15`` (as transformers has Phi)."""


def golden_json(name: str) -> Any:
    """A JSON file of the set."""
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def golden_tensors(name: str) -> dict[str, Tensor]:
    """A file of tensors of the set; empty if the set has none of that name."""
    file = GOLDEN / name
    return load_file(file) if file.is_file() else {}


def golden_image(name: str) -> Path:
    """A picture of the set, with or without its ending."""
    return GOLDEN / "images" / (name if name.endswith(".png") else f"{name}.png")


@pytest.fixture
def compared() -> Iterator[Compared]:
    """Fails a test that has compared nothing, but where another set lacks what it wants."""
    counter = Compared()
    yield counter
    assert counter.count > 0 or GOLDEN != DEFAULT, "nothing was compared"
