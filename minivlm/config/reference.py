"""The reference of all keys, written from the schema itself: ``python -m minivlm.config.reference``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from minivlm import registry
from minivlm.config.experiment import DemoConfig, ModelConfig, RunConfig
from minivlm.schema import ModelPart

HEADER = """# All keys of an experiment file

Written by `python -m minivlm.config.reference > docs/configuration.md` from the dataclasses that also check every
file. A section of several `stages` may set any of these keys for itself.
"""
PART_KINDS = ("vision_encoder", "connector", "language_model", "template", "processor", "dataset")


def reference() -> str:
    """The whole page as Markdown."""
    lines = [HEADER]
    for title, cls in (("model", ModelConfig), ("run", RunConfig), ("demo", DemoConfig)):
        lines += [f"## Section `{title}`", "", *_table(cls), ""]
    lines += ["## Every vision encoder, connector and language model", ""]
    lines += [*_table(ModelPart, leave_out=("name", "config")), ""]
    for kind in PART_KINDS:
        lines += [f"## Kind `{kind}`", ""]
        seen: dict[type, str] = {}
        for name in registry.names(kind):
            entry = registry.entry(kind, name)
            if entry.config_class() in seen:
                continue
            shared = [n for n in registry.names(kind) if registry.entry(kind, n).config == entry.config]
            seen[entry.config_class()] = name
            lines += [f"### {', '.join(f'`{n}`' for n in shared)}", ""]
            lines += [entry.summary, ""] if entry.summary else []
            lines += [*_table(entry.config_class()), ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(cls: type, leave_out: tuple[str, ...] = ()) -> Iterator[str]:
    fields = [f for f in dataclasses.fields(cls) if f.name not in leave_out]
    if not fields:
        yield "No settings."
        return
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for field in fields:
        kind = field.metadata.get("part")
        type_text = f"part of kind {kind}" if kind else str(field.type).replace("|", "or")
        yield f"| `{field.name}` | {type_text} | {_default(field)} | {_meaning(field.metadata)} |"


def _default(field: Any) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "**required**"
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else repr(value)}`"


def _meaning(metadata: Any) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    parts = [metadata["help"]] if "help" in metadata else []
    parts += [f"{signs[key]} {metadata[key]}" for key in signs if key in metadata]
    if "choices" in metadata:
        parts.append("one of " + ", ".join(f"`{choice}`" for choice in metadata["choices"]))
    if "registered" in metadata:
        parts.append(f"a name of kind {metadata['registered']}")
    return "; ".join(parts).replace("|", "\\|")


if __name__ == "__main__":
    print(reference(), end="")
