"""The template engine: one function from messages to segments, one from segments to ids and labels.

Both the ids and the mask come from the same segments, so they cannot disagree. The mask follows from the
character offsets of the supervised spans; text is never tokenised a second time to count it.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from minivlm.processors.configs import TemplateConfig
from minivlm.types import IGNORE_INDEX, IMAGE_MARKER, IMAGE_TOKEN_ID, Message


class TemplateError(ValueError):
    """Messages that a template cannot render."""


@dataclass(frozen=True)
class Text:
    """A piece of the rendered conversation."""

    text: str
    supervised: bool = False


@dataclass(frozen=True)
class ImageSlot:
    """The place of the next picture's visual tokens."""


@dataclass(frozen=True)
class Cut:
    """A place at which the text is split before it is tokenised."""


Segment = Text | ImageSlot | Cut


class Template:
    """Renders conversations as a :class:`TemplateConfig` says."""

    def __init__(self, config: TemplateConfig):
        self.config = config
        unknown = set(config.chat) - {f.name for f in dataclasses.fields(config)}
        if unknown:
            raise TemplateError(f"template.chat: unknown keys {', '.join(sorted(unknown))}")
        self.chat_config = dataclasses.replace(config, **config.chat, chat={})
        for each in (config, self.chat_config):
            if each.image.count("{image}") != 1:
                raise TemplateError(f"template.image: {each.image!r} must hold {{image}} once")
            if each.think_prefix and not each.think_suffix.strip():
                raise TemplateError("template.think_prefix: thoughts need an end, think_suffix")

    @property
    def stop(self) -> list[str]:
        """Strings that end an answer; without any given, the text that closes an assistant turn."""
        suffix = self.config.assistant_suffix
        return self.config.stop or [s for s in [suffix.strip() or suffix] if s]

    def with_images(self, text: str, count: int) -> str:
        """A user's text with ``count`` pictures; without a marker of its own they stand in front of it."""
        if IMAGE_MARKER in _marked(self.config, text):
            return text
        return f"{IMAGE_MARKER}{self.config.image_separator}" * count + text

    def without_images(self, message: Message) -> Message:
        """A message without the places of its pictures, and without the break or blank that belongs to each."""
        text = _marked(self.config, message.content or "")
        if IMAGE_MARKER not in text:
            return message
        separator = re.escape(self.config.image_separator)
        text = re.sub(rf"\s?(?:{IMAGE_MARKER})+\s*\Z|(?:{IMAGE_MARKER})+(?:{separator}|[ \n])?", "", text)
        return Message(message.role, text)

    def render(
        self,
        messages: Sequence[Message],
        *,
        chat: bool = False,
        pictures: int | None = None,
        draw: random.Random | None = None,
    ) -> list[Segment]:
        """Messages to segments; a last assistant message without content leaves the turn open.

        ``chat`` selects the form for talking where it differs from the form for training. With as many markers as
        ``pictures`` none is dropped. ``draw`` is given in training and decides on a system text out of ``systems`` and
        on empty thoughts; without it there is none of the former, and the latter stay. Raises :class:`TemplateError`
        for roles out of order and for empty answers.
        """
        config = self.chat_config if chat else self.config
        system, turns = _check_turns(config, messages)
        markers = sum(_marked(config, m.content or "").count(IMAGE_MARKER) for m in turns)
        complete = pictures is not None and pictures == markers
        if draw and config.systems and not system and draw.random() < config.system_share:
            system = draw.choice(config.systems)
        empty_thoughts = not draw or draw.random() < config.think_share
        answers = [i for i, m in enumerate(turns) if m.role == "assistant" and m.content is not None]
        first_user = next((i for i, m in enumerate(turns) if m.role == "user"), None)
        segments: list[Segment] = []
        system_text = config.system_prefix + system + config.system_suffix if system else ""
        if not config.system_in_user:
            segments.append(Text(system_text))
        for index, message in enumerate(turns):
            if message.role == "user":
                segments.append(Text(config.turn_separator if index else ""))
                segments.append(Text(config.user_prefix))
                segments.append(Text(system_text if config.system_in_user and index == first_user else ""))
                segments += _user_content(config, message.content or "", complete, chat)
                segments.append(Text(config.user_suffix))
                continue
            segments.append(Text(config.assistant_prefix))
            cut: list[Segment] = [Cut()] if "answer" in config.cut else []
            segments += cut
            if message.content is None:
                segments.append(Text(config.think_prefix + ("" if config.think_open else config.think_suffix)))
                break
            supervised = config.supervise == "all" or index == answers[-1]
            segments.append(Text(config.answer_prefix, supervised))
            segments += _with_slots(config, _with_thoughts(config, message.content, empty_thoughts), supervised)
            segments += [Text(config.assistant_suffix, supervised), *cut, Text(config.turn_end)]
        return list(_joined(_numbered(config, segments)))


