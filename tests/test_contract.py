"""What every registered name and every shipped file must keep, whoever adds the next one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, imp_options, minigpt4_options, minimind_options, tiny_model
from mini_gemini_parts import CONVNEXT_L
from PIL import Image

from minivlm import builtins, cli, registry
from minivlm.api import assemble
from minivlm.config import ConfigError, load_config, to_container
from minivlm.config.defaults import read_model
from minivlm.config.experiment import NO_VISION
from minivlm.config.loader import list_model_defaults, parse_model
from minivlm.models.base import Connector, LanguageModel, VisionEncoder
from minivlm.processors.template import Template
from minivlm.types import Message, Sample

NAMES = [(kind, name) for kind in registry.KINDS for name in registry.names(kind)]
FILES = sorted([*(ROOT / "train_configs").rglob("*.yaml"), *(ROOT / "eval_configs").rglob("*.yaml")])

TINY_VIT = tiny_model()["vision_encoder"]["config"]
TINY_LLM = tiny_model()["language_model"]["config"]
TINY: dict[str, dict[str, dict[str, Any]]] = {
    "vision_encoder": {
        "hf": {"config": TINY_VIT},
        "timm": {
            "model_name": "vit_tiny_patch16_224",
            "image_size": 32,
            "kwargs": {"depth": 1, "embed_dim": 16, "num_heads": 2},
        },
        "efficientnet_lite0": {"pretrained": False, "image_size": 32, "block": 4},
        "eva_clip_g": {"image_size": 28, "width": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0},
        "convnext_multiscale": {"depths": [1, 1, 2, 1], "widths": [4, 6, 8, 8], "image_size": 52},
        "dual": {
            "low": {"name": "hf", "config": TINY_VIT},
            "high": {"name": "convnext_multiscale", "depths": [1] * 4, "widths": [4] * 4, "image_size": 64},
            "grid": 2,
            "global_view": True,
        },
        "lavis": {"model": "fake_extractor", "type": "base", "device": "cpu"},
    },
    "connector": {
        "linear": {},
        "mlp": {"norm": True, "merge": 2},
        "patch_merge": {"factor": 2},
        "patch_info_mining": {},
        "qformer": {
            "num_query_tokens": 3,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "intermediate_size": 32,
            "dropout": 0.0,
        },
    },
    "language_model": {"hf": {"config": TINY_LLM, "tokenizer": "asset:quickstart"}},
}
"""Settings with which a part is built in a moment. A new part is tested once its settings stand here."""

BASES: dict[str, type] = {"vision_encoder": VisionEncoder, "connector": Connector, "language_model": LanguageModel}


@pytest.fixture(autouse=True)
def _lavis(fake_lavis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoder `lavis` is built by the real bridge, at whose other end the tests' stand-in for LAVIS is."""
    monkeypatch.setenv("MINIVLM_LAVIS_PYTHON", fake_lavis)


def seeing(kind: str) -> list[str]:
    """The parts of a kind but those of a model that sees nothing, which test_text_only.py tests."""
    return [name for name in registry.names(kind) if name != NO_VISION]


def part(kind: str, name: str) -> Any:
    """The typed settings of a part, through the same checks as those of a file."""
    assert name in TINY[kind], f"add tiny settings of {kind} '{name}' to TINY"
    section = tiny_model()
    section[kind] = {"name": name, **TINY[kind][name]}
    return getattr(parse_model(section, "test"), kind).config


def build(kind: str, name: str, *arguments: Any) -> Any:
    torch.manual_seed(0)
    built = registry.get(kind, name)(part(kind, name), *arguments)
    assert isinstance(built, BASES[kind])
    return built


ENCODER_OF = {"patch_info_mining": "dual"}
"""Connectors that want another encoder than a plain one."""


def encoder(connector: str) -> VisionEncoder:
    return build("vision_encoder", ENCODER_OF.get(connector, "hf"))


# --- every name -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), NAMES)
def test_every_name_resolves_and_its_settings_are_a_documented_dataclass(kind: str, name: str) -> None:
    entry = registry.entry(kind, name)
    target = entry.resolve()
    assert target.is_file() if isinstance(target, Path) else callable(target)
    cls = entry.config_class()
    assert dataclasses.is_dataclass(cls) and cls.__doc__
    for field in dataclasses.fields(cls):
        has_default = any(d is not dataclasses.MISSING for d in (field.default, field.default_factory))
        assert has_default or field.metadata.get("help"), f"{kind} {name}: {field.name} is required but not explained"
    if kind != "template":
        assert entry.summary, f"{kind} '{name}' has no summary for `minivlm list`"


