"""Parts that users bring: another encoder by one YAML node, and their own in a file of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, losses, tiny_model, write_yaml
from rich.console import Console
from transformers import AutoConfig, AutoModel
from transformers.utils import logging

import minivlm
from minivlm import registry
from minivlm.config import ConfigError, load_config
from minivlm.runners.experiment import run_experiment

logging.set_verbosity_error()
logging.disable_progress_bar()

VIT = {**tiny_model()["vision_encoder"]["config"], "num_hidden_layers": 3}


@pytest.fixture(autouse=True)
def same_registry_afterwards() -> Iterator[None]:
    entries = dict(registry._entries)
    yield
    registry._entries.clear()
    registry._entries.update(entries)


@pytest.fixture
def experiment(tiny_experiment: dict[str, Any]) -> dict[str, Any]:
    """Two steps with EfficientNet-Lite0, which the tests replace."""
    tiny_experiment["model"]["vision_encoder"] = {
        "name": "efficientnet_lite0",
        "image_size": 64,
        "block": 4,
        "pool": 4,
        "freeze": True,
    }
    tiny_experiment["run"] |= {"max_steps": 2}
    return tiny_experiment


def run(file: Path, *options: str) -> Path:
    """Train; the folder of the run, in which two finite losses stand."""
    experiment = load_config(file, options)
    run_experiment(experiment, Console(quiet=True))
    folder = Path(experiment.stages[-1].run.output_dir)
    found = losses(folder)
    assert len(found) == 2 and all(0 < loss < 20 for loss in found)
    return folder


@pytest.mark.parametrize("model_type", ["clip_vision_model", "siglip_vision_model", "dinov2"])
def test_a_folder_of_transformers_replaces_efficientnet_by_one_node(
    experiment: dict[str, Any], model_type: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    settings = {key: value for key, value in VIT.items() if key != "model_type"}
    plain = AutoModel.from_config(AutoConfig.for_model(model_type, **settings)).eval()
    plain.save_pretrained(tmp_path / "encoder")
    (tmp_path / "encoder" / "preprocessor_config.json").write_text(
        json.dumps({"size": {"height": 32, "width": 32}, "image_mean": [0.4] * 3, "image_std": [0.3] * 3})
    )
    before = run(write_yaml(tmp_path / "a.yaml", experiment))
    node = {"name": "hf", "path": str(tmp_path / "encoder"), "layer": -2, "freeze": True}
    edited = {**experiment, "model": {**experiment["model"], "vision_encoder": node}}
    after = run(write_yaml(tmp_path / "b.yaml", edited), f"run.output_dir={tmp_path}/other")

    old, old_processor = minivlm.load(before, device="cpu")
    new, new_processor = minivlm.load(after, device="cpu")
    assert (old.vision_encoder.hidden_size, new.vision_encoder.hidden_size) == (40, 16)
    assert (old_processor.tokens_per_image, new_processor.tokens_per_image) == (16, 4)
    assert new_processor.transforms["image"].mean == [0.4] * 3, "pictures are prepared as the folder says"
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        state = plain(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(new.extract_features({"image": pixels}), state[:, -4:], rtol=0, atol=1e-6)


def test_a_model_of_timm_replaces_efficientnet_by_options(experiment: dict[str, Any], tmp_path: Path) -> None:
    node = {"name": "timm", "model_name": "vit_tiny_patch16_224", "image_size": 32, "freeze": True}
    node["kwargs"] = {"depth": 1, "embed_dim": 24, "num_heads": 2}  # type: ignore[assignment]
    edited = {**experiment, "model": {**experiment["model"], "vision_encoder": node}}
    model, _ = minivlm.load(run(write_yaml(tmp_path / "x.yaml", edited)), device="cpu")
    assert model.vision_encoder.hidden_size == 24 and model.connector.layers[0].in_features == 24


MINE = '''
"""An encoder that knows the mean colour of every cell of a grid, and a connector with a gate."""

from dataclasses import dataclass

import torch
from torch import nn

from minivlm.models.base import Connector, VisionEncoder
from minivlm.registry import register
from minivlm.schema import setting


@dataclass
class ColourConfig:
    cells: int = setting(2, ge=1, help="cells along a side")
    scale: float = 1.0


@register("vision_encoder", "colours", config=ColourConfig)
class Colours(VisionEncoder):
    """Mean colours of a grid."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.hidden_size, self.grid, self.num_tokens = 3, (config.cells, config.cells), config.cells**2
        self.image_settings = {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
        self.scale = nn.Parameter(torch.tensor([config.scale]))

    def forward(self, pixels):
        cells = nn.functional.adaptive_avg_pool2d(pixels, self.config.cells)
        return cells.flatten(2).transpose(1, 2) * self.scale


@register("connector", "gated")
class Gated(Connector):
    """One linear layer times a gate."""

    def __init__(self, config, encoder, output_size):
        super().__init__()
        self.tokens_per_image = encoder.num_tokens
        self.linear, self.gate = nn.Linear(encoder.hidden_size, output_size), nn.Parameter(torch.ones(1))

    def forward(self, features):
        return self.linear(features) * self.gate
'''


def with_own_parts(experiment: dict[str, Any], folder: Path, **settings: Any) -> dict[str, Any]:
    (folder / "parts.py").write_text(MINE)
    own = {"vision_encoder": {"name": "colours", **settings}, "connector": {"name": "gated"}}
    return {"imports": ["parts.py"], **experiment, "model": {**experiment["model"], **own}}


def test_parts_of_a_users_file(experiment: dict[str, Any], tmp_path: Path) -> None:
    """Found beside the YAML file, trained, saved and loaded again like any other."""
    content = with_own_parts(experiment, tmp_path, cells=3, scale=2.0, freeze=False)
    folder = run(write_yaml(tmp_path / "x.yaml", content))
    assert registry.entry("vision_encoder", "colours").summary == "Mean colours of a grid."
    model, processor = minivlm.load(folder, device="cpu")
    assert type(model.vision_encoder).__name__ == "Colours" and type(model.connector).__name__ == "Gated"
    assert processor.tokens_per_image == 9
    scale = model.vision_encoder.scale.item()
    assert scale != 2.0 and abs(scale - 2.0) < 0.1, "the user's parameter has trained"
    assert model.connector.gate.item() != 1.0


def test_the_users_settings_are_checked_like_ours(experiment: dict[str, Any], tmp_path: Path) -> None:
    for settings, message in (
        ({"cell": 3}, r"vision_encoder\.cell.*\n?.*did you mean 'cells'"),
        ({"cells": 0}, r"vision_encoder\.cells"),
        ({"cells": "many"}, r"vision_encoder\.cells"),
    ):
        file = write_yaml(tmp_path / "x.yaml", with_own_parts(experiment, tmp_path, **settings))
        with pytest.raises(ConfigError, match=message):
            load_config(file)


def test_without_the_import_the_name_is_unknown(experiment: dict[str, Any], tmp_path: Path) -> None:
    content = with_own_parts(experiment, tmp_path)
    content["imports"] = []
    file = write_yaml(tmp_path / "x.yaml", content)
    with pytest.raises(ConfigError, match=r"unknown vision_encoder 'colours'"):
        load_config(file)
    content["imports"] = ["nowhere.py"]
    with pytest.raises(ConfigError, match=r"there is no file .*nowhere\.py"):
        load_config(write_yaml(tmp_path / "x.yaml", content))


def test_a_users_file_in_a_process_of_its_own(experiment: dict[str, Any], tmp_path: Path) -> None:
    """From the command line, started in another folder."""
    file = write_yaml(tmp_path / "x.yaml", with_own_parts(experiment, tmp_path))
    command = [sys.executable, str(ROOT / "train.py"), "--cfg-path", str(file), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "colours" in done.stdout and "[image x 4]" in done.stdout


def test_checkpoint_with_a_users_part_says_which_file_it_needs(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from minivlm.registry import register\n"
        "from minivlm.models.connectors.mlp import LinearConnector\n"
        "from minivlm.models.configs import LinearConnectorConfig\n"
        "@register('connector', 'mine_for_a_checkpoint', config=LinearConnectorConfig)\n"
        "class Mine(LinearConnector): ...\n"
    )
    tiny_experiment["imports"] = ["mine.py"]
    tiny_experiment["model"]["connector"] = {"name": "mine_for_a_checkpoint"}
    tiny_experiment["run"]["max_steps"] = 1
    config = write_yaml(tmp_path / "x.yaml", tiny_experiment)
    run_experiment(load_config(config), Console(quiet=True))
    code = "import sys, minivlm; minivlm.load(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "mine.py" in result.stderr and "imports:" in result.stderr
    own = write_yaml(tmp_path / "load.yaml", {"imports": ["mine.py"], "model": {"checkpoint": str(tmp_path / "out")}})
    loaded = subprocess.run([sys.executable, "-c", code, str(own)], capture_output=True, text=True, check=False)
    assert loaded.returncode == 0, loaded.stderr
