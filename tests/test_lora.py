"""LoRA in every part: which layers get adapters, what trains, what files hold, QLoRA."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_imp import GENERATIONS, golden_json
from golden_minigpt4 import golden_minigpt4
from helpers import tiny_model, write_yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from tuning_models import PHI, QKV, batch, build, logits, section, stir

import minivlm
from minivlm.api import assemble
from minivlm.checkpoints.export import export_minigpt4
from minivlm.checkpoints.native import Manifest, read_manifest, save_model, trained_names
from minivlm.config import ConfigError, load_config
from minivlm.config.loader import parse_model
from minivlm.datasets.feature_cache import frozen_parts
from minivlm.models.base import ModelError, PartModule
from minivlm.models.hub import hash_tensors
from minivlm.models.lora import add_lora, base_state, is_adapter, merge_lora
from minivlm.models.tuning import apply_freeze, parameter_groups
from minivlm.models.vlm import PARTS, VisionLanguageModel
from minivlm.runners.experiment import run_experiment
from minivlm.schema import LoraSettings

QUIET = Console(quiet=True)
EVERY = {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2", "lm_head"}


def adapted(module: PartModule) -> set[str]:
    """Paths of the layers with an adapter."""
    return {
        name.partition(".lora_")[0] for name, _ in module.named_parameters(remove_duplicate=False) if "lora_B" in name
    }


def ends(module: PartModule) -> set[str]:
    return {path.split(".")[-1] for path in adapted(module)}


# --- which layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({}, EVERY),
        ({"target_modules": "all-linear"}, EVERY - {"lm_head"}),
        ({"target_modules": ["q_proj", "v_proj"]}, {"q_proj", "v_proj"}),
        ({"target_modules": "fc*"}, {"fc1", "fc2"}),
        ({"target_modules": ["model.layers.*.self_attn.*"]}, {"q_proj", "k_proj", "v_proj", "dense"}),
        ({"exclude_modules": ["mlp.*", "lm_head"]}, {"q_proj", "k_proj", "v_proj", "dense"}),
    ],
)
def test_layers_are_named_by_the_end_of_their_path_or_a_glob(asked: dict[str, Any], found: set[str]) -> None:
    model, _, _ = build(section({"r": 2, **asked}), meta=True)
    assert ends(model.language_model) == found
    assert not model.connector.adapter_parameters and not model.vision_encoder.adapter_parameters


def test_one_layer_by_its_full_path_and_no_other() -> None:
    """A name that is the end of another one, as ``fc1`` of ``other_fc1``, takes nothing else."""
    part = PartModule()
    part.fc1, part.other_fc1 = nn.Linear(2, 2), nn.Linear(2, 2)
    part.inner = nn.ModuleDict({"fc1": nn.Linear(2, 2), "x": nn.ModuleDict({"fc1": nn.Linear(2, 2)})})
    one = copy.deepcopy(part)
    add_lora("connector", one, LoraSettings(target_modules=["inner.fc1"]))
    assert adapted(one) == {"inner.fc1"}
    some = copy.deepcopy(part)
    add_lora("connector", some, LoraSettings(target_modules=["fc1"], exclude_modules=["x.fc1"]))
    assert adapted(some) == {"fc1", "inner.fc1"}


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_what_fits_no_layer_is_named(key: str) -> None:
    with pytest.raises(ModelError, match=rf"lora\.{key}: HFLanguageModel has no layer query; its .* dense, fc1, fc2"):
        build(section({key: ["query"]}), meta=True)


def test_no_layer_left() -> None:
    with pytest.raises(ModelError, match=r"model\.language_model\.lora: no linear layer of HFLanguageModel is left"):
        build(section({"exclude_modules": ["*"]}), meta=True)


def test_every_part_takes_adapters() -> None:
    model = section({"r": 2})
    model["vision_encoder"]["lora"] = {"r": 3}
    model["connector"]["lora"] = {"r": 2, "target_modules": ["layers.0"]}
    built, _, config = build(model)
    assert ends(built.vision_encoder) == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}
    assert adapted(built.connector) == {"layers.0"} and config.connector.lora.r == 2
    trains = {name for name, p in built.named_parameters() if p.requires_grad}
    assert trains == {f"{part}.{name}" for part in PARTS for name in getattr(built, part).adapter_parameters}
    built.train()
    built(batch(built)).loss.backward()
    assert all(p.grad is not None for p in built.parameters() if p.requires_grad)


def test_eva_runs_through_its_adapters() -> None:
    """Its fused attention layer is called with a bias of its own, past the layer itself."""
    model = tiny_model()
    sizes = {"image_size": 28, "width": 32, "depth": 2, "num_heads": 4}
    model["vision_encoder"] = {"name": "eva_clip_g", **sizes}
    plain, _, _ = build(model)
    model["vision_encoder"]["lora"] = {"r": 2, "target_modules": ["qkv"]}
    built, _, _ = build(model)
    built.vision_encoder.load_state_dict(plain.vision_encoder.state_dict(), strict=False)
    pixels = torch.randn(1, 3, 28, 28)
    torch.testing.assert_close(built.vision_encoder(pixels), plain.vision_encoder(pixels))
    built.vision_encoder(pixels).sum().backward()
    grads = [p.grad for name, p in built.vision_encoder.named_parameters() if "lora_B" in name]
    assert len(grads) == 2 and all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_an_encoder_out_of_reach_takes_none() -> None:
    class Remote(PartModule):
        can_train = False

    with pytest.raises(ModelError, match=r"model\.vision_encoder\.lora: this part cannot train"):
        add_lora("vision_encoder", Remote(), LoraSettings())


def test_settings_are_checked_where_they_stand() -> None:
    with pytest.raises(ConfigError, match=r"language_model\.lora\.rank"):
        parse_model(section({"rank": 3}), "test")
    with pytest.raises(ConfigError, match=r"connector\.lora\.r"):
        parse_model(tiny_model() | {"connector": {"name": "mlp", "lora": {"r": 0}}}, "test")


# --- one matrix A for neighbours ------------------------------------------------------------------------------------


def test_shared_a_is_one_parameter_and_survives_a_file(tmp_path: Path) -> None:
    lora = {"r": 2, "dropout": 0.0, "shared_a": QKV}
    model, processor, config = build(section(lora))
    stir(model)
    names = [name for name in model.language_model.adapter_parameters if "self_attn" in name and "lora_A" in name]
    assert sorted(name.split(".")[-4] for name in names) == ["dense", "dense", "q_proj", "q_proj"]
    save_model(tmp_path / "model", model, config, processor, Manifest(trained=trained_names(model)))
    again, _ = minivlm.load(tmp_path / "model", device="cpu")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    attention = again.language_model.model.model.layers[1].self_attn
    assert attention.q_proj.lora_A["default"].weight is attention.v_proj.lora_A["default"].weight


def test_shared_a_has_the_gradients_of_one_fused_layer() -> None:
    torch.manual_seed(0)
    parts, fused = PartModule(), PartModule()
    for name in ("q", "k", "v"):
        parts.add_module(name, nn.Linear(6, 4))
    fused.add_module("qkv", nn.Linear(6, 12))
    add_lora("language_model", parts, LoraSettings(r=2, alpha=4, dropout=0, shared_a=[["q", "k", "v"]]))
    add_lora("language_model", fused, LoraSettings(r=2, alpha=4, dropout=0))
    rows: Any = torch.randn(12, 2)
    with torch.no_grad():
        layers = [parts.get_submodule(name) for name in ("q", "k", "v")]
        whole: Any = fused.get_submodule("qkv")
        whole.base_layer.weight.copy_(torch.cat([layer.base_layer.weight for layer in layers]))  # type: ignore
        whole.base_layer.bias.copy_(torch.cat([layer.base_layer.bias for layer in layers]))  # type: ignore
        whole.lora_A["default"].weight.copy_(layers[0].lora_A["default"].weight)  # type: ignore
        whole.lora_B["default"].weight.copy_(rows)
        for layer, chunk in zip(layers, rows.chunk(3), strict=True):
            layer.lora_B["default"].weight.copy_(chunk)  # type: ignore
    x, weight = torch.randn(5, 6), torch.randn(5, 12)
    split = torch.cat([layer(x) for layer in layers], dim=-1)
    torch.testing.assert_close(split, whole(x))
    (split * weight).sum().backward()
    (whole(x) * weight).sum().backward()
    a, b = (layers[0].lora_A["default"].weight.grad, whole.lora_A["default"].weight.grad)  # type: ignore
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(
        torch.cat([x.lora_B["default"].weight.grad for x in layers]), whole.lora_B["default"].weight.grad
    )  # type: ignore
    assert sum(p.numel() for n, p in parts.named_parameters() if is_adapter(n)) == 2 * 6 + 2 * 12
    for part in (parts, fused):
        merge_lora("language_model", part)
    torch.testing.assert_close(
        torch.cat([parts.get_submodule(n)(x) for n in "qkv"], dim=-1), fused.get_submodule("qkv")(x)
    )


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([["q_proj", "w_proj"]], r"self_attn\.w_proj beside .*q_proj is no layer with an adapter"),
        ([["fc1", "fc2"]], r"inputs of different sizes"),
        ([["q_proj"]], r"wants two or more layers"),
        ([["qkv", "k_proj"]], r"wants two or more layers, all with adapters"),
    ],
)
def test_groups_that_cannot_share(groups: list[list[str]], message: str) -> None:
    with pytest.raises(ModelError, match=rf"model\.language_model\.lora\.shared_a: .*{message}"):
        build(section({"shared_a": groups}))


# --- what trains, what stays ----------------------------------------------------------------------------------------


def test_training_changes_neither_the_encoder_nor_the_base(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    """The encoder has layers called q_proj, too; all of the language model's layers get adapters."""
    tiny_experiment["model"] = section({"r": 2}, gradient_checkpointing=True) | {
        "connector": {"name": "mlp", "init_lr": 1e-3}
    }
    tiny_experiment["run"] |= {"max_steps": 3}
    config = load_config(write_yaml(tmp_path / "x.yaml", tiny_experiment))
    torch.manual_seed(config.stages[0].run.seed)
    before, _, _ = assemble(copy.deepcopy(config.stages[0].model))
    run_experiment(config, QUIET)
    after, _ = minivlm.load(tmp_path / "out", device="cpu")
    assert any("q_proj" in name for name, _ in after.vision_encoder.named_modules())

    def hashes(model: VisionLanguageModel) -> list[str]:
        encoder, language = model.vision_encoder.state_dict(), base_state(model.language_model)
        return [hash_tensors(state.items()) for state in (encoder, language)]

    assert hashes(after) == hashes(before)
    for part in ("vision_encoder", "language_model"):
        for name, tensor in base_state(getattr(before, part)).items():
            assert torch.equal(tensor, getattr(after, part).state_dict()[name]), name
    b = [p for name, p in after.language_model.named_parameters() if "lora_B" in name]
    assert len(b) == 13 and all(p.abs().sum() > 0 for p in b), "every adapter has learned"
    weights = [model.connector.get_parameter("layers.0.weight") for model in (before, after)]
    assert not torch.equal(*weights)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_golden_imp_groups_of_the_optimiser(generation: str) -> None:
    """Adapters at one rate, the projector at another, its biases without decay."""
    expected, sizes = golden_json(f"{generation}/expected_train.json"), golden_json(f"{generation}/config.json")
    layers = sizes.get("num_hidden_layers") or sizes["n_layer"]
    fused = any("Wqkv" in name for group in expected["groups"] for name in group["names"])
    lora = {"r": expected["r"], "alpha": expected["alpha"], "dropout": expected["dropout"]}
    model = section(lora | ({"shared_a": QKV} if fused else {}), gradient_checkpointing=True)
    model["language_model"]["config"] = {**PHI, "num_hidden_layers": layers}
    model["connector"] |= {"init_lr": expected["mm_projector_lr"]}
    built, _, config = build(model, meta=True)
    ours = {
        (g["lr"], g["weight_decay"] > 0): set(g["param_names"])
        for g in parameter_groups(built, config, expected["lr"], 0.1)
    }
    found = {key: {_golden_name(name) for name in names} for key, names in ours.items()}
    lm, lm_undecayed, projector, biases = ({_fused_name(n) for n in g["names"]} for g in expected["groups"])
    assert found == {(expected["lr"], True): lm, (expected["mm_projector_lr"], True): projector} | {
        (expected["mm_projector_lr"], False): biases
    }
    assert not lm_undecayed


