"""The golden set of MiniMind-V: where it lies, what is in it, its models by our configuration.

The default copy holds only those rows of the dense models' embeddings that its ids use; the other rows become zeros, so
that what stands in front of the output head is the original's, but losses over the vocabulary are not (``is_whole``).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_compared import Compared
from helpers import ROOT
from safetensors.torch import load_file, save_file
from torch import Tensor

from minivlm.api import assemble
from minivlm.checkpoints.minimind_folder import language_config
from minivlm.config.loader import parse_model
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.processor import VLMProcessor
from minivlm.types import IGNORE_INDEX, IMAGE_TOKEN_ID, Batch

DEFAULT = ROOT / "tests" / "golden" / "minimind_v"
GOLDEN = Path(os.environ.get("MINIVLM_GOLDEN", ROOT / "tests" / "golden")) / "minimind_v"
ROWS = ".rows"
"""Ends the name of a list of the rows that the tensor of the rest of the name has; others are zeros."""


def golden_json(name: str) -> Any:
    """A JSON file of the set; empty if the set has none of that name."""
    file = GOLDEN / name
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


@cache
def golden_tensors(name: str) -> dict[str, Tensor]:
    """A file of tensors of the set, all rows in place; empty if the set has none of that name."""
    file = GOLDEN / name
    tensors = load_file(file) if file.is_file() else {}
    for key in [key for key in tensors if key.endswith(ROWS)]:
        short = tensors[key.removesuffix(ROWS)]
        whole = short.new_zeros(golden_json(name.replace(".safetensors", "_config.json"))["vocab_size"], short.shape[1])
        whole[tensors.pop(key)] = short
        tensors[key.removesuffix(ROWS)] = whole
    return tensors


def golden_image(name: str) -> Path:
    """A picture of the set."""
    return GOLDEN / "images" / name


MODELS = sorted(
    f"{file.parent.name}/{file.stem.removesuffix('_config')}"
    for file in GOLDEN.glob("*/*_config.json")
    if "vision" not in file.stem
)
"""Names such as ``v1/v1_dense``: the folder of a generation and the file of weights in it."""


def settings(name: str) -> dict[str, Any]:
    """The original's configuration of a model."""
    return golden_json(f"{name}_config.json")


def is_first(name: str) -> bool:
    """Whether a model is of the first version."""
    return "dim" in settings(name)


def has_experts(name: str) -> bool:
    """Whether the language model of a model is a mixture of experts."""
    return bool(settings(name)["use_moe"])


def is_whole(name: str) -> bool:
    """Whether the set has all rows of the embeddings."""
    return not any(key.endswith(ROWS) for key in load_file(GOLDEN / f"{name}.safetensors"))


def expected(name: str) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Numbers and tensors of a model's generation, and how the names of its own begin."""
    generation, own = name.split("/")
    return golden_json(f"{generation}/expected.json"), golden_tensors(f"{generation}/expected.safetensors"), own


@cache
def scratch() -> Path:
    """A folder for files in the original's form, gone when the tests end."""
    folder = tempfile.TemporaryDirectory(prefix="minimind_")
    _KEPT.append(folder)
    return Path(folder.name)


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def original_state(name: str) -> dict[str, Tensor]:
    """The tensors of a model as the original's own files have them: the embeddings and the head, which are one."""
    state = dict(golden_tensors(f"{name}.safetensors"))
    pair = (
        ("tok_embeddings.weight", "output.weight")
        if is_first(name)
        else ("model.embed_tokens.weight", "lm_head.weight")
    )
    table = next(state[key] for key in pair if key in state)
    return state | dict.fromkeys(pair, table)


@cache
def weights(name: str) -> Path:
    """A model's ``.pth`` in the original's form."""
    file = scratch() / f"{name.replace('/', '_')}.pth"
    torch.save(original_state(name), file)
    return file


