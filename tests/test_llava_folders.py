"""Folders of LLaVA's kind as checkpoints, bases and weights of parts: what is read, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_imp import GENERATIONS, GOLDEN, golden_image
from helpers import tiny_model, write_yaml
from llava_folders import (
    TINY_LM,
    TOKENIZER,
    VOCABULARY,
    WIDTH,
    change_config,
    first_layout,
    load,
    make_language_model,
    make_llava,
    make_tower,
    projector,
    reshard,
    text_logits,
    write_empty,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, CLIPVisionConfig, SiglipVisionConfig
from transformers.utils import logging

from minivlm.api import assemble
from minivlm.checkpoints.inspection import inspect_path
from minivlm.checkpoints.llava_folder import describe, language_type
from minivlm.checkpoints.report import CheckpointError
from minivlm.cli import main
from minivlm.config import ConfigError, load_config
from minivlm.models.base import ModelError
from minivlm.processors.tokenizer import TokenizerError, load_tokenizer

logging.set_verbosity_error()

IDS = torch.tensor([[5, 9, 200, 31, 7, 300]])
LANGUAGE = {"name": "hf", "tokenizer": str(GOLDEN / "tokenizer")}
each_generation = pytest.mark.parametrize("generation", GENERATIONS)


def own(folder: Path) -> dict[str, Any]:
    """A section that takes all of a folder, whose tokenizer lies elsewhere."""
    return {"checkpoint": str(folder), "language_model": dict(LANGUAGE)}


def copy_golden(generation: str, target: Path, tower: str = "beside") -> Path:
    """A golden whole model; its tower's folder lies ``beside``, ``inside`` or, with ``none``, nowhere."""
    target.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / generation / name, target / name)
    where = {"beside": target.parent, "inside": target}.get(tower)
    if where:
        shutil.copytree(GOLDEN / "siglip-tiny", where / "siglip-tiny")
    return target


def state(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(ours: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert ours.keys() == others.keys()
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, others[name])] == []


def refusal(section: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(section)
    return str(caught.value)


# --- whole folders --------------------------------------------------------------------------------------------------


@each_generation
@pytest.mark.parametrize("safe", [True, False])
def test_shards_are_one_model(generation: str, safe: bool, tmp_path: Path) -> None:
    folder = copy_golden(generation, tmp_path / "whole")
    wanted = state(load(own(folder))[0])
    assert len(reshard(folder, safe)) > 2
    assert_same(state(load(own(folder))[0]), wanted)


@pytest.mark.parametrize("safe", [True, False])
def test_shards_that_lack_or_are_cut_off(safe: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_golden(GENERATIONS[-1], tmp_path / "whole")
    first, *others = reshard(folder, safe)
    content = first.read_bytes()
    first.write_bytes(content[: len(content) // 2])
    message = refusal(own(folder))
    assert first.name in message and "cut off or damaged" in message
    assert main(["inspect", str(folder)]) == 2
    assert "Traceback" not in capsys.readouterr().err
    first.unlink()
    assert re.search(f"whole lacks {first.name}, which .*index.json names", refusal(own(folder)))
    for file in others:
        file.unlink()
    assert re.search(f"whole lacks {first.name}, .*, which .*index.json names", refusal(own(folder)))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"lm_head.weight": "../model.safetensors"}}, r"whole lacks \.\./model.safetensors"),
        ({"weight_map": {"lm_head.weight": ["model.safetensors"]}}, "whole lacks"),
        ({"weight_map": ["model.safetensors"]}, "holds no weight_map"),
        ({}, "holds no weight_map"),
        ([], "holds no mapping"),
    ],
)
def test_an_index_that_is_wrong(index: Any, message: str, tmp_path: Path) -> None:
    folder = copy_golden(GENERATIONS[-1], tmp_path / "whole")
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    if isinstance(index, dict) and isinstance(index.get("weight_map"), dict):
        index = {"weight_map": names | index["weight_map"]}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert re.search(message, refusal(own(folder)))