def _check_turns(config: TemplateConfig, messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """The system text and the turns behind it, which must alternate and begin with the user, or as the config lets."""
    system = config.system
    turns = list(messages)
    if turns and turns[0].role == "system":
        system = turns.pop(0).content or ""
    if turns and turns[0].role == "assistant" and config.leading_assistant == "drop":
        turns.pop(0)
    led = [m.role for m in turns[:1]] == ["assistant"] and config.leading_assistant in ("keep", "alone")
    if not turns or (len(turns) == led and config.leading_assistant != "alone"):
        raise TemplateError("no user turn")
    for index, message in enumerate(turns):
        expected = ("user", "assistant")[(index + led) % 2]
        if message.role != expected:
            raise TemplateError(f"turn {index + 1} is from '{message.role}', but '{expected}' is due")
        if message.content is None and (message.role == "user" or index != len(turns) - 1):
            raise TemplateError(f"turn {index + 1} has no text")
        if message.role == "assistant" and message.content is not None and not message.content.strip():
            raise TemplateError(f"turn {index + 1}: the answer is empty")
    return system, turns


def _marked(config: TemplateConfig, text: str) -> str:
    """A user's text with ``<image>`` for every placeholder of another project."""
    placeholder = "".join(piece * count for piece, count in config.placeholder.items())
    return text.replace(placeholder, IMAGE_MARKER) if placeholder else text


def _with_thoughts(config: TemplateConfig, content: str, empty: bool) -> str:
    """An answer behind its own thoughts; behind an empty block, if ``empty``, where it has none."""
    if not config.think_suffix:
        return content
    thoughts, _, answer = content.rpartition(config.think_suffix.strip())
    thoughts = thoughts.lstrip().removeprefix(config.think_prefix.strip()).strip("\n")
    if not thoughts.strip():
        thoughts = ""
    if thoughts or empty:
        thoughts = config.think_prefix + thoughts + config.think_suffix
    return thoughts + answer.lstrip("\n")


def _user_content(config: TemplateConfig, content: str, complete: bool, chat: bool) -> list[Segment]:
    content = _marked(config, content)
    if config.markers == "collapse_to_front" and IMAGE_MARKER in content:
        front = f"{IMAGE_MARKER}\n" * (content.count(IMAGE_MARKER) if complete else 1)
        # Only training data are cleaned up at the end: the text of OCR ends with a line break that the model expects.
        end = content[len(content.rstrip()) :] if chat else ""
        content = f"{front}{content.replace(IMAGE_MARKER, '').strip()}".strip() + end
    if config.user_text == "drop":
        content = IMAGE_MARKER * content.count(IMAGE_MARKER)
    return _with_slots(config, content)


def _with_slots(config: TemplateConfig, content: str, supervised: bool = False) -> list[Segment]:
    before, _, after = config.image.partition("{image}")
    pieces = content.split(IMAGE_MARKER)
    segments: list[Segment] = [Text(pieces[0], supervised)]
    for piece in pieces[1:]:
        segments += [Text(before), ImageSlot(), Text(after), Text(piece, supervised)]
    return segments


def _numbered(config: TemplateConfig, segments: list[Segment]) -> Iterator[Segment]:
    """The same segments, with a number before every picture if there are several."""
    several = config.image_number and count_slots(segments) > 1
    number = 0
    for segment in segments:
        if several and isinstance(segment, ImageSlot):
            number += 1
            yield Text(config.image_number.replace("{number}", str(number)))
        yield segment


def _joined(segments: Iterable[Segment]) -> Iterator[Segment]:
    """The same segments without empty texts, neighbouring texts of one kind joined."""
    pending: Text | None = None
    for segment in segments:
        if not isinstance(segment, Text):
            if pending:
                yield pending
            pending = None
            yield segment
        elif segment.text:
            if pending and pending.supervised == segment.supervised:
                pending = Text(pending.text + segment.text, pending.supervised)
            else:
                if pending:
                    yield pending
                pending = segment
    if pending:
        yield pending


def count_slots(segments: Sequence[Segment]) -> int:
    """Number of pictures that the segments have a place for."""
    return sum(isinstance(segment, ImageSlot) for segment in segments)


def tokenize(
    segments: Sequence[Segment], tokenizer: Any, tokens_per_image: Sequence[int], bos: str = "auto", eos: str = "never"
) -> tuple[list[int], list[int]]:
    """Segments to ``(input_ids, labels)`` of equal length.

    Every run of text between slots and cuts is tokenised once, without special tokens of the tokenizer's
    own; a token is supervised when its characters overlap a supervised text. Picture k takes
    ``tokens_per_image[k]`` positions of IMAGE_TOKEN_ID. With ``eos: always`` the end token follows what is supervised
    to its end, not an open turn. Raises :class:`TemplateError` where the tokenizer lacks a token that must be.
    """
    ids: list[int] = []
    labels: list[int] = []
    if begins(bos, tokenizer):
        if tokenizer.bos_token_id is None:
            raise TemplateError("template.bos: always, but the tokenizer has no BOS token")
        ids.append(tokenizer.bos_token_id)
        labels.append(IGNORE_INDEX)
    sizes = iter(tokens_per_image)
    run: list[Text] = []
    for segment in [*segments, Cut()]:
        if isinstance(segment, Text):
            run.append(segment)
            continue
        run_ids, run_labels = _tokenize_run(run, tokenizer)
        ids += run_ids
        labels += run_labels
        run = []
        if isinstance(segment, ImageSlot):
            size = next(sizes)
            ids += [IMAGE_TOKEN_ID] * size
            labels += [IGNORE_INDEX] * size
    last = next((each for each in reversed(segments) if isinstance(each, Text)), None)
    if eos == "always" and last is not None and last.supervised:
        if tokenizer.eos_token_id is None:
            raise TemplateError("template.eos: always, but the tokenizer has no end token")
        ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    return ids, labels


def _tokenize_run(run: list[Text], tokenizer: Any) -> tuple[list[int], list[int]]:
    if not run:
        return [], []
    text = "".join(piece.text for piece in run)
    # A tokenizer that trims its offsets gives a token of blanks the empty range behind them.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    supervised = bytearray(len(text))
    position = 0
    for piece in run:
        if piece.supervised:
            supervised[position : position + len(piece.text)] = b"\x01" * len(piece.text)
        position += len(piece.text)
    labels = [
        token if any(supervised[start if start < end else max(end - 1, 0) : max(end, 1)]) else IGNORE_INDEX
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return list(encoded["input_ids"]), labels


def begins(bos: str, tokenizer: Any) -> bool:
    """Whether ids begin with the tokenizer's begin token where a template's ``bos`` says so."""
    known = bos == "known" and tokenizer.bos_token_id is not None
    return bos == "always" or known or (bos == "auto" and adds_bos(tokenizer))


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its BOS in front by itself."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