@pytest.mark.parametrize("name", seeing("vision_encoder"))
def test_every_encoder_keeps_what_it_declares(name: str) -> None:
    built = build("vision_encoder", name).train()
    pixels = {key: torch.randn(2, 3, settings["size"], settings["size"]) for key, settings in built.inputs.items()}
    for settings in built.inputs.values():
        assert {"size", "mean", "std"} <= set(settings) and len(settings["mean"]) == len(settings["std"]) == 3
    features = built.encode(pixels)
    assert features.shape == (2, built.num_tokens, built.hidden_size) and features.isfinite().all()
    assert built.grid[0] * built.grid[1] <= built.num_tokens
    if built.can_train:
        features.square().sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in built.parameters())
    else:
        assert not features.requires_grad and not list(built.parameters())
    assert built.source is None or built.source
    built.eval()
    with torch.no_grad():
        single = built.encode({key: value[:1] for key, value in pixels.items()})
        torch.testing.assert_close(single, built.encode(pixels)[:1], rtol=1e-4, atol=1e-5)
    with torch.device("meta"):
        shapes = registry.get("vision_encoder", name)(part("vision_encoder", name))
    assert (shapes.num_tokens, shapes.hidden_size, shapes.grid) == (built.num_tokens, built.hidden_size, built.grid)


@pytest.mark.parametrize("name", seeing("connector"))
def test_every_connector_keeps_what_it_declares(name: str) -> None:
    vision = encoder(name)
    built = build("connector", name, vision, 32)
    features = torch.randn(3, vision.num_tokens, vision.hidden_size, requires_grad=True)
    tokens = built(features)
    assert tokens.shape == (3, built.tokens_per_image, 32) and tokens.isfinite().all()
    tokens.square().sum().backward()
    assert features.grad is not None and features.grad.any()
    assert all(p.grad is not None for p in built.parameters())
    assert built(torch.zeros(1, vision.num_tokens, vision.hidden_size)).isfinite().all(), "a batch without pictures"
    torch.testing.assert_close(built(features[:1]), tokens[:1], rtol=1e-4, atol=1e-5)
    with torch.device("meta"):
        shapes = registry.get("connector", name)(part("connector", name), vision, 32)
    assert shapes.tokens_per_image == built.tokens_per_image


@pytest.mark.parametrize("name", registry.names("language_model"))
def test_every_language_model_keeps_what_it_declares(name: str) -> None:
    built = build("language_model", name, 360)
    assert built.vocab_size >= 360
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    embeds = built.embed(ids)
    assert embeds.shape == (2, 4, built.hidden_size)
    embeds = embeds.detach().requires_grad_()
    hidden = built(embeds, None, torch.arange(4).expand(2, -1))
    logits = built.head(hidden)
    assert hidden.shape == (2, 4, built.hidden_size) and logits.shape == (2, 4, built.vocab_size)
    logits[:, 1].square().sum().backward()
    assert embeds.grad is not None and embeds.grad[:, :2].any() and not embeds.grad[:, 2:].any(), "it must be causal"
    built.eval()
    with torch.no_grad():
        torch.testing.assert_close(built.head(hidden[:, 1]), logits[:, 1])
        new = built.generate(built.embed(ids), torch.ones_like(ids), max_new_tokens=3, pad_token_id=0, eos_token_id=[2])
    assert new.shape[0] == 2 and 1 <= new.shape[1] <= 3, "only the new ids"


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k in BASES for n in seeing(k)])
def test_every_part_trains_inside_of_a_model(kind: str, name: str) -> None:
    section = tiny_model()
    section[kind] = {"name": name, **TINY[kind][name]}
    if name in ENCODER_OF:
        section["vision_encoder"] = {"name": ENCODER_OF[name], **TINY["vision_encoder"][ENCODER_OF[name]]}
    torch.manual_seed(0)
    model, processor, config = assemble(parse_model(section, "test"))
    assert to_container(parse_model(to_container(config), "test")) == to_container(config), "as a checkpoint holds it"
    picture = Image.new("RGB", (40, 30), (220, 30, 30))
    sample = Sample("s", [Message("user", "<image>what color?"), Message("assistant", "red")], [picture])
    batch = processor.collate([processor.encode(sample)])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        loss = model.train()(batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]


@pytest.mark.parametrize("name", registry.names("template"))
def test_every_template_passes_the_schema(name: str) -> None:
    config = parse_model({**tiny_model(), "template": name}, "test")
    assert config.template is not None and config.template.name == name
    built = Template(config.template.config)
    assert built.stop or built.config.eos == "always"
    text = registry.get("template", name).read_text()
    assert text.startswith("#"), "a template says in its first line what it is for"


