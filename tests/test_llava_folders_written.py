"""Models that came from folders of LLaVA's kind: trained, converted, exported, and read again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_imp import GENERATIONS, GOLDEN, golden_image, golden_json
from helpers import golden_section, tiny_model, write_yaml
from llava_folders import (
    TINY_TOWER,
    TOKENIZER,
    large,
    load,
    make_language_model,
    make_llava,
    make_tower,
    text_logits,
    tiny_llava,
)
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging

from minivlm.checkpoints.inspection import inspect_path
from minivlm.checkpoints.native import WEIGHTS, read_manifest
from minivlm.cli import main
from minivlm.config import load_config
from minivlm.runners.experiment import run_experiment

logging.set_verbosity_error()
logging.disable_progress_bar()

IDS = torch.tensor([[5, 9, 200, 31, 7, 300]])
QUESTION = [{"role": "user", "content": "<image>\nwhat is it?"}]
FORMATS = {"v1": "imp_v1", "v15": "imp"}
each_generation = pytest.mark.parametrize("generation", GENERATIONS)


def golden(generation: str, **parts: Any) -> dict[str, Any]:
    """A golden whole model as section ``model``; its tokenizer lies elsewhere."""
    language = {"name": "hf", "tokenizer": str(GOLDEN / "tokenizer"), **parts.pop("language_model", {})}
    return {"checkpoint": str(GOLDEN / generation), "language_model": language, **parts}


def logits(model: Any, processor: Any) -> Tensor:
    with torch.no_grad():
        return model(processor.prompt(QUESTION, [golden_image("wide")]), return_logits=True).logits


def same(first: tuple[Any, ...], second: tuple[Any, ...], tolerance: float = 0) -> None:
    """The same ids, pixels and logits."""
    batches = [processor.prompt(QUESTION, [golden_image("wide")]) for _, processor, *_ in (first, second)]
    assert torch.equal(batches[0].input_ids, batches[1].input_ids)
    assert torch.equal(batches[0].pixels["image"], batches[1].pixels["image"])
    torch.testing.assert_close(logits(*second[:2]), logits(*first[:2]), rtol=0, atol=tolerance)


def command(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """What a command that works says."""
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out


def fails(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


# --- training -------------------------------------------------------------------------------------------------------


@each_generation
def test_a_training_from_a_folder_keeps_what_trained(
    generation: str, tmp_path: Path, tiny_experiment: dict[str, Any]
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / generation / name, base / name)
    shutil.copytree(GOLDEN / "siglip-tiny", tmp_path / "siglip-tiny")
    section = golden(generation, language_model={"freeze": True}) | {"checkpoint": str(base)}
    tiny_experiment["run"] |= {"max_steps": 2, "batch_size_train": 2, "precision": "fp32", "device": "cpu"}
    file = write_yaml(tmp_path / "x.yaml", tiny_experiment | {"model": section})
    start = load(dict(section))
    run_experiment(load_config(file), Console(quiet=True))
    written = next((tmp_path / "out").rglob(WEIGHTS))
    tensors = load_file(written)
    assert {name.split(".")[0] for name in tensors} == {"connector"} and len(tensors) == 4
    manifest = read_manifest(written.parent)
    sources = {part: source and source["path"] for part, source in manifest.sources.items()}
    assert sources == dict.fromkeys(sources, str(base)) and manifest.complete == ["connector"]
    assert sorted(manifest.trained) == sorted(tensors)
    model, processor, _ = load({"checkpoint": str(tmp_path / "out")})
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors.get(name, start[0].state_dict()[name])), name
    assert not torch.equal(tensors["connector.layers.0.weight"], start[0].connector.layers[0].weight)
    assert processor.tokenizer.eos_token == "</s>"
    rows = dict(inspect_path(str(tmp_path / "out")))
    assert str(base) in rows["language_model"] and str(base) in rows["vision_encoder"]
    # Without the base there is no model, and the message names it.
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=str(base)):
        load({"checkpoint": str(tmp_path / "out")})


def test_a_tied_head_does_not_make_checkpoints_large(tmp_path: Path, tiny_experiment: dict[str, Any]) -> None:
    language = make_language_model("qwen2", tie_word_embeddings=True)
    folder, _ = make_llava(tmp_path / "llava", "qwen2", language=language)
    section = {"checkpoint": str(folder), "language_model": {"name": "hf", "freeze": True}}
    tiny_experiment["run"] |= {"max_steps": 1, "batch_size_train": 2, "precision": "fp32", "device": "cpu"}
    run_experiment(
        load_config(write_yaml(tmp_path / "x.yaml", tiny_experiment | {"model": section})), Console(quiet=True)
    )
    written = next((tmp_path / "out").rglob(WEIGHTS))
    assert {name.split(".")[0] for name in load_file(written)} == {"connector"}
    model, _, _ = load({"checkpoint": str(tmp_path / "out")})
    with torch.no_grad():
        torch.testing.assert_close(text_logits(model, IDS), language(IDS).logits, rtol=0, atol=1e-5)


# --- convert --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["", "/"])
def test_a_converted_folder_needs_no_other(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = make_llava(tmp_path / "llava", held=make_tower(tmp_path / "clip"))
    wanted = load({"checkpoint": str(folder)})
    command(capsys, "convert", f"{folder}{ending}", tmp_path / "ours")
    folder.rename(tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "clip")
    found = load({"checkpoint": str(tmp_path / "ours")})
    same(wanted, found)
    assert found[2].template.name == "vicuna_v1"
    manifest = read_manifest(tmp_path / "ours")
    assert sorted(manifest.complete) == ["connector", "language_model", "vision_encoder"]


@each_generation
def test_golden_folders_converted(generation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With their tokenizer, which the command takes from an experiment file."""
    file = write_yaml(tmp_path / "x.yaml", {"model": golden(generation)})
    command(capsys, "convert", GOLDEN / generation, tmp_path / "ours", "--cfg-path", file)
    found = load({"checkpoint": str(tmp_path / "ours")})
    same(load(golden(generation)), found)
    special = golden_json(f"{generation}/expected_preprocess.json")["special"]
    assert found[1].tokenizer.eos_token_id == special["</s>"]
    assert len(found[1].tokenizer) == special["</s>"] + 1


