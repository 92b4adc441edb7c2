"""Two encoders for one picture, the multi-scale ConvNeXt, patch info mining: values, gradients, errors, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

from minivlm.api import assemble
from minivlm.checkpoints.files import read_weights
from minivlm.checkpoints.loading import identify
from minivlm.checkpoints.native import Manifest, save_model
from minivlm.checkpoints.report import CheckpointError
from minivlm.config.loader import parse_model
from minivlm.datasets.feature_cache import FeatureCache
from minivlm.models.base import ModelError
from minivlm.models.build import build_model, build_part
from minivlm.models.connectors import patch_info_mining
from minivlm.models.connectors.patch_info_mining import PatchInfoMining
from minivlm.models.vision.convnext import ConvNeXtMultiscale
from minivlm.models.vision.dual import DualVisionEncoder
from minivlm.models.vlm import VisionLanguageModel
from minivlm.types import Batch

VIT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
CLIP = {"name": "hf", "config": {"model_type": "clip_vision_model", **VIT}}
SIGLIP = {"name": "hf", "config": {"model_type": "siglip_vision_model", **VIT}}
DINO = {
    "name": "hf",
    "config": {"model_type": "dinov2", **VIT, "hidden_size": 24, "image_size": 56, "patch_size": 14},
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
CONVNEXT = {"name": "convnext_multiscale", "depths": [1, 1, 2, 1], "widths": [4, 6, 8, 10], "image_size": 64}


def section(low: Any = CLIP, high: Any = CONVNEXT, connector: Any = None, **settings: Any) -> dict[str, Any]:
    encoder = {"name": "dual", "low": low, "high": high, **settings}
    return {**tiny_model(), "vision_encoder": encoder, "connector": connector or {"name": "patch_info_mining"}}


def model_of(content: dict[str, Any], **how: Any) -> VisionLanguageModel:
    torch.manual_seed(0)
    return build_model(parse_model(content, "test"), 400, **how)


def dual(*arguments: Any, **settings: Any) -> DualVisionEncoder:
    encoder = model_of(section(*arguments, **settings)).vision_encoder.eval()
    assert isinstance(encoder, DualVisionEncoder)
    return encoder


def convnext(**settings: Any) -> ConvNeXtMultiscale:
    torch.manual_seed(0)
    part = parse_model({**tiny_model(), "vision_encoder": {"name": "convnext_multiscale", **settings}}, "test")
    built = build_part("vision_encoder", part.vision_encoder)
    for name, parameter in built.named_parameters():
        if name.endswith("gamma"):  # 1e-6 at first, as if there were no blocks
            parameter.data.fill_(0.5)
    return built


def mining(low: int = 8, high: int = 12) -> PatchInfoMining:
    """The connector behind an encoder of these sizes, with norms and biases that do something."""
    torch.manual_seed(0)
    encoder = nn.Module()
    encoder.low_size, encoder.high_size, encoder.grid, encoder.num_tokens = low, high, (2, 2), 4
    part = parse_model(section(), "test").connector
    built: PatchInfoMining = build_part("connector", part, encoder, 6)
    for parameter in built.parameters():
        parameter.data.normal_(std=0.5)
    return built


def plain(built: PatchInfoMining, tokens: Tensor, cells: Tensor) -> Tensor:
    """The formula of the paper."""
    query, key, value = built.query(tokens), built.key(cells), built.value(cells)
    logits = torch.einsum("btc,btmc->btm", query, key / tokens.shape[-1] ** 0.5)
    return torch.einsum("btm,btmc->btc", logits.softmax(-1), value)


# --- ConvNeXt -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 77, 100])
def test_stages_are_scaled_up_and_joined(size: int) -> None:
    """Odd sizes are rounded down at every stage; values and gradients of the plain way to join."""
    encoder = convnext(depths=[1, 1, 2, 1], widths=[4, 6, 300, 10], image_size=size).eval()
    pixels = torch.randn(2, 3, size, size)
    side = size // 4
    outputs = encoder.stage_outputs(pixels)
    assert [output.shape[-1] for output in outputs] == [side, side // 2, side // 4, side // 8]
    scaled = [interpolate(o, size=(side, side), mode="bilinear", align_corners=False) for o in outputs]
    expected = torch.cat(scaled, 1).flatten(2).transpose(1, 2)
    features = encoder(pixels)
    assert encoder.grid == (side, side) and features.shape == (2, encoder.num_tokens, 320)
    torch.testing.assert_close(features, expected)
    weights = torch.randn_like(features)
    ours, theirs = (
        torch.autograd.grad((out * weights).sum(), list(encoder.parameters())) for out in (features, expected)
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_checkpointing_and_drop_path_act_in_training_only() -> None:
    plainly = convnext(**{k: v for k, v in CONVNEXT.items() if k != "name"})
    dropping = convnext(**{k: v for k, v in CONVNEXT.items() if k != "name"}, drop_path_rate=0.9)
    lean = convnext(**{k: v for k, v in CONVNEXT.items() if k != "name"}, gradient_checkpointing=True)
    pixels = torch.randn(4, 3, 64, 64)
    assert torch.equal(plainly.eval()(pixels), dropping.eval()(pixels))
    assert not torch.equal(plainly.train()(pixels), dropping.train()(pixels))
    torch.testing.assert_close(plainly(pixels), lean.train()(pixels))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depths": [1, 1, 1, 1]}, "depths and widths want four numbers each"),
        ({"depths": [1, 1], "widths": [4, 4]}, "depths and widths want four numbers each"),
        ({"variant": "convnext_xxlarge", "depths": [1] * 4, "widths": [4] * 4}, "one of them says how large"),
        ({"path": "nowhere"}, "there is no open_clip_model"),
    ],
)
def test_sizes_that_are_not_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        convnext(**settings)


def test_norms_of_the_largest_variant() -> None:
    with torch.device("meta"):
        found = {name: convnext(variant=name).stem[1].eps for name in ("convnext_xxlarge", "convnext_base_w_320")}
    assert found == {"convnext_xxlarge": 1e-5, "convnext_base_w_320": 1e-6}


def open_clip(folder: Path, name: str = "open_clip_pytorch_model.bin", **settings: Any) -> ConvNeXtMultiscale:
    """A folder as OpenCLIP has it, with a text model, and the encoder that it was made of."""
    encoder = convnext(**{"depths": [1, 2, 1, 1], "widths": [4, 6, 8, 10], "image_size": 64, **settings})
    state = {f"visual.trunk.{key}": tensor.clone() for key, tensor in encoder.state_dict().items()}
    state |= {"visual.trunk.norm_pre.weight": torch.ones(10), "visual.head.proj.weight": torch.ones(3, 10)}
    state |= {"text.transformer.weight": torch.ones(5), "logit_scale": torch.ones(())}
    folder.mkdir(exist_ok=True)
    save_file(state, folder / name) if name.endswith("safetensors") else torch.save(state, folder / name)
    config = {"preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return encoder.eval()


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors"])
def test_a_folder_of_open_clip(name: str, tmp_path: Path) -> None:
    """Sizes by shapes, statistics from its configuration; the file alone will do."""
    theirs = open_clip(tmp_path, name)
    pixels = torch.randn(1, 3, 64, 64)
    for path in (tmp_path, tmp_path / name):
        ours = load(path)
        assert torch.equal(ours.eval()(pixels), theirs(pixels))
        assert ours.image_settings["mean"] == [0.1, 0.2, 0.3] and ours.source is not None


def load(path: Path) -> ConvNeXtMultiscale:
    node = {"name": "convnext_multiscale", "path": str(path), "image_size": 64}
    return build_part("vision_encoder", parse_model({**tiny_model(), "vision_encoder": node}, "test").vision_encoder)


def test_a_file_of_open_clip_as_weights(tmp_path: Path) -> None:
    theirs = open_clip(tmp_path, depths=[1, 1, 2, 1])
    file = str(tmp_path / "open_clip_pytorch_model.bin")
    content = {**tiny_model(), "vision_encoder": {**CONVNEXT, "weights": file}}
    model, _, _ = assemble(parse_model(content, "test"))
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.vision_encoder.eval()(pixels), theirs(pixels))
    assert model.vision_encoder.source is not None and model.vision_encoder.source["path"] == file
    form = identify("x", read_weights("x", file))
    assert form is not None and form.name == "OpenCLIP with a ConvNeXt"
    other = {**tiny_model(), "vision_encoder": {**CONVNEXT, "widths": [4, 6, 8, 12], "weights": file}}
    with pytest.raises(CheckpointError, match="channels of stage 3: 10 in the file, 12 in the model"):
        assemble(parse_model(other, "test"))


# --- two encoders ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_any_two_encoders_each_with_its_own_statistics() -> None:
    """SigLIP's tokens, and the 2 x 2 patches of DINOv2 that lie in each of their squares."""
    encoder = dual(SIGLIP, DINO)
    assert (encoder.low_size, encoder.high_size, encoder.cells) == (16, 24, 4)
    assert encoder.image_settings["mean"] == [0.5] * 3 and encoder.image_settings["size"] == 56
    plain = torch.rand(2, 3, 56, 56)
    pixels = (plain - 0.5) / 0.5
    features = encoder(pixels)
    assert features.shape == (2, 4, 16 + 4 * 24)
    small = interpolate(pixels, size=(32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(features[..., :16], encoder.low(small))
    mean, std = (torch.tensor(DINO[key]).view(3, 1, 1) for key in ("mean", "std"))
    cells = encoder.high((plain - mean) / std)
    for token, places in enumerate([(0, 1, 4, 5), (2, 3, 6, 7), (8, 9, 12, 13), (10, 11, 14, 15)]):
        expected = cells[:, places].flatten(1)
        torch.testing.assert_close(features[:, token, 16:], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_crops_and_the_whole_picture() -> None:
    """A crop has the tokens of low for a quarter of the picture, and the cells of that quarter."""
    encoder = dual(grid=2, global_view=True)
    assert encoder.num_tokens == 20 and encoder.views == 5
    pixels = torch.randn(2, 3, 64, 64)  # low sees 2 x 32
    features = encoder(pixels)
    map_of_all = encoder.high(pixels).unflatten(1, (16, 16))
    for crop in range(4):
        top, left = 32 * (crop // 2), 32 * (crop % 2)
        tokens = features[:, 4 * (crop + 1) :][:, :4]
        torch.testing.assert_close(tokens[..., :16], encoder.low(pixels[:, :, top : top + 32, left : left + 32]))
        first = map_of_all[:, top // 4 : top // 4 + 4, left // 4 : left // 4 + 4].flatten(1)
        assert torch.equal(tokens[:, 0, 16:], first)
    without = dual(grid=2)
    assert without.num_tokens == 16 and torch.equal(without(pixels), features[:, 4:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"high": {**CONVNEXT, "image_size": 72}, "grid": 4}, r"18 x 18 cells of high .* 8 x 8 tokens of low"),
        ({"global_view": True}, "with grid 1 the crop is the whole picture"),
        ({"low": {**CLIP, "class_token": "only"}}, r"vision_encoder\.low: it gives 1 tokens and 2 x 2 patches"),
        ({"low": {**CLIP, "freeze": True}}, r"vision_encoder\.low\.freeze: give it as model\.vision_encoder\.freeze"),
        ({"high": {**CONVNEXT, "lora": {"r": 2}}}, r"high\.lora: give it as model\.vision_encoder\.lora"),
        ({"low": {**CLIP, "layer": 7}}, r"model\.vision_encoder\.low\.layer: 7 of a model with 2 layers"),
        ({"high": {"name": "dual", "low": CLIP, "high": CONVNEXT}}, "an encoder of a single picture is wanted"),
    ],
)
def test_encoders_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        model_of(section(**settings))


def test_mining_needs_cells() -> None:
    with pytest.raises(ModelError, match=r"take model\.vision_encoder\.name: dual"):
        model_of({**tiny_model(), "connector": {"name": "patch_info_mining"}})


@pytest.mark.parametrize("trains", ["low", "high", "both", "neither"])
def test_only_what_is_wanted_trains(trains: str) -> None:
    """A frozen encoder has no gradient and stays in eval mode beside one that trains."""
    freeze = {"low": ["high.*"], "high": ["low.*"], "both": False, "neither": True}[trains]
    model = model_of(section(freeze=freeze)).train()
    features = model.extract_features({"image": torch.randn(1, 3, 64, 64)})
    assert features.requires_grad == (trains != "neither")
    if trains != "neither":
        features.square().sum().backward()
    for name in ("low", "high"):
        encoder = getattr(model.vision_encoder, name)
        wanted = trains in (name, "both")
        assert encoder.training == wanted
        assert any(p.grad is not None and p.grad.any() for p in encoder.parameters()) == wanted


def test_under_autocast_features_are_kept_in_its_type() -> None:
    model = model_of(section(freeze=True))
    pixels = {"image": torch.randn(2, 3, 64, 64)}
    full = model.connector(model.extract_features(pixels))
    with torch.autocast("cpu", torch.bfloat16):
        features = model.extract_features(pixels)
        tokens = model._connect(features)
    assert features.dtype == torch.bfloat16
    torch.testing.assert_close(tokens.float(), full, rtol=0.1, atol=0.03)


@pytest.mark.parametrize("always_encodes", [False, True])
def test_with_narrow_weights_a_batch_of_text_passes_under_autocast(always_encodes: bool) -> None:
    """As DeepSpeed trains: the weights are bf16 themselves, and what stands for a picture is fp32."""
    model = model_of(section(freeze=True)).bfloat16().train()
    model.always_encodes = always_encodes
    ids = torch.tensor([[5, 6, 7]])
    batch = Batch(ids, torch.ones_like(ids), labels=ids)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch).loss
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.connector.parameters())


def test_the_projector_is_any_connector() -> None:
    model = model_of(section(connector={"name": "patch_info_mining", "projector": {"name": "mlp", "merge": 2}}))
    assert model.connector.tokens_per_image == 1
    assert model.connector(torch.randn(2, 4, model.vision_encoder.hidden_size)).shape == (2, 1, 32)
    linear = model_of(section(connector={"name": "patch_info_mining", "projector": "linear"}))
    assert linear.connector(torch.randn(2, 4, linear.vision_encoder.hidden_size)).shape == (2, 4, 32)


# --- patch info mining ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [False, True])
def test_mining_is_the_formula_of_the_paper(adapters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and all gradients, also where LoRA stands at the linear layers."""
    built = mining()
    monkeypatch.setattr(patch_info_mining, "_CELLS", {"cpu": 20})  # one token at a time
    if adapters:
        from minivlm.models.lora import add_lora
        from minivlm.schema import LoraSettings

        add_lora("connector", built, LoraSettings(r=2, alpha=2, dropout=0.0))
        for name in sorted(built.adapter_parameters):
            built.get_parameter(name).data.normal_(std=0.3)
    tokens, cells = torch.randn(2, 4, 8, requires_grad=True), torch.randn(2, 4, 9, 12, requires_grad=True)
    ours, theirs = built.mine(tokens, cells), plain(built, tokens, cells)
    torch.testing.assert_close(ours, theirs)
    wanted = [tokens, cells, *(p for n, p in built.named_parameters() if p.requires_grad and "projector" not in n)]
    weights = torch.randn_like(ours)
    for one, other in zip(*(torch.autograd.grad((out * weights).sum(), wanted) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_mining_is_stable() -> None:
    """Cells far from zero, cells that are all alike, and values beyond reach."""
    built = mining()
    tokens, cells = torch.randn(1, 3, 8), torch.randn(1, 3, 9, 12) + 1000
    exact = plain(built.double(), tokens.double(), cells.double()).float()
    torch.testing.assert_close(built.float().mine(tokens, cells), exact, rtol=1e-2, atol=1e-2)
    flat = torch.full((1, 3, 9, 12), 7.0)
    torch.testing.assert_close(built.mine(tokens, flat), plain(built, tokens, flat), rtol=5e-3, atol=5e-3)
    built.key[1].weight.data.fill_(torch.inf)
    assert built.mine(tokens, torch.randn(1, 3, 9, 12)).isfinite().all()


# --- files and sizes ------------------------------------------------------------------------------------------------


def test_the_feature_cache_keeps_both(tmp_path: Path) -> None:
    model, processor, config = assemble(parse_model(section(freeze=True), "test"))
    model.eval()
    settings = {"vision_encoder": config.vision_encoder.config}
    cache = FeatureCache.for_model(tmp_path, model, processor, settings=settings)
    features = model.extract_features({"image": torch.randn(2, 3, 64, 64)})
    cache.add(dict(zip("ab", features.half(), strict=True)))
    torch.testing.assert_close(cache.get("b")[:].float(), features[1], rtol=1e-3, atol=1e-3)
    other, processor, config = assemble(parse_model(section(low={**CLIP, "layer": 1}, freeze=True), "test"))
    elsewhere = FeatureCache.for_model(
        tmp_path, other.eval(), processor, settings={"vision_encoder": config.vision_encoder.config}
    )
    assert elsewhere.folder != cache.folder


def test_a_checkpoint_needs_the_folders_only_if_it_lacks_the_weights(tmp_path: Path) -> None:
    """Frozen encoders come from their folders again, which must be the same; trained ones from the checkpoint."""
    from transformers import AutoConfig, AutoModel

    folder = tmp_path / "dino"
    vit = {key: value for key, value in DINO["config"].items() if key != "model_type"}
    AutoModel.from_config(AutoConfig.for_model("dinov2", **vit)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4] * 3, "image_std": [0.2] * 3}))
    open_clip(tmp_path / "clip")
    nodes = {"low": {"name": "hf", "path": str(folder)}}
    nodes["high"] = {"name": "convnext_multiscale", "path": str(tmp_path / "clip"), "image_size": 64}
    pixels = torch.randn(1, 3, 64, 64)
    for freeze in (True, False):
        torch.manual_seed(0)
        model, processor, config = assemble(parse_model(section(**nodes, freeze=freeze), "test"))
        source = model.vision_encoder.source
        assert source is not None and (source["path"], source["also"]) == (str(folder), str(tmp_path / "clip"))
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        target = tmp_path / f"saved {freeze}"
        save_model(target, model, config, processor, Manifest(trained=trained))
        if not freeze:
            for file in (folder, tmp_path / "clip"):
                file.rename(f"{file} gone")
        again, _, _ = assemble(parse_model({"checkpoint": str(target)}, "test"))
        expected = model.vision_encoder.eval()(pixels)
        assert torch.equal(again.vision_encoder.eval()(pixels), expected)
        if freeze:
            other = open_clip(tmp_path / "clip")
            state = {f"visual.trunk.{k}": t + 1 for k, t in other.state_dict().items()}
            torch.save(state, tmp_path / "clip" / "open_clip_pytorch_model.bin")
            with pytest.raises(CheckpointError, match="was trained on other weights of vision_encoder"):
                assemble(parse_model({"checkpoint": str(target)}, "test"))


def test_real_sizes() -> None:
    """The published counts of Mini-Gemini-7B, and its tokens."""
    clip = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    low = {"name": "hf", "config": {"model_type": "clip_vision_model", **clip, "image_size": 336, "patch_size": 14}}
    content = section(low, {"name": "convnext_multiscale"})
    content["language_model"]["config"] |= {"hidden_size": 4096, "intermediate_size": 8}
    model = model_of(content, meta=True)
    encoder, connector = model.vision_encoder, model.connector

    def count(*modules: nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    assert count(encoder.low) == 303_507_456
    assert (count(encoder.high), len(list(encoder.high.parameters()))) == (196_227_264, 340)
    assert count(connector.query, connector.key, connector.value) == 6_963_456
    assert count(connector.projector) == 20_979_712
    assert (connector.tokens_per_image, encoder.low_size, encoder.high_size, encoder.cells) == (576, 1024, 2880, 64)
    content["vision_encoder"] |= {"grid": 2, "global_view": True}
    content["vision_encoder"]["high"] = {"name": "convnext_multiscale", "image_size": 1536}
    hd = model_of(content, meta=True)
    assert (hd.connector.tokens_per_image, hd.vision_encoder.cells) == (2880, 64)
