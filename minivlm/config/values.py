"""Checking one value against a type hint and the limits of its field; messages in plain words."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from minivlm import registry
from minivlm.config.nodes import members

_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "a mapping",
    Path: "a path",
}


def show(value: Any) -> str:
    """A value as a message quotes it, close to how it looks in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return repr(value)


def describe(hint: Any) -> str:
    """What a type hint asks for, in words: ``int | None`` is "an integer or null"."""
    words = []
    for member in members(hint):
        origin = typing.get_origin(member) or member
        if member is type(None):
            words.append("null")
        elif origin is typing.Literal:
            words += [show(value) for value in typing.get_args(member)]
        else:
            section = isinstance(origin, type) and dataclasses.is_dataclass(origin)
            words.append("a mapping" if section else _NAMES.get(origin, f"a {getattr(origin, '__name__', origin)}"))
    return " or ".join(dict.fromkeys(words))


def scalar(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether a value fits a hint that is no container, and the value as that type."""
    if hint is Any:
        return True, value
    if hint is None or hint is type(None):
        return value is None, None
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint), value
    if hint is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        return fits, float(value) if fits else value
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if hint is Path:
        return isinstance(value, str), Path(value) if isinstance(value, str) else value
    if isinstance(hint, (types.GenericAlias, typing.TypeVar)) or not isinstance(hint, type):
        return True, value  # a hint of the user's own that says nothing about YAML
    return isinstance(value, hint), value


def expected(hint: Any, value: Any) -> str:
    """The message for a value of a wrong type, with the way to write it where that is a common slip."""
    message = f"expected {describe(hint)}, got {show(value)}"
    kinds = {typing.get_origin(member) or member for member in members(hint)}
    plain = isinstance(value, (str, int, float))
    if str in kinds and plain:
        return f"{message} (in quotes it would be a string)"
    if list in kinds and plain:
        return f"{message} (a list of one item is written [{value}])"
    return message


def limits(value: Any, metadata: Mapping[str, Any]) -> str | None:
    """What is wrong with a value by the limits of its field (see ``schema.setting``), or None."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    for key, words, fits in (
        ("ge", "at least", lambda limit: value >= limit),
        ("gt", "greater than", lambda limit: value > limit),
        ("le", "at most", lambda limit: value <= limit),
        ("lt", "less than", lambda limit: value < limit),
    ):
        limit = metadata.get(key)
        if limit is not None and number and not fits(limit):
            return f"must be {words} {limit}, got {show(value)}"
    choices = metadata.get("choices")
    if choices is not None and value not in choices:
        near = registry.suggest(value, [c for c in choices if isinstance(c, str)])
        return f"must be one of {listing(choices)}, got {show(value)}{near}"
    kind = metadata.get("registered")
    if kind is not None:
        try:
            registry.entry(kind, value)
        except registry.RegistryError as error:
            return str(error)
    return None


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` with the one nearest word, or nothing."""
    return registry.suggest(word, difflib.get_close_matches(word, list(known), n=1))


def listing(values: Iterable[Any]) -> str:
    """Values as a message lists them."""
    return ", ".join(show(value) for value in values)
