"""The commands of docs/minimind_v.md, run in order as they stand, with tiny files under the names that they use."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from golden_minimind import GOLDEN, MODELS, is_first, section, settings, weights
from helpers import ROOT
from page_commands import commands, run
from transformers import AutoModelForCausalLM, AutoTokenizer

from minivlm.api import assemble
from minivlm.checkpoints.native import Manifest, save_model
from minivlm.cli import main
from minivlm.config.loader import parse_model

PAGE = (ROOT / "docs" / "minimind_v.md").read_text(encoding="utf-8")
NAME = next(name for name in MODELS if is_first(name) and not settings(name)["use_moe"])
TEXTS = ["这个图片描述的是一只猫。", "A dog sits on a red chair.", "Two deer in a green field."] * 15
QUICK = ("export", "train-tokenizer", "compare", "inspect")
"""Commands of minivlm that talk to nobody, and so need no process of their own."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs, texts and pictures that the page names."""
    folder = tmp_path_factory.mktemp("minimind_page")
    for name in ("train.py", "demo.py", "train_configs", "eval_configs"):
        (folder / name).symlink_to(ROOT / name)
    config = parse_model(section(NAME), "test")
    config.checkpoint = str(weights(NAME))
    model, processor, config = assemble(config)
    for stage in ("pretrain", "sft"):
        run_folder = folder / "output" / "minimind_v" / stage / "model"
        save_model(run_folder, model, config, processor, Manifest(stage=stage))
    roles = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": text}] for text in TEXTS]
    pairs = [[{"from": "human", "value": "?"}, {"from": "gpt", "value": text}] for text in TEXTS]
    (folder / "texts.txt").write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    (folder / "chats.jsonl").write_text("".join(json.dumps({"conversations": each}) + "\n" for each in roles))
    (folder / "sft.json").write_text(json.dumps([{"conversations": each} for each in pairs]))
    (words,) = re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)
    (folder / "words.json").write_text(words, encoding="utf-8")
    (folder / "eval_images").mkdir()
    images = sorted((GOLDEN / "images").iterdir())
    for name, image in zip(json.loads(words), images):
        shutil.copy(image, folder / "eval_images" / f"{Path(name).stem}.png")
    return folder


def follow(words: list[str], folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """Run a command of the page; what it says. One that ends badly fails the test, with all it has said."""
    try:
        if words[0] != "minivlm" or words[1] not in QUICK:
            return run(
                words, folder, {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, "What is it?\n/quit\n"
            )
        code = main(words[1:])
        said = "".join(capfd.readouterr())
        assert code == 0, said
    except (Exception, SystemExit) as error:
        what = f"docs/minimind_v.md: `{' '.join(words)}` fails; files that it needs belong into `workplace`"
        raise AssertionError(f"{what}\n{error}") from error
    return said


def test_commands_of_the_minimind_page(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    capfd.readouterr()
    said = {" ".join(words): follow(words, workplace, capfd) for words in commands(PAGE)}

    def of(*parts: str) -> str:
        """What the one command said that has these words."""
        (found,) = (text for command, text in said.items() if all(part in command for part in parts))
        return found

    assert (workplace / "out" / f"{settings(NAME)['dim']}_vlm_sft.pth").is_file()
    assert (workplace / "llm.pth").is_file()
    assert AutoModelForCausalLM.from_pretrained(workplace / "llama").config.model_type == "llama"
    assert json.loads((workplace / "llava" / "config.json").read_text())["model_type"] == "llava"
    for name in ("tokenizer", "tokenizer_v3"):
        tokenizer = AutoTokenizer.from_pretrained(workplace / name)
        assert tokenizer.decode(tokenizer(TEXTS[0])["input_ids"], skip_special_tokens=True) == TEXTS[0]
    assert "bytes" in of("train-tokenizer", "texts.txt")
    assert "a new conversation about this picture" in of(" chat ") and "model: " in of(" chat ")
    assert "[A]: " in of("compare") and "tokens/s" in of("compare")
    report = workplace / "output" / "compare"
    assert {"report.html", "report.png", "results.json", "answers.jsonl"} == {each.name for each in report.iterdir()}
    assert {line["scored"] for line in json.loads((report / "results.json").read_text())["models"]} == {2}
