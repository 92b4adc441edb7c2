"""Building dataclasses from plain dicts: every fault becomes a problem with its place, none is fatal."""

from __future__ import annotations

import dataclasses
import typing
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minivlm import registry
from minivlm.config.errors import ConfigError, Problem
from minivlm.config.layers import overlay
from minivlm.config.nodes import (
    PartNode,
    PartNodes,
    belongs,
    config_class,
    members,
    name_of,
    part_class,
    part_settings,
    places,
    settings,
    shape_of,
    type_hints,
)
from minivlm.config.source import KeyPath, Tree, read_yaml
from minivlm.config.values import describe, expected, limits, listing, nearest, scalar, show
from minivlm.schema import Part

Locate = Callable[[KeyPath, str], Problem]
"""Makes the problem of a message at a path, with the file and line where the value came from."""

_BAD: Any = object()
"""Stands for a value that is wrong; its problem has been noted."""
_MANY_KEYS = 12
"""Up to so many allowed keys are listed for an unknown key that resembles none."""


def validate(container: Any, cls: type, locate: Locate, prefix: KeyPath = ()) -> tuple[Any | None, list[Problem]]:
    """Build dataclass ``cls`` from a plain dict; returns ``(instance, [])`` or ``(None, problems)``.

    Type hints give the types, field metadata (see ``schema.setting``) the limits, the choices and the
    registered parts. ``locate`` makes a problem of a path and a message; ``prefix`` is the path of
    ``container`` in the file. All problems are found in one go.
    """
    builder = _Builder(container, cls, locate, prefix)
    value = builder.build(container, cls, prefix)
    return (None if builder.problems else value), builder.problems


