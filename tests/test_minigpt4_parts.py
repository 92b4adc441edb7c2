"""The parts of MiniGPT-4 at tiny sizes: shapes, what trains, and the data of its second stage."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model
from PIL import Image

from minivlm.api import assemble
from minivlm.checkpoints.native import Manifest, save_model, trained_names
from minivlm.config import ConfigError
from minivlm.config.loader import parse_model
from minivlm.datasets.base import DatasetError
from minivlm.datasets.cc_sbu_align import CCSBUAlignBuilder
from minivlm.datasets.configs import CCSBUAlignConfig
from minivlm.models.base import ModelError
from minivlm.models.configs import (
    EvaClipGConfig,
    HFLanguageModelConfig,
    PatchMergeConfig,
    QFormerConfig,
)
from minivlm.models.connectors.mlp import PatchMergeConnector
from minivlm.models.connectors.qformer import QFormerConnector
from minivlm.models.language.hf import HFLanguageModel
from minivlm.models.lora import add_lora
from minivlm.models.tuning import apply_freeze, parameter_groups
from minivlm.models.vision.eva_clip_g import EvaClipG, interpolate_positions
from minivlm.schema import LoraSettings
from minivlm.types import IGNORE_INDEX, Message, Sample, SampleError

EVA = {"image_size": 56, "width": 32, "depth": 3, "num_heads": 4}
QFORMER = {"num_query_tokens": 5, "hidden_size": 24, "num_layers": 3, "num_heads": 2, "intermediate_size": 48}
FROZEN = ["qformer*", "query_tokens"]
LLAMA = tiny_model()["language_model"]["config"]


def eva(**settings: Any) -> EvaClipG:
    torch.manual_seed(0)
    return EvaClipG(EvaClipGConfig(**{**EVA, **settings})).eval()


def language_model(lora: LoraSettings | None = None, **settings: Any) -> HFLanguageModel:
    torch.manual_seed(0)
    model = HFLanguageModel(HFLanguageModelConfig(config=LLAMA, **settings), 360)
    if lora:
        add_lora("language_model", model, lora)
    return model


def minigpt_v2(**settings: Any) -> LoraSettings:
    return LoraSettings(**{"target_modules": ["q_proj", "v_proj"], **settings})


# --- vision encoder -----------------------------------------------------------------------------------------------


def test_real_sizes() -> None:
    """985,894,528 parameters of eva_vit_g.pth without its last block, and those of ln_vision."""
    with torch.device("meta"):
        real = EvaClipG(EvaClipGConfig())
        connector = QFormerConnector(QFormerConfig(), real, 4096)
        merge = PatchMergeConnector(PatchMergeConfig(), real, 4096)
    assert sum(p.numel() for p in real.vit.parameters()) == 985_894_528
    assert real.num_tokens == 257 and real.hidden_size == 1408 and len(real.vit.blocks) == 39
    assert sum(p.numel() for p in connector.qformer.parameters()) == 105_137_664
    assert connector.query_tokens.shape == (1, 32, 768) and connector.linear.weight.shape == (4096, 768)
    assert merge.linear.weight.shape == (4096, 5632) and merge.tokens_per_image == 64
    assert sum(p.numel() for p in merge.parameters()) == 23_072_768


def test_the_encoder_has_the_names_of_the_published_file() -> None:
    encoder = eva()
    names = {name for name in encoder.state_dict() if ".blocks." not in name or ".blocks.2." in name}
    of_block = ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.q_bias", "attn.v_bias"]
    of_block += ["attn.qkv.weight", "attn.proj.weight", "attn.proj.bias"]
    of_block += [f"mlp.fc{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")]
    assert names == {
        *(f"vit.{name}" for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")),
        *(f"vit.blocks.2.{name}" for name in of_block),
        "ln_vision.weight",
        "ln_vision.bias",
    }
    assert encoder.ln_vision.eps == 1e-5 and encoder.vit.blocks[0].norm1.eps == 1e-6


def test_class_token_is_kept_or_dropped() -> None:
    pixels = torch.randn(2, 3, 56, 56)
    kept, dropped = eva(), eva(class_token="drop")
    assert (kept.num_tokens, dropped.num_tokens, kept.grid) == (17, 16, (4, 4))
    with torch.no_grad():
        assert torch.equal(kept(pixels)[:, 1:], dropped(pixels))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_is_storage_of_matrices_only(dtype: str) -> None:
    half = eva(dtype=dtype)
    halves = {name for name, p in half.named_parameters() if p.dtype != torch.float32}
    assert all("proj" in name or "qkv" in name or "fc" in name for name in halves) and len(halves) == 2 + 3 * 7
    full = eva()
    full.load_state_dict({name: tensor.float() for name, tensor in half.state_dict().items()})
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        expected, got = full(pixels), half(pixels)
    tolerance = 1e-6 if dtype == "fp16" else 0.05  # fp16 is computed in fp32 on a CPU
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=tolerance)
    assert {name for name, p in half.named_parameters() if p.dtype != torch.float32} == halves
    with torch.no_grad():  # a model that was cast as a whole, as `minivlm.load(dtype=...)` does
        torch.testing.assert_close(half.to(torch.float16)(pixels), expected, rtol=0, atol=0.05)


def test_an_encoder_that_trains_is_not_kept_in_fp16() -> None:
    encoder = eva(dtype="fp16")
    apply_freeze("vision_encoder", encoder, True)
    assert encoder.vit.patch_embed.proj.weight.dtype == torch.float16
    apply_freeze("vision_encoder", encoder, ["vit.blocks.0.*"])
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


def test_checkpointing_and_drop_path() -> None:
    pixels = torch.randn(1, 3, 56, 56)
    gradients = []
    for checkpointing in (False, True):
        encoder = eva(gradient_checkpointing=checkpointing).train()
        encoder(pixels).square().sum().backward()
        gradients.append(encoder.vit.patch_embed.proj.weight.grad)
    torch.testing.assert_close(*gradients)
    drops = eva(drop_path_rate=0.5).train()
    assert not torch.equal(drops(pixels), drops(pixels))


def test_positions_of_another_image_size_are_interpolated() -> None:
    small, large = eva(), eva(image_size=112)
    large.load_state_dict(small.state_dict())
    assert torch.equal(large.vit.pos_embed[:, 0], small.vit.pos_embed[:, 0])
    assert large.vit.pos_embed.shape == (1, 65, 32)
    flat = torch.full((1, 17, 4), 0.5)
    torch.testing.assert_close(interpolate_positions(flat, 9), torch.full((1, 82, 4), 0.5))
    with pytest.raises(RuntimeError, match="pos_embed"):
        large.load_state_dict(small.state_dict() | {"vit.pos_embed": torch.zeros(1, 12, 32)})


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ModelError, match="image_size 60 must be a multiple of patch_size 14"):
        eva(image_size=60)


# --- connectors ---------------------------------------------------------------------------------------------------


def qformer(**settings: Any) -> QFormerConnector:
    torch.manual_seed(0)
    return QFormerConnector(QFormerConfig(**{**QFORMER, **settings}), eva(), 20)


def test_qformer_shapes() -> None:
    connector = qformer()
    assert connector(torch.randn(2, 17, 32)).shape == (2, 5, 20) and connector.tokens_per_image == 5
    layers = connector.qformer.encoder.layer
    assert [layer.has_cross_attention for layer in layers] == [True, False, True]
    assert connector.qformer.layernorm.eps == 1e-12


def test_a_frozen_qformer_is_unchanged_by_a_step_and_has_no_dropout() -> None:
    connector = qformer()
    apply_freeze("connector", connector, FROZEN)
    connector.train()
    assert connector.training and connector.linear.training and not connector.qformer.training
    assert [name for name, p in connector.named_parameters() if p.requires_grad] == ["linear.weight", "linear.bias"]
    features = torch.randn(2, 17, 32)
    assert torch.equal(connector(features), connector(features))
    before = {name: tensor.clone() for name, tensor in connector.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in connector.parameters() if p.requires_grad], lr=0.1)
    connector(features).square().sum().backward()
    optimizer.step()
    changed = {name for name, tensor in connector.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"linear.weight", "linear.bias"}
    apply_freeze("connector", connector, False)
    assert connector.train().qformer.training and not torch.equal(connector(features), connector(features))


def test_gradients_reach_an_encoder_below_a_frozen_qformer() -> None:
    connector = qformer()
    apply_freeze("connector", connector, FROZEN)
    features = torch.randn(1, 17, 32, requires_grad=True)
    connector.train()(features).sum().backward()
    assert features.grad is not None and features.grad.any()


def test_patch_merge_joins_neighbours_of_a_row_without_the_class_token() -> None:
    connector = PatchMergeConnector(PatchMergeConfig(), eva(), 128)
    assert connector.tokens_per_image == 4
    with torch.no_grad():
        connector.linear.weight.copy_(torch.eye(128))
        connector.linear.bias.zero_()
        features = torch.randn(2, 17, 32)
        tokens = connector(features)
        assert torch.equal(tokens[1, 2], features[1, 1 + 8 : 1 + 12].flatten())
        assert torch.equal(connector(features[:, 1:]), tokens), "an encoder that drops it gives the same"
    with pytest.raises(ModelError, match="factor 5 does not divide the encoder's 16 patch tokens"):
        PatchMergeConnector(PatchMergeConfig(factor=5), eva(), 8)


# --- language model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", [True, False])
def test_of_a_model_with_lora_only_the_adapters_train(freeze: bool) -> None:
    model = language_model(lora=minigpt_v2(r=3, alpha=6))
    apply_freeze("language_model", model, freeze)
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    assert set(trains) == model.adapter_parameters
    assert trains[0] == "model.model.layers.0.self_attn.q_proj.lora_A.default.weight" and len(trains) == 2 * 2 * 2
    assert model.model.model.layers[0].self_attn.v_proj.scaling == {"default": 2.0}


def test_globs_freeze_adapters_too() -> None:
    model = language_model(lora=minigpt_v2(r=3))
    apply_freeze("language_model", model, ["*.layers.0.*"])
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {name for name in model.adapter_parameters if ".layers.1." in name}
    apply_freeze("language_model", model, ["*"])
    assert not any(p.requires_grad for p in model.parameters())


def test_lora_starts_as_the_base_and_is_fp32_over_a_half_base() -> None:
    base, adapted = language_model().eval(), language_model(lora=minigpt_v2()).eval()
    embeds = torch.randn(1, 4, base.hidden_size)
    positions = torch.arange(4)[None]
    for name, parameter in adapted.named_parameters():  # the adapters were drawn after the base
        if name not in adapted.adapter_parameters:
            assert torch.equal(parameter, base.get_parameter(name.replace(".base_layer", "")))
    torch.testing.assert_close(adapted(embeds, None, positions), base(embeds, None, positions))
    half = language_model(lora=minigpt_v2(), dtype="bf16")
    apply_freeze("language_model", half, True)
    assert half.dtype == torch.bfloat16
    assert {half.get_parameter(name).dtype for name in half.adapter_parameters} == {torch.float32}


def test_lora_target_modules_must_exist() -> None:
    with pytest.raises(ModelError, match=r"has no layer query; its linear layers are .*q_proj.*v_proj"):
        language_model(lora=minigpt_v2(target_modules=["q_proj", "query"]))


def test_quantization_names_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    language_model().model.save_pretrained(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = HFLanguageModelConfig(path=str(tmp_path), quantization="int8")
    with pytest.raises(ModelError, match=r'int8 needs bitsandbytes; run pip install "minivlm\[quant\]"'):
        HFLanguageModel(config, 360)


def test_quantization_falls_back_where_the_device_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    language_model().model.save_pretrained(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    loaded = HFLanguageModel(HFLanguageModelConfig(path=str(tmp_path), quantization="int8", dtype="bf16"), 360)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert "bitsandbytes does not run on MPS; the language model stays in half precision" in caplog.text


# --- a whole model ------------------------------------------------------------------------------------------------


def minigpt(**connector: Any) -> dict[str, Any]:
    section = tiny_model()
    section["vision_encoder"] = {"name": "eva_clip_g", "freeze": True, **EVA}
    section["connector"] = connector
    section["language_model"] |= {"freeze": True}
    section["template"] = "minigpt4_vicuna0"
    section["processor"] = {"prompts": ["<image> Describe this image in detail."], "max_length": 200}
    return section


def picture() -> Image.Image:
    return Image.new("RGB", (40, 30), (220, 30, 30))


def test_only_the_projection_of_minigpt4_trains() -> None:
    model, processor, config = assemble(parse_model(minigpt(name="qformer", freeze=FROZEN, **QFORMER), "test"))
    assert trained_names(model) == ["connector.linear.bias", "connector.linear.weight"]
    model.train()
    parts = (model.vision_encoder, model.connector, model.connector.qformer, model.language_model)
    assert [part.training for part in parts] == [False, True, False, False]
    batch = processor.collate([processor.encode(Sample("s", [Message("assistant", "a red shape")], [picture()]))])
    assert (batch.labels[0] != IGNORE_INDEX).any()
    groups = parameter_groups(model, config, 1e-3, 0.05)
    assert [group["param_names"] for group in groups] == [["connector.linear.weight"], ["connector.linear.bias"]]
    optimizer, losses = torch.optim.AdamW(groups), []
    for _ in range(3):
        loss = model(batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]


def test_a_model_with_lora_comes_back_from_its_folder(tmp_path: Path) -> None:
    base = tmp_path / "base"
    language_model().model.save_pretrained(base)
    section = minigpt(name="patch_merge")
    section["language_model"] = {
        "name": "hf",
        "path": str(base),
        "tokenizer": "asset:quickstart",
        "freeze": True,
        "lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
    }
    section["template"] = "minigpt_v2"
    model, processor, config = assemble(parse_model(section, "test"))
    adapters = sorted(f"language_model.{name}" for name in model.language_model.adapter_parameters)
    assert trained_names(model) == ["connector.linear.bias", "connector.linear.weight", *adapters]
    with torch.no_grad():
        for name in adapters:
            model.get_parameter(name).normal_()
    save_model(tmp_path / "model", model, config, processor, Manifest(trained=trained_names(model)))
    again, _, _ = assemble(parse_model({"checkpoint": str(tmp_path / "model")}, "test"))
    sample = Sample("s", [Message("user", "<image> what?"), Message("assistant", "red")], [picture()])
    batch = processor.collate([processor.encode(sample)])
    with torch.no_grad():
        logits = [m.eval()(batch, return_logits=True).logits for m in (model, again)]
    assert torch.equal(*logits)


def test_a_model_without_path_says_what_to_give() -> None:
    with pytest.raises(ConfigError, match=r"model\.language_model\.path: a value must be given .* MINIVLM_VICUNA"):
        parse_model({"arch": "minigpt4", "model_type": "pretrain_vicuna0"}, "test")
    section = tiny_model()
    section["language_model"] = {"name": "hf"}
    with pytest.raises(ModelError, match=r"model\.language_model\.path: give the folder or hub id"):
        assemble(parse_model(section, "test"), meta=True)


# --- data ---------------------------------------------------------------------------------------------------------


def align(folder: Path, content: Any) -> Any:
    (folder / "image").mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "filter_cap.json").write_text(text, encoding="utf-8")
    return CCSBUAlignBuilder(CCSBUAlignConfig(storage=str(folder)), "mine").build("train")


@pytest.mark.parametrize("wrap", [lambda records: {"annotations": records}, lambda records: records])
def test_captions_of_the_second_stage(tmp_path: Path, wrap: Any) -> None:
    data = align(tmp_path, wrap([{"image_id": "2", "caption": " A Käse."}, {"image_id": 7, "caption": "b"}]))
    assert len(data) == 2
    assert data[0] == Sample("2", [Message("assistant", " A Käse.")], [tmp_path / "image" / "2.jpg"])
    assert data[1].images == [tmp_path / "image" / "7.jpg"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"caption": "a"}, "sample '0': it has no `image_id`"),
        ("text", "sample '0': it has no `image_id`"),
        ({"image_id": "../2", "caption": "a"}, "sample '../2': its `image_id` is no plain name"),
        ({"image_id": "2"}, "sample '2': it has no `caption`"),
        ({"image_id": "2", "caption": " "}, "sample '2': it has no `caption`"),
    ],
)
def test_broken_records(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(SampleError) as caught:
        align(tmp_path, [record])[0]
    assert str(caught.value).startswith(message)


def test_broken_files(tmp_path: Path) -> None:
    builder = CCSBUAlignBuilder(CCSBUAlignConfig(storage=str(tmp_path)), "mine")
    with pytest.raises(DatasetError, match=r"dataset 'mine': there is no .*filter_cap\.json; `storage` must be"):
        builder.build("train")
    with pytest.raises(DatasetError, match=r"has no split 'tran' \(did you mean 'train'\?\); it has: train"):
        builder.build("tran")
    for content, message in (("{", "cannot be read"), ({"a": 1}, "or the bare list"), ([], "has no records")):
        with pytest.raises(DatasetError, match=message):
            align(tmp_path, content)
