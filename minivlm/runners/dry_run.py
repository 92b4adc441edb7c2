"""Everything that can be seen before a run: the resolved config, what trains, two samples, memory, steps.

The model is built on the meta device, so a 34B experiment can be looked at on a laptop.
"""

from __future__ import annotations

import os
from itertools import islice

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minivlm.api import assemble_shapes, resolve_device
from minivlm.config.deepspeed import fill_deepspeed, offloads_optimizer, read_deepspeed, zero_stage
from minivlm.config.errors import ConfigError
from minivlm.config.experiment import Experiment, StageConfig, to_container
from minivlm.config.global_batch import counted
from minivlm.datasets.base import DatasetError
from minivlm.datasets.doctor import render_mask
from minivlm.datasets.feed import make_feed
from minivlm.datasets.overlap import overlaps
from minivlm.datasets.training_set import build_datasets, build_split, preview
from minivlm.models.tuning import PartRow, part_table
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.processor import VLMProcessor
from minivlm.runners.gpu_table import gpu_table, has_base
from minivlm.runners.memory import inference_table, training_table
from minivlm.runners.precision import resolve_precision
from minivlm.runners.schedules import make_schedule, warmup_steps
from minivlm.runners.zero_table import wants_zero_table, zero_table
from minivlm.types import SampleError


def dry_run(experiment: Experiment, console: Console) -> bool:
    """Print all of it for every stage; returns False if the data of a stage cannot be read."""
    fine = True
    for number, stage in enumerate(experiment.stages):
        console.rule(f"[bold]stage {stage.name}")
        container = {key: to_container(getattr(stage, key)) for key in ("model", "datasets", "run")}
        console.print(OmegaConf.to_yaml(OmegaConf.create(container)), highlight=False, markup=False)
        if number and stage.model.checkpoint is None:
            console.print(f"starts from the model of stage {experiment.stages[number - 1].name}")
        model, processor, stage.model = assemble_shapes(stage.model)
        lr_multi = {} if stage.run.evaluate else stage.run.lr_multi
        console.print(_parts(part_table(model, stage.model, stage.run.init_lr, lr_multi)))
        if stage.run.evaluate:
            fine &= _show_evaluation(stage, processor, console)
        elif not stage.datasets:
            console.print("\nno datasets: there is a model to talk to, and nothing to train")
        else:
            fine &= _show_data(stage, model, processor, console)
            if wants_zero_table(stage, model):
                precision = resolve_precision(stage.run.precision, resolve_device(stage.run.device))
                console.print(zero_table(stage, model, precision, processor.config.max_length))
        console.print(inference_table(stage, model, processor))
    return fine


def _parts(rows: list[PartRow]) -> Table:
    table = Table("part", "parameters", "trainable", "dtype", "peak lr", title="what trains")
    for row in rows:
        several = len(row.rates) > 1
        lr = "\n".join(f"{rate:.2e}{f' of {count:,}' if several else ''}" for rate, count in row.rates.items())
        table.add_row(row.part, f"{row.parameters:,}", f"{row.trainable:,}", row.dtype, lr or "-")
    table.add_row("total", f"{sum(r.parameters for r in rows):,}", f"{sum(r.trainable for r in rows):,}", "", "")
    return table


def _show_evaluation(stage: StageConfig, processor: VLMProcessor, console: Console) -> bool:
    """The first question of every dataset that would be evaluated; False if one cannot be read."""
    run = stage.run
    fine, seen = True, False
    for key, builder in build_datasets(stage.datasets).items():
        for split in (s for s in run.test_splits if s in builder.splits):
            seen = True
            try:
                samples = build_split({key: builder}, [split])[0].sized
                encoded = processor.prompt_sample(samples[0])
            except (DatasetError, SampleError) as error:
                console.print(Text(f"data: {error}", style="red"))
                fine = False
                continue
            console.print(f"\n{key}, split {split}: {len(samples):,} samples; task {run.task}", highlight=False)
            console.print(render_mask(encoded, processor.tokenizer))
    if not seen:
        console.print(Text(f"data: no dataset has a split of run.test_splits {run.test_splits}", style="red"))
    return fine and seen


def _show_data(stage: StageConfig, model: VisionLanguageModel, processor: VLMProcessor, console: Console) -> bool:
    run = stage.run
    world = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        sources = build_split(build_datasets(stage.datasets), run.train_splits)
        feed = make_feed(sources, processor, run, world=world)
    except DatasetError as error:
        console.print(Text(f"data: {error}", style="red"))
        return False
    for text in overlaps((source.key, source.samples) for source in sources):
        console.print(Text(f"data: {text}", style="yellow"))
    length = 0
    for encoded in islice(preview(sources[0].samples, processor, run.seed), 2):
        if isinstance(encoded, SampleError):
            console.print(Text(str(encoded), style="red"))
            continue
        length = max(length, len(encoded.input_ids))
        console.print(
            f"\nsample {encoded.sample_id}: {len(encoded.input_ids)} tokens, {encoded.num_supervised} supervised"
        )
        console.print(render_mask(encoded, processor.tokenizer))
    per_epoch = feed.steps_per_epoch
    total = min(run.max_epoch * per_epoch, run.max_steps or 10**12)
    console.print(f"\n{feed.describe()}; {total:,} steps ({per_epoch:,} an epoch)", highlight=False, markup=False)
    if run.engine == "deepspeed":
        settings = read_deepspeed(run)
        where = "in the CPU's memory" if offloads_optimizer(settings) else "on the device"
        console.print(
            f"DeepSpeed {run.deepspeed}: ZeRO-{zero_stage(settings)}, the optimiser's state {where}", highlight=False
        )
        try:
            fill_deepspeed(run, processes=world, precision=resolve_precision(run.precision, resolve_device(run.device)))
        except ConfigError as error:  # perhaps only with as many processes as there are here
            console.print(Text(f"with {counted(world)} this is refused:\n{error}", style="yellow"), soft_wrap=True)
    schedule = make_schedule(run, total, per_epoch)
    points = sorted({0, min(warmup_steps(run, total), total - 1), total // 2, total - 1})
    console.print(
        "schedule: " + ", ".join(f"step {p}: {schedule(p):.2e}" for p in points), highlight=False, soft_wrap=True
    )
    precision = resolve_precision(run.precision, resolve_device(run.device))
    console.print(training_table(stage, model, precision, length or 512))
    if has_base(stage.model):
        console.print(gpu_table(stage, model, precision, length or 512))
    return True
