"""Make ``import torchvision`` work where its compiled extension does not fit the installed torch.

A torchvision built for CUDA cannot load its extension library beside a CPU build of torch. Its import then
fails with ``operator torchvision::nms does not exist``, and timm, peft and most model classes of transformers
fail with it, although none of them needs the missing operators here. Declaring the two operators that
torchvision refers to unconditionally is enough; ``torchvision.ops`` and its image decoders stay unavailable.

:func:`install` puts a finder on ``sys.meta_path``. It costs nothing until torchvision is imported for the
first time. Then, if torch has no CUDA and torchvision's library raises OSError, it declares the two
operators; in every other case it changes nothing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

OPERATORS = ("nms", "qnms")
_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

_library: Any = None  # a torch.library.Library; its operators vanish when it is collected


def install() -> None:
    """Watch for the first import of torchvision; does nothing if it is imported or watched already."""
    if "torchvision" in sys.modules or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())


def was_needed() -> bool:
    """Whether the operators had to be declared in this process."""
    return _library is not None


class _Finder(importlib.abc.MetaPathFinder):
    """Finds torchvision as the other finders would, with a loader that runs the guard first.

    Looking for torchvision without importing it (``importlib.util.find_spec``) must not import torch, so
    the work waits until the module is executed.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torchvision":
            return None
        for finder in list(sys.meta_path):
            if isinstance(finder, _Finder) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None and spec.submodule_search_locations:
                    spec.loader = _Loader(self, spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Stands before torchvision's own loader for the one import that it guards."""

    def __init__(self, finder: _Finder, loader: Any) -> None:
        self.finder = finder
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        spec = module.__spec__
        assert spec is not None and spec.submodule_search_locations is not None
        spec.loader = module.__loader__ = self.loader
        _guard(Path(spec.submodule_search_locations[0]))
        self.loader.exec_module(module)


def _guard(folder: Path) -> None:
    """Declare the operators if torchvision, installed in ``folder``, cannot load its library."""
    global _library
    try:
        import torch
    except ImportError:
        return  # torchvision's own import says it best
    if torch.version.cuda is not None:
        return
    extension = _find_extension(folder)
    if extension is None:
        return
    try:
        torch.ops.load_library(extension)
    except OSError:
        missing = [name for name in OPERATORS if not hasattr(torch.ops.torchvision, name)]
        if missing:
            _library = torch.library.Library("torchvision", "DEF")
            for name in missing:
                _library.define(name + _SIGNATURE)


def _find_extension(folder: Path) -> str | None:
    """The file that torchvision would load as its extension library, or None."""
    details = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
    spec = importlib.machinery.FileFinder(str(folder), details).find_spec("_C")
    return spec.origin if spec is not None else None
