"""Reading YAML so that every value still knows the file and the line it came from."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minivlm.config.errors import ConfigError, Problem
from minivlm.paths import WEIGHT_SUFFIXES
from minivlm.registry import suggest

KeyPath = tuple[str, ...]
"""Keys from the root of a config to a value; items of a list count as keys "0", "1", ..."""


@dataclass(frozen=True)
class Mark:
    """Where a value was written: file, line, and the key under which it stands there.

    ``renamed`` marks a value that a legacy key brought to its place. A ``weak`` mark belongs to a mapping
    that nobody wrote but that had to exist around a value; it yields to any other mark.
    """

    file: str
    line: int | None = None
    key: str = ""
    renamed: bool = False
    weak: bool = False


@dataclass
class Tree:
    """Plain dicts and lists with a :class:`Mark` for the path of each key and list item."""

    values: Any
    marks: dict[KeyPath, Mark] = field(default_factory=dict)

    def locate(self, path: KeyPath) -> Mark:
        """The mark of a path, or of the nearest place above it, with ``key`` for the whole path."""
        for length in range(len(path), -1, -1):
            mark = self.marks.get(path[:length])
            if mark is None:
                continue
            made_up = mark.renamed and mark.weak
            if length == len(path) and not made_up:
                return mark
            # Below a renamed key the old name would mislead: it never had such children.
            start = path[:length] if mark.renamed else (mark.key,)
            key = ".".join(part for part in (*start, *path[length:]) if part)
            return replace(mark, key=key, renamed=False, weak=False)
        return Mark("", None, ".".join(path))

    def problem(self, path: KeyPath, message: str) -> Problem:
        """A problem at a path; a renamed key is shown as it was written."""
        mark = self.locate(path)
        if mark.renamed and mark.key != ".".join(path):
            message = f"{message} (it is now {'.'.join(path)})"
        return Problem(mark.file, mark.line, mark.key, message)

    def get(self, path: KeyPath, default: Any = None) -> Any:
        """The value at a path of mappings, or the default."""
        node = self.values
        for key in path:
            if not isinstance(node, dict) or key not in node:
                return default
            node = node[key]
        return node

    def below(self, path: KeyPath) -> dict[KeyPath, Mark]:
        """The marks of a path and of everything in it."""
        return {key: mark for key, mark in self.marks.items() if key[: len(path)] == path}

    def sub(self, path: KeyPath) -> Tree:
        """What stands at a path of mappings and lists, as a tree of its own (copied)."""
        node = self.values
        for key in path:
            node = node[int(key)] if isinstance(node, list) else node[key]
        marks = {key[len(path) :]: mark for key, mark in self.below(path).items()}
        marks.setdefault((), self.locate(path))
        return Tree(copy.deepcopy(node), marks)


def leaves(node: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """All values that are no mapping and no list, with their paths, in the order of the file."""
    if isinstance(node, dict):
        for key, item in node.items():
            yield from leaves(item, (*path, str(key)))
    elif isinstance(node, list):
        for index, item in enumerate(node):
            yield from leaves(item, (*path, str(index)))
    else:
        yield path, node


def read_yaml(path: str | os.PathLike[str]) -> Tree:
    """Read a YAML file whose top level is a mapping.

    Raises :class:`ConfigError` if the file is missing, is no YAML, or repeats a key.
    """
    name = os.fspath(path)
    file = Path(name).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem(name, None, "", _why_unreadable(file, error))]) from error
    return parse_yaml(text, name)


def parse_yaml(text: str, name: str) -> Tree:
    """The tree of a YAML text; ``name`` stands for the file in messages. Raises like :func:`read_yaml`."""
    root = Mark(name, 1)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError([_syntax_problem(error, name)]) from error
    if node is None:
        return Tree({}, {(): root})
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError([Problem(name, 1, "", "expected a mapping with sections such as `model:`")])
    lines = _Lines(name)
    lines.walk(node, (), ())
    if lines.problems:
        raise ConfigError(lines.problems)
    marks = {path: Mark(name, line, ".".join(path)) for path, line in lines.lines.items()}
    tree = Tree({}, {(): root} | marks)
    try:
        # OmegaConf, unlike YAML 1.1, reads 1e-4 as a number; it leaves ${...} for later.
        tree.values = with_string_keys(OmegaConf.to_container(OmegaConf.create(text), resolve=False))
    except yaml.YAMLError as error:
        raise ConfigError([_syntax_problem(error, name)]) from error
    except OmegaConfBaseException as error:
        key = tuple((error.full_key or "").split(".")) if error.full_key else ()
        raise ConfigError([tree.problem(key, first_line(error))]) from error
    return tree


def with_string_keys(node: Any) -> Any:
    """A copy in which every key of a mapping is a string, as the paths of marks have it."""
    if isinstance(node, dict):
        return {str(key): with_string_keys(item) for key, item in node.items()}
    return [with_string_keys(item) for item in node] if isinstance(node, list) else node


def first_line(error: BaseException) -> str:
    """The message of an error without the details that follow it."""
    return str(error).strip().split("\n")[0]


class _Lines:
    """Walks composed YAML nodes: the line of every key, and the keys that are given twice."""

    def __init__(self, name: str):
        self.name = name
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[Problem] = []

    def walk(self, node: yaml.Node, path: KeyPath, above: tuple[int, ...]) -> None:
        if id(node) in above:
            message = "the alias refers to the node that it stands in"
            self.problems.append(Problem(self.name, _line(node), ".".join(path), message))
            return
        above = (*above, id(node))
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.lines[(*path, str(index))] = _line(item)
                self.walk(item, (*path, str(index)), above)
        elif isinstance(node, yaml.MappingNode):
            self._mapping(node, path, above)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath, above: tuple[int, ...]) -> None:
        seen: dict[str, int] = {}
        for key_node, value in node.value:
            key, line = str(key_node.value), _line(key_node)
            if key_node.tag == "tag:yaml.org,2002:merge":
                # `<<: *anchor`: its lines hold only where the mapping has no key of its own.
                for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    other = _Lines(self.name)
                    other.walk(part, path, above)
                    self.lines = other.lines | self.lines
                    self.problems += other.problems
                continue
            if key in seen:
                message = f"the key is given twice, first in line {seen[key]}"
                self.problems.append(Problem(self.name, line, ".".join((*path, key)), message))
            seen[key] = line
            self.lines[(*path, key)] = line
            self.walk(value, (*path, key), above)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _syntax_problem(error: yaml.YAMLError, name: str) -> Problem:
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or first_line(error)
    context = getattr(error, "context", None)
    message = f"not valid YAML: {f'{context}, ' if context else ''}{reason}"
    return Problem(name, mark.line + 1 if mark is not None else None, "", message)


def _why_unreadable(file: Path, error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        if file.suffix in WEIGHT_SUFFIXES:
            return (
                "a file of weights does not say which model it belongs to; give a YAML file that names it under "
                "model.checkpoint, beside arch and model_type"
            )
        return "not a text file in UTF-8"
    if file.is_dir():
        return "expected a YAML file, this is a folder"
    if isinstance(error, FileNotFoundError):
        near = suggest(file.name, [p.name for p in file.parent.glob("*.y*ml")] if file.parent.is_dir() else [])
        return f"there is no such file{near}"
    return f"cannot be read: {error}"