@each_generation
@pytest.mark.parametrize("part", ["embeddings", "projector", "tower", "head"])
def test_a_tensor_that_lacks_is_named(generation: str, part: str, tmp_path: Path) -> None:
    folder = copy_golden(generation, tmp_path / "whole")
    tensors = load_file(folder / "model.safetensors")
    ends = {
        "embeddings": ("embed_tokens.weight", "wte.weight"),
        "projector": ("mm_projector.2.bias",),
        "tower": ("layers.1.mlp.fc1.weight",),
        "head": ("lm_head.weight", "lm_head.linear.weight"),
    }
    lost = [name for name in tensors if name.endswith(ends[part]) and ("vision" in name) == (part == "tower")]
    assert len(lost) == 1
    save_file({n: t for n, t in tensors.items() if n not in lost}, folder / "model.safetensors")
    message = refusal(own(folder))
    assert "missing      1  (" in message and str(folder) in message


# --- config.json ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava_nonsense"}, "model_type 'llava_nonsense', whose language model is not known"),
        ({"model_type": ...}, ""),
        ({"mm_projector_type": "ldpnet"}, r"projector 'ldpnet' is not known \(linear, mlpNx_gelu\)"),
        ({"mm_projector_type": "mlp0x_gelu"}, "projector 'mlp0x_gelu' is not known"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio 'anyres'; square, pad and crop"),
        ({"num_hidden_layers": ...}, "missing"),
        ({"num_attention_heads": "many"}, "num_attention_heads"),
        ({"hidden_size": 48}, "width of the language model: 32 in the file, 48 in the model"),
        ({"mm_vision_select_layer": "-2"}, "mm_vision_select_layer '-2', wanted is a whole number"),
        ({"mm_vision_select_layer": [-2]}, r"mm_vision_select_layer \[-2\], wanted is a whole number"),
        ({"mm_vision_tower": ["clip"]}, r"mm_vision_tower \['clip'\], wanted is a text"),
        ({"mm_vision_tower": ...}, r"names none \(mm_vision_tower\); name it as model.vision_encoder.path"),
        ({"mm_vision_tower": None}, r"names none \(mm_vision_tower\)"),
        ({"tokenizer_model_max_length": "2048"}, "tokenizer_model_max_length '2048'"),
    ],
)
def test_config_json_that_is_wrong(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder, _ = make_llava(tmp_path / "llava")
    change_config(folder, **change)
    if message:
        assert re.search(message, refusal({"checkpoint": str(folder)}))
    else:
        load({"checkpoint": str(folder)})


def test_config_json_that_is_no_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = make_llava(tmp_path / "llava")
    for content in ("", "{'model_type': 'llava'}", "[1]", '"llava"', "\xff\xfe"):
        (folder / "config.json").write_text(content, encoding="latin-1")
        assert "config.json" in refusal({"checkpoint": str(folder)})
        assert main(["inspect", str(folder)]) == 2
        said = capsys.readouterr().err
        assert "config.json" in said and "Traceback" not in said


@pytest.mark.parametrize("form", ["llama", "phi", "v1", "held"])
def test_config_json_of_any_types_never_ends_in_a_traceback(form: str, tmp_path: Path) -> None:
    """Every key in turn gets a value of another type: the model loads, or the error is one of ours."""
    if form == "v1":
        folder = copy_golden("v1", tmp_path / "whole")
        (folder / "tokenizer.json").write_bytes((GOLDEN / "tokenizer" / "tokenizer.json").read_bytes())
    else:
        tower = make_tower(tmp_path / "clip") if form == "held" else None
        folder, _ = make_llava(tmp_path / "llava", "phi" if form == "phi" else "llama", held=tower)
    original = json.loads((folder / "config.json").read_text())
    refused = 0
    for number, key in enumerate(original):
        for value in ("x", None, [1], {"a": 1}, -1, 1.5, True):
            change_config(folder, **{**original, key: value})
            try:
                section = describe(folder)
                if number % 7 == refused % 7:  # a part of them, since it takes its time
                    load(section, meta=True)
            except (ModelError, ConfigError, TokenizerError) as error:
                refused += 1
                assert 20 < len(str(error)) < 2000
    assert refused > 40


# --- the tower ------------------------------------------------------------------------------------------------------


@each_generation
def test_the_tower_beside_inside_and_as_the_set_has_it(generation: str, tmp_path: Path) -> None:
    wanted = state(load(own(GOLDEN / generation))[0])
    for place in ("beside", "inside"):
        folder = copy_golden(generation, tmp_path / place / "whole", place)
        assert_same(state(load(own(folder))[0]), wanted)


def test_a_tower_whose_heads_nothing_tells(tmp_path: Path) -> None:
    folder = copy_golden(GENERATIONS[-1], tmp_path / "whole", "none")
    wanted = load(own(GOLDEN / GENERATIONS[-1]))[0]
    message = refusal(own(folder))
    assert "no folder 'siglip-tiny' (mm_vision_tower), which tells how many heads" in message
    # Both cures that it names.
    settings = json.loads((GOLDEN / "siglip-tiny" / "config.json").read_text())
    inner = {**settings.get("vision_config", settings), "model_type": "siglip_vision_model"}
    node = {"name": "hf", "layer": -2, "freeze": True, "config": inner}
    assert_same(state(load(own(folder) | {"vision_encoder": node})[0]), state(wanted))
    (folder / "siglip-tiny").mkdir()
    shutil.copyfile(GOLDEN / "siglip-tiny" / "config.json", folder / "siglip-tiny" / "config.json")
    assert_same(state(load(own(folder))[0]), state(wanted))


PUBLISHED_TOWERS = {
    "clip-vit-large-patch14-336": CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    ),
    "clip-vit-base-patch32": CLIPVisionConfig(),
    "siglip-so400m-patch14-384": SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
    ),
    "siglip-base-patch16-224": SiglipVisionConfig(),
}


