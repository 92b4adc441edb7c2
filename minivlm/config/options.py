"""The ``--options`` of the command line as one more layer of a config."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minivlm.config.errors import Problem
from minivlm.config.source import KeyPath, Mark, Tree, first_line, leaves, with_string_keys

WHERE = "--options"
"""Stands for the file in the problems and notes of options."""


def parse_options(options: Sequence[str]) -> tuple[Tree, list[Problem]]:
    """Options ``a.b=c ...``, or in LAVIS's form ``a.b c ...`` when the first item has no ``=``.

    Values are read as YAML (``1e-4``, ``[a, b]``, ``null``); ``a[0]`` is the same as ``a.0``. Items of
    lists become keys "0", "1", ..., which :func:`minivlm.config.layers.overlay` understands.
    """
    tree = Tree({}, {(): Mark(WHERE, weak=True)})
    problems: list[Problem] = []
    for key, text in _pairs(list(options), problems):
        path = tuple(re.sub(r"\[(\w+)\]", r".\1", key).split("."))
        if not all(path):
            problems.append(Problem(WHERE, None, key, "expected a key such as run.init_lr"))
            continue
        try:
            # The very reading that OmegaConf gives to a dot list.
            read: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            problems.append(Problem(WHERE, None, key, f"the value cannot be read: {first_line(error)}"))
            continue
        _set(tree, path, with_string_keys(read["value"]))
    return tree, problems


def _pairs(options: list[str], problems: list[Problem]) -> list[tuple[str, str]]:
    if not options:
        return []
    if "=" in options[0]:
        for item in options:
            if "=" not in item:
                problems.append(Problem(WHERE, None, item, "expected key=value"))
        return [(key, value) for key, sign, value in (item.partition("=") for item in options) if sign]
    if len(options) % 2:
        problems.append(Problem(WHERE, None, options[-1], "has no value; expected pairs `key value` or key=value"))
    return list(zip(options[::2], options[1::2], strict=False))


def _set(tree: Tree, path: KeyPath, value: object) -> None:
    node = tree.values
    for depth, key in enumerate(path[:-1], 1):
        inner = node.get(key)
        if isinstance(inner, str):  # model.connector=mlp and model.connector.depth=3
            inner = {"name": inner}
            tree.marks[(*path[:depth], "name")] = Mark(WHERE, key=".".join((*path[:depth], "name")))
        elif not isinstance(inner, dict):
            inner = {}
        node[key] = inner
        tree.marks[path[:depth]] = Mark(WHERE, key=".".join(path[:depth]), weak=True)
        node = inner
    for old in tree.below(path):
        del tree.marks[old]
    node[path[-1]] = value
    tree.marks[path] = Mark(WHERE, key=".".join(path), weak=isinstance(value, dict))
    for below, _ in leaves(value):
        tree.marks[path + below] = Mark(WHERE, key=".".join(path + below))
