"""Settings of the datasets (free of torch: they are the schema of the YAML nodes)."""

from __future__ import annotations

from dataclasses import dataclass

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
class LlavaJsonConfig(DatasetConfig):
    """LLaVA-1.5 records: ``{id, image: path or list, conversations: [{from, value}]}``."""

    annotations: dict[str, str] | str = setting(help="JSON or JSONL file, or one for each split")
    images: str | None = setting(None, help="folder of the pictures; default: the annotation file's folder")


@dataclass(kw_only=True)
class EasyVQAConfig(DatasetConfig):
    """easy-VQA from its PyPI package, with the official test split."""

    form: str = setting(
        "question",
        choices=("caption", "conversation", "question"),
        help="of the training split: a caption of the shape; conversations about a picture; single questions. "
        "The other splits always hold single questions",
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