@pytest.mark.parametrize("name", PUBLISHED_TOWERS)
@pytest.mark.parametrize("kept", ["all", "used"])
def test_shapes_tell_the_towers_that_are_published(name: str, kept: str, tmp_path: Path) -> None:
    """All sizes of CLIP and SigLIP, whether the file holds all layers or, as Imp's, those that are used."""
    real = PUBLISHED_TOWERS[name]
    with torch.device("meta"):
        tower = AutoModel.from_config(real)
    last = f"encoder.layers.{real.num_hidden_layers - 1}."
    names = [n for n in tower.state_dict() if not n.startswith("head.")]
    names = [n for n in names if kept == "all" or not n.startswith(last)]
    folder, tensors = make_llava(tmp_path / "llava")
    shapes = {"model.vision_tower.vision_tower.vision_model." + n: tower.state_dict()[n] for n in names}
    write_empty(folder / "model.safetensors", tensors | shapes)
    change_config(folder, mm_vision_tower=f"somewhere/{name}")
    found = describe(folder)["vision_encoder"]
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size"):
        assert found["config"][key] == getattr(real, key), key
    for key in ("patch_size", "hidden_act", "layer_norm_eps", "model_type"):
        assert found["config"][key] == getattr(real, key), key
    assert (found["layer"], found["class_token"]) == (-2, "drop")


@pytest.mark.parametrize("layer", [-1, -2, -3, 1, 2])
@pytest.mark.parametrize("held", [True, False])
def test_any_layer_of_the_tower(layer: int, held: bool, tmp_path: Path) -> None:
    """The hidden state of transformers with this index, from a tower in the file and one beside it."""
    tower = make_tower(tmp_path / "clip")
    folder, _ = make_llava(tmp_path / "llava", held=tower if held else None, mm_vision_select_layer=layer)
    model, processor, _ = load({"checkpoint": str(folder)})
    pixels = processor.load_pixels(golden_image("wide"))["image"][None]
    with torch.no_grad():
        wanted = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[layer][:, 1:]
        torch.testing.assert_close(model.vision_encoder(pixels), wanted)


@pytest.mark.parametrize(("layer", "message"), [(0, "layer: 0 of a model"), (-9, "layer: -9"), (9, "layer: 9")])
def test_a_layer_that_is_not_there(layer: int, message: str, tmp_path: Path) -> None:
    folder, _ = make_llava(tmp_path / "llava", mm_vision_select_layer=layer)
    with pytest.raises(ModelError, match=message):
        load({"checkpoint": str(folder)})


