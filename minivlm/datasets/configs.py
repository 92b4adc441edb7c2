"""Settings of the datasets (free of torch: they are the schema of the YAML nodes)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minivlm.lavis.configs import LavisEnvironment
from minivlm.schema import setting


@dataclass(kw_only=True)
class DatasetConfig:
    """What every dataset node may hold."""

    sample_ratio: float | None = setting(None, gt=0, help="weight in the mix; default: every sample once an epoch")
    max_samples: int | None = setting(None, ge=1, help="use only the first so many samples of a split")


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
