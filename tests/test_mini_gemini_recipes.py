"""Mini-Gemini's shipped files: the published numbers, real sizes, and the stages run with tiny parts."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_mgm import GOLDEN, golden_json
from helpers import ROOT, losses
from mgm_folders import HD, LLAMA
from mini_gemini_parts import (
    LANGUAGE_MODELS,
    TOWERS,
    data_options,
    write_data,
    write_open_clip,
    write_real_sizes,
    write_tiny,
)
from safetensors.torch import load_file
from test_golden_mgm import as_published, load
from torch import Tensor

import minivlm
from minivlm.checkpoints.native import read_config, read_manifest
from minivlm.cli import main
from minivlm.config import ConfigError, list_model_defaults, load_config, parse_model, to_container
from minivlm.config.experiment import StageConfig
from minivlm.config.global_batch import accumulation
from minivlm.models.hub import hash_tensors
from minivlm.models.lora import base_state
from minivlm.runners import dry_run

CONFIGS = ROOT / "train_configs"
SHIPPED = sorted(CONFIGS.glob("mini_gemini_*.yaml"))


@dataclass(frozen=True)
class Row:
    """What the authors' script of a stage said."""

    gpus: int
    per_gpu: int
    accumulation: int
    zero: str
    template: str
    rate: float = 2e-5
    length: int = 2048
    save_steps: int = 1000
    factors: tuple[tuple[str, float], ...] = ()


def first(gpus: int, per_gpu: int, accumulation: int, zero: str, template: str = "plain") -> Row:
    return Row(gpus, per_gpu, accumulation, zero, template, rate=1e-3, save_steps=24000)


TWICE = (("connector.*", 2.0),)
LARGE = {"rate": 1e-5, "factors": TWICE}
LONG: dict[str, Any] = {"length": 4096}
PUBLISHED = {
    "2b_stage1": first(8, 8, 4, "zero2_offload", "gemma"),
    "7b_stage1": first(16, 16, 1, "zero2_offload"),
    "13b_stage1": first(32, 8, 1, "zero2"),
    "8b_stage1": first(16, 16, 1, "zero2_offload", "llama_3"),
    "8x7b_stage1": first(32, 8, 1, "zero3"),
    "34b_stage1": first(32, 8, 1, "zero3"),
    "2b_stage2": Row(8, 8, 2, "zero2", "gemma"),
    "7b_stage2": Row(16, 8, 1, "zero2_offload", "vicuna_v1"),
    "13b_stage2": Row(32, 4, 1, "zero2", "vicuna_v1"),
    "8b_stage2": Row(16, 8, 1, "zero2_offload", "llama_3"),
    "8x7b_stage2": Row(32, 4, 1, "zero3", "mistral_instruct", **LARGE),
    "34b_stage2": Row(32, 4, 1, "zero3", "chatml_direct", **LARGE),
    "2b_hd_stage2": Row(32, 4, 1, "zero2", "gemma", save_steps=20000, **LONG),
    "7b_hd_stage2": Row(32, 4, 1, "zero2", "vicuna_v1", **LONG),
    "13b_hd_stage2": Row(32, 4, 1, "zero2", "vicuna_v1", **LONG),
    "8b_hd_stage2": Row(16, 4, 2, "zero3", "llama_3", **LONG),
    "8x7b_hd_stage2": Row(32, 4, 1, "zero3", "mistral_instruct", **LARGE, **LONG),
    "34b_hd_stage2": Row(32, 4, 1, "zero3", "chatml_direct", **LARGE, **LONG),
}
# CLIP-L without its last layer, which layer -2 does not need, and ConvNeXt-L
ENCODERS = 303_507_456 - 12_596_224 + 196_227_264
MINING = 6_963_456
PROJECTORS = {"2b": 6_295_552, "13b": 31_467_520, "34b": 58_734_592} | dict.fromkeys(("7b", "8b", "8x7b"), 20_979_712)
LANGUAGE = {
    "2b": 2_506_172_416,
    "7b": 6_738_415_616,
    "13b": 13_015_864_320,
    "8b": 8_030_261_248,
    "8x7b": 46_702_792_704,
    "34b": 34_388_917_248,
}
"""As counted in the published base models."""