def _golden_name(ours: str) -> str:
    """Three layers of ours, one of which holds their common A, are one in the older layout."""
    name = ours.replace("connector.layers.", "mm_projector.").replace("language_model.model.", "")
    return re.sub(r"\.[qkv]_proj\.", ".Wqkv.", name)


def _fused_name(theirs: str) -> str:
    """Their names in the newer layout; q, k and v count as one."""
    name = theirs.removeprefix("base_model.model.")
    name = re.sub(r"^(model|transformer)\.mm_projector", "mm_projector", name)
    name = name.replace("transformer.h.", "model.layers.").replace("mixer.Wqkv", "self_attn.Wqkv")
    name = name.replace("mixer.out_proj", "self_attn.dense").replace("lm_head.linear", "lm_head")
    return re.sub(r"\.[qkv]_proj\.", ".Wqkv.", name)


def test_everything_trains_without_lora_and_rates_are_by_part() -> None:
    model = section(None, freeze=False, gradient_checkpointing=True, init_lr=2e-5)
    built, _, config = build(model)
    built.train()
    built(batch(built)).loss.backward()
    language = [p for name, p in built.language_model.named_parameters() if "embed" not in name]
    assert all(p.grad is not None for p in language)
    lrs = {g["name"]: g["lr"] for g in parameter_groups(built, config, 1e-3, 0.0)}
    assert lrs["language_model"] == lrs["language_model (no decay)"] == 2e-5 and lrs["connector"] == 1e-3


