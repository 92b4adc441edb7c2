"""Whole MiniGPT-4 files of both eras load unchanged (the first stage with stand-ins for its datasets)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from config_texts import MODEL, STAGE1, STAGE2_V1

from minivlm import registry
from minivlm.config import ConfigError, load_config
from minivlm.config.legacy_table import FROZEN_QFORMER
from minivlm.datasets.configs import DatasetConfig
from minivlm.schema import Part, setting

PATHS = ["model.language_model.path=/llm", "datasets.laion.storage=/data/laion", "datasets.cc_sbu.storage=/data/cc"]


@dataclass(kw_only=True)
class Pairs(DatasetConfig):
    storage: str = setting(help="shards")
    text_processor: Part | None = setting(None, part="processor")


@pytest.fixture
def minigpt4(parts):
    """Stand-ins for the datasets of the first stage; all else is what the package brings."""
    for name in {"laion", "cc_sbu"} - set(registry.names("dataset")):
        parts("dataset", name, Pairs, config=Pairs)


def test_the_first_stage_parses_unchanged(write, minigpt4):
    experiment = load_config(write("stage1.yaml", STAGE1), PATHS)
    (stage,) = experiment.stages
    run, laion, processor = stage.run, stage.datasets["laion"].config, stage.model.processor.config
    assert run.init_lr == 1e-4 and run.trackers == ["wandb"]
    assert laion.sample_ratio == 115.0 and laion.batch_size == 64 and laion.text_processor.name == "blip_caption"
    assert processor.image.name == "blip2_image_train" and processor.image.config.size == 224
    assert processor.image.config.random_crop is None
    template = stage.model.template
    assert template.name == "plain" and template.config.assistant_suffix == "\n" and template.config.image == "{image}"
    # Per dataset: two of the picture, one of the text; six of the run, and that there are no prompts.
    assert len(experiment.notes) == 2 * 3 + 6 + 1
    assert experiment.notes[0].startswith("stage1.yaml:11: datasets.laion.vis_processor.train.name is now model.proc")
    assert "stage1.yaml:1: model.template.name is set to 'plain': it names no prompts" in experiment.notes[-1]


def test_what_the_original_does_where_a_file_is_silent(write, minigpt4):
    """It lies below the file, and below what the file says."""
    run = load_config(write("stage1.yaml", STAGE1), PATHS).stages[0].run
    assert (run.compat, run.mix, run.group_by_length, run.max_grad_norm) == ("minigpt4", "batch", False, None)
    assert (run.warmup_lr, run.beta2) == (1e-6, 0.999)
    silent = STAGE1.replace("  warmup_lr: 1e-6\n", "")
    assert load_config(write("silent.yaml", silent), PATHS).stages[0].run.warmup_lr == -1
    told = load_config("silent.yaml", [*PATHS, "run.compat=null", "run.max_grad_norm=0.5"]).stages[0].run
    assert told.compat is None and told.max_grad_norm == 0.5


def test_files_of_weights_are_those_of_the_original_or_named_by_variables(write, minigpt4, monkeypatch):
    model = load_config(write("stage1.yaml", STAGE1), PATHS).stages[0].model
    assert model.vision_encoder.weights.endswith("/eva_vit_g.pth")
    assert model.connector.weights.endswith("/blip2_pretrained_flant5xxl.pth")
    monkeypatch.setenv("MINIVLM_EVA_VIT_G", "/weights/eva.pth")
    monkeypatch.setenv("MINIVLM_VICUNA", "/weights/vicuna")
    model = load_config("stage1.yaml", PATHS[1:]).stages[0].model
    assert model.vision_encoder.weights == "/weights/eva.pth" and model.language_model.config.path == "/weights/vicuna"
    model = load_config("stage1.yaml", [*PATHS, "model.checkpoint=output/stage1"]).stages[0].model
    assert model.vision_encoder.weights is model.connector.weights is None, "the folder of a model holds every part"
    model = load_config("stage1.yaml", [*PATHS, "model.checkpoint=output/minigpt4.pth"]).stages[0].model
    assert model.vision_encoder.weights and model.connector.weights, "a .pth holds what was trained"


def test_what_must_be_given_is_asked_for_by_its_key(faults, minigpt4):
    lines = faults(STAGE1)
    variable = "model.language_model.path: a value must be given here, as an option, or in the environment variable"
    assert any(f"{variable} MINIVLM_VICUNA" in line and "pretrain_vicuna0.yaml:" in line for line in lines)
    assert [line for line in lines if line.startswith("x.yaml:7: datasets.laion.storage: a required value is missing")]
    assert len(lines) == 3


def test_a_prompt_is_no_placeholder(write, minigpt4):
    processor = "processor: {prompts: ['Please set out what you see.']}"
    text = f"model: {{arch: minigpt4, model_type: pretrain_vicuna0, {processor}}}\n"
    stage = load_config(write("x.yaml", text), PATHS).stages[0]
    assert stage.model.processor.config.prompts == ["Please set out what you see."]


def test_placeholders_are_refused_with_their_line(faults, minigpt4, prompts):
    text = STAGE2_V1.replace("/my/vicuna", "please set this value to the path of vicuna model")
    text = text.replace("/my/cc_sbu_align", "/path/to/cc_sbu_align/").replace("/my/stage1", "/path/to/stage1")
    lines = faults(text.replace('"output/minigpt4_stage2_finetune"', "/path/to/save/"))
    number = {key: 1 + [key in line for line in text.splitlines()].index(True) for key in ("llama_model", "ckpt")}
    assert len(lines) == 4
    assert lines[0] == (
        f"x.yaml:{number['llama_model']}: model.llama_model: is still the placeholder 'please set this value to the "
        "path of vicuna model'; give the real path in the file or as an option (it is now model.language_model.path)"
    )
    assert lines[1].startswith(f"x.yaml:{number['ckpt']}: model.ckpt: is still the placeholder")
    assert "datasets.cc_sbu_align.build_info.storage: is still" in lines[2] and "run.output_dir: is still" in lines[3]


def test_random_crops_and_kept_features_exclude_each_other(faults, prompts):
    lines = faults(STAGE2_V1, ["run.feature_cache=cache"])
    (line,) = lines
    assert "model.processor.image.random_crop: a picture that is cropped at random has no features to keep" in line
    assert "run.feature_cache: null" in line


def test_the_second_stage_of_the_first_era_parses_unchanged(write, minigpt4, prompts):
    experiment = load_config(write("stage2.yaml", STAGE2_V1))
    (stage,) = experiment.stages
    model = stage.model
    assert (model.arch, model.model_type) == ("mini_gpt4", "pretrain_vicuna")
    assert model.connector.name == "qformer" and model.connector.freeze == FROZEN_QFORMER
    assert model.vision_encoder.freeze is True and model.language_model.freeze is True
    assert model.language_model.config.path == "/my/vicuna"
    assert model.checkpoint == "/my/stage1/checkpoint.pth"
    assert model.template.name == "minigpt4_vicuna0_v1" and model.template.config.assistant_suffix == "###"
    assert len(model.processor.config.prompts) == 2 and model.processor.config.max_answer_tokens == 160
    assert stage.run.batch_size_train == 12
    assert stage.datasets["cc_sbu_align"].config.storage == "/my/cc_sbu_align"
    assert model.processor.config.image.config.random_crop == [0.5, 1.0]
    assert len(experiment.notes) == len(set(experiment.notes)) == 8 + 4 + 5


def test_a_demo_file_parses_unchanged(write, minigpt4):
    text = """\
    model:
      arch: minigpt4
      model_type: pretrain_vicuna0
      max_txt_len: 160
      end_sym: "###"
      low_resource: True
      prompt_template: '###Human: {} ###Assistant: '
      ckpt: '/weights/pretrained_minigpt4_7b.pth'
    datasets:
      cc_sbu_align:
        vis_processor:
          train:
            name: "blip2_image_eval"
            image_size: 224
        text_processor:
          train:
            name: "blip_caption"
    run:
      task: image_text_pretrain
    """
    experiment = load_config(write("eval.yaml", text), PATHS[:1])
    (stage,) = experiment.stages
    assert stage.model.language_model.config.quantization == "int8" and stage.datasets == {}
    assert stage.model.processor.config.image.name == "blip2_image_eval"
    assert len(experiment.notes) == 5 + 3 + 1


def test_old_keys_work_as_options_and_in_stages(write, minigpt4):
    write("x.yaml", STAGE1 + "stages:\n  - name: a\n    model:\n      llama_model: /from/stage\n")
    experiment = load_config("x.yaml", ["model.ckpt=/c.pth", "stages.a.run.amp=false", *PATHS[1:]])
    (stage,) = experiment.stages
    assert stage.model.checkpoint == "/c.pth" and stage.run.precision == "fp32"
    assert stage.model.language_model.config.path == "/from/stage"
    assert "--options: model.ckpt is now model.checkpoint" in experiment.notes
    line = len(STAGE1.splitlines()) + 4
    assert any(note.startswith(f"x.yaml:{line}: stages.0.model.llama_model is now ") for note in experiment.notes)


def test_errors_in_renamed_keys_name_the_line_and_the_word_of_the_file(write, minigpt4):
    with pytest.raises(ConfigError) as caught:
        load_config(
            write(
                "x.yaml",
                STAGE1.replace("model_type: pretrain_vicuna0\n", "model_type: pretrain_vicuna0\n  image_size: big\n"),
            ),
            PATHS,
        )
    message = "expected an integer, got 'big' (it is now model.vision_encoder.image_size)"
    assert str(caught.value) == f"x.yaml:4: model.image_size: {message}"


def test_no_qformer_replaces_the_packaged_connector(write, minigpt4):
    text = STAGE1.replace("model_type: pretrain_vicuna0\n", "model_type: pretrain_vicuna0\n  has_qformer: False\n")
    connector = load_config(write("x.yaml", text), PATHS).stages[0].model.connector
    assert connector.name == "patch_merge" and connector.freeze is None and connector.weights is None


def test_a_native_file_has_no_notes(write):
    assert load_config(write("x.yaml", MODEL + "run: {save_freq: 5, device: cpu}\n")).notes == []
