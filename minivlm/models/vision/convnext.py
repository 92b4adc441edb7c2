"""A ConvNeXt (Liu et al. 2022) with all its stages in the output, as Mini-Gemini sees high resolution.

The parameters have the names of OpenCLIP below ``visual.trunk``, and of timm.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minivlm.models.base import ModelError, VisionEncoder, on_meta_device
from minivlm.models.configs import ConvNeXtMultiscaleConfig
from minivlm.models.hub import find_file, hash_tensors, read_tensors
from minivlm.models.vision.maps import new_features, resize_into

_KEY = "model.vision_encoder"
_TRUNK = "visual.trunk."
_CLIP = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
Sizes = tuple[tuple[int, ...], tuple[int, ...]]
_VARIANTS: dict[str, Sizes] = {
    "convnext_base_w_320": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnext_large_d_320": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "convnext_xxlarge": ((3, 4, 30, 3), (384, 768, 1536, 3072)),
}
_DEFAULT = "convnext_large_d_320"
_EPS: dict[Sizes, float] = {_VARIANTS["convnext_xxlarge"]: 1e-5}
"""Of the norms, by the sizes: no shape tells it. All others have 1e-6."""
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_SETTINGS = "open_clip_config.json"


class ConvNeXtMultiscale(VisionEncoder):
    """Stem and stages; the outputs of stages 1-3 are scaled up to that of stage 0 and joined with it.

    Mini-Gemini (Li et al. 2024, section 3.1): of 768 pixels 192 x 192 cells with 2880 channels. A size that the
    strides do not divide is rounded down at each of them.
    """

    def __init__(self, config: ConvNeXtMultiscaleConfig):
        super().__init__()
        from timm.models.convnext import ConvNeXt

        weights = _read_trunk(config)
        settings = _read_settings(config)
        depths, widths = sizes = _sizes(config, weights, settings)
        whole = ConvNeXt(
            depths=depths,
            dims=widths,
            norm_eps=_EPS.get(sizes, 1e-6),
            drop_path_rate=config.drop_path_rate,
            num_classes=0,
        )
        self.config, self.sizes = config, sizes
        self.stem: nn.Module = whole.stem
        self.stages: Any = whole.stages
        for stage in self.stages:
            stage.grad_checkpointing = config.gradient_checkpointing
        side = config.image_size // 4
        self.hidden_size = sum(widths)
        self.grid = (side, side)
        self.num_tokens = side * side
        self.image_settings = {
            "size": config.image_size,
            "resize": "shortest_edge",
            "interpolation": "bicubic",
            **_statistics(settings),
            **{key: value for key, value in (("mean", config.mean), ("std", config.std)) if value},
        }
        if config.path and not on_meta_device():
            self._load(config.path, config.revision, weights)

    def _load(self, path: str, revision: str | None, weights: dict[str, Tensor]) -> None:
        try:
            self.load_state_dict(weights)
        except RuntimeError as error:
            raise ModelError(f"{_KEY}.path: {path} holds another ConvNeXt: {error}") from error
        self.built_from = {"path": None, "depths": list(self.sizes[0]), "widths": list(self.sizes[1])}
        self.source = {"path": path, "sha256": hash_tensors(weights.items())}
        self.source |= {"revision": revision} if revision else {}

    @property
    def is_random_when_frozen(self) -> bool:
        """Whether paths are dropped in training although it is frozen."""
        return self.config.drop_path_when_frozen

    def train_frozen(self, mode: bool) -> None:
        """Eval mode, but for the drop paths if the recipe wants them."""
        self.eval()
        for module in self.modules():
            if type(module).__name__ == "DropPath":
                module.train(mode and self.config.drop_path_when_frozen)

    def stage_outputs(self, pixels: Tensor) -> list[Tensor]:
        """[N, 3, H, W] -> the outputs of the four stages, [N, widths[i], H / 4 / 2^i, W / 4 / 2^i]."""
        hidden, outputs = self.stem(pixels), []
        for stage in self.stages:
            hidden = stage(hidden)
            outputs.append(hidden)
        return outputs

    def forward(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, num_tokens, sum of widths], cells row by row."""
        outputs = self.stage_outputs(pixels)
        first = outputs[0]
        joined = new_features(first, len(first), *first.shape[-2:], self.hidden_size)
        start = 0
        while outputs:
            output = outputs.pop(0)
            resize_into(joined[..., start : start + output.shape[1]], output)
            start += output.shape[1]
        return joined.flatten(1, 2)