@cache
def vision_folder(generation: str) -> Path:
    """The vision encoder of a generation as a folder of transformers."""
    (file,) = (GOLDEN / generation).glob("*vision.safetensors")
    kind = "siglip" if "siglip" in file.name else "clip"
    folder = scratch() / generation / kind
    folder.mkdir(parents=True)
    config = golden_json(f"{generation}/{file.stem}_config.json") | {"model_type": f"{kind}_vision_model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(golden_json(f"{generation}/preprocessor.json")))
    save_file({key: tensor.float() for key, tensor in load_file(file).items()}, folder / "model.safetensors")
    return folder


def section(name: str, **language: Any) -> dict[str, Any]:
    """Section ``model``: the packaged model with the sizes of the golden one and the quickstart's tokenizer."""
    config = language_config(settings(name))
    kind = ("v1" if is_first(name) else "v3") + ("_moe" if has_experts(name) else "")
    return {
        "arch": "minimind_v",
        "model_type": kind,
        "vision_encoder": {"path": str(vision_folder(name.split("/")[0]))},
        "language_model": {"tokenizer": "asset:quickstart", "config": config, **language},
    }


def build(name: str, **language: Any) -> tuple[VisionLanguageModel, VLMProcessor]:
    """A golden model from its ``.pth``, in eval mode."""
    config = parse_model(section(name, **language), "golden set")
    config.checkpoint = str(weights(name))
    model, processor, _ = assemble(config)
    return model.eval(), processor


@cache
def golden_model(name: str) -> tuple[VisionLanguageModel, VLMProcessor]:
    """As :func:`build`; tests do not change it."""
    return build(name)


def with_slots(ids: Sequence[int], marks: Sequence[int]) -> list[int]:
    """Ids with IMAGE_TOKEN_ID for the original's placeholders: exact runs of ``marks``, or all of the only one."""
    done, place = list(ids), 0
    if len(marks) == 1:
        return [IMAGE_TOKEN_ID if i == marks[0] else i for i in done]
    while place <= len(done) - len(marks):
        if done[place : place + len(marks)] == list(marks):
            done[place : place + len(marks)] = [IMAGE_TOKEN_ID] * len(marks)
            place += len(marks) - 1
        place += 1
    return done


def make_batch(
    name: str, ids: Tensor, labels: Tensor, images: Sequence[str] = (), features: Tensor | None = None
) -> Batch:
    """Stored ids [B, L] and labels [B, L] as a batch; ``images`` in order, or their ``features``."""
    slots = torch.tensor([with_slots(row, settings(name)["image_ids"]) for row in ids.tolist()])
    pixels = {}
    if features is None and images:
        _, processor = golden_model(name)
        pixels = {"image": torch.stack([processor.load_pixels(golden_image(each))["image"] for each in images])}
    return Batch(slots, torch.ones_like(slots), labels.long(), pixels=pixels, features=features)


def v1_batch(name: str, split: str) -> tuple[Batch, Tensor]:
    """The batch of a split of the first version, and its mask [B, L - 1], which counts in the original's mean."""
    _, tensors, _ = expected(name)
    x, y, mask = (tensors[f"{split}/{key}"].long() for key in ("X", "Y", "loss_mask"))
    ids = torch.cat([x, y[:, -1:]], 1)
    trained = (mask == 1) & (y != 0)
    labels = torch.cat([torch.full_like(x[:, :1], IGNORE_INDEX), y.masked_fill(~trained, IGNORE_INDEX)], 1)
    images = [record["image"] for record in golden_json(f"v1/{split}.json")]
    features = next((tensors[key] for key in tensors if key.endswith(f"/{split}/features")), None)  # the same for all
    return make_batch(name, ids, labels, images, features), mask


def v3_batch(name: str, kind: str) -> Batch:
    """The batch ``single`` or ``multi`` of the newest version."""
    numbers, tensors, _ = expected(name)
    chosen = numbers[f"{kind}_image_batch"]
    rows = golden_json("head/conversations.json")
    images = [image for i in chosen for image in rows[numbers["samples"][i]["row"]]["images"]]
    return make_batch(name, tensors["input_ids"][chosen], tensors["labels"][chosen], images)


@pytest.fixture
def compared() -> Iterator[Compared]:
    """Fails a test that has compared nothing, but where another set lacks what it wants."""
    counter = Compared(relative=1e-4)
    yield counter
    assert counter.count > 0 or GOLDEN != DEFAULT, "nothing was compared"
