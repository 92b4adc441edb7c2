"""LLaVA-1.5 records: JSON or JSONL with pictures in a folder.

A record is ``{id, image: path | [paths], conversations: [{from: human|gpt|system, value: text}]}``; one
without ``image`` is text only. Turns may also be ``{role, content}``; then an answer may have its thoughts under
``reasoning_content``, and the first turn tools under ``functions``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from minivlm.datasets.chat_turns import tools_of, with_thoughts, with_tools
from minivlm.datasets.configs import LlavaJsonConfig
from minivlm.datasets.records import (
    UNUSABLE,
    RecordBuilder,
    RecordDataset,
    check_images,
    image_names,
    kind_of,
    unknown_keys,
)
from minivlm.registry import suggest
from minivlm.types import IMAGE_MARKER, Message, Sample

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""Names of the speakers in a file and their roles in a :class:`Message`."""
KNOWN_KEYS = ("id", "image", "conversations", "answers", "question_type", "model", "blip_caption", "url")
"""Keys of a record. ``answers`` and ``question_type`` serve evaluation; LLaVA's own data have the last three."""
TURN_KEYS = ("from", "value", "role", "content", "reasoning_content", "functions", "tools")


class LlavaJsonDataset(RecordDataset[LlavaJsonConfig]):
    """The conversations of one file."""

    def record(self, index: int) -> Any:
        """The record, its pictures named as ``image_separator`` and ``image_prefix`` say."""
        record = super().record(index)
        return renamed(record, self.config) if isinstance(record, dict) else record

    def complaints(self, record: Any, index: int) -> list[str]:
        """See :func:`check_record`."""
        return check_record(record, index)

    def sample(self, record: dict[str, Any], sample_id: str) -> Sample:
        """Turn by turn as the record has it, up to ``max_turns``; pictures of turns left out are left out."""
        messages = messages_of(record["conversations"])
        kept = _first_turns(messages, self.config.max_turns)
        pictures = self.pictures(record, sample_id)
        lost = sum((message.content or "").count(IMAGE_MARKER) for message in messages[len(kept) :])
        return Sample(
            id=sample_id,
            messages=kept,
            images=pictures[: len(pictures) - lost] if lost else pictures,
            meta={key: record[key] for key in ("answers", "question_type") if key in record},
        )

    def pictures(self, record: dict[str, Any], sample_id: str) -> list[Any]:
        """The pictures of a record, not yet opened."""
        return [self.picture(name) for name in image_names(record)]


class LlavaJsonBuilder(RecordBuilder[LlavaJsonConfig]):
    """Records of LLaVA's format, one annotation file a split."""

    dataset = LlavaJsonDataset


def turn_of(turn: dict[str, Any]) -> tuple[Any, Any]:
    """Speaker and text of a turn, under the keys of LLaVA or of OpenAI."""
    return turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))


def messages_of(turns: Sequence[dict[str, Any]]) -> list[Message]:
    """The turns of a record without faults as messages; tools become a part of the system text."""
    messages = [Message(ROLES[speaker], text) for speaker, text in map(turn_of, turns)]
    for message, turn in zip(messages, turns, strict=True):
        if message.role == "assistant":
            message.content = with_thoughts(message.content or "", turn.get("reasoning_content"))
    tools = tools_of(turns[0])
    if tools and messages[0].role != "system":
        messages.insert(0, Message("system", ""))
    if tools:
        messages[0].content = with_tools(messages[0].content or "", tools)
    return messages


def _first_turns(messages: list[Message], count: int | None) -> list[Message]:
    """The messages up to the answer of question ``count``."""
    answers = [place for place, message in enumerate(messages, 1) if message.role == "assistant"]
    return messages if count is None or len(answers) < count else messages[: answers[count - 1]]


def renamed(record: dict[str, Any], config: LlavaJsonConfig) -> dict[str, Any]:
    """The record with the names of its pictures as ``image_separator`` and ``image_prefix`` say."""
    names, separator = record.get("image"), config.image_separator
    if isinstance(names, str) and separator:
        names = [name.strip() for name in names.split(separator) if name.strip()]
    if config.image_prefix and names and not check_images(names):
        names = [_prefixed(name, config.image_prefix) for name in image_names({"image": names})]
    return record if names is record.get("image") else record | {"image": names}


