"""``minivlm check-root``: the folder tree of a published system, compared with its table."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minivlm.datasets.base import DatasetError
from minivlm.datasets.pictures import Unusable
from minivlm.datasets.roots import (
    Found,
    RootTable,
    annotations_of,
    find_results,
    look,
    needed_rows,
    read_table,
    root_builder,
)
from minivlm.tasks.check_pictures import check_pictures, write_lists

_STYLES = {"found": "green", "renamed": "green"}


def check_root(
    root: Path,
    system: str,
    console: Console,
    training_files: Sequence[str] = (),
    deep: bool = False,
    write_missing: Path | None = None,
) -> bool:
    """Print what of the tree is there and where to get the rest; returns whether all is there that training needs.

    ``deep`` looks for every picture of the annotation files that are there as well; the ids of records without
    them are written into the folder ``write_missing``. Raises :class:`DatasetError` if there is no such root or system.
    """
    if not root.is_dir():
        raise DatasetError(f"there is no folder {root}")
    table = read_table(system)
    needed = needed_rows(table, training_files)
    rows = needed if training_files else table.rows
    found = [look(root, path, row) for path, row in sorted(rows.items())]
    console.print(_table(f"{table.title} in {root}", found))
    lacking = [item for item in found if not item.is_there]
    for item in lacking:
        need = "" if item.path in needed else ", not needed for training"
        said = f"{item.state}{need}: {item.place}{f' ({item.note})' if item.note else ''}"
        console.print(Text(said, "yellow" if need else "red"), soft_wrap=True)
        console.print(Text(f"  from {item.row.source}"), soft_wrap=True)
    _show_results(root, table, console)
    _show_variables(found, console)
    wrong = [item for item in lacking if item.path in needed]
    verdict = f"{len(wrong)} of {len(needed)} needed places lack something" if wrong else "all is there that is needed"
    console.print(Text(verdict, "red" if wrong else "green"))
    if not deep:
        return not wrong
    there = {item.path for item in found if item.is_there}
    names = [name for name in table.datasets if annotations_of(name) in there]
    unusable = {name: _check_records(root, name, console) for name in names}
    if write_missing is not None:
        write_lists(write_missing, {name: found for name, found in unusable.items() if found}, console)
    return not wrong and not any(found is None or found for found in unusable.values())


def _table(title: str, found: Sequence[Found]) -> Table:
    table = Table("place", "state", "what is there", "needed by (train_configs)", title=Text(title), box=SIMPLE)
    for column in table.columns:
        column.overflow = "fold"
    for item in found:
        state = Text(item.state, _STYLES.get(item.state, "red" if item.row.used_by else "yellow"))
        table.add_row(Text(item.path), state, Text(item.note), Text(", ".join(item.row.used_by) or "-"))
    return table


def _show_variables(found: Sequence[Found], console: Console) -> None:
    """How training files are told of the models, which they would fetch from the hub otherwise."""
    named = {item.row.variable: item.place for item in found if item.is_there and item.row.variable}
    lines = [f"  export {v}={shlex.quote(str(place))}" for v, place in named.items() if not _is_set(v, place)]
    if lines:
        console.print(Text("\n".join(["to use the models that are there:", *lines])), soft_wrap=True)


def _is_set(variable: str, place: Path) -> bool:
    return Path(os.environ.get(variable, os.devnull)).resolve() == place.resolve()


def _show_results(root: Path, table: RootTable, console: Console) -> None:
    if table.results is None:
        return
    results = list(find_results(root, table.results))
    for folder, what in results:
        console.print(Text(f"result: {folder.relative_to(root)}: {what}"), soft_wrap=True)
    if not results:
        console.print(f"no results in {table.results.folder} yet", markup=False, highlight=False)


def _check_records(root: Path, name: str, console: Console) -> Unusable | None:
    """What :func:`check_pictures` says of a dataset; None if its annotations cannot be read."""
    try:
        samples = root_builder(root, name).build("train")
    except DatasetError as error:
        console.print(Text(str(error), "red"), soft_wrap=True)
        return None
    return check_pictures(name, samples, console)
