"""Tiny data and experiments that the tests build upon."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_lavis_python, tiny_model
from PIL import Image

import minivlm  # noqa: F401  (first, for the torchvision guard)

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (230, 220, 40)}

torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test draws the same numbers, whatever ran before it in its process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def llava_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 24 pictures of one colour and LLaVA records about them (train.json, test.json)."""
    folder = tmp_path_factory.mktemp("llava_data")
    (folder / "images").mkdir()
    records = []
    for index in range(24):
        name, colour = list(COLOURS.items())[index % len(COLOURS)]
        size = (40 + index, 64 - index)
        Image.new("RGB", size, colour).save(folder / "images" / f"{index}.png")
        turns = [
            {"from": "human", "value": "<image>\nwhat color is the shape?"},
            {"from": "gpt", "value": name},
        ]
        if index % 3 == 0:
            turns += [{"from": "human", "value": "is there a red shape?"}, {"from": "gpt", "value": "yes and no"}]
        records.append({"id": f"r{index}", "image": f"{index}.png", "conversations": turns})
    records.append(
        {
            "id": "text",
            "conversations": [
                {"from": "human", "value": "what is a triangle?"},
                {"from": "gpt", "value": "a shape with three sides"},
            ],
        }
    )
    (folder / "train.json").write_text(json.dumps(records))
    (folder / "test.json").write_text(json.dumps(records[:8]))
    return folder


@pytest.fixture(scope="session")
def fake_lavis(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter that has a stand-in for LAVIS (``tests/fake_lavis``)."""
    return make_lavis_python(tmp_path_factory.mktemp("fake_lavis"))


@pytest.fixture
def tiny_experiment(tmp_path: Path, llava_data: Path) -> dict[str, Any]:
    """An experiment of six steps as a plain dict; change it and give it to ``write_yaml``."""
    return {
        "model": tiny_model(),
        "datasets": {
            "colours": {
                "name": "llava_json",
                "annotations": {split: str(llava_data / f"{split}.json") for split in ("train", "test")},
                "images": str(llava_data / "images"),
            }
        },
        "run": {
            "task": "instruction_tuning",
            "output_dir": str(tmp_path / "out"),
            "batch_size_train": 4,
            "max_epoch": 1,
            "init_lr": 5e-3,
            "precision": "fp32",
            "device": "cpu",
        },
    }


RECORDS: dict[str, Any] = {
    "caption": {"image": "1.png", "caption": "a boat"},
    "vqa": {"image": "1.png", "question": "what is this?", "answers": ["a boat", "boat", "a boat"]},
    "phrase": {"image": "1.png", "phrase": "a boat", "boxes": [10, 10, 30, 20]},
    "objects": {"image": "1.png", "caption": "a boat", "objects": [{"phrase": "a boat", "boxes": [10, 10, 30, 20]}]},
    "conversation": {
        "image": "1.png",
        "conversations": [{"from": "human", "value": "<image> what is this?"}, {"from": "gpt", "value": "a boat"}],
    },
    "text": {"instruction": "say something", "output": "something"},
}


@pytest.fixture(scope="session")
def minigpt4_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of MiniGPT-4 and v2 in small: filter_cap.json with image/, the shard 00000.tar, a file of each kind."""
    folder = tmp_path_factory.mktemp("minigpt4_data")
    (folder / "image").mkdir()
    captions = []
    with tarfile.open(folder / "00000.tar", "w") as shard:
        for number in range(4):
            picture = Image.new("RGB", (40, 40), (60 * number, 0, 0))
            picture.save(folder / f"{number}.png")
            picture.save(folder / "image" / f"{number}.jpg")
            captions.append({"image_id": str(number), "caption": "A boat. It is red."})
            shard.add(folder / "image" / f"{number}.jpg", f"{number:05}.jpg")
            content = json.dumps({"caption": "A boat!"}).encode()
            member = tarfile.TarInfo(f"{number:05}.json")
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": captions}))
    for kind, record in RECORDS.items():
        (folder / f"{kind}.json").write_text(json.dumps([record] * 4))
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A boat."}]
    records = [{"id": str(n), "image": f"{n}.png", "conversations": turns} for n in range(4)]
    (folder / "llava.json").write_text(json.dumps(records))
    chat = {
        "conversations": [{"role": "user", "content": "what is a boat?"}, {"role": "assistant", "content": "A ship."}]
    }
    (folder / "chats.jsonl").write_text(f"{json.dumps(chat)}\n" * 4)
    (folder / "texts.txt").write_text("A boat. It is red.\n" * 4)
    return folder
