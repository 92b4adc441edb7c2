"""LLaVA-1.5 records: JSON or JSONL with pictures in a folder.

A record is ``{id, image: path | [paths], conversations: [{from: human|gpt|system, value: text}]}``; one
without ``image`` is text only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

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
TURN_KEYS = ("from", "value", "role", "content")


class LlavaJsonDataset(RecordDataset[LlavaJsonConfig]):
    """The conversations of one file."""

    def complaints(self, record: Any, index: int) -> list[str]:
        """See :func:`check_record`."""
        return check_record(record, index)

    def sample(self, record: dict[str, Any], sample_id: str) -> Sample:
        """Turn by turn as the record has it."""
        turns = [turn_of(turn) for turn in record["conversations"]]
        return Sample(
            id=sample_id,
            messages=[Message(ROLES[speaker], text) for speaker, text in turns],
            images=[self.picture(name) for name in image_names(record)],
            meta={key: record[key] for key in ("answers", "question_type") if key in record},
        )


class LlavaJsonBuilder(RecordBuilder[LlavaJsonConfig]):
    """Records of LLaVA's format, one annotation file a split."""

    dataset = LlavaJsonDataset


def turn_of(turn: dict[str, Any]) -> tuple[Any, Any]:
    """Speaker and text of a turn, under the keys of LLaVA or of OpenAI."""
    return turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))


def check_record(record: Any, index: int) -> list[str]:
    """Everything that is wrong with a record, as ``"<kind>: <what>"``; an empty list if nothing is.

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
        pictures = len(image_names(record))
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
