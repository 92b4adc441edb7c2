"""Several stages in one file: what they share, what each says, who is blamed."""

from __future__ import annotations

import pytest
from config_texts import MODEL

from minivlm.config import load_config

TWO = (
    MODEL
    + """\
datasets: {easy_vqa: }
run:
  init_lr: 1e-3
  output_dir: out/x
stages:
  - name: align
    run: {max_epoch: 2}
  - name: tune
    model:
      language_model: {freeze: true}
    datasets:
      other: {name: easy_vqa, form: caption}
    run:
      init_lr: 2e-5
"""
)


def test_stages_lie_over_the_common_sections(write):
    align, tune = load_config(write("x.yaml", TWO)).stages
    assert (align.name, align.run.max_epoch, align.run.init_lr) == ("align", 2, 1e-3)
    assert (tune.name, tune.run.max_epoch, tune.run.init_lr) == ("tune", 1, 2e-5)
    assert tune.model.language_model.freeze is True and tune.model.language_model.config.path == "/llm"
    assert align.model.language_model.freeze is None
    assert list(align.datasets) == ["easy_vqa"] and list(tune.datasets) == ["other"]
    assert (align.run.output_dir, tune.run.output_dir) == ("out/x/align", "out/x/tune")


def test_a_single_stage_keeps_the_folder(write):
    text = MODEL + "run: {output_dir: out}\n"
    assert load_config(write("x.yaml", text)).stages[0].run.output_dir == "out"
    (stage,) = load_config(write("x.yaml", text + "stages: [{name: only}]\n")).stages
    assert (stage.name, stage.run.output_dir) == ("only", "out")


def test_options_for_all_stages_and_for_one(write):
    write("x.yaml", TWO)
    options = ["run.init_lr=5e-4", "stages.tune.run.init_lr=6e-4", "stages.0.run.max_epoch=9", "run.output_dir=y"]
    align, tune = load_config("x.yaml", options).stages
    assert (align.run.init_lr, tune.run.init_lr, align.run.max_epoch) == (5e-4, 6e-4, 9)
    assert (align.run.output_dir, tune.run.output_dir) == ("y/align", "y/tune")
    (_, tune) = load_config("x.yaml", ["run.init_lr=5e-4"]).stages
    assert tune.run.init_lr == 5e-4  # the command line wins over what the stage says in the file
    (_, tune) = load_config("x.yaml", ["stages.tune.run.output_dir=z"]).stages
    assert tune.run.output_dir == "z"


def test_dataset_options_reach_only_the_stages_that_use_the_dataset(write, faults):
    write("x.yaml", TWO)
    align, tune = load_config("x.yaml", ["datasets.easy_vqa.max_samples=3"]).stages
    assert align.datasets["easy_vqa"].config.max_samples == 3 and list(tune.datasets) == ["other"]
    align, tune = load_config("x.yaml", ["stages.tune.datasets.other.max_samples=4"]).stages
    assert tune.datasets["other"].config.max_samples == 4
    text = TWO.replace("  - name: align\n", "  - name: align\n    datasets: {other: easy_vqa}\n")
    (line,) = faults(text, ["datasets.easy_vqa.max_samples=3"])
    assert line == "--options: datasets.easy_vqa: no stage uses this dataset"


def test_every_stage_has_its_own_model_defaults(write, packaged):
    for kind in "ab":
        packaged(
            f"models/tiny_{kind}.yaml", MODEL.replace("/llm", f"/{kind}") + f"  arch: tiny\n  model_type: {kind}\n"
        )
    text = """\
    model: {arch: tiny, model_type: a}
    stages:
      - name: one
      - name: two
        model: {model_type: b}
    """
    one, two = load_config(write("x.yaml", text)).stages
    assert (one.model.language_model.config.path, two.model.language_model.config.path) == ("/a", "/b")


def test_interpolations_see_the_stage(write):
    text = MODEL + "run: {seed: 1, job_name: 'seed${run.seed}'}\nstages: [{name: a}, {name: b, run: {seed: 2}}]\n"
    assert [stage.run.job_name for stage in load_config(write("x.yaml", text)).stages] == ["seed1", "seed2"]


def test_faults_are_named_once_at_the_line_of_their_stage(faults):
    lines = faults(TWO.replace("init_lr: 1e-3", "seed: x").replace("init_lr: 2e-5", "max_epoc: 2"))
    assert lines == [
        "x.yaml:8: run.seed: expected an integer, got 'x'",
        "x.yaml:19: stages.tune.run.max_epoc: unknown key (did you mean 'max_epoch'?)",
    ]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[{name: a}, {name: a}]", "x.yaml:6: stages.a.name: there are two stages 'a'"),
        ("[{name: a/b}]", "x.yaml:6: stages.a/b.name: every stage needs a name of letters"),
        ("[{name: ..}]", "x.yaml:6: stages....name: every stage needs a name of letters"),
        ("[{run: {}}]", "x.yaml:6: stages.0.name: every stage needs a name"),
        ("[{name: a, runs: {}}]", "x.yaml:6: stages.a.runs: unknown key (did you mean 'run'?)"),
        ("[{name: a, demo: {}}]", "x.yaml:6: stages.a.demo: unknown key (known in a stage: name, model"),
        ("[align]", "x.yaml:6: stages.0: expected a mapping with the name of the stage, got 'align'"),
        ("{a: {}}", "x.yaml:6: stages: expected a list of stages, got a mapping"),
        ("[]", "x.yaml:6: stages: expected a list of stages, got a list"),
    ],
)
def test_faulty_stages(faults, stages, message):
    (line, *more) = faults(f"{MODEL}stages: {stages}\n")
    assert line.startswith(message) and not more


def test_stages_that_share_a_folder(faults):
    (line,) = faults(MODEL + "stages:\n- {name: a, run: {output_dir: o}}\n- name: b\n  run: {output_dir: o}\n")
    assert line == "x.yaml:9: stages.b.run.output_dir: stage 'a' writes to the same folder 'o'"


def test_options_to_unknown_stages_and_keys(faults):
    (line,) = faults(TWO, ["stages.aling.run.seed=1"])
    assert line == "--options: stages.aling: there is no stage 'aling' (did you mean 'align'?); stages: align, tune"
    (line,) = faults(TWO, ["stages.2.run.seed=1"])
    assert line.startswith("--options: stages.2: there is no stage '2'")
    (line,) = faults(TWO, ["stages.align.run.sed=1"])
    assert line == "--options: stages.align.run.sed: unknown key (did you mean 'seed'?)"
    (line,) = faults(TWO, ["stages.align.rum.seed=1"])
    assert line == "--options: stages.align.rum: unknown key (did you mean 'run'?)"
    (line,) = faults(TWO, ["name=x"])
    assert line.startswith("--options: name: unknown key")