def test_gradients_are_those_without_checkpointing() -> None:
    found = []
    for checkpointing in (False, True):
        model, _, _ = build(section({"r": 2, "dropout": 0.0}, gradient_checkpointing=checkpointing))
        stir(model)
        model.connector.requires_grad_(False)  # no input of the language model has gradients
        model.train()
        model(batch(model)).loss.backward()
        found.append([p.grad for n, p in model.language_model.named_parameters() if is_adapter(n)])
    assert len(found[0]) == 2 * 13 and all(grad is not None and grad.abs().sum() > 0 for grad in found[1])
    torch.testing.assert_close(found[0], found[1])


def test_state_dicts_have_the_names_of_the_plain_model() -> None:
    plain, _, _ = build(section())
    model, _, _ = build(section({"r": 2}))
    own = {name for name in model.state_dict() if not is_adapter(name)}
    assert own == set(plain.state_dict())
    with torch.no_grad():
        plain.language_model.get_parameter("model.model.layers.0.mlp.fc1.weight").add_(1.0)
    model.language_model.load_state_dict(plain.language_model.state_dict(), strict=False)
    torch.testing.assert_close(logits(model), _logits_with(plain, model))


def _logits_with(plain: VisionLanguageModel, like: VisionLanguageModel) -> torch.Tensor:
    plain.connector.load_state_dict(like.connector.state_dict())
    plain.vision_encoder.load_state_dict(like.vision_encoder.state_dict())
    return logits(plain)


