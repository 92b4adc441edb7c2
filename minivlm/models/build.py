"""From the ``model`` section of a configuration to a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from minivlm import registry
from minivlm.models.base import ModelError
from minivlm.models.tuning import apply_freeze
from minivlm.models.vlm import PARTS, VisionLanguageModel


def build_model(config: Any, vocab_size: int, *, meta: bool = False) -> VisionLanguageModel:
    """Build the parts of a :class:`ModelConfig` in order and pass them in.

    ``vocab_size`` is used by a language model that is trained from scratch. With ``meta`` nothing is loaded or
    allocated: only shapes and counts are right.
    """
    with torch.device("meta" if meta else "cpu"):
        encoder = _build("vision_encoder", config.vision_encoder)
        language_model = _build("language_model", config.language_model, vocab_size)
        connector = _build("connector", config.connector, encoder, language_model.hidden_size)
    model = VisionLanguageModel(encoder, connector, language_model)
    for name in PARTS:
        part = getattr(config, name)
        if part.weights and not meta:
            load_weights(name, getattr(model, name), part.weights)
            getattr(model, name).source = None  # the base alone would not give these weights again
        apply_freeze(name, getattr(model, name), part.freeze)
    return model


def _build(kind: str, part: Any, *arguments: Any) -> Any:
    try:
        return registry.get(kind, part.name)(part.config, *arguments)
    except (ModelError, registry.RegistryError):
        raise
    except Exception as error:
        raise ModelError(f"model.{kind} ({part.name}) cannot be built: {type(error).__name__}: {error}") from error


def load_weights(part: str, module: nn.Module, path: str) -> None:
    """Fill a part from a .safetensors or .pth file, all of it or none."""
    import pickle

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.endswith(".safetensors"):
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ModelError(f"model.{part}.weights: there is no file {path}") from error
    except (OSError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise ModelError(f"model.{part}.weights: {path} cannot be read: {error}") from error
    if not (isinstance(state, dict) and all(isinstance(tensor, torch.Tensor) for tensor in state.values())):
        raise ModelError(f"model.{part}.weights: {path} holds no plain mapping from names to tensors")
    report = LoadReport.compare(module.state_dict(), state)
    if not report.complete or report.unexpected:
        raise ModelError(f"model.{part}.weights: {path} does not belong to this part\n{report}")
    module.load_state_dict(state)


class LoadReport:
    """What a file holds against what a model wants."""

    def __init__(self, matched: list[str], missing: list[str], unexpected: list[str], wrong_shape: list[str]):
        self.matched, self.missing, self.unexpected, self.wrong_shape = matched, missing, unexpected, wrong_shape

    @classmethod
    def compare(cls, wanted: Mapping[str, Any], given: Mapping[str, Any]) -> LoadReport:
        """Compare two state dicts by name and shape."""
        both = [key for key in wanted if key in given]
        wrong = [
            f"{key} is {tuple(given[key].shape)}, wanted {tuple(wanted[key].shape)}"
            for key in both
            if given[key].shape != wanted[key].shape
        ]
        return cls(
            [key for key in both if given[key].shape == wanted[key].shape],
            [key for key in wanted if key not in given],
            [key for key in given if key not in wanted],
            wrong,
        )

    @property
    def complete(self) -> bool:
        """Whether every wanted tensor is there in its shape."""
        return not self.missing and not self.wrong_shape

    def __str__(self) -> str:
        lines = [f"  matched      {len(self.matched)}"]
        for label, keys in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("wrong shape", self.wrong_shape),
        ):
            shown = "; ".join(keys[:5]) + ("; ..." if len(keys) > 5 else "")
            lines.append(f"  {label:<12} {len(keys)}" + (f"  ({shown})" if keys else ""))
        return "\n".join(lines)
