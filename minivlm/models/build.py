"""From the ``model`` section of a configuration to a model."""

from __future__ import annotations

from typing import Any

import torch

from minivlm import registry
from minivlm.models.base import ModelError
from minivlm.models.hub import source_of
from minivlm.models.tuning import apply_freeze
from minivlm.models.vlm import PARTS, VisionLanguageModel


def build_model(
    config: Any, vocab_size: int, *, meta: bool = False, features_only: bool = False
) -> VisionLanguageModel:
    """Build the parts of a :class:`ModelConfig` in order and pass them in; ``weights:`` are loaded afterwards.

    ``vocab_size`` is used by a language model that is trained from scratch. With ``meta`` nothing is loaded or
    allocated: only shapes and counts are right. With ``features_only`` that holds for the language model, if its
    weights come from a folder: enough to encode pictures.
    """
    device = torch.device("meta" if meta else "cpu")
    empty = features_only and _has_folder(config.language_model)
    with device:
        encoder = _build("vision_encoder", config.vision_encoder)
    with torch.device("meta") if empty else device:
        language_model = _build("language_model", config.language_model, vocab_size)
    if empty:
        settings = config.language_model.config  # a checkpoint asks for the base
        language_model.source = source_of(settings.path, getattr(settings, "revision", None))
    with device:
        connector = _build("connector", config.connector, encoder, language_model.hidden_size)
    model = VisionLanguageModel(encoder, connector, language_model)
    for name in PARTS:
        part = getattr(config, name)
        apply_freeze(name, getattr(model, name), part.freeze)
    return model


def _has_folder(part: Any) -> bool:
    """Whether a folder gives all weights; else numbers are drawn, on which those of the connector depend."""
    settings = part.config
    return bool(getattr(settings, "path", None)) and not getattr(settings, "lora", None) and not part.weights


def _build(kind: str, part: Any, *arguments: Any) -> Any:
    try:
        return registry.get(kind, part.name)(part.config, *arguments)
    except (ModelError, registry.RegistryError):
        raise
    except Exception as error:
        raise ModelError(f"model.{kind} ({part.name}) cannot be built: {type(error).__name__}: {error}") from error
