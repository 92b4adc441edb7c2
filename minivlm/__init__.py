"""minivlm: a config-driven research toolkit for vision-language models.

Importing the package is cheap: torch and transformers are loaded on first use of a function that needs
them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from minivlm import builtins, torchvision_guard
from minivlm.version import __version__

if TYPE_CHECKING:
    from minivlm.api import load, load_model_and_preprocess, model_zoo

torchvision_guard.install()
builtins.register_all()

__all__ = ["__version__", "load", "load_model_and_preprocess", "model_zoo"]


def __getattr__(name: str) -> Any:
    if name in ("load", "load_model_and_preprocess", "model_zoo"):
        from minivlm import api

        return getattr(api, name)
    raise AttributeError(f"module 'minivlm' has no attribute '{name}'")
