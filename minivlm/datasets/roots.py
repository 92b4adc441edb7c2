"""The folder tree that a published system trains in: what of it is there, what lacks, where it comes from.

The tree is a table in ``configs/roots/<system>.yaml``; the files and folders of its datasets are those of the
packaged datasets, so no path is written twice.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import Any

from minivlm import registry
from minivlm.builtins import CONFIGS
from minivlm.config.defaults import packaged_dataset
from minivlm.config.errors import ConfigError
from minivlm.config.source import read_yaml
from minivlm.config.validate import validate
from minivlm.datasets.base import DatasetError
from minivlm.datasets.configs import RecordConfig
from minivlm.datasets.layout import is_empty
from minivlm.datasets.records import RecordBuilder
from minivlm.paths import find_respelled, respelled
from minivlm.registry import suggest
from minivlm.schema import setting

MANY = 10_000
"""So many files of a folder are counted."""
DEPTH = 4
"""So many levels of folders are searched for results."""


@dataclass
class Row:
    """A file or folder of the tree."""

    source: str = setting("", help="where it comes from")
    variable: str = setting("", help="environment variable by which presets find it")
    used_by: list[str] = setting(factory=list, help="training files that need it, with *; empty: none")
    holds: list[str] = setting(factory=list, help="names in the folder, with * and |, without which it is not whole")


@dataclass
class Results:
    """Where finished stages lie, and the files that tell what they are."""

    folder: str
    marks: dict[str, str]


@dataclass
class RootTable:
    """The tree of one system: ``datasets`` are names of packaged datasets with the training files that need them."""

    title: str
    rows: dict[str, Row] = field(default_factory=dict)
    datasets: dict[str, list[str]] = field(default_factory=dict)
    results: Results | None = None


@dataclass
class Found:
    """What lies at a row, in ``place``: ``state`` is found, renamed, incomplete, empty or missing."""

    path: str
    place: Path
    row: Row
    state: str
    note: str = ""

    @property
    def is_there(self) -> bool:
        """Whether nothing is to be done about it."""
        return self.state in ("found", "renamed")


def systems() -> list[str]:
    """The systems that have a table."""
    return sorted(file.stem for file in (CONFIGS / "roots").glob("*.yaml"))


def read_table(system: str) -> RootTable:
    """The table of a system, under any spelling of its name, or that of a YAML file of one's own.

    Its datasets have become rows. Raises :class:`DatasetError` if there is none, ConfigError for a wrong one.
    """
    packaged = [CONFIGS / "roots" / f"{name}.yaml" for name in respelled(system)]
    file = next((file for file in (*packaged, Path(system)) if file.is_file()), None)
    if file is None:
        raise DatasetError(f"no system '{system}'{suggest(system, systems())}; there are: {', '.join(systems())}")
    tree = read_yaml(file)
    table, problems = validate(tree.values, RootTable, tree.problem)
    if table is None:
        raise ConfigError(problems)
    for name, used_by in table.datasets.items():
        config = _dataset_config(name)
        table.rows[str(config.annotations)] = Row(config.source or "", used_by=used_by)
        for folder, source in (config.layout or {}).items():
            table.rows[f"{config.images}/{folder}"] = Row(source or "", used_by=used_by)
    return table


def needed_rows(table: RootTable, training_files: Sequence[str]) -> dict[str, Row]:
    """The rows that training files (names or paths) need; of none, those that any of the system's does.

    Raises :class:`DatasetError` for a training file that needs none.
    """
    if not training_files:
        return {path: row for path, row in table.rows.items() if row.used_by}
    needed: dict[str, Row] = {}
    for file in training_files:
        names = respelled(Path(file).stem)
        rows = {p: r for p, r in table.rows.items() if any(fnmatch(n, glob) for n in names for glob in r.used_by)}
        if not rows:
            known = sorted({glob for row in table.rows.values() for glob in row.used_by})
            hint = " (a folder to look in stands in front of --for)" if Path(file).is_dir() else ""
            said = f"{table.title}: no training file '{Path(file).stem}'{hint}"
            raise DatasetError(f"{said}; known are {', '.join(known)}")
        needed |= rows
    return needed


def look(root: Path, path: str, row: Row) -> Found:
    """What lies at a row below ``root``; no file is read, and of a large folder not all are counted."""
    place = find_respelled(Path(path), root)
    if not place.exists():
        return Found(path, place, row, "missing")
    if place.is_dir() and is_empty(place):
        return Found(path, place, row, "empty")
    lacking = [names for names in row.holds if not _has_any(place, names)]
    if lacking:
        names = ", ".join(name.replace("|", " or ") for name in lacking)
        return Found(path, place, row, "incomplete", f"it lacks {names}")
    note = _count(place) if place.is_dir() else f"{place.stat().st_size / 1e6:,.1f} MB"
    if place == root / path:
        return Found(path, place, row, "found", note)
    return Found(path, place, row, "renamed", f"as {place.relative_to(root)}; {note}")


def find_results(root: Path, results: Results) -> Iterator[tuple[Path, str]]:
    """Finished stages below the folder of the results, and runs that have only checkpoints yet."""
    top = root / results.folder
    for name, folders, _ in os.walk(top):
        folder = Path(name)
        what = next((what for marks, what in results.marks.items() if _has_any(folder, marks)), None)
        checkpoints = [each for each in folders if each.startswith("checkpoint-")]
        if what is None and checkpoints:
            what = f"not finished; it has {len(checkpoints)} checkpoint(s)"
        if what is not None:
            yield folder, what
        if what is not None or len(folder.relative_to(top).parts) >= DEPTH:
            folders.clear()
        folders.sort()


def annotations_of(name: str) -> str:
    """The path of a packaged dataset's annotation file below a root."""
    return str(_dataset_config(name).annotations)


def root_builder(root: Path, name: str) -> RecordBuilder[Any]:
    """A packaged dataset below ``root``, whatever folders it lacks."""
    config = _dataset_config(name)
    images = None if config.images is None else str(root / config.images)
    changed = {"annotations": str(root / str(config.annotations)), "images": images}
    config = replace(config, **changed, layout=dict.fromkeys(config.layout or ()))  # type: ignore[arg-type]
    return registry.get("dataset", name)(config, name)


def _dataset_config(name: str) -> RecordConfig:
    cls: Any = registry.entry("dataset", name).config_class()
    values = read_yaml(packaged_dataset(name) / "default.yaml").values
    return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


def _has_any(folder: Path, names: str) -> bool:
    return any(any(folder.glob(name)) for name in names.split("|"))


def _count(folder: Path) -> str:
    """How many files are in a folder, and with which endings."""
    files = list(islice(_files(folder), MANY))
    endings = Counter(os.path.splitext(file)[1].lower() for file in files)
    common = ", ".join(sorted(filter(None, endings), key=lambda ending: (-endings[ending], ending))[:3])
    return f"{len(files):,}{'+' * (len(files) == MANY)} file(s)" + (f", {common}" if common else "")


def _files(folder: Path) -> Iterator[str]:
    walk = os.walk(folder, followlinks=True)
    for _, _, names in islice(walk, MANY):  # links may lead in circles
        yield from names
