"""minivlm's own format: a folder that says by itself what it holds.

``config.yaml`` (section ``model``, template and picture settings written out), ``manifest.json`` (format,
where base weights come from, which parts the file holds in full), ``model.safetensors`` (what was ever
trained, and all that cannot be had again from a base) and ``tokenizer/``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from minivlm import registry
from minivlm.checkpoints.files import read_weights
from minivlm.checkpoints.report import CheckpointError, LoadReport, fill
from minivlm.config.experiment import NO_VISION, ModelConfig, to_container
from minivlm.config.source import read_yaml
from minivlm.io import atomic_folder, write_json
from minivlm.models.base import PartModule
from minivlm.models.lora import file_name, is_adapter, other_alpha
from minivlm.models.vlm import PARTS, VisionLanguageModel
from minivlm.paths import is_placeholder
from minivlm.processors.image import ImageTransform
from minivlm.processors.processor import VLMProcessor
from minivlm.version import __version__

log = logging.getLogger(__name__)
FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"


@dataclass
class Manifest:
    """``sources``: base weights by part. ``complete``: parts whose weights are all in the file.

    ``imports`` names the user's files that registered parts; they are never run from a checkpoint.
    ``trained`` holds the names of all parameters that were trained in this or an earlier stage.
    """

    sources: dict[str, dict[str, str] | None] = field(default_factory=dict)
    complete: list[str] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    step: int = 0
    stage: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    imports: list[str] = field(default_factory=registry.user_files)
    format: int = FORMAT
    minivlm: str = __version__


def trained_names(model: VisionLanguageModel, earlier: list[str] | None = None) -> list[str]:
    """Names of the parameters that train now or did ``earlier``; a head that is the embeddings counts as both."""
    now = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    return sorted(now | set(earlier or []))


def save_model(
    folder: Path,
    model: VisionLanguageModel,
    config: ModelConfig,
    processor: VLMProcessor,
    manifest: Manifest,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a model folder atomically; an old one of that name stays whole until the new one is."""
    with atomic_folder(folder) as unfinished:
        write_model(unfinished, model, config, processor, manifest, weights)


def kept_names(model: VisionLanguageModel, manifest: Manifest) -> list[str]:
    """Names of the tensors that a model folder holds; notes in the manifest what it leaves out, and why."""
    trained = set(manifest.trained)
    state = list(model.state_dict())
    buffers = {name for name, _ in model.named_buffers()}
    wanted: list[str] = []
    for part in PARTS:
        module = getattr(model, part)
        source = module.source
        keys = [key for key in state if key.startswith(f"{part}.")]
        trains = any(key in trained for key in keys)
        beyond = {f"{part}.{name}" for name in module.unsourced}
        beside = buffers | {f"{part}.{name}" for name in module.fixed_parameters if not module.quantization}
        own = trained | beyond | {key for key in keys if is_adapter(key) or (key in beside and trains)}
        kept = [key for key in keys if source is None or key in own]
        wanted += kept
        manifest.sources[part] = source
        if len(kept) == len(keys) and part not in manifest.complete:
            manifest.complete.append(part)
    return wanted


