"""Packaged defaults <- base files <- the file <- options; imports and interpolation."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_texts import MODEL

from minivlm.config import ConfigError, list_model_defaults, load_config, parse_model, to_container

TINY = """\
model:
  arch: tiny
  model_type: a
  vision_encoder: {name: efficientnet_lite0, freeze: true, image_size: 64}
  connector: {name: mlp, depth: 3}
  language_model: {name: hf, path: /a}
  template: qa
"""


def only(experiment):
    (stage,) = experiment.stages
    return stage


@pytest.fixture
def tiny(packaged):
    packaged("models/tiny_a.yaml", TINY)
    packaged("models/tiny_b_c.yaml", TINY.replace("model_type: a", "model_type: b_c").replace("path: /a", "path: /b"))
    packaged("models/other_x.yaml", TINY.replace("arch: tiny", "arch: other").replace("model_type: a", "model_type: x"))
    return packaged


# ------------------------------------------------------------------------------------ model defaults
def test_the_file_lies_over_its_model_defaults(write, tiny):
    text = "model: {arch: tiny, model_type: a, connector: {norm: true}, language_model: {path: /mine}}\n"
    model = only(load_config(write("x.yaml", text))).model
    assert (model.connector.config.depth, model.connector.config.norm) == (3, True)
    assert model.language_model.config.path == "/mine" and model.vision_encoder.config.image_size == 64


def test_a_part_with_another_name_starts_afresh(write, tiny):
    text = "model: {arch: tiny, model_type: a, connector: linear, vision_encoder: {name: timm, model_name: v}}\n"
    model = only(load_config(write("x.yaml", text))).model
    assert model.connector.name == "linear"  # `depth` of the mlp is gone, it would be an unknown key
    assert model.vision_encoder.config.image_size is None and model.vision_encoder.freeze is True
    again = only(load_config("x.yaml", ["model.connector.norm=true", "model.connector.name=mlp"])).model
    assert again.connector.config.norm is True and again.connector.config.depth == 3  # as the packaged mlp


def test_an_option_selects_another_defaults_file(write, tiny):
    write("x.yaml", "model: {arch: tiny, model_type: a}\n")
    assert only(load_config("x.yaml")).model.language_model.config.path == "/a"
    assert only(load_config("x.yaml", ["model.model_type=b_c"])).model.language_model.config.path == "/b"
    assert list_model_defaults() == [("other", "x"), ("tiny", "a"), ("tiny", "b_c")]


def test_defaults_may_be_a_bare_section_and_are_blamed_for_their_faults(write, packaged):
    file = packaged("models/bare_a.yaml", "connector: linear\nlanguage_model: {name: hf, pth: 1}\n")
    write("x.yaml", "model: {arch: bare, model_type: a, template: qa, vision_encoder: efficientnet_lite0}\n")
    with pytest.raises(ConfigError) as caught:
        load_config("x.yaml")
    assert str(caught.value).startswith(f"{file}:2: ") and "(did you mean 'path'?)" in str(caught.value)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("arch: tyny, model_type: a", "model.arch: unknown arch 'tyny' (did you mean 'tiny'?); there are: other, tiny"),
        ("arch: tiny, model_type: b", "model.model_type: unknown model_type 'b' of 'tiny'; there are: a, b_c"),
        ("arch: tiny", "model.arch: needs model.model_type beside it; there are: a, b_c"),
        ("model_type: a", "model.model_type: needs model.arch beside it; there are: other, tiny"),
    ],
)
def test_unknown_models(faults, tiny, section, message):
    assert faults(f"run:\n  seed: 1\nmodel: {{{section}}}\n") == [f"x.yaml:3: {message}"]


def test_parse_model_asks_the_defaults_only_for_missing_parts(tiny):
    model = parse_model({"arch": "tiny", "model_type": "a"}, "model tiny/a")
    assert model.connector.config.depth == 3
    assert parse_model(to_container(model) | {"model_type": "gone"}, "c.yaml").model_type == "gone"
    with pytest.raises(ConfigError, match=r"model tiny/x: model.model_type: unknown model_type 'x' of 'tiny'"):
        parse_model({"arch": "tiny", "model_type": "x"}, "model tiny/x")


def test_an_unknown_model_type_of_an_option(faults, tiny):
    (line,) = faults("model: {arch: tiny, model_type: a}\n", ["model.model_type=c"])
    assert line.startswith("--options: model.model_type: unknown model_type 'c' of 'tiny'")


# ---------------------------------------------------------------------------------- dataset defaults
def test_dataset_defaults_by_type(write, packaged, faults):
    packaged("datasets/llava_json/default.yaml", "datasets:\n  llava_json: {annotations: a.json, max_samples: 7}\n")
    packaged("datasets/llava_json/small.yaml", "annotations: b.json\n")
    text = MODEL + "datasets:\n  llava_json:\n  second: {name: llava_json, type: small, sample_ratio: 2}\n"
    datasets = only(load_config(write("x.yaml", text))).datasets
    assert (datasets["llava_json"].config.annotations, datasets["llava_json"].config.max_samples) == ("a.json", 7)
    assert datasets["second"].name == "llava_json" and datasets["second"].config.max_samples is None
    assert (datasets["second"].config.annotations, datasets["second"].config.sample_ratio) == ("b.json", 2.0)
    changed = only(load_config("x.yaml", ["datasets.second.type=default"])).datasets["second"].config
    assert changed.annotations == "a.json"
    (line, *_) = faults(MODEL + "datasets:\n  second:\n    name: llava_json\n    type: smal\n    annotations: a\n")
    expected = "dataset 'llava_json' has no type 'smal' (did you mean 'small'?); there are: default, small"
    assert line == f"x.yaml:9: datasets.second.type: {expected}"


def test_a_dataset_needs_no_defaults_and_may_be_a_name(write, packaged):
    datasets = only(load_config(write("x.yaml", MODEL + "datasets: {one: easy_vqa, easy_vqa: }\n"))).datasets
    assert {key: part.name for key, part in datasets.items()} == {"one": "easy_vqa", "easy_vqa": "easy_vqa"}


# ------------------------------------------------------------------------------------------- base
def test_base_files_lie_beneath_in_their_order(write):
    write("common/model.yaml", MODEL)
    write("common/run.yaml", "base: model.yaml\nrun: {seed: 1, init_lr: 1, max_epoch: 1}\n")
    write("common/late.yaml", "run: {init_lr: 2, max_epoch: 2}\n")
    stage = only(
        load_config(write("sub/x.yaml", "base: [../common/run.yaml, ../common/late.yaml]\nrun: {max_epoch: 3}\n"))
    )
    assert (stage.run.seed, stage.run.init_lr, stage.run.max_epoch) == (1, 2.0, 3)
    assert stage.model.connector.name == "linear"


def test_faults_point_to_the_file_that_holds_the_value(write):
    write("common/a.yaml", MODEL + "run:\n  seed: x\n  init_lr: y\n")
    write("x.yaml", "base: common/a.yaml\nrun:\n\n  init_lr: z\n")
    with pytest.raises(ConfigError) as caught:
        load_config("x.yaml", ["run.max_epoch=0"])
    assert str(caught.value).split("\n") == [
        "common/a.yaml:7: run.seed: expected an integer, got 'x'",
        "x.yaml:4: run.init_lr: expected a number, got 'z'",
        "--options: run.max_epoch: must be at least 1, got 0",
    ]


def test_missing_and_circular_bases(write, faults):
    write("b.yaml", "run: {}\nbase: x.yaml\n")
    assert faults("run: {}\nbase:\n  - nope.yaml\n") == ["x.yaml:3: base.0: there is no file nope.yaml"]
    assert faults("base: b.yaml\n") == ["b.yaml:2: base: the files are each other's base: x.yaml"]
    assert faults("base: 3\n" + MODEL) == ["x.yaml:1: base: expected a file or a list of files, got 3"]


def test_the_environment_can_say_where_a_base_lies(write, monkeypatch, faults):
    write("there/a.yaml", MODEL)
    monkeypatch.setenv("MINIVLM_TEST_BASE", "there")
    assert only(load_config(write("x.yaml", "base: ${oc.env:MINIVLM_TEST_BASE}/a.yaml\n"))).model.template.name == "qa"
    lines = faults(MODEL + "base: ${run.seed}/a.yaml\n")
    assert lines[0].startswith("x.yaml:6: base: cannot be resolved")


def test_an_empty_section_erases_nothing(write):
    write("a.yaml", MODEL + "run: {seed: 7}\n")
    assert only(load_config(write("x.yaml", "base: a.yaml\nrun:\n"))).run.seed == 7


# --------------------------------------------------------------------------------------- options
def test_options_in_both_forms(write):
    write("x.yaml", MODEL)
    dots = ["run.init_lr=1e-3", "run.train_splits=[a,b]", "model.connector=mlp", "model.connector.depth=4"]
    pairs = [part for item in dots for part in item.split("=")]
    for options in (dots, pairs):
        stage = only(load_config("x.yaml", options))
        assert stage.run.init_lr == 1e-3 and stage.run.train_splits == ["a", "b"]
        assert (stage.model.connector.name, stage.model.connector.config.depth) == ("mlp", 4)
    assert only(load_config("x.yaml", ["run.job_name", "a=b"])).run.job_name == "a=b"
    assert only(load_config("x.yaml", None)).run.job_name is None


def test_options_change_items_of_lists_and_short_parts(write):
    write("x.yaml", MODEL + "run: {train_splits: [a, b]}\n")
    options = ["run.train_splits[1]=c", "model.template.user_prefix='Q: '"]
    stage = only(load_config("x.yaml", options))
    assert stage.run.train_splits == ["a", "c"]
    assert stage.model.template.name == "qa" and stage.model.template.config.user_prefix == "Q: "


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["run.inti_lr=1"], "--options: run.inti_lr: unknown key (did you mean 'init_lr'?)"),
        (["rnu.seed=1"], "--options: rnu: unknown key (did you mean 'run'?)"),
        (["run.seed=x"], "--options: run.seed: expected an integer, got 'x'"),
        (["run.seed=1", "run.task"], "--options: run.task: expected key=value"),
        (["run.seed", "1", "run.task"], "--options: run.task: has no value; expected pairs"),
        (["run.seed=[1"], "--options: run.seed: the value cannot be read"),
        (["run..seed=1"], "--options: run..seed: expected a key such as run.init_lr"),
        (["datasets.more.sample_ratio=1"], "--options: datasets.more: unknown dataset 'more'"),
        (["base=b.yaml"], "--options: base: cannot be given as an option"),
        (["stages.a.run.seed=1"], "--options: stages.a: the file has no stages"),
    ],
)
def test_faulty_options(faults, options, message):
    (line,) = faults(MODEL, options)
    assert line.startswith(message)


def test_what_an_optioned_node_lacks_is_blamed_on_the_file(faults):
    (line,) = faults(MODEL + "datasets:\n  llava_json:\n", ["datasets.llava_json.images=a"])
    assert line.startswith("x.yaml:7: datasets.llava_json.annotations: a required value is missing")


# --------------------------------------------------------------------------------- interpolation
def test_interpolations_see_defaults_options_and_the_environment(write, tiny, monkeypatch):
    monkeypatch.setenv("MINIVLM_TEST_HOME", "/home/me")
    text = """\
    model: {arch: tiny, model_type: "${oc.env:MINIVLM_TEST_TYPE,a}"}
    run:
      seed: 3
      job_name: s${run.seed}_${model.vision_encoder.image_size}
      output_dir: ${oc.env:MINIVLM_TEST_HOME}/out
      warmup_steps: ${.seed}
    """
    run = only(load_config(write("x.yaml", text), ["run.seed=4"])).run
    assert (run.job_name, run.output_dir, run.warmup_steps) == ("s4_64", "/home/me/out", 4)


def test_unresolvable_interpolations(faults, monkeypatch):
    monkeypatch.delenv("MINIVLM_NOPE", raising=False)
    lines = faults(MODEL + "run:\n  seed: ${run.sed}\n  job_name: ${oc.env:MINIVLM_NOPE}\n  min_lr: x\n")
    assert lines[0] == "x.yaml:7: run.seed: cannot be resolved: Interpolation key 'run.sed' not found"
    assert lines[1].startswith("x.yaml:8: run.job_name: cannot be resolved: ") and "MINIVLM_NOPE" in lines[1]
    assert lines[2] == "x.yaml:9: run.min_lr: expected a number, got 'x'"
    (line,) = faults(MODEL + "run:\n  seed: ${run.\n")
    assert line.startswith("x.yaml:7: run.seed: ")


# --------------------------------------------------------------------------------------- imports
PLUGIN = """\
from dataclasses import dataclass
from minivlm.registry import register
from minivlm.schema import setting

