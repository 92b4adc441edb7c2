"""The code behind what is kept on disk: features of another code are other features."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path


def code_of(kinds: Iterable[type]) -> bytes:
    """Content of the files that define classes, in an order that depends on nothing else."""
    code = set()
    for kind in kinds:
        try:
            code.add(Path(inspect.getfile(kind)).read_bytes())
        except (OSError, TypeError):  # of an interactive session, or built in
            code.add(kind.__qualname__.encode())
    return b"".join(sorted(code))
