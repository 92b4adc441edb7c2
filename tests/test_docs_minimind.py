"""The commands of docs/minimind_v.md, run in order as they stand, with tiny files under the names that they use."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT, losses
from minimind_parts import TOKENIZERS, tiny_sizes, write_data, write_tiny
from page_commands import commands, run
from shard_files import picture
from transformers import AutoModelForCausalLM, AutoTokenizer

from minivlm.api import assemble
from minivlm.checkpoints.native import Manifest, save_model
from minivlm.checkpoints.to_minimind import write_minimind
from minivlm.cli import main
from minivlm.config.loader import parse_model

PAGE = (ROOT / "docs" / "minimind_v.md").read_text(encoding="utf-8")
TEXTS = ["这个图片描述的是一只猫。", "A dog sits on a red chair.", "Two deer in a green field."] * 15
TINY_RUN = {"device": "cpu", "precision": "fp32", "num_workers": 0, "max_steps": 2, "save_freq": 2}
TINY_RUN |= {"batch_size_train": 2, "global_batch_size": 4}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like the repository's root with tiny models, data and pictures; its experiment files make two steps."""
    bases = write_tiny(tmp_path / "bases")
    for variable, path in bases.items():
        monkeypatch.setenv(variable, path)
    write_data(tmp_path / "data", 12)
    sizes = {key: size for key, size in tiny_sizes("v1_small", bases[TOKENIZERS["v1"]]).items() if key != "vocab_size"}
    for file in ROOT.glob("*_configs/minimind_*.yaml"):
        tiny = {"base": str(file), "run": TINY_RUN, "model": {"language_model": {"config": sizes}}}
        (tmp_path / file.parent.name).mkdir(exist_ok=True)
        (tmp_path / file.parent.name / file.name).write_text(yaml.safe_dump(tiny))
    for name in ("train.py", "demo.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_models(tmp_path, {"arch": "minimind_v", "model_type": "v1_small", "language_model": {"config": sizes}})
    write_texts(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_models(folder: Path, section: dict[str, Any]) -> None:
    """Both stages' models and the language model alone, as runs and as the original's file."""
    model, processor, config = assemble(parse_model(section, "test"))
    for stage in ("pretrain", "sft"):
        save_model(folder / "output" / "minimind_v" / stage / "model", model, config, processor, Manifest(stage=stage))
    write_minimind(folder / "512_llm.pth", model, alone=True)
    alone, processor, config = assemble(parse_model(section | {"vision_encoder": "none", "connector": "none"}, "test"))
    save_model(folder / "output" / "minimind_llm" / "sft" / "model", alone, config, processor, Manifest(stage="sft"))


def write_texts(folder: Path) -> None:
    """Texts, chats, keywords and pictures under the page's names."""
    roles = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": text}] for text in TEXTS]
    pairs = [[{"from": "human", "value": "?"}, {"from": "gpt", "value": text}] for text in TEXTS]
    (folder / "texts.txt").write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    for name in ("texts.jsonl", "texts_val.jsonl"):
        (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for name in ("chats.jsonl", "chats_val.jsonl"):
        (folder / name).write_text("".join(json.dumps({"conversations": each}) + "\n" for each in roles))
    (folder / "sft.json").write_text(json.dumps([{"conversations": each} for each in pairs]))
    (words,) = re.findall(r"```json\n(.*?)```", PAGE, flags=re.DOTALL)
    (folder / "words.json").write_text(words, encoding="utf-8")
    (folder / "eval_images").mkdir()
    for name, colour in zip(json.loads(words), ("red", "green"), strict=True):
        (folder / "eval_images" / f"{Path(name).stem}.png").write_bytes(picture(colour, "png"))


def is_training(words: list[str]) -> bool:
    return "train.py" in words


def follow(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """Run a command of the page; what it says. One that ends badly fails the test, with all it has said."""
    if words[0] == "export":
        for variable, value in (word.split("=", 1) for word in words[1:]):
            monkeypatch.setenv(variable, value)
        return ""
    try:
        if words[0] != "minivlm":
            return run(words, folder, {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
        monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\n/quit\n"))
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
    """All but the training, whose models lie there already."""
    capfd.readouterr()
    followed = [words for words in commands(PAGE) if not is_training(words)]
    said = {" ".join(words): follow(words, workplace, monkeypatch, capfd) for words in followed}

    def of(*parts: str) -> str:
        """What the one command said that has these words."""
        (found,) = (text for command, text in said.items() if all(part in command for part in parts))
        return found

    (whole,) = (workplace / "out").iterdir()
    assert whole.name.endswith("_vlm_sft.pth") and (workplace / "llm.pth").is_file()
    assert AutoModelForCausalLM.from_pretrained(workplace / "llama").config.model_type == "llama"
    assert json.loads((workplace / "llava" / "config.json").read_text())["model_type"] == "llava"
    for name in ("tokenizer", "tokenizer_v3"):
        tokenizer = AutoTokenizer.from_pretrained(workplace / name)
        assert tokenizer.decode(tokenizer(TEXTS[0])["input_ids"], skip_special_tokens=True) == TEXTS[0]
    assert "bytes" in of("train-tokenizer", "texts.txt")
    assert "the page is at" in of("demo.py")
    assert "a new conversation about this picture" in of("chat", "minimind_v/sft")
    assert "model: " in of("chat", "minimind_v/sft") and "model: " in of("chat", "minimind_llm/sft")
    assert "[A]: " in of("compare") and "tokens/s" in of("compare")
    report = workplace / "output" / "compare"
    assert {"report.html", "report.png", "results.json", "answers.jsonl"} == {each.name for each in report.iterdir()}
    assert {line["scored"] for line in json.loads((report / "results.json").read_text())["models"]} == {2}


@pytest.mark.slow
def test_training_commands_of_the_minimind_page(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """From the original's language model, and from nothing but texts."""
    shutil.rmtree(workplace / "output")
    followed = [words for words in commands(PAGE) if is_training(words) or words[0] == "export" or "tokenizer" in words]
    assert sum(map(is_training, followed)) == 4
    for words in followed:
        follow(words, workplace, monkeypatch, capfd)
    for stage in ("minimind_v/pretrain", "minimind_v/sft", "minimind_llm/pretrain", "minimind_llm/sft"):
        assert len(losses(workplace / "output" / stage)) == 2
        assert (workplace / "output" / stage / "model" / "manifest.json").is_file()
        assert (workplace / "output" / stage / "loss_curve.png").is_file()
