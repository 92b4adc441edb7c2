"""The registry: exact names for the parts that a YAML file can ask for.

An entry maps ``(kind, name)`` to a target, usually a ``"module:Class"`` string that is imported on
first use, and to the dataclass that is the schema of the part's YAML node. Listing names therefore
imports nothing heavy. Built-in entries stand in :mod:`minivlm.builtins`; users add their own with the
:func:`register` decorator in a file named under ``imports:`` or in a package that offers an entry
point of the group ``minivlm.plugins``.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = (
    "vision_encoder",
    "connector",
    "language_model",
    "template",
    "processor",
    "dataset",
    "task",
    "metric",
    "runner",
    "lr_scheduler",
)
PLUGIN_GROUP = "minivlm.plugins"


class RegistryError(LookupError):
    """An unknown kind or name, a name given twice, or a target that cannot be imported."""


@dataclass(frozen=True)
class NoSettings:
    """Schema of a part that takes no settings of its own."""


@dataclass(frozen=True)
class Entry:
    """One registered part; ``target`` and ``config`` may be ``"module:Name"`` strings."""

    kind: str
    name: str
    target: Any
    config: Any = NoSettings
    summary: str = ""

    def resolve(self) -> Any:
        """Import and return the target (class, function, or path of a data file)."""
        return _import_target(self, self.target)

    def config_class(self) -> type:
        """Import and return the dataclass that describes the part's YAML node."""
        cls = _import_target(self, self.config)
        if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
            raise RegistryError(f"the config of {self.kind} '{self.name}' must be a dataclass, not {cls!r}")
        return cls


_entries: dict[tuple[str, str], Entry] = {}
_plugins_loaded = False
_user_files: list[str] = []


def register(
    kind: str, name: str, target: Any = None, *, config: Any = NoSettings, summary: str = ""
) -> Callable[[Any], Any]:
    """Register ``target`` as ``name`` of ``kind``; without a target, a decorator that does so.

    Raises :class:`RegistryError` if the kind is unknown or the name is taken by another target.
    """
    if kind not in KINDS:
        raise RegistryError(f"unknown kind '{kind}'{suggest(kind, KINDS)}; kinds: {', '.join(KINDS)}")

    def add(obj: Any) -> Any:
        entry = Entry(kind, name, obj, config, summary or _first_line(obj))
        old = _entries.get((kind, name))
        if old is not None and _where(old.target) != _where(obj):
            raise RegistryError(
                f"{kind} '{name}' is registered twice: {_where(old.target)} and {_where(obj)}; choose another name"
            )
        _entries[kind, name] = entry
        return obj

    if target is None:
        return add
    add(target)
    return lambda obj: obj


def names(kind: str) -> list[str]:
    """The registered names of a kind, sorted; imports none of them."""
    if kind not in KINDS:
        raise RegistryError(f"unknown kind '{kind}'{suggest(kind, KINDS)}; kinds: {', '.join(KINDS)}")
    load_plugins()
    return sorted(name for k, name in _entries if k == kind)


def entry(kind: str, name: str) -> Entry:
    """The entry of a name, or a :class:`RegistryError` with the nearest names."""
    found = _entries.get((kind, name))
    if found is None:
        known = names(kind)
        found = _entries.get((kind, name))  # a plugin may have brought it
        if found is None:
            raise RegistryError(
                f"unknown {kind} '{name}'{suggest(name, known)}; `minivlm list {kind}` shows all of them"
            )
    return found


def get(kind: str, name: str) -> Any:
    """Import and return what is registered as ``name`` of ``kind``."""
    return entry(kind, name).resolve()


def suggest(word: str, known: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` when a known word is near, else an empty string."""
    near = difflib.get_close_matches(str(word), list(known), n=2, cutoff=0.6)
    return f" (did you mean {' or '.join(repr(n) for n in near)}?)" if near else ""


def import_user_file(path: str | Path) -> None:
    """Run a user's Python file (or import a module by dotted name) so that its parts get registered.

    A file is run once per process. Raises :class:`RegistryError` if it does not exist or fails.
    """
    file = Path(path)
    try:
        if str(path) not in _user_files:
            _user_files.append(str(path))
        if file.suffix != ".py":
            importlib.import_module(str(path))
            return
        if not file.is_file():
            raise RegistryError(f"imports: there is no file {path}")
        module_name = f"minivlm_user_{file.stem}_{abs(hash(str(file.resolve()))):x}"
        if module_name in sys.modules:
            return
        spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[module_name]
            raise
    except RegistryError:
        raise
    except Exception as error:
        raise RegistryError(f"imports: {path} failed with {type(error).__name__}: {error}") from error


def user_files() -> list[str]:
    """What :func:`import_user_file` has imported in this process."""
    return list(_user_files)


def load_plugins() -> None:
    """Import the modules that installed packages offer under the entry-point group, once."""
    global _plugins_loaded
    if _plugins_loaded:
        return
    _plugins_loaded = True
    for point in importlib.metadata.entry_points(group=PLUGIN_GROUP):
        try:
            point.load()
        except Exception as error:
            raise RegistryError(f"plugin '{point.name}' ({point.value}) failed: {error}") from error


def _import_target(entry: Entry, target: Any) -> Any:
    if not isinstance(target, str):
        return target
    module_name, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise RegistryError(f"{entry.kind} '{entry.name}' cannot be loaded from {target}: {error}") from error


def _where(target: Any) -> str:
    if isinstance(target, (str, Path)):
        return str(target)
    return f"{getattr(target, '__module__', '?')}:{getattr(target, '__qualname__', target)}"


def _first_line(obj: Any) -> str:
    doc = "" if isinstance(obj, (str, Path)) else (getattr(obj, "__doc__", None) or "")
    return doc.strip().split("\n")[0]
