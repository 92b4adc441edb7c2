"""Imp's shipped files from the first stage to data of one's own, with nothing but options and tiny parts."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, losses, run_train
from imp_parts import COLOURS, picture, record, write_data, write_phi, write_siglip
from safetensors.torch import load_file
from torch import Tensor

import minivlm
from minivlm.checkpoints.native import read_config, read_manifest
from minivlm.cli import main
from minivlm.datasets.sampling import BatchPlan
from minivlm.models.hub import hash_tensors
from minivlm.models.lora import base_state, is_adapter
from minivlm.models.vlm import PARTS, VisionLanguageModel
from minivlm.runners.runner import Runner
from minivlm.types import Message, Sample

CONFIGS = ROOT / "train_configs"
SHIPPED = sorted(file.stem for file in CONFIGS.glob("imp_v1_3b_*.yaml"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny base models (siglip/, phi/) and both stages' data (data/)."""
    folder = tmp_path_factory.mktemp("imp")
    write_siglip(folder / "siglip")
    write_phi(folder / "phi")
    write_data(folder / "data")
    (folder / "pictures").mkdir()
    mine = []
    for number, colour in enumerate(COLOURS):
        (folder / "pictures" / f"{number}.jpg").write_bytes(picture(colour))
        mine.append(record(str(number), f"The {colour} one.", "Which one?", image=f"{number}.jpg"))
    (folder / "my.json").write_text(json.dumps(mine))
    return folder


@pytest.fixture(scope="module", autouse=True)
def bases(place: Path) -> Any:
    """The environment variables that name the base models."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIVLM_SIGLIP", str(place / "siglip"))
        patch.setenv("MINIVLM_PHI2", str(place / "phi"))
        yield


def options(place: Path, stem: str, folder: Path | str, **run: Any) -> list[str]:
    """What a shipped file needs beside its environment variables: where things lie, and a size that fits here."""
    own = {
        "stage1": {"blip_laion_cc_sbu_558k": ("LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "LLaVA-Pretrain/images")},
        "custom_lora": {"custom": ("../my.json", "../pictures")},
    }
    mix = {"llava_v1_5_mix665k": ("llava_v1_5_mix665k.json", "")}
    found = []
    for name, (records, images) in own.get(stem.removeprefix("imp_v1_3b_"), mix).items():
        found += [f"datasets.{name}.annotations={place}/data/{records}"]
        found += [f"datasets.{name}.images={place}/data/{images}"]
    settings = {"output_dir": folder, "device": "cpu", "precision": "fp32", "num_workers": 0, **run}
    return [*found, *(f"run.{key}={value}" for key, value in settings.items())]


def train(place: Path, stem: str, folder: Path, *more: str, expected: int = 0, **run: Any) -> Path:
    """A shipped file in this process; returns the folder of the run."""
    given = [*options(place, stem, folder, **run), *more]
    assert main(["train", "--cfg-path", str(CONFIGS / f"{stem}.yaml"), "--options", *given]) == expected
    return folder


FP32 = "model.language_model.dtype=fp32"
NF4 = "model.language_model.quantization=nf4"
SMALL = {"batch_size_train": 2, "global_batch_size": 4, "init_lr": 1e-2}


@pytest.fixture(scope="module")
def stage1(place: Path) -> Path:
    """The first stage, by train.py."""
    folder = place / "stage1"
    given = options(place, "imp_v1_3b_stage1", folder, **SMALL, max_epoch=2)
    done = run_train(CONFIGS / "imp_v1_3b_stage1.yaml", FP32, *given)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def lora(place: Path, stage1: Path) -> Path:
    """The second stage with LoRA, from the folder of the first."""
    start = f"model.checkpoint={stage1}"
    return train(place, "imp_v1_3b_stage2_lora", place / "stage2_lora", start, FP32, **SMALL, max_epoch=2)


@pytest.fixture(scope="module")
def merged(place: Path, lora: Path) -> Path:
    assert main(["merge", str(lora), str(place / "merged")]) == 0
    return place / "merged"


def weights(folder: Path) -> dict[str, Tensor]:
    """What a run has saved."""
    return load_file(folder / "model" / "model.safetensors")


def hashes(model: VisionLanguageModel) -> dict[str, str]:
    """Of the base weights of both models below the connector."""
    return {
        part: hash_tensors(base_state(getattr(model, part)).items()) for part in ("vision_encoder", "language_model")
    }


def falls(folder: Path) -> bool:
    """Whether the losses of a run's last steps are below those of its first."""
    found = losses(folder)
    return sum(found[-4:]) < sum(found[:4])


