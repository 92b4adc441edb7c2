"""Folders and files of Mini-Gemini as checkpoints: every form they come in, and what is refused."""

from __future__ import annotations

import os
import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from golden_mgm import BASES, FOLDERS
from llava_folders import change_config, reshard
from mgm_folders import (
    GEMMA,
    HD,
    LLAMA,
    MIXTRAL,
    language,
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
from safetensors.torch import save_file

from minivlm.checkpoints.inspection import inspect_path
from minivlm.checkpoints.llava_folder import language_type
from minivlm.checkpoints.towers import ZOO, find_folder
from minivlm.config import ConfigError
from minivlm.models.base import ModelError
from minivlm.models.vlm import VisionLanguageModel

LAYER = settings_of(LLAMA)["mm_vision_select_layer"]
each_folder = pytest.mark.parametrize("name", FOLDERS)
each_base = pytest.mark.parametrize("name", BASES)


@cache
def whole(name: str) -> VisionLanguageModel:
    """The model of a whole folder, which the golden tests compare with the original."""
    return load(section(name, make_folder(Path(mkdtemp()) / "whole", name)))[0]


def refusal(node: dict[str, Any]) -> str:
    with pytest.raises(ModelError) as caught:
        load(node)
    return str(caught.value)


# --- whole folders --------------------------------------------------------------------------------------------------


@each_folder
@pytest.mark.parametrize("safe", [True, False])
def test_shards_are_one_model(name: str, safe: bool, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "any name", name)
    assert len(reshard(folder, safe)) > 2
    same_model(load(section(name, folder))[0], whole(name))


@each_base
def test_half_precision(name: str, tmp_path: Path) -> None:
    """Values are those of the file, rounded once; the language model keeps its type."""
    half = {n: t.half() for n, t in tensors_of(name).items()}
    folder = make_folder(tmp_path / "half", name, half)
    node = section(name, folder)
    node["language_model"]["freeze"] = True  # what trains becomes fp32
    model, _, config = load(node)
    assert config.language_model.config.dtype == "fp16" and model.language_model.dtype == torch.float16
    assert torch.equal(model.connector.query[1].weight, half["model.vlm_uni_query_projector.1.weight"].float())
    same_model(model, whole(name), 1e-2)


@each_base
@pytest.mark.parametrize("family", ["mgm", "mini_gemini", "minigemini"])
def test_either_name_in_config_json_decides(name: str, family: str, tmp_path: Path) -> None:
    """The folder may have the name of another size."""
    kind = settings_of(name)["model_type"].replace("mgm", family)
    folder = make_folder(tmp_path / "MGM-2B-8x7B", name, model_type=kind)
    same_model(load(section(name, folder))[0], whole(name))


def test_model_types() -> None:
    for family in ("mgm", "mini_gemini", "minigemini"):
        kinds = {"": "llama", "_gemma": "gemma", "_mixtral": "mixtral", "_mistral": "mistral"}
        assert {end: language_type({"model_type": family + end}) for end in kinds} == kinds


@pytest.mark.parametrize("key", ["image_size_aux", "mm_vision_tower_aux"])
@pytest.mark.parametrize("kind", ["whole", "stage1"])
def test_without_a_second_encoder_it_is_a_plain_llava(key: str, kind: str, tmp_path: Path) -> None:
    """What the file holds of it is reported and left aside."""
    if kind == "whole":
        node = section(LLAMA, make_folder(tmp_path / "x", LLAMA, **{key: ...}))
    else:
        projector = visual_tensors(LLAMA, "vlm_uni_", "mm_projector")
        base = make_language_model(tmp_path / "lm", LLAMA)
        node = section(LLAMA, make_stage1(tmp_path / "x", LLAMA, projector, **{key: ...}), base)
        node["vision_encoder"] = {"name": "hf", "path": str(make_towers(tmp_path, LLAMA)[0]), "layer": LAYER}
    model, _, config = load(node)
    assert (config.vision_encoder.name, config.connector.name) == ("hf", "mlp")
    assert torch.equal(model.connector.layers[2].weight, tensors_of(LLAMA)["model.mm_projector.2.weight"])
    ignored = {reason for report in model.load_reports for reason in report.ignored}
    assert "of a second encoder, which config.json does not name" in ignored


@each_base
@pytest.mark.parametrize(
    "lost", ["vlm_uni_val_projector.0.bias", "mm_projector.2.bias", "vision_stages.2.blocks.0.gamma"]
)
def test_a_tensor_that_lacks_is_named(name: str, lost: str, tmp_path: Path) -> None:
    kept = {n: t for n, t in tensors_of(name).items() if not n.endswith(lost)}
    message = refusal(section(name, make_folder(tmp_path / "x", name, kept)))
    assert "missing      1  (" in message and str(tmp_path / "x") in message


def test_a_tensor_too_many_is_named(tmp_path: Path) -> None:
    more = {**tensors_of(LLAMA), "model.vlm_uni_other_projector.weight": torch.ones(2)}
    message = refusal(section(LLAMA, make_folder(tmp_path / "x", LLAMA, more)))
    assert "unexpected   1  (model.vlm_uni_other_projector.weight)" in message


@pytest.mark.parametrize("safe", [True, False])
def test_shards_that_lack_or_are_cut_off(safe: bool, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "x", LLAMA)
    first = reshard(folder, safe)[0]
    content = first.read_bytes()
    first.write_bytes(content[: len(content) // 2])
    message = refusal(section(LLAMA, folder))
    assert first.name in message and "cut off or damaged" in message
    first.unlink()
    assert f"lacks {first.name}" in refusal(section(LLAMA, folder))


def test_a_file_of_another_size_names_the_key(tmp_path: Path) -> None:
    """The weights of one language model over the settings of another."""
    config = load(section(LLAMA, make_folder(tmp_path / "llama", LLAMA)))[2]
    node = section(LLAMA, make_folder(tmp_path / "gemma", GEMMA) / "model.safetensors")
    node["language_model"]["config"] = config.language_model.config.config
    node |= {"vision_encoder": described(config), "connector": {"name": "patch_info_mining"}, "template": "vicuna_v1"}
    theirs, ours = (settings_of(name)["hidden_size"] for name in (GEMMA, LLAMA))
    wanted = f"width of the language model: {theirs} in the file, {ours} in the model (model.language_model)"
    assert wanted in refusal(node)


def described(config: Any) -> dict[str, Any]:
    """Node ``vision_encoder`` of a section without weights."""
    low, high = config.vision_encoder.config.low.config, config.vision_encoder.config.high.config
    sizes = {"depths": high.depths, "widths": high.widths, "image_size": high.image_size}
    return {
        "name": "dual",
        "low": {"name": "hf", "config": low.config, "layer": low.layer},
        "high": {"name": "convnext_multiscale", **sizes},
    }


@each_base
def test_a_whole_file_as_checkpoint(name: str, tmp_path: Path) -> None:
    """Over the parts of a section it must hold each of them whole."""
    folder = make_folder(tmp_path / "x", name)
    config = load(section(name, folder))[2]
    node = section(name, folder / "model.safetensors")
    node["language_model"]["config"] = config.language_model.config.config
    node |= {"vision_encoder": described(config), "connector": {"name": "patch_info_mining"}, "template": "vicuna_v1"}
    same_model(load(node)[0], whole(name))
    lost = "model.vlm_uni_query_projector.0.weight"
    save_file({n: t for n, t in tensors_of(name).items() if n != lost}, folder / "model.safetensors")
    assert "missing      1  (connector.query.0.weight)" in refusal(node)


@each_base
def test_its_language_model_for_another_model(name: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "x", name)
    node = section(name, make_stage1(tmp_path / "stage1", name), folder)
    same_model(load(node)[0], whole(name))


# --- towers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["inside", "beside", "cwd", "zoo", "absolute"])
@each_folder
def test_towers_that_are_not_in_the_folder(
    name: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = {n: t for n, t in tensors_of(name).items() if "vision_tower" not in n}
    folder = make_folder(tmp_path / "models" / "x", name, without)
    shutil.rmtree(folder / settings_of(name)["mm_vision_tower"])
    root = {"inside": folder, "beside": folder.parent}.get(place, tmp_path / "elsewhere" / "zoo")
    root.mkdir(parents=True, exist_ok=True)
    low, high = make_towers(root, name)
    if place == "cwd":
        monkeypatch.chdir(root)
    if place == "zoo":
        monkeypatch.setenv(ZOO, f"{tmp_path / 'nowhere'}{os.pathsep}{root}")
        change_config(folder, mm_vision_tower=f"model_zoo/OpenAI/{low.name}", mm_vision_tower_aux=f"/other/{high.name}")
    if place == "absolute":
        change_config(folder, mm_vision_tower=str(low), mm_vision_tower_aux=str(high))
    model, _, config = load(section(name, folder))
    same_model(model, whole(name))
    assert config.vision_encoder.weights is None
    assert model.vision_encoder.source and model.vision_encoder.source["path"].endswith(low.name)


@pytest.mark.parametrize("lost", ["vision_tower.", "vision_tower_aux."])
def test_one_of_two_towers_in_the_folder(lost: str, tmp_path: Path) -> None:
    kept = {n: t for n, t in tensors_of(LLAMA).items() if lost not in n}
    folder = make_folder(tmp_path / "x", LLAMA, kept)
    shutil.rmtree(folder / settings_of(LLAMA)["mm_vision_tower"])
    make_towers(tmp_path, LLAMA)
    same_model(load(section(LLAMA, folder))[0], whole(LLAMA))
    hole = next(n for n in kept if "vision_tower" in n and n.endswith("bias"))
    save_file({n: t for n, t in kept.items() if n != hole}, folder / "model.safetensors")
    assert "missing      1  (" in refusal(section(LLAMA, folder))


def test_towers_that_are_nowhere_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = {n: t for n, t in tensors_of(LLAMA).items() if "vision_tower" not in n}
    names = {"mm_vision_tower": "model_zoo/OpenAI/clip", "mm_vision_tower_aux": "model_zoo/OpenAI/openclip"}
    folder = make_folder(tmp_path / "x", LLAMA, without, **names)
    monkeypatch.setenv(ZOO, str(tmp_path / "zoo"))
    message = refusal(section(LLAMA, folder))
    for part in (
        "'model_zoo/OpenAI/clip' (mm_vision_tower)",
        str(tmp_path / "zoo"),
        ZOO,
        "low.path",
        "working directory",
    ):
        assert part in message
    low, high = make_towers(tmp_path / "towers", LLAMA)
    change_config(folder, mm_vision_tower=str(low))
    assert "'model_zoo/OpenAI/openclip' (mm_vision_tower_aux)" in refusal(section(LLAMA, folder))
    # The cure that it names, and that nothing of config.json is asked then.
    change_config(folder, mm_vision_tower=None)
    settings = settings_of(LLAMA)
    node = {
        "name": "dual",
        "low": {"name": "hf", "path": str(low), "layer": settings["mm_vision_select_layer"]},
        "high": {"name": "convnext_multiscale", "path": str(high), "image_size": settings["image_size_aux"]},
    }
    same_model(load(section(LLAMA, folder, vision_encoder=node))[0], whole(LLAMA))
    rows = dict(inspect_path(str(folder)))
    assert rows["good for"] == "model.checkpoint"
    assert rows["template"] == "vicuna_v1"


def test_no_name_leads_out_by_dots(tmp_path: Path) -> None:
    make_towers(tmp_path, LLAMA)
    folder = make_stage1(tmp_path / "models" / "x", LLAMA, visual_tensors(LLAMA, "vlm_uni", "mm_projector"))
    name = f"../{settings_of(LLAMA)['mm_vision_tower']}"
    assert find_folder(folder, name) == name
    change_config(folder, mm_vision_tower=f"x/{name}")
    base = make_language_model(tmp_path / "lm", LLAMA)
    assert "a name with '..' is not followed" in refusal(section(LLAMA, folder, base))


# --- the first stage ------------------------------------------------------------------------------------------------


def test_the_first_stage_of_another_language_model(tmp_path: Path) -> None:
    """Vicuna-7B, LLaMA-3-8B and Mixtral are of one width; the file alone does not tell for which it was made."""
    stage1 = make_stage1(tmp_path / "stage1", LLAMA, visual_tensors(MIXTRAL))
    experts = settings_of(MIXTRAL)["num_local_experts"]
    message = refusal(over_folders(tmp_path / "a", MIXTRAL, stage1))
    assert f"num_local_experts None against {experts}" in message and "model.model_type" in message
    assert load(over_folders(tmp_path / "b", MIXTRAL, stage1 / "mm_projector.bin"))[0].trained_before


@each_folder
def test_a_folder_of_the_first_stage(name: str, tmp_path: Path) -> None:
    """It and a language model are all that is needed."""
    base = make_language_model(tmp_path / "lm", name)
    model, processor, config = load(section(name, make_stage1(tmp_path / "stage1", name), base))
    same_model(model, whole(name))
    assert processor.transforms["image"].resize == "shortest_edge"
    report = model.load_reports[-1]
    assert report.still_random == [] and {n.split(".")[0] for n in report.matched} == {"vision_encoder", "connector"}
    assert config.language_model.weights is None and model.language_model.source["path"] == str(base)
    assert not any(name.startswith("language_model") for name in model.trained_before)


@pytest.mark.parametrize("prefix", ["model.", "", "base_model.model.model.", "module.model."])
@pytest.mark.parametrize("towers", [True, False])
def test_the_file_with_any_prefix_over_a_section(prefix: str, towers: bool, tmp_path: Path) -> None:
    """Over base and HD; encoders that repeat those of the section do not count as trained."""
    kinds = () if towers else ("vlm_uni_", "mm_projector")
    tensors = {prefix + n.removeprefix("model."): t for n, t in visual_tensors(LLAMA, *kinds).items()}
    file = tmp_path / "mm_projector" / "checkpoint-24000.bin"
    file.parent.mkdir()
    torch.save({n: t.bfloat16() for n, t in tensors.items()}, file)
    for name in (LLAMA, HD):
        model, _, _ = load(over_folders(tmp_path / name, name, file))
        same_model(model.vision_encoder, whole(name).vision_encoder)
        same_model(model.connector, whole(name).connector, 1e-2)
        assert sorted(model.trained_before) == sorted(f"connector.{n}" for n in model.connector.state_dict())
        ignored = model.load_reports[-1].ignored
        assert ("the same in the base" in ignored) is towers


def over_folders(root: Path, name: str, checkpoint: Path) -> dict[str, Any]:
    """A section with folders for both encoders and the language model, as a preset has them."""
    settings = settings_of(name)
    low, high = make_towers(root, name)
    encoder = {
        "name": "dual",
        "freeze": True,
        "low": {"name": "hf", "path": str(low), "layer": settings["mm_vision_select_layer"]},
        "high": {"name": "convnext_multiscale", "path": str(high), "image_size": settings["image_size_aux"]},
        "grid": settings["image_grid"],
        "global_view": settings["image_global"],
    }
    return {
        "vision_encoder": encoder,
        "connector": {"name": "patch_info_mining"},
        "language_model": language(name, make_language_model(root / "lm", name)),
        "template": "vicuna_v1",
        "checkpoint": str(checkpoint),
    }


def test_encoders_that_were_trained_are_taken(tmp_path: Path) -> None:
    tensors = {n: t * 1.5 if ".encoder.layers.0." in n else t for n, t in visual_tensors(LLAMA).items()}
    torch.save(tensors, tmp_path / "mm_projector.bin")
    model, _, _ = load(over_folders(tmp_path / "base", LLAMA, tmp_path / "mm_projector.bin"))
    changed = {n for n in model.trained_before if n.startswith("vision_encoder.")}
    assert changed and all(n.startswith("vision_encoder.low.model.encoder.layers.0.") for n in changed)
    name = "encoder.layers.0.mlp.fc1.weight"
    given = tensors[f"model.vision_tower.vision_tower.vision_model.{name}"]
    assert torch.equal(model.vision_encoder.low.model.get_parameter(name), given)


def test_a_bare_projector(tmp_path: Path) -> None:
    """What the original takes for one: names without a prefix below ``model``."""
    own = {n.split("mm_projector.")[1]: t for n, t in visual_tensors(LLAMA, "mm_projector").items()}
    torch.save({"model": own}, tmp_path / "bare.bin")
    model, _, _ = load(over_folders(tmp_path / "base", LLAMA, tmp_path / "bare.bin"))
    same_model(model.connector.projector, whole(LLAMA).connector.projector)
    assert model.load_reports[-1].still_random == ["connector"]
    assert dict(inspect_path(str(tmp_path / "bare.bin")))["good for"] == "model.checkpoint"


@pytest.mark.parametrize("lost", ["vlm_uni_query_projector.1.bias", "mm_projector.0.weight", "vision_stem.0.bias"])
def test_a_hole_in_the_file_is_named(lost: str, tmp_path: Path) -> None:
    torch.save({n: t for n, t in visual_tensors(LLAMA).items() if not n.endswith(lost)}, tmp_path / "x.bin")
    assert "missing      1  (" in refusal(over_folders(tmp_path / "base", LLAMA, tmp_path / "x.bin"))


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_file_of_another_width_names_the_key(kind: str, tmp_path: Path) -> None:
    node = over_folders(tmp_path / "base", LLAMA, make_stage1(tmp_path / "stage1", GEMMA))
    if kind == "file":
        node["checkpoint"] += "/mm_projector.bin"
    theirs, ours = (settings_of(name)["hidden_size"] for name in (GEMMA, LLAMA))
    wanted = f"width of the language model: {theirs} in the file, {ours} in the model (model.language_model)"
    assert wanted in refusal(node)


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    folder = make_stage1(tmp_path / "x", LLAMA)
    content = (folder / "mm_projector.bin").read_bytes()
    (folder / "mm_projector.bin").write_bytes(content[: len(content) // 2])
    message = refusal(section(LLAMA, folder, make_language_model(tmp_path / "lm", LLAMA)))
    assert "mm_projector.bin cannot be read: it is cut off or damaged" in message


# --- LoRA -----------------------------------------------------------------------------------------------------------


@each_folder
@pytest.mark.parametrize("named", ["by the folder", "by the section"])
def test_lora_beside_its_base_and_merged(name: str, named: str, tmp_path: Path) -> None:
    base = make_language_model(tmp_path / "lm", name)
    make_towers(tmp_path, name)
    folder = make_lora(tmp_path / "lora", name, base if named == "by the folder" else tmp_path / "nowhere")
    shutil.rmtree(folder / settings_of(name)["mm_vision_tower"])
    node = section(name, folder, None if named == "by the folder" else base)
    model, processor, _ = load(node)
    wanted, other, _ = load(section(name, make_folder(tmp_path / "merged", name, merged(name, folder))))
    other.config.image.config.resize = processor.config.image.config.resize
    torch.testing.assert_close(logits(model, processor), logits(wanted, processor), rtol=0, atol=2e-4)
    assert not torch.allclose(logits(whole(name), processor), logits(wanted, processor), atol=1e-2)
    assert model.load_reports[-1].still_random == []


def test_lora_on_experts_is_refused(tmp_path: Path) -> None:
    base = make_language_model(tmp_path / "lm", MIXTRAL)
    message = refusal(section(MIXTRAL, make_lora(tmp_path / "x", MIXTRAL, base, ("q_proj", "w1"))))
    assert "adapters on experts or routers" in message and "give the merged folder" in message


# --- inspect --------------------------------------------------------------------------------------------------------


def test_inspect_says_what_it_is_and_which_key_takes_it(tmp_path: Path) -> None:
    settings = settings_of(HD)
    rows = dict(inspect_path(str(make_folder(tmp_path / "hd", HD))))
    assert rows["holds"] == "a model of Mini-Gemini" and rows["good for"] == "model.checkpoint"
    assert f"grid {settings['image_grid']}" in rows["vision_encoder"]
    assert f"hidden_size {settings['mm_hidden_size']}" in rows["vision_encoder.low"]
    assert f"image_size {settings['image_size_aux']}" in rows["vision_encoder.high"]
    assert rows["connector"] == "patch_info_mining" and rows["connector.projector"] == "mlp 2"
    base = make_language_model(tmp_path / "lm", LLAMA)
    stage1 = make_stage1(tmp_path / "stage1", LLAMA)
    for path in (stage1, stage1 / "mm_projector.bin"):
        rows = dict(inspect_path(str(path)))
        assert rows["holds"].startswith("mining and projector of Mini-Gemini's first stage")
        assert rows["good for"] == "model.checkpoint"
    assert dict(inspect_path(str(stage1)))["to be named"].startswith("model.language_model.path")
    rows = dict(inspect_path(str(make_lora(tmp_path / "lora", LLAMA, base))))
    assert rows["holds"] == "LoRA in Mini-Gemini's layout" and rows["base"] == str(base)
    assert "rank 4, alpha 8, on q_proj, v_proj" in rows["LoRA"]
    _, high = make_towers(tmp_path / "towers", LLAMA)
    rows = dict(inspect_path(str(high)))
    assert rows["format"].startswith("folder of OpenCLIP") and "high.path" in rows["good for"]
    assert "convnext_multiscale" in rows["good for"] and rows["holds"].startswith("OpenCLIP with a ConvNeXt")


@pytest.mark.parametrize("key", ["image_size_aux", "mm_vision_tower_aux", "image_grid", "image_global", "vocab_size"])
@pytest.mark.parametrize("value", ["x", [1], {"a": 1}, -1, 1.5, True])
def test_config_json_of_any_types_never_ends_in_a_traceback(key: str, value: Any, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "x", LLAMA)
    change_config(folder, **{key: value})
    try:
        load(section(LLAMA, folder), meta=True)
    except (ModelError, ConfigError) as error:
        assert 20 < len(str(error)) < 2000
