"""The prompt files and prompt templates of MiniGPT-4, in today's notation."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def is_packaged(path: Any) -> bool:
    """Whether it is the file of alignment prompts that comes with MiniGPT-4, whose lines the packaged models hold."""
    return isinstance(path, str) and Path(path).parts[-2:] == ("prompts", "alignment.txt") and not Path(path).exists()


def read_prompts(path: str) -> list[str]:
    """The prompts of a MiniGPT-4 prompt file: its lines with ``<ImageHere>``, in today's notation.

    Raises ValueError if there is no such file or none of its lines is a prompt.
    """
    if not isinstance(path, str):
        raise ValueError(f"expected the path of a text file, got {path!r}")
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.rstrip("\n") for line in file if "<ImageHere>" in line]
    except OSError as error:
        raise ValueError(f"the file of prompts '{path}' cannot be read: {error.strerror}") from error
    if not lines:
        raise ValueError(f"no line of '{path}' holds <ImageHere>, so it has no prompts")
    # The template writes <Img> and </Img> around every picture.
    return [line.replace("<Img>", "").replace("</Img>", "").replace("<ImageHere>", "<image>") for line in lines]


def split_template(template: Any) -> dict[str, str]:
    """``before{}after``: the blank behind ``{}`` still belongs to the user, the rest opens the answer.

    Only the sum of the last two is ever used, so the place of this cut changes no token. The keys
    are those of the config; raises ValueError if the text has not one ``{}``.
    """
    if not isinstance(template, str) or template.count("{}") != 1:
        raise ValueError(f"expected a text with one {{}} for the user's message, got {template!r}")
    before, after = template.split("{}")
    blank = after[: len(after) - len(after.lstrip())]
    return {
        "model.template.user_prefix": before,
        "model.template.user_suffix": blank,
        "model.template.assistant_prefix": after[len(blank) :],
    }