def talk(place: Path) -> list[Sample]:
    """A question about each picture, and one about none."""
    question = [Message("user", "<image>\nWhich one?")]
    asked = [Sample(str(k), question, images=[str(place / "pictures" / f"{k}.jpg")]) for k in range(len(COLOURS))]
    return [*asked, Sample("text", [Message("user", "Name a river.")])]


def logits(folder: Path, samples: list[Sample]) -> Tensor:
    """Of the last position of every prompt."""
    model, processor = minivlm.load(folder, device="cpu")
    batch = processor.collate([processor.prompt_sample(sample) for sample in samples], for_generation=True)
    with torch.inference_mode():
        found = model(batch, return_logits=True).logits
    assert found is not None
    return found[:, -1]


def answers(folder: Path, place: Path, target: Path) -> list[str]:
    """What ``minivlm generate`` says about the pictures."""
    given = ["--input", str(place / "pictures"), "--output", str(target), "--prompt", "Which one?"]
    assert main(["generate", str(folder), "--device", "cpu", "--max-new-tokens", "12", *given]) == 0
    return [json.loads(line)["answer"] for line in target.read_text().splitlines()]


# --- the stages -----------------------------------------------------------------------------------------------------


def test_the_first_stage_keeps_the_connector_alone(stage1: Path) -> None:
    assert falls(stage1)
    assert {name.split(".")[0] for name in weights(stage1)} == {"connector"}
    assert read_config(stage1 / "model")["template"]["name"] == "plain"


def test_lora_keeps_adapters_and_connector_and_moves_nothing_else(place: Path, stage1: Path, lora: Path) -> None:
    assert falls(lora)
    held = weights(lora)
    connector = {name for name in held if name.startswith("connector.")}
    assert connector == set(weights(stage1))
    assert all(is_adapter(name) and name.startswith("language_model.") for name in held.keys() - connector)
    ends = {name.split(".lora_")[0].split(".")[-1] for name in held.keys() - connector}
    assert ends == {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2", "lm_head"}
    assert any(not torch.equal(held[name], weights(stage1)[name]) for name in connector)
    before, after = (minivlm.load(folder, device="cpu")[0] for folder in (stage1, lora))
    assert hashes(before) == hashes(after)
    assert any(t.any() for name, t in after.language_model.state_dict().items() if ".lora_B." in name)
    assert read_config(lora / "model")["template"]["name"] == "phi2"


def test_the_second_stage_without_lora(place: Path, stage1: Path, tmp_path: Path) -> None:
    start = f"model.checkpoint={stage1}"
    folder = train(place, "imp_v1_3b_stage2_full", tmp_path / "full", start, **SMALL | {"init_lr": 1e-3}, max_epoch=1)
    assert falls(folder)
    assert set(read_manifest(folder / "model").complete) == {"connector", "language_model"}
    assert {name.split(".")[0] for name in weights(folder)} == {"connector", "language_model"}
    assert not any(map(is_adapter, weights(folder)))
    before, after = (hashes(minivlm.load(each, device="cpu")[0]) for each in (stage1, folder))
    assert before["vision_encoder"] == after["vision_encoder"]
    assert before["language_model"] != after["language_model"]


def test_the_merged_model_says_the_same(place: Path, lora: Path, merged: Path, tmp_path: Path) -> None:
    manifest = read_manifest(merged)
    assert set(manifest.complete) == set(PARTS) and not any(map(is_adapter, load_file(merged / "model.safetensors")))
    samples = talk(place)
    torch.testing.assert_close(logits(merged, samples), logits(lora, samples), rtol=0, atol=1e-5)
    assert answers(merged, place, tmp_path / "m.jsonl") == answers(lora, place, tmp_path / "l.jsonl") != []


def test_chat_of_both_folders(
    place: Path, lora: Path, merged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for folder in (lora, merged):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"/image {place}/pictures/0.jpg\nWhat colour is it?\n/quit\n"))
        assert main(["chat", str(folder), "--device", "cpu"]) == 0
        said.append(re.sub(r"[\d.]+ tokens/s", "", capsys.readouterr().out.partition("(24 x 20)")[2]))
    assert said[0] == said[1] and "model: " in said[0]


