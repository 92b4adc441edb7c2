"""What a file of weights or a folder holds, and which key takes it. Nothing in it is executed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from minivlm.checkpoints.files import WeightFile, folder_files, is_llava_folder, read_json, read_weights
from minivlm.checkpoints.foreign import Row, measure, translate
from minivlm.checkpoints.llava_folder import describe
from minivlm.checkpoints.loading import identify, what_else
from minivlm.checkpoints.native import WEIGHTS, find_model_folder, read_config, read_manifest
from minivlm.config.experiment import NO_VISION
from minivlm.io import readable_size
from minivlm.models.hub import weight_files
from minivlm.models.vlm import PARTS

_KEY = "inspect"
_SETTINGS: tuple[str, ...] = (
    *("arch", "model_type", "image_size", "num_query_token", "has_qformer", "freeze_vit", "freeze_qformer"),
    *("llama_model", "lora_r", "lora_alpha", "prompt_template", "end_sym", "max_txt_len", "low_resource"),
)
_RUN_SETTINGS = ("task", "init_lr", "min_lr", "max_epoch", "iters_per_epoch", "warmup_steps")
_VOCABULARIES = {
    32000: "LLaMA, Vicuna v1.1 or v1.5, Llama-2",
    32001: "Vicuna v0, to which published MiniGPT-4 files with a Q-Former belong",
}
_SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("image_size", "patch_size"),
)
_VISION = ("clip", "siglip", "dinov2", "vit", "eva", "convnext", "swin", "beit", "deit")


def inspect_path(path: str) -> list[Row]:
    """Rows ``(label, text)`` about a file or folder.

    Raises :class:`CheckpointError` for what does not exist, cannot be read, or is neither.
    """
    folder = Path(path)
    if not folder.is_dir():
        return _file(path)
    if is_llava_folder(folder) and folder_files(folder):
        return _llava_folder(folder)
    if (folder / "adapter_config.json").is_file():
        adapter = read_json(_KEY, folder / "adapter_config.json")
        rank, targets = adapter.get("r"), adapter.get("target_modules")
        rows = [("holds", "LoRA adapters of peft, which are not read on their own"), ("rank", str(rank))]
        return [*rows, ("on", _words(targets)), ("base", str(adapter.get("base_model_name_or_path")))]
    if (folder / "config.json").is_file():
        return _hugging_face(folder)
    if any(folder.glob("open_clip_*")):
        return _open_clip(folder)
    return _model_folder(find_model_folder(folder))


def render(path: str, rows: Iterable[Row]) -> str:
    """The rows as text, under the path."""
    return "\n".join([path, *(f"  {label:<28} {text}" for label, text in rows)])


def _file(path: str) -> list[Row]:
    file = read_weights(_KEY, path, shapes_only=True)
    form = identify(_KEY, file)
    kind = "safetensors" if not file.extra and file.local.suffix == ".safetensors" else "torch"
    beside = f", beside: {', '.join(map(str, file.extra))}" if file.extra else ""
    rows = [("format", f"{kind}, {readable_size(file.local.stat().st_size)}{beside}")]
    if form is None:
        rows += [("holds", what_else(file.tensors)), ("names begin with", _beginnings(file.tensors))]
        rows.append(("good for", "model.<part>.weights, if it holds every tensor of that part by its own name"))
        return rows + _contents(file)
    rows += [("holds", f"{form.name}, {'a base' if form.base else 'a checkpoint: what was trained'}")]
    rows += [("good for", form.key), *form.describe(file)]
    given = translate(form, file.tensors)
    sizes = [(s.what, f"{n} ({s.key})") for s in form.sizes if (n := measure(s, given.tensors)) is not None]
    rows += dict.fromkeys(sizes)  # of a head that is the embeddings there are two
    rows += _contents(file)
    rows += [("ignored", f"{len(names)} {reason}") for reason, names in given.ignored.items()]
    return rows + _training(file)


def _contents(file: WeightFile) -> list[Row]:
    numbers = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in file.tensors.values())
    kinds = ", ".join(f"{count} {kind}" for kind, count in numbers.most_common())
    total = sum(tensor.numel() for tensor in file.tensors.values())
    return [("tensors", f"{len(file.tensors)} ({kinds}), {total:,} numbers")]


def _training(file: WeightFile) -> list[Row]:
    """Where the training stood, and what the configuration beside the weights says."""
    rows = [(key, str(file.extra[key])) for key in ("epoch", "iters") if isinstance(file.extra.get(key), int)]
    config = file.extra.get("config")
    for section, wanted in (("model", _SETTINGS), ("run", _RUN_SETTINGS)):
        node = _mapping(_mapping(config).get(section))
        found = [f"{key} {node[key]}" for key in wanted if node.get(key) not in (None, "")]
        rows += [(f"its config, {section}", ", ".join(found))] if found else []
    return rows


def _model_folder(folder: Path) -> list[Row]:
    manifest, config = read_manifest(folder), read_config(folder)
    rows = [("format", f"model folder of minivlm {manifest.minivlm}: {folder}"), ("good for", "model.checkpoint")]
    for part, source in manifest.sources.items():
        name = _mapping(config.get(part)).get("name")
        if name == NO_VISION:
            rows.append((part, "none: a language model alone"))
            continue
        whole = "all of it is here" if part in manifest.complete else ""
        base = f"base {source.get('path', '')} {source.get('also', '')}".rstrip() if source else ""
        rows.append((part, f"{name}: {whole or base or 'partly here'}"))
    rows.append(("template", _template(config.get("template"))))
    rows.append(("trained", f"{len(manifest.trained)} tensors, {manifest.step} steps {manifest.stage}".rstrip()))
    rows += [("metrics", ", ".join(f"{k} {v:.4g}" for k, v in manifest.metrics.items()))] if manifest.metrics else []
    rows += [("needs", ", ".join(manifest.imports))] if manifest.imports else []
    return rows + _contents(read_weights(_KEY, str(folder / WEIGHTS), shapes_only=True))


def _llava_folder(folder: Path) -> list[Row]:
    """A whole model, adapters, or a projector; which, its files tell."""
    section = describe(folder, find=False)
    file = read_weights(_KEY, str(folder), shapes_only=True)
    form = identify(_KEY, file)
    assert form  # or it could not be described
    files = folder_files(folder)
    rows = [("format", f"folder of LLaVA's kind, {len(files)} files, {readable_size(_size(files))}")]
    rows += [("holds", form.name), ("good for", "model.checkpoint")]
    rows += form.describe(file)
    for part in PARTS:
        node = section[part]
        rows += _part(part, node)
        if part == "language_model" and not (node.get("weights") or node.get("path")):
            rows.append(("to be named", f"model.{part}.path, on which it was trained"))
    language = section["language_model"]
    if language.get("weights") and not language.get("tokenizer"):
        rows.append(("to be named", "model.language_model.tokenizer, which is not in the folder"))
    rows.append(("template", _template(section["template"])))
    return rows + _contents(file)


def _part(name: str, node: Mapping[str, Any]) -> list[Row]:
    """What a part is, and each part inside it; a folder that is not there has a row of its own."""
    known = {**node, **_mapping(node.get("config"))}
    keys = (*_SIZES, "vocab_size", "depths", "widths", "grid", "global_view")
    sizes = [f"{key} {known[key]}" for key in keys if known.get(key)]
    what = known.get("model_type") or node.get("path") or f"{node['name']} {node.get('depth', '')}"
    rows = [(name, ", ".join([str(what).strip(), *sizes]))]
    path = node.get("path")
    if path and not Path(path).is_dir():
        rows.append(("not a folder here", f"{path}: a hub id, or to be named as model.{name}.path"))
    for key, inner in node.items():
        if isinstance(inner, dict) and "name" in inner:
            rows += _part(f"{name}.{key}", inner)
    return rows


def _template(node: Any) -> str:
    """Its name, whatever settings it has beside."""
    return str(node.get("name") if isinstance(node, dict) else node)


def _size(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _open_clip(folder: Path) -> list[Row]:
    files = sorted(folder.glob("open_clip_*model.*"))
    if not files:
        return [("format", "folder of OpenCLIP"), ("files", "no weights (open_clip_pytorch_model.bin)")]
    rows = [row for row in _file(str(files[0])) if row[0] != "good for"]
    key = "model.vision_encoder.path (name: convnext_multiscale), or model.vision_encoder.high.path of dual"
    return [("format", f"folder of OpenCLIP, {files[0].name}"), ("good for", key), *rows[1:]]


def _hugging_face(folder: Path) -> list[Row]:
    config = read_json(_KEY, folder / "config.json")
    kind = str(config.get("model_type"))
    text = {**config, **_mapping(config.get("text_config"))}
    is_vision = kind.startswith(_VISION)
    names = _words(config.get("architectures")) or "no architecture"
    rows = [("format", "folder of Hugging Face"), ("holds", f"model_type {kind}, {names}")]
    part = "vision_encoder" if is_vision else "language_model"
    rows.append(("good for", f"model.{part}.path (name: hf)"))
    source = {**config, **_mapping(config.get("vision_config"))} if is_vision else text
    rows += [(label, str(source[label])) for label in _SIZES if source.get(label) is not None]
    if config.get("quantization_config"):
        rows.append(("quantisation", str(_mapping(config["quantization_config"]).get("quant_method"))))
    files = weight_files(folder)
    tensors: dict[str, Any] = {}
    for file in files:
        tensors |= read_weights(_KEY, str(file), shapes_only=True).tensors
    if tensors:
        rows.append(("files", f"{len(files)}, {readable_size(_size(files))}"))
        rows += _contents(WeightFile(str(folder), folder, tensors))
    else:
        rows.append(("files", "no weights (*.safetensors or pytorch_model*.bin)"))
    return rows if is_vision else rows + _vocabulary(folder, text, tensors)


def _vocabulary(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> list[Row]:
    ends = ("embed_tokens.weight", "wte.weight")
    embeddings = [t for name, t in tensors.items() if name.endswith(ends) and t.dim()]
    rows = embeddings[0].shape[0] if embeddings else config.get("vocab_size")
    found = _VOCABULARIES.get(rows) if isinstance(rows, int) else None
    given: list[Row] = [("embeddings", f"{rows}" + (f": {found}" if found else ""))] if rows else []
    if embeddings and config.get("vocab_size") not in (None, rows):
        given.append(("vocab_size", f"{config['vocab_size']} in config.json, but {rows} embeddings"))
    kinds = [name for name in ("tokenizer.json", "tokenizer.model", "vocab.json") if (folder / name).is_file()]
    settings = folder / "tokenizer_config.json"
    name = read_json(_KEY, settings).get("tokenizer_class", "") if settings.is_file() else ""
    return [*given, ("tokenizer", f"{name} ({', '.join(kinds)})".strip() if kinds else "none in this folder")]


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _words(value: Any) -> str:
    """A list of names, or the one name that stands in its place (``target_modules: all-linear``)."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")


def _beginnings(names: Iterable[str]) -> str:
    counts = Counter(name.split(".")[0] for name in names)
    listed = ", ".join(f"{name} ({count})" for name, count in counts.most_common(6))
    return listed + (", ..." if len(counts) > 6 else "")
