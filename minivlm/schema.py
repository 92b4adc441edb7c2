"""The vocabulary in which a part states what its YAML node may hold.

The dataclass of a part is the schema of its node. :func:`setting` adds what a type cannot say: limits,
choices, a help text, or that the value names something of the registry. This module is free of torch,
and so are the modules with the dataclasses, so that a typo is answered before anything heavy loads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


def setting(
    default: Any = dataclasses.MISSING,
    *,
    factory: Callable[[], Any] | None = None,
    help: str = "",
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Sequence[Any] | None = None,
    registered: str | None = None,
    part: str | None = None,
    local: bool = False,
) -> Any:
    """A dataclass field with limits.

    ``ge/gt/le/lt`` bound a number, ``choices`` lists the allowed values, ``registered`` says that the
    string must be a name of that registry kind, ``part`` that the node is ``{name: ..., <settings>}``
    of that kind and becomes a :class:`Part`. ``local`` says that the value belongs to this machine: it tells
    no model from another and is not taken from a checkpoint. Without ``default`` or ``factory`` the value is
    required.
    """
    metadata: dict[str, Any] = {
        key: value
        for key, value in dict(
            help=help, ge=ge, gt=gt, le=le, lt=lt, choices=choices, registered=registered, part=part
        ).items()
        if value not in (None, "")
    }
    if local:
        metadata["local"] = True
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata, repr=not local)


def forget_local(config: Any) -> None:
    """Give ``local`` settings of a dataclass, and of those in it, their defaults.

    A checkpoint of somebody else must not say which program runs here.
    """
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.metadata.get("local"):
            setattr(config, item.name, item.default)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            forget_local(value)


@dataclass
class Part:
    """A YAML node ``{name: ..., <settings>}``: the registered name and its typed settings."""

    name: str
    config: Any


def walk_parts(key: str, part: Part | None) -> Iterator[tuple[str, Part]]:
    """A part and the parts inside it (the encoders of ``dual``), each with its key."""
    if part is not None:
        yield key, part
        for item in dataclasses.fields(part.config) if dataclasses.is_dataclass(part.config) else ():
            inner = getattr(part.config, item.name)
            if isinstance(inner, Part):
                yield from walk_parts(f"{key}.{item.name}", inner)


@dataclass
class LoraSettings:
    """Low-rank adapters in linear layers (Hu et al. 2021); with a quantised base this is QLoRA (Dettmers et al. 2023).

    A name of a layer is the end of its path (``q_proj``) or a glob over the path or its end
    (``layers.*.self_attn.*``).
    """

    r: int = setting(64, ge=1, help="rank")
    alpha: float = setting(16, gt=0, help="the adapters' output is scaled by alpha / r")
    dropout: float = setting(0.05, ge=0, lt=1)
    target_modules: list[str] | str = setting(
        factory=lambda: ["*"],
        help="linear layers by the end of their path or by a glob; default: all of the part, also the output head; "
        "all-linear: all but the output head",
    )
    exclude_modules: list[str] = setting(factory=list, help="linear layers without adapters, named in the same way")
    shared_a: list[list[str]] = setting(
        factory=list,
        help="groups of neighbours with one matrix A, as if they were one fused layer: [[q_proj, k_proj, v_proj]]",
    )


@dataclass
class ModelPart(Part):
    """A part of the model: beside its own settings, what every model part may say of its training."""

    freeze: bool | list[str] | None = setting(
        None,
        help="true: no parameter trains; a list: parameters whose name matches a glob do not train, and of several "
        'globs the last counts, with ! in front it trains (`["*", "!layers.2.*"]`: nothing but layer 2; layers.-1 is '
        "the last layer); "
        "default: all that can train, do",
    )
    init_lr: float | None = setting(None, gt=0, help="peak learning rate of this part; default run.init_lr")
    weights: str | None = setting(
        None,
        help="a .safetensors or .pth file (path or URL) with weights for this part, by its own names or a published "
        "base such as eva_vit_g.pth or blip2_pretrained_flant5xxl.pth, or a model folder of minivlm, whose part of "
        "this kind is taken; `minivlm inspect FILE` says what a file is",
    )
    lora: LoraSettings | None = setting(
        None,
        help="train low-rank adapters only: the base is frozen and the adapters train, whatever `freeze` says "
        '(`freeze: ["*"]` freezes them, too)',
    )


PART_CLASSES: dict[str, type[Part]] = {
    "vision_encoder": ModelPart,
    "connector": ModelPart,
    "language_model": ModelPart,
}
"""Kinds whose nodes hold more than ``name`` and the settings of the part."""
