"""The commands of docs/mini_gemini.md, run as they stand with tiny files under the names that they use."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from golden_mgm import GOLDEN, golden_json
from helpers import ROOT
from mgm_folders import LLAMA, make_folder
from mini_gemini_parts import write_data, write_tiny
from page_commands import commands, run
from shard_files import picture
from tiny_sdxl import save_tiny_sdxl

from minivlm.config import load_config

PAGE = (ROOT / "docs" / "mini_gemini.md").read_text()
ZOO = {
    "clip": "OpenAI/clip-vit-large-patch14-336",
    "convnext": "OpenAI/openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup",
    "7b": "LLM/vicuna/7B-V1.5",
}
HUB = {
    "clip": "openai/clip-vit-large-patch14-336",
    "convnext": "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup",
    "7b": "lmsys/vicuna-7b-v1.5",
}
RUN = {"device": "cpu", "precision": "fp32", "num_workers": 0, "max_steps": 2, "save_freq": 2}
RUN |= {"batch_size_train": 1, "global_batch_size": 4, "engine": "auto", "deepspeed": None}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the repository's root whose experiment files are those shipped, in runs of two steps."""
    folder = tmp_path_factory.mktemp("mini_gemini_page")
    for name in ("train.py", "demo.py", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    size = golden_json("llama_hd/config.json")["image_size_aux"]
    for file in [*ROOT.glob("train_configs/mini_gemini_7b*"), *ROOT.glob("eval_configs/mini_gemini_7b*")]:
        tiny: dict[str, object] = {"base": str(file), "run": RUN}
        if file.parent.name == "train_configs":
            tiny["model"] = {"vision_encoder": {"high": {"image_size": size}}, "language_model": {"dtype": "fp32"}}
        (folder / file.parent.name).mkdir(exist_ok=True)
        (folder / file.parent.name / file.name).write_text(yaml.safe_dump(tiny))
    write_bases(folder)
    write_pictures(folder)
    published = make_folder(folder / "MGM-7B", LLAMA)
    tokenizer = golden_json(f"{LLAMA}/expected.json")["tokenizer"]
    files = GOLDEN / "tokenizers" / tokenizer
    shutil.copytree(files, published, dirs_exist_ok=True, ignore=shutil.ignore_patterns("config.json"))
    (folder / "models").mkdir()
    save_tiny_sdxl(folder / "models")
    for block in re.findall(r"```yaml\n# (\S+)\n(.*?)```", PAGE, flags=re.DOTALL):
        (folder / block[0]).write_text(block[1])
    return folder


def write_bases(folder: Path) -> None:
    """The base models as the authors' model_zoo has them and as the hub does, and two more encoders."""
    from transformers import Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel

    write_tiny(folder / "bases")
    for places, root in ((ZOO, "model_zoo"), (HUB, "mirror")):
        for base, place in places.items():
            (folder / root / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / root / place).symlink_to(folder / "bases" / base)
    vit = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    siglip = SiglipVisionConfig(**vit, image_size=384, patch_size=14)
    SiglipVisionModel(siglip).save_pretrained(folder / "google" / "siglip-so400m-patch14-384")
    dino = Dinov2Config(**vit, image_size=518, patch_size=14)
    Dinov2Model(dino).save_pretrained(folder / "facebook" / "dinov2-large")


def write_pictures(folder: Path) -> None:
    """The data of both stages with a picture in every folder that they need, and some to ask about."""
    write_data(folder / "data", count=16)
    for name, place in (("mgm_pretrain", "Pretrain"), ("mgm_instruction", "Finetune")):
        defaults = yaml.safe_load((ROOT / "minivlm/configs/datasets" / name / "default.yaml").read_text())
        for below in defaults["layout"]:
            (folder / "data" / f"MGM-{place}" / below).mkdir(parents=True, exist_ok=True)
            (folder / "data" / f"MGM-{place}" / below / "0.jpg").write_bytes(picture("red"))
    (folder / "pictures").mkdir()
    for number, colour in enumerate(("red", "blue")):
        (folder / "pictures" / f"{number}.jpg").write_bytes(picture(colour))


@pytest.mark.slow
def test_commands_of_the_mini_gemini_page(workplace: Path) -> None:
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

    for name in ("MINIVLM_CLIP_L_336", "MINIVLM_CONVNEXT_L_320", "MINIVLM_VICUNA_V15"):
        assert f"export {name}=" in of("download") and (workplace / env[name]).is_dir()
    assert "all is there that is needed" in of("check-root")
    assert re.search(r"good for +model\.checkpoint\n", of("inspect"))
    for name in ("answers", "read"):
        assert len((workplace / f"{name}.jsonl").read_text().splitlines()) == 2
    dry = " ".join(of("7b_stage1", "--dry-run").split())
    assert "global batch 4 = 1 per process x 4 accumulation x 1 process" in dry
    assert "[image x 729]" in " ".join(of("siglip_convnext", "--dry-run").split())
    assert all("the page is at" in text for command, text in said.items() if "demo.py" in command)
    assert all("model: " in text for command, text in said.items() if " chat " in command)
    assert "(no text in it)" in of("chat", "--ocr")
    for name in ("mini_gemini_7b/stage1", "mini_gemini_7b/stage2", "mini_gemini_7b_hd/stage2", "siglip_dinov2"):
        assert (workplace / "output" / name / "model" / "manifest.json").is_file()
    assert json.loads((workplace / "MGM-7B-mine" / "config.json").read_text())["image_grid"] == 1
    assert (workplace / "MGM-7B-Pretrain-mine" / "mm_projector.bin").is_file()


def test_settings_of_the_mini_gemini_page(tmp_path: Path) -> None:
    """Every block of settings is read, over the file that it names or the chat file of a size."""
    for folder in ("train_configs", "eval_configs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    stages = []
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)):
        file = tmp_path / next(iter(re.findall(r"^# (\S+)", block)), f"{number}.yaml")
        base = "" if "base: " in block else "base: eval_configs/mini_gemini_7b.yaml\n"
        file.write_text(base + block)
        stages += load_config(file).stages
    switches, convnext, dino, tools = stages
    assert switches.run.lr_multi and switches.model.vision_encoder.config.high.config.drop_path_when_frozen
    for stage, high, size in ((convnext, "convnext_multiscale", 864), (dino, "hf", 756)):
        encoder = stage.model.vision_encoder.config
        assert (encoder.high.name, encoder.high.config.image_size) == (high, size)
        assert encoder.low.config.path.startswith("google/siglip") and encoder.low.config.revision is None
    assert tools.demo.ocr and tools.demo.generation and tools.demo.image_steps == 30


