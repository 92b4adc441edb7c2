"""Datasets of a stage that hold one another, as their names or those of their files tell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minivlm.config.defaults import packaged_dataset
from minivlm.config.experiment import StageConfig
from minivlm.config.source import read_yaml
from minivlm.schema import Part


def overlap_notes(stage: StageConfig) -> Iterator[str]:
    """A note for every dataset that is ``part_of`` another one of the stage."""
    known = {key: set(_names(part)) for key, part in stage.datasets.items()}
    for key, part in stage.datasets.items():
        wholes = {packaged_dataset(name).name for name in _part_of(part)}
        for other, names in known.items():
            if other != key and names & wholes:
                yield (
                    f"datasets.{key} is a part of datasets.{other}, so its records would be learned twice; leave it "
                    "out, or mix it with other data only"
                )


def _names(part: Part) -> Iterator[str]:
    """What a dataset is known as: its name and those of its files, in today's spelling."""
    given: Any = getattr(part.config, "annotations", None) or ()
    files = given.values() if isinstance(given, dict) else [given] if isinstance(given, str) else ()
    for name in (part.name, *(Path(file).stem for file in files if isinstance(file, str))):
        yield packaged_dataset(name).name


def _part_of(part: Part) -> list[str]:
    """``part_of`` as the node says, or the packaged dataset that has a file of this name."""
    said: list[str] = getattr(part.config, "part_of", [])
    if said:
        return said
    files = (packaged_dataset(name) / "default.yaml" for name in _names(part) if name != part.name)
    found = (read_yaml(file).values.get("part_of") for file in files if file.is_file())
    return next((names for names in found if names), [])