def test_evaluation_of_both_folders(place: Path, lora: Path, merged: Path, tmp_path: Path) -> None:
    found = []
    for number, folder in enumerate((lora, merged)):
        given = options(place, "imp_v1_3b_custom_lora", tmp_path / str(number), task="vqa", test_splits="[train]")
        given += [f"model.checkpoint={folder}", *["model.language_model.lora=null"] * (folder == merged)]
        assert main(["eval", str(CONFIGS / "imp_v1_3b_custom_lora.yaml"), "--options", *given]) == 0
        found.append((tmp_path / str(number) / "report" / "predictions.jsonl").read_text())
    assert found[0] == found[1] != ""


def test_data_of_ones_own_on_the_merged_model_and_merged_again(place: Path, merged: Path, tmp_path: Path) -> None:
    """Four records, learned by heart; the end token is learned as well."""
    start = f"model.checkpoint={merged}"
    run = {"batch_size_train": 2, "global_batch_size": 4, "init_lr": 3e-3, "max_epoch": 60}
    folder = train(place, "imp_v1_3b_custom_lora", tmp_path / "custom", start, "model.connector.init_lr=1e-3", **run)
    assert len(losses(folder)) == 60 and losses(folder)[-1] < 0.2
    expected = [f"The {colour} one." for colour in COLOURS]
    assert answers(folder, place, tmp_path / "custom.jsonl") == expected
    assert main(["merge", str(folder), str(tmp_path / "again")]) == 0
    assert answers(tmp_path / "again", place, tmp_path / "again.jsonl") == expected
    samples = talk(place)
    torch.testing.assert_close(logits(tmp_path / "again", samples), logits(folder, samples), rtol=0, atol=1e-5)
    assert set(read_manifest(tmp_path / "again").complete) == set(PARTS)


