"""Files of the original MiniGPT-4, BLIP-2 and EVA-CLIP: read, refused with the reason, inspected, written."""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_minigpt4 import CHECKPOINTS, GOLDEN, golden_config, golden_images, golden_minigpt4
from helpers import tiny_model, write_yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import minivlm
from minivlm import api
from minivlm.checkpoints.files import cache_folder, read_weights
from minivlm.checkpoints.inspection import inspect_path, render
from minivlm.checkpoints.loading import load_part
from minivlm.checkpoints.minigpt4 import LORA_ALPHA
from minivlm.checkpoints.native import WEIGHTS, Manifest, read_manifest, save_model, trained_names
from minivlm.checkpoints.report import CheckpointError
from minivlm.cli import main
from minivlm.config import ConfigError
from minivlm.config.loader import parse_model
from minivlm.models.base import ModelError
from minivlm.models.vlm import VisionLanguageModel
from minivlm.paths import is_placeholder
from minivlm.serve.loading import ServeError, read_stage

logging.set_verbosity_error()
logging.disable_progress_bar()

VARIANTS = sorted(CHECKPOINTS)
VIT, QFORMER, LLAMA, LORA = (golden_config()[name] for name in ("vit", "qformer", "llama", "minigptv2_lora"))
WIDTH, QUERY_WIDTH, HIDDEN, DEPTH = VIT["embed_dim"], QFORMER["hidden_size"], LLAMA["hidden_size"], VIT["depth"]
ADAPTERS = 2 * len(LORA["targets"]) * LLAMA["num_hidden_layers"]
TARGETS = ", ".join(sorted(LORA["targets"]))
PROJECTION = ["connector.linear.weight", "connector.linear.bias"]
Built = tuple[VisionLanguageModel, Any, Any]


def build(section: dict[str, Any]) -> Built:
    torch.manual_seed(0)
    return api.assemble(parse_model(section, "test"))


@functools.cache
def original(variant: str) -> VisionLanguageModel:
    """A golden model; tests do not change it."""
    return build(golden_minigpt4(variant))[0].eval()


@functools.cache
def expected() -> dict[str, Tensor]:
    return load_file(GOLDEN / "expected" / "tensors.safetensors")


def read_pth(name: str | Path) -> dict[str, Any]:
    return torch.load(GOLDEN / name, weights_only=True)


@pytest.fixture
def pth(tmp_path: Path) -> Callable[..., str]:
    """Write a changed copy of a golden checkpoint: ``pth(variant, change)``."""

    def write(variant: str, change: Callable[[dict[str, Tensor]], Any] = lambda model: None, **extra: Any) -> str:
        content = read_pth(CHECKPOINTS[variant])
        change(content["model"])
        path = tmp_path / f"changed_{variant}.pth"
        torch.save(content | extra, path)
        return str(path)

    return write


def tokens(model: VisionLanguageModel, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return model.connector(model.vision_encoder(pixels))


def same_weights(one: VisionLanguageModel, other: VisionLanguageModel) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# --- reading ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def safetensors_bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base files as flat .safetensors."""
    folder = tmp_path_factory.mktemp("bases")
    save_file(read_pth("eva_vit_g.pth"), folder / "eva_vit_g.safetensors")
    save_file(read_pth("blip2_pretrained.pth")["model"], folder / "blip2_pretrained.safetensors")
    return folder


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(("variant", "name"), [("vicuna0", "projected"), ("llama2", "llama2.projected")])
def test_golden_minigpt4_projected_tokens(variant: str, name: str, suffix: str, safetensors_bases: Path) -> None:
    """ViT, ln_vision, Q-Former and projection come from three files of the original."""
    if not {"pixels", name} <= set(expected()):
        pytest.skip(f"this set has no pixels or no {name}")
    model, processor, _ = build(golden_minigpt4(variant, bases=None if suffix == ".pth" else safetensors_bases))
    model.eval()
    got = tokens(model, expected()["pixels"])
    assert len(got) == len(golden_images()) and got.shape == expected()[name].shape
    torch.testing.assert_close(got, expected()[name], rtol=0, atol=1e-4)
    pixels = processor.load_pixels(golden_images()[0])["image"][None]
    torch.testing.assert_close(tokens(model, pixels), expected()[name][:1], rtol=0, atol=1e-4)


def test_golden_minigpt4_lora_of_both_spellings_of_peft(pth: Callable[..., str]) -> None:
    content = read_pth(CHECKPOINTS["v2"])["model"]
    names = [name for name in content if ".lora_" in name]
    model = original("v2")
    assert len(names) == len(model.language_model.adapter_parameters) == ADAPTERS
    prefix = "llama_model.base_model.model."
    for name in names:
        ours = "language_model.model." + name.removeprefix(prefix).replace(".weight", ".default.weight")
        assert torch.equal(model.get_parameter(ours), content[name]), name
    layer = model.get_submodule(ours.split(".lora_")[0])
    assert layer.scaling == {"default": LORA["alpha"] / LORA["r"]}

    def respell(tensors: dict[str, Tensor]) -> None:
        for name in names:
            tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)

    same_weights(build(golden_minigpt4("v2", checkpoint=pth("v2", respell)))[0], model)


