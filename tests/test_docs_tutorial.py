"""The commands of docs/tutorial_minimind_v.md: at small size always, and as they stand in the slow run."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT, write_yaml
from page_commands import commands, run
from PIL import Image

from minivlm import cli

PAGE = (ROOT / "docs" / "tutorial_minimind_v.md").read_text()
OUTPUT = Path("output/tutorial")
SMALL_RUN = {"device": "cpu", "precision": "fp32", "max_steps": 2, "batch_size_train": 4, "warmup_steps": 0}
STEPS = ("llm", "pretrain", "sft", "sft_blind")


def test_commands_of_the_tutorial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command, in order, with the shipped files in runs of two steps on a few samples."""
    monkeypatch.chdir(tmp_path)
    Path("train_configs").mkdir()
    for file in (ROOT / "train_configs").glob("tutorial_*.yaml"):
        small = {"base": str(file), "run": SMALL_RUN, "datasets": {"easy_vqa": {"max_samples": 8}}}
        write_yaml(Path("train_configs") / file.name, small)
    said: dict[str, str] = {}
    for words in commands(PAGE):
        start = cli.train if words[:2] == ["python", "train.py"] else cli.main
        assert start(words[2:] if start is cli.train else words[1:]) == 0, " ".join(words)
        said[" ".join(words)] = capsys.readouterr().out
    for step in STEPS:
        assert (OUTPUT / step / "model" / "manifest.json").is_file() and (OUTPUT / step / "loss_curve.png").is_file()
    manifest = json.loads((OUTPUT / "sft_blind" / "model" / "manifest.json").read_text())
    assert all(name.startswith("language_model.") for name in manifest["trained"])
    (dry,) = (text for command, text in said.items() if "--dry-run" in command)
    assert "supervised" in dry and "<s>assistant" in dry
    results = json.loads((OUTPUT / "compare" / "results.json").read_text())
    assert [(s["model"], s["scored"]) for s in results["models"]] == [
        (name, 8) for name in ("pretrain", "sft", "sft_blind")
    ]
    for snippet in snippets():
        exec(compile(snippet, "docs/tutorial_minimind_v.md", "exec"), {})
        assert capsys.readouterr().out.strip()


def snippets() -> list[str]:
    """The page's Python, in order."""
    return re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_pictures_of_the_tutorial_are_small() -> None:
    pictures = re.findall(r"\]\((images/tutorial_[^)]+\.png)\)", PAGE)
    assert len(pictures) >= 3
    for name in pictures:
        path = ROOT / "docs" / name
        assert path.stat().st_size < 150_000
        with Image.open(path) as picture:
            assert min(picture.size) > 200


@pytest.mark.slow
def test_the_tutorial_keeps_its_promise(tmp_path: Path) -> None:
    """The page as it stands: under 15 minutes on two cores, and who sees answers better than who does not."""
    for name in ("train.py", "train_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    start = time.monotonic()
    for words in commands(PAGE):
        run(words, tmp_path, env, timeout=900)
    assert time.monotonic() - start < 15 * 60

    seen, blind = (_scores(tmp_path / OUTPUT / name) for name in ("sft", "sft_blind"))
    assert seen["accuracy"] > 0.95 > 0.75 > blind["accuracy"]
    for kind in ("colour", "shape"):
        assert seen[f"accuracy/{kind}"] > 0.95 and blind[f"accuracy/{kind}"] < 0.5
    shares = {
        s["model"]: s["share"] for s in json.loads((tmp_path / OUTPUT / "compare/results.json").read_text())["models"]
    }
    assert shares["sft"] > 0.9 and shares["sft"] > shares["sft_blind"] + 0.2
    for number, snippet in enumerate(snippets()):
        (tmp_path / f"snippet_{number}.py").write_text(snippet)
        assert run(["python", f"snippet_{number}.py"], tmp_path, env).strip()


def _scores(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "done.json").read_text())["metrics"]
    return found