# --- files ----------------------------------------------------------------------------------------------------------


def save(folder: Path, model: dict[str, Any]) -> VisionLanguageModel:
    built, processor, config = build(model)
    save_model(folder, built, config, processor, Manifest(trained=trained_names(built)))
    return built


def test_adapters_start_from_a_checkpoint_without_any(tmp_path: Path) -> None:
    before = save(tmp_path / "stage1", section())
    again = section({"r": 2}) | {"checkpoint": str(tmp_path / "stage1")}
    model, _, _ = build(again)
    torch.testing.assert_close(logits(model), logits(before))


def test_a_checkpoint_with_adapters_brings_them(tmp_path: Path) -> None:
    saved = save(tmp_path / "model", section({"r": 2}))
    model, _, _ = build(section() | {"checkpoint": str(tmp_path / "model")})
    assert model.language_model.lora is not None and model.language_model.lora.r == 2
    torch.testing.assert_close(logits(model), logits(saved))
    with pytest.raises(ModelError, match=r"wrong shape +2[56] "):
        build(section({"r": 3}) | {"checkpoint": str(tmp_path / "model")})


def test_lora_on_a_whole_model_does_not_write_it_again(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole", section())
    start = section({"r": 2}) | {"checkpoint": str(tmp_path / "whole")}
    model, processor, config = build(start)
    stir(model)
    save_model(
        tmp_path / "tuned", model, config, processor, Manifest(trained=trained_names(model, model.trained_before))
    )
    manifest = read_manifest(tmp_path / "tuned")
    source = manifest.sources["language_model"]
    assert source and source["path"] == str(tmp_path / "whole") and "language_model" not in manifest.complete
    written = load_file(tmp_path / "tuned" / "model.safetensors")
    assert {name for name in written if name.startswith("language_model.") and not is_adapter(name)} == set()
    again, _ = minivlm.load(tmp_path / "tuned", device="cpu")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)
    once_more, _, _ = build({"checkpoint": str(tmp_path / "tuned")})
    torch.testing.assert_close(logits(once_more), logits(model), rtol=0, atol=0)
    assert not torch.equal(logits(again), logits(whole))
    with torch.no_grad():
        for parameter in whole.language_model.parameters():
            parameter.add_(1.0)
    built, processor, config = build(section())
    built.load_state_dict(whole.state_dict())
    save_model(tmp_path / "whole", built, config, processor, Manifest())
    with pytest.raises(ModelError, match="was trained on other weights of language_model"):
        minivlm.load(tmp_path / "tuned", device="cpu")


