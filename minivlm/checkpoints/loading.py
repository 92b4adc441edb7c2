"""Filling a model: the files under ``weights:``, then the checkpoint, each with a report.

A foreign format is known by its key map in ``FORMATS``; everything else about it is in its own module.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minivlm.checkpoints import llava, llava_hf, mgm, minigpt4, minimind, native, openclip, parts
from minivlm.checkpoints.files import WeightFile, check_path, is_llava_folder, local_path, read_weights
from minivlm.checkpoints.foreign import Format, check_foreign, load_foreign, matches
from minivlm.checkpoints.report import CheckpointError, LoadReport, fill
from minivlm.config.experiment import ModelConfig
from minivlm.models.hub import hash_tensors, join_hashes
from minivlm.models.lora import base_state, file_name
from minivlm.models.vlm import PARTS, VisionLanguageModel
from minivlm.paths import is_url, is_weight_file
from minivlm.schema import walk_parts

_CHECKPOINT = "model.checkpoint"
FORMATS: tuple[Format, ...] = (
    *(*minigpt4.FORMATS, *llava_hf.FORMATS, *mgm.FORMATS, *llava.FORMATS, *openclip.FORMATS),
    *minimind.FORMATS,
)
"""Formats of other projects, the more telling ones first; a further one is one more key map."""

OTHERS = (
    ("the vision encoder of a model of LLaVA", "*vision_tower.*"),
    ("CLIP or SigLIP of transformers: give its folder as model.vision_encoder.path", "vision_model.*"),
    ("CLIP in the names of OpenAI", "visual.*"),
    ("BERT", "*bert.encoder.layer.#.*"),
    ("a language model: give its folder as model.language_model.path", "model.layers.#.*"),
    ("a language model below a prefix", "*.layers.#.self_attn.*"),
    ("a language model: give its folder as model.language_model.path", "transformer.h.#.*"),
    ("a vision transformer", "blocks.#.*"),
)
"""What else a file can be, by one of its names."""


def identify(key: str, file: WeightFile) -> Format | None:
    """The foreign format that has tensors of these names; raises :class:`CheckpointError` for impossible shapes."""
    form = next((form for form in FORMATS if form.recognises(file.tensors, file.extra.get("config"))), None)
    wrong = form and form.wrong_rank(file.tensors)
    if form and wrong:
        raise CheckpointError(f"{key}: {file.path} ({form.name}): {wrong}")
    return form


def what_else(names: Iterable[str]) -> str:
    """What a file of no known format seems to hold."""
    listed = list(names)
    for what, pattern in OTHERS:
        if any(matches(pattern, name) for name in listed):
            return what
    return f"tensors such as {', '.join(listed[:3])}"


def check_files(config: ModelConfig) -> None:
    """Refuse placeholders and files that do not exist, before anything large is loaded or fetched."""
    for part in PARTS:
        node = getattr(config, part)
        for key, inner in walk_parts(f"model.{part}", node):
            for setting in ("path", "tokenizer"):
                check_path(f"{key}.{setting}", getattr(inner.config, setting, None))
        if node.weights:
            _check_file(f"model.{part}.weights", node.weights)
    if config.checkpoint and is_foreign(config.checkpoint):
        _check_file("model.checkpoint", config.checkpoint)


def _check_file(key: str, path: str) -> None:
    if not (is_url(path) or Path(path).is_dir()):  # a URL is fetched when it is read
        local_path(key, path)


def is_foreign(checkpoint: str | None) -> bool:
    """Whether ``model.checkpoint`` is a file or folder of another project, not a model folder of minivlm."""
    return bool(checkpoint) and (is_weight_file(str(checkpoint)) or is_llava_folder(Path(str(checkpoint))))


def names_files(config: ModelConfig) -> bool:
    """Whether there is something to compare with a model before it is loaded."""
    return any(getattr(config, part).weights for part in PARTS) or is_foreign(config.checkpoint)


def check_weights(shapes: VisionLanguageModel, config: ModelConfig, *, fetch: bool) -> None:
    """Refuse files that do not fit a model of which there are only ``shapes``, before anything large is read.

    What lies on a server is compared when it is loaded, but for a checkpoint, which ``fetch`` gets now.
    Raises :class:`CheckpointError`.
    """
    for part in PARTS:
        path = getattr(config, part).weights
        if path and parts.model_folder(path):
            parts.check_part(shapes, part, path)
        elif path and not is_url(path):
            key = f"model.{part}.weights"
            file = read_weights(key, path, shapes_only=True)
            foreign, _ = _compare_part(shapes, part, file, key)
            if foreign:
                check_foreign(shapes, file, foreign, key, part)
    if config.checkpoint and is_foreign(config.checkpoint) and (fetch or not is_url(config.checkpoint)):
        file, form = _read_checkpoint(config.checkpoint, shapes_only=True)
        check_foreign(shapes, file, form, _CHECKPOINT)


def load_parts(model: VisionLanguageModel, config: ModelConfig) -> None:
    """Fill the parts that name a file under ``weights:``."""
    for part in PARTS:
        path = getattr(config, part).weights
        if path:
            model.load_reports.append(load_part(model, part, path))


def load_part(model: VisionLanguageModel, part: str, path: str) -> LoadReport:
    """Fill one part from a file with its own names, or from a published base, all of it or nothing.

    A published base becomes the ``source`` of what it fills, so that a checkpoint need not hold it again; other
    files leave no source, but for a quantised part. Raises :class:`CheckpointError` when the file does not belong
    there.
    """
    if parts.model_folder(path):
        return parts.load_part(model, part, path)
    key = f"model.{part}.weights"
    file = read_weights(key, path)
    form, report = _compare_part(model, part, file, key)
    if form:
        report = load_foreign(model, file, form, key, part)
        if form.base:
            _note_sources(model, form, file, report.matched)
        return report
    module = getattr(model, part)
    fill(module, file.tensors, f"{key}: {path}")  # adapters stay as they are
    module.source, module.unsourced = None, frozenset()  # checkpoints hold these weights
    if module.quantization:  # which cannot be saved
        module.source = {"path": path, "sha256": hash_tensors(file.tensors.items())}
    report.where, report.what = f"{key} {path}", "weights of this part"
    return report


def _compare_part(
    model: VisionLanguageModel, part: str, file: WeightFile, key: str
) -> tuple[Format | None, LoadReport]:
    """The format of a file for a part, None if it has the part's own names and all of them."""
    module = getattr(model, part)
    report = LoadReport.compare(base_state(module), file.tensors, module.fits)
    form = None if report.fits else identify(key, file)
    if form and form.part != part and (form.part or not form.base):
        raise CheckpointError(f"{key}: {file.path} holds {form.name}; give it as {form.key}")
    if not form and not report.fits:
        text = f"{key}: {file.path} does not belong to this part"
        raise CheckpointError(f"{text}; it holds {what_else(file.tensors)}\n{report}")
    return form, report


