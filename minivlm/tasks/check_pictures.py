"""The tables of ``check-data --deep`` and ``check-root --deep``: every picture of every record, looked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from minivlm.datasets.pictures import Survey, Unusable, survey, write_unusable
from minivlm.datasets.records import RecordDataset


def check_pictures(name: str, samples: object, console: Console) -> Unusable:
    """Print how many pictures of each folder are there; returns id and reason of the records that lack one.

    Of data that are no records nothing is said.
    """
    if not isinstance(samples, RecordDataset):
        return []
    with console.status(f"{name}: looking for the pictures of {len(samples):,} records") as status:
        found = survey(samples, lambda done: status.update(f"{name}: {done:,} of {len(samples):,} records"))
    _print(name, found, console)
    return found.unusable


def write_lists(folder: Path, found: Mapping[str, Unusable], console: Console) -> None:
    """Write the records of each dataset that lack a picture into ``folder`` and say how training leaves them out."""
    files = write_unusable(folder, found)
    for file in files:
        console.print(Text(f"written: {file}, for the setting `skip` of this dataset"), soft_wrap=True)
    if not files:
        console.print("no record lacks a picture, so no list is written")


def _print(name: str, found: Survey, console: Console) -> None:
    table = Table("folder", "there", "under another name", "missing", title=f"{name}: pictures of all records")
    for folder, count in sorted(found.folders.items()):
        table.add_row(Text(folder), *(f"{number:,}" for number in (count.found, count.renamed, count.missing)))
    if found.folders:
        console.print(table)
    for count in found.folders.values():
        for example in count.examples:
            console.print(Text(f"  missing: {example}", "yellow"), soft_wrap=True)
    verdict = f"{name}: {len(found.unusable):,} of {found.records:,} records lack a picture, or are broken"
    console.print(Text(verdict, "red" if found.unusable else "green"), soft_wrap=True)