def test_a_part_of_a_model_folder(tmp_path: Path) -> None:
    stage1 = save(tmp_path / "stage1", section() | {"connector": {"name": "mlp", "depth": 2}})
    model = section({"r": 2})
    model["connector"]["weights"] = str(tmp_path / "stage1")
    torch.manual_seed(9)
    built, processor, config = assemble(parse_model(copy.deepcopy(model), "test"))
    for name, tensor in stage1.connector.state_dict().items():
        assert torch.equal(tensor, built.connector.state_dict()[name])
    assert not torch.equal(
        built.language_model.embed(torch.tensor([3])), stage1.language_model.embed(torch.tensor([3]))
    )
    save_model(tmp_path / "tuned", built, config, processor, Manifest(trained=trained_names(built)))
    assert "connector" in read_manifest(tmp_path / "tuned").complete
    model["connector"]["depth"] = 3
    with pytest.raises(ModelError, match=r"model\.connector\.weights: .*stage1 holds another connector"):
        build(model)
    model = section({"r": 2}, weights=str(tmp_path / "stage1"))
    save(tmp_path / "adapters", model)
    with pytest.raises(ModelError, match=r"holds only what was trained of language_model; `minivlm merge"):
        build(section(weights=str(tmp_path / "adapters")))


def test_a_file_for_a_part_with_adapters(tmp_path: Path) -> None:
    model = section()
    trained, _, _ = build(model)
    save_file({name: t + 1 for name, t in trained.connector.state_dict().items()}, tmp_path / "x.safetensors")
    model["connector"] |= {"lora": {"r": 2}, "weights": str(tmp_path / "x.safetensors")}
    built, _, _ = build(model)
    for name, tensor in base_state(built.connector).items():
        assert torch.equal(tensor, trained.connector.state_dict()[name] + 1)
    assert ends(built.connector) == {"0", "2"}


def test_a_feature_cache_knows_the_scale_of_frozen_adapters() -> None:
    found = []
    for alpha in (1, 2):
        model = section()
        model["vision_encoder"] |= {"lora": {"r": 2, "alpha": alpha}, "freeze": ["*"]}
        built, _, _ = build(model)
        assert built.is_frozen("vision_encoder")
        found.append(frozen_parts(built, {})["vision_encoder"])
    assert found[0]["hash"] == found[1]["hash"] and found[0] != found[1]