def _note_sources(model: VisionLanguageModel, form: Format, file: WeightFile, loaded: list[str]) -> None:
    """Let every part that a base has filled know its source; the Q-Former's file fills ln_vision, too."""
    found = {"path": file.path, "sha256": hash_tensors(file.tensors.items())}
    for part in {name.split(".")[0] for name in loaded}:
        module = getattr(model, part)
        prefix = f"{part}."
        state = base_state(module)
        filled = {id(state[name.removeprefix(prefix)]) for name in loaded if name.startswith(prefix)}  # ties, too
        left = {
            n for n, t in state.items() if id(t) not in filled and not any(matches(p, prefix + n) for p in form.initial)
        }
        if module.source is not None and part != form.part:  # a second file for the part
            both = join_hashes(module.source.get("sha256", ""), found["sha256"])
            module.source = {**module.source, "also": file.path, "sha256": both}
            module.unsourced &= left
        elif form.part in ("", part) or not left:
            module.source, module.unsourced = found, frozenset(left)


def load_checkpoint(model: VisionLanguageModel, config: ModelConfig, start: Path | None) -> None:
    """Fill a model from ``model.checkpoint``: the model folder ``start``, or without one a foreign file.

    What the checkpoint has trained is added to ``model.trained_before``. Raises :class:`CheckpointError`.
    """
    assert config.checkpoint
    if start is not None:
        report = native.load_weights(model, start)
        report.where, report.what = f"{_CHECKPOINT} {start}", f"minivlm{native.unfinished(start)}"
        model.trained_before = native.read_manifest(start).trained
        parts.keep_bases(model, config, start)
    else:
        file, form = _read_checkpoint(config.checkpoint)
        report, tensors = check_foreign(model, file, form, _CHECKPOINT)
        _leave_out_bases(model, form, report, tensors)
        fill(model, tensors, f"{_CHECKPOINT}: {file.path}")
        report.still_random = _still_random(model, config, set(report.matched))
        parameters = {file_name(name) for name, _ in model.named_parameters()}
        model.trained_before = [name for name in report.matched if name in parameters]
    model.load_reports.append(report)


def _leave_out_bases(model: VisionLanguageModel, form: Format, report: LoadReport, tensors: dict[str, Tensor]) -> None:
    """Do not take for trained what a file repeats of a base, as the first stage of Mini-Gemini its encoders.

    The same is what rounds to the values in the file, which may be half as wide.
    """
    sourced = [part for part in PARTS if getattr(model, part).source]
    own = {f"{part}.{name}": tensor for part in sourced for name, tensor in base_state(getattr(model, part)).items()}
    own = {name: tensor for name, tensor in own.items() if any(matches(p, name) for p in form.repeats)}
    repeated = {n for n, t in own.items() if n in tensors and torch.equal(t.detach().to(tensors[n].dtype), tensors[n])}
    for name in repeated:
        del tensors[name]
    report.matched = [name for name in report.matched if name not in repeated]
    if repeated:
        report.ignored["the same in the base"] = sorted(repeated)


def _read_checkpoint(path: str, *, shapes_only: bool = False) -> tuple[WeightFile, Format]:
    file = read_weights(_CHECKPOINT, path, shapes_only=shapes_only)
    form = identify(_CHECKPOINT, file)
    if form is None:
        raise CheckpointError(f"{_CHECKPOINT}: {path} is no checkpoint; it holds {what_else(file.tensors)}")
    if form.part and form.base:
        raise CheckpointError(f"{_CHECKPOINT}: {path} holds {form.name}; give it as {form.key}")
    return file, form


def _still_random(model: VisionLanguageModel, config: ModelConfig, loaded: set[str]) -> list[str]:
    def is_random(part: str) -> bool:
        module: Any = getattr(model, part)
        own = base_state(module).keys() - module.fixed_parameters
        given = {name for name in own if f"{part}.{name}" in loaded}
        if getattr(config, part).weights and module.source is None:
            return False  # a plain file has filled it
        return not given.issuperset(own if module.source is None else module.unsourced)

    return [part for part in PARTS if is_random(part)]
