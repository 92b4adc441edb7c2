"""What a path in a configuration means: a placeholder, a URL, a file of weights."""

from __future__ import annotations

import re
from pathlib import Path

WEIGHT_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
_PLACEHOLDER = re.compile(r"^please set (this|the) value|(^|/)path/to(/|$)|^<.*>$", re.IGNORECASE)


def is_placeholder(path: str) -> bool:
    """Whether a path still is the text of a published YAML file; what exists may have any name."""
    return bool(_PLACEHOLDER.search(path)) and not Path(path).exists()


def is_url(path: str) -> bool:
    """Whether a path is fetched from a server."""
    return path.startswith(("http://", "https://", "ftp://"))


def is_weight_file(path: str) -> bool:
    """Whether a path means a file of weights and not a folder; the file need not exist."""
    return is_url(path) or Path(path).is_file() or (path.endswith(WEIGHT_SUFFIXES) and not Path(path).is_dir())
