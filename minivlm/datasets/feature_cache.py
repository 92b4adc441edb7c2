"""Outputs of the last frozen module, computed once per picture and kept on disk in half precision.

The folder of a cache is named after the frozen modules (code, settings, weights), the transform and the precision,
so a change of one never meets old features; a picture is named by the hash of its content. Features lie in
safetensors files that are written whole or not at all, each by one process, so several processes and a kill do no
harm.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minivlm import __version__
from minivlm.io import TEMPORARY, write_atomic, write_json
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.fingerprint import code_of
from minivlm.processors.processor import VLMProcessor
from minivlm.schema import Part

FORMAT = 2
ABOUT = "about.json"
STALE_SECONDS = 600
"""A file takes seconds to write; an unfinished one of this age was left behind by a kill."""
WITHOUT_EFFECT = frozenset(
    {"path", "revision", "weights", "checkpoint", "pretrained"}  # the weights themselves are hashed
    | {"gradient_checkpointing", "drop_path_rate", "drop_path_when_frozen", "dropout"}  # of training
)
"""Settings that do not change what a frozen part says of a picture."""
INERT = ("Dropout", "DropPath", "Identity")
"""Modules that do nothing in a frozen part, which is always in eval mode."""


class FeatureCacheError(ValueError):
    """Features that cannot be cached, or a cache that cannot be read."""


class FeatureCache:
    """Features [tokens, channels] of one ``shape`` by picture, in one folder.

    ``ignored`` names the files of the folder that are no features of that shape, with the reason; ``unreadable``
    says by key why no features could be made of a picture.
    """

    def __init__(self, folder: Path, shape: tuple[int, int], about: Mapping[str, Any] | None = None):
        self.folder, self.shape, self.about = folder, tuple(shape), dict(about or {})
        self.ignored: dict[Path, str] = {}
        self.unreadable: dict[str, str] = {}
        self._files: set[Path] = set()
        self._where: dict[str, tuple[Path, int]] = {}
        self._open: dict[Path, Any] = {}
        self.refresh()

    @classmethod
    def for_model(
        cls,
        root: str | Path,
        model: VisionLanguageModel,
        processor: VLMProcessor,
        precision: str = "fp32",
        settings: Mapping[str, Any] | None = None,
    ) -> FeatureCache:
        """The cache of what is frozen in a model, run in ``precision``, behind its processor's transform.

        ``settings`` are the configurations of ``vision_encoder`` and ``connector``, which tell parts without
        weights apart. Raises :class:`FeatureCacheError` if the encoder trains or there is none, if a transform draws at
        random, and if ``root`` is itself the folder of one cache.
        """
        if not model.vision_encoder.inputs:
            raise FeatureCacheError(
                "run.feature_cache: there is no vision encoder (model.vision_encoder: none) whose output it could "
                "keep; set run.feature_cache: null"
            )
        if not model.is_frozen("vision_encoder"):
            raise FeatureCacheError("run.feature_cache needs a frozen encoder: set model.vision_encoder.freeze: true")
        if model.vision_encoder.is_random_when_frozen:
            raise FeatureCacheError(
                "run.feature_cache keeps what an encoder says of a picture, which differs at every step while it drops "
                "paths: set drop_path_when_frozen: false in model.vision_encoder (of dual: in low and high)"
            )
        if any(getattr(t, "is_random", False) for t in processor.transforms.values()):
            raise FeatureCacheError(
                "run.feature_cache keeps what an encoder says of a picture, so it must be the same every time: set "
                "model.processor.image.random_crop: null, or take LAVIS's processor for evaluation (*_eval)"
            )
        if (Path(root) / ABOUT).is_file():
            raise FeatureCacheError(
                f"run.feature_cache: {root} is the cache of one encoder; give the folder above, {Path(root).parent}"
            )
        about = {
            "frozen": frozen_parts(model, settings or {}),
            "transforms": {name: t.fingerprint for name, t in processor.transforms.items()},
            "precision": precision,
            "shape": list(model.feature_shape),
            "format": FORMAT,
        }
        digest = hashlib.sha1(json.dumps(about, sort_keys=True).encode()).hexdigest()
        folder = Path(root) / digest[:20]
        if not (folder / ABOUT).is_file():
            source = model.vision_encoder.source
            write_json(folder / ABOUT, {**about, "source": source, "minivlm": __version__})
        _remove_leftovers(folder)
        return cls(folder, model.feature_shape, about)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def __getstate__(self) -> dict[str, Any]:  # open files do not travel to worker processes
        return {**self.__dict__, "_open": {}}

    @property
    def picture_bytes(self) -> int:
        """Bytes that the features of one picture take."""
        return 2 * self.shape[0] * self.shape[1]

    def refresh(self) -> None:
        """Look for files that other processes have finished; what is no file of this cache is ignored."""
        for file in sorted(self.folder.glob("*.safetensors")):
            if file not in self._files and file not in self.ignored:
                try:
                    self._index(file, _pictures_of(file, self.shape))
                except FeatureCacheError as error:
                    self.ignored[file] = str(error)

    def _index(self, file: Path, keys: Iterable[str]) -> None:
        self._files.add(file)
        self._where.update({key: (file, row) for row, key in enumerate(keys)})

    def get(self, key: str) -> Tensor | None:
        """Features [tokens, channels] of a picture in half precision, or None if it is not cached.

        Raises OSError for a picture that could not be read when the cache was filled, with that reason, and
        :class:`FeatureCacheError` if a file has gone.
        """
        if key in self.unreadable:
            raise OSError(self.unreadable[key])
        if key not in self._where:
            return None
        file, row = self._where[key]
        if file not in self._open:
            from safetensors import SafetensorError, safe_open

            try:
                self._open[file] = safe_open(file, framework="pt").get_slice("features")
            except (OSError, SafetensorError) as error:
                raise FeatureCacheError(f"{file} has changed or gone since the start of this run: {error}") from error
        return self._open[file][row]

    def add(self, features: Mapping[str, Tensor]) -> None:
        """Store features [tokens, channels] by picture, all of them or none."""
        from safetensors.torch import save

        content = save({"features": torch.stack(list(features.values()))}, {"pictures": " ".join(features)})
        file = self.folder / f"{uuid.uuid4().hex}.safetensors"
        write_atomic(file, content)
        self._index(file, features)

    def neighbours(self) -> dict[Path, list[str]]:
        """Other caches beside this one, each with what differs there (keys of its ``about.json``)."""
        found = {}
        for file in sorted(self.folder.parent.glob(f"*/{ABOUT}")):
            try:
                about = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if file.parent != self.folder and isinstance(about, dict):
                found[file.parent] = [key for key, own in self.about.items() if about.get(key) != own]
        return found


def _pictures_of(file: Path, shape: tuple[int, ...]) -> list[str]:
    """Keys of the pictures whose features a file holds, row by row."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            keys = (opened.metadata() or {}).get("pictures", "").split()
            features = opened.get_slice("features")
            found, dtype = features.get_shape(), features.get_dtype()
    except (OSError, SafetensorError) as error:
        raise FeatureCacheError(f"it cannot be read: {error}") from error
    if (found, dtype) != ([len(keys), *shape], "F16"):
        raise FeatureCacheError(f"it holds {dtype} of shape {found}, wanted F16 of {[len(keys), *shape]}")
    return keys


