"""Files of weights of any kind, read safely: local or fetched, torch's or safetensors', tensors and the rest."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError
from torch import Tensor

from minivlm.checkpoints.report import CheckpointError
from minivlm.models.hub import read_torch, weight_files
from minivlm.paths import is_placeholder, is_url

_NO_WEIGHTS = {
    b"version https://git-lfs": "it is a pointer of Git LFS, not the file itself: run git lfs pull",
    b"<": "it is a page of a web site, not the file itself: open the link in a browser and download it there",
}
ADAPTER = "adapter_config.json"
_SETTINGS = {"config": "config.json", "adapter": ADAPTER}
_KINDS: dict[type, str] = {str: "a text", int: "a whole number"}
_NESTED = ("model", "state_dict", "module")
MINIMIND = "image_special_token"
"""A key that every ``config.json`` of MiniMind-V has."""


@dataclass(frozen=True)
class WeightFile:
    """The tensors of a file, and under ``extra`` what lies beside them: ``epoch``, ``config``, ``optimizer``."""

    path: str
    local: Path
    tensors: Mapping[str, Tensor]
    extra: Mapping[str, Any] = field(default_factory=dict)


def check_path(key: str, path: str | None) -> None:
    """Refuse a placeholder; raises :class:`CheckpointError` which names the key."""
    if path and is_placeholder(path):
        raise CheckpointError(f"{key}: '{path}' is a placeholder; put the real path in its place")


def local_path(key: str, path: str) -> Path:
    """The file that a path or URL means; a URL is fetched once.

    Raises :class:`CheckpointError` if there is no such file.
    """
    check_path(key, path)
    if is_url(path):
        return fetch(key, path)
    file = Path(path).expanduser()
    if not file.is_file():
        raise CheckpointError(
            f"{key}: {path} is a folder, not a file" if file.is_dir() else f"{key}: there is no file {path}"
        )
    return file


def cache_folder() -> Path:
    """Where fetched files are kept: ``MINIVLM_CACHE``, or ``minivlm`` in the user's cache folder."""
    own = os.environ.get("MINIVLM_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minivlm"


def fetch(key: str, url: str) -> Path:
    """Fetch a URL through iopath; one process does, the others wait.

    A file appears in the cache only when it is whole. Raises :class:`CheckpointError` if it cannot be had.
    """
    from iopath.common.file_io import HTTPURLHandler, PathManager

    parsed = urlparse(url)
    if ".." in parsed.path.split("/") or parsed.path.endswith("/") or not parsed.path:
        raise CheckpointError(f"{key}: {url} names no file")
    folder = cache_folder() / "files" / re.sub(r"\W", "_", parsed.netloc)  # iopath leaves the server out
    if not (folder / parsed.path.lstrip("/")).is_file():
        print(f"fetching {url} into {folder}", file=sys.stderr, flush=True)
    paths = PathManager()
    paths.register_handler(HTTPURLHandler())
    try:
        return Path(paths.get_local_path(url, cache_dir=str(folder)))
    except (OSError, HTTPException, ValueError) as error:  # a blank in a URL is an InvalidURL
        raise CheckpointError(f"{key}: {url} cannot be fetched: {error}; fetch it by hand and give its path") from error


def read_weights(key: str, path: str, *, shapes_only: bool = False) -> WeightFile:
    """Read a file of tensors, or a folder of Hugging Face's or LLaVA's kind; nothing in it is ever executed.

    With ``shapes_only`` the tensors lie on the meta device. Raises :class:`CheckpointError` for what is no
    such file, is damaged, or holds objects.
    """
    if Path(path).is_dir():
        return _read_folder(key, Path(path), shapes_only)
    local = local_path(key, path)
    try:
        content = _read_safetensors(local, shapes_only) if _is_safetensors(local) else _read_torch(local, shapes_only)
    except Exception as error:  # bytes that mean nothing make unpickling fail in any way
        why = _why(local, error)
        if is_url(path) and "GLOBAL" not in str(error):
            local.unlink(missing_ok=True)
            why += "; what had been fetched is deleted, so another try fetches it again"
        raise CheckpointError(f"{key}: {path} cannot be read: {why}") from error
    tensors, extra = _unpack(content)
    if not tensors and not (content == {} and _is_safetensors(local)):  # where bases give everything
        found = f"the keys {', '.join(map(str, list(content)[:5]))}" if isinstance(content, dict) else "other things"
        raise CheckpointError(f"{key}: {path} holds no mapping from names to tensors, but {found}")
    return WeightFile(path, local, tensors, extra)


def folder_files(folder: Path) -> list[Path]:
    """The files of weights of a folder: a whole model, LoRA adapters and what trained beside them, a projector."""
    if (folder / ADAPTER).is_file():
        names = ("adapter_model.safetensors", "adapter_model.bin")
        adapter = [folder / name for name in names if (folder / name).is_file()][:1]
        beside = folder / "non_lora_trainables.bin"
        return [*adapter, beside] if adapter and beside.is_file() else adapter
    projector = folder / "mm_projector.bin"
    return weight_files(folder) or ([projector] if projector.is_file() else [])


def is_llava_folder(folder: Path) -> bool:
    """Whether a folder is one of LLaVA's kind, or of MiniMind-V's: a model, adapters, or a projector.

    Its ``config.json`` says so.
    """
    if not (folder / "config.json").is_file():
        return False
    settings = read_json("model.checkpoint", folder / "config.json")
    in_transformers = settings.get("model_type") == "llava" and isinstance(settings.get("text_config"), dict)
    return in_transformers or any(key in settings for key in ("mm_vision_tower", "mm_projector_type", MINIMIND))


def _read_folder(key: str, folder: Path, shapes_only: bool) -> WeightFile:
    """The tensors of all files, and under ``extra`` what ``config.json`` and ``adapter_config.json`` say."""
    files = folder_files(folder)
    _check_shards(key, folder, files)
    if not files:
        wanted = "model*.safetensors, pytorch_model*.bin, mm_projector.bin"
        wanted = "adapter_model.*" if (folder / ADAPTER).is_file() else wanted
        raise CheckpointError(f"{key}: {folder} holds no weights ({wanted})")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= read_weights(key, str(file), shapes_only=shapes_only).tensors
    extra = {name: read_json(key, folder / file) for name, file in _SETTINGS.items() if (folder / file).is_file()}
    return WeightFile(str(folder), folder, tensors, extra)


def _check_shards(key: str, folder: Path, files: Sequence[Path]) -> None:
    """Refuse a folder whose index names files that are not there."""
    for index in folder.glob("*.index.json"):
        places = read_json(key, index).get("weight_map")
        if not isinstance(places, dict):
            raise CheckpointError(f"{key}: {index} holds no weight_map, which says where every tensor is")
        named = {str(place) for place in places.values()}
        lost = sorted(named - {file.name for file in folder.iterdir()})
        if lost and (not files or any(file.name in named for file in files)):
            raise CheckpointError(f"{key}: {folder} lacks {', '.join(lost[:3])}, which {index.name} names")


def read_json(key: str, file: Path) -> dict[str, Any]:
    """A JSON file that holds an object; raises :class:`CheckpointError` for any other."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{key}: {file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{key}: {file} holds no mapping")
    return content


def json_value(key: str, settings: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """A value of ``config.json``; what is null counts as left out. Raises :class:`CheckpointError` for another kind."""
    value = settings.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or isinstance(value, bool):
        raise CheckpointError(f"{key}: config.json has {name} {value!r}, wanted is {_KINDS[kind]}")
    return value


def _unpack(content: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, alone or below one of the usual keys, and the rest; no tensors if there are none."""
    if _is_state(content):
        return content, {}
    for name in _NESTED if isinstance(content, dict) else ():
        if _is_state(content.get(name)):
            return content[name], {k: v for k, v in content.items() if k != name}
    return {}, {}


def _is_state(content: Any) -> bool:
    return isinstance(content, dict) and all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items()
    )


