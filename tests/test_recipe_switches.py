"""What a recipe may say of the training of single parameters, and drop path in an encoder that is frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import losses, tiny_model, write_yaml
from rich.console import Console
from safetensors.torch import load_file
from test_dual import CLIP, CONVNEXT, convnext, model_of, open_clip, section
from test_resume import QUIET, Killed, assert_same_weights, kill_after

from minivlm.config import ConfigError, load_config
from minivlm.config.loader import parse_model
from minivlm.datasets.feature_cache import FeatureCache, FeatureCacheError
from minivlm.models.base import ModelError
from minivlm.models.tuning import lr_factors, parameter_groups, part_table
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.processor import VLMProcessor
from minivlm.runners.dry_run import dry_run
from minivlm.runners.experiment import run_experiment

TOWERS = [
    "*",
    "!low.model.encoder.layers.1.*",
    "!high.stages.[013].blocks.0.*",
    "!high.stages.2.blocks.1.*",
]
"""Mini-Gemini's towers that train: the second half of CLIP, the last block of each ConvNeXt stage; at tiny sizes."""
DROPPING = {**CONVNEXT, "drop_path_rate": 0.9, "drop_path_when_frozen": True}


# --- learning rates by glob -----------------------------------------------------------------------------------------


def groups_of(model: dict[str, Any], lr_multi: dict[str, float]) -> tuple[dict[str, Any], VisionLanguageModel]:
    built, config = model_of(model), parse_model(model, "test")
    return {g["name"]: g for g in parameter_groups(built, config, 1e-3, 0.1, lr_multi)}, built


def test_the_first_glob_that_matches_gives_the_factor() -> None:
    content = tiny_model()
    content["connector"]["init_lr"] = 1e-2
    found, model = groups_of(content, {"connector.layers.0.*": 3, "connector.*": 2, "*.embed_tokens.*": 0.5})
    rates = {name: (g["lr"], g["weight_decay"]) for g in found.values() for name in g["param_names"]}
    assert set(rates) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert rates["connector.layers.0.weight"] == (pytest.approx(3e-2), 0.1)
    assert rates["connector.layers.0.bias"] == (pytest.approx(3e-2), 0.0)
    assert rates["connector.layers.2.weight"] == (pytest.approx(2e-2), 0.1)
    assert rates["language_model.model.model.embed_tokens.weight"] == (pytest.approx(5e-4), 0.1)
    assert rates["language_model.model.lm_head.weight"] == (pytest.approx(1e-3), 0.1)
    assert list(found) == [
        *("connector x 2", "connector x 3", "connector x 2 (no decay)", "connector x 3 (no decay)"),
        *("language_model x 0.5", "language_model", "language_model (no decay)"),
    ]
    for group in found.values():
        assert group["lr_scale"] == pytest.approx(group["lr"] / 1e-3)


def test_a_glob_must_match_what_trains() -> None:
    model = model_of(tiny_model())
    for glob in ("vision_encoder.*", "connector.mlp.*"):  # frozen, and nothing
        with pytest.raises(
            ModelError, match=rf"run\.lr_multi: '{glob.replace('*', '.')}' matches no parameter that tr"
        ):
            lr_factors(model, {"connector.*": 2, glob: 2})
    assert set(lr_factors(model, {"vision_encoder.*": 1, "connector.*": 2}).values()) == {2}, "1 changes nothing"


