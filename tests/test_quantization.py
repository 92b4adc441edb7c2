"""Quantising a language model that is not read from a folder of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llava_folders import TOKENIZER, WIDTH, first_layout, make_language_model, make_llava
from safetensors.torch import load_file, save_file
from torch import nn
from tuning_models import PHI, batch, build, logits, section, stir

import minivlm
from minivlm.checkpoints.native import Manifest, load_weights, read_config, read_manifest, save_model, trained_names
from minivlm.checkpoints.report import CheckpointError
from minivlm.cli import main
from minivlm.export import assemble_own
from minivlm.models.base import ModelError
from minivlm.models.lora import base_state, is_adapter
from minivlm.models.tuning import parameter_groups
from minivlm.models.vlm import VisionLanguageModel
from minivlm.runners.memory import _linear_weights

WIDE = {**PHI, "hidden_size": 64, "intermediate_size": 128}
KINDS = ["nf4", "int8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same language model in base/ (transformers), whole/ (a complete model folder) and plain.safetensors."""
    folder = tmp_path_factory.mktemp("quantization")
    model, processor, config = build(section(config=WIDE))
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter.copy_(parameter.bfloat16())  # norms are kept in fp32 below adapters, and then all are the same
    inner = model.language_model.model
    inner.save_pretrained(folder / "base")
    processor.tokenizer.save_pretrained(folder / "base")
    save_model(folder / "whole", model, config, processor, Manifest())
    save_file(model.language_model.state_dict(), folder / "plain.safetensors")
    return folder


def quantised(kind: str, lora: dict[str, Any] | None = None, **language: Any) -> dict[str, Any]:
    return section(lora, quantization=kind, dtype="bf16", **language)


def from_path(place: Path, kind: str, lora: dict[str, Any] | None = None, **language: Any) -> dict[str, Any]:
    """Read from transformers' folder, which quantises as it reads; every other part is that of ``whole``."""
    found = quantised(kind, lora, path=str(place / "base"), config=None, **language)
    return found | {part: {**found[part], "weights": str(place / "whole")} for part in ("vision_encoder", "connector")}


def from_folder(place: Path, kind: str | None, lora: dict[str, Any] | None = None) -> dict[str, Any]:
    """The whole folder, whose language model the section leaves open."""
    node = {"name": "hf", "quantization": kind, "dtype": "bf16", "lora": lora, "freeze": True}
    return {"checkpoint": str(place / "whole"), "language_model": node}


