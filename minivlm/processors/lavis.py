"""Picture and text processors of LAVIS, run by LAVIS itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from minivlm.lavis.client import LavisError, connect, request
from minivlm.lavis.configs import LavisEnvironment
from minivlm.processors.configs import LavisImageConfig

if TYPE_CHECKING:
    import torch


class LavisImageTransform:
    """A picture processor of LAVIS in the place of :class:`~minivlm.processors.image.ImageTransform`.

    Every worker of a DataLoader starts a process with LAVIS of its own.
    """

    def __init__(self, config: LavisImageConfig, encoder_settings: Mapping[str, Any]):
        defaults = {"image_size": encoder_settings["size"]}
        defaults |= {key: list(encoder_settings[key]) for key in ("mean", "std")}
        self.environment: LavisEnvironment = config
        self.size: int = encoder_settings["size"]
        self.processor = {"name": config.processor, "options": {**defaults, **config.options}}

    @property
    def is_random(self) -> bool:
        """Whether it draws at random, as LAVIS's processors for training do."""
        return str(self.processor["name"]).endswith("_train")

    def __call__(self, image: Image.Image, seed: str | None = None) -> torch.Tensor:
        """RGB picture -> float32 [3, size, size]; ``seed`` decides what is drawn at random, None is one more seed.

        Raises :class:`LavisError`.
        """
        import torch

        number = int(hashlib.sha1(str(seed).encode()).hexdigest()[:7], 16)
        picture = {"picture": np.asarray(image)}
        _, arrays = request(self.environment, "picture", picture, processor=self.processor, seed=number)
        pixels = torch.from_numpy(arrays["pixels"])
        if pixels.shape != (3, self.size, self.size):
            raise LavisError(
                f"LAVIS's processor '{self.processor['name']}' made {list(pixels.shape)} of a picture, "
                f"but the encoder wants {[3, self.size, self.size]}"
            )
        return pixels

    @property
    def fingerprint(self) -> str:
        """Changes whenever the processor would give other pixels."""
        identity = [connect(self.environment).versions["salesforce-lavis"], self.processor]
        return hashlib.sha1(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def process_text(environment: LavisEnvironment, processor: str, text: str, **options: Any) -> str:
    """A text as a LAVIS processor such as ``blip_caption`` leaves it; ``options`` are the processor's settings."""
    answer, _ = request(environment, "text", processor={"name": processor, "options": options}, text=text)
    return str(answer["text"])
