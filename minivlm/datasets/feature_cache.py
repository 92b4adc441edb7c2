"""Outputs of a frozen vision encoder, computed once per picture and kept on disk.

The folder of a cache is named after the encoder, the transform and the precision, so a change of one never meets
old features; a picture is named by the hash of its content. Features lie in safetensors files that are
written whole or not at all, each by one process, so several processes and a kill do no harm.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minivlm.io import TEMPORARY, write_json
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.processor import VLMProcessor
from minivlm.types import Sample, SampleError

PICTURES_PER_FILE = 512


class FeatureCacheError(ValueError):
    """Features that cannot be cached."""


class FeatureCache:
    """Features [tokens, channels] by picture, in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._where: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        self.refresh()

    @classmethod
    def for_model(
        cls,
        root: str | Path,
        model: VisionLanguageModel,
        processor: VLMProcessor,
        precision: str = "fp32",
        settings: Any = None,
    ) -> FeatureCache:
        """The cache of a model's frozen encoder, run in ``precision``, and its processor's transform.

        ``settings`` is the encoder's configuration, which tells encoders without weights apart.

        Raises :class:`FeatureCacheError` if the encoder trains.
        """
        if not model.is_frozen("vision_encoder"):
            raise FeatureCacheError("run.feature_cache needs a frozen encoder: set model.vision_encoder.freeze: true")
        if any(getattr(t, "random_crop", None) for t in processor.transforms.values()):
            raise FeatureCacheError(
                "run.feature_cache keeps what an encoder says of whole pictures: set "
                "model.processor.image.random_crop: null"
            )
        transforms = {name: t.fingerprint for name, t in processor.transforms.items()}
        name = f"{encoder_hash(model, settings)}-{hashlib.sha1(repr(transforms).encode()).hexdigest()[:12]}-{precision}"
        folder = Path(root) / name
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "about.json", {"encoder": repr(model.vision_encoder.source), "transforms": transforms})
        return cls(folder)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def __getstate__(self) -> dict[str, Any]:  # open files do not travel to worker processes
        return {**self.__dict__, "_open": {}}

    def refresh(self) -> None:
        """Look for files that other processes have finished."""
        from safetensors import safe_open

        known = set(self._where.values())
        for file in sorted(self.folder.glob("*.safetensors")):
            if file not in known and not file.name.startswith(TEMPORARY):
                with safe_open(file, framework="pt") as opened:
                    self._where.update(dict.fromkeys(opened.keys(), file))

    def get(self, key: str) -> Tensor | None:
        """Features [tokens, channels] of a picture in half precision, or None if it is not cached."""
        file = self._where.get(key)
        if file is None:
            return None
        if file not in self._open:
            from safetensors import safe_open

            self._open[file] = safe_open(file, framework="pt")
        return self._open[file].get_tensor(key)

    def add(self, features: dict[str, Tensor]) -> None:
        """Store features by picture, all of them or none."""
        from safetensors.torch import save_file

        name = f"{uuid.uuid4().hex}.safetensors"
        unfinished = self.folder / (TEMPORARY + name)
        try:
            save_file(features, unfinished)
            os.replace(unfinished, self.folder / name)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        self._where.update(dict.fromkeys(features, self.folder / name))


def encoder_hash(model: VisionLanguageModel, settings: Any = None) -> str:
    """Hash of the encoder's code, settings and weights."""
    encoder = model.vision_encoder
    digest = hashlib.sha1(f"{type(encoder).__qualname__} {settings}".encode())
    digest.update(Path(inspect.getfile(type(encoder))).read_bytes())
    for name, tensor in encoder.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def fill_cache(
    cache: FeatureCache,
    model: VisionLanguageModel,
    processor: VLMProcessor,
    samples: Iterable[Sequence[Sample]],
    *,
    batch_size: int = 32,
    rank: int = 0,
    world: int = 1,
    autocast: Callable[[], Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Compute what is missing for the pictures of ``samples``; returns how many pictures were encoded.

    A picture that cannot be read is left out; training meets and counts it. With several processes each
    takes its share; call ``cache.refresh()`` when all are done.
    """
    missing = missing_pictures(cache, processor, samples)
    # By key, since every process looked at the folder at another moment.
    mine = [(key, image) for key, image in missing.items() if int(key[:8], 16) % world == rank]
    model.vision_encoder.eval()
    pending: dict[str, Tensor] = {}
    for start in range(0, len(mine), batch_size):
        keys, pixels = [], []
        for key, image in mine[start : start + batch_size]:
            try:
                pixels.append(processor.load_pixels(image))
                keys.append(key)
            except OSError:
                continue
        if keys:
            stacked = {n: torch.stack([p[n] for p in pixels]).to(model.device) for n in pixels[0]}
            with torch.inference_mode(), autocast() if autocast else torch.no_grad():
                features = model.extract_features(stacked).to("cpu", torch.float16)
            pending.update(zip(keys, features.clone().unbind(), strict=True))
        if len(pending) >= PICTURES_PER_FILE:
            cache.add({key: value.contiguous() for key, value in pending.items()})
            pending = {}
        if progress:
            progress(min(start + batch_size, len(mine)), len(mine))
    if pending:
        cache.add({key: value.contiguous() for key, value in pending.items()})
    return len(mine)


def missing_pictures(
    cache: FeatureCache, processor: VLMProcessor, samples: Iterable[Sequence[Sample]]
) -> dict[str, Any]:
    """Key -> picture of all distinct pictures that the cache does not hold."""
    keys: dict[Any, str] = {}
    missing: dict[str, Any] = {}
    for sequence in samples:
        for index in range(len(sequence)):
            try:
                images = sequence[index].images
            except SampleError:
                continue
            for image in images:
                if isinstance(image, (str, Path)) and image in keys:
                    continue
                try:
                    key = processor.image_key(image)
                except OSError:
                    continue
                if isinstance(image, (str, Path)):
                    keys[image] = key
                if key not in cache:
                    missing.setdefault(key, image)
    return missing