def test_imps_trap_of_the_last_layer(tmp_path: Path) -> None:
    """With layer -1 Imp deletes all layers, and its file holds none: nothing one could go on with."""
    folder = copy_golden(GENERATIONS[-1], tmp_path / "whole", "none")
    tensors = load_file(folder / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if "vision_model.encoder.layers" not in n}
    save_file(kept, folder / "model.safetensors")
    change_config(folder, mm_vision_select_layer=-1)
    assert "lacks its embeddings or all layers" in refusal(own(folder))


def test_the_class_token(tmp_path: Path) -> None:
    tower = make_tower(tmp_path / "clip")
    folder, _ = make_llava(tmp_path / "llava", mm_vision_select_feature="cls_patch")
    model, processor, _ = load({"checkpoint": str(folder)})
    assert processor.tokens_per_image == 1 + 4 and model.vision_encoder.num_prefix == 1
    pixels = processor.load_pixels(golden_image("wide"))["image"][None]
    with torch.no_grad():
        wanted = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(model.vision_encoder(pixels), wanted)
    siglip = make_tower(tmp_path / "siglip", "siglip")  # which has none
    folder, _ = make_llava(
        tmp_path / "imp", held=siglip, mm_vision_select_feature="cls_patch", mm_vision_tower="siglip"
    )
    assert load({"checkpoint": str(folder)})[1].tokens_per_image == 4


# --- language models ------------------------------------------------------------------------------------------------


def test_model_types() -> None:
    wanted = {
        "llava": "llama",
        "llava_llama": "llama",
        "llava_mistral": "mistral",
        "llava_qwen": "qwen2",
        "llava_qwen2": "qwen2",
        "llava_phi": "phi",
        "imp": "phi",
        "imp_qwen2": "qwen2",
        "imp_qwen1.5": "qwen2",
        "imp_phi3": "phi3",
        "phi-msft": "phi",
    }
    assert {name: language_type({"model_type": name}) for name in wanted} == wanted


@pytest.mark.parametrize("model_type", ["llava_llama", "llava_mistral", "imp_qwen2", "imp_phi3", "imp"])
def test_text_has_the_logits_of_transformers(model_type: str, tmp_path: Path) -> None:
    kind = language_type({"model_type": model_type})
    torch.manual_seed(1)
    theirs = make_language_model(kind)
    folder, tensors = make_llava(tmp_path / "llava", kind, language=theirs, model_type=model_type)
    model, processor, config = load({"checkpoint": str(folder)})
    with torch.no_grad():
        torch.testing.assert_close(text_logits(model, IDS), theirs(IDS).logits, rtol=0, atol=1e-5)
    for name in projector():
        name = name.removeprefix("model.")
        ours = model.connector.state_dict()[name.replace("mm_projector", "layers")]
        assert torch.equal(ours, tensors[f"model.{name}"])
    template = {"qwen2": "qwen2", "phi3": "phi3"}.get(kind, "vicuna_v1")
    assert config.template.name == template
    assert processor.config.image.config.resize == "pad"
    sliding = getattr(model.language_model.model.config, "sliding_window", None)
    assert sliding == getattr(theirs.config, "sliding_window", None)
    assert model.language_model.model.generation_config.use_cache is not False


def test_llava_as_published(tmp_path: Path) -> None:
    """Its tower beside it, half precision, buffers of old transformers, a tower that is frozen."""
    folder, tensors = make_llava(tmp_path / "llava-v1.5-7b", tokenizer_model_max_length=2048)
    half = {name: tensor.half() for name, tensor in tensors.items()}
    half |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(2)}
    save_file(half, folder / "model.safetensors")
    model, processor, _ = load({"checkpoint": str(folder), "language_model": {"name": "hf", "freeze": True}})
    assert model.language_model.dtype == torch.float16 and model.is_frozen("vision_encoder")
    assert processor.config.max_length == 2048 and processor.tokens_per_image == 4
    assert [report.still_random for report in model.load_reports] == [[], []]
    assert sum("inv_freq" in name for r in model.load_reports for v in r.ignored.values() for name in v) in (2, 4)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_square_is_the_towers_own_way(tower: str, tmp_path: Path) -> None:
    """LLaVA hands the picture to the tower's processor: CLIP's crops, SigLIP's squashes."""
    make_tower(tmp_path / tower, tower)
    settings = {"mm_vision_tower": tower, "image_aspect_ratio": "square"}
    folder, _ = make_llava(tmp_path / "llava", **settings)
    resize = {"clip": "shortest_edge", "siglip": "squash"}[tower]
    assert load({"checkpoint": str(folder)})[1].transforms["image"].resize == resize
    change_config(folder, image_aspect_ratio=...)
    assert load({"checkpoint": str(folder)})[1].transforms["image"].resize == resize


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    theirs = make_language_model("qwen2", tie_word_embeddings=True)
    folder, tensors = make_llava(tmp_path / "llava", "qwen2", language=theirs)
    assert "lm_head.weight" not in tensors
    model, _, _ = load({"checkpoint": str(folder)})
    with torch.no_grad():
        torch.testing.assert_close(text_logits(model, IDS), theirs(IDS).logits, rtol=0, atol=1e-5)
    assert model.language_model.unsourced == frozenset()