# --- export to LLaVA's layouts --------------------------------------------------------------------------------------


@each_generation
def test_golden_folders_go_round(generation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same names and values as the original's file, and a folder that is read as the original is."""
    file = write_yaml(tmp_path / "x.yaml", {"model": golden(generation)})
    form = FORMATS[generation]
    command(capsys, "export", GOLDEN / generation, tmp_path / "back", "--to", form, "--cfg-path", file)
    theirs, ours = (load_file(f / "model.safetensors") for f in (GOLDEN / generation, tmp_path / "back"))
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    same(load(golden(generation)), load({"checkpoint": str(tmp_path / "back")}))
    theirs_config, ours_config = (
        json.loads((f / "config.json").read_text()) for f in (GOLDEN / generation, tmp_path / "back")
    )
    differing = {k for k, v in theirs_config.items() if v is not None and ours_config.get(k) != v}
    assert differing <= {
        *("mm_vision_tower", "transformers_version", "freeze_mm_mlp_adapter", "tune_mm_mlp_adapter", "mm_projector_lr"),
        *("use_cache", "image_token", "image_token_index", "flash_attn", "flash_rotary", "fused_dense", "attn_pdrop"),
        *("tokenizer_model_max_length", "bos_token_id", "eos_token_id"),
    }
    # Its tower's folder can get lost: what tells the heads is then to be said.
    assert (tmp_path / "back" / "siglip" / "config.json").is_file()


@each_generation
def test_one_layout_becomes_the_other(generation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {"v1": "imp", "v15": "imp_v1"}[generation]
    file = write_yaml(tmp_path / "x.yaml", {"model": golden(generation)})
    command(capsys, "export", GOLDEN / generation, tmp_path / "other", "--to", other, "--cfg-path", file)
    names = load_file(tmp_path / "other" / "model.safetensors")
    assert any("Wqkv" in name for name in names) is (other == "imp_v1")
    same(load(golden(generation)), load({"checkpoint": str(tmp_path / "other")}))


@each_generation
def test_a_projector_goes_round(generation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage1 = GOLDEN / generation / "stage1"
    language = {"path": str(GOLDEN / generation), "special_tokens": {"eos_token": "</s>"}}
    section = golden(generation, language_model=language) | {"checkpoint": str(stage1)}
    file = write_yaml(tmp_path / "x.yaml", {"model": section})
    command(capsys, "export", stage1, tmp_path / "back", "--to", FORMATS[generation], "--cfg-path", file)
    theirs, ours = (torch.load(f / "mm_projector.bin", weights_only=True) for f in (stage1, tmp_path / "back"))
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert not list((tmp_path / "back").glob("*.safetensors"))
    same(load(section), load(section | {"checkpoint": str(tmp_path / "back")}))


@pytest.mark.parametrize("resize", ["squash", "shortest_edge", "pad"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_a_model_of_ours_as_llava_and_back(
    resize: str, tower: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layer, class token, picture settings and scaled rotary embeddings come back as they were."""
    section = tiny_llava(tower, layer=-2, class_token="keep" if tower == "clip" else "drop")
    section["processor"] = {
        "max_length": 199,
        "image": {"name": "image", "resize": resize, "interpolation": "bilinear"},
    }
    scaling = {"rope_type": "linear", "factor": 4.0}
    section["language_model"]["config"] |= {"rope_parameters": {**scaling, "rope_theta": 500.0}}
    file = write_yaml(tmp_path / "x.yaml", {"model": section})
    torch.manual_seed(0)
    command(capsys, "export", file, tmp_path / "llava", "--to", "llava")
    settings = json.loads((tmp_path / "llava" / "config.json").read_text())
    assert settings["model_type"] == "llava_llama" and settings["rope_theta"] == 500.0
    assert settings["rope_scaling"] == scaling
    found = load({"checkpoint": str(tmp_path / "llava")})
    command(capsys, "export", tmp_path / "llava", tmp_path / "again", "--to", "llava")
    again = load({"checkpoint": str(tmp_path / "again")})
    same(found, again)
    transform = found[1].transforms["image"]
    assert (transform.resize, transform.interpolation) == (resize, "bilinear")
    assert found[1].config.max_length == 199
    assert found[1].tokens_per_image == (5 if tower == "clip" else 4)
    assert len(found[0].vision_encoder.model.encoder.layers) == TINY_TOWER["num_hidden_layers"] - 1
    assert found[0].language_model.model.config.rope_parameters["factor"] == 4.0
    first = load_file(tmp_path / "llava" / "model.safetensors")
    second = load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("arch", [("minigpt4", "pretrain_vicuna0"), ("minigpt4", "pretrain_llama2")])
def test_models_that_have_no_place_there(
    arch: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_yaml(tmp_path / "x.yaml", {"model": golden_section(*arch)})
    message = fails(capsys, "export", file, tmp_path / "x", "--to", "llava")
    assert "no place in LLaVA's layout" in message and "the vision encoder is eva_clip_g" in message
    connector = "qformer" if "vicuna" in arch[1] else "patch_merge"
    assert f"the connector is {connector}" in message and not (tmp_path / "x").exists()


def test_only_phi_has_the_first_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_yaml(tmp_path / "x.yaml", {"model": tiny_llava("clip")})
    message = fails(capsys, "export", file, tmp_path / "x", "--to", "imp_v1")
    assert "the language model is a llama, wanted is phi" in message and not (tmp_path / "x").exists()
    merging = tiny_model() | {"connector": {"name": "mlp", "merge": 2}}
    file = write_yaml(tmp_path / "x.yaml", {"model": merging})
    assert "merges neighbouring tokens" in fails(capsys, "export", file, tmp_path / "x", "--to", "imp")


# --- LLaVA of transformers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_folders_of_transformers_that_we_write(tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = tiny_llava("clip", layer=-2)
    section["language_model"]["config"]["tie_word_embeddings"] = tied
    torch.manual_seed(0)
    file = write_yaml(tmp_path / "x.yaml", {"model": section})
    command(capsys, "export", file, tmp_path / "hf", "--to", "transformers")
    found = load({"checkpoint": str(tmp_path / "hf")})
    assert len(found[0].load_reports) == 3 and found[1].tokenizer.get_added_vocab().get("<image>")
    rows = dict(inspect_path(str(tmp_path / "hf")))
    assert rows["holds"] == "LLaVA of transformers" and rows["good for"] == "model.checkpoint"
    command(capsys, "convert", tmp_path / "hf", tmp_path / "ours")
    (tmp_path / "hf").rename(tmp_path / "elsewhere")
    same(found, load({"checkpoint": str(tmp_path / "ours")}))
    tensors = load_file(tmp_path / "ours" / WEIGHTS)
    assert ("language_model.model.lm_head.weight" in tensors) + (
        "language_model.model.model.embed_tokens.weight" in tensors
    ) == (1 if tied else 2)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_folders_of_transformers_that_it_writes(kind: str, tied: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = make_language_model("llama", tie_word_embeddings=tied).config
    strategy = "default" if kind == "clip" else "full"
    config = LlavaConfig(
        vision_config={"model_type": f"{kind}_vision_model", **TINY_TOWER},
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(3)
    theirs = large(LlavaForConditionalGeneration(config))
    theirs.save_pretrained(tmp_path)
    size = TINY_TOWER["image_size"]
    images = LlavaImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    images.save_pretrained(tmp_path)
    LlavaProcessor(images, tokenizer, patch_size=16, vision_feature_select_strategy=strategy).save_pretrained(tmp_path)
    model, processor, settings = load({"checkpoint": str(tmp_path)})
    assert settings.vision_encoder.config.layer == -2 and processor.transforms["image"].resize == "shortest_edge"
    batch = processor.prompt(QUESTION, [golden_image("wide")])
    ids = batch.input_ids.masked_fill(batch.input_ids < 0, config.image_token_index)
    with torch.no_grad():
        wanted = theirs(input_ids=ids, pixel_values=batch.pixels["image"]).logits
    torch.testing.assert_close(logits(model, processor), wanted, rtol=0, atol=1e-5)
    assert model.language_model.unsourced == frozenset()
