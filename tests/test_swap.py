"""Parts of one system in another: a preset and a node or two of YAML, nothing else."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from golden_imp import golden_json
from helpers import GOLDEN as MINIGPT4
from helpers import golden_sizes, losses, write_yaml
from imp_parts import write_clip, write_phi, write_siglip

import minivlm
from minivlm.checkpoints.native import read_config
from minivlm.cli import main
from minivlm.config import load_config
from minivlm.models.connectors.mlp import MLPConnector
from minivlm.models.connectors.qformer import QFormerConnector
from minivlm.models.vision.eva_clip_g import EvaClipG
from minivlm.models.vision.hf import HFVisionEncoder
from minivlm.models.vlm import VisionLanguageModel

EVA, QFORMER = MINIGPT4 / "eva_vit_g.pth", MINIGPT4 / "blip2_pretrained.pth"


@pytest.fixture(scope="module", autouse=True)
def bases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tiny base models under the environment variables of the presets."""
    folder = tmp_path_factory.mktemp("bases")
    found = {
        "SIGLIP": write_siglip(folder / "siglip"),
        "PHI2": write_phi(folder / "phi"),
        "CLIP_L_336": write_clip(folder / "clip"),
        "VICUNA": MINIGPT4 / "llama",
        "EVA_VIT_G": EVA,
        "BLIP2_QFORMER": QFORMER,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, path in found.items():
            patch.setenv(f"MINIVLM_{name}", str(path))
        yield


def siglip() -> dict[str, Any]:
    """The encoder of Imp, as its preset has it."""
    return {"name": "hf", "path": "${oc.env:MINIVLM_SIGLIP}", "layer": -2}


def eva() -> dict[str, Any]:
    """The encoder of MiniGPT-4, at the sizes of its file."""
    return {"name": "eva_clip_g", **golden_sizes(True)["vision_encoder"], "weights": "${oc.env:MINIVLM_EVA_VIT_G}"}


def qformer(weights: str | None) -> dict[str, Any]:
    """The Q-Former of MiniGPT-4, at the sizes of its file."""
    return {"name": "qformer", **golden_sizes(True)["connector"], "weights": weights}


def experiment(tmp_path: Path, llava_data: Path, model: dict[str, Any]) -> Path:
    """A file that trains a preset with other parts for five steps."""
    model["language_model"] = {"dtype": "fp32"}
    data = {"name": "llava_json", "annotations": str(llava_data / "train.json"), "images": str(llava_data / "images")}
    run = {"task": "instruction_tuning", "output_dir": str(tmp_path / "out"), "batch_size_train": 4, "max_steps": 5}
    run |= {"max_epoch": 2, "init_lr": 1e-2, "warmup_steps": 0, "device": "cpu", "precision": "fp32", "num_workers": 0}
    return write_yaml(tmp_path / "swap.yaml", {"model": model, "datasets": {"colours": data}, "run": run})


def trained(file: Path) -> VisionLanguageModel:
    """The model after its five steps."""
    assert main(["train", "--cfg-path", str(file)]) == 0
    folder = file.parent / "out"
    assert len(losses(folder)) == 5 and losses(folder)[-1] < losses(folder)[0]
    return minivlm.load(folder, device="cpu")[0]


def chats(file: Path, llava_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Talk to what was trained, about a picture, in the terminal."""
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/image {llava_data}/images/0.png\nwhat color is the shape?\n"))
    options = [f"model.checkpoint={file.parent}/out", "demo.temperature=0", "demo.max_new_tokens=8"]
    assert main(["chat", str(file), "--device", "cpu", "--options", *options, "demo.min_new_tokens=8"]) == 0
    said = capsys.readouterr().out
    assert "a new conversation about this picture" in said
    answer = said.partition("(40 x 64)")[2].partition("model: ")[2].partition("you: ")[0]
    assert answer.strip() and not answer.startswith("(")


def test_the_encoder_of_imp_under_the_qformer_of_minigpt4(
    tmp_path: Path, llava_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model: dict[str, Any] = {"arch": "minigpt4", "model_type": "pretrain_vicuna0", "vision_encoder": siglip()}
    # The published Q-Former reads another number of channels, so this one learns from the beginning.
    model["connector"] = {**qformer(None), "freeze": False}
    file = experiment(tmp_path, llava_data, model)
    found = trained(file)
    assert isinstance(found.vision_encoder, HFVisionEncoder) and isinstance(found.connector, QFormerConnector)
    assert found.vision_encoder.hidden_size == golden_json("siglip-tiny/config.json")["hidden_size"]
    assert found.is_frozen("vision_encoder"), "as the preset's own encoder"
    assert read_config(tmp_path / "out" / "model")["template"]["name"] == "minigpt4_vicuna0"
    chats(file, llava_data, monkeypatch, capsys)


def test_published_weights_that_cannot_fit_are_named(
    tmp_path: Path, llava_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model: dict[str, Any] = {"arch": "minigpt4", "model_type": "pretrain_vicuna0", "vision_encoder": siglip()}
    model["connector"] = qformer("${oc.env:MINIVLM_BLIP2_QFORMER}")
    assert main(["train", "--cfg-path", str(experiment(tmp_path, llava_data, model))]) == 2
    said = capsys.readouterr().err
    assert str(QFORMER) in said and "model.connector.weights" in said


def test_encoder_and_qformer_of_minigpt4_in_imp(
    tmp_path: Path, llava_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model: dict[str, Any] = {"arch": "imp", "model_type": "v1_3b", "vision_encoder": eva()}
    model["connector"] = {**qformer("${oc.env:MINIVLM_BLIP2_QFORMER}"), "freeze": ["qformer*", "query_tokens"]}
    file = experiment(tmp_path, llava_data, model)
    found = trained(file)
    assert isinstance(found.vision_encoder, EvaClipG) and isinstance(found.connector, QFormerConnector)
    assert found.is_frozen("vision_encoder") and not found.is_frozen("language_model")
    config = read_config(tmp_path / "out" / "model")
    assert config["template"]["name"] == "phi2"
    assert config["processor"]["image"]["size"] == golden_sizes(True)["vision_encoder"]["image_size"]
    chats(file, llava_data, monkeypatch, capsys)


def test_the_encoder_of_llava_in_imp(
    tmp_path: Path, llava_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One node, and its pictures are those of CLIP, without the class token."""
    node = {"path": "${oc.env:MINIVLM_CLIP_L_336}"}
    file = experiment(tmp_path, llava_data, {"arch": "imp", "model_type": "v1_3b", "vision_encoder": node})
    found = trained(file)
    sizes = golden_json("siglip-tiny/config.json")
    assert isinstance(found.connector, MLPConnector)
    assert found.connector.tokens_per_image == (sizes["image_size"] // sizes["patch_size"]) ** 2
    assert read_config(tmp_path / "out" / "model")["processor"]["image"]["mean"][0] == pytest.approx(0.48145466)
    chats(file, llava_data, monkeypatch, capsys)


def test_another_base_is_not_wanted_in_the_revision_of_the_old_one(tmp_path: Path) -> None:
    node: dict[str, Any] = {"path": "openai/clip-vit-large-patch14-336"}
    model = {"arch": "imp", "model_type": "v1_3b", "vision_encoder": node}

    def revision() -> Any:
        encoder = load_config(write_yaml(tmp_path / "x.yaml", {"model": model})).stages[0].model.vision_encoder
        assert encoder is not None
        return encoder.config.revision

    assert revision() is None
    node["revision"] = "v2"
    assert revision() == "v2"
    del node["path"], node["revision"]
    pinned = revision()
    assert pinned is not None
    node["path"] = "${oc.env:MINIVLM_SIGLIP,google/siglip-so400m-patch14-384}"  # as it was
    assert revision() == pinned