# --- Phi-2 in its first layout --------------------------------------------------------------------------------------


def test_phi2_in_its_first_layout_is_a_language_model(tmp_path: Path) -> None:
    torch.manual_seed(2)
    phi = make_language_model("phi", intermediate_size=4 * WIDTH, hidden_act="gelu_new", layer_norm_eps=1e-5)
    phi.save_pretrained(tmp_path / "today")
    folder = first_layout(tmp_path / "first", phi)
    section = tiny_model()
    logits = []
    for path in (folder, tmp_path / "today"):
        section["language_model"] = {"name": "hf", "path": str(path), "tokenizer": str(TOKENIZER)}
        model, _, _ = load(section)
        assert model.language_model.source and model.language_model.source["path"] == str(path)
        logits.append(text_logits(model, IDS))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(logits[0], phi(IDS).logits, rtol=0, atol=1e-5)
    rows = dict(inspect_path(str(folder)))
    assert "model.language_model.path" in rows["good for"]


@pytest.mark.parametrize("value", ["96", [2], 1.5, True])
@pytest.mark.parametrize("key", ["n_embd", "n_head", "vocab_size", "rotary_dim", "n_layer", "n_positions"])
def test_phi2_in_its_first_layout_with_odd_sizes(key: str, value: Any, tmp_path: Path) -> None:
    folder = first_layout(tmp_path / "first", make_language_model("phi", intermediate_size=4 * WIDTH))
    change_config(folder, **{key: value})
    section = tiny_model()
    section["language_model"] = {"name": "hf", "path": str(folder), "tokenizer": str(TOKENIZER)}
    with pytest.raises(ModelError):
        load(section, meta=True)


# --- parts ----------------------------------------------------------------------------------------------------------


@each_generation
def test_weights_of_single_parts_from_a_whole_folder(generation: str) -> None:
    """Each part from one folder into the model of another section; the others keep what they had."""
    folder = GOLDEN / generation
    whole, _, config = load(own(folder))
    nodes: dict[str, Any] = {
        "vision_encoder": {"name": "hf", "layer": -2, "config": config.vision_encoder.config.config},
        "connector": {"name": "mlp", "depth": 2},
        "language_model": {
            **LANGUAGE,
            "config": config.language_model.config.config,
            "special_tokens": {"eos_token": "</s>"},
        },
    }
    for part in nodes:
        section = {name: {**node, **({"weights": str(folder)} if name == part else {})} for name, node in nodes.items()}
        model, _, _ = load(section | {"template": "phi2"})
        for name in nodes:
            same = [torch.equal(t, whole.state_dict()[n]) for n, t in model.state_dict().items() if n.startswith(name)]
            matrices = [t.dim() > 1 for n, t in model.state_dict().items() if n.startswith(name)]
            assert all(same) if name == part else not any(s for s, is_matrix in zip(same, matrices) if is_matrix)
        source = getattr(model, part).source
        assert source and source["path"] == str(folder)


