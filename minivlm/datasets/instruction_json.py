"""Captions, questions and instructions in JSON or JSONL: a request and its answer a record.

``{id, image, caption}``, ``{id, image, question, answers}``, ``{id, instruction, input, output}``. Which
wording of the request a record gets depends on its id alone.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any, TypeVar

from minivlm.datasets.configs import CaptionJsonConfig, InstructionConfig, TextJsonConfig, VQAJsonConfig
from minivlm.datasets.records import RecordBuilder, RecordDataset, check_images, kind_of, unknown_keys
from minivlm.types import IMAGE_MARKER, Message, Sample

ConfigT = TypeVar("ConfigT", bound=InstructionConfig)


class InstructionDataset(RecordDataset[ConfigT]):
    """Pictures with one request and one answer each."""

    def ask(
        self, record: dict[str, Any], sample_id: str, text: str, answers: list[str], learned: str | None = None
    ) -> Sample:
        """``<image> [identifier] wording`` and the answer that is learned (default: the first)."""
        wording = random.Random(f"{self.name}/{sample_id}").choice(self.config.prompts)
        request = " ".join(part for part in (self.config.identifier, wording.replace("{text}", text)) if part)
        return Sample(
            id=sample_id,
            messages=[
                Message("user", f"{IMAGE_MARKER} {request}"),
                Message("assistant", answers[0] if learned is None else learned),
            ],
            images=[self.picture(record["image"])],
            meta={
                "question": text or request,
                "answers": answers,
                "question_type": record.get("question_type", self.name or "all"),
                "metric": self.config.metric,
            },
        )


class CaptionJsonDataset(InstructionDataset[CaptionJsonConfig]):
    """Pictures and captions."""

    def complaints(self, record: Any, index: int) -> list[str]:
        """A picture and at least one caption are needed."""
        return check_fields(record, index, {"caption": True}, lists=("caption",))

    def sample(self, record: dict[str, Any], sample_id: str) -> Sample:
        """The first caption is the answer."""
        return self.ask(record, sample_id, "", texts(record["caption"]))


class VQAJsonDataset(InstructionDataset[VQAJsonConfig]):
    """Pictures, questions and answers."""

    def complaints(self, record: Any, index: int) -> list[str]:
        """A picture, a question and at least one answer are needed."""
        fields = {"question": True, "answers": True, "question_type": False}
        return check_fields(record, index, fields, lists=("answers",))

    def sample(self, record: dict[str, Any], sample_id: str) -> Sample:
        """The most frequent answer is learned; of equally frequent ones the first."""
        answers = texts(record["answers"])
        return self.ask(record, sample_id, record["question"], answers, Counter(answers).most_common(1)[0][0])


class TextJsonDataset(RecordDataset[TextJsonConfig]):
    """Instructions without pictures."""

    def complaints(self, record: Any, index: int) -> list[str]:
        """An instruction and an output are needed."""
        fields = {"instruction": True, "input": False, "output": True}
        return check_fields(record, index, fields, picture=False)

    def sample(self, record: dict[str, Any], sample_id: str) -> Sample:
        """The input stands below the instruction."""
        request = "\n".join(part for part in (record["instruction"], record.get("input")) if part)
        return Sample(sample_id, [Message("user", request), Message("assistant", record["output"])])


class CaptionJsonBuilder(RecordBuilder[CaptionJsonConfig]):
    """Captions, one annotation file a split."""

    dataset = CaptionJsonDataset


class VQAJsonBuilder(RecordBuilder[VQAJsonConfig]):
    """Questions about pictures, one annotation file a split."""

    dataset = VQAJsonDataset


class TextJsonBuilder(RecordBuilder[TextJsonConfig]):
    """Instructions, one annotation file a split."""

    dataset = TextJsonDataset


def texts(value: str | list[str]) -> list[str]:
    """One text or several as a list."""
    return [value] if isinstance(value, str) else list(value)


def check_fields(
    record: Any,
    index: int,
    fields: dict[str, bool],
    *,
    lists: tuple[str, ...] = (),
    others: tuple[str, ...] = (),
    picture: bool = True,
) -> list[str]:
    """Complaints about a record of one picture and some texts, as :meth:`RecordDataset.complaints` has them.

    ``fields`` says of every text whether it is needed; those in ``lists`` may be lists of texts. ``others``
    are keys that the caller checks.
    """
    if not isinstance(record, dict):
        return [f"record: record {index} is not an object {{...}} but {kind_of(record)}"]
    found = unknown_keys(record, ("id", *(["image"] if picture else []), *fields, *others))
    if picture and not isinstance(record.get("image"), str):
        found.append("record: it has no `image`, the path of its picture")
    elif picture:
        found += check_images(record["image"])
    for key, needed in fields.items():
        value = record.get(key)
        if value is None and not needed:
            continue
        items = value if key in lists and isinstance(value, list) else [value]
        if not items or not all(isinstance(item, str) and (item.strip() or not needed) for item in items):
            found.append(f"record: `{key}` must be a text{' or a list of texts' if key in lists else ''}")
    return found
