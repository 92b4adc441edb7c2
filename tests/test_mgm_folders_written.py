"""Models with two encoders in the layout of Mini-Gemini: exported, merged, converted, and read again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_mgm import BASES, FOLDERS
from helpers import write_yaml
from llava_folders import tiny_llava
from mgm_folders import (
    GEMMA,
    HD,
    LLAMA,
    load,
    logits,
    make_folder,
    make_language_model,
    make_lora,
    make_stage1,
    make_towers,
    merged,
    same_model,
    section,
    settings_of,
    tensors_of,
    visual_tensors,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel
from transformers.utils import logging

from minivlm.api import assemble
from minivlm.checkpoints import to_llava
from minivlm.checkpoints.inspection import inspect_path
from minivlm.checkpoints.native import Manifest, read_manifest, save_model, trained_names
from minivlm.cli import main
from minivlm.config import defaults, load_config

logging.set_verbosity_error()
logging.disable_progress_bar()
each_folder = pytest.mark.parametrize("name", FOLDERS)
each_base = pytest.mark.parametrize("name", BASES)
OF_THE_LAYOUT = (
    *("mm_", "use_mm", "image_", "tokenizer_model", "tokenizer_padding", "tune_", "freeze_", "optimize_", "model_type"),
    *("architectures", "hidden_", "num_hidden", "num_att", "num_key", "vocab_size", "intermediate_size", "rope_theta"),
)


def command(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """What a command that works says."""
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out


def export(capsys: pytest.CaptureFixture[str], node: dict[str, Any], target: Path, form: str = "mgm") -> Path:
    """A section as a folder of the original's layout."""
    target.parent.mkdir(exist_ok=True, parents=True)
    command(capsys, "export", write_yaml(target.with_suffix(".yaml"), {"model": node}), target, "--to", form)
    return target


def same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same names, shapes and values."""
    assert sorted(ours) == sorted(theirs)
    assert [n for n, t in theirs.items() if not torch.equal(ours[n], t)] == []


@each_folder
def test_golden_mini_gemini_folders_go_round(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names and values of the original's file to the bit, its config.json, and towers in folders of their own."""
    node = section(name, make_folder(tmp_path / "golden", name))
    back = export(capsys, node, tmp_path / "far" / "back", "mini_gemini" if name == HD else "mgm")
    same_tensors(load_file(back / "model.safetensors"), tensors_of(name))
    ours = json.loads((back / "config.json").read_text())
    theirs, places = settings_of(name), {"mm_vision_tower", "mm_vision_tower_aux"}
    assert {k for k in theirs if k.startswith(OF_THE_LAYOUT)} <= ours.keys()
    # Beyond these transformers 4 wrote further defaults, which transformers 5 no longer does.
    assert {k for k, v in theirs.items() if k in ours and ours[k] != v} <= {*places, "transformers_version"}
    wanted, processor, _ = load(node)
    shutil.rmtree(tmp_path / "golden")
    model, again, config = load({"checkpoint": str(back)})  # with its tokenizer
    same_model(model, wanted)
    torch.testing.assert_close(logits(model, again), logits(wanted, processor), rtol=0, atol=0)
    # What the original's own loader asks for.
    low, high = (back / ours[key] for key in sorted(places))
    assert "openai" in low.name and all(word in high.name for word in ("openclip", "convnext", "large", "d-320"))
    tower = AutoModel.from_pretrained(low)
    assert torch.equal(tower.embeddings.class_embedding, wanted.vision_encoder.low.model.embeddings.class_embedding)
    encoder = {
        "name": "dual",
        "low": {"name": "hf", "path": str(low), "layer": settings_of(LLAMA)["mm_vision_select_layer"]},
        "high": {"name": "convnext_multiscale", "path": str(high), "image_size": settings_of(name)["image_size_aux"]},
        **{key: getattr(config.vision_encoder.config, key) for key in ("grid", "global_view")},
    }
    same_model(load(section(name, back, vision_encoder=encoder))[0], wanted)


