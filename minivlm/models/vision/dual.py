"""Two encoders for one picture: tokens of its low resolution, and the cells of the high one that belong to them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from minivlm.models.base import ModelError, VisionEncoder
from minivlm.models.build import build_inner
from minivlm.models.configs import DualVisionConfig
from minivlm.models.hub import join_hashes
from minivlm.models.vision.maps import new_features, resize_into

_KEY = "model.vision_encoder"


class DualVisionEncoder(VisionEncoder):
    """The dual encoders of Mini-Gemini (Li et al. 2024, sections 3.1 and 3.3), of any two encoders.

    The picture comes in high resolution, in the statistics of ``low``. Its low resolution is computed from it and
    cut into ``grid`` x ``grid`` crops, row by row; ``global_view`` puts the whole picture in front of them, with
    cells scaled down. Every token holds its own channels, then those of the square of cells which covers it:
    ``low_size + cells * high_size``, where ``cells`` is a square number, row by row.
    """

    def __init__(self, config: DualVisionConfig):
        super().__init__()
        self.config = config
        self.low: VisionEncoder = build_inner(f"{_KEY}.low", "vision_encoder", config.low)
        self.high: VisionEncoder = build_inner(f"{_KEY}.high", "vision_encoder", config.high)
        for name, encoder in (("low", self.low), ("high", self.high)):
            _check_squares(f"{_KEY}.{name}", encoder)
        if config.global_view and config.grid == 1:
            raise ModelError(f"{_KEY}.global_view: with grid 1 the crop is the whole picture; leave it out")
        tokens, cells = self.low.grid[0] * config.grid, self.high.grid[0]
        if cells % tokens:
            raise ModelError(
                f"{_KEY}: {cells} x {cells} cells of high cannot be shared among {tokens} x {tokens} tokens of low "
                f"(grid {config.grid}): choose an image_size of high that gives a multiple of {tokens}"
            )
        self.low_size, self.high_size = self.low.hidden_size, self.high.hidden_size
        self.cells = (cells // tokens) ** 2
        self.views = config.grid**2 + config.global_view
        self.hidden_size = self.low_size + self.cells * self.high_size
        self.num_tokens = self.views * self.low.grid[0] ** 2
        # Tokens stand crop by crop, so that only a single crop is a picture of tokens.
        self.grid = self.low.grid if config.grid == 1 else (self.num_tokens, 1)
        self.image_settings = {**self.low.image_settings, "size": self.high.image_settings["size"]}
        self.can_train = self.low.can_train and self.high.can_train
        self._note_source()
        self._compare_statistics()

    def _note_source(self) -> None:
        """Where the weights of both came from, if files or folders give all of them."""
        low, high = self.low.source, self.high.source
        if not low or not high or self.low.unsourced or self.high.unsourced:
            return
        self.source = {**high, **low}
        if "path" in low and "path" in high:
            self.source["also"] = high["path"]
        if "sha256" in self.source:
            self.source["sha256"] = join_hashes(low.get("sha256", ""), high.get("sha256", ""))

    def _compare_statistics(self) -> None:
        """``high`` gets pixels in statistics of its own: ``pixels * scale + shift``, if they differ."""
        low, high = (
            {key: [float(x) for x in encoder.image_settings[key]] for key in ("mean", "std")}
            for encoder in (self.low, self.high)
        )
        self.renormalise = low != high
        self.scale: Tensor
        self.shift: Tensor
        scale = [a / b for a, b in zip(low["std"], high["std"], strict=True)]
        shift = [(a - b) / c for a, b, c in zip(low["mean"], high["mean"], high["std"], strict=True)]
        self.register_buffer("scale", torch.tensor(scale).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.tensor(shift).view(3, 1, 1), persistent=False)

    def fits(self, name: str, shape: torch.Size) -> bool:
        """As the encoder says to which the tensor belongs."""
        encoder, _, rest = name.partition(".")
        return encoder in ("low", "high") and getattr(self, encoder).fits(rest, shape)

    def train(self, mode: bool = True) -> DualVisionEncoder:
        """Set train mode, except for an encoder that is frozen."""
        super().train(mode)
        for encoder in (self.low, self.high):
            if _is_frozen(encoder):
                encoder.train_frozen(mode)
        return self

    def train_frozen(self, mode: bool) -> None:
        """Each encoder does what its own recipe asks for."""
        self.eval()
        self.low.train_frozen(mode)
        self.high.train_frozen(mode)

    @property
    def is_random_when_frozen(self) -> bool:
        """Whether one of the two is."""
        return self.low.is_random_when_frozen or self.high.is_random_when_frozen

    def forward(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] in high resolution -> [N, num_tokens, low_size + cells * high_size]."""
        low = _run(self.low, self.low_pictures(pixels).flatten(0, 1))
        patches = self.low.grid[0] ** 2
        tokens = low[:, -patches:].reshape(len(pixels), self.num_tokens, self.low_size)
        high = _run(self.high, pixels * self.scale + self.shift if self.renormalise else pixels)
        side = self.high.grid[0]
        cells = high[:, -side * side :].unflatten(1, (side, side))
        features = new_features(tokens, *tokens.shape[:2], self.hidden_size)
        features[..., : self.low_size] = tokens
        local = self.config.grid**2 * patches
        self._place(features[:, -local:], cells, self.config.grid)
        if self.config.global_view:
            small = cells.new_empty(len(cells), *[side // self.config.grid] * 2, self.high_size)
            resize_into(small, cells.permute(0, 3, 1, 2))
            self._place(features[:, :patches], small, 1)
        return features

    def low_pictures(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, views, 3, h, w]: what ``low`` sees, the whole picture before its crops."""
        grid, side = self.config.grid, int(self.low.image_settings["size"])
        picture = _resize(pixels, grid * side)
        crops = picture.unflatten(3, (grid, side)).unflatten(2, (grid, side)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        return torch.cat([_resize(picture, side)[:, None], crops], dim=1) if self.config.global_view else crops

    def _place(self, features: Tensor, cells: Tensor, grid: int) -> None:
        """Write cells [N, S, S, A] behind the tokens [N, grid * grid * n * n, ...] whose squares they are in."""
        n, m = self.low.grid[0], round(self.cells**0.5)
        target = features[..., self.low_size :].unflatten(-1, (m, m, self.high_size)).unflatten(1, (grid, grid, n, n))
        source = cells.unflatten(2, (grid, n, m)).unflatten(1, (grid, n, m))
        target.copy_(source.permute(0, 1, 4, 2, 5, 3, 6, 7))


def _check_squares(key: str, encoder: VisionEncoder) -> None:
    rows, columns = encoder.grid
    if rows != columns or encoder.num_tokens < rows * columns:
        raise ModelError(
            f"{key}: it gives {encoder.num_tokens} tokens and {rows} x {columns} patches; an encoder is wanted whose "
            "patches are a square (class_token: drop)"
        )
    if list(encoder.inputs) != ["image"] or isinstance(encoder, DualVisionEncoder):
        raise ModelError(f"{key}: an encoder of a single picture is wanted here")


def _is_frozen(encoder: VisionEncoder) -> bool:
    return not any(parameter.requires_grad for parameter in encoder.parameters())


def _run(encoder: VisionEncoder, pixels: Tensor) -> Any:
    with torch.no_grad() if _is_frozen(encoder) else nullcontext():
        return encoder(pixels)


def _resize(pixels: Tensor, side: int) -> Tensor:
    return interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False)