@dataclass
class MineConfig:
    width: int = setting(4, ge=1)

@register("connector", "mine_{tag}", config=MineConfig)
class Mine:
    "A connector."
"""


def test_imports_are_relative_to_the_file_and_register_parts(write, parts, faults):
    write("sub/mine.py", PLUGIN.replace("{tag}", "one"))
    write("sub/base.yaml", "imports: mine.py\n" + MODEL.replace("connector: linear", "connector: mine_one"))
    experiment = load_config(write("x.yaml", "base: sub/base.yaml\nimports: [json]\n"))
    assert only(experiment).model.connector.config.width == 4
    assert experiment.imports == [str(Path("sub/mine.py").resolve()), "json"]
    (line,) = faults("base: sub/base.yaml\n", ["model.connector.witdh=3"])
    assert line == "--options: model.connector.witdh: unknown key (did you mean 'width'?)"


def test_failing_imports_have_lines(write, faults):
    write("broken.py", "1 / 0\n")
    lines = faults(MODEL + "imports:\n  - broken.py\n  - nope.py\n  - no_such_module_xyz\n  - 3\n")
    assert lines[0] == "x.yaml:7: imports.0: broken.py failed with ZeroDivisionError: division by zero"
    assert lines[1] == "x.yaml:8: imports.1: there is no file nope.py"
    assert lines[2].startswith("x.yaml:9: imports.2: no_such_module_xyz failed with ModuleNotFoundError")
    assert lines[3].startswith("x.yaml:10: imports.3: expected a list of Python files or modules, got 3")


# ------------------------------------------------------------------------------------ round trip
def test_a_resolved_config_can_be_loaded_again(write, tiny):
    import yaml

    first = only(load_config(write("x.yaml", "model: {arch: tiny, model_type: a}\ndatasets: {easy_vqa: }\n")))
    write("again.yaml", yaml.safe_dump(to_container(first)))
    assert only(load_config("again.yaml")) == first
