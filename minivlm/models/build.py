"""From the ``model`` section of a configuration to a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from minivlm import registry
from minivlm.models.base import ModelError
from minivlm.models.hub import load_hf_config, source_of
from minivlm.models.lora import add_lora
from minivlm.models.tuning import apply_freeze
from minivlm.models.vlm import PARTS, VisionLanguageModel


def build_model(
    config: Any,
    vocab_size: int,
    *,
    meta: bool = False,
    features_only: bool = False,
    language_model_given: bool = False,
) -> VisionLanguageModel:
    """Build the parts of a :class:`ModelConfig` in order and pass them in; ``weights:`` are loaded afterwards.

    ``vocab_size`` is used by a language model that is trained from scratch. With ``meta`` nothing is loaded or
    allocated: only shapes and counts are right. With ``features_only`` that holds for the language model, if its
    weights come from a folder: enough to encode pictures. With ``language_model_given`` a checkpoint will fill all
    of it, so that no random numbers are drawn for it, which takes minutes for billions of them.
    """
    device = torch.device("meta" if meta else "cpu")
    empty = features_only and _has_folder(config.language_model)
    with device:
        encoder = build_part("vision_encoder", config.vision_encoder)
    with torch.device("meta") if empty else device:
        given = language_model_given or bool(config.language_model.weights)
        part = _unloaded(config.language_model) if given else config.language_model
        language_model = build_part("language_model", part, vocab_size, given=given)
    if empty:
        settings = config.language_model.config  # a checkpoint asks for the base
        language_model.source = source_of(settings.path, getattr(settings, "revision", None))
    with device:
        connector = build_part("connector", config.connector, encoder, language_model.hidden_size)
    model = VisionLanguageModel(encoder, connector, language_model)
    for name in PARTS:
        part = getattr(config, name)
        apply_freeze(name, getattr(model, name), part.freeze)
    return model


def _has_folder(part: Any) -> bool:
    """Whether a folder gives all weights; else numbers are drawn, on which those of the connector depend."""
    settings = part.config
    return bool(getattr(settings, "path", None)) and not part.lora and not part.weights


def _unloaded(part: Any) -> Any:
    """Of the path of a model that is quantised when something else has filled it, only the settings."""
    settings = part.config
    if not (getattr(settings, "quantization", None) and getattr(settings, "path", None)):
        return part
    hf = load_hf_config("model.language_model", settings.path, None, settings.revision)
    return replace(part, config=replace(settings, path=None, config=hf.to_diff_dict()))


def _without_drawing(make: Any, *arguments: Any) -> Any:
    """A part whose weights hold whatever lies in memory."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        module = make(*arguments)
    for child in module.children():
        if hasattr(child, "tie_weights"):  # which is left out as well
            child.tie_weights()
    return module


def build_part(kind: str, part: Any, *arguments: Any, given: bool = False) -> Any:
    """One part with its adapters; ``given`` says that something will fill all of its weights.

    Raises :class:`ModelError`.
    """
    try:
        make = registry.get(kind, part.name)
        module = _without_drawing(make, part.config, *arguments) if given else make(part.config, *arguments)
        if part.lora:
            add_lora(kind, module, part.lora)
        return module
    except (ModelError, registry.RegistryError):
        raise
    except Exception as error:
        raise ModelError(f"model.{kind} ({part.name}) cannot be built: {type(error).__name__}: {error}") from error


def build_inner(key: str, kind: str, part: Any, *arguments: Any) -> Any:
    """A part inside another one, named by ``key``; its parameters train, and have adapters, as the outer one says.

    Raises :class:`ModelError`.
    """
    outer, _, name = key.rpartition(".")
    for setting in ("freeze", "init_lr", "weights", "lora"):
        if getattr(part, setting, None) is not None:
            raise ModelError(f"{key}.{setting}: give it as {outer}.{setting}; names of parameters begin with `{name}.`")
    try:
        return build_part(kind, part, *arguments)
    except ModelError as error:
        raise ModelError(str(error).replace(f"model.{kind}", key)) from error