@pytest.mark.parametrize("prefix", ["", "model.", "transformer.", "base_model.model.model.", "module.model.", "a.b.c."])
def test_a_projector_with_any_prefix(prefix: str, tmp_path: Path) -> None:
    tensors = projector(prefix)
    torch.save(tensors, tmp_path / "mm_projector.bin")
    section = tiny_model() | {"connector": {"name": "mlp", "weights": str(tmp_path / "mm_projector.bin")}}
    model, _, _ = load(section)
    for name, tensor in tensors.items():
        assert torch.equal(model.connector.state_dict()[name.replace(f"{prefix}mm_projector", "layers")], tensor)
    rows = dict(inspect_path(str(tmp_path / "mm_projector.bin")))
    assert rows["good for"] == "model.connector.weights" and rows["holds"].startswith("a projector of LLaVA")


def test_a_linear_projector(tmp_path: Path) -> None:
    layer = torch.nn.Linear(16, WIDTH)
    torch.save({f"model.mm_projector.{k}": t for k, t in layer.state_dict().items()}, tmp_path / "p.bin")
    model, _, _ = load(tiny_model() | {"connector": {"name": "linear", "weights": str(tmp_path / "p.bin")}})
    assert torch.equal(model.connector.linear.weight, layer.weight)
    message = refusal(tiny_model() | {"connector": {"name": "mlp", "weights": str(tmp_path / "p.bin")}})
    assert "connector" in message and "missing" in message


@pytest.mark.parametrize(("width", "out", "part"), [(24, WIDTH, "vision encoder"), (16, 48, "language model")])
def test_a_projector_of_another_width(width: int, out: int, part: str, tmp_path: Path) -> None:
    torch.save(projector(width=width, out=out), tmp_path / "mm_projector.bin")
    section = tiny_model() | {"connector": {"name": "mlp", "weights": str(tmp_path / "mm_projector.bin")}}
    theirs, ours = (width, 16) if part == "vision encoder" else (out, WIDTH)
    assert f"width of the {part}: {theirs} in the file, {ours} in the model" in refusal(section)


@each_generation
def test_a_folder_of_a_projector_as_checkpoint(generation: str) -> None:
    folder = GOLDEN / generation / "stage1"
    given = torch.load(folder / "mm_projector.bin", weights_only=True)
    language = {**LANGUAGE, "path": str(GOLDEN / generation), "special_tokens": {"eos_token": "</s>"}}
    model, _, _ = load({"checkpoint": str(folder), "language_model": language})
    assert len(given) == 4
    for name, tensor in given.items():
        assert torch.equal(model.connector.state_dict()[f"layers.{name.split('mm_projector.')[1]}"], tensor)
    assert sorted(model.trained_before) == sorted(f"connector.{name}" for name in model.connector.state_dict())
    assert model.load_reports[-1].still_random == []


def test_lora_is_no_weights_of_a_part() -> None:
    for part in ("language_model", "connector"):
        section = tiny_model()
        section[part]["weights"] = str(GOLDEN / GENERATIONS[-1] / "stage2_lora")
        assert "give it as model.checkpoint" in refusal(section)


def test_a_lora_folder_without_its_adapters(tmp_path: Path) -> None:
    """What lies beside the adapters is not taken for a projector of the first stage."""
    source = GOLDEN / GENERATIONS[-1] / "stage2_lora"
    for name in ("config.json", "adapter_config.json", "non_lora_trainables.bin"):
        shutil.copyfile(source / name, tmp_path / name)
    assert "holds no weights (adapter_model.*)" in refusal(own(tmp_path))
    assert "not read on their own" in dict(inspect_path(str(tmp_path)))["holds"]


# --- the section's own keys -----------------------------------------------------------------------------------------


def test_own_keys_win(tmp_path: Path) -> None:
    folder, tensors = make_llava(tmp_path / "llava", tokenizer=False)
    other = make_tower(tmp_path / "other")
    section = {
        "checkpoint": str(folder),
        "vision_encoder": {"name": "hf", "path": str(tmp_path / "other"), "layer": -1},
        "language_model": {"name": "hf", "tokenizer": "asset:quickstart", "freeze": True},
        "template": "qa",
        "processor": {"image": {"name": "image", "resize": "squash"}, "max_length": 77},
    }
    model, processor, config = load(section)
    assert torch.equal(
        model.vision_encoder.model.embeddings.patch_embedding.weight, other.embeddings.patch_embedding.weight
    )
    assert len(model.vision_encoder.model.encoder.layers) == 3  # all of them: layer -1
    assert torch.equal(model.language_model.model.lm_head.weight, tensors["lm_head.weight"])
    assert torch.equal(model.connector.layers[2].weight, tensors["model.mm_projector.2.weight"])
    assert config.template.name == "qa" and processor.config.max_length == 77
    assert processor.transforms["image"].resize == "squash"