def _prefixed(name: str, prefix: str) -> str:
    folder, slash, file = name.rpartition("/")
    return name if file.startswith(prefix) else folder + slash + prefix + file


def check_record(record: Any, index: int, pictures: int | None = None) -> list[str]:
    """Everything that is wrong with a record, as ``"<kind>: <what>"``; an empty list if nothing is.

    ``pictures`` is their number where they do not stand under ``image``.

    Kinds: ``record`` and ``picture path`` (it cannot be used), ``nothing supervised`` (an answer is empty, which
    templates refuse), ``unknown key``, ``role order`` and ``marker count`` (it may become a sample, but hardly the
    one that was meant).
    """
    if not isinstance(record, dict):
        return [f"record: record {index} is not an object {{...}} but {kind_of(record)}"]
    # `messages` is not a key of the format either, but reported with the right name below
    found = unknown_keys([key for key in record if key != "messages"], KNOWN_KEYS)
    found += check_images(record.get("image"))
    answers = record.get("answers", [])
    if not (isinstance(answers, list) and all(isinstance(answer, str) for answer in answers)):
        found.append("record: `answers` must be a list of strings")
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        hint = ", but `messages`: rename the key" if "messages" in record else ""
        state = "an empty `conversations`" if turns == [] else "no list `conversations`"
        return [*found, f"record: it has {state}{hint}"]
    found += [text for number, turn in enumerate(turns, 1) for text in _check_turn(turn, number)]
    if not any(text.startswith(UNUSABLE) for text in found):
        found += _check_order([ROLES[turn_of(turn)[0]] for turn in turns])
        found += [
            f"nothing supervised: the answer in turn {number} is empty"
            for number, (speaker, text) in enumerate(map(turn_of, turns), 1)
            if ROLES[speaker] == "assistant" and not text.strip()
        ]
        markers = sum(turn_of(turn)[1].count(IMAGE_MARKER) for turn in turns)
        pictures = len(image_names(record)) if pictures is None else pictures
        if markers != pictures:
            found.append(f"marker count: {markers} x {IMAGE_MARKER} in the text for {pictures} picture(s)")
    return found


def _check_turn(turn: Any, number: int) -> list[str]:
    if not isinstance(turn, dict):
        return [f"record: turn {number} is not an object {{from, value}} but {kind_of(turn)}"]
    found = [f"unknown key: '{key}'{suggest(key, TURN_KEYS)} in turn {number}" for key in turn if key not in TURN_KEYS]
    speaker, text = turn_of(turn)
    if not isinstance(speaker, str) or speaker not in ROLES:
        hint = suggest(speaker, ROLES) if isinstance(speaker, str) else ""
        found.append(f"record: turn {number} is from {speaker!r}{hint}; known are {', '.join(ROLES)}")
    if text is None:
        found.append(f"record: turn {number} has no `value`")
    elif not isinstance(text, str):
        found.append(f"record: the `value` of turn {number} is not text but {kind_of(text)}")
    if not isinstance(turn.get("reasoning_content") or "", str):
        found.append(f"record: the `reasoning_content` of turn {number} is not text")
    try:
        tools_of(turn)
    except ValueError as error:
        found.append(f"record: turn {number}: {error}")
    return found


def _check_order(roles: Sequence[str]) -> list[str]:
    found = [
        f"role order: turn {number} is a system text, which stands first"
        for number, role in enumerate(roles, 1)
        if role == "system" and number > 1
    ]
    spoken = [(number, role) for number, role in enumerate(roles, 1) if role != "system"]
    if not spoken or spoken[0][1] != "user":
        found.append("role order: the first turn is not the user's")
    for (_, before), (number, role) in pairwise(spoken):
        if before == role:
            found.append(f"role order: turn {number} is the {role}'s again")
    if spoken and spoken[-1][1] != "assistant":
        found.append("role order: the last turn is not the assistant's")
    return found