def stem_of(file: Path) -> str:
    return file.stem.removeprefix("mini_gemini_")


WITH_GPU_TABLE = ("2b_stage1", "8x7b_stage2")
"""Of the others it is left out: it builds each language model three times more."""


def size_of(stem: str) -> str:
    return stem.partition("_")[0]


@cache
def stage_of(file: Path, *options: str) -> StageConfig:
    (stage,) = load_config(file, options).stages
    return stage


# --- the published recipes ------------------------------------------------------------------------------------------


def test_there_is_a_file_for_every_script() -> None:
    assert {stem_of(file) for file in SHIPPED} == set(PUBLISHED)


@pytest.mark.parametrize("file", SHIPPED, ids=stem_of)
def test_the_numbers_of_a_recipe(file: Path) -> None:
    row, stage = PUBLISHED[stem_of(file)], stage_of(file)
    run, model = stage.run, stage.model
    is_first, is_hd = "stage1" in file.stem, "_hd_" in file.stem
    assert (run.batch_size_train, accumulation(run, row.gpus)) == (row.per_gpu, row.accumulation)
    assert run.global_batch_size == row.gpus * row.per_gpu * row.accumulation == (256 if is_first else 128)
    assert (run.engine, run.deepspeed) == ("deepspeed", row.zero)
    assert (run.init_lr, run.lr_multi) == (row.rate, dict(row.factors))
    assert (run.max_epoch, run.warmup_ratio, run.weight_decay, run.min_lr) == (1, 0.03, 0.0, 0.0)
    assert (run.lr_sched, run.compat, run.max_grad_norm) == ("linear_warmup_cosine_lr", "llava", None)
    assert (run.save_freq, run.keep_last, run.num_workers) == (row.save_steps, 1, 4)
    assert run.group_by_modality_length == (not is_first) and (not is_first or not run.group_by_length)
    assert model.template is not None and model.template.name == row.template
    assert model.processor is not None and model.processor.config.max_length == row.length
    assert model.processor.config.image.config.resize == ("shortest_edge" if is_first else "pad")
    encoder, connector, language = model.vision_encoder, model.connector, model.language_model
    assert encoder and connector and language
    assert encoder.freeze is True and connector.freeze is None and language.freeze is (True if is_first else None)
    assert language.config.gradient_checkpointing and language.lora is None and language.config.router_loss is None
    assert encoder.config.high.config.drop_path_rate == 0.0
    assert (encoder.config.low.config.layer, encoder.config.high.config.image_size) == (-2, 1536 if is_hd else 768)
    assert (encoder.config.grid, encoder.config.global_view) == ((2, True) if is_hd else (1, False))
    assert connector.config.projector.name == "mlp" and connector.config.projector.config.depth == 2


@pytest.mark.parametrize("file", SHIPPED, ids=stem_of)
def test_every_stage_starts_from_the_first_one_of_its_size(file: Path) -> None:
    """HD from that of the base model, as there is no other; no two runs share a folder."""
    stage, size = stage_of(file), size_of(stem_of(file))
    before = None if "stage1" in file.stem else stage_of(CONFIGS / f"mini_gemini_{size}_stage1.yaml")
    assert stage.model.checkpoint == (before.run.output_dir if before else None)
    others = [stage_of(other).run.output_dir for other in SHIPPED if other != file]
    assert stage.run.output_dir not in others
    data = "mgm_pretrain" if before is None else "mgm_instruction"
    assert list(stage.datasets) == [data]


@pytest.mark.parametrize("file", SHIPPED, ids=stem_of)
def test_its_head_tells_how_it_was_started(file: Path) -> None:
    row, head = PUBLISHED[stem_of(file)], file.read_text().partition("model:")[0]
    nodes = re.search(r"--nnodes (\d+)", head)
    assert int(nodes[1] if nodes else 1) * 8 == row.gpus and "--nproc-per-node 8" in head
    assert f"{row.per_gpu} samples a GPU" in head and f"train_configs/{file.name}" in head
    assert (f"accumulation {row.accumulation}." in head) == (row.accumulation > 1)


# --- names ----------------------------------------------------------------------------------------------------------


