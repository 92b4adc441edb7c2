"""Resolving ``${run.seed}`` and ``${oc.env:HOME}`` in a merged config."""

from __future__ import annotations

import re
from typing import Any

from omegaconf import OmegaConf
from omegaconf.base import Container
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from minivlm.config.errors import Problem
from minivlm.config.source import KeyPath, Tree, first_line, leaves


def resolve(tree: Tree) -> list[Problem]:
    """Replace every interpolation of the tree by its value; those without a value become problems."""
    places = [path for path, value in leaves(tree.values) if _is_open(value)]
    if not places:
        return []
    problems = []
    config = OmegaConf.create(tree.values)
    for path in places:
        try:
            _assign(tree.values, path, _lookup(config, path))
        except InterpolationToMissingValueError:
            problems.append(tree.problem(path, f"a value must be given{_or_environment(tree, path)}"))
        except OmegaConfBaseException as error:
            problems.append(tree.problem(path, f"cannot be resolved: {first_line(error)}"))
    return problems


def variables(tree: Tree) -> dict[KeyPath, str]:
    """The places that still stand as ``${oc.env:NAME}`` or ``${oc.env:NAME,default}``, and the names."""
    found = {path: re.fullmatch(r"\$\{oc\.env:(\w+)(,.*)?\}", str(value)) for path, value in leaves(tree.values)}
    return {path: match[1] for path, match in found.items() if match}


def peek(tree: Tree, path: KeyPath) -> Any:
    """The value at a path of mappings, resolved where that is possible; None if there is none."""
    value = tree.get(path)
    if not _is_open(value):
        return value
    try:
        return _lookup(OmegaConf.create(tree.values), path)
    except OmegaConfBaseException:
        return value  # resolve() reports it


def _or_environment(tree: Tree, path: KeyPath) -> str:
    """The other way to give a value that stands as ``${oc.env:NAME,???}``."""
    node = tree.values
    for key in path:
        node = node[int(key) if isinstance(node, list) else key]
    name = re.search(r"oc\.env:(\w+)", node)
    return f" here, as an option, or in the environment variable {name[1]}" if name else ""


def _is_open(value: Any) -> bool:
    return isinstance(value, str) and "${" in value


def _lookup(config: Any, path: KeyPath) -> Any:
    for key in path:
        config = config[int(key)] if OmegaConf.is_list(config) else config[key]
    return OmegaConf.to_container(config, resolve=True) if isinstance(config, Container) else config


def _assign(node: Any, path: KeyPath, value: Any) -> None:
    for key in path[:-1]:
        node = node[int(key)] if isinstance(node, list) else node[key]
    node[int(path[-1]) if isinstance(node, list) else path[-1]] = value
