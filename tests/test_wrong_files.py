"""Files that are something else: found before anything large is read, and said in one message."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_minigpt4 import CHECKPOINTS, GOLDEN, golden_minigpt4
from helpers import write_yaml
from safetensors.torch import save_file
from torch import Tensor

from minivlm import api
from minivlm.checkpoints.files import read_weights
from minivlm.checkpoints.native import MANIFEST, WEIGHTS
from minivlm.checkpoints.report import CheckpointError
from minivlm.cli import main
from minivlm.config.loader import parse_model
from minivlm.models.language import hf


@pytest.fixture
def nothing_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of a language model may not be read."""
    monkeypatch.setattr(hf, "from_pretrained", lambda *_, **__: pytest.fail("the language model was read"))


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command says that ends with exit code 2."""
    assert main(list(arguments)) == 2
    said = capsys.readouterr()
    assert "Traceback" not in said.err and said.out == ""
    return said.err


# --- early ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.usefixtures("nothing_large")
def test_a_wrong_file_is_found_first(meta: bool, tmp_path: Path) -> None:
    def refused(section: dict[str, Any], message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            api.assemble(parse_model(section, "test"), meta=meta)

    other = str(GOLDEN / CHECKPOINTS["llama2"])
    refused(golden_minigpt4("vicuna0", checkpoint=other), "the file is of the variant without Q-Former")
    refused(golden_minigpt4("vicuna0", weights=other), "holds MiniGPT-4; give it as model.checkpoint")
    refused(golden_minigpt4("vicuna0", width=128), "width of the vision encoder")
    shutil.copytree(GOLDEN / "llama", tmp_path / "v1")
    settings = json.loads((tmp_path / "v1" / "config.json").read_text())
    (tmp_path / "v1" / "config.json").write_text(json.dumps(settings | {"vocab_size": 32000}))
    section = golden_minigpt4("vicuna0")
    section["language_model"]["path"] = str(tmp_path / "v1")
    refused(section, "the language model has 32000 embeddings: it is LLaMA or Vicuna v1.1")


def test_a_dry_run_reports_a_wrong_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    section = golden_minigpt4("vicuna0", checkpoint=str(GOLDEN / CHECKPOINTS["llama2"]))
    file = write_yaml(tmp_path / "x.yaml", {"model": section})
    assert main(["train", str(file), "--dry-run"]) == 2
    assert "the file is of the variant without Q-Former" in capsys.readouterr().err
    section["checkpoint"] = "http://127.0.0.1:1/x.pth"  # is not fetched
    api.assemble(parse_model(section, "test"), meta=True)


# --- one message ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "name", "shape"),
    [
        ("vicuna0", "llama_proj.weight", ()),
        ("vicuna0", "llama_proj.weight", (5,)),
        ("v2", "lora_A.weight", ()),
        ("eva", "pos_embed", (7,)),
        ("eva", "pos_embed", ()),
        ("eva", "patch_embed.proj.weight", (3,)),
        ("blip2", "query_tokens", (3,)),
    ],
)
def test_impossible_shapes(
    variant: str, name: str, shape: tuple[int, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bases = {"eva": "eva_vit_g.pth", "blip2": "blip2_pretrained.pth"}
    content = torch.load(GOLDEN / {**CHECKPOINTS, **bases}[variant], weights_only=True)
    tensors: dict[str, Tensor] = content.get("model", content)
    key = next(key for key in tensors if key.endswith(name))
    tensors[key] = torch.zeros(shape)
    file = str(tmp_path / "odd.pth")
    torch.save(content, file)
    message = f"{key} has the shape {shape}, but "
    assert message in fails(capsys, "inspect", file)
    section = golden_minigpt4("vicuna0" if variant in bases else variant)
    place: dict[str, Any] = {"eva": section["vision_encoder"], "blip2": section["connector"]}.get(variant, section)
    place["weights" if variant in bases else "checkpoint"] = file
    with pytest.raises(CheckpointError) as caught:
        api.assemble(parse_model(section, "test"))
    assert message in str(caught.value)


@pytest.mark.parametrize("shape", [(), (7,), (1, 0, 64), (1, 5, 64, 2)])
def test_positions_of_impossible_shapes(shape: tuple[int, ...]) -> None:
    model, _, _ = api.assemble(parse_model(golden_minigpt4("vicuna0"), "test"), meta=True)
    assert not model.fits("vision_encoder.vit.pos_embed", torch.Size(shape))
    own = model.vision_encoder.vit.pos_embed.shape
    assert model.fits("vision_encoder.vit.pos_embed", torch.Size((1, 1 + 7 * 7, own[2])))


def test_keys_that_are_no_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({0: torch.zeros(2), 1: torch.zeros(2)}, tmp_path / "numbers.pth")
    said = fails(capsys, "inspect", str(tmp_path / "numbers.pth"))
    assert "holds no mapping from names to tensors, but the keys 0, 1" in said
    file = write_yaml(
        tmp_path / "x.yaml", {"model": golden_minigpt4("vicuna0", checkpoint=str(tmp_path / "numbers.pth"))}
    )
    assert main(["demo", str(file), "--device", "cpu"]) == 2
    assert "holds no mapping from names to tensors" in capsys.readouterr().err


def test_a_file_of_weights_in_place_of_a_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(GOLDEN / CHECKPOINTS["vicuna0"])
    for command in ("demo", "train", "check-data"):
        assert "does not say which model it belongs to; give a YAML file" in fails(capsys, command, path)


def test_urls_that_are_none() -> None:
    with pytest.raises(CheckpointError, match=r"cannot be fetched: .*control characters"):
        read_weights("model.checkpoint", "http://127.0.0.1:1/a b.pth")


def test_folders_with_odd_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def folder(name: str, **files: Any) -> str:
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / f"{file}.json").write_text(json.dumps(content))
        return str(tmp_path / name)

    adapter = folder("adapter", adapter_config={"r": 4, "target_modules": "all-linear"})
    assert main(["inspect", adapter]) == 0
    assert "all-linear" in capsys.readouterr().out
    strange = {"model_type": "llava", "text_config": "llama", "architectures": "X", "vocab_size": [1]}
    assert main(["inspect", folder("strange", config=strange | {"quantization_config": "none"})]) == 0
    assert "model_type llava, X" in capsys.readouterr().out
    ours = folder("ours", manifest=["no", "mapping"])
    Path(ours, "config.yaml").write_text("{}")
    assert f"{MANIFEST} is no manifest of minivlm" in fails(capsys, "inspect", ours)


def test_a_cut_off_model_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_yaml(tmp_path / "x.yaml", {"model": golden_minigpt4("llama2", checkpoint=None)})
    folder, back = str(tmp_path / "model"), str(tmp_path / "back.pth")
    assert main(["convert", str(GOLDEN / CHECKPOINTS["llama2"]), folder, "--cfg-path", str(config)]) == 0
    capsys.readouterr()
    weights = Path(folder, WEIGHTS)
    weights.write_bytes(weights.read_bytes()[:-20])
    assert f"{WEIGHTS} cannot be read: it is cut off" in fails(capsys, "convert", folder, back, "--to", "minigpt4")
    assert not Path(back).exists()
    save_file({}, weights)  # nothing at all is a file, too: bases may give everything
    assert read_weights("k", str(weights)).tensors == {}


# --- names that mean something in YAML ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [["model.connector.freeze=true"], ["model.connector.freeze", "true"], []])
@pytest.mark.parametrize("name", ["[7b].pth", "a: b.pth", "${x} # 'y'.pth"])
def test_converting_files_of_any_name(
    name: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    section = golden_minigpt4("llama2", checkpoint=None)
    write_yaml(tmp_path / "x.yaml", {"model": {**section, "checkpoint": "???"}})
    shutil.copy(GOLDEN / CHECKPOINTS["llama2"], name)
    given = ["--options", *options] if options else []
    assert main(["convert", name, "model", "--cfg-path", "x.yaml", *given]) == 0
    assert (tmp_path / "model" / WEIGHTS).is_file()
