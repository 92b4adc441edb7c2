"""The public API: from a configuration file or a checkpoint folder to a model and its processor."""

from __future__ import annotations

import dataclasses
import os
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from minivlm import registry
from minivlm.checkpoints.files import is_llava_folder
from minivlm.checkpoints.llava_folder import describe, describe_language_model
from minivlm.checkpoints.loading import check_files, check_weights, load_checkpoint, load_parts, names_files
from minivlm.checkpoints.native import CheckpointError, find_model_folder, read_config, read_manifest
from minivlm.checkpoints.parts import check_tokenizer, model_folder
from minivlm.config import ConfigError, ModelConfig, load_config
from minivlm.config.experiment import one_alone
from minivlm.config.loader import list_model_defaults, parse_model
from minivlm.config.options import parse_options
from minivlm.models.base import DTYPES, ModelError
from minivlm.models.build import build_model
from minivlm.models.placement import place
from minivlm.models.quantization import quantise
from minivlm.models.vlm import PARTS, VisionLanguageModel
from minivlm.paths import is_placeholder, is_weight_file
from minivlm.processors.configs import ImageConfig, ProcessorConfig
from minivlm.processors.processor import VLMProcessor
from minivlm.processors.template import Template
from minivlm.processors.tokenizer import load_tokenizer
from minivlm.schema import ModelPart, Part, forget_local

Module = TypeVar("Module", bound=torch.nn.Module)
DEFAULT_PROCESSOR = Part("vlm", ProcessorConfig(image=Part("image", ImageConfig())))


def load(
    source: str | Path,
    *,
    device: str = "auto",
    dtype: str | torch.dtype | None = None,
    options: Sequence[str] = (),
    stage: str | None = None,
) -> tuple[VisionLanguageModel, VLMProcessor]:
    """Load a model in eval mode and its processor.

    ``source`` is a YAML file (``options`` as for ``--options``; of several stages the last, or ``stage``) or
    a folder that minivlm wrote: a model, a checkpoint, or a run. ``dtype`` (fp32, bf16 or fp16) changes how the
    weights are stored; by default every part keeps the type that the file or its own settings say (on a CPU fp16
    is slow, bf16 is not).
    Raises ConfigError, ModelError or CheckpointError, which say what to do.
    """
    path = Path(source)
    if path.is_dir():
        config = ModelConfig(checkpoint=str(path))
    else:
        experiment = load_config(path, options)
        config = (experiment.stage(stage) if stage else experiment.stages[-1]).model
    model, processor, _ = assemble(config)
    if dtype is not None:
        cast(model, DTYPES[dtype] if isinstance(dtype, str) else dtype)
    return place(model, resolve_device(device)).eval(), processor


def cast(model: Module, dtype: torch.dtype) -> Module:
    """Store the weights in ``dtype``; tables that are computed, such as rotary frequencies, keep theirs."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_floating_point() and name not in module._non_persistent_buffers_set:
                    tensor.data = tensor.data.to(dtype)
    return model


def load_model_and_preprocess(
    name: str, model_type: str, is_eval: bool = True, device: str = "cpu", options: Sequence[str] = ()
) -> tuple[VisionLanguageModel, dict[str, Callable[..., Any]], dict[str, Callable[..., Any]]]:
    """LAVIS's form: the model of packaged defaults, and its picture and text processors by ``train``/``eval``.

    ``options`` are laid over the defaults, as ``model.language_model.path=...`` and ``model.checkpoint=x.pth``.
    A picture processor takes a PIL image and returns [3, H, W]; a text processor returns the text, cleaned where
    the model's `processor.text` says so. Raises :class:`ConfigError` for an unknown model, and where a file of
    weights must be named (MiniGPT-4: by options or environment variables).
    """
    model, processor, _ = assemble(registry_model(name, model_type, options))
    place(model, resolve_device(device)).train(not is_eval)
    name_of_input = next(iter(processor.transforms))

    def vis_processor(image: Any) -> torch.Tensor:
        return processor.load_pixels(image)[name_of_input]

    def vis_processor_train(image: Any) -> torch.Tensor:
        return processor.load_pixels(image, seed=str(random.random()))[name_of_input]

    text = processor.config.text
    text_processor = registry.get("processor", text.name)(text.config) if text else str
    return (
        model,
        {"train": vis_processor_train, "eval": vis_processor},
        {"train": text_processor, "eval": text_processor},
    )


def registry_model(name: str, model_type: str, options: Sequence[str] = ()) -> ModelConfig:
    """The packaged defaults of ``arch`` and ``model_type`` as a typed section ``model``, options laid over it."""
    given, problems = parse_options(options)
    problems += [
        given.problem((key,), "only keys of `model` can be given here") for key in given.values if key != "model"
    ]
    if problems:
        raise ConfigError(problems)
    section = dict(given.values.get("model", {}))
    checkpoint = section.pop("checkpoint", None)  # a section with one need not be complete, this one must be
    config = parse_model(section | {"arch": name, "model_type": model_type}, f"model {name}/{model_type}")
    config.checkpoint = checkpoint
    return config


class ModelZoo:
    """The packaged defaults; printing gives LAVIS's table, iterating ``(arch, model_types)``."""

    def __init__(self) -> None:
        self._types: dict[str, list[str]] = {}
        for arch, model_type in list_model_defaults():
            self._types.setdefault(arch, []).append(model_type)

    def __iter__(self) -> Any:
        return iter(self._types.items())

    def __len__(self) -> int:
        return sum(len(types) for types in self._types.values())

    def __str__(self) -> str:
        rows = [("Architectures", "Types"), *((arch, ", ".join(types)) for arch, types in self)]
        return "\n".join(f"{arch:<24}{types}" for arch, types in rows)


