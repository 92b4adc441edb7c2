"""The shape of a config as the dataclasses state it: which dataclass or part stands at which key."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from minivlm import registry
from minivlm.schema import PART_CLASSES, Part


@dataclass(frozen=True)
class PartNode:
    """A node ``{name: ..., <settings>}`` of a registry kind; ``default`` is its name if none is given."""

    kind: str
    default: str | None = None


@dataclass(frozen=True)
class PartNodes:
    """A mapping or list whose values are parts of a kind; in a mapping the key is the default name."""

    kind: str


Shape = type | PartNode | PartNodes | None
"""What stands at a key: a dataclass, a part, several parts, or a plain value (None)."""


@functools.cache
def type_hints(cls: type) -> dict[str, Any]:
    """The resolved type hints of a dataclass."""
    return typing.get_type_hints(cls)


def settings(cls: type, *, skip: tuple[str, ...] = ()) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a dataclass that can be set, by name."""
    return {f.name: f for f in dataclasses.fields(cls) if f.init and f.name not in skip}


def part_class(kind: str) -> type[Part]:
    """The class of the parts of a kind."""
    return PART_CLASSES.get(kind, Part)


def part_settings(kind: str) -> dict[str, dataclasses.Field[Any]]:
    """What every node of a kind may hold beside ``name`` and the settings of the part."""
    return settings(part_class(kind), skip=("name", "config"))


def config_class(kind: str, name: Any) -> type | None:
    """The dataclass with the settings of a registered part; None if there is no such part."""
    try:
        return registry.entry(kind, name).config_class() if isinstance(name, str) else None
    except registry.RegistryError:
        return None


def members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the hint alone."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def shape_of(field: dataclasses.Field[Any], hint: Any) -> Shape:
    """What stands in a field."""
    kind = field.metadata.get("part")
    if kind is not None:
        if any(typing.get_origin(member) in (dict, list) for member in members(hint)):
            return PartNodes(kind)
        return PartNode(kind, _default_name(field))
    for member in members(hint):
        if isinstance(member, type) and dataclasses.is_dataclass(member):
            return member
    return None


def name_of(node: Any, shape: PartNode) -> Any:
    """The name that a part's node gives, or the default one."""
    if isinstance(node, str):
        return node
    name = node.get("name") if isinstance(node, dict) else None
    return shape.default if name is None else name


def child(shape: Shape, key: str, node: Any) -> Shape:
    """What stands at a key of ``node``, which has the given shape."""
    if isinstance(shape, PartNodes):
        return PartNode(shape.kind, key if isinstance(node, dict) else None)
    if isinstance(shape, PartNode):
        shared = key in part_settings(shape.kind)
        shape = part_class(shape.kind) if shared else config_class(shape.kind, name_of(node, shape))
    if shape is None or key not in settings(shape):
        return None
    hint = type_hints(shape)[key]
    below = shape_of(settings(shape)[key], hint)
    switched_off = isinstance(node, dict) and key in node and node[key] is None and type(None) in members(hint)
    return None if switched_off and isinstance(below, type) else below  # `lora: null` is no empty section


def places(node: Any, shape: Shape, prefix: str = "") -> Iterator[tuple[str, str]]:
    """All pairs (key, where it is allowed) of a config, by the parts that it names."""
    if isinstance(shape, PartNodes):
        for key in node if isinstance(node, dict) else ():
            yield from places(node[key], PartNode(shape.kind, key), f"{prefix}{key}.")
        return
    names: list[str] = []
    if isinstance(shape, PartNode):
        names += part_settings(shape.kind)
        cls = config_class(shape.kind, name_of(node, shape))
    else:
        cls = shape
    names += settings(cls) if cls is not None else ()
    for name in names:
        yield name, prefix
        below = child(shape, name, node)
        if below is not None:
            item = node.get(name) if isinstance(node, dict) else None
            yield from places(item, below, f"{prefix}{name}.")


def belongs(key: str, where: Iterable[str], here: str = "") -> str:
    """The remark that a key belongs elsewhere, nearest to the root first; empty if it belongs nowhere.

    ``where`` holds the dotted places at which the key is allowed, ``here`` the place where it stands.
    """
    spots = sorted(dict.fromkeys(p for p in where if p != here), key=lambda place: (place.count("."), place != "run"))
    if not spots or key == "name":
        return ""
    named = [f"under `{place}.`" if place else "at the top level" for place in spots[:3]]
    return f" (this key belongs {' or '.join(named)})"


def _default_name(field: dataclasses.Field[Any]) -> str | None:
    if field.default_factory is dataclasses.MISSING:
        return None
    default = field.default_factory()
    if isinstance(default, str):
        return default
    return default.get("name") if isinstance(default, dict) else None