@pytest.mark.parametrize("name", registry.names("lr_scheduler"))
@pytest.mark.parametrize("warmup", [0, 3])
def test_every_schedule_stays_within_its_bounds(name: str, warmup: int) -> None:
    from minivlm.config.experiment import RunConfig

    run = RunConfig(init_lr=1e-2, min_lr=1e-4, warmup_lr=1e-5, warmup_steps=warmup, lr_decay_rate=0.5)
    rates = [registry.get("lr_scheduler", name)(run, 12, 4)(step) for step in range(12)]
    assert all(1e-5 <= rate <= 1e-2 for rate in rates)
    assert max(rates) == rates[max(warmup - 1, 0)] == 1e-2
    assert rates[:warmup] == sorted(rates[:warmup]) and rates[warmup:] == sorted(rates[warmup:], reverse=True)


# --- every file -----------------------------------------------------------------------------------------------------


def test_there_are_files_of_both_uses() -> None:
    assert {file.parent.name for file in FILES} == {"train_configs", "eval_configs"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_every_shipped_file_passes_the_schema(file: Path, minigpt4_data: Path) -> None:
    given = [options(file, minigpt4_data) for options in (minigpt4_options, imp_options, minimind_options)]
    experiment = load_config(file, [option for options in given for option in options])
    assert experiment.stages and not experiment.notes, "no key of an old system"
    assert file.read_text().startswith("#"), "a file says in its first line what it is for"
    for stage in experiment.stages:
        assert stage.model.checkpoint or stage.model.vision_encoder


@pytest.mark.parametrize("file", [f for f in FILES if f.name.startswith("minigpt")], ids=lambda file: file.name)
def test_what_a_shipped_file_leaves_to_its_user_is_asked_for(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert "model.language_model.path" in {problem.key for problem in caught.value.problems}
    assert all("must be given" in problem.message for problem in caught.value.problems)


ELSEWHERE = ("mini_gemini", "minimind_v", "tutorial")


@pytest.mark.parametrize(
    "file",
    # These pass theirs at real size, in test_mini_gemini_recipes.py and test_minimind_recipes.py; the tutorial's begin
    # with what its commands before have made, in test_docs_tutorial.py.
    [f for f in FILES if f.parent.name == "train_configs" and not f.name.startswith(ELSEWHERE)],
    ids=lambda file: str(file.name),
)
def test_every_training_file_passes_a_dry_run(
    file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    minigpt4_data: Path,
) -> None:
    """Nothing is written, and the data can be read."""
    monkeypatch.chdir(tmp_path)
    options = [
        "run.max_steps=2",
        "run.device=cpu",
        *minigpt4_options(file, minigpt4_data),
        *imp_options(file, minigpt4_data),
        *minimind_options(file, minigpt4_data),
    ]
    code = cli.train(["--cfg-path", str(file), "--dry-run", "--options", *options])
    shown = capsys.readouterr().out
    assert code == 0, shown
    assert "what trains" in shown and "supervised" in shown and "memory, estimated" in shown
    assert list(tmp_path.iterdir()) == []


def named_folders(part: dict[str, Any], folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Folders of tiny models for what a part, or a part inside it, wants from one."""
    if part["name"] == "dual":
        sizes = {"low": settings, "high": CONVNEXT_L}
        return {name: named_folders(part[name], folder / name, sizes[name]) for name in sizes}
    if part["name"] not in ("hf", "convnext_multiscale") or part.get("config"):
        return {}
    folder.mkdir(parents=True)
    name = "config.json" if part["name"] == "hf" else "open_clip_config.json"
    (folder / name).write_text(json.dumps({"vocab_size": 400, **settings}))
    # cells must be shared evenly among the tokens of the tiny encoder
    return {"path": str(folder)} | ({"image_size": 64 * part["image_size"] // 768} if "image_size" in part else {})


@pytest.mark.parametrize(("arch", "model_type"), list_model_defaults())
def test_every_packaged_model_is_complete(arch: str, model_type: str, tmp_path: Path) -> None:
    """Built on the meta device; a folder that users must name is that of a tiny model."""
    section: dict[str, Any] = {"arch": arch, "model_type": model_type}
    defaults = read_model(builtins.CONFIGS / "models" / f"{arch}_{model_type}.yaml").values["model"]
    for kind, settings in (("vision_encoder", TINY_VIT), ("language_model", TINY_LLM)):
        section[kind] = {"weights": None} | named_folders(defaults[kind], tmp_path / kind, settings)
    if not str(defaults["language_model"].get("tokenizer")).startswith("asset:"):
        section["language_model"]["tokenizer"] = "asset:quickstart"
    model, processor, _ = assemble(parse_model(section, "test"), meta=True)
    assert processor.tokens_per_image == model.connector.tokens_per_image > 0
    assert any(p.requires_grad for p in model.parameters())
    assert all(p.is_meta for p in model.parameters())


def test_every_file_of_defaults_is_packaged() -> None:
    """setup.py takes two kinds of files below configs, and assets/**; others would be missing after pip install."""
    files = [p for p in builtins.CONFIGS.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} == {".yaml", ".json"}