def test_a_folder_without_tokenizer_says_which_key_lacks(tmp_path: Path) -> None:
    folder, _ = make_llava(tmp_path / "llava", tokenizer=False)
    with pytest.raises(ModelError, match="needs `tokenizer` instead, and so does a checkpoint without one"):
        load({"checkpoint": str(folder)})
    assert "model.language_model.tokenizer" in dict(inspect_path(str(folder)))["to be named"]


def test_what_trains_is_not_taken_from_a_folder(tmp_path: Path) -> None:
    """A folder freezes the encoder; a node of one's own says so itself."""
    folder, _ = make_llava(tmp_path / "llava")
    alone = load({"checkpoint": str(folder)})[2]
    assert alone.vision_encoder.freeze is True
    given = {"vision_encoder": {"name": "hf"}, "connector": {"name": "mlp", "init_lr": 2e-5, "freeze": True}}
    model, _, config = load({"checkpoint": str(folder), **given})
    assert config.vision_encoder.freeze is None and not model.is_frozen("vision_encoder")
    assert config.vision_encoder.config.layer == -2
    assert config.connector.init_lr == 2e-5 and model.is_frozen("connector")
    assert config.language_model.freeze is None and config.language_model.init_lr is None


def test_a_part_that_is_not_taken_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A preset names bases of its own, which would else silently win over the checkpoint's."""
    folder, _ = make_llava(tmp_path / "llava")
    make_language_model().save_pretrained(tmp_path / "base")
    load({"checkpoint": str(folder)})
    assert "NOTE: of" not in capsys.readouterr().err
    language = {"name": "hf", "path": str(tmp_path / "base"), "tokenizer": str(TOKENIZER)}
    load({"checkpoint": str(folder), "language_model": language})
    said = capsys.readouterr().err
    assert f"NOTE: of {folder} language_model is not taken, since model.language_model names other weights" in said


@pytest.mark.parametrize(
    ("change", "part", "node"),
    [
        ({"model_type": "llava_nonsense"}, "language_model", {"config": {"model_type": "llama", **TINY_LM}}),
        ({"mm_vision_tower": None}, "vision_encoder", {"path": "clip", "layer": -2}),
    ],
)
def test_what_config_json_does_not_tell_can_be_described(
    change: dict[str, Any], part: str, node: dict[str, Any], tmp_path: Path
) -> None:
    folder, _ = make_llava(tmp_path / "llava")
    wanted = state(load({"checkpoint": str(folder)})[0])
    change_config(folder, **change)
    if "path" in node:
        node = {**node, "path": str(tmp_path / node["path"])}
    extra = {"tokenizer": str(TOKENIZER)} if part == "language_model" else {}
    assert_same(state(load({"checkpoint": str(folder), part: {"name": "hf", **node, **extra}})[0]), wanted)


# --- inspect --------------------------------------------------------------------------------------------------------


@each_generation
def test_inspect_says_what_it_is_and_which_key_takes_it(generation: str, tmp_path: Path) -> None:
    fused = generation == "v1"
    rows = dict(inspect_path(str(GOLDEN / generation)))
    assert rows["holds"] == ("Phi-2 in its first layout" if fused else "a model of LLaVA's layout")
    assert rows["good for"] == "model.checkpoint" and rows["connector"] == "mlp 2"
    assert "siglip_vision_model" in rows["vision_encoder"] and "phi" in rows["language_model"]
    rows = dict(inspect_path(str(GOLDEN / generation / "stage1")))
    assert rows["holds"].startswith("a projector of LLaVA") and rows["to be named"].startswith("model.language_model")
    rows = dict(inspect_path(str(GOLDEN / generation / "stage1" / "mm_projector.bin")))
    assert rows["good for"] == "model.connector.weights"
    rows = dict(inspect_path(str(GOLDEN / generation / "model.safetensors")))
    assert rows["good for"] == "model.checkpoint"