def write_model(
    folder: Path,
    model: VisionLanguageModel,
    config: ModelConfig,
    processor: VLMProcessor,
    manifest: Manifest,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write the files of a model folder into an existing folder.

    ``weights`` are the tensors of :func:`kept_names` where the model itself does not hold them whole.
    """
    from omegaconf import OmegaConf
    from safetensors.torch import save_file

    names = kept_names(model, manifest)
    if weights is None:
        state = model.state_dict()
        weights = {name: state[name] for name in names}
    save_file(_without_ties(weights), folder / WEIGHTS)
    container = to_container(config)
    container["checkpoint"] = None
    container["processor"]["image"] |= _image_node(processor)
    needed = {
        p
        for part, source in manifest.sources.items()
        if source and part not in manifest.complete
        for p in (source.get("path"), source.get("also"))
    }
    for part in PARTS:
        if container[part]["weights"] not in needed:
            container[part]["weights"] = None
    for part in ("vision_encoder", "language_model"):
        _describe_inside(container[part], getattr(model, part), part in manifest.complete)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(container)), encoding="utf-8")
    processor.tokenizer.save_pretrained(folder / "tokenizer")
    write_json(folder / MANIFEST, vars(manifest))


def _describe_inside(node: dict[str, Any], part: Any, complete: bool) -> None:
    """A part whose weights are all in the file must not ask for its base folder again."""
    if complete and node.get("path"):
        node |= part.built_from | {key: list(part.image_settings[key]) for key in ("mean", "std") if key in node}
    hf = getattr(getattr(part, "model", None), "config", None)
    if complete and node.get("path") and hf is not None:
        node["path"], node["config"] = None, json.loads(hf.to_json_string(use_diff=True))
    if complete and "pretrained" in node:
        node["pretrained"] = False
    for name, inner in part.named_children():
        if isinstance(inner, PartModule):  # of an encoder that consists of several
            _describe_inside(node[name], inner, complete)


def _image_node(processor: VLMProcessor) -> dict[str, Any]:
    transforms = list(processor.transforms.values())
    if len(transforms) != 1 or type(transforms[0]) is not ImageTransform:
        return {}  # two inputs differ, and a user's transform has settings of its own
    return dict(vars(transforms[0]))


def _without_ties(state: dict[str, Any]) -> dict[str, Any]:
    """Tied tensors once; loading fills both, since they are one parameter of the model."""
    seen: set[int] = set()
    kept = {}
    for key, tensor in state.items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            kept[key] = tensor.detach().cpu().contiguous()
    return kept


def is_model_folder(folder: Path) -> bool:
    """Whether a folder was written by :func:`save_model`."""
    return (folder / MANIFEST).is_file() and (folder / "config.yaml").is_file()


def find_model_folder(path: str | Path) -> Path:
    """The model folder that a path means: itself, or the one in a run's or a checkpoint's folder.

    Raises :class:`CheckpointError` with what was looked for.
    """
    root = Path(path)
    if is_placeholder(str(path)):
        raise CheckpointError(f"model.checkpoint: '{path}' is a placeholder; put the real path in its place")
    if root.is_file():
        raise CheckpointError(f"{root} is a file; a folder that minivlm wrote is wanted here")
    if not root.exists():
        raise CheckpointError(f"there is no folder {root}; a run writes it (run.output_dir): train it first")
    newest = sorted(root.glob("*/model"), key=lambda p: p.stat().st_mtime, reverse=True)
    checkpoints = sorted(root.glob("checkpoints/step_*/model"), reverse=True)
    for candidate in (root, root / "model", *newest, *checkpoints):
        if is_model_folder(candidate):
            return candidate
    if (root / "config.json").is_file():
        raise CheckpointError(
            f"{root} is a folder of Hugging Face, not one that minivlm wrote; "
            "give it as model.language_model.path or model.vision_encoder.path"
        )
    raise CheckpointError(
        f"{root} holds no minivlm model ({MANIFEST} and config.yaml), nor does {root / 'model'}; "
        "a run that was interrupted before its first checkpoint has none"
    )


def unfinished(folder: Path) -> str:
    """A note about a model folder in the checkpoints of a run that has not come to its end; empty for any other."""
    run = folder.parents[2] if len(folder.parents) > 2 else folder
    if folder.parts[-3:-2] != ("checkpoints",) or is_model_folder(run / "model"):
        return ""
    return f", {folder.parent.name} of a run that has not ended"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a model folder.

    Raises :class:`CheckpointError` if it is none, or of a newer format.
    """
    try:
        raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / MANIFEST} cannot be read: {error}") from error
    usual = vars(Manifest())
    known = {key: value for key, value in raw.items() if key in usual} if isinstance(raw, dict) else {}
    wrong = [key for key, value in known.items() if not isinstance(value, type(usual[key]))]
    if not known or wrong:
        raise CheckpointError(
            f"{folder / MANIFEST} is no manifest of minivlm{': see ' * bool(wrong)}{', '.join(wrong)}"
        )
    if known.get("format", 0) > FORMAT:
        raise CheckpointError(f"{folder} was written by a newer minivlm ({raw.get('minivlm')}); update this one")
    return Manifest(**known)


