"""Phrases and boxes in JSON or JSONL, asked for in either direction (MiniGPT-v2, Chen et al. 2023).

A record is ``{id, image, phrase, boxes}``, or ``{id, image, caption, objects: [{phrase, boxes}]}`` for the
forms that take a whole caption. A box is [left, top, right, bottom]; ``boxes`` is one of them or a list.
"""

from __future__ import annotations

from typing import Any

from PIL import Image

from minivlm.datasets.boxes import Box, scale_box, write_boxes, write_phrase
from minivlm.datasets.configs import GroundingJsonConfig
from minivlm.datasets.instruction_json import InstructionDataset, check_fields
from minivlm.datasets.records import RecordBuilder, unknown_keys
from minivlm.types import Sample, SampleError

OF_CAPTIONS = ("grounded_caption", "caption_to_phrases")
"""Forms whose records hold a caption and its objects."""


class GroundingJsonDataset(InstructionDataset[GroundingJsonConfig]):
    """Phrases of a picture with their boxes."""

    def complaints(self, record: Any, index: int) -> list[str]:
        """A picture and phrases with boxes are needed, and a caption where the form takes one."""
        of_caption = self.config.form in OF_CAPTIONS
        text, boxed, check = ("caption", "objects", _check_objects) if of_caption else ("phrase", "boxes", _check_boxes)
        found = check_fields(record, index, {text: True}, others=(boxed, "width", "height"))
        if not isinstance(record, dict):
            return found
        if not all(_is_number(record.get(key, 1)) and record.get(key, 1) > 0 for key in ("width", "height")):
            found.append("record: `width` and `height` must be numbers above 0")
        return [*found, *check(record)]

    def sample(self, record: dict[str, Any], sample_id: str) -> Sample:
        """The request and the answer of the form; raises :class:`SampleError` for an impossible box."""
        form = self.config.form
        objects = record["objects"] if form in OF_CAPTIONS else [record]
        size = self._size(record, sample_id)
        try:
            grounded = [(each["phrase"], [scale_box(box, *size) for box in _boxes(each)]) for each in objects]
        except ValueError as error:
            raise SampleError(sample_id, str(error)) from error
        phrase, boxes = grounded[0]
        if form == "refer":
            given, answer = phrase, write_boxes(boxes)
        elif form == "identify":
            given, answer = write_boxes(boxes), phrase
        elif form == "detect":
            given, answer = phrase, write_phrase(phrase, boxes)
        elif form == "grounded_caption":
            given, answer = "", _mark_phrases(record["caption"], grounded)
        else:
            given, answer = record["caption"], " ".join(write_phrase(*each) for each in grounded)
        return self.ask(record, sample_id, given, [answer])

    def _size(self, record: dict[str, Any], sample_id: str) -> tuple[float, float]:
        """Width and height in the unit of the boxes."""
        if self.config.box_unit == "percent":
            return 100, 100
        if "width" in record and "height" in record:
            return record["width"], record["height"]
        path = self.picture(record["image"])
        try:
            with Image.open(path) as opened:  # reads the header alone
                return opened.size
        except FileNotFoundError as error:
            raise SampleError(sample_id, f"there is no picture {path}") from error
        except (OSError, ValueError, SyntaxError) as error:
            raise SampleError(sample_id, f"cannot read picture {path}: {error}") from error


class GroundingJsonBuilder(RecordBuilder[GroundingJsonConfig]):
    """Phrases with boxes, one annotation file a split."""

    dataset = GroundingJsonDataset


def _mark_phrases(caption: str, grounded: list[tuple[str, list[Box]]]) -> str:
    """The caption with every phrase in its tags and its boxes behind it, phrase after phrase."""
    text, position = "", 0
    for phrase, boxes in grounded:
        start = caption.index(phrase, position)
        text += caption[position:start] + write_phrase(phrase, boxes)
        position = start + len(phrase)
    return text + caption[position:]


def _boxes(node: dict[str, Any]) -> list[Any]:
    """The boxes of a phrase; a single one may stand without a list around it."""
    boxes = node.get("boxes")
    if not isinstance(boxes, list):
        return []
    return [boxes] if boxes and not isinstance(boxes[0], list) else boxes


def _check_boxes(node: dict[str, Any]) -> list[str]:
    boxes = _boxes(node)
    fine = [isinstance(box, list) and len(box) == 4 and all(_is_number(value) for value in box) for box in boxes]
    return [] if boxes and all(fine) else ["record: `boxes` must be [left, top, right, bottom], or a list of these"]


def _check_objects(record: dict[str, Any]) -> list[str]:
    objects, caption = record.get("objects"), record.get("caption")
    if not isinstance(objects, list) or not objects:
        return ["record: `objects` must be a list of {phrase, boxes}"]
    found, position = [], 0
    for number, each in enumerate(objects, 1):
        phrase = each.get("phrase") if isinstance(each, dict) else None
        if not isinstance(phrase, str) or not phrase:
            found.append(f"record: object {number} has no `phrase`")
            continue
        found += [f"{text} (object {number})" for text in unknown_keys(each, ("phrase", "boxes"))]
        found += [f"{text} (object {number})" for text in _check_boxes(each)]
        position = caption.find(phrase, position) if isinstance(caption, str) else -1
        if position < 0:
            found.append(f"record: the phrase of object {number}, '{phrase}', does not follow in the caption")
            break
        position += len(phrase)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
