"""Pictures cropped at random in training: which part is seen, who sees it, and what it excludes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import golden_section, tiny_model
from PIL import Image

import minivlm
from minivlm import api, registry
from minivlm.api import assemble
from minivlm.config import ConfigError
from minivlm.config.loader import parse_model
from minivlm.datasets.feature_cache import FeatureCache, FeatureCacheError
from minivlm.datasets.training_set import TrainingSet
from minivlm.processors.configs import Blip2ImageConfig, ImageConfig
from minivlm.processors.image import ImageTransform, random_box
from minivlm.types import Message, Sample

CLIP = {"size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def picture(width: int = 80, height: int = 60) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, x], axis=-1).astype(np.uint8))


def cropping_model() -> Any:
    section = tiny_model()
    section["processor"] = {"name": "vlm", "image": {"name": "blip2_image_train", "random_crop": [0.5, 1.0]}}
    return assemble(parse_model(section, "test"))


@pytest.mark.parametrize("size", [(80, 60), (30, 200), (7, 7), (1, 40)])
def test_boxes_lie_inside_and_have_the_share_and_the_sides_that_were_asked_for(size: tuple[int, int]) -> None:
    draw = random.Random(0)
    boxes = [random_box(*size, (0.5, 1.0), draw) for _ in range(300)]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    if size == (80, 60):
        shares = [(r - x) * (b - y) / (80 * 60) for x, y, r, b in boxes]
        ratios = [(r - x) / (b - y) for x, y, r, b in boxes]
        assert 0.48 < min(shares) < 0.55 and 0.9 < max(shares) <= 1
        assert min(ratios) > 0.73 and max(ratios) < 1.36
        assert len({box[:2] for box in boxes}) > 100
    if size == (30, 200):
        assert {b - y for _, y, _, b in boxes} == {40}, "no such part fits: the middle, three to four"


def test_a_seed_decides_and_without_one_the_whole_picture_is_seen() -> None:
    transform = ImageTransform(Blip2ImageConfig(random_crop=[0.5, 1.0]), CLIP)
    whole = ImageTransform(Blip2ImageConfig(), CLIP)(picture())
    assert torch.equal(transform(picture()), whole)
    seen = [transform(picture(), seed) for seed in ("1", "2", "1")]
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], whole)
    assert torch.equal(ImageTransform(Blip2ImageConfig(), CLIP)(picture(), "1"), whole)


def test_the_pictures_of_blip2_are_whatever_the_encoder_says() -> None:
    strange = CLIP | {"resize": "pad", "interpolation": "nearest"}
    pixels = registry.get("processor", "blip2_image_eval")(Blip2ImageConfig(size=24), strange)(picture())
    small = np.asarray(picture().resize((24, 24), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    mean = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
    std = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
    assert np.allclose(pixels.numpy(), ((small - mean) / std).transpose(2, 0, 1), atol=1e-6)


def test_training_crops_anew_every_pass_and_evaluation_never(tmp_path: Path) -> None:
    _, processor, _ = cropping_model()
    samples = [Sample(str(i), [Message("user", "<image>?"), Message("assistant", "red")], [picture()]) for i in (0, 1)]
    data = TrainingSet([samples], processor, 7, "raise")
    pixels = {key: data[key].pixels["image"][0] for key in ((0, 0), (1, 0), (0, 1))}
    assert torch.equal(pixels[0, 0], data[0, 0].pixels["image"][0]), "as after a resume"
    assert not torch.equal(pixels[0, 0], pixels[0, 1]) and not torch.equal(pixels[0, 0], pixels[1, 0])
    whole = processor.load_pixels(picture())["image"]
    assert torch.equal(processor.encode(samples[0]).pixels["image"][0], whole)
    assert torch.equal(processor.prompt_sample(samples[0]).pixels["image"][0], whole)
    both = Sample("2", [Message("user", "<image><image>"), Message("assistant", "red")], [picture(), picture()])
    first, second = processor.encode(both, seed=0).pixels["image"]
    assert not torch.equal(first, second), "every picture of a sample has a part of its own"


def test_a_cache_of_features_refuses_them(tmp_path: Path) -> None:
    model, processor, _ = cropping_model()
    with pytest.raises(FeatureCacheError, match="random_crop: null"):
        FeatureCache.for_model(tmp_path, model, processor)


@pytest.mark.parametrize("share", [[0.5], [0.9, 0.5], [0.5, 1.5], [0.0, 1.0]])
def test_shares_that_make_no_sense(share: list[float]) -> None:
    section = tiny_model() | {"processor": {"name": "vlm", "image": {"random_crop": share}}}
    with pytest.raises(ConfigError, match="random_crop"):
        parse_model(section, "test")
    assert ImageConfig(random_crop=[0.5, 0.5]).random_crop == [0.5, 0.5]


def test_laviss_form_returns_the_processors_of_the_era(monkeypatch: pytest.MonkeyPatch) -> None:
    for arch, model_type in (("minigpt4", "pretrain_vicuna0"), ("mini_gpt4", "pretrain_vicuna")):
        section = golden_section(arch, model_type)
        monkeypatch.setattr(api, "registry_model", lambda *_, section=section: parse_model(section, "test"))
        _, pictures, texts = minivlm.load_model_and_preprocess(arch, model_type)
        assert texts["train"]("A Boat!") == texts["eval"]("A Boat!") == "a boat"
        assert torch.equal(pictures["eval"](picture()), pictures["eval"](picture()))
        same = torch.equal(pictures["train"](picture()), pictures["train"](picture()))
        assert same == (arch == "minigpt4"), "the first era crops at random"
