"""Settings of the datasets (free of torch: they are the schema of the YAML nodes)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from minivlm.lavis.configs import LavisEnvironment
from minivlm.schema import Part, setting


@dataclass(kw_only=True)
class DatasetConfig:
    """What every dataset node may hold."""

    sample_ratio: float | None = setting(None, gt=0, help="weight in the mix; default: every sample once an epoch")
    max_samples: int | None = setting(None, ge=1, help="use only the first so many samples of a split")
    batch_size: int | None = setting(
        None,
        ge=1,
        help="samples per process and micro batch, where a batch holds one dataset (run.mix: batch, and streams); "
        "default: run.batch_size_train",
    )


@dataclass(kw_only=True)
class RecordConfig(DatasetConfig):
    """Files of records and a folder of pictures."""

    annotations: dict[str, str] | str = setting(help="JSON or JSONL file, or one for each split")
    images: str | None = setting(None, help="folder of the pictures; default: the annotation file's folder")
    source: str | None = setting(None, help="where these files come from, said when they are not there")
    layout: dict[str, str | None] | None = setting(
        None,
        help="folders that must lie below `images` and hold something, with where each comes from (null: not asked "
        "for); all that lack are named before anything is read",
    )
    renames: dict[str, str] = setting(
        factory=dict,
        help="where a picture is missing: regular expressions, and what to put into its path for what they match; the "
        "first file that is there is taken, and counted by check-data",
    )
    skip: str | None = setting(
        None,
        help="file with ids of records to leave out, one a line or as in bad_samples.jsonl (`check-data "
        "--write-missing` writes one)",
    )
    part_of: list[str] = setting(
        factory=list, help="names of datasets that hold all of this one already; the two together are warned about"
    )

    def __post_init__(self) -> None:
        for pattern, to in self.renames.items():
            try:
                re.compile(pattern).sub(to, "")
            except (re.error, IndexError) as error:
                raise ValueError(f"renames: {pattern!r} to {to!r} is no replacement ({error})") from error


@dataclass(kw_only=True)
class LlavaJsonConfig(RecordConfig):
    """LLaVA-1.5 records: ``{id, image: path or list, conversations: [{from, value}]}``."""

    image_prefix: str = setting("", help="put in front of a picture's file name that does not begin so")
    image_separator: str | None = setting(None, help="between the names of several pictures that share one string")
    max_turns: int | None = setting(None, ge=1, help="only the first so many questions of a conversation, with answers")


@dataclass(kw_only=True)
class ParquetChatConfig(LlavaJsonConfig):
    """The same records in the rows of a parquet file, pictures inside: ``{conversations, image_bytes}``."""

    annotations: dict[str, str] | str = setting(help="parquet file, or one for each split")
    memory_mb: int = setting(512, ge=1, help="what a loading process may hold of the file, in row groups")


@dataclass(kw_only=True)
class InstructionConfig(RecordConfig):
    """Records that become one request and one answer, worded by the dataset."""

    identifier: str = setting("", help="in front of the text, as [vqa] of MiniGPT-v2")
    prompts: list[str] = setting(factory=lambda: ["{text}"], help="wordings of which each record gets one")
    metric: str = setting("exact_match", registered="metric", help="how an answer is scored")


@dataclass(kw_only=True)
class CaptionJsonConfig(InstructionConfig):
    """``{id, image, caption}``; of a list of captions the first is learned."""

    prompts: list[str] = setting(
        factory=lambda: ["Describe this image briefly."], help="requests of which each record gets one"
    )


@dataclass(kw_only=True)
class VQAJsonConfig(InstructionConfig):
    """``{id, image, question, answers}``; of a list of answers the most frequent is learned.

    In ``prompts``, {text} stands for the question.
    """


@dataclass(kw_only=True)
class GroundingJsonConfig(InstructionConfig):
    """``{id, image, phrase, boxes}``, or ``{id, image, caption, objects: [{phrase, boxes}]}`` for whole captions.

    In ``prompts``, {text} stands for the phrase, the boxes or the caption that is given.
    """

    form: str = setting(
        "refer",
        choices=("refer", "identify", "detect", "grounded_caption", "caption_to_phrases"),
        help="refer: phrase to boxes; identify: boxes to phrase; detect: phrase to phrase with boxes; "
        "grounded_caption: request to caption with boxes; caption_to_phrases: caption to its phrases with boxes",
    )
    box_unit: str = setting(
        "pixels",
        choices=("pixels", "percent"),
        help="of [left, top, right, bottom] in the records: pixels of a picture of `width` and `height` (of the "
        "record, or else of the file); or 0 to 100 of width and height",
    )


@dataclass(kw_only=True)
class TextJsonConfig(RecordConfig):
    """``{id, instruction, input, output}`` without pictures; ``input`` may be absent."""


@dataclass(kw_only=True)
class TextConfig(DatasetConfig):
    """Plain texts, one file or several for a split: ``.txt`` with a text a line, ``.jsonl`` with ``{text}`` a line."""

    annotations: dict[str, str | list[str]] | str | list[str] = setting(
        help="file, list of files, or one of both for each split"
    )
    max_characters: int | None = setting(
        None,
        ge=16,
        help="longer texts are cut into pieces, at a line break or a blank where there is one; what is longer than "
        "model.processor.max_length in tokens loses its end",
    )


@dataclass(kw_only=True)
class EasyVQAConfig(DatasetConfig):
    """easy-VQA from its PyPI package, with the official test split."""

    form: str = setting(
        "question",
        choices=("caption", "conversation", "question", "text"),
        help="of the training split: a caption of the shape; conversations about a picture; single questions. "
        "The other splits always hold single questions, but for `text`: what is known about a picture as a document "
        "without it, in every split",
    )
    max_turns: int = setting(4, ge=1, help="questions of one conversation")
    val_images: int = setting(200, ge=0, lt=4000, help="training pictures set aside as split `val`")


@dataclass(kw_only=True)
class CCSBUAlignConfig(DatasetConfig):
    """MiniGPT-4's second stage, as its authors publish it."""

    storage: str = setting(help="folder with filter_cap.json and the pictures image/<image_id>.jpg")


