"""The commands of docs/imp.md, run as they stand with tiny files under the names that they use."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from golden_imp import GOLDEN
from helpers import GOLDEN as MINIGPT4
from helpers import ROOT
from imp_parts import COLOURS, picture, record, write_clip, write_data, write_phi, write_siglip
from page_commands import commands, run

from minivlm.api import assemble
from minivlm.checkpoints.native import Manifest, save_model
from minivlm.cli import main
from minivlm.config.loader import parse_model

PAGE = (ROOT / "docs" / "imp.md").read_text()
TINY_RUN = {"device": "cpu", "precision": "fp32", "num_workers": 0, "max_steps": 2, "save_freq": 2}
TINY_RUN |= {"batch_size_train": 1, "global_batch_size": 4}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the repository's root whose experiment files are those shipped, in runs of two steps."""
    folder = tmp_path_factory.mktemp("imp_page")
    for name in ("train.py", "demo.py", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    for file in [*ROOT.glob("*_configs/imp_*.yaml"), *ROOT.glob("*_configs/llava_*.yaml")]:
        tiny = {"base": str(file), "run": TINY_RUN}
        (folder / file.parent.name).mkdir(exist_ok=True)
        (folder / file.parent.name / file.name).write_text(yaml.safe_dump(tiny))
    (folder / "mirror" / "google").mkdir(parents=True)
    write_siglip(folder / "mirror" / "google" / "siglip-so400m-patch14-384")
    write_phi(folder / "mirror" / "microsoft--phi-2")
    write_data(folder / "data")
    shutil.copytree(GOLDEN / "v15" / "merged", folder / "imp-v1-3b")
    (folder / "siglip-tiny").symlink_to(GOLDEN / "siglip-tiny")  # the tower that its config.json names
    write_llava(folder)
    (folder / "my_pictures").mkdir()
    (folder / "pictures").mkdir()
    mine = []
    for number, colour in enumerate([*COLOURS] * 2):
        for place in ("pictures", "my_pictures"):
            (folder / place / f"{number}.jpg").write_bytes(picture(colour))
        mine.append(record(str(number), f"It is {colour}.", "What is it?", image=f"{number}.jpg"))
    (folder / "my.json").write_text(json.dumps(mine))
    return folder


def write_llava(folder: Path) -> None:
    """A LLaVA-1.5 in its published layout, whose CLIP lies in another folder."""
    section = {"arch": "llava", "model_type": "v1_5_7b", "vision_encoder": {"path": str(write_clip(folder / "clip"))}}
    section["language_model"] = {"path": str(MINIGPT4 / "llama"), "dtype": "fp32"}
    model, processor, config = assemble(parse_model(section, "test"))
    save_model(folder / "llava", model, config, processor, Manifest(trained=list(model.state_dict())))
    assert main(["export", str(folder / "llava"), str(folder / "llava-v1.5-7b"), "--to", "llava"]) == 0


@pytest.mark.slow
def test_commands_of_the_imp_page(workplace: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    said: dict[str, str] = {}
    for words in commands(PAGE):
        if words[0] == "export":
            env |= dict(word.split("=", 1) for word in words[1:])
            continue
        typed = "/image pictures/0.jpg\nWhat is in this picture?\n" if words[1] == "chat" else ""
        said[" ".join(words)] = run(words, workplace, env, typed)

    def of(*parts: str) -> str:
        """What the one command said that has these words."""
        (found,) = (text for command, text in said.items() if all(part in command for part in parts))
        return found

    for name in ("MINIVLM_SIGLIP", "MINIVLM_PHI2"):  # as the page's own line says, but for the folder
        assert f"export {name}={workplace / env[name]}" in of("download")
    assert re.search(r"good for +model\.checkpoint\n", of("inspect"))
    assert re.search(r"language_model +phi, ", of("inspect"))
    assert len((workplace / "answers.jsonl").read_text().splitlines()) == 8
    dry = " ".join(of("--dry-run").split())
    assert "global batch 4 = 1 per process x 4 accumulation x 1 process" in dry and "which GPUs fit" in dry
    assert all("the page is at" in text for command, text in said.items() if "demo.py" in command)
    assert all("model: " in text for command, text in said.items() if " chat " in command)
    output = workplace / "output" / "imp_v1_3b"
    for name in ("stage1/model", "stage2_lora/model", "merged", "custom_lora/model", "custom"):
        assert (output / name / "manifest.json").is_file()
    assert "largest difference of the probe's logits" in of("merge", "stage2_lora")
    assert (workplace / "imp-lora" / "adapter_config.json").is_file()
    assert json.loads((workplace / "imp-v1" / "config.json").read_text())["n_embd"] > 0
    assert "logits differ by at most" in of("export", "transformers")


@pytest.mark.slow
def test_python_of_the_imp_page(workplace: Path, tmp_path: Path) -> None:
    """In a folder with nothing but what the page's export writes, and without torchvision, which may not fit torch."""
    assert main(["export", str(workplace / "llava-v1.5-7b"), str(tmp_path / "exported"), "--to", "transformers"]) == 0
    (tmp_path / "pictures").symlink_to(workplace / "pictures")
    snippet = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)[0]
    (tmp_path / "snippet.py").write_text(f'import sys\n\nsys.modules["torchvision"] = None\n{snippet}')
    assert "ASSISTANT:" in run(["python", "snippet.py"], tmp_path, {**os.environ})