def read_config(folder: Path) -> dict[str, Any]:
    """Section ``model`` of a model folder as plain values.

    Raises :class:`ConfigError` for what is no YAML, :class:`CheckpointError` if a part is not described.
    """
    file = folder / "config.yaml"
    container = read_yaml(file).values
    lost = [part for part in PARTS if not isinstance(container.get(part), dict)]
    if lost:
        raise CheckpointError(f"{file} does not describe {', '.join(lost)}")
    return container


def load_weights(model: VisionLanguageModel, folder: Path) -> LoadReport:
    """Fill a model from a model folder; base weights must already be in place.

    Raises :class:`CheckpointError` with the report when a tensor is left over, has another shape, or is
    missing although no base provides it.
    """
    manifest = read_manifest(folder)
    tensors = read_weights("model.checkpoint", str(folder / WEIGHTS)).tensors
    state = {file_name(name): tensor for name, tensor in tensors.items()}
    adapted = {name.split(".")[0] for name in state if is_adapter(name)}
    # New adapters start from a checkpoint without any.
    own = {name: t for name, t in model.state_dict().items() if not is_adapter(name) or name.split(".")[0] in adapted}
    ties = {own[key].data_ptr() for key in state if key in own}
    from_base = {
        f"{part}.{name}"
        for part in PARTS
        for module in [getattr(model, part)]
        if part not in manifest.complete and module.source
        for name in module.state_dict()
        if name not in module.unsourced and not is_adapter(name)
    }
    wanted = {k: t for k, t in own.items() if k in state or (t.data_ptr() not in ties and k not in from_base)}
    report = LoadReport.compare(wanted, state, model.fits)
    _check_sources(model, manifest, folder)
    if not report.fits:
        lost = sorted({f"model.{name.split('.')[0]}.lora" for name in report.unexpected if is_adapter(name)})
        hint = f" with LoRA: set {' and '.join(lost)} as there, or fold it in with `minivlm merge`" if lost else ""
        if bool(model.vision_encoder.inputs) != (read_config(folder)["vision_encoder"].get("name") != NO_VISION):
            hint = f" (only one of the two sees); its language model alone is model.language_model.weights: {folder}"
        raise CheckpointError(f"{folder} is a checkpoint of another model{hint}:\n{report}")
    _check_alpha(model, folder, adapted)
    fill(model, state, str(folder))
    return report


def _check_alpha(model: VisionLanguageModel, folder: Path, adapted: Iterable[str]) -> None:
    """Refuse adapters that were trained at another scale, which no shape tells."""
    config = read_config(folder)
    for part in sorted(adapted):
        reason = other_alpha(getattr(model, part).lora, (config[part].get("lora") or {}).get("alpha"))
        if reason:
            raise CheckpointError(f"model.{part}.lora.alpha: {reason}; take that of {folder}, or leave out lora")


def _check_sources(model: VisionLanguageModel, manifest: Manifest, folder: Path) -> None:
    for part, source in manifest.sources.items():
        if part in manifest.complete or not source:
            continue
        own = getattr(model, part).source
        if own is None:
            raise CheckpointError(
                f"{folder} holds only what was trained of {part}, and this model has no base for it: name the base "
                f"under model.{part} (path, weights or pretrained); it was {_files(source)}"
            )
        (kind, _, wanted), (own_kind, _, found) = (s.get("sha256", "").rpartition(":") for s in (source, own))
        if wanted and found and kind == own_kind and wanted != found:
            raise CheckpointError(
                f"{folder} was trained on other weights of {part} than those in {_files(own)}: "
                f"hash {wanted[:12]} against {found[:12]}; give those that it was trained on, {_files(source)}"
            )
        if bool(wanted) != bool(found) and _files(source) != _files(own):  # of a hub id there is no hash
            log.warning(
                "%s was trained on %s of %s, and now stands on %s; whether they are the same has not been checked",
                *(folder, _files(source), part, _files(own)),
            )


def _files(source: dict[str, str]) -> str:
    return " and ".join(source[key] for key in ("path", "also") if key in source) or ", ".join(source.values())
