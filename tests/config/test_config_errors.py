"""Every kind of mistake in a file is named with its file, line and key, all of them at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from config_texts import MODEL

from minivlm.config import ConfigError, Problem, load_config, parse_model
from minivlm.config.source import parse_yaml, read_yaml
from minivlm.config.validate import validate
from minivlm.schema import ModelPart, Part, setting


def test_a_correct_file_becomes_typed(write):
    experiment = load_config(
        write("x.yaml", MODEL + "datasets:\n  easy_vqa: {max_samples: 5}\nrun: {init_lr: 1e-4, weight_decay: 0}\n")
    )
    stage = experiment.stage("train")
    encoder = stage.model.vision_encoder
    assert isinstance(encoder, ModelPart) and encoder.freeze is True and encoder.config.image_size == 224
    assert isinstance(stage.model.template, Part) and stage.model.template.config.user_prefix == "Question: "
    assert stage.model.processor.config.image.name == "image"
    assert stage.datasets["easy_vqa"].config.max_samples == 5
    assert stage.run.init_lr == 1e-4 and type(stage.run.weight_decay) is float
    assert experiment.source.name == "x.yaml" and experiment.notes == []


def test_several_mistakes_are_reported_at_once(faults):
    lines = faults(
        """\
        model:
          vision_encoder: {name: efficientnet_lite0, freeze: true}
          connector: mlp
          language_model:
            name: hf
            attentoin: eager
          template: qa
        run:
          inti_lr: 3e-4
          batch_size_train: many
          max_epoch: 0
          lr_sched: linear_warmup_cosin_lr
          train_splits: train
          precision: 16
          beta1: 1.0
        """
    )
    assert lines[0] == "x.yaml:6: model.language_model.attentoin: unknown key (did you mean 'attention'?)"
    assert lines[1] == "x.yaml:9: run.inti_lr: unknown key (did you mean 'init_lr'?)"
    assert lines[2] == "x.yaml:10: run.batch_size_train: expected an integer, got 'many'"
    assert lines[3] == "x.yaml:11: run.max_epoch: must be at least 1, got 0"
    assert lines[4].startswith("x.yaml:12: run.lr_sched: unknown lr_scheduler 'linear_warmup_cosin_lr' (did you mean")
    assert lines[5].startswith("x.yaml:13: run.train_splits: expected a list, got 'train'")
    assert lines[6].startswith("x.yaml:14: run.precision: expected a string, got 16")
    assert lines[7] == "x.yaml:15: run.beta1: must be less than 1, got 1.0"
    assert len(lines) == 8


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", "1.5", "expected an integer, got 1.5"),
        ("seed", "true", "expected an integer, got true"),
        ("seed", "null", "expected an integer, got null"),
        ("seed", "[1]", "expected an integer, got a list"),
        ("init_lr", "abc", "expected a number, got 'abc'"),
        ("init_lr", "true", "expected a number, got true"),
        ("init_lr", "0", "must be greater than 0, got 0.0"),
        ("init_lr", ".nan", "must be greater than 0, got nan"),
        ("evaluate", "1", "expected true or false, got 1"),
        ("max_steps", "x", "expected an integer or null, got 'x'"),
        ("max_bad_share", "1.1", "must be at most 1, got 1.1"),
        ("on_bad_sample", "skp", "must be one of 'skip', 'raise', got 'skp' (did you mean 'skip'?)"),
        ("task", "vqaa", "unknown task 'vqaa' (did you mean 'vqa'?)"),
        ("output_dir", "???", "a value must be given: a string (folder for checkpoints"),
    ],
)
def test_values_of_run(faults, key, value, message):
    (line,) = faults(f"{MODEL}run:\n  {key}: {value}\n")
    assert line.startswith(f"x.yaml:7: run.{key}: {message}")


def test_choices_hold_for_every_item_of_a_list(faults):
    (line,) = faults(f"{MODEL}run:\n  trackers:\n    - wandb\n    - tensorbord\n")
    assert line.startswith("x.yaml:9: run.trackers.1: must be one of 'tensorboard', 'wandb', got 'tensorbord'")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("run:\n  depth: 3\n", "x.yaml:7: run.depth: unknown key"),
        ("run:\n  bias: true\n", "run.bias: unknown key (this key belongs under `model.connector.`)"),
        ("run:\n  checkpoint: a\n", "run.checkpoint: unknown key (this key belongs under `model.`)"),
        ("run:\n  val_images: 1\ndatasets: {easy_vqa: }\n", "(this key belongs under `datasets.easy_vqa.`)"),
        (
            "init_lr: 1\n",
            "x.yaml:6: init_lr: unknown key (this key belongs under `run.` or under `model.vision_encoder.`",
        ),
        ("runs: {}\n", "x.yaml:6: runs: unknown key (did you mean 'run'?)"),
        ("zzz: {}\n", "x.yaml:6: zzz: unknown key (known here: imports, base, model, datasets, run, demo, stages)"),
        ("demo: {titel: a}\n", "x.yaml:6: demo.titel: unknown key (did you mean 'title'?)"),
    ],
)
def test_keys_at_the_wrong_place(faults, text, line):
    (found,) = faults(MODEL + text)
    assert line in found


def test_a_setting_of_another_part_of_the_kind_is_explained(faults):
    (line,) = faults(MODEL.replace("connector: linear", "connector: {name: linear, depth: 2}"))
    assert line == "x.yaml:3: model.connector.depth: unknown key (it is a setting of connector 'mlp')"


def test_unknown_and_missing_names_of_parts(faults):
    lines = faults("model:\n  vision_encoder: timmm\n  connector:\n    depth: 2\n  language_model: 3\n  template: qa\n")
    assert lines[0].startswith("x.yaml:2: model.vision_encoder: unknown vision_encoder 'timmm' (did you mean 'timm'?)")
    assert lines[1] == (
        "x.yaml:3: model.connector.name: the name of a registered connector is missing: one of 'linear', 'mlp', "
        "'none', 'patch_info_mining', 'patch_merge', 'qformer'"
    )
    assert lines[2].startswith("x.yaml:5: model.language_model: expected the name of a language_model or a mapping")


def test_a_missing_required_key_is_reported_at_its_parent(faults):
    (line,) = faults(MODEL + "datasets:\n  mine:\n    name: llava_json\n    images: a\n")
    assert line.startswith("x.yaml:7: datasets.mine.annotations: a required value is missing: a mapping or a string")


def test_unions_report_the_fault_inside_the_fitting_member(faults):
    (line,) = faults(MODEL + "datasets:\n  llava_json:\n    annotations:\n      train: 5\n")
    assert line.startswith("x.yaml:9: datasets.llava_json.annotations.train: expected a string, got 5")
    (line,) = faults(MODEL + "datasets:\n  llava_json:\n    annotations: [a]\n")
    assert line.startswith("x.yaml:8: datasets.llava_json.annotations: expected a mapping or a string, got a list")


def test_a_model_without_its_parts(faults):
    lines = faults("run: {}\nmodel:\n  connector: linear\n")
    assert [line.split(": ")[1] for line in lines] == ["model.vision_encoder", "model.language_model", "model.template"]
    assert all(line.startswith("x.yaml:2: ") for line in lines)
    assert "unless model.checkpoint" in lines[0]
    assert faults("run: {}\n")[0].startswith("x.yaml:1: model: a required value is missing")
    assert len(faults("model:\n")) == 4


def test_a_checkpoint_brings_the_parts(write):
    model = load_config(write("x.yaml", "model: {checkpoint: output/a}\n")).stages[0].model
    assert model.checkpoint == "output/a" and model.connector is None


def test_sections_of_the_wrong_kind(faults):
    assert faults(MODEL + "run: 3\n") == ["x.yaml:6: run: expected a mapping, got 3"]
    assert faults(MODEL + "datasets: [a]\n")[0].startswith("x.yaml:6: datasets")
    assert faults("- a\n") == ["x.yaml:1: expected a mapping with sections such as `model:`"]


def test_yaml_faults_have_lines(faults):
    assert faults("model:\n  arch: a\nrun:\n  seed: 1\n  lr: 2\n  seed: 2\nmodel: {}\n") == [
        "x.yaml:6: run.seed: the key is given twice, first in line 4",
        "x.yaml:7: model: the key is given twice, first in line 1",
    ]
    (line,) = faults("model:\n  arch: [a\nrun: {}\n")
    assert line.startswith("x.yaml:3: not valid YAML")
    (line,) = faults("model:\n\tarch: a\n")
    assert line.startswith("x.yaml:2: not valid YAML")
    (line,) = faults("run: &a\n  seed: 1\n  more: *a\n")
    assert "alias" in line


def test_files_that_cannot_be_read(write):
    write("configs/train.yaml", MODEL)
    with pytest.raises(ConfigError, match=r"configs/trian.yaml: there is no such file \(did you mean 'train.yaml'\?\)"):
        load_config("configs/trian.yaml")
    with pytest.raises(ConfigError, match="this is a folder"):
        load_config("configs")


def test_numbers_and_anchors_are_read_like_omegaconf_does():
    tree = parse_yaml("a: &x {lr: 1e-4}\nb:\n  <<: *x\n  c: 2024-01-01\nd: [1, {e: 5}]\n1: {2: f}\n", "f.yaml")
    assert tree.values["a"]["lr"] == 1e-4 and tree.values["b"] == {"lr": 1e-4, "c": "2024-01-01"}
    assert tree.marks["b", "c"].line == 4 and tree.marks["b", "lr"].line == 1
    assert tree.marks["d", "1", "e"].line == 5 and tree.values["1"] == {"2": "f"}
    assert tree.locate(("d", "1", "x", "y")).key == "d.1.x.y" and tree.locate(("d", "1", "x")).line == 5


def test_the_template_file_is_blamed_for_what_it_says(faults, write, parts, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("user_prefix: U\ncut: [nowhere]\n")
    parts("template", "mine", file, config="minivlm.processors.configs:TemplateConfig")
    (line,) = faults(MODEL.replace("template: qa", "template: {name: mine, user_prefix: V}"))
    assert line.startswith(f"{file}:2: cut.0: must be one of 'image', 'answer'")
    (line,) = faults(MODEL.replace("template: qa", "template: {name: mine, cut: [there]}"))
    assert line.startswith("x.yaml:5: model.template.cut.0: must be one of")
    file.write_text("user_prefix: U\nuser_suffix: X\nchat: {system: S, user_suffix: Y}\n")
    text = MODEL.replace("template: qa", "template: {name: mine, user_prefix: V, chat: {system: T}}")
    template = load_config(write("x.yaml", text)).stages[0].model.template.config
    assert (template.user_prefix, template.user_suffix) == ("V", "X")
    assert template.chat == {"system": "T", "user_suffix": "Y"}


@dataclass
class Inner:
    size: int = setting(gt=0)


@dataclass
class Outer:
    inner: Inner = field(default_factory=lambda: Inner(1))
    mode: Literal["a", "b"] = "a"
    free: Any = None
    many: list[Inner] = field(default_factory=list)
    sizes: dict[int, float] = field(default_factory=dict)
    metrics: list[Part] = setting(factory=list, part="metric")

    def __post_init__(self):
        if self.mode == "b" and not self.many:
            raise ValueError("mode b needs many")


def build(text: str):
    tree = parse_yaml(text, "f")
    value, problems = validate(tree.values, Outer, tree.problem)
    assert (value is None) == bool(problems)
    return value, [str(problem) for problem in problems]


def test_validate_handles_nested_dataclasses_literals_and_lists_of_parts():
    value, problems = build(
        "inner: {size: 2}\nfree: {x: [1]}\nmany: [{size: 1}]\nsizes: {3: 1}\nmode: b\nmetrics: [exact_match]\n"
    )
    assert problems == []
    assert value.inner == Inner(2) and value.many == [Inner(1)] and value.sizes == {3: 1.0}
    assert value.free == {"x": [1]} and value.metrics[0].name == "exact_match"
    assert build("mode: c")[1] == ["f:1: mode: expected 'a' or 'b', got 'c'"]
    assert build("inner: {}")[1] == ["f:1: inner.size: a required value is missing: an integer"]
    assert build("many: [{size: 1}, {size: -1}]")[1] == ["f:1: many.1.size: must be greater than 0, got -1"]
    assert build("sizes: {a: 1}")[1] == ["f:1: sizes.a: the key must be an integer, got 'a'"]
    assert build("mode: b")[1] == ["f:1: mode b needs many"]
    assert build("metrics: [exact]")[1][0].startswith("f:1: metrics.0: unknown metric 'exact' (did you mean")


def test_parse_model_reads_the_section_of_a_checkpoint():
    parts = {
        "vision_encoder": {"name": "timm", "model_name": "vit"},
        "connector": "mlp",
        "language_model": {"name": "hf", "path": "/x"},
        "template": "qa",
    }
    # A model type without packaged defaults does not matter here: the section is complete.
    model = parse_model({"arch": "a", "model_type": "b", **parts}, "ckpt/config.yaml")
    assert model.vision_encoder.config.model_name == "vit" and model.processor.name == "vlm"
    with pytest.raises(ConfigError) as caught:
        parse_model({**parts, "template": None, "connector": {"name": "mlp", "dept": 1}}, "ckpt/config.yaml")
    lines = str(caught.value).split("\n")
    assert lines[0] == "ckpt/config.yaml: model.connector.dept: unknown key (did you mean 'depth'?)"
    assert lines[1].startswith("ckpt/config.yaml: model.template: a model needs a template")


def test_config_error_holds_its_problems_in_order():
    problems = [
        Problem("b", 2, "k", "m"),
        Problem("a", 9, "", "m"),
        Problem("b", 1, "k", "m"),
        Problem("b", 2, "k", "m"),
    ]
    error = ConfigError(problems)
    assert str(error) == "b:1: k: m\nb:2: k: m\na:9: m"
    assert len(error.problems) == 3


def test_read_yaml_of_an_empty_file(write):
    assert read_yaml(write("e.yaml", "# nothing\n")).values == {}