def model_zoo() -> ModelZoo:
    """What :func:`load_model_and_preprocess` can load."""
    return ModelZoo()


def assemble(
    config: ModelConfig, *, meta: bool = False, features_only: bool = False, frozen: bool = False
) -> tuple[VisionLanguageModel, VLMProcessor, ModelConfig]:
    """Model, processor and the complete ``model`` section; a checkpoint fills what the section leaves open.

    Files under ``weights:`` are loaded before the checkpoint; the main process prints a report of each, which
    ``model.load_reports`` keeps. Files that do not fit are refused before anything large is read. With ``meta``
    the model holds no weights (for counting and dry runs), and nothing is fetched; with ``features_only`` its
    language model may have none (to fill a feature cache). With ``frozen`` nothing trains, whatever the section says,
    so that weights in half precision stay so.
    """
    folder, note = None, None
    if config.checkpoint and is_llava_folder(Path(config.checkpoint)):
        own = [part for part in PARTS if (node := getattr(config, part)) and _names_base(node)]
        described = parse_model(describe(Path(config.checkpoint), own), config.checkpoint)
        note = _not_taken(config, described) or _another_template(config, described)
        config.checkpoint = described.checkpoint
        config = _fill(config, described)
    elif config.checkpoint and not is_weight_file(config.checkpoint):
        folder = find_model_folder(config.checkpoint)
        config = _with_checkpoint(config, folder)
    if not all(getattr(config, part) for part in (*PARTS, "template")):
        raise CheckpointError(
            f"model.checkpoint: {config.checkpoint} does not say which parts it belongs to; "
            "give model.arch and model.model_type, or the parts"
        )
    assert config.vision_encoder and config.connector and config.language_model and config.template
    wrong = one_alone(config.vision_encoder.name, config.connector.name)
    if wrong:
        raise ModelError(f"model: {wrong}")
    if frozen:
        _freeze_all(config)
    _expand_base(config.language_model)
    check_files(config)
    language = config.language_model.config
    sources = [source for source in (config.checkpoint, config.language_model.weights) if source]
    weights = model_folder(config.language_model.weights or "")
    _take_tokenizer(config.language_model, str(weights / "tokenizer") if weights else None)
    tokenizer_path = getattr(language, "tokenizer", None) or getattr(language, "path", None)
    if not tokenizer_path:
        raise ModelError(
            "model.language_model.path: give the folder or hub id of the language model "
            "(a model from scratch, by `config`, needs `tokenizer` instead, and so does a checkpoint without one)"
        )
    tokenizer = load_tokenizer(
        tokenizer_path, getattr(language, "revision", None), getattr(language, "special_tokens", None)
    )
    for source in sources:
        check_tokenizer(tokenizer, tokenizer_path, source)
    if meta or names_files(config):
        model = _build(config, len(tokenizer), meta=True)
        check_weights(model, config, fetch=not meta)
    if not meta:
        given = "language_model" in read_manifest(folder).complete if folder else False
        model = _build(config, len(tokenizer), features_only=features_only, language_model_given=given)
        load_parts(model, config)
        if config.checkpoint:
            load_checkpoint(model, config, folder)
        quantise(model.language_model)
        if os.environ.get("RANK", "0") == "0":
            for line in (*(report.summary for report in model.load_reports), *([note] if note else [])):
                print(line, file=sys.stderr, flush=True)
    return model, build_processor(config, model, tokenizer), config


