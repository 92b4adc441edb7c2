"""Low-rank adapters in the linear layers of any part: LoRA (Hu et al. 2021), QLoRA (Dettmers et al. 2023).

Layers are found by their full path inside the part, so no other part is ever touched. In state dicts, and so in
all files, a layer with an adapter has the names that it has without one, and ``lora_A`` and ``lora_B`` beside them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.models.base import ModelError, PartModule
from minivlm.models.quantization import hush_bitsandbytes
from minivlm.schema import LoraSettings

ALL_LINEAR = "all-linear"
_BASE = "base_layer."
_ADAPTER = re.compile(r"\.lora_[AB]\.")


def is_adapter(name: str) -> bool:
    """Whether a tensor of this name belongs to an adapter."""
    return _ADAPTER.search(name) is not None


def file_name(name: str) -> str:
    """What a state dict calls the parameter ``name``."""
    return name.replace(f".{_BASE}", ".")


def other_alpha(settings: LoraSettings | None, alpha: Any) -> str | None:
    """Why adapters that were trained with ``alpha`` are no longer the same with ``settings``; None if they are."""
    if settings is None or not isinstance(alpha, (int, float)) or math.isclose(alpha, settings.alpha, rel_tol=1e-6):
        return None
    return f"the adapters were trained with alpha {alpha:g}, here it is {settings.alpha:g}"


def base_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict without adapters; tied tensors are one."""
    return {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if not is_adapter(name)}


def add_lora(part: str, module: PartModule, settings: LoraSettings) -> None:
    """Put adapters into the named linear layers of ``model.<part>``, in fp32; B is zero, so nothing changes yet.

    Under a quantised base the norms become fp32. Raises :class:`ModelError` for names that fit no layer, and for a
    part whose weights are out of reach.
    """
    hush_bitsandbytes()
    from peft import LoraConfig, inject_adapter_in_model

    if not module.can_train:
        raise ModelError(f"model.{part}.lora: this part cannot train; leave `lora` out")
    targets = _targets(f"model.{part}.lora", module, settings)
    for kind, name in (("nf4", "4bit"), ("int8", "8bit")):  # peft asks the module that it is given
        setattr(module, f"is_loaded_in_{name}", module.quantization == kind)
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # a fraction does no harm
        lora_dropout=settings.dropout,
        target_modules="|".join(map(re.escape, targets)),  # of a list it would also take layers that end so
    )
    inject_adapter_in_model(config, module)
    _share_a(f"model.{part}.lora.shared_a", module, targets, settings.shared_a)
    for path in targets:
        layer = module.get_submodule(path)
        layer.register_state_dict_post_hook(_hide_base)
        layer.register_load_state_dict_pre_hook(_find_base)
        parent: Any = module.get_submodule(path.rpartition(".")[0])
        if hasattr(parent, "qkv_bias_separate"):  # timm's EVA and BEiT would take the weight, past the adapter
            parent.qkv_bias_separate = True
        if isinstance(parent, nn.TransformerEncoderLayer):
            parent.activation_relu_or_gelu = 0  # its fast path in eval mode would do so, too
    added = {name: parameter for name, parameter in module.named_parameters() if is_adapter(name)}
    for parameter in added.values():
        parameter.data = parameter.data.float()
    module.lora, module.adapter_parameters = settings, frozenset(added)
    if module.quantization:
        _compute_norms_in_fp32(module)


def merge_lora(part: str, module: PartModule) -> list[str]:
    """Fold the adapters of ``model.<part>`` into its weights, in place and layer by layer; returns their paths.

    W + alpha / r * B A is computed in fp32 and kept in the type of W. A head tied to the embeddings gets weights of
    its own first. Raises :class:`ModelError` for a quantised base, whose weights cannot take a small change.
    """
    from peft.tuners.lora import LoraLayer

    if module.lora is None:
        return []
    if module.quantization:
        raise ModelError(f"model.{part}: adapters are not merged into a quantised base; set quantization: null")
    merged = [name for name, child in module.named_modules() if isinstance(child, LoraLayer)]
    for path in merged:
        layer: Any = module.get_submodule(path)
        base = layer.get_base_layer()
        if _is_shared(module, base.weight):
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
        with torch.no_grad():
            base.weight.copy_(base.weight.float() + layer.get_delta_weight("default").float())
        parent, _, name = path.rpartition(".")
        setattr(module.get_submodule(parent), name, base)
    module.lora, module.adapter_parameters = None, frozenset()
    return merged


