"""Laying one config over another, with the marks of where each value came from."""

from __future__ import annotations

from typing import Any

from minivlm.config.nodes import PartNode, PartNodes, Shape, child, name_of, part_settings
from minivlm.config.source import KeyPath, Mark, Tree

_MISSING = object()


def overlay(base: Tree, top: Tree, shape: Shape = None) -> Tree:
    """``top`` over ``base``: mappings are joined key by key, everything else is replaced.

    A part whose ``name`` changes starts afresh, because the settings of the old part mean nothing to the
    new one; only what belongs to its slot stays: a true/false ``freeze``, and ``init_lr``. With another ``path``
    the ``revision`` goes, which belonged to the old one. A mapping with
    the keys "0", "1", ... over a list changes these items (options such as ``stages.0.run.seed=1``).
    """
    merging = _Merging(base, top)
    values = merging.merge(base.values, top.values, (), shape)
    return Tree(values, merging.marks)


class _Merging:
    def __init__(self, base: Tree, top: Tree):
        self.top = top
        self.marks: dict[KeyPath, Mark] = dict(base.marks)
        start = top.locate(())
        if not (start.weak and () in self.marks):
            self.marks[()] = start

    def merge(self, old: Any, new: Any, path: KeyPath, shape: Shape) -> Any:
        if isinstance(shape, PartNode):
            old, new = self._as_mapping(old, path, self.marks), self._as_mapping(new, path, self.top.marks)
        if isinstance(shape, (type, PartNodes)) or _is_dataset(shape):
            # `run:` with nothing below it is an empty section
            old, new = {} if old is None else old, {} if new is None else new
        if isinstance(old, list) and isinstance(new, dict) and _are_indices(new, old):
            return [
                self.merge(item, new[str(i)], (*path, str(i)), None) if str(i) in new else item
                for i, item in enumerate(old)
            ]
        if not (isinstance(old, dict) and isinstance(new, dict)):
            self._replace(path)
            return new
        if isinstance(shape, PartNode):
            old = self._start_afresh(old, new, path, shape)
        mark = self.top.marks.get(path)
        if path and mark is not None and not (mark.weak and path in self.marks):
            self.marks[path] = mark
        merged = dict(old)
        for key, item in new.items():
            below = (*path, str(key))
            # The name that decides about the children may stand in either layer.
            kind = child(shape, key, old | new)
            merged[key] = self.merge(old.get(key, _MISSING), item, below, kind)
        return merged

    def _replace(self, path: KeyPath) -> None:
        for key in [k for k in self.marks if k[: len(path)] == path and k]:
            del self.marks[key]
        self.marks |= {key: mark for key, mark in self.top.below(path).items() if key}

    def _as_mapping(self, node: Any, path: KeyPath, marks: dict[KeyPath, Mark]) -> Any:
        if not isinstance(node, str):
            return node
        if path in marks:
            marks[(*path, "name")] = marks[path]
        return {"name": node}

    def _start_afresh(self, old: dict[str, Any], new: dict[str, Any], path: KeyPath, shape: PartNode) -> Any:
        if new.get("name") is None or new["name"] == name_of(old, shape):
            stale = {"revision"} if new.get("path", old.get("path")) != old.get("path") else set()
            kept = {key: value for key, value in old.items() if key not in stale}
        else:
            slot = [key for key in part_settings(shape.kind) if key != "weights"]
            kept = {key: old[key] for key in slot if key in old and not isinstance(old[key], list)}
        for key in [k for k in self.marks if k[: len(path)] == path and len(k) > len(path)]:
            if key[len(path)] not in kept:
                del self.marks[key]
        return kept


def _is_dataset(shape: Shape) -> bool:
    return isinstance(shape, PartNode) and shape.kind == "dataset"


def _are_indices(new: dict[str, Any], old: list[Any]) -> bool:
    return bool(new) and all(str(key).isdigit() and int(key) < len(old) for key in new)