def _take_tokenizer(part: ModelPart, path: str | None) -> None:
    """Give a language model that names no tokenizer the one beside its weights."""
    if hasattr(part.config, "tokenizer") and not (part.config.tokenizer or getattr(part.config, "path", None)):
        part.config.tokenizer = path


def _freeze_all(config: ModelConfig) -> None:
    for name in PARTS:
        part = getattr(config, name)
        part.freeze = ["*"] if part.lora else True  # true would leave out the adapters


def assemble_shapes(config: ModelConfig) -> tuple[VisionLanguageModel, VLMProcessor, ModelConfig]:
    """:func:`assemble` on the meta device; a checkpoint that an earlier run has yet to write is not needed."""
    if lacks_checkpoint(config):
        print(f"note: there is no {config.checkpoint} yet; the parts are looked at without it", file=sys.stderr)
        config = dataclasses.replace(config, checkpoint=None)
    return assemble(config, meta=True)


def lacks_checkpoint(config: ModelConfig) -> bool:
    """Whether ``model.checkpoint`` is a folder that is not there, of a model whose parts are all named without it."""
    path = config.checkpoint
    absent = path is not None and not (is_weight_file(path) or is_placeholder(path) or Path(path).exists())
    return absent and all(getattr(config, part) for part in (*PARTS, "template"))


def _expand_base(part: ModelPart) -> None:
    """A language model in a layout that transformers does not read becomes its settings and ``weights``."""
    path = getattr(part.config, "path", None)
    found = describe_language_model(Path(path)) if path else None
    if found:
        part.config.path, part.weights = None, part.weights or found["weights"]
        for key in ("config", "dtype", "tokenizer", "special_tokens"):
            if getattr(part.config, key) is None:
                setattr(part.config, key, found.get(key))


def _build(config: ModelConfig, entries: int, **how: bool) -> VisionLanguageModel:
    """The model, which must embed all ``entries`` of its tokenizer."""
    model = build_model(config, entries, **how)
    if model.language_model.vocab_size < entries:
        raise ModelError(
            f"the tokenizer has {entries} entries, but the language model embeds only "
            f"{model.language_model.vocab_size}; set language_model.config.vocab_size or use its own tokenizer"
        )
    return model


def build_processor(config: ModelConfig, model: VisionLanguageModel, tokenizer: Any) -> VLMProcessor:
    """The processor of a model: template, tokenizer, one picture transform for every input of the encoder."""
    assert config.processor and config.template
    settings = config.processor.config
    transform = registry.get("processor", settings.image.name)
    inputs = model.vision_encoder.inputs
    processor = registry.get("processor", config.processor.name)(
        settings,
        Template(config.template.config),
        tokenizer,
        {name: transform(settings.image.config, encoder) for name, encoder in inputs.items()},
        model.connector.tokens_per_image,
    )
    if not inputs:
        processor.pictures = model.vision_encoder.pictures
    return processor


def _with_checkpoint(config: ModelConfig, folder: Path) -> ModelConfig:
    """Parts that the section does not name come from the checkpoint's own config, and so does its tokenizer."""
    container = read_config(folder)
    container["language_model"]["tokenizer"] = str(folder / "tokenizer")
    try:
        saved = parse_model(container, str(folder / "config.yaml"))
    except ConfigError as error:
        files = read_manifest(folder).imports
        if not files:
            raise
        hint = f"it was made with parts of {', '.join(files)}: name them under imports: or import them first"
        raise CheckpointError(f"{error}\n{hint}") from error
    forget_local(saved)
    return _fill(config, saved)