def _targets(key: str, module: PartModule, settings: LoraSettings) -> list[str]:
    """Full paths of the layers that get adapters, in the order of the module."""
    linear = [name for name, child in module.named_modules() if _is_linear(child)]
    asked = settings.target_modules
    if asked == ALL_LINEAR:
        chosen = {name for name in linear if module.get_submodule(name) is not module.output_head}
    else:
        patterns = [asked] if isinstance(asked, str) else asked
        chosen = _fitting(f"{key}.target_modules", module, linear, patterns)
    chosen -= _fitting(f"{key}.exclude_modules", module, linear, settings.exclude_modules)
    if not chosen:
        raise ModelError(f"{key}: no linear layer of {type(module).__name__} is left to get an adapter")
    return [name for name in linear if name in chosen]


def _is_linear(module: nn.Module) -> bool:
    inner = nn.modules.linear.NonDynamicallyQuantizableLinear  # of nn.MultiheadAttention, which never calls it
    return (isinstance(module, nn.Linear) and not isinstance(module, inner)) or type(module).__name__ == "Conv1D"


def _fits(path: str, pattern: str) -> bool:
    """Whether a pattern fits a path or its end."""
    return fnmatchcase(f".{path}", f"*.{pattern}")


def _fitting(key: str, module: nn.Module, linear: Iterable[str], patterns: list[str]) -> set[str]:
    found = {pattern: {path for path in linear if _fits(path, pattern)} for pattern in patterns}
    lost = [pattern for pattern, paths in found.items() if not paths]
    if lost:
        kinds = sorted({path.split(".")[-1] for path in linear})
        raise ModelError(
            f"{key}: {type(module).__name__} has no layer {', '.join(lost)}; its linear layers are "
            f"{', '.join(kinds) or 'none'}"
        )
    return set().union(*found.values())


def _share_a(key: str, module: nn.Module, targets: list[str], groups: list[list[str]]) -> None:
    """Let neighbours of a group have the A of the first, whose gradients then add up, as in one fused layer.

    Each draws its own dropout.
    """
    for group in groups:
        firsts = [path for path in targets if _fits(path, group[0])] if len(group) > 1 else []
        if not firsts:
            raise ModelError(f"{key}: {group} wants two or more layers, all with adapters")
        for first in firsts:
            parent = first.removesuffix(group[0])
            lost = [parent + name for name in group if parent + name not in targets]
            if lost:
                raise ModelError(f"{key}: {', '.join(lost)} beside {first} is no layer with an adapter")
            one, *others = (module.get_submodule(parent + name) for name in group)
            for other in others:
                if other.in_features != one.in_features:
                    raise ModelError(f"{key}: the layers {group} at {first} have inputs of different sizes")
                other.lora_A["default"] = one.lora_A["default"]  # type: ignore[index,operator]


def _hide_base(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Leave the word of peft out of the names of a state dict."""
    for name in [n for n in state if n.startswith(prefix + _BASE)]:
        state[prefix + name.removeprefix(prefix + _BASE)] = state.pop(name)


def _find_base(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Put it in again before names are looked up."""
    for name in [n for n in state if n.startswith(prefix)]:
        if not is_adapter(name) and not name.startswith(prefix + _BASE):
            state[prefix + _BASE + name.removeprefix(prefix)] = state.pop(name)


def _compute_norms_in_fp32(module: nn.Module) -> None:
    """Norms compute in fp32 and hand on the type that they were given, with autocast and without."""

    def lift(norm: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        norm.given = inputs[0].dtype
        stored = next(norm.parameters(recurse=False)).dtype  # fp32, unless the model was cast later
        return (inputs[0].to(stored), *inputs[1:])

    for norm in (child for child in module.modules() if "Norm" in type(child).__name__):
        stored = next((p.dtype for p in norm.parameters(recurse=False)), torch.float32)
        if stored != torch.float32:
            norm.float()
            norm.register_forward_pre_hook(lift)
            norm.register_forward_hook(lambda norm, inputs, output: output.to(norm.given))


def _is_shared(module: nn.Module, weight: Tensor) -> bool:
    return sum(p is weight for _, p in module.named_parameters(remove_duplicate=False)) > 1
