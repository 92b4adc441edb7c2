"""The metric ``exact_match``."""

from __future__ import annotations

from collections.abc import Sequence

from minivlm.evaluation.text import normalise


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction equals one of the accepted answers after :func:`normalise`, else 0.0."""
    return float(normalise(prediction) in {normalise(answer) for answer in answers})
