"""The feature cache of a stage: opened, filled, given to the processor."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.text import Text

from minivlm.config.experiment import StageConfig
from minivlm.datasets.feature_cache import FeatureCache, FeatureCacheError
from minivlm.datasets.fill_cache import Filled, fill_cache
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.processor import VLMProcessor
from minivlm.runners.engines import SingleEngine
from minivlm.types import Sample

LINE_SECONDS = 10.0
"""Between two lines of progress where there is no terminal."""
SECONDS_TO_APPEAR = 60.0
"""A network file system may show another machine's files so late."""


def prepare_cache(
    stage: StageConfig,
    model: VisionLanguageModel,
    processor: VLMProcessor,
    engine: SingleEngine,
    sources: Sequence[Sequence[Sample]],
    console: Console,
) -> Filled:
    """Encode every picture that is not cached yet, each process its share, and give the cache to the processor.

    Afterwards nothing but the cache is asked for features, so what computes them leaves the device.
    """
    assert stage.run.feature_cache and stage.model.vision_encoder and stage.model.connector
    settings = {"vision_encoder": stage.model.vision_encoder.config, "connector": stage.model.connector.config}
    cache = FeatureCache.for_model(stage.run.feature_cache, model, processor, engine.precision, settings)
    if not len(cache):
        _tell_neighbours(cache, console)
    start = time.perf_counter()
    model.move_features(engine.device)
    with _progress(console) as show:
        done = fill_cache(
            cache,
            model,
            processor,
            sources,
            workers=stage.run.num_workers,
            rank=engine.rank,
            world=engine.world,
            autocast=engine.autocast,
            progress=show,
        )
    model.move_features("cpu")
    everyone = engine.gather((done.encoded, done.bad, done.unreadable))
    done.encoded = sum(encoded for encoded, _, _ in everyone)
    for _, bad, unreadable in everyone:
        done.bad |= bad
        done.unreadable |= unreadable
    cache.unreadable = done.unreadable
    _wait_for(cache, done.missing - done.unreadable.keys())
    processor.feature_cache = cache
    for file, reason in cache.ignored.items():
        text = f"ignored {file}: {reason}; it can be deleted, its pictures were encoded again"
        console.print(Text(text, style="yellow"), soft_wrap=True)
    size = len(cache) * cache.picture_bytes
    console.print(
        f"feature cache {cache.folder}: {len(cache):,} pictures of {cache.picture_bytes / 2**10:.4g} KiB, "
        f"{size / 2**20:,.1f} MiB; {done.encoded:,} encoded now in {time.perf_counter() - start:.1f} s",
        highlight=False,
        soft_wrap=True,
    )
    return done


def _wait_for(cache: FeatureCache, keys: set[str]) -> None:
    """Look for what other processes have written; raises :class:`FeatureCacheError` if it does not appear."""
    end = time.monotonic() + SECONDS_TO_APPEAR
    cache.refresh()
    while lost := [key for key in keys if key not in cache]:
        if time.monotonic() > end:
            raise FeatureCacheError(
                f"{len(lost)} pictures that other processes encoded are not in {cache.folder}: run.feature_cache "
                "must be a folder that all processes share"
            )
        time.sleep(0.5)
        cache.refresh()


def _tell_neighbours(cache: FeatureCache, console: Console) -> None:
    """Why nothing is cached although the folder holds features: they are of something else."""
    for folder, differs in cache.neighbours().items():
        what = ", ".join("frozen modules" if key == "frozen" else key for key in differs)
        console.print(f"not used: {folder}, made with other {what}", highlight=False, soft_wrap=True)


@contextmanager
def _progress(console: Console) -> Iterator[Any]:
    """A callback ``(done, total)``: a bar on a terminal, else a line now and then."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("features of frozen modules"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.1f} pictures/s"),
        TimeRemainingColumn(),
    )
    start = time.perf_counter()
    last = start
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        row = bar.add_task("", total=None, rate=0.0)

        def show(done: int, total: int) -> None:
            nonlocal last
            now = time.perf_counter()
            rate = done / max(now - start, 1e-9)
            bar.update(row, completed=done, total=total, rate=rate)
            if not console.is_terminal and now - last > LINE_SECONDS:
                last = now
                left = (total - done) / rate
                console.print(f"{done:,} of {total:,} pictures, {rate:.1f}/s, {left:.0f} s left", highlight=False)

        yield show