@pytest.mark.parametrize("variant", VARIANTS)
def test_reports_and_what_was_trained(variant: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, _, _ = build(golden_minigpt4(variant))
    printed = capsys.readouterr().err
    assert all(report.summary in printed for report in model.load_reports)
    vision, *connector, checkpoint = model.load_reports
    blocks, qformer = 13, read_pth("blip2_pretrained.pth")["model"]
    assert len(vision.matched) == 4 + blocks * DEPTH
    ignored = {reason: len(names) for reason, names in vision.ignored.items()}
    assert ignored["of blocks behind the last one that is used"] == blocks and sum(ignored.values()) == blocks + 4
    assert [len(report.matched) for report in connector] == (
        [sum(not name.startswith("t5_proj") and "position_ids" not in name for name in qformer)]
        if variant == "vicuna0"
        else []
    )
    lora = sorted(f"language_model.{name}" for name in model.language_model.adapter_parameters)
    assert sorted(model.trained_before) == sorted(PROJECTION + lora) and bool(lora) == (variant == "v2")
    assert f"(MiniGPT-4): loaded {2 + len(lora)} tensors [connector.linear 2" in checkpoint.summary
    assert "buffers, which are computed anew" in checkpoint.summary and "NOTE" not in checkpoint.summary
    if variant != "vicuna0":  # the original's variants without Q-Former never fill ln_vision
        assert torch.equal(model.vision_encoder.ln_vision.weight, torch.ones(model.vision_encoder.hidden_size))


def test_bases_leave_the_projection_as_it_is_drawn() -> None:
    torch.manual_seed(5)
    section = golden_minigpt4("vicuna0", checkpoint=None)
    drawn, _, _ = build({**section, "connector": {**section["connector"], "weights": None}})
    loaded, _, _ = build(section)
    assert torch.equal(loaded.connector.linear.weight, drawn.connector.linear.weight)
    assert not torch.equal(loaded.connector.query_tokens, drawn.connector.query_tokens)
    assert not torch.equal(loaded.vision_encoder.ln_vision.weight, drawn.vision_encoder.ln_vision.weight)


def test_a_checkpoint_over_random_bases_says_so() -> None:
    section = golden_minigpt4("vicuna0")
    section["vision_encoder"]["weights"] = section["connector"]["weights"] = None
    model, _, _ = build(section)
    assert model.load_reports[-1].still_random == ["vision_encoder", "connector"]
    assert "NOTE: no file has filled vision_encoder and connector, random values stay" in model.load_reports[-1].summary


def test_a_full_checkpoint_fills_what_was_trained_beside_the_projection(tmp_path: Path) -> None:
    """With freeze_vit and freeze_qformer off the original saves the whole encoder and Q-Former, too."""
    eva, blip2 = read_pth("eva_vit_g.pth"), read_pth("blip2_pretrained.pth")["model"]
    used = {k: v for k, v in eva.items() if not k.startswith((f"blocks.{DEPTH}.", "norm.", "head."))}
    content = {f"visual_encoder.{k}": 2 * v.float() for k, v in used.items()}
    content |= {k: v for k, v in blip2.items() if not k.startswith("t5_proj")}
    content |= read_pth(CHECKPOINTS["vicuna0"])["model"] | {"something.else": torch.zeros(2)}
    torch.save({"model": content, "epoch": 1}, tmp_path / "full.pth")
    section = golden_minigpt4("vicuna0", checkpoint=str(tmp_path / "full.pth"))
    section["vision_encoder"]["weights"] = section["connector"]["weights"] = None
    model, _, _ = build(section)
    report = model.load_reports[-1]
    assert report.ignored["that are no part of MiniGPT-4"] == ["something.else"] and not report.still_random
    assert torch.equal(model.vision_encoder.vit.cls_token, 2 * eva["cls_token"].float())
    assert f"vision_encoder.vit.blocks.{DEPTH - 1}.attn.q_bias" in model.trained_before
    assert "connector.qformer.layernorm.weight" in model.trained_before
    content.pop("visual_encoder.blocks.0.norm1.weight")
    torch.save({"model": content}, tmp_path / "full.pth")
    with pytest.raises(CheckpointError, match=r"missing +1 +\(vision_encoder\.vit\.blocks\.0\.norm1\.weight"):
        build(section)


def test_a_file_of_ours_stays_a_file_of_ours(tmp_path: Path) -> None:
    """Plain names are loaded as before, are no base, and are saved in full."""
    model = original("vicuna0")
    save_file({k: v.contiguous() for k, v in model.connector.state_dict().items()}, tmp_path / "connector.safetensors")
    section = golden_minigpt4("vicuna0", checkpoint=None)
    section["connector"]["weights"] = str(tmp_path / "connector.safetensors")
    again, processor, config = build(section)
    assert torch.equal(again.connector.linear.weight, model.connector.linear.weight)
    assert again.connector.source is None
    save_model(tmp_path / "model", again, config, processor, Manifest(trained=trained_names(again)))
    assert "connector" in read_manifest(tmp_path / "model").complete


# --- bases stay bases ---------------------------------------------------------------------------------------------


@pytest.fixture
def bases(tmp_path: Path) -> Path:
    """The base files, copied so that a test may change them."""
    folder = tmp_path / "bases"
    folder.mkdir()
    for name in ("eva_vit_g.pth", "blip2_pretrained.pth"):
        shutil.copy(GOLDEN / name, folder / name)
    return folder


def with_bases(folder: Path, variant: str = "vicuna0", **settings: Any) -> dict[str, Any]:
    section = golden_minigpt4(variant, **settings)
    for part, name in (("vision_encoder", "eva_vit_g.pth"), ("connector", "blip2_pretrained.pth")):
        if section[part].get("weights"):
            section[part]["weights"] = str(folder / name)
    return section


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_folder_holds_only_what_trains(variant: str, tmp_path: Path, bases: Path) -> None:
    model, processor, config = build(with_bases(bases, variant))
    save_model(tmp_path / "model", model, config, processor, Manifest(trained=trained_names(model)))
    adapters = [f"language_model.{name}" for name in model.language_model.adapter_parameters]
    assert set(load_file(tmp_path / "model" / WEIGHTS)) == {*PROJECTION, *adapters}
    manifest = read_manifest(tmp_path / "model")
    assert manifest.sources["vision_encoder"]["path"] == str(bases / "eva_vit_g.pth")  # type: ignore[index]
    again, _ = minivlm.load(tmp_path / "model", device="cpu")
    same_weights(again, model)


def test_other_bases_are_refused(tmp_path: Path, bases: Path) -> None:
    model, processor, config = build(with_bases(bases))
    save_model(tmp_path / "model", model, config, processor, Manifest(trained=trained_names(model)))
    (bases / "eva_vit_g.pth").rename(bases / "renamed.pth")
    with pytest.raises(CheckpointError, match=r"model\.vision_encoder\.weights: there is no file .*eva_vit_g\.pth"):
        minivlm.load(tmp_path / "model", device="cpu")
    section = with_bases(bases, checkpoint=str(tmp_path / "model"))
    section["vision_encoder"]["weights"] = str(bases / "renamed.pth")
    same_weights(build(section)[0], model)  # the same file under another name
    changed = {"model": {k: v + 1 for k, v in read_pth("blip2_pretrained.pth")["model"].items()}}
    torch.save(changed, bases / "blip2_pretrained.pth")
    with pytest.raises(
        CheckpointError, match=r"other weights of vision_encoder than those in .*and .*blip2_pretrained"
    ):
        build(section)  # its ln_vision comes from there
    section["vision_encoder"]["weights"] = None  # then the one that the checkpoint names is wanted
    with pytest.raises(CheckpointError, match=r"model\.vision_encoder\.weights: there is no file .*eva_vit_g\.pth"):
        build(section)


def test_a_trained_qformer_is_saved_and_ln_vision_still_comes_from_the_base(tmp_path: Path, bases: Path) -> None:
    section = with_bases(bases)
    section["connector"]["freeze"] = False
    model, processor, config = build(section)
    with torch.no_grad():
        for parameter in model.connector.parameters():
            parameter.add_(0.5)
    save_model(tmp_path / "model", model, config, processor, Manifest(trained=trained_names(model)))
    assert read_manifest(tmp_path / "model").complete == ["connector"]
    same_weights(minivlm.load(tmp_path / "model", device="cpu")[0], model)


def test_a_frozen_random_projection_is_saved(tmp_path: Path, bases: Path) -> None:
    section = with_bases(bases, checkpoint=None)
    section["connector"]["freeze"] = True
    model, processor, config = build(section)
    save_model(tmp_path / "model", model, config, processor, Manifest(trained=trained_names(model)))
    assert set(load_file(tmp_path / "model" / WEIGHTS)) == set(PROJECTION)
    torch.manual_seed(77)
    same_weights(minivlm.load(tmp_path / "model", device="cpu")[0], model)


# --- refusals -----------------------------------------------------------------------------------------------------


def refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build(section)


def resized(name: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


def test_a_projection_for_another_language_model(pth: Callable[..., str]) -> None:
    path = pth("vicuna0", resized("llama_proj.weight", 5120, QUERY_WIDTH))
    refused(
        golden_minigpt4("vicuna0", checkpoint=path),
        r"model\.checkpoint: .*changed_vicuna0\.pth \(MiniGPT-4\) does not fit: llama_proj gives 5120 channels, the "
        rf"language model has {HIDDEN}: this is the 13B file; set model\.language_model\.path to a 13B(.|\n)*wrong",
    )


def test_files_of_the_other_variants(pth: Callable[..., str]) -> None:
    file = {variant: str(GOLDEN / name) for variant, name in CHECKPOINTS.items()}
    refused(
        golden_minigpt4("vicuna0", checkpoint=file["llama2"]),
        rf"llama_proj takes {4 * WIDTH} channels, the connector gives it {QUERY_WIDTH}: the file is of the variant "
        r"without Q-Former; set model\.connector\.name: patch_merge",
    )
    refused(
        golden_minigpt4("llama2", checkpoint=file["vicuna0"]),
        f"takes {QUERY_WIDTH} channels, the connector gives it {4 * WIDTH}: the file is of the variant with Q-Former; "
        "set .*: qformer",
    )
    refused(
        golden_minigpt4("llama2", checkpoint=file["v2"]),
        r"it holds LoRA weights, the model has no LoRA; set model\.language_model\.lora: "
        rf"\{{r: {LORA['r']}, alpha: {LORA_ALPHA}, target_modules: \[{TARGETS}\]\}}",
    )
    written = pth("v2", config={"model": {"lora_alpha": 99}})
    refused(golden_minigpt4("llama2", checkpoint=written), rf"\{{r: {LORA['r']}, alpha: 99, target_modules")
    refused(golden_minigpt4("v2", checkpoint=file["llama2"]), "the model has LoRA, the file does not")
    section = golden_minigpt4("vicuna0")
    section["connector"] = {"name": "mlp"}
    refused(section, r"the connector is MLPConnector; that of MiniGPT-4 is qformer or patch_merge")


def test_lora_of_another_rank_or_place() -> None:
    section = golden_minigpt4("v2")
    r = section["language_model"]["lora"]["r"] = LORA["r"] + 1
    refused(section, rf"rank of LoRA: {r - 1} in the file, {r} in the model \(model\.language_model\.lora\.r\)")
    section = golden_minigpt4("v2")
    section["language_model"]["lora"]["target_modules"] = ["o_proj"]
    refused(section, f"LoRA stands at {TARGETS} in the file, at o_proj in the model")


def test_parts_that_are_missing(pth: Callable[..., str], tmp_path: Path) -> None:
    refused(
        golden_minigpt4("llama2", checkpoint=pth("llama2", lambda m: m.pop("llama_proj.bias"))),
        r"it belongs to another model\n(.|\n)*missing +1 +\(connector\.linear\.bias\)",
    )
    refused(
        golden_minigpt4("llama2", checkpoint=pth("llama2", lambda m: m.pop("llama_proj.weight"))),
        "it lacks llama_proj.weight, the layer that MiniGPT-4 trains",
    )
    last = f"layers.{LLAMA['num_hidden_layers'] - 1}.self_attn.{LORA['targets'][-1]}.lora_B"
    gone = f"llama_model.base_model.model.model.{last}.weight"
    refused(
        golden_minigpt4("v2", checkpoint=pth("v2", lambda m: m.pop(gone))),
        rf"missing +1 +\(language_model\.model\.model\.{re.escape(last)}\.default\.weight\)",
    )
    section = golden_minigpt4("vicuna0", checkpoint=None)
    content = read_pth("blip2_pretrained.pth")
    del content["model"]["ln_vision.bias"]
    torch.save(content, tmp_path / "short.pth")
    section["connector"]["weights"] = str(tmp_path / "short.pth")
    refused(
        section,
        r"model\.connector\.weights: .*missing +1 +\(vision_encoder\.ln_vision\.bias\)".replace(".*", r"(.|\n)*", 1),
    )


def test_bases_of_another_size(tmp_path: Path) -> None:
    def changed(part: str, **settings: Any) -> dict[str, Any]:
        section = golden_minigpt4("vicuna0", checkpoint=None)
        section[part] |= settings
        return section

    def other(part: str, key: str, what: str, there: int, here: int) -> None:
        refused(
            changed(part, **{key: here}), rf"{what}: {there} in the file, {here} in the model \(model\.{part}\.{key}"
        )

    queries, layers = QFORMER["num_query_token"], QFORMER["num_hidden_layers"]
    other("connector", "num_query_tokens", "query tokens", queries, queries + 1)
    other("connector", "num_layers", "layers of the Q-Former", layers, layers + 2)
    other("vision_encoder", "depth", "blocks of the vision encoder", DEPTH + 1, DEPTH + 2)
    other("vision_encoder", "width", "width of the vision encoder", WIDTH, 2 * WIDTH)
    every = QFORMER["cross_attention_freq"] - 1
    refused(
        changed("connector", cross_attention_every=every), r"BLIP-2's Q-Former\) does not fit(.|\n)*missing +\d+  \("
    )
    eva = read_pth("eva_vit_g.pth")
    for name, tensor, message in (
        ("blocks.0.attn.k_bias", torch.zeros(WIDTH), r"unexpected +1 +\(blocks\.0\.attn\.k_bias\)"),
        ("pos_embed", torch.zeros(1, 15, WIDTH), r"wrong shape +1 +\(vision_encoder\.vit\.pos_embed is \(1, 15, "),
    ):
        torch.save(eva | {name: tensor}, tmp_path / "odd.pth")
        refused(changed("vision_encoder", weights=str(tmp_path / "odd.pth")), message)


def test_nothing_is_filled_by_a_file_that_is_refused(tmp_path: Path) -> None:
    model, _, _ = build(golden_minigpt4("vicuna0"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    eva = {name: tensor + 1 for name, tensor in read_pth("eva_vit_g.pth").items()}
    torch.save(eva | {"pos_embed": torch.zeros(1, 15, WIDTH)}, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match="wrong shape"):
        load_part(model, "vision_encoder", str(tmp_path / "odd.pth"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_files_at_the_wrong_key(tmp_path: Path) -> None:
    eva, blip2 = str(GOLDEN / "eva_vit_g.pth"), str(GOLDEN / "blip2_pretrained.pth")
    refused(
        golden_minigpt4("vicuna0", checkpoint=blip2),
        r"model\.checkpoint: .* holds BLIP-2's Q-Former; give it as model\.connector\.weights",
    )
    refused(
        golden_minigpt4("vicuna0", weights=blip2), r"model\.vision_encoder\.weights: .*as model\.connector\.weights"
    )
    section = golden_minigpt4("llama2")
    section["connector"]["weights"] = blip2
    refused(section, "the connector is PatchMergeConnector, without a Q-Former")
    section["connector"]["weights"] = eva
    refused(section, r"holds EVA-CLIP-g's vision encoder; give it as model\.vision_encoder\.weights")
    section = golden_minigpt4("llama2")
    section["vision_encoder"] = {**tiny_model()["vision_encoder"], "weights": eva}
    refused(section, r"the vision encoder is HFVisionEncoder; set model\.vision_encoder\.name: eva_clip_g")


def test_files_that_are_something_else(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "llama" / "model.safetensors", tmp_path / "llama.safetensors")
    language = str(tmp_path / "llama.safetensors")
    holds = r"holds a language model of .*in the names of transformers; give it as model\.language_model\.weights"
    refused(golden_minigpt4("vicuna0", checkpoint=language), holds)
    refused(golden_minigpt4("vicuna0", weights=language), holds)
    part = load_file(language)
    part.pop("model.norm.weight")
    save_file(part, tmp_path / "shard.safetensors")
    shard = str(tmp_path / "shard.safetensors")
    path = r"it holds a language model: give its folder as model\.language_model\.path"
    refused(golden_minigpt4("vicuna0", checkpoint=shard), f"is no checkpoint; {path}")
    refused(golden_minigpt4("vicuna0", weights=shard), f"does not belong to this part; {path}")
    section = golden_minigpt4("vicuna0", checkpoint=str(GOLDEN / "llama"))
    refused(section, r"is a folder of Hugging Face, not one that minivlm wrote; give it as model\.language_model\.path")
    torch.save({"a.b": torch.zeros(1)}, tmp_path / "odd.pth")
    refused(golden_minigpt4("vicuna0", checkpoint=str(tmp_path / "odd.pth")), r"it holds tensors such as a\.b")


@pytest.fixture(scope="module")
def vicuna_v1(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A language model of the golden width with the 32,000 embeddings of Vicuna v1.1."""
    folder = tmp_path_factory.mktemp("vicuna_v1")
    settings = json.loads((GOLDEN / "llama" / "config.json").read_text())
    kept = ("hidden_size", "intermediate_size", "num_attention_heads")
    LlamaForCausalLM(
        LlamaConfig(**{k: settings[k] for k in kept}, num_hidden_layers=1, vocab_size=32000)
    ).half().save_pretrained(folder)
    return str(folder)


def test_vicuna_of_another_version(vicuna_v1: str) -> None:
    def section(variant: str, **settings: Any) -> dict[str, Any]:
        model = golden_minigpt4(variant)
        model["language_model"] |= {"path": vicuna_v1, "tokenizer": str(GOLDEN / "llama"), **settings}
        return model

    refused(
        section("vicuna0"),
        r"the language model has 32000 embeddings(.|\n)*set model\.language_model\.vocab_size: 32000 if this",
    )
    assert build(section("vicuna0", vocab_size=32000))[0].language_model.vocab_size == 32000
    assert build(section("llama2"))[0].language_model.vocab_size == 32000  # Llama-2 has as many
    refused(
        section("vicuna0", vocab_size=32001),
        r"model\.language_model\.vocab_size: 32001 embeddings are expected, .* has 32000 \(Vicuna v0 has 32001;",
    )


# --- files that cannot be read ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("cut.pth", lambda whole: whole[: len(whole) // 2], "it is cut off or damaged, or no file of weights"),
        ("empty.pth", lambda whole: b"", "it is cut off or damaged"),
        ("text.pth", lambda whole: b"hello", "it is cut off or damaged, or no file of weights$"),
        ("cut.safetensors", lambda whole: b"\x10\x00\x00\x00\x00\x00\x00\x00{", "it is cut off or damaged"),
        ("page.pth", lambda whole: b"<!doctype html><html>", "it is a page of a web site"),
        ("lfs.pth", lambda whole: b"version https://git-lfs.github.com/spec/v1\n", "it is a pointer of Git LFS"),
    ],
)
def test_damaged_files(name: str, content: Any, reason: str, tmp_path: Path) -> None:
    whole = (GOLDEN / CHECKPOINTS["vicuna0"]).read_bytes()
    (tmp_path / name).write_bytes(content(whole))
    refused(
        golden_minigpt4("llama2", checkpoint=str(tmp_path / name)),
        rf"model\.checkpoint: .*{name} cannot be read: {reason}",
    )


class Harm:
    """What a hostile file would hold."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("harm-was-done",))


def test_objects_in_a_file_are_never_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"llama_proj.weight": torch.zeros(2, 2)}, "config": Harm()}, "evil.pth")
    with pytest.raises(CheckpointError, match=r"it holds objects of Python \(\S+\.mkdir\), which could run any code"):
        read_weights("model.checkpoint", "evil.pth")
    assert main(["inspect", "evil.pth"]) == 2 and not Path("harm-was-done").exists()


def test_a_torch_file_under_any_name(tmp_path: Path) -> None:
    """The content decides; old torch files are no zip archives."""
    tensors = {"a.b": torch.arange(6.0).view(2, 3)}
    torch.save(tensors, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    save_file(tensors, tmp_path / "renamed.pth")
    for name in ("old.bin", "renamed.pth"):
        assert torch.equal(read_weights("k", str(tmp_path / name)).tensors["a.b"], tensors["a.b"])
        shapes = read_weights("k", str(tmp_path / name), shapes_only=True).tensors["a.b"]
        assert shapes.is_meta and shapes.shape == (2, 3) and shapes.dtype == torch.float32


# --- paths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "key", "text"),
    [
        ("language_model", "path", "/path/to/vicuna/weights/"),
        ("language_model", "path", "please set this value to the path of vicuna model"),
        ("vision_encoder", "weights", "/path/to/eva_vit_g.pth"),
        ("connector", "weights", "path/to/blip2.pth"),
        ("", "checkpoint", "/path/to/checkpoint/"),
        ("", "checkpoint", "please set this value to the path of pretrained checkpoint"),
        ("", "checkpoint", "/path/to/pretrained_minigpt4.pth"),
    ],
)
@pytest.mark.parametrize("meta", [False, True])
def test_placeholders(part: str, key: str, text: str, meta: bool) -> None:
    section = golden_minigpt4("vicuna0")
    (section[part] if part else section)[key] = text
    name = f"model.{part}.{key}" if part else f"model.{key}"
    with pytest.raises(ModelError) as caught:
        api.assemble(parse_model(section, "test"), meta=meta)
    assert str(caught.value) == f"{name}: '{text}' is a placeholder; put the real path in its place"


def test_a_placeholder_that_exists_is_none(tmp_path: Path) -> None:
    path = tmp_path / "path" / "to" / "file.pth"
    assert is_placeholder(str(path))
    path.parent.mkdir(parents=True)
    path.touch()
    assert not is_placeholder(str(path)) and not is_placeholder("/data/paths/tolls/x.pth")


def test_a_dry_run_looks_for_the_files() -> None:
    section = golden_minigpt4("vicuna0")
    api.assemble(parse_model(section, "test"), meta=True)
    section["connector"]["weights"] = "https://127.0.0.1:1/x.pth"  # is not fetched
    api.assemble(parse_model(section, "test"), meta=True)
    for part, key in (("vision_encoder", "model.vision_encoder.weights"), (None, "model.checkpoint")):
        changed = golden_minigpt4("vicuna0")
        (changed[part] if part else changed)["weights" if part else "checkpoint"] = "nowhere.pth"
        with pytest.raises(ModelError, match=f"^{re.escape(key)}: there is no file nowhere.pth$"):
            api.assemble(parse_model(changed, "test"), meta=True)


def test_a_file_without_parts_and_a_file_instead_of_a_yaml(tmp_path: Path) -> None:
    path = str(GOLDEN / CHECKPOINTS["vicuna0"])
    refused({"checkpoint": path}, "does not say which parts it belongs to; give model.arch and model.model_type")
    with pytest.raises(ConfigError, match="does not say which model it belongs to; give a YAML file"):
        minivlm.load(path)


class _Server(http.server.SimpleHTTPRequestHandler):
    cut = 0
    fetched: list[str] = []

    def do_GET(self) -> None:
        type(self).fetched.append(self.path)
        file = Path(self.directory) / self.path.lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) - type(self).cut])

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path, type[_Server]]]:
    """A server of a folder on the loopback interface, and an empty cache."""
    folder = tmp_path / "served"
    (folder / "a").mkdir(parents=True)
    monkeypatch.setenv("MINIVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    handler = type("Handler", (_Server,), {"cut": 0, "fetched": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder))) as it:
        thread = threading.Thread(target=it.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{it.server_port}/a/", folder / "a", handler
        it.shutdown()
        thread.join()


def test_a_url_is_fetched_once(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    url, folder, handler = server
    shutil.copy(GOLDEN / "blip2_pretrained.pth", folder)
    section = golden_minigpt4("vicuna0")
    section["connector"]["weights"] = url + "blip2_pretrained.pth"
    model, _, _ = build(section)
    build(section)
    same_weights(model, original("vicuna0"))
    assert handler.fetched == ["/a/blip2_pretrained.pth"]
    assert capsys.readouterr().err.count(f"fetching {url}blip2_pretrained.pth into") == 1
    assert model.connector.source["path"] == url + "blip2_pretrained.pth"  # type: ignore[index]


def test_half_a_download_is_never_taken_for_a_whole_one(server: Any) -> None:
    url, folder, handler = server
    shutil.copy(GOLDEN / CHECKPOINTS["llama2"], folder / "x.pth")
    section = golden_minigpt4("llama2", checkpoint=url + "x.pth")
    handler.cut = 1000
    refused(section, r"model\.checkpoint: http://.*x\.pth cannot be fetched: .*fetch it by hand and give its path")
    assert not [file for file in cache_folder().rglob("*.pth")]
    handler.cut = 0
    assert build(section)[0].trained_before == PROJECTION
    refused(golden_minigpt4("llama2", checkpoint=url + "none.pth"), "cannot be fetched: HTTP Error 404")


def test_a_damaged_file_of_a_server_does_not_stay_in_the_cache(server: Any) -> None:
    url, folder, handler = server
    whole = (GOLDEN / CHECKPOINTS["llama2"]).read_bytes()
    (folder / "x.pth").write_bytes(whole[:-1000])  # the server itself has no more
    section = golden_minigpt4("llama2", checkpoint=url + "x.pth")
    refused(section, r"cut off or damaged(.|\n)*what had been fetched is deleted, so another try fetches it again")
    (folder / "x.pth").write_bytes(whole)
    assert build(section)[0].trained_before == PROJECTION and len(handler.fetched) == 2


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/a/", "http://127.0.0.1:1/../../x.pth", "http://127.0.0.1:1"])
def test_urls_that_name_no_file(url: str) -> None:
    with pytest.raises(CheckpointError, match="names no file"):
        read_weights("model.checkpoint", url)


# --- inspect ------------------------------------------------------------------------------------------------------


def inspected(path: str | Path) -> dict[str, str]:
    return dict(inspect_path(str(path)))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_inspecting_bases(suffix: str, safetensors_bases: Path) -> None:
    folder = GOLDEN if suffix == ".pth" else safetensors_bases
    eva = inspected(folder / f"eva_vit_g{suffix}")
    assert eva["holds"] == "EVA-CLIP-g's vision encoder, a base" and eva["good for"] == "model.vision_encoder.weights"
    assert eva["width of the vision encoder"].startswith(f"{WIDTH} ")
    assert eva["blocks of the vision encoder"].startswith(f"{DEPTH + 1} ") and "last block" in eva
    assert eva["image size"].startswith(f"{VIT['file_image_size']} px")
    assert f"{len(read_pth('eva_vit_g.pth'))} float16" in eva["tensors"]
    blip2 = inspected(folder / f"blip2_pretrained{suffix}")
    assert blip2["good for"] == "model.connector.weights"
    assert blip2["query tokens"].startswith(f"{QFORMER['num_query_token']} ")
    assert blip2["layers of the Q-Former"].startswith(f"{QFORMER['num_hidden_layers']} ")


def test_inspecting_checkpoints(pth: Callable[..., str]) -> None:
    vicuna, llama2, v2 = (inspected(GOLDEN / CHECKPOINTS[name]) for name in ("vicuna0", "llama2", "v2"))
    assert {rows["holds"] for rows in (vicuna, llama2, v2)} == {"MiniGPT-4, a checkpoint: what was trained"}
    assert vicuna["variant"] == "with Q-Former" and vicuna["good for"] == "model.checkpoint"
    assert llama2["variant"].startswith("without Q-Former") and v2["variant"].startswith("MiniGPT-v2 (LoRA), without")
    assert vicuna["projection"] == f"{QUERY_WIDTH} -> {HIDDEN} channels" and vicuna["epoch"] == str(
        read_pth(CHECKPOINTS["vicuna0"])["epoch"]
    )
    layers = LLAMA["num_hidden_layers"]
    assert (
        v2["LoRA"] == f"rank {LORA['r']}, alpha not in the file ({LORA_ALPHA} in v2), on {TARGETS} in {layers} layers"
    )
    assert "init_lr " in vicuna["its config, run"] and "arch minigpt4" in vicuna["its config, model"]
    tensors = read_pth(CHECKPOINTS["vicuna0"])["model"]
    assert vicuna["tensors"].startswith(f"{len(tensors)} (")
    assert vicuna["tensors"].endswith(f"{sum(t.numel() for t in tensors.values()):,} numbers")
    published = inspected(pth("vicuna0", resized("llama_proj.weight", 5120, 768)))
    assert published["language model"] == "hidden size 5120 (LLaMA or Vicuna 13B)"


def test_inspecting_folders(vicuna_v1: str, tmp_path: Path, bases: Path) -> None:
    llama = inspected(GOLDEN / "llama")
    assert llama["holds"] == "model_type llama, LlamaForCausalLM" and llama["hidden_size"] == str(HIDDEN)
    assert llama["good for"].startswith("model.language_model.path") and llama["embeddings"] == str(LLAMA["vocab_size"])
    assert llama["tokenizer"] == "LlamaTokenizer (tokenizer.model)"
    other = inspected(vicuna_v1)
    assert other["embeddings"].startswith("32000: LLaMA, Vicuna v1.1") and other["tokenizer"] == "none in this folder"
    model, processor, config = build(with_bases(bases))
    save_model(tmp_path / "run" / "model", model, config, processor, Manifest(trained=PROJECTION, step=3))
    ours = inspected(tmp_path / "run")
    assert ours["vision_encoder"] == f"eva_clip_g: base {bases / 'eva_vit_g.pth'} {bases / 'blip2_pretrained.pth'}"
    assert ours["connector"].startswith("qformer: base") and ours["trained"] == "2 tensors, 3 steps"
    assert ours["tensors"].startswith("2 (2 float32)") and ours["template"] == "minigpt4_vicuna0"


def test_inspecting_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(GOLDEN / "eva_vit_g.pth")
    assert main(["inspect", path]) == 0
    assert capsys.readouterr().out.strip() == render(path, inspect_path(path))
    (tmp_path / "text.pth").write_text("hello")
    for wrong, message in (
        ("nowhere.pth", "there is no file nowhere.pth"),
        (str(tmp_path), "holds no minivlm model"),
        (str(tmp_path / "text.pth"), "text.pth cannot be read: it is cut off or damaged"),
    ):
        assert main(["inspect", wrong]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.out == "" and "Traceback" not in captured.err
    torch.save({"x.weight": torch.zeros(3)}, tmp_path / "odd.pth")
    assert "tensors such as x.weight" in render("", inspect_path(str(tmp_path / "odd.pth")))


# --- convert ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_converting_there_and_back(variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_yaml(tmp_path / "x.yaml", {"model": golden_minigpt4(variant, checkpoint=None)})
    source = GOLDEN / CHECKPOINTS[variant]
    folder, back, again = tmp_path / "model", tmp_path / "back.pth", tmp_path / "again"
    assert main(["convert", str(source), str(folder), "--cfg-path", str(config)]) == 0
    same_weights(minivlm.load(folder, device="cpu")[0], original(variant))
    assert main(["convert", str(folder), str(back), "--to", "minigpt4"]) == 0
    assert f"{back}: {len(original(variant).trained_before)} tensors (llama_proj." in capsys.readouterr().out
    theirs, ours = read_pth(source), read_pth(back)
    assert set(ours) == set(theirs)
    trained = {name: tensor for name, tensor in theirs["model"].items() if "llama_proj" in name or ".lora_" in name}
    assert set(ours["model"]) == set(trained)  # LoRA in the old spelling
    assert all(torch.equal(ours["model"][name], tensor) for name, tensor in trained.items())
    assert ours["config"]["model"]["has_qformer"] is (variant == "vicuna0")
    assert ours["config"]["model"].get("lora_r") == (LORA["r"] if variant == "v2" else None)
    assert inspected(back)["variant"] == inspected(source)["variant"]
    assert main(["convert", str(back), str(again), "--cfg-path", str(config)]) == 0
    first, second = load_file(folder / WEIGHTS), load_file(again / WEIGHTS)
    assert set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_what_cannot_be_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = str(GOLDEN / CHECKPOINTS["vicuna0"]), str(tmp_path / "target")

    def fails(*arguments: str) -> str:
        assert main(["convert", *arguments]) == 2
        return capsys.readouterr().err

    assert "does not say which model it belongs to: name its YAML file with --cfg-path" in fails(source, target)
    assert "is a file; a folder that minivlm wrote is wanted here" in fails(source, target, "--to", "minigpt4")
    model, processor, config = build(tiny_model())
    save_model(tmp_path / "tiny", model, config, processor, Manifest(trained=trained_names(model)))
    assert "is no MiniGPT-4: it has hf and mlp" in fails(str(tmp_path / "tiny"), target, "--to", "minigpt4")
    with pytest.raises(SystemExit):
        main(["convert", source, str(tmp_path)])
    assert "exists; name another target" in capsys.readouterr().err


def test_a_model_trained_in_full_is_written_and_read_back(tmp_path: Path) -> None:
    section = golden_minigpt4("vicuna0", freeze=False)
    section["connector"]["freeze"] = section["language_model"]["freeze"] = False
    model, processor, config = build(section)
    save_model(tmp_path / "model", model, config, processor, Manifest(trained=trained_names(model)))
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "x.pth"), "--to", "minigpt4"]) == 0
    names = read_pth(tmp_path / "x.pth")["model"]
    assert {"visual_encoder.cls_token", "ln_vision.bias", "llama_model.model.norm.weight", "query_tokens"} <= set(names)
    assert "Qformer.bert.encoder.layer.0.crossattention.self.key.weight" in names
    section["checkpoint"] = str(tmp_path / "x.pth")
    section["vision_encoder"]["weights"] = section["connector"]["weights"] = None
    again, _, _ = build(section)
    same_weights(again, model)
    assert set(again.trained_before) == set(trained_names(model))


# --- the ways to a model ------------------------------------------------------------------------------------------


def test_every_way_takes_a_pth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_yaml(tmp_path / "x.yaml", {"model": golden_minigpt4("llama2")})
    loaded, _ = minivlm.load(config, device="cpu")
    same_weights(loaded, original("llama2"))
    assert read_stage(str(config), []).model.checkpoint == str(GOLDEN / CHECKPOINTS["llama2"])
    assert read_stage(str(config), ["model.checkpoint=nowhere.pth"]).model.checkpoint == "nowhere.pth"
    with pytest.raises(ServeError, match=r"there is no model in output/none; correct model\.checkpoint"):
        read_stage(str(config), ["model.checkpoint=output/none"])
    vision = golden_minigpt4("llama2")["vision_encoder"]
    options = [
        f"model.vision_encoder.{key}={vision[key]}"
        for key in ("width", "depth", "num_heads", "image_size", "patch_size", "mlp_ratio", "weights")
    ]
    options += [f"model.language_model.path={GOLDEN / 'llama'}", "model.language_model.dtype=fp32"]
    options += [f"model.checkpoint={GOLDEN / CHECKPOINTS['llama2']}", "model.vision_encoder.dtype=fp32"]
    model, vis, _ = minivlm.load_model_and_preprocess("minigpt4", "pretrain_llama2", options=options)
    same_weights(model, original("llama2"))
    with pytest.raises(ConfigError, match="--options: run: only keys of `model` can be given here"):
        minivlm.load_model_and_preprocess("minigpt4", "pretrain_llama2", options=["run.seed=1"])
    pixels = vis["eval"](Image.open(golden_images()[0]))[None]
    torch.testing.assert_close(tokens(model, pixels), expected()["llama2.projected"][:1], rtol=0, atol=1e-4)


def test_training_goes_on_from_a_pth(tmp_path: Path, llava_data: Path) -> None:
    """The projection of the file is trained further, and counts as trained although it is frozen."""
    from rich.console import Console

    from minivlm.config import load_config
    from minivlm.runners.experiment import run_experiment

    section = golden_minigpt4("v2")
    section["connector"]["freeze"] = True
    annotations = {"train": str(llava_data / "train.json")}
    content = {
        "model": section,
        "datasets": {"d": {"name": "llava_json", "annotations": annotations, "images": str(llava_data / "images")}},
        "run": {"output_dir": str(tmp_path / "out"), "max_steps": 2, "batch_size_train": 2, "device": "cpu"},
    }
    run_experiment(load_config(write_yaml(tmp_path / "x.yaml", content)), Console(quiet=True))
    manifest = read_manifest(tmp_path / "out" / "model")
    saved = load_file(tmp_path / "out" / "model" / WEIGHTS)
    model = original("v2")
    assert set(manifest.trained) == set(saved) == set(model.trained_before)
    moved = {name for name, tensor in saved.items() if not torch.equal(tensor, model.get_parameter(name))}
    assert moved == {f"language_model.{name}" for name in model.language_model.adapter_parameters}
    again, _ = minivlm.load(tmp_path / "out", device="cpu")
    assert torch.equal(again.connector.linear.weight, model.connector.linear.weight)