def _fill(config: ModelConfig, saved: ModelConfig) -> ModelConfig:
    """What a section leaves open of a model comes from what a checkpoint says of it."""
    # Saved picture settings belong to the saved encoder; a processor node of one's own is kept.
    says_nothing = config.processor in ({"name": "vlm"}, DEFAULT_PROCESSOR)
    if says_nothing:
        config.processor = (
            saved.processor if _is_open(config.vision_encoder, saved.vision_encoder) else DEFAULT_PROCESSOR
        )
    for part in PARTS:
        setattr(config, part, _fill_part(getattr(config, part), getattr(saved, part)))
    assert config.language_model and saved.language_model
    _take_tokenizer(config.language_model, getattr(saved.language_model.config, "tokenizer", None))
    if config.template is None:
        config.template = saved.template
    return config


_BASE = ("path", "config", "revision", "pretrained", "variant", "depths")
"""Settings that say where the weights of a part come from, or what it is built of."""


def _names_base(part: ModelPart) -> bool:
    return bool(part.weights) or _all_say(part, _BASE)


def _has_weights(part: ModelPart) -> bool:
    """Whether it says where its weights come from; ``config`` alone tells only what they belong to."""
    return bool(part.weights) or _all_say(part, ("path", "pretrained"))


def _all_say(part: Part, keys: Sequence[str]) -> bool:
    """Whether a part has one of the settings, or every part that it consists of."""
    inner = _inner(part)
    if inner:
        return all(_all_say(each, keys) for each in inner.values())
    return any(getattr(part.config, key, None) for key in keys)


def _inner(part: Part) -> dict[str, Part]:
    """The parts inside a part, as the two encoders of ``dual``."""
    values = vars(part.config) if dataclasses.is_dataclass(part.config) else {}
    return {name: value for name, value in values.items() if isinstance(value, Part)}


def _not_taken(config: ModelConfig, described: ModelConfig) -> str | None:
    """What a whole model holds in vain, as the section has other weights for those parts."""
    held = {part for part in PARTS if getattr(described, part).weights}
    vain = [part for part in PARTS if part in held and (own := getattr(config, part)) and _has_weights(own)]
    if not vain:
        return None
    keys = ", ".join(f"model.{part}" for part in vain)
    return f"NOTE: of {config.checkpoint} {' and '.join(vain)} is not taken, since {keys} names other weights"


def _another_template(config: ModelConfig, described: ModelConfig) -> str | None:
    """Of Mini-Gemini the language model tells the template; a preset of another size would have another one."""
    given, wanted, is_whole = config.template, described.template, described.checkpoint is None
    assert described.vision_encoder and wanted
    if not given or not is_whole or described.vision_encoder.name != "dual":
        return None
    if dataclasses.replace(given.config, chat={}) == dataclasses.replace(wanted.config, chat={}):
        return None
    return f"NOTE: model.template is {given.name}, but such a model as {config.checkpoint} answers in {wanted.name}"


def _is_open(given: Part | None, saved: Part | None) -> bool:
    """Whether a node leaves to the checkpoint what the part is built of."""
    if given is None or saved is None:
        return True
    if given.name != saved.name:
        return False
    inner = _inner(given)
    if inner:
        return all(_is_open(each, getattr(saved.config, name)) for name, each in inner.items())
    return hasattr(given.config, "path") and not _all_say(given, _BASE)


def _fill_part(given: ModelPart | None, saved: ModelPart) -> ModelPart:
    """A node with what a saved one of the same kind says of its base, if it names none, and with its adapters.

    What trains is the node's own matter.
    """
    if given is None:
        return saved
    if given.name != saved.name:
        return given
    given.lora = given.lora or saved.lora
    given.weights = given.weights if _has_weights(given) else saved.weights
    _fill_settings(given, saved)
    return given


def _fill_settings(given: Part, saved: Part) -> None:
    """What is left out means as in the checkpoint, if that says what the part is built of."""
    is_open = _is_open(given, saved)
    for name, inner in _inner(given).items():
        if inner.name == getattr(saved.config, name).name:
            _fill_settings(inner, getattr(saved.config, name))
    if is_open:
        for item in dataclasses.fields(given.config):
            if getattr(given.config, item.name) == item.default:
                setattr(given.config, item.name, getattr(saved.config, item.name))


def resolve_device(device: str) -> torch.device:
    """``auto`` is the best that is there: CUDA, MPS, CPU."""
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")
