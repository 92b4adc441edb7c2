"""Folders that a checkpoint names, such as those of its vision encoders, which may lie elsewhere on this machine."""

from __future__ import annotations

import os
from pathlib import Path, PurePath

from minivlm.checkpoints.report import CheckpointError

ZOO = "MINIVLM_MODEL_ZOO"
"""Environment variable with further folders to look in, divided as in PATH."""
_ABOVE = 3


def find_folder(folder: Path, name: str) -> str:
    """The folder that ``name`` means in ``folder``, or ``name`` itself if there is none.

    It is looked for in the folder and up to three above it, in the working directory, and in those of
    ``MINIVLM_MODEL_ZOO``, there also by the end of its name. A name with ``..`` is not followed.
    """
    parts = [part for part in PurePath(name).parts if part != os.sep]
    if not name or ".." in parts:
        return name
    places = [root / name for root in (*_around(folder), Path())]
    places += [root.joinpath(*parts[start:]) for root in _zoo() for start in range(len(parts))]
    return next((str(place) for place in places if place.is_dir()), name)


def need_folder(folder: Path, name: str, key: str, setting: str, *, hub: bool = False) -> str:
    """As :func:`find_folder`; what is not found must, with ``hub``, be a hub id.

    ``key`` is where ``config.json`` has the name, ``setting`` what can be given instead. Raises
    :class:`CheckpointError` which says where it was looked for.
    """
    found = find_folder(folder, name)
    is_id = hub and name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if name and (is_id or Path(found).is_dir()):
        return found
    if not name:
        raise CheckpointError(
            f"model.checkpoint: {folder} holds no vision encoder, and its config.json names none ({key}); name it as "
            f"{setting}"
        )
    roots = ", ".join(map(str, [*_around(folder), "the working directory", *_zoo()]))
    where = "a name with '..' is not followed" if ".." in PurePath(name).parts else f"looked for in {roots}"
    raise CheckpointError(
        f"model.checkpoint: {folder} does not hold the encoder that its config.json calls '{name}' ({key}), and there "
        f"is no such folder: {where}. Put it there, name the folder around it in {ZOO}, or name it as {setting}"
    )


def _around(folder: Path) -> list[Path]:
    return [folder, *folder.resolve().parents[:_ABOVE]]


def _zoo() -> list[Path]:
    return [Path(root).expanduser() for root in os.environ.get(ZOO, "").split(os.pathsep) if root]
