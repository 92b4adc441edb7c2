"""Pictures to tensors with PIL and numpy, which match the original implementations bit for bit."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from minivlm.processors.configs import ImageConfig
from minivlm.processors.fingerprint import code_of

if TYPE_CHECKING:
    import torch

_RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def open_image(image: Any, *, keep_alpha: bool = False) -> Image.Image:
    """A path, file or PIL image as RGB; an alpha channel is dropped, as the published systems do.

    With ``keep_alpha`` a picture with that channel is RGBA. Raises OSError for a file that is missing or no
    readable picture.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGBA" if keep_alpha and image.mode in ("RGBA", "LA") else "RGB")
    try:
        with Image.open(image) as opened:
            return open_image(opened, keep_alpha=keep_alpha)
    except Image.DecompressionBombError as error:
        raise OSError(f"picture {image} is too large: {error}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no picture {image}") from error
    except (OSError, EOFError, RuntimeError, SyntaxError, ValueError) as error:  # what Pillow's decoders raise
        raise OSError(f"cannot read picture {image}: {error}") from error


def image_hash(image: Any) -> str:
    """Hash of a picture's content: the bytes of the file, on disk or in memory, or the pixels of a PIL image.

    A file that has not changed since is read once only. Raises OSError if there is none.
    """
    if isinstance(image, io.BytesIO):
        return hashlib.sha1(image.getbuffer()).hexdigest()
    if isinstance(image, Image.Image):
        image = image.convert("RGB")  # indices alone do not tell the colours of a palette
        return hashlib.sha1(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()
    state = os.stat(image)
    return _file_hash(str(image), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1_000_000)
def _file_hash(path: str, mtime_ns: int, size: int) -> str:
    return hashlib.sha1(Path(path).read_bytes()).hexdigest()


class ImageTransform:
    """Resize, crop or pad, normalise; keys that the config leaves open come from the encoder."""

    def __init__(self, config: ImageConfig, encoder_settings: Mapping[str, Any]):
        own = {key: value for key, value in vars(config).items() if value is not None}
        settings = {"resize": "squash", "interpolation": "bicubic", **encoder_settings, **own}
        self.size: int = settings["size"]
        self.resize: str = settings["resize"]
        self.interpolation: str = settings["interpolation"]
        self.mean = [float(x) for x in settings["mean"]]
        self.std = [float(x) for x in settings["std"]]
        self.alpha: str = settings["alpha"]
        self.random_crop = config.random_crop

    @property
    def is_random(self) -> bool:
        """Whether it draws at random in training."""
        return self.random_crop is not None

    def __call__(self, image: Image.Image, seed: str | None = None) -> torch.Tensor:
        """RGB or RGBA picture -> float32 [3, size, size].

        ``seed`` is given in training; where ``random_crop`` is set it decides which part is seen.
        """
        import torch

        if self.alpha == "drop" and image.mode == "RGBA":
            image = image.convert("RGB")
        if self.random_crop and seed is not None:
            image = image.crop(random_box(image.width, image.height, self.random_crop, random.Random(seed)))
        pixels = np.asarray(self._fit(image), dtype=np.float32)[..., :3] / np.float32(255)
        mean, std = np.array(self.mean, dtype=np.float32), np.array(self.std, dtype=np.float32)
        pixels = ((pixels - mean) / std).astype(np.float32)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    def _fit(self, image: Image.Image) -> Image.Image:
        resample = _RESAMPLE[self.interpolation]
        if self.resize == "pad":
            image = pad_to_square(image, tuple(int(x * 255) for x in self.mean))
        elif self.resize == "crop":
            image = crop_to_square(image)
        if self.resize != "shortest_edge":
            return resize(image, (self.size, self.size), resample)
        width, height = image.size
        # the longer side is cut off, not rounded, as CLIP's processor does
        longer = int(self.size * max(width, height) / min(width, height))
        size = (self.size, longer) if width <= height else (longer, self.size)
        image = resize(image, size, resample)
        return crop_to_square(image)

    @property
    def fingerprint(self) -> str:
        """Changes whenever the transform would give other pixels: with its settings and its code."""
        settings = json.dumps(vars(self), sort_keys=True).encode()
        return hashlib.sha1(settings + code_of(type(self).__mro__)).hexdigest()[:12]


def resize(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """The picture in ``size`` (width, height), the same to the bit under every version of Pillow.

    A resize is a pass over each axis with rounding between them, so their order shows in the result. Pillow
    always began with the rows until version 13, which begins with the columns where the height shrinks by more
    than twice as many pixels as the width. That is the rule here.
    """
    if image.mode == "RGBA":  # once for both passes, as Pillow does
        return resize(image.convert("RGBa"), size, resample).convert("RGBA")
    columns_first = image.height - size[1] > max(0, 2 * (image.width - size[0]))
    between = (image.width, size[1]) if columns_first else (size[0], image.height)
    return image.resize(between, resample).resize(size, resample)


def random_box(
    width: int, height: int, share: Sequence[float], draw: random.Random, ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> tuple[int, int, int, int]:
    """A part of a picture as (left, top, right, bottom), of a share of its area (Szegedy et al. 2014).

    Share and ratio of the sides (its logarithm) are drawn evenly; after ten draws that do not fit, the middle
    of the picture is taken, as much of it as the ratios allow.
    """
    for _ in range(10):
        area = width * height * draw.uniform(*share)
        sides = math.exp(draw.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * sides)), round(math.sqrt(area / sides))
        if 0 < w <= width and 0 < h <= height:
            left, top = draw.randint(0, width - w), draw.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * ratio[1]))), min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def crop_to_square(image: Image.Image) -> Image.Image:
    """The square of the shorter side in the middle of the picture (Imp v1.5)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The picture in the middle of a square of its longer side (LLaVA-1.5)."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