def _sizes(config: ConvNeXtMultiscaleConfig, weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Sizes:
    """Depths and widths; raises :class:`ModelError` when they are told twice or in part."""
    told = [name for name in ("path", "variant") if getattr(config, name)]
    own = config.depths is not None or config.widths is not None
    if len(told) + own > 1:
        raise ModelError(
            f"{_KEY}: {' and '.join([*told, *['depths and widths'] * own])}: one of them says how large it is"
        )
    if own:
        depths, widths = config.depths or [], config.widths or []
        if len(depths) != 4 or len(widths) != 4:
            raise ModelError(f"{_KEY}: depths and widths want four numbers each, got {depths} and {widths}")
        return tuple(depths), tuple(widths)
    if not weights:
        return _VARIANTS[_variant(settings) if config.path else config.variant or _DEFAULT]
    found = {(int(m[1]), int(m[2])) for name in weights if (m := re.match(r"stages\.(\d)\.blocks\.(\d+)\.", name))}
    gammas = [weights.get(f"stages.{stage}.blocks.0.gamma") for stage in range(4)]
    if any(gamma is None for gamma in gammas):
        raise ModelError(f"{_KEY}.path: {config.path} holds no ConvNeXt with four stages")
    depths = [sum(stage == s for stage, _ in found) for s in range(4)]
    return tuple(depths), tuple(len(gamma) for gamma in gammas if gamma is not None)


def _variant(settings: Mapping[str, Any]) -> str:
    """The name of the sizes that OpenCLIP's settings tell, where no weights are at hand."""
    told = settings["timm_model_name"]
    found = next((name for name in _VARIANTS if name.startswith(told)), None)
    if not told or found is None:
        known = ", ".join(_VARIANTS)
        raise ModelError(f"{_KEY}.path: {_SETTINGS} has the timm_model_name '{told}', of none of {known}")
    return found


def _read_trunk(config: ConvNeXtMultiscaleConfig) -> dict[str, Tensor]:
    """Stem and stages of OpenCLIP's file, or of that in a folder, by our names.

    Nothing where only shapes are wanted and there are no weights, but settings that tell them.
    """
    path, meta = config.path, on_meta_device()
    if path is None:
        return {}
    key = f"{_KEY}.path"
    file = Path(path) if Path(path).is_file() else find_file(key, path, _WEIGHTS, config.revision, fetch=not meta)
    if file is None:
        if meta and find_file(key, path, [_SETTINGS], config.revision):
            return {}
        raise ModelError(f"{key}: there is no {' or '.join(_WEIGHTS)} in {path}")
    kept = (f"{_TRUNK}stem.", f"{_TRUNK}stages.")
    try:
        weights = {n.removeprefix(_TRUNK): tensor for n, tensor in read_tensors([file]) if n.startswith(kept)}
    except Exception as error:  # bytes that mean nothing make unpickling fail in any way
        raise ModelError(f"{key}: {file} cannot be read: {error}") from error
    if not weights:
        raise ModelError(f"{key}: {file} holds no ConvNeXt of OpenCLIP ({_TRUNK}stem.*, {_TRUNK}stages.*)")
    return weights


def _read_settings(config: ConvNeXtMultiscaleConfig) -> dict[str, Any]:
    """timm_model_name, mean and std of ``open_clip_config.json`` beside the weights; nothing where there is none."""
    if config.path is None:
        return {}
    folder = str(Path(config.path).parent) if Path(config.path).is_file() else config.path
    file = find_file(f"{_KEY}.path", folder, [_SETTINGS], config.revision)
    if file is None:
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        vision = content.get("model_cfg", {}).get("vision_cfg", {})
        pixels = content.get("preprocess_cfg", {})
        statistics = {key: [float(x) for x in pixels[key]] for key in _CLIP if key in pixels}
        return {"timm_model_name": str(vision.get("timm_model_name", "")), **statistics}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{_KEY}.path: {file} cannot be read: {error}") from error


def _statistics(settings: Mapping[str, Any]) -> dict[str, list[float]]:
    """Mean and deviation of OpenCLIP's settings; CLIP's, which OpenCLIP shares, without them."""
    return {key: settings.get(key, usual) for key, usual in _CLIP.items()}
