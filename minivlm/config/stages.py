"""Cutting a file into stages: the common sections, overlaid by what each stage says itself."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from minivlm.config.errors import Problem
from minivlm.config.experiment import RunConfig, StageConfig
from minivlm.config.interpolation import peek
from minivlm.config.layers import overlay
from minivlm.config.source import Tree
from minivlm.config.values import nearest, show
from minivlm.registry import suggest

SECTIONS = ("model", "datasets", "run", "demo")
STAGE_KEYS = ("name", "model", "datasets", "run")
DEFAULT_NAME = "train"
_OUTPUT = ("run", "output_dir")
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


def split_stages(tree: Tree, options: Tree, problems: list[Problem]) -> list[Tree]:
    """One tree with the keys ``name``, ``model``, ``datasets``, ``run`` and ``demo`` per stage.

    Options for the common sections win over what a stage says in the file, and ``stages.<name>.``
    options win over all.
    """
    listed = tree.get(("stages",))
    if listed is None:
        given = options.get(("stages",), {})
        for key in given if isinstance(given, dict) else [""]:
            path = ("stages", key) if key else ("stages",)
            problems.append(options.problem(path, "the file has no stages"))
        whole = overlay(_pick(tree, (*SECTIONS, "name")), _pick(options, (*SECTIONS, "name")), StageConfig)
        whole.values.setdefault("name", DEFAULT_NAME)
        return [whole]
    if not isinstance(listed, list) or not listed:
        problems.append(tree.problem(("stages",), f"expected a list of stages, got {show(listed)}"))
        return []
    own = _stage_options(listed, options, problems)
    common, shared = _pick(tree, SECTIONS), _pick(options, SECTIONS)
    found: list[Tree] = []
    for index, stage in enumerate(listed):
        if not isinstance(stage, dict):
            message = f"expected a mapping with the name of the stage, got {show(stage)}"
            problems.append(tree.problem(("stages", str(index)), message))
            continue
        said = _named(tree.sub(("stages", str(index))), index)
        found.append(_resolve(said, own.get(index, []), common, shared, single=len(listed) == 1))
        for layer in (said, *own.get(index, [])):
            problems += _unknown_keys(layer)
    problems += _name_problems(found)
    problems += _output_problems(found)
    problems += _idle_dataset_options(found, shared)
    return found


def _stage_options(listed: list[object], options: Tree, problems: list[Problem]) -> dict[int, list[Tree]]:
    """The options of each stage, which is called by its name or its number."""
    names = [stage.get("name") if isinstance(stage, dict) else None for stage in listed]
    given = options.get(("stages",), {})
    if not isinstance(given, dict):
        problems.append(options.problem(("stages",), "an option can only change a stage: stages.<name>.<key>"))
        return {}
    found: dict[int, list[Tree]] = {}
    for key in given:
        path = ("stages", key)
        if key not in names and not (key.isdigit() and int(key) < len(listed)):
            known = [name for name in names if isinstance(name, str)]
            message = f"there is no stage '{key}'{suggest(key, known)}; stages: {', '.join(known)}"
            problems.append(options.problem(path, message))
        elif not isinstance(given[key], dict):
            problems.append(options.problem(path, f"expected stages.{key}.<key>, got {show(given[key])}"))
        else:
            index = names.index(key) if key in names else int(key)
            found.setdefault(index, []).append(options.sub(path))
    return found


def _named(stage: Tree, index: int) -> Tree:
    """The stage, with marks that call it by its name instead of its number."""
    old, new = f"stages.{index}", f"stages.{stage.values.get('name', index)}"
    for path, mark in stage.marks.items():
        if mark.key == old or mark.key.startswith(f"{old}."):
            stage.marks[path] = replace(mark, key=new + mark.key[len(old) :])
    return stage


def _unknown_keys(stage: Tree) -> Iterable[Problem]:
    for key in stage.values:
        if key not in STAGE_KEYS:
            near = nearest(str(key), STAGE_KEYS) or f" (known in a stage: {', '.join(STAGE_KEYS)})"
            yield stage.problem((str(key),), f"unknown key{near}")


def _resolve(said: Tree, own: list[Tree], common: Tree, shared: Tree, *, single: bool) -> Tree:
    """Common sections <- the stage in the file <- common options <- options of the stage."""
    replaces_datasets = "datasets" in said.values
    if replaces_datasets:
        common = _pick(common, tuple(key for key in SECTIONS if key != "datasets"))
    merged = overlay(common, _pick(said, STAGE_KEYS), StageConfig)
    if replaces_datasets:
        # A dataset that this stage does not use must not come into being through an option.
        shared = _only_datasets(shared, merged.get(("datasets",)))
    for layer in (shared, *(_pick(tree, STAGE_KEYS) for tree in own)):
        merged = overlay(merged, layer, StageConfig)
    # What the stage says itself is blamed on its own line, what it lacks on the start of the stage.
    merged.marks[()] = said.locate(())
    chosen = any(_OUTPUT in tree.marks for tree in own)
    chosen = chosen or (_OUTPUT in said.marks and _OUTPUT not in shared.marks)
    if not single and not chosen:
        parent = merged.get(_OUTPUT, RunConfig().output_dir)
        run = merged.get(("run",)) or {}
        if isinstance(parent, str) and isinstance(run, dict):
            merged.values["run"] = run | {"output_dir": f"{parent}/{merged.values.get('name')}"}
    return merged


def _only_datasets(options: Tree, used: object) -> Tree:
    """The options without those for datasets that are not used."""
    given = options.get(("datasets",))
    if not isinstance(given, dict) or not isinstance(used, dict):
        return options
    unused = [key for key in given if key not in used]
    marks = {p: m for p, m in options.marks.items() if not (p[:1] == ("datasets",) and p[1:2] and p[1] in unused)}
    datasets = {key: node for key, node in given.items() if key in used}
    return Tree(options.values | {"datasets": datasets}, marks)


def _name_problems(stages: list[Tree]) -> Iterable[Problem]:
    seen: set[object] = set()
    for stage in stages:
        name = stage.values.get("name")
        if not isinstance(name, str) or not _SAFE_NAME.fullmatch(name):
            message = "every stage needs a name of letters, digits and _ . + -"
            yield stage.problem(("name",), message if name is None else f"{message}, got {show(name)}")
        elif name in seen:
            yield stage.problem(("name",), f"there are two stages '{name}'")
        else:
            seen.add(name)


def _output_problems(stages: list[Tree]) -> Iterable[Problem]:
    """Two stages in one folder would overwrite, or resume, each other's checkpoints."""
    seen: dict[str, object] = {}
    for stage in stages:
        folder, name = peek(stage, _OUTPUT), stage.values.get("name")
        if isinstance(folder, str) and folder in seen and seen[folder] != name:
            yield stage.problem(_OUTPUT, f"stage '{seen[folder]}' writes to the same folder '{folder}'")
        elif isinstance(folder, str):
            seen[folder] = name


def _idle_dataset_options(stages: list[Tree], shared: Tree) -> Iterable[Problem]:
    given = shared.get(("datasets",))
    for key in given if isinstance(given, dict) else ():
        if not any(key in (stage.get(("datasets",)) or {}) for stage in stages):
            yield shared.problem(("datasets", key), "no stage uses this dataset")


def _pick(tree: Tree, keys: tuple[str, ...]) -> Tree:
    """Some top-level keys of a tree (copied)."""
    whole = tree.sub(())
    return Tree(
        {key: value for key, value in whole.values.items() if key in keys},
        {path: mark for path, mark in whole.marks.items() if not path or path[0] in keys},
    )