def _is_safetensors(file: Path) -> bool:
    with file.open("rb") as stream:
        head = stream.read(9)
    return file.suffix == ".safetensors" or (len(head) == 9 and head[8:] == b"{" and head[:1] != b"\x80")


def _read_torch(file: Path, shapes_only: bool) -> Any:
    content = read_torch(file)
    if not shapes_only or not isinstance(content, dict):
        return content
    places = [content, *(value for key, value in content.items() if key in _NESTED and isinstance(value, dict))]
    for place in places:
        for key, value in place.items():
            if isinstance(value, torch.Tensor):
                place[key] = value.to("meta")
    return content


def _read_safetensors(file: Path, shapes_only: bool) -> dict[str, Tensor]:
    from safetensors import safe_open
    from safetensors.torch import load_file

    if not shapes_only:
        return load_file(file)
    with safe_open(file, framework="pt") as opened, torch.device("meta"):
        parts = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 (it is no dict)
        return {key: torch.empty(p.get_shape(), dtype=_dtype(p.get_dtype())) for key, p in parts.items()}


def _dtype(name: str) -> torch.dtype:
    known = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool", "U8": "uint8"}
    return getattr(torch, known.get(name) or name.replace("I", "int").replace("U", "uint"), torch.uint8)


def _why(file: Path, error: Exception) -> str:
    head = file.read_bytes()[:64] if file.stat().st_size < 2**20 else b""
    for start, reason in _NO_WEIGHTS.items():
        if head.lstrip().startswith(start):
            return reason
    text = str(error)
    forbidden = re.search(r"GLOBAL (\S+)", text)
    if forbidden:
        return (
            f"it holds objects of Python ({forbidden[1]}), which could run any code when they are read; save its "
            "tensors alone, where you trust it: torch.save({'model': state_dict}, FILE)"
        )
    tells = isinstance(error, (RuntimeError, OSError, SafetensorError))  # what others say means nothing to a reader
    detail = f" ({text.splitlines()[0][:120]})" if tells and text else ""
    return f"it is cut off or damaged, or no file of weights{detail}"
