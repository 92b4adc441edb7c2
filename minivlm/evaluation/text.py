"""Small helpers for texts that are compared."""

from __future__ import annotations


def normalise(text: str) -> str:
    """Lower case, without blanks at the ends and without one final full stop."""
    return text.strip().lower().removesuffix(".").rstrip()