SIZES = ("2b", "7b", "13b", "8b", "8x7b", "34b")


def rows(head: str) -> list[list[str]]:
    """The cells of the rows of the table of memory that begin so: base, then HD."""
    lines = [line for line in PAGE.splitlines() if re.match(head, line)]
    return [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines]


def test_the_table_of_memory_names_what_the_authors_used() -> None:
    for hd, row in zip(("", "_hd"), rows(r"\| (base|HD): GPUs"), strict=True):
        for size, cell in zip(SIZES, row, strict=True):
            file = ROOT / "train_configs" / f"mini_gemini_{size}{hd}_stage2.yaml"
            (stage,) = load_config(file).stages
            gpus, level = cell.split(", ")
            assert stage.run.deepspeed == "zero" + level.replace(" ", "_")
            nodes = re.search(r"--nnodes (\d+)", file.read_text())
            assert int(gpus) == 8 * int(nodes[1] if nodes else 1)


@pytest.mark.slow
def test_the_table_of_memory_holds_what_the_benchmark_says() -> None:
    said = run(["python", "benchmarks/mini_gemini_size.py"], ROOT, {**os.environ, "COLUMNS": "120"})
    tables = dict(re.findall(r"(\w+), stage 2: memory.*?(│ [^│]*\(run\.deepspeed\).*?)\n", said, flags=re.DOTALL))
    wanted = rows(r"\| (base|HD): GPUs")
    for hd, gpus, row in zip(("", "_hd"), wanted, rows(r"\| GiB a GPU"), strict=True):
        for size, used, cell in zip(SIZES, gpus, row, strict=True):
            cells = re.findall(r"([\d.]+) GiB", tables[size + hd])
            found = dict(zip(("1", "8", "16", "32"), cells, strict=True))[used.split(",")[0]]
            assert abs(float(found) - float(cell)) < 0.06
