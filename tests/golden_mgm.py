"""The golden set of Mini-Gemini's visual half: where it lies, its sizes as our settings, its weights by our names."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_compared import Compared
from helpers import ROOT, tiny_model
from safetensors.torch import load_file
from torch import Tensor, nn

from minivlm.checkpoints.foreign import Format, prefixed, translate
from minivlm.checkpoints.mgm import VISUAL
from minivlm.config.loader import parse_model
from minivlm.models.base import VisionEncoder
from minivlm.models.build import build_part
from minivlm.models.connectors.patch_info_mining import PatchInfoMining
from minivlm.models.vision.dual import DualVisionEncoder
from minivlm.processors.configs import ImageConfig
from minivlm.processors.image import ImageTransform, open_image

GOLDEN = Path(os.environ.get("MINIVLM_GOLDEN", ROOT / "tests" / "golden")) / "mini_gemini"


def golden_json(name: str) -> Any:
    """A JSON file of the set."""
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


FOLDERS = sorted(folder.parent.name for folder in GOLDEN.glob("*/expected.json"))
"""Checkpoints: a family of language models, base or HD. What each is its config.json tells."""
BASES = [name for name in FOLDERS if (GOLDEN / name / "model.safetensors").is_file()]
"""Those with weights of their own."""
HDS = [name for name in FOLDERS if golden_json(f"{name}/config.json")["image_grid"] > 1]


def weights_of(folder: str) -> Path:
    """The weights of a checkpoint; HD, which has none, shares those of the base with the same language model."""
    kind = golden_json(f"{folder}/config.json")["model_type"]
    same = (base for base in BASES if golden_json(f"{base}/config.json")["model_type"] == kind)
    return GOLDEN / (folder if folder in BASES else next(same)) / "model.safetensors"


@cache
def golden_tensors(name: str) -> dict[str, Tensor]:
    """A file of tensors of the set."""
    return load_file(GOLDEN / name)


def parts(folder: str, **changes: Any) -> dict[str, Any]:
    """The nodes of encoder and connector of a configuration of the original."""
    given = golden_json(f"{folder}/config.json")
    clip, convnext = golden_json("towers/clip_config.json"), golden_json("towers/convnext_config.json")
    dual = {
        "name": "dual",
        "low": {"name": "hf", "config": clip, "layer": given["mm_vision_select_layer"]},
        "high": {
            "name": "convnext_multiscale",
            "depths": convnext["depths"],
            "widths": convnext["dims"],
            "image_size": given["image_size_aux"],
            **convnext["preprocess_cfg"],
        },
        "grid": given["image_grid"],
        "global_view": given["image_global"],
        **changes,
    }
    return {"vision_encoder": dual, "connector": {"name": "patch_info_mining"}}


@cache
def visual(folder: str, **changes: Any) -> tuple[DualVisionEncoder, PatchInfoMining]:
    """Encoder and connector of a configuration with the weights of the original, which HD shares with the base."""
    given = golden_json(f"{folder}/config.json")
    section = parse_model({**tiny_model(), **parts(folder, **changes)}, "golden set")
    encoder: VisionEncoder = build_part("vision_encoder", section.vision_encoder)
    connector = build_part("connector", section.connector, encoder, given["hidden_size"])
    model = nn.ModuleDict({"vision_encoder": encoder, "connector": connector})
    form = Format("Mini-Gemini", "model.checkpoint", ("*",), prefixed("model.", VISUAL), always=())
    tensors = translate(form, load_file(weights_of(folder)), model.state_dict()).tensors
    model.load_state_dict({n: t for n, t in tensors.items() if n.startswith(("vision_encoder.", "connector."))})
    assert isinstance(encoder, DualVisionEncoder) and isinstance(connector, PatchInfoMining)
    return encoder.eval(), connector.eval()


def pixels(encoder: VisionEncoder, mode: str, name: str) -> Tensor:
    """A picture of the set as the encoder takes it, in one of the original's two modes."""
    settings = ImageConfig(resize={"pad": "pad", "square": "shortest_edge"}[mode])
    return ImageTransform(settings, encoder.image_settings)(open_image(GOLDEN / "images" / name))


def training_pixels(encoder: VisionEncoder, folder: str) -> Tensor:
    """The pictures of the training records; one without has zeros, as the original fills its place."""
    mode = golden_json(f"{folder}/config.json")["image_aspect_ratio"]
    size = encoder.image_settings["size"]
    records = golden_json("train_samples.json")
    rows = [pixels(encoder, mode, r["image"]) if "image" in r else torch.zeros(3, size, size) for r in records]
    return torch.stack(rows)


@pytest.fixture
def compared() -> Iterator[Compared]:
    """Fails a test that has compared nothing."""
    counter = Compared()
    yield counter
    assert counter.count > 0, "nothing was compared"
