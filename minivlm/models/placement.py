"""Where a model lies: on one device, or the layers of its language model on several, by accelerate's hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from minivlm.models.base import ModelError
from minivlm.models.vlm import VisionLanguageModel

_KEY = "model.language_model.device_map"
DeviceMap = dict[str, Any]


def place(model: VisionLanguageModel, device: torch.device) -> VisionLanguageModel:
    """Move a model to ``device``, or the layers of its language model to where its ``device_map`` says.

    Encoder and connector then go to the first GPU of the map, where inputs belong and outputs come back; layers on
    ``cpu`` beside GPUs are computed there, too. Raises :class:`ModelError` for a map that cannot be followed.
    """
    language_model: Any = model.language_model
    wanted = language_model.device_map
    if wanted is None:
        return model.to(device)
    from accelerate import dispatch_model

    inner, visual = language_model.model, (model.vision_encoder, model.connector)
    if isinstance(wanted, str):
        wanted = plan_layers(inner, wanted, _free_memory(wanted, device), sum(map(_size, visual)))
    first = _first(wanted)
    _check_complete(inner, wanted)
    try:
        dispatch_model(inner, wanted, main_device=first, force_hooks=True)
        for part in visual:
            part.to(first)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ModelError(f"{_KEY} cannot be followed: {str(error).splitlines()[0]}") from error
    language_model.main_device = torch.device(first)
    return model


def plan_layers(model: nn.Module, kind: str, memory: dict[int, int], reserved: int) -> DeviceMap:
    """Devices by module, whole layers together; ``memory`` says how many bytes each GPU has.

    ``reserved`` bytes of the first are for the encoder and what else is there. Raises :class:`ModelError` if the
    layers do not fit.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole: Any = list(getattr(model, "_no_split_modules", None) or ())
    left = {number: size - (reserved if number == min(memory) else 0) for number, size in memory.items()}
    if kind != "sequential":
        left = get_balanced_memory(model, left, no_split_module_classes=whole)
    found = infer_auto_device_map(model, left, no_split_module_classes=whole)
    if set(found.values()) & {"cpu", "disk"}:
        raise ModelError(
            f"{_KEY}: {_size(model) / 2**30:.1f} GiB of layers do not fit into {len(memory)} GPUs with "
            f"{sum(left.values()) / 2**30:.1f} GiB free; quantise them (--load-4bit), or write a map with some on cpu"
        )
    return dict(found)


def _free_memory(kind: str, device: torch.device) -> dict[int, int]:
    """Bytes that each GPU has free."""
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if count < 2:
        here = f"the device is {device}" if device.type != "cuda" else "there is one GPU"
        raise ModelError(
            f"{_KEY}: {kind} spreads the layers over several GPUs, but {here}; leave it out, or write a map that says "
            'which layers stay on cpu: {"model.embed_tokens": 0, ...}'
        )
    return {number: int(0.9 * torch.cuda.mem_get_info(number)[0]) for number in range(count)}


def _first(wanted: DeviceMap) -> Any:
    """The first device of a map that computes."""
    if not wanted or "disk" in wanted.values():
        raise ModelError(f"{_KEY}: every module goes to a GPU or to cpu, got {wanted}")
    found = next((device for device in wanted.values() if str(device) != "cpu"), "cpu")
    return torch.device("cuda", found) if isinstance(found, int) else found


def _check_complete(model: nn.Module, wanted: DeviceMap) -> None:
    names = [name for name, _ in model.named_modules()]
    if unknown := [key for key in wanted if key not in names]:
        raise ModelError(f"{_KEY}: the language model has no {', '.join(unknown)}; it has {', '.join(_upper(names))}")
    covered = tuple(f"{key}." for key in wanted if key)
    left = [name for name, _ in model.named_parameters() if not name.startswith(covered)]
    if left and "" not in wanted:
        raise ModelError(f"{_KEY}: it does not say where {left[0]} is to be ({len(left)} parameters are left out)")


def _upper(names: list[str]) -> list[str]:
    """The modules of which maps are written; layers have a number behind these."""
    return [name for name in names if name and name.count(".") < 2]


def _size(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