def same_layers(one: VisionLanguageModel, other: VisionLanguageModel) -> None:
    first, second = (base_state(model.language_model) for model in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name
    kinds = [{n: type(m) for n, m in model.language_model.named_modules()} for model in (one, other)]
    assert kinds[0] == kinds[1]


def save(folder: Path, built: tuple[VisionLanguageModel, Any, Any]) -> dict[str, torch.Tensor]:
    model, processor, config = built
    manifest = Manifest(trained=trained_names(model, model.trained_before))
    save_model(folder, model, config, processor, manifest)
    return load_file(folder / "model.safetensors")


# --- the same as from a path ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, {"r": 2}])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_quantised_as_a_path_is(place: Path, kind: str, lora: dict[str, Any] | None) -> None:
    one, other = build(from_path(place, kind, lora))[0], build(from_folder(place, kind, lora))[0]
    same_layers(one, other)
    if lora:
        stir(one)
        stir(other)
    assert torch.equal(logits(one), logits(other))
    plain = build(from_folder(place, None, None))[0]
    assert not torch.equal(logits(plain), logits(other))


@pytest.mark.parametrize("extra", ["config", "path"])
@pytest.mark.parametrize("weights", ["whole", "plain.safetensors"])
def test_weights_beside_settings_or_a_path(place: Path, weights: str, extra: str) -> None:
    """A path beside weights gives only settings; what lies there is not read."""
    node = quantised("nf4", {"r": 2}, config=WIDE, weights=str(place / weights))
    if extra == "path":
        node["language_model"] |= {"path": str(place / "base"), "config": None}
    model, _, config = build(node)
    same_layers(model, build(from_path(place, "nf4", {"r": 2}))[0])
    assert model.language_model.source["path"] == str(place / weights)
    assert getattr(config.language_model.config, extra), "the section stays as it was written"


def test_a_whole_checkpoint_fills_what_has_a_path(place: Path) -> None:
    model = build(from_path(place, "nf4") | {"checkpoint": str(place / "whole")})[0]
    same_layers(model, build(from_folder(place, "nf4"))[0])
    assert model.language_model.source["path"] == str(place / "whole")


@pytest.mark.parametrize("layout", ["a published Imp", "Phi-2 in its first layout"])
def test_other_layouts(layout: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    phi = make_language_model("phi", intermediate_size=4 * WIDTH, hidden_act="gelu_new", layer_norm_eps=1e-5)
    phi.save_pretrained(tmp_path / "today")
    node = {"tokenizer": str(TOKENIZER), "config": None}
    if layout == "a published Imp":
        folder = make_llava(tmp_path / "imp", "phi", language=phi)[0]
        model = {"checkpoint": str(folder), "language_model": {"name": "hf", "quantization": "nf4", "dtype": "bf16"}}
        model["language_model"]["freeze"] = True
    else:
        folder = first_layout(tmp_path / "first", phi)
        model = quantised("nf4", **node, path=str(folder))
    found = build(model)[0]
    same_layers(found, build(quantised("nf4", **node, path=str(tmp_path / "today")))[0])
    assert found.language_model.source["path"] == str(folder)


@pytest.mark.parametrize("tied", [False, True])
def test_the_layers_that_memory_counts(tied: bool, tmp_path: Path) -> None:
    node = section({"r": 2}, config={**WIDE, "tie_word_embeddings": tied})
    plain = build(node)[0].language_model
    save_file({name: tensor.clone() for name, tensor in base_state(plain).items()}, tmp_path / "own.safetensors")
    node["language_model"] |= {"quantization": "nf4", "weights": str(tmp_path / "own.safetensors")}
    model = build(node)[0].language_model
    done = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.uint8}
    assert done == _linear_weights(plain) - plain.adapter_parameters
    if tied:
        inner = model.model
        assert inner.get_output_embeddings().get_base_layer().weight is inner.get_input_embeddings().weight


# --- training, checkpoints, merging ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_small_checkpoints_and_the_way_back(
    place: Path, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor, config = build(from_folder(place, kind, {"r": 2}))
    before = {name: t.clone() for name, t in base_state(model.language_model).items()}
    optimizer = torch.optim.AdamW(parameter_groups(model, config, 1e-2, 0.0))
    model.train()
    found = []
    for _ in range(3):
        loss = model(batch(model)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    assert found[-1] < found[0]
    for name, tensor in base_state(model.language_model).items():
        assert torch.equal(tensor, before[name]), name
    tensors = save(tmp_path / "tuned", (model, processor, config))
    own = [name for name in tensors if name.startswith("language_model.")]
    assert own and all(map(is_adapter, own))
    saved, manifest = read_config(tmp_path / "tuned")["language_model"], read_manifest(tmp_path / "tuned")
    assert saved["weights"] == str(place / "whole") and saved["quantization"] == kind
    assert manifest.sources["language_model"]["path"] == str(place / "whole")
    again, _ = minivlm.load(tmp_path / "tuned", device="cpu")
    stir(again)
    load_weights(again, tmp_path / "tuned")  # as a run goes on, or takes its best
    assert torch.equal(logits(again), logits(model))

    assert main(["merge", str(tmp_path / "tuned"), str(tmp_path / "merged")]) == 0
    assert "language_model.quantization: null" in capsys.readouterr().out
    plain = build(from_folder(place, None, {"r": 2}))[0]
    load_weights(plain, tmp_path / "tuned")
    merged, _ = minivlm.load(tmp_path / "merged", device="cpu", dtype="fp32")
    assert {p.dtype for p in merged.language_model.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(merged), logits(plain).float(), rtol=0.05, atol=0.05)


def test_below_a_connector_that_trains(place: Path, tmp_path: Path) -> None:
    """Without adapters: checkpoints leave the language model out."""
    model, processor, config = build(from_folder(place, "nf4"))
    tensors = save(tmp_path / "tuned", (model, processor, config))
    assert tensors and not any(name.startswith("language_model.") for name in tensors)
    again, _ = minivlm.load(tmp_path / "tuned", device="cpu")
    same_layers(again, model)
    assert torch.equal(logits(again), logits(model))


def test_another_base_is_refused(place: Path, tmp_path: Path) -> None:
    """Hashes are of the weights as they were before."""
    save(tmp_path / "tuned", build(from_folder(place, "nf4", {"r": 2})))
    other = build(section(config=WIDE))
    nn.init.normal_(other[0].language_model.model.lm_head.weight)
    save(tmp_path / "other", other)
    file = tmp_path / "tuned" / "config.yaml"
    file.write_text(file.read_text().replace(str(place / "whole"), str(tmp_path / "other")))
    with pytest.raises(CheckpointError, match="was trained on other weights of language_model"):
        minivlm.load(tmp_path / "tuned", device="cpu")


# --- what cannot be -------------------------------------------------------------------------------------------------


def test_weights_that_nothing_gives_again(tmp_path: Path) -> None:
    message = "only trained weights that can be read again are quantised: .*minivlm merge"
    with pytest.raises(ModelError, match=message):
        build(quantised("nf4", {"r": 2}))
    save(tmp_path / "tuned", build(section({"r": 2})))  # base and adapters in one folder
    node = {"name": "hf", "quantization": "nf4"}
    with pytest.raises(ModelError, match=message):
        build({"checkpoint": str(tmp_path / "tuned"), "language_model": node})


def test_quantised_weights_neither_train_nor_are_written(place: Path, tmp_path: Path) -> None:
    node = from_folder(place, "nf4")
    (tmp_path / "my.yaml").write_text(json.dumps({"model": node}))
    with pytest.raises(ModelError, match="quantised weights are not written; set quantization: null"):
        assemble_own(str(tmp_path / "my.yaml"))
    node["language_model"]["freeze"] = False
    with pytest.raises(ModelError, match=r"model\.language_model: quantised weights cannot train; .*lora"):
        build(node)


def test_transposed_layers_are_refused() -> None:
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    with pytest.raises(ModelError, match="GPT2LMHeadModel can only be quantised from a folder of transformers"):
        build(quantised("nf4", config=gpt2))