def test_the_file_of_minigpt4_has_no_place_for_other_adapters(tmp_path: Path) -> None:
    model = golden_minigpt4("v2", checkpoint=None)
    model["vision_encoder"] |= {"lora": {"r": 2}, "weights": None}
    save(tmp_path / "model", model)
    with pytest.raises(ModelError, match=r"is no MiniGPT-4, which has no vision_encoder\.lora; see minivlm merge"):
        export_minigpt4(tmp_path / "model", tmp_path / "x.pth")


def test_resuming_in_the_middle_of_lora_is_exact(
    tiny_experiment: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "whole", section())
    tiny_experiment["model"] = section({"r": 2, "shared_a": QKV}) | {"checkpoint": str(tmp_path / "whole")}
    tiny_experiment["run"] |= {"max_steps": 4, "save_freq": 2, "max_epoch": 2}
    config = write_yaml(tmp_path / "x.yaml", tiny_experiment)
    whole, broken = tmp_path / "one", tmp_path / "two"
    run_experiment(load_config(config, [f"run.output_dir={whole}"]), QUIET)
    run_experiment(load_config(config, [f"run.output_dir={broken}"]), QUIET)
    (broken / "done.json").unlink()
    shutil.rmtree(broken / "model")
    shutil.rmtree(broken / "checkpoints" / "step_00000004")
    run_experiment(load_config(config, [f"run.output_dir={broken}"]), QUIET)
    first, second = (minivlm.load(folder, device="cpu")[0].state_dict() for folder in (whole, broken))
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- QLoRA ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    settings = {key: value for key, value in PHI.items() if key != "model_type"}
    settings |= {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 360}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("phi", **settings)).save_pretrained(folder)
    return str(folder)


def test_a_real_step_of_qlora(base: str, tmp_path: Path) -> None:
    """Quantised layers below fp32 adapters; embeddings and head in the compute type, norms in fp32."""
    quantised = {"path": base, "config": None, "quantization": "nf4", "gradient_checkpointing": True}
    model, processor, config = build(section({"r": 2}, **quantised))
    language = model.language_model
    kinds = {name: str(p.dtype).removeprefix("torch.") for name, p in language.named_parameters()}
    assert {kinds[name] for name in kinds if is_adapter(name)} == {"float32"}
    assert {kinds[n] for n in kinds if "layernorm" in n} == {"float32"}
    assert {kinds[n] for n in kinds if "embed_tokens" in n or "lm_head.base_layer" in n} == {"bfloat16"}
    linear = [n for n in kinds if n.endswith("base_layer.weight") and "lm_head" not in n]
    assert len(linear) == 12 and {kinds[name] for name in linear} == {"uint8"}
    base_before = {name: t.clone() for name, t in base_state(language).items()}
    optimizer = torch.optim.AdamW(parameter_groups(model, config, 1e-2, 0.0))
    model.train()
    losses = []
    for autocast in (True, False, True, False):  # as the runner does it, and as a chat does
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(batch(model)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, tensor in base_state(language).items():
        assert torch.equal(tensor, base_before[name]), name
    assert all(p.abs().sum() > 0 for n, p in language.named_parameters() if "lora_B" in n)
    save_model(tmp_path / "model", model, config, processor, Manifest(trained=trained_names(model)))
    again, _ = minivlm.load(tmp_path / "model", device="cpu")
    torch.testing.assert_close(logits(again), logits(model))
    with pytest.raises(ModelError, match="not merged into a quantised base; set quantization: null"):
        merge_lora("language_model", language)


def test_quantised_weights_do_not_train(base: str) -> None:
    with pytest.raises(ModelError, match=r"model\.language_model: quantised weights cannot train; .*lora"):
        build(section(None, path=base, config=None, quantization="nf4", freeze=False))


def test_freeze_globs_reach_adapters() -> None:
    model, _, _ = build(section({"r": 2}))
    apply_freeze("language_model", model.language_model, ["*.layers.0.*"])
    trains = {name for name, p in model.language_model.named_parameters() if p.requires_grad}
    assert trains == {n for n in model.language_model.adapter_parameters if ".layers.0." not in n}
