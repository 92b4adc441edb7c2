"""``minivlm cache`` loads what encodes pictures, and needs no more than that."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_minigpt4 import GOLDEN, golden_minigpt4
from helpers import ROOT, minigpt4_options, tiny_model

from minivlm.api import assemble
from minivlm.checkpoints.native import Manifest, save_model
from minivlm.cli import cache as cache_command
from minivlm.config import load_config
from minivlm.config.loader import parse_model
from minivlm.datasets.feature_cache import FeatureCache
from minivlm.models.language import hf
from minivlm.runners.features import prepare_cache

STAGE2 = ROOT / "train_configs" / "minigpt4_stage2_finetune.yaml"


def options(data: Path, folder: Path, *more: str) -> list[str]:
    """The shipped second stage at tiny sizes with its bases; stage 1 would write to ``folder/stage1``."""
    return [
        *minigpt4_options(STAGE2, data),
        f"model.vision_encoder.weights={GOLDEN / 'eva_vit_g.pth'}",
        f"model.connector.weights={GOLDEN / 'blip2_pretrained.pth'}",
        f"model.checkpoint={folder / 'stage1'}",
        f"run.feature_cache={folder / 'cache'}",
        "run.num_workers=0",
        "run.device=cpu",
        "run.precision=fp32",
        *more,
    ]


def fill(given: list[str]) -> int:
    """The command, which must not read the language model."""

    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("pictures can be encoded without the language model")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hf, "from_pretrained", never)
        return cache_command([str(STAGE2), "--options", *given])


def test_the_second_stage_is_encoded_before_the_first_has_run(
    minigpt4_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options(minigpt4_data, tmp_path)
    assert fill(given) == 0
    assert f"there is no {tmp_path / 'stage1'} yet" in capsys.readouterr().out

    # What follows is the training, with all of the model.
    stage = load_config(STAGE2, given).stages[0]
    stage.model.checkpoint = None
    model, processor, config = assemble(stage.model)
    save_model(tmp_path / "stage1", model, config, processor, Manifest(trained=["connector.linear.weight"]))
    stage = load_config(STAGE2, given).stages[0]
    model, processor, stage.model = assemble(stage.model)
    assert not model.language_model.model.get_input_embeddings().weight.is_meta
    assert encoded_now(stage, model, processor) == 0


def test_a_checkpoint_that_is_there_is_read(
    minigpt4_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor, config = assemble(parse_model(golden_minigpt4(checkpoint=None, dtype="fp32"), "test"))
    with torch.no_grad():
        model.connector.query_tokens.mul_(2)
    save_model(tmp_path / "stage1", model, config, processor, Manifest(trained=["connector.query_tokens"]))
    assert fill(options(minigpt4_data, tmp_path)) == 0
    said = capsys.readouterr().out
    assert "4 encoded now" in said and "there is no" not in said
    shutil.rmtree(tmp_path / "stage1")
    assert fill(options(minigpt4_data, tmp_path)) == 0
    assert "4 encoded now" in capsys.readouterr().out, "other queries, other features"


def test_a_checkpoint_that_alone_has_the_weights_is_missed(
    minigpt4_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fill(options(minigpt4_data, tmp_path, "model.connector.weights=null")) == 2
    assert f"there is no folder {tmp_path / 'stage1'}" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_parts_from_scratch_come_out_as_in_the_training(lora: dict[str, Any] | None, tmp_path: Path) -> None:
    """The random numbers of a Q-Former without a file follow those of the language model."""
    connector = {**golden_minigpt4()["connector"], "weights": None}
    language = {"name": "hf", "path": str(GOLDEN / "llama"), "lora": lora}
    folders = set()
    for features_only in (False, True):
        torch.manual_seed(0)
        section = {**tiny_model(), "connector": connector, "language_model": language}
        model, processor, _ = assemble(parse_model(section, "test"), features_only=features_only)
        assert model.has_frozen_front
        folders.add(FeatureCache.for_model(tmp_path, model, processor).folder)
    assert len(folders) == 1


def encoded_now(stage: Any, model: Any, processor: Any) -> int:
    """How many pictures of a stage are not in its cache yet."""
    from rich.console import Console

    from minivlm.runners.engines import SingleEngine
    from minivlm.runners.experiment import Splits

    engine = SingleEngine(torch.device("cpu"), "fp32")
    return prepare_cache(stage, model, processor, engine, Splits(stage).all(), Console(quiet=True)).encoded
