"""What a path in a configuration means: a placeholder, a URL, a file of weights, a name of today or of yesterday."""

from __future__ import annotations

import re
from pathlib import Path

WEIGHT_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
SPELLINGS = (("mgm", "minigemini", "mini_gemini"), ("MGM", "MiniGemini", "Mini-Gemini"))
"""Words of names of models, data, files and folders that mean the same (Mini-Gemini was renamed MGM)."""
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


def respelled(name: str) -> list[str]:
    """A name, and what else it is called: with every word of :data:`SPELLINGS` in its place."""
    found = [name]
    for words in SPELLINGS:
        pattern = re.compile(rf"(?<![A-Za-z])({'|'.join(words)})(?![A-Za-z])")
        found += [pattern.sub(word, text) for text in found for word in words]
    return list(dict.fromkeys(found))


def find_respelled(path: Path, below: Path = Path()) -> Path:
    """Where a path ``below`` a folder lies, each of its parts under any spelling; as given where nothing lies."""
    places = [below / path.anchor]
    for part in path.relative_to(path.anchor).parts:
        places = [place / name for place in places for name in respelled(part) if (place / name).exists()]
    return next(iter(places), below / path)