def test_all_presets_are_there() -> None:
    types = {model_type for arch, model_type in list_model_defaults() if arch == "mini_gemini"}
    assert types == {f"{size}{variant}" for size in LANGUAGE for variant in ("", "_hd", "_stage1")}


@pytest.mark.parametrize(
    ("arch", "model_type"), [("mgm", "7b_hd"), ("MGM", "7B-HD"), ("minigemini", "7B_HD"), ("Mini-Gemini", "7b-hd")]
)
def test_other_names_give_the_same(arch: str, model_type: str, tmp_path: Path) -> None:
    usual = stage_of(CONFIGS / "mini_gemini_7b_hd_stage2.yaml")
    named = [f"model.arch={arch}", f"model.model_type={model_type}"]
    assert to_container(stage_of(CONFIGS / "mini_gemini_7b_stage2.yaml", *named).model) == to_container(usual.model)
    alone = parse_model({"arch": arch, "model_type": model_type}, "test")
    assert (alone.arch, alone.model_type) == ("mini_gemini", "7b_hd")
    assert to_container(alone.vision_encoder) == to_container(usual.model.vision_encoder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "model: {model_type: 7c}",
            r"x\.yaml:3: model\.model_type: unknown model_type '7c' of 'mini_gemini'.*there are: .*, 7b, ",
        ),
        ("model: {arch: mgn}", r"x\.yaml:3: model\.arch: unknown arch 'mgn' \(did you mean 'mgm'\?\)"),
        ("run: {deepspeeed: zero2}", r"x\.yaml:3: run\.deepspeeed: unknown key \(did you mean 'deepspeed'\?\)"),
        ("run: {engine: auto}", r"run: .*deepspeed zero2_offload has no effect with engine auto: set engine deepspeed"),
        ("model: {vision_encoder: {high: {image_sise: 1}}}", r"x\.yaml:3: model\.vision_encoder\.high\.image_sise: "),
        ("run: {lr_multi: {'connector.*': two}}", r"x\.yaml:3: run\.lr_multi\.connector\.\*: expected a number"),
    ],
)
def test_a_slip_is_answered_with_its_place(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(f"# mine\nbase: {CONFIGS / 'mini_gemini_7b_stage2.yaml'}\n{line}\n")
    with pytest.raises(ConfigError, match=message):
        load_config(file)


# --- real sizes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("mgm_data"))


@pytest.fixture(scope="module")
def real_sizes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_real_sizes(tmp_path_factory.mktemp("real_sizes"))


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for variable, path in variables.items():
        monkeypatch.setenv(variable, path)


@pytest.mark.parametrize("file", SHIPPED, ids=stem_of)
def test_every_file_passes_a_dry_run_at_real_size(
    file: Path,
    data: Path,
    real_sizes: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From folders without weights: the published counts, the tokens of a picture, the batch on this machine."""
    set_all(monkeypatch, real_sizes)
    monkeypatch.chdir(tmp_path)
    if stem_of(file) not in WITH_GPU_TABLE:
        monkeypatch.setattr(dry_run, "has_base", lambda model: False)
    given = [*data_options(file, data), "run.device=cpu", "run.precision=bf16"]
    assert main(["train", "--cfg-path", str(file), "--dry-run", "--options", *given]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    is_first, size = "stage1" in file.stem, size_of(stem_of(file))
    counts = {"vision_encoder": ENCODERS, "connector": MINING + PROJECTORS[size], "language_model": LANGUAGE[size]}
    trains = {"connector"} if is_first else {"connector", "language_model"}
    for part, count in counts.items():
        assert f"│ {part} │ {count:,} │ {count if part in trains else 0:,} │" in shown
    assert f"[image x {2880 if '_hd_' in file.stem else 576}]" in shown
    assert f"global batch {256 if is_first else 128} = {PUBLISHED[stem_of(file)].per_gpu} per process" in shown
    assert ("which GPUs fit" in shown) == (stem_of(file) in WITH_GPU_TABLE)
    assert "memory, estimated" in shown and list(tmp_path.iterdir()) == []


def test_the_second_stage_says_that_the_first_is_missing(
    data: Path, real_sizes: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_all(monkeypatch, real_sizes)
    file = CONFIGS / "mini_gemini_13b_hd_stage2.yaml"
    given = [*data_options(file, data), "run.engine=single", "run.deepspeed=null", "model.checkpoint=output/nothing"]
    assert main(["train", "--cfg-path", str(file), "--options", *given]) == 2
    assert "there is no folder output/nothing" in capsys.readouterr().err


# --- the stages with tiny parts -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def bases(place: Path) -> dict[str, str]:
    return write_tiny(place / "zoo")


def train(stem: str, data: Path, folder: Path, *more: str, **run: Any) -> Path:
    """A shipped file with options alone; returns the folder of the run."""
    file = CONFIGS / f"mini_gemini_{stem}.yaml"
    size = golden_json(f"{HD if '_hd_' in stem else LLAMA}/config.json")["image_size_aux"]
    settings = {"output_dir": folder, "engine": "single", "deepspeed": "null", "device": "cpu", "precision": "fp32"}
    settings |= {"num_workers": 0, "batch_size_train": 2, "global_batch_size": 4, "max_steps": 4, **run}
    given = [*data_options(file, data), f"model.vision_encoder.high.image_size={size}", *more]
    given += [f"run.{key}={value}" for key, value in settings.items()]
    assert main(["train", "--cfg-path", str(file), "--options", *given]) == 0
    found = losses(folder)
    assert len(found) == 4 and torch.tensor(found).isfinite().all()
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def hash_of(folder: Path, part: str) -> str:
    model, _ = minivlm.load(folder, device="cpu")
    return hash_tensors(base_state(getattr(model, part)).items())


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference of the connectors."""
    assert set(other) <= set(one)
    return max(float((one[name] - other[name]).abs().max()) for name in other if name.startswith("connector."))


def test_stage_1_then_stage_2_then_hd(
    data: Path, place: Path, bases: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_all(monkeypatch, bases)
    fp32 = "model.language_model.dtype=fp32"
    stage1 = train("7b_stage1", data, place / "stage1", fp32, init_lr=1e-2)
    held = weights(stage1)
    assert {name.split(".")[1] for name in held if name.startswith("connector.")} == {
        *("query", "key", "value", "projector")
    }
    assert all(name.startswith("connector.") for name in held)

    base = f"model.checkpoint={stage1}"
    stage2 = train("7b_stage2", data, place / "stage2", base, init_lr=1e-2)
    hd = train("7b_hd_stage2", data, place / "hd", base)
    rate, steps = stage_of(CONFIGS / "mini_gemini_7b_hd_stage2.yaml").run.init_lr, 4
    for folder in (stage2, hd):
        assert set(read_manifest(folder / "model").complete) == {"connector", "language_model"}
        assert {name.split(".")[0] for name in weights(folder)} == {"connector", "language_model"}
        assert hash_of(folder, "vision_encoder") == hash_of(stage1, "vision_encoder")
        assert hash_of(folder, "language_model") != hash_of(stage1, "language_model")
    # AdamW moves a weight by hardly more than the rate: HD has gone on from the first stage, not from the second
    assert 0 < furthest(weights(hd), held) < 2 * rate * steps < furthest(weights(stage2), held)

    _, processor = minivlm.load(stage2, device="cpu")
    _, of_hd = minivlm.load(hd, device="cpu")
    assert of_hd.tokens_per_image == 5 * processor.tokens_per_image
    assert read_config(hd / "model")["template"]["name"] == "vicuna_v1"
    given = ["--input", str(data / "MGM-Finetune" / "coco"), "--output", str(tmp_path / "answers.jsonl")]
    given += ["--prompt", "What colour is it?", "--device", "cpu", "--max-new-tokens", "4"]
    assert main(["generate", str(hd), *given]) == 0
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == len(list((data / "MGM-Finetune" / "coco").iterdir()))
    assert all("answer" in answer and "error" not in answer for answer in answers)


@pytest.mark.parametrize(("folder", "stem"), [(LLAMA, "7b_hd_stage2"), (HD, "7b_stage2")])
def test_a_published_folder_brings_the_parts_of_a_preset(
    folder: str, stem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bases are not asked for; HD wherever the preset or the folder says so."""
    for variable in (*TOWERS, LANGUAGE_MODELS["7b"][0]):
        monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
    published = as_published(folder)
    size = golden_json(f"{HD}/config.json")["image_size_aux"]
    given = [f"model.checkpoint={published}", f"model.vision_encoder.high.image_size={size}"]
    tokenizer = golden_json(f"{folder}/expected.json")["tokenizer"]
    given.append(f"model.language_model.tokenizer={GOLDEN / 'tokenizers' / tokenizer}")
    model, processor = minivlm.load(CONFIGS / f"mini_gemini_{stem}.yaml", device="cpu", options=given)
    again, _ = load(folder)
    assert processor.tokens_per_image == 5 * model.vision_encoder.low.num_tokens
    for name, tensor in again.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


# --- ConvNeXt by hub id, chat ---------------------------------------------------------------------------------------


def test_an_open_clip_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings tell the sizes; weights are fetched only where they are needed."""
    source = write_open_clip(tmp_path / "hub" / "owner" / "convnext")
    fetched: list[str] = []

    def download(path: str, name: str, revision: str | None) -> str:
        from huggingface_hub.errors import EntryNotFoundError

        fetched.append(f"{name} {revision}")
        file = tmp_path / "hub" / path / name
        if not file.is_file():
            raise EntryNotFoundError(f"no {name}")
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    from minivlm.models.configs import ConvNeXtMultiscaleConfig
    from minivlm.models.vision.convnext import ConvNeXtMultiscale

    config = ConvNeXtMultiscaleConfig(path="owner/convnext", revision="v1", image_size=64)
    with torch.device("meta"):
        shapes = ConvNeXtMultiscale(config)
    assert set(fetched) == {"open_clip_config.json v1"} and shapes.hidden_size == 2880
    built = ConvNeXtMultiscale(config)
    state = load_file(source / "open_clip_model.safetensors")
    assert all(torch.equal(tensor, state[f"visual.trunk.{name}"]) for name, tensor in built.state_dict().items())
    assert built.source is not None and (built.source["path"], built.source["revision"]) == ("owner/convnext", "v1")


def test_download_takes_the_two_towers_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bases: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The ConvNeXt comes in OpenCLIP's files; the variables that use both are named."""
    for variable in (*TOWERS, LANGUAGE_MODELS["7b"][0]):
        monkeypatch.delenv(variable, raising=False)
    names = {"MINIVLM_CLIP_L_336": "openai/clip-vit-large-patch14-336", "MINIVLM_VICUNA_V15": "lmsys/vicuna-7b-v1.5"}
    names["MINIVLM_CONVNEXT_L_320"] = "laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup"
    for variable, name in names.items():
        (tmp_path / "mirror" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mirror" / name).symlink_to(bases[variable])
    file = CONFIGS / "mini_gemini_7b_stage1.yaml"
    given = ["--to", str(tmp_path / "models"), "--mirror", str(tmp_path / "mirror")]
    assert main(["download", "--cfg-path", str(file), *given]) == 0
    shown = capsys.readouterr().out
    for variable, name in names.items():
        folder = tmp_path / "models" / name.replace("/", "--")
        assert f"export {variable}={folder}" in shown and any(folder.glob("*.safetensors"))
    fetched = {
        file.name for file in (tmp_path / "models" / names["MINIVLM_CONVNEXT_L_320"].replace("/", "--")).iterdir()
    }
    assert {"open_clip_config.json", "open_clip_model.safetensors"} <= fetched


def test_chat_files_name_the_published_folders() -> None:
    found = {
        file.stem.removeprefix("mini_gemini_"): file for file in (ROOT / "eval_configs").glob("mini_gemini_*.yaml")
    }
    assert set(found) == {f"{size}{variant}" for size in LANGUAGE for variant in ("", "_hd")} - {"2b_hd"}
    folders = set()
    for name, file in found.items():
        stage = stage_of(file)
        assert (stage.demo.temperature, stage.demo.max_new_tokens) == (0.2, 512) and stage.demo.title == "Mini-Gemini"
        folder = Path(str(stage.model.checkpoint))
        assert folder.parent == Path("work_dirs/MGM") and size_of(name) in folder.name.lower()
        assert folder.name.endswith("-HD") == name.endswith("_hd")
        folders.add(folder)
    assert len(folders) == len(found)
