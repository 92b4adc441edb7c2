"""The golden set of Mini-Gemini: its texts, tokenizers and language models, as parts of ours."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import yaml
from golden_mgm import GOLDEN, golden_json, weights_of
from safetensors.torch import load_file
from torch import Tensor

from minivlm import registry
from minivlm.checkpoints.foreign import Format, translate
from minivlm.checkpoints.mgm import LANGUAGE
from minivlm.datasets.configs import LlavaJsonConfig
from minivlm.datasets.llava_json import LlavaJsonBuilder
from minivlm.models.base import Connector, VisionEncoder
from minivlm.models.configs import HFLanguageModelConfig
from minivlm.models.language.hf import HFLanguageModel
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.configs import ProcessorConfig, TemplateConfig
from minivlm.processors.processor import VLMProcessor
from minivlm.processors.template import Template
from minivlm.processors.tokenizer import load_tokenizer
from minivlm.types import Batch, Encoded, Message, Sample

ROLES = {"human": "user", "gpt": "assistant"}
START_END = ("<im_start>", "<im_end>")
WEIGHTS = Format("Mini-Gemini's language model", "model.checkpoint", (), LANGUAGE, always=())


@cache
def expected(folder: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint's outputs."""
    return load_file(GOLDEN / folder / "expected.safetensors")


def template(name: str, **settings: Any) -> Template:
    """A packaged template, with other settings."""
    return Template(TemplateConfig(**yaml.safe_load(registry.get("template", name).read_text()) | settings))


def tokenizer(name: str, start_end: bool = False) -> Any:
    """A tokenizer of the set, with the two tokens around a picture if wanted."""
    made = load_tokenizer(str(GOLDEN / "tokenizers" / name))
    if start_end:
        made.add_tokens(list(START_END), special_tokens=True)
    return made


def messages(conversations: Sequence[dict[str, str]]) -> list[Message]:
    """Turns of the set's records."""
    return [Message(ROLES[turn["from"]], turn["value"]) for turn in conversations]


def train_samples() -> list[Sample]:
    """The training samples of the set."""
    config = LlavaJsonConfig(annotations=str(GOLDEN / "train_samples.json"), images=str(GOLDEN / "images"))
    return list(LlavaJsonBuilder(config, "train_samples").build("train"))


class Picture:
    """Stands for a transform: what counts here are visual tokens, not pixels."""

    def __call__(self, image: Any) -> Tensor:
        return torch.zeros(3, 1, 1)


def processor(folder: str, tokens_per_image: int = 1, **settings: Any) -> VLMProcessor:
    """With one position for a picture, ids are those of the original before it splices."""
    golden = golden_json(f"{folder}/expected.json")
    config, pictures = ProcessorConfig(**settings), {"image": Picture()}
    parts = template(golden["template"]), tokenizer(golden["tokenizer"])
    return VLMProcessor(config, *parts, pictures, tokens_per_image)  # type: ignore[arg-type]


def visual_tokens(folder: str) -> Tensor:
    """The visual tokens of the rows that have a picture; the original gives every row some."""
    rows = [bool(sample.images) for sample in train_samples()]
    projected = expected(folder)["feat.projected"]
    return projected[torch.tensor(rows[: len(projected)])]


def encoded(folder: str, **settings: Any) -> tuple[VLMProcessor, list[Encoded]]:
    """The training samples of a checkpoint as numbers, pictures as the visual tokens of the set."""
    visual = visual_tokens(folder)
    made = processor(folder, visual.shape[1], **settings)
    rows = [made.encode(sample) for sample in train_samples()[: len(expected(folder)["batch.input_ids"])]]
    for row, tokens in zip([row for row in rows if row.tokens_per_image], visual, strict=True):
        row.pixels, row.features = {}, [tokens]
    return made, rows


def batch_of(folder: str, left: bool = False, **settings: Any) -> Batch:
    """The batch of a checkpoint, with labels also when it is padded on the left."""
    made, rows = encoded(folder, **settings)
    if not left:
        return made.collate(rows)
    batch, length = made.collate(rows, for_generation=True), max(len(row.input_ids) for row in rows)
    batch.labels = torch.tensor([[-100] * (length - len(row.labels)) + row.labels for row in rows])
    return batch


class Given(Connector):
    """The features are visual tokens already."""

    def forward(self, features: Tensor) -> Tensor:
        return features


@cache
def model(folder: str, router_loss: float | None = None) -> VisionLanguageModel:
    """The language model of a checkpoint (of the base one where HD shares it) behind given visual tokens."""
    config = {k: v for k, v in golden_json(f"{folder}/config.json").items() if not k.startswith(("mm_", "image_"))}
    kind = config.pop("model_type").partition("_")[2] or "llama"
    settings = {"model_type": kind, **{k: v for k, v in config.items() if k not in ("architectures", "torch_dtype")}}
    language = HFLanguageModel(HFLanguageModelConfig(config=settings, router_loss=router_loss), config["vocab_size"])
    own = {f"language_model.{name}" for name in language.state_dict()}
    given = translate(WEIGHTS, load_file(weights_of(folder)), own).tensors
    named = {name: given[name] for name in own & set(given)}
    lacking = {
        id(language.state_dict(keep_vars=True)[name.removeprefix("language_model.")]) for name in own - set(given)
    }
    assert lacking <= {id(language.model.get_input_embeddings().weight)}, "a tied head is all that may lack"
    language.load_state_dict({n.removeprefix("language_model."): t for n, t in named.items()}, strict=False)
    connector = Given()
    connector.tokens_per_image = visual_tokens(folder).shape[1]
    return VisionLanguageModel(VisionEncoder(), connector, language).eval()