# --- what training must keep ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", ["imp_v1_3b_stage2_lora", "imp_v1_3b_custom_lora"])
def test_a_stop_in_the_middle_of_lora_changes_nothing(
    stem: str, place: Path, stage1: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, accumulation, samples grouped by modality, some without a picture; and QLoRA on a merged folder."""
    custom = stem == "imp_v1_3b_custom_lora"
    given = [f"model.checkpoint={merged if custom else stage1}", FP32, *[NF4] * custom]
    run = SMALL | {"max_steps": 8, "max_epoch": 8 if custom else 2, "save_freq": 100}
    whole = train(place, stem, tmp_path / "whole", *given, **run)
    after_step = Runner._after_step

    def stopping(self: Runner, log: Any) -> None:
        after_step(self, log)
        if self.state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    broken = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_after_step", stopping)
        train(place, stem, broken, *given, expected=130, **run)
    assert [file.name for file in (broken / "checkpoints").iterdir()] == ["step_00000004"]
    torch.manual_seed(123)  # whatever another process would have done meanwhile
    train(place, stem, broken, *given, **run)
    assert len(losses(whole)) == 8 and losses(broken) == losses(whole)
    assert all(is_adapter(name) for name in weights(whole) if name.startswith("language_model."))
    assert weights(broken).keys() == weights(whole).keys()
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(broken).items())


def test_processes_of_which_one_has_text_only(place: Path, stage1: Path, tmp_path: Path) -> None:
    """Micro batches of one sample, every second one without a picture, in a mixed order."""
    pairs = [pair for k in range(8) for pair in (seen(k), record(f"t{k}", "No.", "And another?"))]
    kinds = [{index % 2 for index in BatchPlan([16], 2, seed=7).batch(number)} for number in range(8)]
    assert kinds.count({0, 1}) > 1, "one process has a picture while the other has none"
    (place / "turns.json").write_text(json.dumps(pairs))
    more = [f"model.checkpoint={stage1}", FP32, "model.language_model.lora.dropout=0"]
    more += [f"datasets.llava_v1_5_mix665k.annotations={place}/turns.json", "datasets.llava_v1_5_mix665k.layout=null"]
    more += [f"datasets.llava_v1_5_mix665k.images={place}/pictures", "run.group_by_modality_length=false"]
    more += ["run.group_by_length=false"]
    run = {"global_batch_size": 4, "init_lr": 1e-3, "max_epoch": 1, "weight_decay": 0.1, "seed": 7}
    stem = "imp_v1_3b_stage2_lora"
    given = options(place, stem, tmp_path / "two", batch_size_train=1, **run)
    done = run_train(CONFIGS / f"{stem}.yaml", *given, *more, processes=2)
    assert done.returncode == 0, done.stderr
    train(place, stem, tmp_path / "one", *more, **run, batch_size_train=4)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5, msg=name)


def seen(number: int) -> dict[str, Any]:
    return record(f"p{number}", "It is there.", "What is it?", image=f"{number % len(COLOURS)}.jpg")


def test_qlora_and_its_merge(place: Path, stage1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = [f"model.checkpoint={stage1}", FP32, NF4]
    folder = train(place, "imp_v1_3b_stage2_lora", tmp_path / "qlora", *more, **SMALL, max_epoch=1)
    assert falls(folder) and all(is_adapter(name) or name.startswith("connector.") for name in weights(folder))
    assert main(["merge", str(folder), str(tmp_path / "whole")]) == 0
    assert "language_model.quantization: null" in capsys.readouterr().out
    assert read_config(tmp_path / "whole")["language_model"]["quantization"] is None
    whole, base = load_file(tmp_path / "whole" / "model.safetensors"), load_file(place / "phi" / "model.safetensors")
    name = "model.embed_tokens.weight"  # which has no adapter
    assert torch.equal(whole[f"language_model.model.{name}"], base[name])


# --- before a run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", SHIPPED)
def test_the_dry_run_states_the_batch_and_the_cards(
    stem: str, place: Path, stage1: Path, merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = {"imp_v1_3b_stage1": "null", "imp_v1_3b_custom_lora": merged}.get(stem, stage1)
    given = [*options(place, stem, place / "nothing"), f"model.checkpoint={start}"]
    # The data here do not fill a batch of the shipped size.
    given += ["run.batch_size_train=4", "run.global_batch_size=16"] if stem.endswith("stage1") else []
    assert main(["train", "--cfg-path", str(CONFIGS / f"{stem}.yaml"), "--dry-run", "--options", *given]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    size, here, others = (16, 4, "2 on 2") if stem.endswith("stage1") else (128, 32, "16 on 2 processes, 8 on 4")
    rule = f"global batch {size} = 4 per process x {here} accumulation x 1 process (the same: accumulation {others}"
    assert rule in shown
    assert "which GPUs fit, estimated" in shown and "┃ LoRA ┃ QLoRA ┃ full ┃" in shown
    assert not (place / "nothing").exists()


@pytest.mark.parametrize("command", [["check-data"], ["train", "--dry-run"]])
def test_the_second_stage_is_looked_at_before_the_first_has_run(
    command: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stem = "imp_v1_3b_stage2_lora"
    given = [*options(place, stem, place / "nothing"), f"model.checkpoint={place}/later"]
    assert main([*command, "--cfg-path", str(CONFIGS / f"{stem}.yaml"), "--options", *given]) == 0
    assert f"there is no {place}/later yet" in capsys.readouterr().err
    assert main(["train", "--cfg-path", str(CONFIGS / f"{stem}.yaml"), "--options", *given]) == 2
    assert f"there is no folder {place}/later" in capsys.readouterr().err
