"""The packaged defaults of models and datasets, which lie beneath what a file says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minivlm import builtins
from minivlm.config.errors import ConfigError, Problem
from minivlm.config.experiment import StageConfig
from minivlm.config.interpolation import peek
from minivlm.config.layers import overlay
from minivlm.config.source import KeyPath, Tree, read_yaml
from minivlm.paths import is_weight_file, respelled
from minivlm.registry import suggest

FOLDER = builtins.CONFIGS
"""Holds ``models/<arch>_<model_type>.yaml`` and ``datasets/<name>/<type>.yaml``.

Beside ``model`` a file of the first kind may have sections ``run`` and ``demo`` (how this family is trained and
talked to) and name other files under ``base``. What several models change alike stands in ``models/variants``.
"""


def list_model_defaults() -> list[tuple[str, str]]:
    """All packaged models as (arch, model_type), sorted."""
    found = []
    for file in sorted((FOLDER / "models").glob("*.yaml")):
        arch = read_yaml(file).get(("model", "arch"))
        if isinstance(arch, str) and file.stem.startswith(f"{arch}_"):
            found.append((arch, file.stem[len(arch) + 1 :]))
        else:
            head, _, tail = file.stem.partition("_")
            found.append((head, tail))
    return sorted(found)


def add_model_defaults(tree: Tree, problems: list[Problem]) -> Tree | None:
    """Lay the tree over the file that ``model.arch`` and ``model.model_type`` select.

    Returns None, with the problems noted, if there is no such file.
    """
    given = peek(tree, ("model", "arch")), peek(tree, ("model", "model_type"))
    if given == (None, None):
        return tree
    arch, model_type = (canonical(name) for name in given)
    file = FOLDER / "models" / f"{arch}_{model_type}.yaml"
    if None in (arch, model_type) or not file.is_file():
        problems.append(_no_such_model(tree, *given))
        return None
    try:
        defaults = read_model(file)
    except ConfigError as error:
        problems += error.problems
        return None
    checkpoint, weights = peek(tree, ("model", "checkpoint")), peek(tree, ("model", "language_model", "weights"))
    held: list[str] = []
    if isinstance(checkpoint, str) and not is_weight_file(checkpoint):
        # The folder of a model holds every part; a .pth file only what was trained.
        held += ["weights", "path", "revision"] if _is_whole(Path(checkpoint)) else ["weights"]
    if any(isinstance(each, str) and _has_tokenizer(Path(each)) for each in (checkpoint, weights)):
        held.append("tokenizer")
    _forget(defaults.values["model"], held)
    whole = overlay(defaults, tree, StageConfig)
    whole.values["model"] |= {"arch": arch, "model_type": model_type}
    return whole


def _forget(node: dict[str, Any], keys: Sequence[str]) -> None:
    """Take keys out of the parts of a node, and of those inside them (the encoders of ``dual``)."""
    for part in node.values():
        if isinstance(part, dict):
            for key in keys if "name" in part else ():
                part.pop(key, None)
            _forget(part, keys)


def canonical(name: Any) -> Any:
    """An arch or model_type as files spell it: ``MGM`` is ``mini_gemini``, ``7B-HD`` is ``7b_hd``."""
    if not isinstance(name, str):
        return name
    plain = name.lower().replace("-", "_")
    return builtins.ARCH_ALIASES.get(plain, plain)


def _is_whole(folder: Path) -> bool:
    """Whether a folder is a whole model of Hugging Face's kind, not adapters or a projector on the preset's bases."""
    if not (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return False
    return any(any(folder.glob(pattern)) for pattern in ("model*.safetensors", "pytorch_model*.bin"))


def _has_tokenizer(folder: Path) -> bool:
    """Whether a folder is a model with its tokenizer, as one of minivlm always is; a run yet to come is none."""
    return (folder.is_dir() and not (folder / "config.json").is_file()) or (folder / "tokenizer.json").is_file()


def add_dataset_defaults(tree: Tree, problems: list[Problem]) -> Tree:
    """Lay every dataset's node over the file that its ``name`` and ``type`` select; consumes ``type``."""
    datasets = tree.get(("datasets",))
    if not isinstance(datasets, dict):
        return tree
    merged = tree
    for key, node in datasets.items():
        path = ("datasets", str(key))
        given = node if isinstance(node, dict) else {"name": node} if isinstance(node, str) else {}
        name = peek(tree, (*path, "name")) if given.get("name") is not None else key
        name = given["name"] if isinstance(node, str) else name
        kind = peek(tree, (*path, "type")) if given.get("type") is not None else "default"
        file = packaged_dataset(str(name)) / f"{kind}.yaml"
        if file.is_file():
            try:
                merged = overlay(_under(read_yaml(file), path, str(name)), merged, StageConfig)
            except ConfigError as error:
                problems += error.problems
        elif kind != "default":
            known = sorted(p.stem for p in file.parent.glob("*.yaml"))
            there = f"there are: {', '.join(known)}" if known else "it has none"
            problem = f"dataset '{name}' has no type '{kind}'{suggest(kind, known)}; {there}"
            problems.append(tree.problem((*path, "type"), problem))
        node = merged.get(path)
        if isinstance(node, dict) and "type" in node:
            merged.values["datasets"][key] = {k: v for k, v in node.items() if k != "type"}
            merged.marks.pop((*path, "type"), None)
    return merged


