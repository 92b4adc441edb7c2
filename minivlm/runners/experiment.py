"""From an experiment to its results: stage after stage, each starting from the last."""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from rich.console import Console

from minivlm import registry
from minivlm.api import assemble, resolve_device
from minivlm.checkpoints.native import find_model_folder
from minivlm.checkpoints.parts import model_folder
from minivlm.checkpoints.report import CheckpointError
from minivlm.config.experiment import Experiment, StageConfig, to_container
from minivlm.config.global_batch import accumulation
from minivlm.datasets.feature_cache import FeatureCacheError
from minivlm.datasets.overlap import overlaps
from minivlm.datasets.streams import SampleStream
from minivlm.datasets.training_set import Source, build_datasets, build_split
from minivlm.io import write_atomic, write_json
from minivlm.models.base import ModelError
from minivlm.models.vlm import PARTS, VisionLanguageModel
from minivlm.processors.processor import VLMProcessor
from minivlm.runners.engines import SingleEngine, make_engine
from minivlm.runners.features import prepare_cache
from minivlm.runners.logs import LOG
from minivlm.runners.precision import resolve_precision
from minivlm.runners.state import seed_everything
from minivlm.types import Sample

DONE = "done.json"


def run_experiment(experiment: Experiment, console: Console) -> dict[str, dict[str, float]]:
    """Run all stages, skipping those that are done; returns the final metrics of every stage.

    A stage of several whose model section names no checkpoint starts from the model of the stage before it.
    """
    results: dict[str, dict[str, float]] = {}
    joined_before = torch.distributed.is_initialized()
    previous: Path | None = None
    start = experiment.stages[0].model.checkpoint  # given for all stages, it is where the first one starts
    for stage in experiment.stages:
        if previous is not None and stage.model.checkpoint in (None, start):
            stage.model.checkpoint = str(previous / "model")
        results[stage.name] = run_stage(stage, console)
        previous = Path(stage.run.output_dir)
    if torch.distributed.is_initialized() and not joined_before:
        gc.collect()  # a wrapped model, which holds the group by cycles, must not outlive it: that can end in an abort
        torch.distributed.destroy_process_group()
    return results


def run_stage(stage: StageConfig, console: Console) -> dict[str, float]:
    """Train (unless ``run.evaluate`` or it is done) and evaluate the test splits of one stage."""
    run = stage.run
    folder = Path(run.output_dir)
    device = resolve_device(run.device)
    engine = make_engine(run, device, resolve_precision(run.precision, device), trains=not run.evaluate)
    if engine.rank != 0:
        console = Console(quiet=True)
    done = folder / DONE
    given = {section: to_container(getattr(stage, section)) for section in ("model", "datasets", "run")}
    if done.is_file() and run.resume == "auto" and not run.evaluate:
        before = json.loads(done.read_text())
        console.print(f"[bold]{stage.name}[/]: done before ({folder}); --options run.resume=none starts it anew")
        for change in _changes(before.get("settings", given), given):
            console.print(f"changed since then, without effect: {change}", style="yellow", markup=False, soft_wrap=True)
        return dict(before["metrics"])
    console.rule(f"[bold]{stage.name}")
    start = time.perf_counter()
    if not run.evaluate:
        accumulation(run, engine.world)  # refuses a global batch that does not fit, before a model is loaded
    if run.evaluate and stage.model.checkpoint is None:
        stage.model.checkpoint = str(find_model_folder(folder))
    if getattr(stage.model.language_model and stage.model.language_model.config, "device_map", None):
        raise ModelError(
            "model.language_model.device_map is for talking to a model; several GPUs train by torchrun and run.engine"
        )
    data = Splits(stage)  # what lacks there is told before anything large is read
    if engine.rank == 0:
        for text in overlaps((source.key, source.samples) for source in data.train):
            console.print(f"data: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    seed_everything(run.seed)
    model, processor, stage.model = assemble(stage.model)
    engine.place(model)
    task = registry.get("task", run.task)(run)
    if run.feature_cache:
        prepare_cache(stage, model, processor, engine, data.all(), console)
    if not run.evaluate:
        _keep_off_bases(model, folder)
        if engine.rank == 0:
            container = {"model": to_container(stage.model), "run": to_container(run)}
            done.unlink(missing_ok=True)
            write_atomic(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(container)))
        runner = registry.get("runner", run.runner)(
            stage, model, processor, engine, task, data.train, data.valid, model.trained_before, console
        )
        runner.train()
        _take_best(runner, engine, model, folder, console)
    metrics = _final_evaluation(stage, model, processor, engine, task, data, console)
    if engine.rank == 0 and not run.evaluate:
        seconds = time.perf_counter() - start
        write_json(done, {"metrics": metrics, "seconds": seconds, "log": LOG, "settings": given})
    engine.barrier()
    engine.close()
    return metrics


