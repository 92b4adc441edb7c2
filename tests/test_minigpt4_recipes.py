"""Both stages of MiniGPT-4 from the shipped files, with nothing but options: tiny parts, shards made here."""

from __future__ import annotations

import json
from math import isfinite
from pathlib import Path

import pytest
from helpers import GOLDEN, ROOT, golden_options, losses, run_train
from safetensors.torch import load_file
from shard_files import COLOURS, picture, write_shards
from torch import Tensor

CONFIGS = ROOT / "train_configs"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of two datasets (laion/, cc_sbu/) and the folder of the second stage (cc_sbu_align/)."""
    folder = tmp_path_factory.mktemp("minigpt4")
    for name in ("laion", "cc_sbu"):
        write_shards(folder / name, shards=4, samples=6)
    align = folder / "cc_sbu_align"
    (align / "image").mkdir(parents=True)
    names = [list(COLOURS)[number % len(COLOURS)] for number in range(12)]
    for number, colour in enumerate(names):
        (align / "image" / f"{number}.jpg").write_bytes(picture(colour))
    notes = [{"image_id": str(n), "caption": f"The image is all {colour}."} for n, colour in enumerate(names)]
    (align / "filter_cap.json").write_text(json.dumps({"annotations": notes}))
    return folder


def tiny_run(folder: Path, steps: int, rate: float, seed: int) -> list[str]:
    settings = {"output_dir": folder, "device": "cpu", "precision": "fp32", "num_workers": 1, "warmup_steps": 2}
    settings |= {"max_epoch": 2, "iters_per_epoch": steps // 2, "init_lr": rate, "min_lr": rate / 2, "seed": seed}
    return [f"run.{key}={value}" for key, value in settings.items()]


def trained(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize(
    ("files", "model_type", "processes"),
    [
        ("minigpt4", "pretrain_vicuna0", 1),
        pytest.param("minigpt4", "pretrain_vicuna0", 2, marks=pytest.mark.slow),
        ("minigpt4_llama2", "pretrain_llama2", 1),
    ],
)
def test_both_stages(files: str, model_type: str, processes: int, data: Path, tmp_path: Path) -> None:
    tiny = golden_options("minigpt4", model_type)
    bases = [f"model.vision_encoder.weights={GOLDEN / 'eva_vit_g.pth'}"]
    if model_type == "pretrain_vicuna0":
        bases += [f"model.connector.weights={GOLDEN / 'blip2_pretrained.pth'}"]
    first, second = tmp_path / "stage1", tmp_path / "stage2"
    webdata = [f"datasets.{name}.storage={data / name}/{{00000..00003}}.tar" for name in ("laion", "cc_sbu")]
    webdata += [f"datasets.{name}.batch_size=4" for name in ("laion", "cc_sbu")]
    config = CONFIGS / f"{files}_stage1_pretrain.yaml"
    done = run_train(config, *tiny, *bases, *webdata, *tiny_run(first, 8, 1e-2, seed=7), processes=processes)
    assert done.returncode == 0, done.stderr
    align = [f"datasets.cc_sbu_align.storage={data / 'cc_sbu_align'}", "datasets.cc_sbu_align.batch_size=3"]
    config = CONFIGS / f"{files}_stage2_finetune.yaml"
    start = f"model.checkpoint={first}"  # which names the bases of the first stage
    tiny = [option for option in tiny if "weights" not in option]
    done = run_train(config, *tiny, start, *align, *tiny_run(second, 6, 1e-3, seed=42), processes=processes)
    assert done.returncode == 0, done.stderr
    assert len(losses(first)) == 8 and losses(first)[-1] < losses(first)[0]
    assert len(losses(second)) == 6 and all(isfinite(loss) for loss in losses(second))
    # A checkpoint holds what trains; six steps of AdamW at 1e-3 move no weight by more than this.
    assert set(trained(first)) == set(trained(second)) == {"connector.linear.weight", "connector.linear.bias"}
    moved = trained(second)["connector.linear.weight"] - trained(first)["connector.linear.weight"]
    assert 0 < float(moved.abs().max()) < 0.01