@dataclass(kw_only=True)
class WebDatasetConfig(DatasetConfig):
    """Tar shards with ``<key>.jpg`` and ``<key>.json`` (its ``caption``), as img2dataset writes them."""

    storage: str | list[str] = setting(help="paths or URLs of the shards, with ranges: laion/{00000..10488}.tar")
    resampled: bool = setting(
        True, help="draw shards with replacement; false: every shard once a pass, shared out to all loading processes"
    )
    shuffle_buffer: int = setting(1000, ge=1, help="samples that are shuffled together; 1: as they stand in the shards")
    text_processor: Part | None = setting(
        factory=lambda: {"name": "blip_caption"}, part="processor", help="cleans the captions; null: as they are"
    )


@dataclass(kw_only=True)
class LavisDatasetConfig(DatasetConfig, LavisEnvironment):
    """A dataset builder of LAVIS; what is not given comes from LAVIS, which then downloads the annotations."""

    builder: str = setting(help="LAVIS's name, e.g. coco_caption, coco_vqa, sbu_caption")
    config: str | None = setting(None, help="YAML file of LAVIS's layout instead of LAVIS's own")
    annotations: dict[str, str | list[str]] | None = setting(None, help="annotation file or files of every split")
    images: str | None = setting(None, help="folder of the pictures")
    text_processor: str | None = setting(None, help="LAVIS's processor for the texts, e.g. blip_caption")
    answer: str | None = setting(
        None, help="key of the item that holds the answer; default: answers, answer or text_output"
    )
    options: dict[str, Any] = setting(factory=dict, help="further keys of the builder's configuration")
