"""Folders and hub ids of transformers: configurations, and weights that are never loaded in part."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from torch import nn

from minivlm.models.base import ModelError

_SAMPLES, _SAMPLE_BYTES = 1024, 4096


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
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    if looks_local and not Path(path).is_dir():
        raise ModelError(f"{part}.path: there is no folder '{path}'; give a local folder or a hub id (owner/name)")


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
    """Where weights came from: a folder or hub id, or a file; what is local has a hash.

    Names, sizes and samples of the bytes count. The samples are spread over the files: a fine-tuned model often
    shares its beginning with its base.
    """
    source = {"path": path} | ({"revision": revision} if revision else {})
    root = Path(path)
    if root.exists():
        files = [root] if root.is_file() else sorted(root.glob("*.safetensors")) + sorted(root.glob("*.bin"))
        digest = hashlib.sha256()
        for file in files:
            size = file.stat().st_size
            digest.update(f"{'' if file == root else file.name} {size}".encode())  # a file may be renamed
            with file.open("rb") as stream:
                for start in range(0, size, max(size // _SAMPLES, _SAMPLE_BYTES)):
                    stream.seek(start)
                    digest.update(stream.read(_SAMPLE_BYTES))
        source["sha256"] = digest.hexdigest()
    return source