def packaged_dataset(name: str) -> Path:
    """The folder of a dataset's packaged defaults, under any spelling of its name; it need not exist."""
    folders = [FOLDER / "datasets" / each for each in respelled(name)]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def read_model(file: Path) -> Tree:
    """The sections ``model``, ``run`` and ``demo`` of packaged defaults, over those of its ``base``."""
    tree = read_yaml(file)
    own = _under(tree, ("model",))
    for section in ("run", "demo"):
        if isinstance(tree.get((section,)), dict):
            own = overlay(own, _under(tree, (section,)))
    base = tree.get(("base",), [])
    whole = Tree({}, {})
    for name in [base] if isinstance(base, str) else base:
        whole = overlay(whole, read_model(file.parent / name), StageConfig)
    return overlay(whole, own, StageConfig)


def _no_such_model(tree: Tree, arch: Any, model_type: Any) -> Problem:
    models = list_model_defaults()
    archs = sorted({known for known, _ in models})
    types = [known for of, known in models if of == canonical(arch)]
    if arch is None:
        message = f"needs model.arch beside it; there are: {', '.join(archs) or 'none'}"
        return tree.problem(("model", "model_type"), message)
    if not types:
        hint = suggest(arch, [*archs, *builtins.ARCH_ALIASES])
        return tree.problem(("model", "arch"), f"unknown arch '{arch}'{hint}; there are: {', '.join(archs) or 'none'}")
    if model_type is None:
        return tree.problem(("model", "arch"), f"needs model.model_type beside it; there are: {', '.join(types)}")
    message = f"unknown model_type '{model_type}' of '{arch}'{suggest(model_type, types)}; "
    return tree.problem(("model", "model_type"), f"{message}there are: {', '.join(types)}")


def _under(tree: Tree, path: KeyPath, name: str = "") -> Tree:
    """A file of defaults as a tree whose node stands at ``path``.

    The file holds the node itself or, like an experiment, the sections around it (``model: ...``,
    ``datasets: {name: ...}``).
    """
    inside = (path[0], name) if name else path
    start: KeyPath = inside if isinstance(tree.get(inside), dict) else ()
    node = tree.sub(start) if start else tree
    # The file belongs to this name, whatever key the node stands under.
    values: Any = {"name": name} | node.values if name else node.values
    for key in reversed(path):
        values = {key: values}
    marks = {path + key: mark for key, mark in node.marks.items()}
    return Tree(values, marks | {path[:n]: node.locate(()) for n in range(len(path))})
