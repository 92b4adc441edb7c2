"""From the path of an experiment file to typed stages: ``load_config``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minivlm import registry
from minivlm.config.defaults import add_dataset_defaults, add_model_defaults, list_model_defaults
from minivlm.config.errors import ConfigError, Problem
from minivlm.config.experiment import NO_VISION, Experiment, ModelConfig, StageConfig
from minivlm.config.interpolation import peek, resolve, variables
from minivlm.config.layers import overlay
from minivlm.config.legacy import translate
from minivlm.config.nodes import belongs, places
from minivlm.config.options import parse_options
from minivlm.config.overlap import overlap_notes
from minivlm.config.source import KeyPath, Mark, Tree, leaves, read_yaml, with_string_keys
from minivlm.config.stages import SECTIONS, split_stages
from minivlm.config.validate import validate
from minivlm.config.values import listing, nearest, show
from minivlm.paths import is_placeholder

__all__ = ["list_model_defaults", "load_config", "parse_model"]

TOP_KEYS = ("imports", "base", *SECTIONS, "stages")
_VISION = ("vision_encoder", "connector")
_PARTS = (*_VISION, "language_model", "template")


def load_config(path: str | os.PathLike[str], options: Sequence[str] | None = None) -> Experiment:
    """Read an experiment file, lay it over its defaults, lay the options over it, check everything.

    ``options`` are ``a.b=c`` items, or LAVIS's pairs ``a.b c``. Raises :class:`ConfigError` with every
    problem found; nothing heavy is imported before.
    """
    name = os.fspath(path)
    work = _Loading()
    given, wrong = parse_options(options or ())
    work.problems += wrong
    tree = work.read(name, ())
    if tree is None:
        raise ConfigError(work.problems)
    work.translate(given)
    if "imports" in given.values:
        work.run_imports(given, Path())
    work.check_top_keys(tree, given)
    stages = [work.stage(part) for part in split_stages(tree, given, work.problems)]
    ready = [stage for stage in stages if stage is not None]
    if work.problems:
        raise ConfigError(work.problems)
    work.notes += [note for stage in ready for note in overlap_notes(stage)]
    notes, imports = (list(dict.fromkeys(each)) for each in (work.notes, work.imports))
    return Experiment(ready, Path(name), notes, imports, work.variables)


def parse_model(container: dict[str, Any], where: str) -> ModelConfig:
    """A ``model`` section from elsewhere: a checkpoint's config.yaml, or ``{arch: ..., model_type: ...}``.

    Packaged defaults are added only if parts are missing, so a complete section means the same for ever.
    ``where`` names the source in problems. Raises :class:`ConfigError`.
    """
    marks = {(): Mark(where), ("model",): Mark(where, None, "model")}
    tree = Tree({"model": with_string_keys(container)}, marks)
    problems: list[Problem] = []
    if _missing_parts(tree):
        with_defaults = add_model_defaults(tree, problems)
        if with_defaults is None:
            raise ConfigError(problems)
        tree = with_defaults
        problems += resolve(tree)
    _without_vision(tree)
    model, wrong = validate(tree.values["model"], ModelConfig, tree.problem, ("model",))
    problems += [] if problems else wrong + _missing_parts(tree)
    if problems:
        raise ConfigError(problems)
    assert isinstance(model, ModelConfig)
    return model


@dataclass
class _Loading:
    """What gathers while a file is loaded."""

    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    imports: list[str] = field(default_factory=list)
    variables: dict[tuple[str, str], str] = field(default_factory=dict)

    def read(self, name: str, above: tuple[Path, ...]) -> Tree | None:
        """A file over the files of its ``base:``, or None if one of them cannot be read."""
        try:
            tree = read_yaml(name)
        except ConfigError as error:
            self.problems += error.problems
            return None
        above = (*above, Path(name).expanduser().resolve())
        whole: Tree | None = Tree({}, {})
        for path, file in self._files(tree, "base", "a file or a list of files"):
            beside = os.path.normpath(Path(name).parent / Path(file).expanduser())
            if Path(beside).resolve() in above:
                self.problems.append(tree.problem(path, f"the files are each other's base: {file}"))
                whole = None
                continue
            if not Path(beside).is_file():
                self.problems.append(tree.problem(path, f"there is no file {beside}"))
                whole = None
                continue
            below = self.read(beside, above)
            whole = overlay(whole, below, StageConfig) if whole and below else None
        self.run_imports(tree, Path(name).expanduser().parent)
        self.translate(tree)
        for key in ("base", "imports"):
            tree.values.pop(key, None)
        return overlay(whole, tree, StageConfig) if whole else None

    def run_imports(self, tree: Tree, folder: Path) -> None:
        """Run the user's files and modules, so that their parts are registered."""
        for path, item in self._files(tree, "imports", "a list of Python files or modules"):
            # Only a file has a place; a dotted name is looked up like any import.
            target = os.path.normpath(folder / Path(item).expanduser()) if item.endswith(".py") else item
            try:
                registry.import_user_file(target)
            except registry.RegistryError as error:
                self.problems.append(tree.problem(path, str(error).removeprefix("imports: ")))
            else:
                self.imports.append(str(Path(target).resolve()) if item.endswith(".py") else item)

    def _files(self, tree: Tree, key: str, expected: str) -> list[tuple[KeyPath, str]]:
        """The strings of a key that holds one or a list of them."""
        part = Tree({key: tree.sub(()).values.get(key)}, tree.marks)
        self.problems += resolve(part)  # only the environment can be asked as early as this
        value = part.values[key]
        if value is None:
            return []
        found: list[tuple[KeyPath, str]] = []
        for index, item in enumerate(value if isinstance(value, list) else [value]):
            path: KeyPath = (key, str(index)) if isinstance(value, list) else (key,)
            if isinstance(item, str):
                found.append((path, item))
            else:
                self.problems.append(tree.problem(path, f"expected {expected}, got {show(item)}"))
        return found

    def translate(self, tree: Tree) -> None:
        """Carry the keys of MiniGPT-4 and LAVIS files to where they stand today."""
        done = translate(tree)
        self.notes += done.notes
        self.problems += done.problems

    def check_top_keys(self, tree: Tree, given: Tree) -> None:
        """Note the sections that do not exist."""
        allowed = TOP_KEYS if "stages" in tree.values else (*TOP_KEYS, "name")
        if "base" in given.values:
            self.problems.append(given.problem(("base",), "cannot be given as an option"))
        for layer in (tree, given):
            for key in layer.values:
                if key not in allowed:
                    self.problems.append(layer.problem((str(key),), f"unknown key{_belongs(str(key), tree)}"))

    def stage(self, tree: Tree) -> StageConfig | None:
        """Add the defaults of one stage, resolve it and build it."""
        with_model = add_model_defaults(tree, self.problems)
        tree = add_dataset_defaults(with_model or tree, self.problems)
        _without_vision(tree)
        asked = variables(tree)
        unresolved = [*resolve(tree), *_placeholders(tree)]
        # What cannot be resolved would be reported a second time as a value of the wrong type.
        places_of = {(p.file, p.line, p.key) for p in unresolved}
        stage, problems = validate(tree.values, StageConfig, tree.problem)
        if stage is not None:
            self.variables |= {(stage.name, ".".join(path)): name for path, name in asked.items()}
        if with_model is not None:
            problems += _missing_parts(tree)
        problems += _cached_crops(tree) + _other_size(tree)
        self.problems += unresolved + [p for p in problems if (p.file, p.line, p.key) not in places_of]
        return stage


