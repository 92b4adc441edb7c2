"""The commands of docs/minigpt4.md, run as they stand with tiny files under the names that they use."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import yaml
from golden_minigpt4 import GOLDEN
from helpers import ROOT, golden_section
from page_commands import commands, run
from shard_files import COLOURS, picture, write_shards

PAGE = (ROOT / "docs" / "minigpt4.md").read_text()
TINY_RUN = {"device": "cpu", "precision": "fp32", "num_workers": 0, "max_steps": 2, "save_freq": 2}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the repository's root whose experiment files are those shipped, at tiny sizes."""
    folder = tmp_path_factory.mktemp("minigpt4")
    for name in ("train.py", "demo.py"):
        (folder / name).symlink_to(ROOT / name)
    model = golden_section("minigpt4", "pretrain_vicuna0")
    del model["language_model"]["path"]  # the page names it by its environment variable
    for file in sorted(ROOT.glob("*_configs/minigpt4_*.yaml")):
        tiny = {
            "base": str(file),
            "model": {key: model[key] for key in ("vision_encoder", "connector")},
            "run": TINY_RUN,
        }
        tiny["model"]["language_model"] = {"dtype": "fp32", "quantization": None}
        tiny["model"]["processor"] = {"image": {"size": None}}
        (folder / file.parent.name).mkdir(exist_ok=True)
        (folder / file.parent.name / file.name).write_text(yaml.safe_dump(tiny))
    (folder / "models").mkdir()
    (folder / "models" / "vicuna-7b-v0").symlink_to(GOLDEN / "llama")
    (folder / "pretrained_minigpt4_7b.pth").symlink_to(GOLDEN / "minigpt4_tiny.pth")
    for name in ("laion", "cc_sbu"):
        write_shards(folder / name, shards=2, samples=70)
    for place in ("pictures", "cc_sbu_align/image"):
        (folder / place).mkdir(parents=True)
        for number, colour in enumerate([*COLOURS] * 4):
            (folder / place / f"{number}.jpg").write_bytes(picture(colour))
    notes = [{"image_id": str(n), "caption": f"The image is all {c}."} for n, c in enumerate([*COLOURS] * 4)]
    (folder / "cc_sbu_align" / "filter_cap.json").write_text(json.dumps({"annotations": notes}))
    return folder


@pytest.mark.slow
def test_python_of_the_minigpt4_page(workplace: Path) -> None:
    (workplace / "dog.jpg").write_bytes(picture(next(iter(COLOURS))))
    (workplace / "snippet.py").write_text(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)[0])
    said = run(["python", "snippet.py"], workplace, {**os.environ, "MINIVLM_VICUNA": "models/vicuna-7b-v0"})
    assert re.search(r"^\[\[(0, 1|1, 0)\]\]$", said, flags=re.MULTILINE)


@pytest.mark.slow
def test_commands_of_the_minigpt4_page(workplace: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    said: dict[str, str] = {}
    for words in commands(PAGE):
        if words[0] == "export":
            env |= dict(word.split("=", 1) for word in words[1:])
            continue
        if "chat" in words:
            continue  # it reads from the keyboard; tests/test_chat.py talks to it
        # The published ranges name thousands of shards.
        words = [re.sub(r"\{00000\.\.\d+\}", "{00000..00001}", word) for word in words]
        said[" ".join(words[:3])] = run(words, workplace, env)
    assert "the page is at" in said["python demo.py --cfg-path"]
    assert len((workplace / "captions.jsonl").read_text().splitlines()) == 16
    assert (workplace / "output/minigpt4/stage1/model").is_dir() and (
        workplace / "output/minigpt4/stage2/model"
    ).is_dir()
    assert any((workplace / "output/feature_cache").iterdir())
    assert (workplace / "models/minigpt4_7b/manifest.json").is_file() and (workplace / "minigpt4_again.pth").is_file()
    assert "MiniGPT-4" in said["minivlm inspect pretrained_minigpt4_7b.pth"]