class _Builder:
    def __init__(self, container: Any, cls: type, locate: Locate, prefix: KeyPath):
        self.root = (container, cls, prefix)
        self.locate = locate
        self.problems: list[Problem] = []
        self._places: dict[str, list[str]] | None = None

    def fault(self, path: KeyPath, message: str) -> Any:
        """Note a problem."""
        self.problems.append(self.locate(path, message))
        return _BAD

    def build(self, node: Any, cls: type, path: KeyPath) -> Any:
        """A dataclass from a mapping; an empty section counts as an empty mapping."""
        node = {} if node is None else node
        if not isinstance(node, dict):
            return self.fault(path, f"expected a mapping, got {show(node)}")
        self.unknown_keys(node, list(settings(cls)), path)
        return self.construct(cls, self.fields(node, cls, settings(cls), path), path)

    def construct(self, cls: type, values: dict[str, Any], path: KeyPath) -> Any:
        """Call a dataclass, unless one of its values is wrong already."""
        if any(value is _BAD for value in values.values()):
            return _BAD
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:  # a __post_init__ with checks of its own
            return self.fault(path, str(error))

    def fields(
        self, node: dict[str, Any], cls: type, allowed: dict[str, dataclasses.Field[Any]], path: KeyPath
    ) -> dict[str, Any]:
        """The values of the allowed fields that a mapping gives or must give."""
        values = {}
        for name, field in allowed.items():
            hint, below = type_hints(cls)[name], (*path, name)
            if name in node and node[name] == "???":
                values[name] = self.fault(below, f"a value must be given: {describe(hint)}{_help(field)}")
            elif name in node:
                values[name] = self.field(node[name], field, hint, below)
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                values[name] = self.fault(below, f"a required value is missing: {describe(hint)}{_help(field)}")
            elif "part" in field.metadata and field.default_factory is not dataclasses.MISSING:
                values[name] = self.field(field.default_factory(), field, hint, below)
        return values

    def field(self, value: Any, field: dataclasses.Field[Any], hint: Any, path: KeyPath) -> Any:
        """The value of one field, with its limits."""
        shape = shape_of(field, hint)
        if isinstance(shape, PartNodes):
            return self.parts(value, shape, path)
        if isinstance(shape, PartNode):
            optional = type(None) in members(hint)
            return None if value is None and optional else self.part(value, shape, path)
        typed = self.value(value, hint, path)
        if typed is _BAD or typed is None:
            return typed
        items: Any = [(None, typed)]
        if isinstance(typed, (list, dict)):
            items = enumerate(typed) if isinstance(typed, list) else typed.items()
        for key, item in items:
            wrong = limits(item, field.metadata)
            if wrong:
                typed = self.fault(path if key is None else (*path, str(key)), wrong)
        return typed

    def value(self, value: Any, hint: Any, path: KeyPath) -> Any:
        """A value of a plain type, a list, a mapping, a dataclass or a union of these."""
        for member in members(hint):
            origin, args = typing.get_origin(member) or member, typing.get_args(member)
            if isinstance(origin, type) and dataclasses.is_dataclass(origin):
                if isinstance(value, dict) or len(members(hint)) == 1:
                    return self.build(value, origin, path)
            elif origin is list and isinstance(value, list):
                item_hint = args[0] if args else Any
                items = [self.value(v, item_hint, (*path, str(i))) for i, v in enumerate(value)]
                return _BAD if any(item is _BAD for item in items) else items
            elif origin is dict and isinstance(value, dict):
                return self.mapping(value, args, path)
            elif origin not in (list, dict):
                fits, typed = scalar(value, member)
                if fits:
                    return typed
        return self.fault(path, expected(hint, value))

    def mapping(self, value: dict[Any, Any], args: tuple[Any, ...], path: KeyPath) -> Any:
        """A free mapping ``dict[key, item]``."""
        key_hint, item_hint = args or (Any, Any)
        result = {}
        for key, item in value.items():
            below = (*path, str(key))
            if key_hint is int and isinstance(key, str) and key.lstrip("-").isdigit():
                key = int(key)  # all keys of a file are read as strings
            if not scalar(key, key_hint)[0]:
                result[key] = self.fault(below, f"the key must be {describe(key_hint)}, got {show(key)}")
            else:
                result[key] = self.value(item, item_hint, below)
        return _BAD if any(item is _BAD for item in result.values()) else result

    def parts(self, value: Any, shape: PartNodes, path: KeyPath) -> Any:
        """A mapping (key = default name) or a list of parts."""
        if value is None:
            return {}
        if isinstance(value, list):
            items = [self.part(v, PartNode(shape.kind), (*path, str(i))) for i, v in enumerate(value)]
            return _BAD if any(item is _BAD for item in items) else items
        if not isinstance(value, dict):
            return self.fault(path, f"expected a mapping of {shape.kind}s, got {show(value)}")
        made = {
            str(key): self.part({} if node is None else node, PartNode(shape.kind, str(key)), (*path, str(key)))
            for key, node in value.items()
        }
        return _BAD if any(part is _BAD for part in made.values()) else made

    def part(self, node: Any, shape: PartNode, path: KeyPath) -> Any:
        """A node ``name`` or ``{name: ..., <settings>}`` as a :class:`Part`."""
        kind = shape.kind
        if not isinstance(node, (dict, str)):
            return self.fault(path, f"expected the name of a {kind} or a mapping with it, got {show(node)}")
        name = name_of(node, shape)
        named_at = (*path, "name") if isinstance(node, dict) and "name" in node else path
        node = {"name": node} if isinstance(node, str) else node
        if not isinstance(name, str) or name == "???":
            known = listing(registry.names(kind))
            return self.fault((*path, "name"), f"the name of a registered {kind} is missing: one of {known}")
        try:
            entry = registry.entry(kind, name)
            cls = entry.config_class()
        except registry.RegistryError as error:
            return self.fault(named_at, str(error))
        if isinstance(entry.target, Path):
            return self.part_of_file(node, shape, path, entry.target)
        return self.typed_part(node, name, cls, kind, path)

    def part_of_file(self, node: dict[str, Any], shape: PartNode, path: KeyPath, file: Path) -> Any:
        """A part that is a YAML file (a template): what the node does not say, the file says."""
        try:
            below = read_yaml(file)
        except ConfigError as error:
            self.problems += error.problems
            return _BAD
        name = name_of(node, shape)
        merged = overlay(below, Tree(node)).values | {"name": name}
        outer = self.locate

        def locate(inner: KeyPath, message: str) -> Problem:
            relative = inner[len(path) :]
            in_file = inner[: len(path)] == path and relative in below.marks and not _holds(node, relative)
            return below.problem(relative, message) if in_file else outer(inner, message)

        self.locate = locate
        try:
            return self.typed_part(merged, name, config_class(shape.kind, name), shape.kind, path)
        finally:
            self.locate = outer

    def typed_part(self, node: dict[str, Any], name: str, cls: Any, kind: str, path: KeyPath) -> Any:
        """The :class:`Part` of a known name."""
        shared = part_settings(kind)
        own = {key: field for key, field in settings(cls).items() if key not in shared}
        self.unknown_keys(node, ["name", *shared, *own], path, kind)
        owner: type[Part] = part_class(kind)
        values = self.fields(node, owner, shared, path)
        config = self.construct(cls, self.fields(node, cls, own, path), path)
        return self.construct(owner, {"name": name, "config": config} | values, path)

    def unknown_keys(self, node: dict[Any, Any], allowed: list[str], path: KeyPath, kind: str = "") -> None:
        """Note the keys that have no meaning at this place."""
        for key in node:
            if key not in allowed:
                hint = self.hint(str(key), allowed, ".".join(path), kind)
                self.fault((*path, str(key)), f"unknown key{hint}")

    def hint(self, key: str, allowed: list[str], here: str, kind: str) -> str:
        """Where an unknown key belongs, or which key was meant."""
        others = _parts_with(kind, key) if kind else []
        if others:
            return f" (it is a setting of {kind} {' and '.join(map(repr, others))})"
        elsewhere = belongs(key, self.places().get(key, ()), here)
        if elsewhere or nearest(key, allowed) or len(allowed) > _MANY_KEYS:
            return elsewhere or nearest(key, allowed)
        return f" (known here: {', '.join(allowed) or 'none'})"

    def places(self) -> dict[str, list[str]]:
        """Every key of this config's schema -> where it is allowed."""
        if self._places is None:
            self._places = defaultdict(list)
            container, cls, prefix = self.root
            start = "".join(f"{key}." for key in prefix)
            for key, place in places(container, cls, start):
                self._places[key].append(place.rstrip("."))
        return self._places


def _holds(node: Any, path: KeyPath) -> bool:
    """Whether a mapping says anything at a path (at least through a value above it)."""
    for key in path:
        if not isinstance(node, dict):
            return True
        if key not in node:
            return False
        node = node[key]
    return True


def _parts_with(kind: str, key: str) -> list[str]:
    """The parts of a kind that know a setting."""
    found = []
    for name in registry.names(kind):
        cls = config_class(kind, name)
        if cls is not None and key in settings(cls):
            found.append(name)
    return found


def _help(field: dataclasses.Field[Any]) -> str:
    text = field.metadata.get("help")
    return f" ({text})" if text else ""