def _missing_parts(tree: Tree) -> list[Problem]:
    """The parts that a model lacks; a checkpoint brings its own."""
    model = tree.get(("model",), "")
    model = {} if model is None else model
    if not isinstance(model, dict) or model.get("checkpoint") is not None:
        return []
    problems = []
    for part in _PARTS:
        if model.get(part) is None:
            known = listing(registry.names(part))
            message = f"a model needs a {part} (one of {known}), unless model.checkpoint or arch and model_type"
            alone = part in _VISION and model.get("language_model") is not None
            hint = "; a language model alone leaves out vision_encoder and connector" if alone else ""
            problems.append(tree.problem(("model", part), f"{message} bring it{hint}"))
    return problems


def _without_vision(tree: Tree) -> None:
    """Name the parts `none` that a language model alone leaves out; beside a checkpoint, those that are null."""
    model = tree.get(("model",))
    if not isinstance(model, dict):
        return
    absent = [part for part in _VISION if model.get(part) is None]
    if model.get("checkpoint") is not None:
        absent = [part for part in absent if part in model]
    elif len(absent) < len(_VISION) or model.get("language_model") is None:
        return
    model |= dict.fromkeys(absent, NO_VISION)


def _placeholders(tree: Tree) -> list[Problem]:
    """Values that only say that something is to be filled in, as the files of MiniGPT-4 come."""
    return [
        tree.problem(path, f"is still the placeholder {value!r}; give the real path in the file or as an option")
        for path, value in leaves(tree.values)
        if isinstance(value, str) and value[:1] not in "<\n" and is_placeholder(value)  # `<s>` belongs to a template
    ]


def _cached_crops(tree: Tree) -> list[Problem]:
    """Features are kept for a picture, so the picture must not change from epoch to epoch."""
    crop = ("model", "processor", "image", "random_crop")
    if peek(tree, crop) is None or peek(tree, ("run", "feature_cache")) is None:
        return []
    message = "a picture that is cropped at random has no features to keep; set random_crop: null"
    return [tree.problem(crop, f"{message} or run.feature_cache: null")]


def _other_size(tree: Tree) -> list[Problem]:
    """Pictures of a size that the encoder does not take."""
    ours, theirs = ("model", "processor", "image", "size"), ("model", "vision_encoder", "image_size")
    size, wanted = peek(tree, ours), peek(tree, theirs)
    if not (isinstance(size, int) and isinstance(wanted, int)) or size == wanted:
        return []
    return [tree.problem(ours, f"pictures of {size} pixels for an encoder of {wanted} ({'.'.join(theirs)})")]


def _belongs(key: str, tree: Tree) -> str:
    """Where a key belongs that stands at the top level by mistake."""
    spots = [place.rstrip(".") for name, place in places(tree.values, StageConfig) if name == key]
    return belongs(key, spots) or nearest(key, TOP_KEYS) or f" (known here: {', '.join(TOP_KEYS)})"