def _remove_leftovers(folder: Path) -> None:
    for file in folder.glob(f"{TEMPORARY}*"):
        try:
            if time.time() - file.stat().st_mtime > STALE_SECONDS:
                file.unlink()
        except FileNotFoundError:  # another process was faster
            continue


def frozen_parts(model: VisionLanguageModel, settings: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Class, settings and hash (of code and weights) of the encoder and, if it is frozen, the connector's front."""
    encoder, connector = model.vision_encoder, model.connector
    parts: dict[str, tuple[list[nn.Module], dict[str, Tensor]]] = {
        "vision_encoder": (list(encoder.modules()), encoder.state_dict())
    }
    if model.has_frozen_front:
        named = connector.named_modules()
        front = [module for name, module in named if name == "" or name.split(".")[0] in connector.front_names]
        parts["connector"] = (front, connector.front_state())
    return {
        part: {
            "class": type(modules[0]).__qualname__,
            "settings": repr(_settings(settings.get(part), getattr(model, part))),
            "hash": _hash(modules, state),
        }
        for part, (modules, state) in parts.items()
    }


def _settings(given: Any, module: nn.Module) -> dict[str, Any]:
    """Settings of a part that have an effect; the content of a folder's config.json stands for its name."""
    if dataclasses.is_dataclass(given):
        given = {field.name: getattr(given, field.name) for field in dataclasses.fields(given) if field.repr}
    kept = {key: value for key, value in (given or {}).items() if key not in WITHOUT_EFFECT}
    for key, value in kept.items():
        if isinstance(value, Part):  # is the child of that name
            kept[key] = {"name": value.name, **_settings(value.config, getattr(module, key))}
    lora: Any = getattr(module, "lora", None)
    if lora:
        kept["lora"] = dataclasses.asdict(lora)  # alpha is no weight
    inside: Any = getattr(getattr(module, "model", None), "config", None)
    if hasattr(inside, "to_diff_dict"):
        named = ("_name_or_path", "transformers_version")
        kept["transformers"] = {key: value for key, value in inside.to_diff_dict().items() if key not in named}
    return kept


def _hash(modules: Iterable[nn.Module], state: Mapping[str, Tensor]) -> str:
    """Hash of the files that define the modules' classes, and of weights."""
    digest = hashlib.sha1(code_of({type(module) for module in modules if type(module).__name__ not in INERT}))
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
