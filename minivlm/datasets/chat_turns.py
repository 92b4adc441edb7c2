"""What a turn of a chat may hold beside its text: thoughts and tools, written as Qwen3's chat template writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_TOOLS = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{signatures}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
"""Qwen3's words, which its models were trained on (and the newest MiniMind's)."""


def tools_of(turn: Mapping[str, Any]) -> list[Any]:
    """The functions that a turn offers under ``functions`` or ``tools``, as a list or as JSON text.

    Raises ValueError for anything else.
    """
    tools = turn.get("functions") or turn.get("tools") or []
    if isinstance(tools, str):
        tools = json.loads(tools)
    if not isinstance(tools, list):
        raise ValueError("`functions` must be a list")
    return tools


def with_tools(system: str, tools: list[Any]) -> str:
    """A system text followed by the signatures of functions, one a line as JSON."""
    if not tools:
        return system
    block = _TOOLS.format(signatures="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
    return f"{system}\n\n{block}" if system else block


def with_thoughts(answer: str, thoughts: str | None) -> str:
    """An answer behind the thoughts that stand beside it under ``reasoning_content``."""
    thoughts = (thoughts or "").strip("\n")
    return f"<think>\n{thoughts}\n</think>\n\n{answer}" if thoughts.strip() else answer
