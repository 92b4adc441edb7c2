"""One part out of a model folder of minivlm: named under ``weights:``, or the base of new adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from minivlm.checkpoints.files import read_weights
from minivlm.checkpoints.native import WEIGHTS, find_model_folder, read_manifest, unfinished
from minivlm.checkpoints.report import CheckpointError, LoadReport, fill
from minivlm.config.experiment import ModelConfig
from minivlm.models.hub import hash_tensors
from minivlm.models.lora import base_state, file_name, is_adapter
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.tokenizer import load_tokenizer


def model_folder(path: str) -> Path | None:
    """The model folder that ``weights:`` means; None for a file, or a folder that minivlm did not write."""
    if not Path(path).is_dir():
        return None
    try:
        return find_model_folder(path)
    except CheckpointError:
        return None


def check_part(model: VisionLanguageModel, part: str, path: str) -> LoadReport:
    """Compare a part with that of a model folder by names and shapes; raises :class:`CheckpointError`."""
    return _compare(model, part, path, _tensors(part, path, shapes_only=True))


def check_tokenizer(tokenizer: Any, path: str, weights: str) -> None:
    """Refuse a tokenizer, which ``path`` names, whose ids are not those that a model folder was trained with.

    It may have more entries. Raises :class:`CheckpointError`.
    """
    folder = model_folder(weights)
    if folder is None or Path(path).resolve() == (folder / "tokenizer").resolve():
        return
    own, theirs = tokenizer.get_vocab(), load_tokenizer(str(folder / "tokenizer")).get_vocab()
    other = [token for token, number in sorted(theirs.items(), key=lambda item: item[1]) if own.get(token) != number]
    if other:
        raise CheckpointError(
            f"model.language_model.tokenizer: {path} is not the tokenizer that {weights} was trained with: "
            f"{len(other)} of {len(theirs)} entries have another id or none, the first is {other[0]!r}; give "
            f"{folder / 'tokenizer'}"
        )


def load_part(model: VisionLanguageModel, part: str, path: str) -> LoadReport:
    """Fill a part from a model folder that holds all of it.

    Below adapters, or quantised, the folder becomes the part's source; any other part is written into checkpoints of
    its own.
    Raises :class:`CheckpointError` when the folder does not hold the part, or another one.
    """
    tensors = _tensors(part, path)
    report = _compare(model, part, path, tensors)
    module = getattr(model, part)
    fill(module, tensors, f"model.{part}.weights: {path}")
    module.source = {"path": path, "sha256": hash_tensors(tensors.items())} if module.keeps_source else None
    module.unsourced = frozenset()
    return report


def keep_bases(model: VisionLanguageModel, config: ModelConfig, folder: Path) -> None:
    """Note where the parts come from that a checkpoint has filled completely.

    Below new adapters, or quantised, the folder is their source, named as ``weights``, so that no further checkpoint
    holds the base again. Any other part has no source left: what is in the checkpoint may differ from the base it
    once had.
    """
    for part in read_manifest(folder).complete:
        module = getattr(model, part)
        module.source, module.unsourced = None, frozenset()
        getattr(config, part).weights = None
        tensors = _of_part(part, folder) if module.keeps_source else {}
        if tensors and not any(map(is_adapter, tensors)):
            getattr(config, part).weights = str(folder)
            module.source = {"path": str(folder), "sha256": hash_tensors(tensors.items())}
            model.trained_before = [name for name in model.trained_before if not name.startswith(f"{part}.")]


def _of_part(part: str, folder: Path, shapes_only: bool = False) -> dict[str, Tensor]:
    file = read_weights(f"model.{part}.weights", str(folder / WEIGHTS), shapes_only=shapes_only)
    prefix = f"{part}."
    return {file_name(n.removeprefix(prefix)): t for n, t in file.tensors.items() if n.startswith(prefix)}


def _tensors(part: str, path: str, shapes_only: bool = False) -> dict[str, Tensor]:
    folder = find_model_folder(path)
    tensors = _of_part(part, folder, shapes_only)
    if part not in read_manifest(folder).complete or any(map(is_adapter, tensors)):
        raise CheckpointError(
            f"model.{part}.weights: {path} holds only what was trained of {part}; `minivlm merge {path} TARGET` writes "
            "a folder that holds all of it"
        )
    return tensors


def _compare(model: VisionLanguageModel, part: str, path: str, tensors: dict[str, Any]) -> LoadReport:
    """Names of one of several tied tensors are enough."""
    module = getattr(model, part)
    own = base_state(module)
    ties = {own[name].data_ptr() for name in tensors if name in own and not own[name].is_meta}
    wanted = {n: t for n, t in own.items() if n in tensors or t.data_ptr() not in ties}
    if any(t.is_meta for t in own.values()):  # where nothing tells what is tied
        wanted = {n: t for n, t in wanted.items() if n in tensors}
    report = LoadReport.compare(wanted, tensors, module.fits)
    if not report.fits:
        raise CheckpointError(f"model.{part}.weights: {path} holds another {part}\n{report}")
    note = unfinished(find_model_folder(path))
    report.where, report.what = f"model.{part}.weights {path}", f"{part} of minivlm{note}"
    return report
