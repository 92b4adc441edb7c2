"""Carrying the keys of MiniGPT-4 and LAVIS files to where they stand today.

The table itself is in :mod:`minivlm.config.legacy_table`. A file is translated before anything is laid
over it, so a value keeps the line on which it was written, and native and old keys can be mixed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from minivlm.config.errors import Problem
from minivlm.config.legacy_eras import carriers, implied
from minivlm.config.legacy_table import RULES, Old, Rule
from minivlm.config.source import KeyPath, Mark, Tree
from minivlm.config.values import show


@dataclass
class Translation:
    """What :func:`translate` did: one note per key that changed, and the values that made no sense."""

    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def translate(tree: Tree) -> Translation:
    """Apply the table to one file's tree, in place; ``stages`` are translated one by one."""
    stages = tree.values.get("stages")
    done = Translation()
    work = _Translator(tree, done, ())
    leftover = carriers(work.before)
    work.run()
    for path, why in leftover:
        work.drop_carrier(path, why)
    work.add_implied()
    # Options name stages by key, files list them.
    items: Iterable[tuple[Any, Any]] = stages.items() if isinstance(stages, dict) else ()
    if isinstance(stages, list):
        items = enumerate(stages)
    for key, stage in items:
        if isinstance(stage, dict):
            _Translator(tree, done, ("stages", str(key))).run()
    return done


class _Translator:
    """Translates one mapping of sections: a whole file, or one of its stages (``base``)."""

    def __init__(self, tree: Tree, done: Translation, base: KeyPath):
        self.tree = tree
        self.done = done
        self.base = base
        self.root: dict[str, Any] = _node(tree.values, base)
        self.before: dict[str, Any] = tree.sub(base).values
        self.by_length: dict[int, list[tuple[KeyPath, Rule]]] = {}
        for rule in RULES:
            pattern = tuple(rule.old.split("."))
            self.by_length.setdefault(len(pattern), []).append((pattern, rule))

    def run(self) -> None:
        """Apply every rule that matches, in the order of the file."""
        for path, value, section in list(_walk(self.before)):
            for pattern, rule in self.by_length.get(len(path), ()):
                if all(p in ("*", key) for p, key in zip(pattern, path, strict=True)):
                    names = tuple(k for p, k in zip(pattern, path, strict=True) if p == "*")
                    self.apply(rule, path, Old(value, section, self.before, names))
                    break

    def apply(self, rule: Rule, path: KeyPath, old: Old) -> None:
        """Move or drop one key, and note it."""
        try:
            new = _targets(rule, old)
        except ValueError as error:
            self.done.problems.append(self.tree.problem(self.base + path, str(error)))
            return
        if new is None:
            return
        mark = replace(self.tree.locate(self.base + path), renamed=True)
        self.remove(path)
        for target, value in new.items():
            self.put(target, value, mark)
        self.note(mark, path, old.value, new, rule)

    def note(self, mark: Mark, path: KeyPath, value: Any, new: dict[KeyPath, Any], rule: Rule) -> None:
        """Tell what became of a key."""
        names = [".".join(self.base + target) for target in new]
        where = mark.file if mark.line is None else f"{mark.file}:{mark.line}"
        remark = f" ({rule.remark})" if rule.remark else ""
        if not new:
            text = f"{mark.key} is dropped: {rule.why}"
        elif list(new) == [path]:
            text = f"{mark.key}: {show(value)} is now {show(new[path])}{remark}"
        else:
            listed = " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
            text = f"{mark.key} is now {listed}{remark}"
        self.done.notes.append(f"{where}: {text}")

    def remove(self, path: KeyPath) -> None:
        """Remove a key, and the mappings of the old layout that it leaves empty."""
        node = _node(self.root, path[:-1])
        del node[path[-1]]
        for key in self.tree.below(self.base + path):
            del self.tree.marks[key]
        parent = path[:-1]
        keep = 1 if path[0] in ("model", "run") else 2 if path[0] == "datasets" else 0
        if len(parent) > keep and not node:
            self.remove(parent)

    def put(self, path: KeyPath, value: Any, mark: Mark) -> None:
        """Set a new key; the mappings on the way are made if need be."""
        node = self.root
        for depth, key in enumerate(path[:-1], 1):
            inner = node.get(key)
            if isinstance(inner, str):  # `template: plain` is short for `template: {name: plain}`
                whole = self.base + path[:depth]
                self.tree.marks[(*whole, "name")] = self.tree.locate(whole)
                inner = node[key] = {"name": inner}
            elif inner is None:
                inner = node[key] = {}
            elif not isinstance(inner, dict):
                return  # the check of types will say what is wrong with it
            self.tree.marks.setdefault(self.base + path[:depth], replace(mark, weak=True))
            node = inner
        if path[-1] in node and node[path[-1]] != value:
            other = self.tree.locate(self.base + path)
            there = f"line {other.line}" if other.line is not None else other.file
            new = ".".join(self.base + path)
            message = f"says {show(value)} for {new}, but {other.key} in {there} says {show(node[path[-1]])}"
            self.done.problems.append(Problem(mark.file, mark.line, mark.key, message))
            return
        node[path[-1]] = value
        self.tree.marks.setdefault(self.base + path, mark)

    def add_implied(self) -> None:
        """Write down what the old layout means without saying it."""
        for key, (value, why) in implied(self.before).items():
            mark = self.tree.locate(("model",))
            self.put(tuple(key.split(".")), value, replace(mark, renamed=True))
            where = mark.file if mark.line is None else f"{mark.file}:{mark.line}"
            self.done.notes.append(f"{where}: {key} is set to {show(value)}: {why}")

    def drop_carrier(self, path: KeyPath, why: str) -> None:
        """Drop a node that held nothing but old keys, which have been carried elsewhere."""
        if not _node(self.root, path):
            mark = self.tree.locate(self.base + path)
            self.remove(path)
            self.note(mark, path, None, {}, Rule(mark.key, why=why))


def _targets(rule: Rule, old: Old) -> dict[KeyPath, Any] | None:
    if rule.new is None:
        return {}
    if isinstance(rule.new, str):
        return {_fill(rule.new, old.names): old.value}
    new = rule.new(old)
    return None if new is None else {_fill(key, old.names): value for key, value in new.items()}


def _fill(target: str | KeyPath, names: tuple[str, ...]) -> KeyPath:
    if not isinstance(target, str):
        return target
    rest = iter(names)
    return tuple(next(rest) if key == "*" else key for key in target.split("."))


def _walk(node: dict[str, Any], path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any, dict[str, Any]]]:
    for key, value in node.items():
        below = (*path, str(key))
        yield below, value, node
        if isinstance(value, dict) and below != ("stages",):
            yield from _walk(value, below)


def _node(node: Any, path: KeyPath) -> Any:
    for key in path:
        node = node[int(key)] if isinstance(node, list) else node[key]
    return node
