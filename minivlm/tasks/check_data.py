"""``minivlm check-data``: every dataset of an experiment, read before a run does."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from rich.console import Console
from rich.text import Text

from minivlm.api import assemble_shapes
from minivlm.config.experiment import Experiment, StageConfig
from minivlm.datasets.base import DatasetError
from minivlm.datasets.doctor import check_dataset, print_report, render_mask
from minivlm.datasets.training_set import build_datasets, preview
from minivlm.types import Encoded, SampleError

SHOWN = 2


def check_experiment(experiment: Experiment, console: Console, limit: int) -> bool:
    """Report on every split that a stage uses and show two training samples with their mask.

    Returns whether nothing was found. The model is only built for its shapes.
    """
    fine = True
    for stage in experiment.stages:
        console.rule(f"[bold]stage {stage.name}")
        fine &= _check_stage(stage, console, limit)
    return fine


def _check_stage(stage: StageConfig, console: Console, limit: int) -> bool:
    _, processor, _ = assemble_shapes(stage.model)
    run = stage.run
    wanted = [*run.train_splits, *run.valid_splits, *run.test_splits]
    fine = True
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
            if split in run.train_splits:
                _show_samples(preview(builder.build(split), processor, run.seed), processor.tokenizer, console)
    return fine


def _show_samples(samples: Iterable[Encoded | SampleError], tokenizer: Any, console: Console) -> None:
    good = (sample for sample in samples if not isinstance(sample, SampleError))
    for encoded in islice(good, SHOWN):
        console.print(f"\nsample {encoded.sample_id} (bold green: supervised)")
        console.print(render_mask(encoded, tokenizer))
