"""``minivlm check-data``: every dataset of an experiment, read before a run does."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from minivlm.api import assemble_shapes
from minivlm.config.experiment import Experiment, StageConfig
from minivlm.datasets.base import DatasetError
from minivlm.datasets.doctor import check_dataset, print_report, render_mask
from minivlm.datasets.overlap import overlaps
from minivlm.datasets.pictures import Unusable
from minivlm.datasets.training_set import build_datasets, preview
from minivlm.tasks.check_pictures import check_pictures, write_lists
from minivlm.types import Encoded, SampleError

SHOWN = 2


def check_experiment(
    experiment: Experiment, console: Console, limit: int, deep: bool = False, write_missing: Path | None = None
) -> bool:
    """Report on every split that a stage uses and show two training samples with their mask.

    Returns whether nothing was found. The model is only built for its shapes. ``deep`` looks for every picture of
    all records as well; the ids of those without them are written into the folder ``write_missing``.
    """
    fine = True
    unusable: dict[str, Unusable] | None = {} if deep else None
    for stage in experiment.stages:
        console.rule(f"[bold]stage {stage.name}")
        fine &= _check_stage(stage, console, limit, unusable)
    if write_missing is not None:
        write_lists(write_missing, unusable or {}, console)
    return fine and not any((unusable or {}).values())


def _check_stage(stage: StageConfig, console: Console, limit: int, unusable: dict[str, Unusable] | None) -> bool:
    _, processor, _ = assemble_shapes(stage.model)
    run = stage.run
    wanted = [*run.train_splits, *run.valid_splits, *run.test_splits]
    fine = True
    trained = []
    for key, builder in build_datasets(stage.datasets).items():
        for split in (s for s in dict.fromkeys(wanted) if s in builder.splits):
            console.print(f"\n[bold]{key}[/], split {split}")
            try:
                report = check_dataset(builder, split, processor, limit)
            except DatasetError as error:
                console.print(Text(str(error), style="red"))
                fine = False
                continue
            print_report(report, console)
            fine &= report.ok
            samples = builder.build(split)
            if unusable is not None:
                found = check_pictures(f"{key}, split {split}", samples, console)
                unusable.setdefault(key, []).extend(found)
            if split in run.train_splits:
                trained.append((key, samples))
                _show_samples(preview(samples, processor, run.seed), processor.tokenizer, console)
    for text in overlaps(trained):
        console.print(Text(f"\n{text}", style="red"))
        fine = False
    return fine


def _show_samples(samples: Iterable[Encoded | SampleError], tokenizer: Any, console: Console) -> None:
    good = (sample for sample in samples if not isinstance(sample, SampleError))
    for encoded in islice(good, SHOWN):
        console.print(f"\nsample {encoded.sample_id} (bold green: supervised)")
        console.print(render_mask(encoded, tokenizer))
