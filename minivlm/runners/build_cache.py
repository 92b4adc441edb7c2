"""``minivlm cache``: the feature caches of an experiment, filled ahead of its training."""

from __future__ import annotations

from dataclasses import replace

import torch
from rich.console import Console
from rich.text import Text

from minivlm.api import assemble, lacks_checkpoint, resolve_device
from minivlm.checkpoints.native import find_model_folder
from minivlm.config.experiment import Experiment, ModelConfig, StageConfig
from minivlm.datasets.feature_cache import FeatureCacheError
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.processor import VLMProcessor
from minivlm.runners.engines import make_engine
from minivlm.runners.experiment import Splits, is_main_process
from minivlm.runners.features import prepare_cache
from minivlm.runners.precision import resolve_precision
from minivlm.runners.state import seed_everything


def build_caches(experiment: Experiment, console: Console) -> None:
    """Fill the caches of all stages that have one with the pictures of all their splits.

    A stage whose frozen modules an earlier one trains is left out, since their weights are not there yet. Raises
    :class:`FeatureCacheError` if no stage names a folder.
    """
    if not any(stage.run.feature_cache for stage in experiment.stages):
        raise FeatureCacheError(
            "run.feature_cache names no folder; add --options run.feature_cache=output/feature_cache"
        )
    if not is_main_process():
        console = Console(quiet=True)
    start = experiment.stages[0].model.checkpoint
    frozen_so_far = {"vision_encoder", "connector"}
    for stage in experiment.stages:
        goes_on = stage is not experiment.stages[0] and stage.model.checkpoint in (None, start)
        seed_everything(stage.run.seed)  # as a run does, so that parts without weights come out the same
        model, processor, stage.model = _assemble(stage, console)
        frozen = _frozen(model)
        if goes_on and not frozen <= frozen_so_far:
            names = ", ".join(sorted(frozen - frozen_so_far))
            console.print(f"{stage.name}: left out, since an earlier stage trains its {names}")
        elif stage.run.feature_cache:
            _build(stage, model, processor, console)
        frozen_so_far &= frozen
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _assemble(stage: StageConfig, console: Console) -> tuple[VisionLanguageModel, VLMProcessor, ModelConfig]:
    """What the features need of a stage's model: no language model, nor a checkpoint that does not change them."""
    config = stage.model
    if not lacks_checkpoint(config):
        return assemble(config, features_only=True)
    path = str(config.checkpoint)
    found = assemble(replace(config, checkpoint=None), features_only=True)
    if not _has_bases(found[0]):
        find_model_folder(path)  # raises: it is missing, and needed
    console.print(
        f"{stage.name}: there is no {path} yet; it is taken to leave what is frozen as its own files give it",
        highlight=False,
        soft_wrap=True,
    )
    return found


def _has_bases(model: VisionLanguageModel) -> bool:
    """Whether files of their own give the frozen encoder, and the front if it is frozen, all their weights."""
    encoder, connector = model.vision_encoder, model.connector
    if not model.is_frozen("vision_encoder") or encoder.source is None or encoder.unsourced:
        return False
    beyond = {name.split(".")[0] for name in connector.unsourced}
    return not model.has_frozen_front or (connector.source is not None and beyond.isdisjoint(connector.front_names))


def _frozen(model: VisionLanguageModel) -> set[str]:
    """The parts whose output would be cached."""
    parts = {"vision_encoder": model.is_frozen("vision_encoder"), "connector": model.has_frozen_front}
    return {name for name, frozen in parts.items() if frozen}


def _build(stage: StageConfig, model: VisionLanguageModel, processor: VLMProcessor, console: Console) -> None:
    device = resolve_device(stage.run.device)
    engine = make_engine(stage.run, device, resolve_precision(stage.run.precision, device), trains=False)
    console.rule(f"[bold]{stage.name}")
    done = prepare_cache(stage, model, processor, engine, Splits(stage).all(), console)
    for sample_id, reason in done.bad.items():
        console.print(Text(f"sample '{sample_id}': {reason}", style="yellow"), soft_wrap=True)
    if done.bad:
        console.print(f"{len(done.bad):,} samples cannot be used", highlight=False)