def _changes(before: Any, now: Any, key: str = "") -> list[str]:
    """``key: value of before -> value of now`` for each setting that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [name for name in (before | now) if f"{key}{name}" != "run.resume"]
        return [c for name in keys for c in _changes(before.get(name), now.get(name), f"{key}{name}.")]
    return [] if before == now else [f"{key.rstrip('.')}: {before} -> {now}"]


class Splits:
    """The samples of a stage by use, built once."""

    def __init__(self, stage: StageConfig):
        run = stage.run
        builders = build_datasets(stage.datasets)
        self.train: list[Source] = [] if run.evaluate else build_split(builders, run.train_splits)
        self.valid = _joined(build_split(builders, run.valid_splits)) if run.valid_splits else None
        self.test = _joined(build_split(builders, run.test_splits)) if run.test_splits else None
        trains = [s for s in run.train_splits if any(s in b.splits for b in builders.values())]
        reference = self.train or (build_split(builders, trains) if trains else [])
        self.reference = [source for source in reference if not isinstance(source.samples, SampleStream)]

    def all(self) -> list[Sequence[Sample]]:
        """Every sequence that is trained or evaluated on, for the feature cache.

        Raises :class:`FeatureCacheError` for streams.
        """
        streams = [source.key for source in self.train if isinstance(source.samples, SampleStream)]
        if streams:
            raise FeatureCacheError(
                f"run.feature_cache needs datasets with a length; {', '.join(streams)} is a stream, whose pictures "
                "hardly come twice: leave out run.feature_cache"
            )
        return [*(source.sized for source in self.train), *(s for s in (self.valid, self.test) if s is not None)]


def _joined(sources: list[Source]) -> Sequence[Sample]:
    sized = [source.sized for source in sources]
    if len(sized) == 1:
        return sized[0]
    from torch.utils.data import ConcatDataset

    return ConcatDataset(sized)  # type: ignore[arg-type,return-value]


def _keep_off_bases(model: VisionLanguageModel, folder: Path) -> None:
    """Refuse a base that this run would overwrite, while its checkpoints name it and hold only what trains."""
    written = [(folder / name).resolve() for name in ("model", "best", "checkpoints")]
    for part in PARTS:
        source = getattr(model, part).source or {}
        for path in (source[key] for key in ("path", "also") if key in source):
            base = (model_folder(path) or Path(path)).resolve()
            if base.exists() and any(base.is_relative_to(place) for place in written):
                raise CheckpointError(
                    f"run.output_dir: {folder} holds the base of {part} ({path}), which this run would overwrite or "
                    "delete, although its checkpoints need it; give another folder"
                )


def _take_best(runner: Any, engine: SingleEngine, model: VisionLanguageModel, folder: Path, console: Console) -> None:
    """Go on with the best weights by the validation metric, when there was one."""
    state = getattr(runner, "state", None)
    if state is None or state.best is None or state.best_step == state.step:
        return
    engine.load_weights(model, folder / "best")
    console.print(f"using the weights of step {state.best_step} ({runner.task.metric_name} {state.best:.4f})")
    if runner.is_main:
        import shutil

        from minivlm.io import atomic_folder

        with atomic_folder(folder / "model") as unfinished:
            shutil.copytree(folder / "best", unfinished, dirs_exist_ok=True)


def _final_evaluation(
    stage: StageConfig,
    model: VisionLanguageModel,
    processor: VLMProcessor,
    engine: SingleEngine,
    task: Any,
    data: Splits,
    console: Console,
) -> dict[str, float]:
    """The test splits, with baselines and a report, on the first process; the others wait, or help."""
    metrics: Mapping[str, float] = {}
    if data.test is not None and (engine.rank == 0 or engine.evaluates_together):
        report = Path(stage.run.output_dir) / "report"
        start = time.perf_counter()
        from rich.progress import Progress

        with Progress(console=console, disable=not console.is_terminal) as bar, engine.evaluation(model):
            row = bar.add_task("evaluating " + ", ".join(stage.run.test_splits), total=None)
            metrics = task.evaluate(
                model,
                processor,
                data.test,
                device=engine.device,
                report_dir=report if engine.rank == 0 else None,
                train_samples=_joined(data.reference) if data.reference else None,
                full=True,
                progress=lambda done, total: bar.update(row, completed=done, total=total),
            )
        console.print(task.render_table())
        console.print(f"evaluated in {time.perf_counter() - start:.0f} s", highlight=False, soft_wrap=True)
        if (report / "report.html").is_file():
            console.print(f"report: {report / 'report.html'}", highlight=False, soft_wrap=True)
    return dict(engine.gather(dict(metrics))[0])


def is_main_process() -> bool:
    """Whether this process is the one that prints (before an engine exists)."""
    return int(os.environ.get("RANK", "0")) == 0
