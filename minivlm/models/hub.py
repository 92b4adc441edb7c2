"""Folders and hub ids of transformers: configurations, and weights that are never loaded in part."""

from __future__ import annotations

import fnmatch
import hashlib
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.models.base import ModelError

HASH = "tensors-1:"
"""Begins a hash of what tensors hold. Those of older manifests are of the bytes of files, and are not compared."""
_SAMPLES = 256


def load_hf_config(part: str, path: str | None, config: dict[str, Any] | None, revision: str | None) -> Any:
    """The transformers configuration that a part's ``path`` or ``config`` describes.

    Raises :class:`ModelError` when both or neither are given, when there is no such folder, or when the
    model_type is unknown.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if (path is None) == (config is None):
        raise ModelError(f"{part}: give either `path` (a folder or hub id) or `config` (train from scratch)")
    if config is not None:
        settings = dict(config)
        model_type = settings.pop("model_type", None)
        if model_type not in CONFIG_MAPPING:
            raise ModelError(f"{part}.config.model_type: transformers knows no '{model_type}'")
        return AutoConfig.for_model(model_type, **settings)
    assert path is not None
    check_folder(part, path)
    try:
        return AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise ModelError(f"{part}.path: cannot read the configuration of '{path}': {error}") from error


def check_folder(part: str, path: str) -> None:
    """Refuse what is meant as a local folder and is none, instead of asking the hub for it."""
    if _looks_local(path) and not Path(path).is_dir():
        raise ModelError(f"{part}.path: there is no folder '{path}'; give a local folder or a hub id (owner/name)")


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") != 1


def find_file(key: str, path: str, names: Iterable[str], revision: str | None, *, fetch: bool = True) -> Path | None:
    """The first of ``names`` in a local folder or, unless there is one, in a model of the hub, kept in its cache.

    None if there is no such file, or it would have to be fetched and may not. Raises :class:`ModelError` if the hub
    does not give it.
    """
    if _looks_local(path) or Path(path).exists():
        return next((file for name in names if (file := Path(path) / name).is_file()), None)
    from huggingface_hub import errors, hf_hub_download

    refused: Exception | None = None
    for name in names if fetch else ():
        try:
            return Path(hf_hub_download(path, name, revision=revision))
        except errors.LocalEntryNotFoundError as error:  # without a network; another name may be in the cache
            refused = refused or error
        except errors.EntryNotFoundError:
            continue
        except (OSError, ValueError) as error:
            refused = error
            break
    if refused is not None:
        why = (str(refused).strip() or type(refused).__name__).splitlines()[0]
        raise ModelError(
            f"{key}: the hub does not give '{path}': {why}; name a local folder, which `minivlm download {path}` makes"
        ) from refused
    return None


def from_pretrained(part: str, auto_class: Any, path: str, **arguments: Any) -> nn.Module:
    """``auto_class.from_pretrained`` that refuses a checkpoint which does not fill the whole model."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a text model beside the wanted one is no news; what lacks is named below
    try:
        # tensors of another shape are not ignored: they are named below
        model, info = auto_class.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **arguments
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"{part}: cannot load weights from '{path}': {error}") from error
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(info["missing_keys"])
    wrong = sorted(str(key) for key in info["mismatched_keys"])
    if missing or wrong:
        raise ModelError(
            f"{part}: '{path}' is not a checkpoint of {type(model).__name__}: "
            f"{len(missing)} keys missing ({', '.join(missing[:5])}), {len(wrong)} of wrong shape "
            f"({', '.join(wrong[:5])})"
        )
    return model


def source_of(path: str, revision: str | None) -> dict[str, str]:
    """Where weights came from: a hub id, or a folder, which has a hash of its tensors (:func:`hash_tensors`)."""
    source = {"path": path} | ({"revision": revision} if revision else {})
    if Path(path).is_dir():
        source["sha256"] = hash_tensors(read_tensors(weight_files(Path(path))))
    return source


def weight_files(folder: Path) -> list[Path]:
    """The files of weights of a folder of Hugging Face: one, or all shards."""
    return [folder / name for name in weight_names(file.name for file in folder.iterdir())]


def weight_names(names: Iterable[str]) -> list[str]:
    """Which of the names in a folder of Hugging Face are its weights: one, or all shards."""
    # Beside its shards a folder may hold the same weights once more, in another format or by other names.
    patterns = ("model*.safetensors", "*.safetensors", "pytorch_model*.bin", "open_clip_pytorch_model.bin")
    listed = sorted(names)
    return next((found for pattern in patterns if (found := fnmatch.filter(listed, pattern))), [])


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of names, shapes, and up to some hundred values of each tensor, spread over it.

    It does not depend on order, files, or a storage type that holds the same values. Tables of rotary embeddings,
    which older files hold, are left out, since every reader computes them anew.
    """
    digests = []
    for name, tensor in tensors:
        if not name.endswith("inv_freq"):
            flat = tensor.detach().reshape(-1)
            step = flat.numel() // _SAMPLES | 1  # odd, so that it does not stay in one column of a matrix
            values = flat[::step].to("cpu", torch.float32).numpy().tobytes()
            digests.append(hashlib.sha256(f"{name} {tuple(tensor.shape)} ".encode() + values).digest())
    return HASH + hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def join_hashes(*hashes: str) -> str:
    """One hash for weights that come from several places."""
    return HASH + hashlib.sha256("".join(hashes).encode()).hexdigest()


def read_torch(file: Path) -> Any:
    """What a file of ``torch.save`` holds, on the CPU; nothing in it is executed.

    It is mapped into memory: a tensor costs nothing until it is looked at. Files of torch before 1.6 are read whole.
    """
    return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None)


def read_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of files of safetensors or torch, which are mapped into memory."""
    from safetensors import safe_open

    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no dict)
                    yield name, opened.get_tensor(name)  # a view of the mapped file
        else:
            yield from ((name, value) for name, value in read_torch(file).items() if isinstance(value, Tensor))