def test_shards_and_half_precision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_llava, "_SHARD", sum(t.numel() for t in tensors_of(LLAMA).values()) * 2 // 4)
    file = write_yaml(tmp_path / "x.yaml", {"model": section(LLAMA, make_folder(tmp_path / "golden", LLAMA))})
    command(capsys, "export", file, tmp_path / "back", "--to", "mgm", "--dtype", "bf16")
    shards = sorted((tmp_path / "back").glob("model-*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "back" / "model.safetensors.index.json").is_file()
    ours = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert {t.dtype for n, t in ours.items() if "vision_tower" not in n} == {torch.bfloat16}
    assert sorted(ours) == sorted(tensors_of(LLAMA))
    same_model(load(section(LLAMA, tmp_path / "back"))[0], load(section(LLAMA, tmp_path / "golden"))[0], 2e-2)


@each_folder
def test_the_first_stage_goes_round(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node = section(name, make_stage1(tmp_path / "stage1", name), make_language_model(tmp_path / "lm", name))
    back = export(capsys, node, tmp_path / "back")
    same_tensors(torch.load(back / "mm_projector.bin", weights_only=True), visual_tensors(name))
    assert not list(back.glob("*.safetensors"))
    settings = json.loads((back / "config.json").read_text())
    assert settings["tune_mm_mlp_adapter"] is True and settings["image_aspect_ratio"] == "square"
    same_model(load(node | {"checkpoint": str(back)})[0], load(node)[0])


@each_base
def test_lora_goes_round(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_towers(tmp_path, name)
    base = make_language_model(tmp_path / "lm", name)
    lora = make_lora(tmp_path / "lora", name, base)
    shutil.rmtree(lora / settings_of(name)["mm_vision_tower"])
    node = section(name, lora)
    back = export(capsys, node, tmp_path / "back")
    for file in ("adapter_model.bin", "non_lora_trainables.bin"):
        same_tensors(*(torch.load(folder / file, weights_only=True) for folder in (back, lora)))
    about = json.loads((back / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"], about["base_model_name_or_path"]) == (4, 8, str(base))
    same_model(load(section(name, back))[0], load(node)[0])


@each_base
def test_a_language_model_that_has_trained_is_exported_whole(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the second stage writes needs neither its base nor a merge; a head may be the embeddings."""
    stage1, base = make_stage1(tmp_path / "stage1", name), make_language_model(tmp_path / "base", name)
    model, processor, config = load(section(name, stage1, base))
    model.language_model.requires_grad_(True)
    trained = trained_names(model, model.trained_before)
    save_model(tmp_path / "stage2", model, config, processor, Manifest(trained=trained))
    assert {"connector", "language_model"} <= set(read_manifest(tmp_path / "stage2").complete)
    shutil.rmtree(base)
    same_model(load({"checkpoint": str(tmp_path / "stage2")})[0], model)
    command(capsys, "export", tmp_path / "stage2", tmp_path / "back", "--to", "mgm")
    ours, theirs = load_file(tmp_path / "back" / "model.safetensors"), tensors_of(name)
    assert all("vision_tower.vision_tower" in n for n in theirs.keys() - ours.keys())  # a layer that is not used
    same_tensors(ours, {n: theirs[n] for n in ours})
    same_model(load({"checkpoint": str(tmp_path / "back")})[0], model)


def test_lora_is_merged_and_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_towers(tmp_path, LLAMA)
    lora = make_lora(tmp_path / "lora", LLAMA, make_language_model(tmp_path / "lm", LLAMA))
    shutil.rmtree(lora / settings_of(LLAMA)["mm_vision_tower"])
    file = write_yaml(tmp_path / "x.yaml", {"model": section(LLAMA, lora)})
    said = command(capsys, "merge", lora, tmp_path / "merged", "--cfg-path", file)
    assert "adapters folded in: " in said
    again = export(capsys, {"checkpoint": str(tmp_path / "merged")}, tmp_path / "whole")
    ours, wanted = load_file(again / "model.safetensors"), merged(LLAMA, lora)
    assert all(".encoder.layers." in n for n in wanted.keys() - ours.keys())
    for n, tensor in ours.items():
        torch.testing.assert_close(tensor, wanted[n], rtol=0, atol=1e-5)


@each_folder
def test_a_model_folder_of_ours_is_exported(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It needs nothing of the folder that it came from."""
    file = write_yaml(tmp_path / "x.yaml", {"model": section(name, make_folder(tmp_path / "golden", name))})
    command(capsys, "convert", tmp_path / "golden", tmp_path / "ours", "--cfg-path", file)
    wanted = load(section(name, tmp_path / "golden"))[0]
    shutil.rmtree(tmp_path / "golden")
    same_model(load({"checkpoint": str(tmp_path / "ours")})[0], wanted)
    command(capsys, "export", tmp_path / "ours", tmp_path / "back", "--to", "mgm")
    ours = load_file(tmp_path / "back" / "model.safetensors")
    same_tensors(ours, {n: t for n, t in tensors_of(name).items() if n in ours})
    assert all(".encoder.layers." in n for n in tensors_of(name).keys() - ours.keys())
    same_model(load({"checkpoint": str(tmp_path / "back")})[0], wanted)
    # The towers' own folders hold no more layers, and are whole for all that.
    settings = json.loads((tmp_path / "back" / "config.json").read_text())
    assert settings["mm_vision_select_layer"] == -1
    AutoModel.from_pretrained(tmp_path / "back" / settings["mm_vision_tower"])
    assert dict(inspect_path(str(tmp_path / "back")))["holds"] == "a model of Mini-Gemini"


def test_models_that_have_no_place_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node = tiny_llava("siglip")
    node["language_model"]["config"] |= {"model_type": "qwen2"}
    node["processor"] = {"image": {"name": "image", "resize": "squash"}}
    file = write_yaml(tmp_path / "x.yaml", {"model": node})
    assert main(["export", str(file), str(tmp_path / "x"), "--to", "mgm"]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message and not (tmp_path / "x").exists()
    for part in (
        "the vision encoder is hf, wanted is dual",
        "the connector is mlp",
        "the language model is qwen2",
        "squash",
    ):
        assert part in message
    node = section(LLAMA, make_folder(tmp_path / "golden", LLAMA))
    file = write_yaml(tmp_path / "y.yaml", {"model": node})
    assert main(["export", str(file), str(tmp_path / "x"), "--to", "llava"]) == 2
    assert "the vision encoder is dual, wanted is hf" in capsys.readouterr().err


# --- over a preset --------------------------------------------------------------------------------------------------


@pytest.fixture
def preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A packaged preset with a folder for every part, and a section that chooses it."""
    low, high = make_towers(tmp_path / "preset", LLAMA)
    node = {
        "arch": "mini_gemini",
        "model_type": "tiny",
        "vision_encoder": {
            "name": "dual",
            "freeze": True,
            "low": {"name": "hf", "path": str(low), "layer": settings_of(LLAMA)["mm_vision_select_layer"]},
            "high": {
                "name": "convnext_multiscale",
                "path": str(high),
                "image_size": settings_of(LLAMA)["image_size_aux"],
            },
        },
        "connector": {"name": "patch_info_mining"},
        "language_model": {"name": "hf", "path": str(make_language_model(tmp_path / "preset" / "lm", LLAMA))},
        "template": "vicuna_v1",
    }
    (tmp_path / "configs" / "models").mkdir(parents=True)
    write_yaml(tmp_path / "configs" / "models" / "mini_gemini_tiny.yaml", {"model": node})
    monkeypatch.setattr(defaults, "FOLDER", tmp_path / "configs")
    tokenizer = section(LLAMA, tmp_path)["language_model"]["tokenizer"]
    chosen = {"arch": "mini_gemini", "model_type": "tiny", "language_model": {"tokenizer": tokenizer}}
    return {"model": chosen}


def over(preset: dict[str, Any], root: Path, checkpoint: Path) -> Any:
    """The section that a file with the preset and a checkpoint gives."""
    preset["model"]["checkpoint"] = str(checkpoint)
    return load_config(write_yaml(root / "over.yaml", preset)).stages[-1].model


def test_a_preset_over_a_whole_folder(preset: dict[str, Any], tmp_path: Path) -> None:
    """The folder gives all parts, and says whether it is HD; the preset's folders are not needed."""
    folder = make_folder(tmp_path / "golden", HD)
    shutil.rmtree(tmp_path / "preset")
    model, _, config = assemble(over(preset, tmp_path, folder))
    same_model(model, load(section(HD, folder))[0])
    assert config.vision_encoder.config.grid == settings_of(HD)["image_grid"]
    assert {config.vision_encoder.weights, config.language_model.weights} == {str(folder)}


def test_a_preset_over_the_first_stage(preset: dict[str, Any], tmp_path: Path) -> None:
    """The preset's folders stay the base, so that nothing but the connector counts as trained."""
    for checkpoint in (make_stage1(tmp_path / "stage1", LLAMA), tmp_path / "stage1" / "mm_projector.bin"):
        model, _, config = assemble(over(preset, tmp_path, checkpoint))
        assert {n.split(".")[0] for n in model.trained_before} == {"connector"}
        assert model.vision_encoder.source["path"].startswith(str(tmp_path / "preset"))
        assert config.checkpoint == str(checkpoint)


def test_a_preset_of_another_size_over_a_whole_folder(
    preset: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder decides what the model is; only the preset's template could be wrong, and is told."""
    preset["model"]["language_model"] = section(GEMMA, tmp_path)["language_model"]
    _, _, config = assemble(over(preset, tmp_path, make_folder(tmp_path / "gemma", GEMMA)))
    assert config.language_model.config.config["model_type"] == "gemma" and config.template.name == "vicuna_v1"
    said = capsys.readouterr().err
    assert "NOTE: model.template is vicuna_v1" in said and "gemma" in said.split("NOTE: ")[1]
    assemble(over(preset, tmp_path, make_folder(tmp_path / "llama", LLAMA)))
    assert "NOTE: model.template" not in capsys.readouterr().err
