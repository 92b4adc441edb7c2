"""A stand-in for LAVIS with the few functions that minivlm/lavis/server.py uses, small enough for every test.

It is imported by the process that the tests start, never by the tests. Like LAVIS it prints to stdout.
"""

from __future__ import annotations

import json
import os
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image

from lavis.common.registry import register

print("LAVIS prints when it is imported")
os.write(1, b"and so do libraries below Python\n")
assert "minivlm" not in sys.modules and sys.stdin.read() == ""


class FakeModel(torch.nn.Module):
    """Mean colour of every patch of 16 x 16 pixels, times a weight that a file may hold."""

    PRETRAINED_MODEL_CONFIG_DICT = {"base": "model.yaml"}

    @classmethod
    def default_config_path(cls, model_type):
        return os.path.join(os.path.dirname(__file__), cls.PRETRAINED_MODEL_CONFIG_DICT[model_type])

    @classmethod
    def from_config(cls, config):
        model = cls()
        model.image_size = config.image_size
        model.weight = torch.nn.Parameter(torch.full((3,), float(config.get("scale", 1.0))))
        if config.pretrained:
            model.load_state_dict(torch.load(config.pretrained, weights_only=False)["model"], strict=False)
        return model

    def pool(self, pixels):
        print("a line for every batch")
        assert pixels.shape[-1] == self.image_size
        tokens = torch.nn.functional.avg_pool2d(pixels, 16).flatten(2).transpose(1, 2)
        return tokens * self.weight


@register("model", "fake_extractor")
class FakeExtractor(FakeModel):
    def extract_features(self, samples, mode="multimodal"):
        assert mode == "image"
        tokens = self.pool(samples["image"])
        return SimpleNamespace(image_embeds=tokens, image_embeds_proj=tokens[:, :, :2])

    def visual_encoder(self, pixels):
        return self.pool(pixels)

    def ln_vision(self, tokens):
        return -tokens


@register("model", "fake_forward")
class FakeForward(FakeModel):
    def forward_image(self, pixels):
        return self.pool(pixels).mean(1), "the ViT's"


@register("model", "fake_broken")
class FakeBroken(FakeModel):
    def extract_features(self, samples):
        raise RuntimeError("the features are broken")


@register("model", "fake_dying")
class FakeDying(FakeModel):
    def extract_features(self, samples):
        print("out of memory, sorry", file=sys.stderr)
        os._exit(7)


@register("model", "fake_offline")
class FakeOffline(FakeModel):
    @classmethod
    def from_config(cls, config):
        raise ConnectionError("no route to the hub")


@register("model", "fake_slow")
class FakeSlow(FakeModel):
    def extract_features(self, samples):
        time.sleep(60)


class Resize:
    def __init__(self, size):
        self.size, self.interpolation = (size, size), SimpleNamespace(value="nearest")

    def __call__(self, image):
        return image.resize(self.size, Image.Resampling.NEAREST)


class Normalize:
    def __init__(self, mean, std):
        self.mean, self.std = mean, std

    def __call__(self, image):
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 255
        return (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


@register("processor", "fake_image_eval")
class FakeImage:
    def __init__(self, config):
        mean, std = config.get("mean", [0.5] * 3), config.get("std", [0.25] * 3)
        self.transform = SimpleNamespace(transforms=[Resize(config.get("image_size", 32)), Normalize(mean, std)])

    @classmethod
    def from_config(cls, config):
        return cls(config)

    def __call__(self, image):
        for step in self.transform.transforms:
            image = step(image)
        return image


@register("processor", "fake_image_train")
class FakeRandomImage(FakeImage):
    def __call__(self, image):
        return super().__call__(image) + torch.randn(()) + np.random.rand()


@register("processor", "fake_text")
class FakeText:
    @classmethod
    def from_config(cls, config):
        return lambda text: config.get("prompt", "") + text.lower()


class FakeDataset:
    def __init__(self, split, file, images, text):
        self.split, self.images, self.text = split, images, text
        with open(file) as stream:
            self.annotation = json.load(stream)

    def __len__(self):
        return len(self.annotation)

    def __getitem__(self, index):
        record = self.annotation[index]
        if "video" in record:
            return {"video": torch.zeros(2, 3, 4, 4), "text_input": "a film"}
        image = Image.open(os.path.join(self.images, record["image"])).convert("RGB")
        if self.split != "train":
            return {"image": image, "instance_id": str(index)}
        if "question" in record:
            answers = {"weights": [0.25, 0.75], "answers": record["answer"]}
            return {"image": image, "text_input": self.text(record["question"]), **answers}
        return {"image": image, "text_input": self.text(record["caption"]), "image_id": index}


@register("builder", "fake_dataset")
class FakeBuilder:
    def __init__(self, config):
        build_info = {"annotations": {}, "images": {"storage": "nowhere"}}
        self.config = OmegaConf.create({"data_type": "images", "build_info": build_info})

    def build_datasets(self):
        assert self.config.vis_processor is None
        info, text = self.config.build_info, str
        if self.config.get("text_processor"):
            text = FakeText.from_config({"prompt": f"{self.config.text_processor.train.name}: "})
        return {k: FakeDataset(k, v.storage, info.images.storage, text) for k, v in info.annotations.items()}
