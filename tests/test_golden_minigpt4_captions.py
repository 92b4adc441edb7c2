"""Captions are cleaned as the original cleans them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers import GOLDEN

from minivlm import registry
from minivlm.processors.configs import BlipCaptionConfig

EXPECTED: dict[str, Any] = json.loads((GOLDEN / "expected" / "expected.json").read_text())
CASES = [(name, case) for name in EXPECTED if name.startswith("blip_caption") for case in EXPECTED[name]]


def test_golden_minigpt4_captions_are_there() -> None:
    assert {name for name, _ in CASES} == {"blip_caption", "blip_caption_prompt"}


@pytest.mark.parametrize(("name", "case"), CASES, ids=[f"{name}{i}" for i, (name, _) in enumerate(CASES)])
def test_golden_minigpt4_caption(name: str, case: dict[str, Any]) -> None:
    settings = {key: value for key, value in case.items() if key not in ("in", "out")}
    assert registry.get("processor", "blip_caption")(BlipCaptionConfig(**settings))(case["in"]) == case["out"]