def test_factors_are_positive(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    for factor, message in ((0, "must be greater than 0, got 0"), ("much", "expected a number")):
        tiny_experiment["run"]["lr_multi"] = {"connector.*": factor}
        with pytest.raises(ConfigError, match=rf"run\.lr_multi\.connector\.\*: {message}"):
            load_config(write_yaml(tmp_path / "x.yaml", tiny_experiment))


def test_the_dry_run_shows_every_rate(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    tiny_experiment["run"]["lr_multi"] = {"connector.layers.2.*": 2}
    config = load_config(write_yaml(tmp_path / "x.yaml", tiny_experiment))
    rows = {row.part: row for row in part_table(model_of(tiny_model()), config.stages[0].model, 5e-3, {"con*.2.*": 2})}
    first, second = 16 * 32 + 32, 32 * 32 + 32
    assert rows["connector"].rates == {5e-3: first, 1e-2: second} and rows["connector"].trainable == first + second
    console = Console(record=True, width=120, quiet=False)
    assert dry_run(config, console)
    said = console.export_text()
    assert f"5.00e-03 of {first}" in said and f"1.00e-02 of {second:,}" in said
    with pytest.raises(ModelError, match=r"run\.lr_multi: 'con\.\*' matches no parameter"):
        dry_run(load_config(tmp_path / "x.yaml", ["run.lr_multi={con.*: 2}"]), QUIET)


def test_a_step_is_as_long_as_its_factor_says(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    """The first step of Adam has the length of the learning rate, whatever the gradient."""
    tiny_experiment["run"] |= {"max_steps": 1, "weight_decay": 0.0, "lr_multi": {"connector.*": 4}}
    run_experiment(load_config(write_yaml(tmp_path / "x.yaml", tiny_experiment)), QUIET)
    after = load_file(tmp_path / "out" / "model" / "model.safetensors")
    tiny_experiment["run"] |= {"init_lr": 1e-12, "output_dir": str(tmp_path / "start")}
    run_experiment(load_config(write_yaml(tmp_path / "y.yaml", tiny_experiment)), QUIET)
    before = load_file(tmp_path / "start" / "model" / "model.safetensors")
    for part, factor in (("connector.", 4), ("language_model.model.lm_head", 1)):
        longest = max(float((after[n] - before[n]).abs().max()) for n in after if n.startswith(part))
        assert longest == pytest.approx(5e-3 * factor, rel=0.02)


def test_resumed_with_factors_and_refused_with_others(
    tiny_experiment: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_experiment["run"] |= {"max_steps": 6, "save_freq": 2, "lr_multi": {"connector.layers.0.*": 2}}
    config = write_yaml(tmp_path / "x.yaml", tiny_experiment)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_experiment(load_config(config, [f"run.output_dir={whole}"]), QUIET)
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(Killed):
            run_experiment(load_config(config, [f"run.output_dir={broken}"]), QUIET)
    for other in ("{connector.layers.0.*: 1}", "{connector.layers.2.*: 2}"):  # 1 is as if it were left out
        with pytest.raises(ValueError, match=r"other groups of trainable parameters; .* the same run\.lr_multi"):
            run_experiment(load_config(config, [f"run.output_dir={broken}", f"run.lr_multi={other}"]), QUIET)
    run_experiment(load_config(config, [f"run.output_dir={broken}"]), QUIET)
    assert losses(broken) == losses(whole)
    assert_same_weights(whole, broken)


# --- encoders of which a part trains --------------------------------------------------------------------------------


def trainable(model: VisionLanguageModel) -> set[str]:
    return {name for name, p in model.vision_encoder.named_parameters() if p.requires_grad}


def test_the_last_glob_that_matches_decides() -> None:
    model = model_of(section(freeze=TOWERS))
    blocks = (
        "high.stages.0.blocks.0.",
        "high.stages.1.blocks.0.",
        "high.stages.2.blocks.1.",
        "high.stages.3.blocks.0.",
    )
    names = [name for name, _ in model.vision_encoder.named_parameters()]
    wanted = {name for name in names if name.startswith(("low.model.encoder.layers.1.", *blocks))}
    assert trainable(model) == wanted and len(wanted) == 16 + 4 * 9
    again = model_of(section(freeze=[*TOWERS, "*.bias"]))
    assert trainable(again) == {name for name in wanted if not name.endswith("bias")}
    assert not trainable(model_of(section(freeze=["!low.*", "*"])))
    assert trainable(model_of(section(freeze=["!low.*"]))) == set(names)
    with pytest.raises(ModelError, match=r"vision_encoder\.freeze: '!high\.stage\.\*' matches no parameter"):
        model_of(section(freeze=["*", "!high.stage.*"]))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_encoders_of_which_a_part_trains(checkpointing: bool) -> None:
    """Those of what trains are those of whole encoders that train; below it there are none."""
    how = {"gradient_checkpointing": checkpointing}
    pixels, weights = torch.randn(1, 3, 64, 64), torch.randn(1, 4, 16 + 64 * 28)

    def gradients(freeze: Any) -> dict[str, torch.Tensor]:
        model = model_of(section({**CLIP, **how}, {**CONVNEXT, **how}, freeze=freeze)).train()
        for name, parameter in model.vision_encoder.named_parameters():
            if name.endswith("gamma"):
                parameter.data.fill_(0.5)
        assert model.vision_encoder.training and not model.is_frozen("vision_encoder")
        (model.extract_features({"image": pixels}) * weights).sum().backward()
        return {n: p.grad for n, p in model.vision_encoder.named_parameters() if p.grad is not None}

    own, whole = gradients(TOWERS), gradients(False)
    assert set(own) == trainable(model_of(section(freeze=TOWERS)))
    for name, gradient in own.items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-5)
        assert gradient.any() or name.endswith("k_proj.bias")


def test_published_globs_at_real_size() -> None:
    """CLIP's layers from 12 on that the tokens pass (the last one is not kept), the last blocks of ConvNeXt-L."""
    low = {"name": "hf", "layer": -2, "config": {**CLIP["config"], "num_hidden_layers": 24}}
    high = {"name": "convnext_multiscale", "variant": "convnext_large_d_320", "image_size": 64}
    freeze = ["*", "!low.model.encoder.layers.1[2-9].*", "!low.model.encoder.layers.2?.*"]
    freeze += ["!high.stages.[013].blocks.2.*", "!high.stages.2.blocks.26.*"]
    model = model_of(section(low, high, freeze=freeze), meta=True)
    layers = {int(name.split(".")[4]) for name in trainable(model) if name.startswith("low.")}
    assert layers == set(range(12, 23))
    stages = {tuple(name.split(".")[2:5:2]) for name in trainable(model) if name.startswith("high.")}
    assert stages == {("0", "2"), ("1", "2"), ("2", "26"), ("3", "2")}


def test_towers_that_train_are_saved_resumed_and_not_cached(
    tiny_experiment: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint holds of an encoder with a base what trains of it; a second run and a resumed one find it."""
    open_clip(tmp_path / "clip")
    high = {"name": "convnext_multiscale", "path": str(tmp_path / "clip"), "image_size": 64}
    base = {"name": "hf", "path": str(save_clip(tmp_path / "low"))}
    globs = ["*", "!low.model.encoder.layers.1.*", "!high.stages.3.blocks.0.*"]
    tiny_experiment["model"] = section(base, high, freeze=globs)
    tiny_experiment["run"] |= {"max_steps": 4, "save_freq": 2, "lr_multi": {"vision_encoder.*": 0.1}}
    tiny_experiment["run"] |= {"batch_size_train": 2}
    config = write_yaml(tmp_path / "x.yaml", tiny_experiment)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_experiment(load_config(config, [f"run.output_dir={whole}"]), QUIET)
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(Killed):
            run_experiment(load_config(config, [f"run.output_dir={broken}"]), QUIET)
    run_experiment(load_config(config, [f"run.output_dir={broken}"]), QUIET)
    assert losses(broken) == losses(whole)
    assert_same_weights(whole, broken)
    kept = {n for n in load_file(whole / "model" / "model.safetensors") if n.startswith("vision_encoder.")}
    assert {n.split(".")[1] for n in kept} == {"low", "high"}
    assert all(
        n.startswith(("vision_encoder.low.model.encoder.layers.1.", "vision_encoder.high.stages.3.")) for n in kept
    )
    options = [f"model.checkpoint={whole}", f"run.output_dir={tmp_path}/next", "model.vision_encoder.freeze=true"]
    run_experiment(load_config(config, [*options, "run.lr_multi={vision_encoder.*: 1}"]), QUIET)
    later = load_file(tmp_path / "next" / "model" / "model.safetensors")
    first = load_file(whole / "model" / "model.safetensors")
    assert kept == {n for n in later if n.startswith("vision_encoder.")}, "what an earlier stage trained is kept"
    assert all(torch.equal(first[n], later[n]) for n in kept)
    with pytest.raises(FeatureCacheError, match="needs a frozen encoder"):
        run_experiment(
            load_config(config, [f"run.feature_cache={tmp_path}/cache", f"run.output_dir={tmp_path}/c"]), QUIET
        )


def save_clip(folder: Path) -> Path:
    from transformers import AutoConfig, AutoModel

    config = dict(CLIP["config"])
    torch.manual_seed(1)
    AutoModel.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).save_pretrained(folder)
    return folder


# --- drop path in a frozen encoder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("switch", [False, True])
def test_paths_are_dropped_in_training_where_a_recipe_wants_it(dual: bool, switch: bool) -> None:
    high = {**DROPPING, "drop_path_when_frozen": switch}
    content = section(high=high, freeze=True) if dual else {**tiny_model(), "vision_encoder": {**high, "freeze": True}}
    model = model_of(content)
    encoder = model.vision_encoder.high if dual else model.vision_encoder
    for name, parameter in encoder.named_parameters():
        if name.endswith("gamma"):
            parameter.data.fill_(0.5)
    pixels = {"image": torch.randn(2, 3, 64, 64)}
    expected = model.eval().extract_features(pixels)
    one, other = (model.train().extract_features(pixels) for _ in range(2))
    assert torch.equal(one, other) != switch and not one.requires_grad
    assert [name for name, child in encoder.named_modules() if child.training and "drop" not in name] == []
    if dual:
        assert torch.equal(one[..., :16], expected[..., :16]), "the low resolution drops nothing"
    assert torch.equal(model.eval().extract_features(pixels), expected)
    assert torch.equal(model.train(False).extract_features(pixels), expected)
    assert not any(child.training for child in model.modules())


def test_beside_a_low_encoder_that_trains_it_still_drops() -> None:
    model = model_of(section(high=DROPPING, freeze=["high.*"])).train()
    high = model.vision_encoder.high
    assert model.vision_encoder.low.training and not high.training
    assert {type(child).__name__ for child in high.modules() if child.training} == {"DropPath"}


def test_features_that_differ_are_not_cached(tmp_path: Path) -> None:
    processor = VLMProcessor.__new__(VLMProcessor)
    for content in (
        section(high=DROPPING, freeze=True),
        {**tiny_model(), "vision_encoder": {**DROPPING, "freeze": True}},
    ):
        with pytest.raises(FeatureCacheError, match=r"drops paths: set drop_path_when_frozen: false"):
            FeatureCache.for_model(tmp_path, model_of(content), processor)


def test_dropping_nothing_is_no_recipe() -> None:
    with pytest.raises(ConfigError, match="drop_path_when_frozen drops nothing without a drop_path_rate"):
        convnext(**{k: v for k, v in DROPPING.items() if k not in ("name", "drop_path_rate")})


def test_a_run_that_drops_paths_is_resumed_to_the_bit(
    tiny_experiment: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_clip(tmp_path / "clip")
    high = {"name": "convnext_multiscale", "path": str(tmp_path / "clip"), "image_size": 64}
    high |= {"drop_path_rate": 0.9, "drop_path_when_frozen": True}
    tiny_experiment["model"] = section(high=high, freeze=True)
    tiny_experiment["run"] |= {"max_steps": 4, "save_freq": 2, "batch_size_train": 2}
    config = write_yaml(tmp_path / "x.yaml", tiny_experiment)
    whole, broken, without = tmp_path / "whole", tmp_path / "broken", tmp_path / "without"
    run_experiment(load_config(config, [f"run.output_dir={whole}"]), QUIET)
    with monkeypatch.context() as patch:
        kill_after(patch, 3)
        with pytest.raises(Killed):
            run_experiment(load_config(config, [f"run.output_dir={broken}"]), QUIET)
    torch.manual_seed(0)
    run_experiment(load_config(config, [f"run.output_dir={broken}"]), QUIET)
    assert losses(broken) == losses(whole)
    assert_same_weights(whole, broken)
    plain = [f"run.output_dir={without}", "model.vision_encoder.high.drop_path_when_frozen=false"]
    run_experiment(load_config(config, plain), QUIET)
    assert losses(without) != losses(whole)