def test_inspect_of_llama(tmp_path: Path) -> None:
    folder, _ = make_llava(tmp_path / "llava")
    rows = dict(inspect_path(str(folder)))
    assert rows["language_model"].startswith("llama, ") and f"vocab_size {VOCABULARY}" in rows["language_model"]
    assert rows["vision_encoder"] == str((tmp_path / "clip").resolve()) and rows["template"] == "vicuna_v1"
    assert "to be named" not in rows


# --- special tokens -------------------------------------------------------------------------------------------------


@each_generation
def test_special_tokens_have_the_ids_of_the_original(generation: str, tmp_path: Path) -> None:
    special = json.loads((GOLDEN / generation / "expected_preprocess.json").read_text())["special"]
    plain = load_tokenizer(str(GOLDEN / "tokenizer"))
    tokenizer = load_tokenizer(str(GOLDEN / "tokenizer"), None, {"eos_token": "</s>"})
    assert len(tokenizer) == len(plain) + 1 and tokenizer.eos_token_id == special["</s>"]
    assert tokenizer.pad_token == tokenizer.unk_token == "<|endoftext|>"
    again = load_tokenizer(str(GOLDEN / "tokenizer"), None, {"eos_token": "</s>", "unk_token": "<|endoftext|>"})
    assert len(again) == len(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    for given in (None, {"eos_token": "</s>"}):
        saved = load_tokenizer(str(tmp_path), None, given)
        assert (len(saved), saved.eos_token_id) == (len(tokenizer), tokenizer.eos_token_id)


def test_special_tokens_in_their_order() -> None:
    path = str(GOLDEN / "tokenizer")
    end, start = "<|im_end|>", "<|im_start|>"
    tokenizer = load_tokenizer(path, None, {"eos_token": end, "additional_special_tokens": [start]})
    assert tokenizer.convert_tokens_to_ids([end, start]) == [len(tokenizer) - 2, len(tokenizer) - 1]
    assert tokenizer(f"a{end}{start}b")["input_ids"][1:3] == [len(tokenizer) - 2, len(tokenizer) - 1]


@pytest.mark.parametrize("given", [{"end_token": "</s>"}, {"eos_token": ["</s>"]}])
def test_special_tokens_of_unknown_roles(given: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError, match=r"model.language_model.special_tokens: "):
        load_tokenizer(str(GOLDEN / "tokenizer"), None, given)


# --- files ----------------------------------------------------------------------------------------------------------


@each_generation
def test_a_file_of_a_whole_model_as_checkpoint(generation: str, tmp_path: Path) -> None:
    """It fills the parts that a section describes, and half of it is refused."""
    whole, _, config = load(own(GOLDEN / generation))
    section: dict[str, Any] = {
        "vision_encoder": {"name": "hf", "layer": -2, "config": config.vision_encoder.config.config},
        "connector": {"name": "mlp"},
        "language_model": {**LANGUAGE, "config": config.language_model.config.config},
        "template": "phi2",
    }
    model, _, _ = load(section | {"checkpoint": str(GOLDEN / generation / "model.safetensors")})
    loaded = {n: t for n, t in state(model).items() if "post_layernorm" not in n}
    assert_same(loaded, {n: t for n, t in state(whole).items() if n in loaded})
    folder = copy_golden(generation, tmp_path / "whole")
    for shard in reshard(folder, safe=True):  # without projector it is not even known
        assert re.search(r"missing      \d\d|is no checkpoint", refusal(section | {"checkpoint": str(shard)}))


def test_a_preset_over_a_whole_folder_takes_all_parts_from_it(tmp_path: Path) -> None:
    folder = GOLDEN / "v15" / "merged"
    file = write_yaml(tmp_path / "x.yaml", {"model": {"arch": "imp", "model_type": "v1_3b", "checkpoint": str(folder)}})
    _, processor, config = assemble(load_config(file).stages[-1].model)
    assert all(
        getattr(config, part).weights == str(folder) for part in ("vision_encoder", "connector", "language_model")
    )
    assert processor.config.max_length == 3072, "the rest is the preset's"
