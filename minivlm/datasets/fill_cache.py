"""Computing the features that a cache lacks: found by a scan of the data, shared out among processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from minivlm.datasets.feature_cache import FeatureCache, FeatureCacheError
from minivlm.datasets.loading import load
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.processor import VLMProcessor
from minivlm.types import Sample, SampleError

FILE_BYTES = 2**25
"""A file is written when its features take so many bytes, or after so many seconds: a kill loses no more."""
FILE_SECONDS = 60.0

Place = tuple[Sequence[Sample], int, int]
"""Where a picture stands: the samples, the number of one, and the number of its picture."""


@dataclass
class Filled:
    """What :func:`fill_cache` did: pictures ``encoded``, reasons of bad samples by id, of bad pictures by key.

    ``missing`` holds the keys that all processes together had to fill.
    """

    encoded: int = 0
    missing: set[str] = field(default_factory=set)
    bad: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)


def fill_cache(
    cache: FeatureCache,
    model: VisionLanguageModel,
    processor: VLMProcessor,
    sources: Iterable[Sequence[Sample]],
    *,
    batch_size: int = 32,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    autocast: Callable[[], Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Filled:
    """Compute what is missing for the pictures of ``sources``, read by ``workers`` processes.

    A picture that cannot be read is left out. With several processes each takes its share; call
    ``cache.refresh()`` when all are done. Raises :class:`FeatureCacheError` for features beyond fp16.
    """
    missing, done = missing_pictures(cache, processor, sources)
    done.missing = set(missing)
    # By key, since every process looked at the folder at another moment.
    mine = {key: place for key, place in missing.items() if int(key[:8], 16) % world == rank}
    groups = [range(start, min(start + batch_size, len(mine))) for start in range(0, len(mine), batch_size)]
    pictures = _Pictures(list(mine), list(mine.values()), processor)
    batches = load(pictures, groups, workers=min(workers, len(groups)), ahead=2)
    writer = _Writer(cache)
    was_training = model.training
    model.eval()
    seen = 0
    with closing(batches):
        for keys, pixels, bad in batches:
            for key, sample_id, reason in bad:
                done.bad[sample_id] = done.unreadable[key] = reason
            if keys:
                with torch.inference_mode(), autocast() if autocast else torch.no_grad():
                    writer.add(keys, model.extract_features(pixels))
            done.encoded += len(keys)
            seen += len(keys) + len(bad)
            if progress:
                progress(seen, len(mine))
    writer.flush()
    model.train(was_training)
    return done


def missing_pictures(
    cache: FeatureCache, processor: VLMProcessor, sources: Iterable[Sequence[Sample]]
) -> tuple[dict[str, Place], Filled]:
    """Places by key of all distinct pictures that the cache does not hold, and what is bad already."""
    missing: dict[str, Place] = {}
    found = Filled()
    for source in sources:
        for index in range(len(source)):
            try:
                sample = source[index]
                for number, image in enumerate(sample.images):
                    key = processor.image_key(image)
                    if key not in cache:
                        missing.setdefault(key, (source, index, number))
            except SampleError as error:
                found.bad[error.sample_id] = error.reason
            except OSError as error:
                found.bad[sample.id] = str(error)
    return missing, found


@dataclass
class _Pictures(Dataset[tuple[list[str], dict[str, Tensor], list[tuple[str, str, str]]]]):
    """Keys and pixels [N, 3, H, W] of pictures that can be read; key, sample id and reason of the others."""

    keys: list[str]
    places: list[Place]
    processor: VLMProcessor

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, group: Sequence[int]) -> tuple[list[str], dict[str, Tensor], list[tuple[str, str, str]]]:
        items = [self._read(item) for item in group]
        good = [(key, pixels) for key, pixels, _, _ in items if pixels is not None]
        stacked = {name: torch.stack([pixels[name] for _, pixels in good]) for name in good[0][1]} if good else {}
        return [key for key, _ in good], stacked, [(key, i, why) for key, pixels, i, why in items if pixels is None]

    def _read(self, item: int) -> tuple[str, dict[str, Tensor] | None, str, str]:
        """Key and pixels of a picture, or None, its sample's id and why it cannot be read."""
        source, index, number = self.places[item]
        key, sample = self.keys[item], source[index]
        image = sample.images[number]
        try:
            pixels = self.processor.load_pixels(image)
            if self.processor.image_key(image) != key:  # else another picture's features would bear this key
                raise OSError(f"picture {image} changed while the cache was filled")
        except OSError as error:
            return key, None, sample.id, str(error)
        return key, pixels, sample.id, ""


class _Writer:
    """Collects features until they fill a file."""

    def __init__(self, cache: FeatureCache):
        self.cache = cache
        self.pending: dict[str, Tensor] = {}
        self.since = time.monotonic()

    def add(self, keys: Sequence[str], features: Tensor) -> None:
        """Take the features [N, tokens, channels] of pictures."""
        half = features.to("cpu", torch.float16)
        if not bool(torch.isfinite(half).all()):
            raise FeatureCacheError(
                f"the features reach {float(features.abs().max()):g}, which half precision does not hold; "
                "leave out run.feature_cache for this encoder"
            )
        self.pending.update(zip(keys, half.unbind(), strict=True))
        enough = len(self.pending) * self.cache.picture_bytes >= FILE_BYTES
        if enough or time.monotonic() - self.since > FILE_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what has been collected."""
        if self.pending:
            self.cache.add(self.pending)
        self.pending, self.since = {}, time.monotonic()
