"""Whole MiniGPT-4 files of both eras load unchanged (the first stage with stand-ins for its datasets)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from config_texts import MODEL, STAGE1, STAGE2_V1

from minivlm.config import ConfigError, load_config
from minivlm.config.legacy_table import FROZEN_QFORMER
from minivlm.datasets.configs import DatasetConfig


@dataclass
class Pairs(DatasetConfig):
    storage: str = "/data"


@pytest.fixture
def minigpt4(parts):
    """Stand-ins for the datasets of the first stage; all else is what the package brings."""
    for name in ("laion", "cc_sbu"):
        parts("dataset", name, Pairs, config=Pairs)


def test_the_first_stage_parses_unchanged(write, minigpt4):
    experiment = load_config(write("stage1.yaml", STAGE1))
    (stage,) = experiment.stages
    assert stage.run.batch_size_train == 64 and stage.run.init_lr == 1e-4 and stage.run.trackers == ["wandb"]
    assert stage.datasets["laion"].config.sample_ratio == 115.0
    assert stage.model.processor.config.image.config.size == 224
    # Per dataset: batch size, two of the picture, one of the text; six of the run.
    assert len(experiment.notes) == 2 * 4 + 6
    assert experiment.notes[0].startswith("stage1.yaml:8: datasets.laion.batch_size is now run.batch_size_train")


def test_the_second_stage_of_the_first_era_parses_unchanged(write, minigpt4, prompts):
    experiment = load_config(write("stage2.yaml", STAGE2_V1))
    (stage,) = experiment.stages
    model = stage.model
    assert (model.arch, model.model_type) == ("minigpt4", "pretrain_vicuna0")
    assert model.connector.name == "qformer" and model.connector.freeze == FROZEN_QFORMER
    assert model.vision_encoder.freeze is True and model.language_model.freeze is True
    assert model.language_model.config.path == "/path/to/vicuna"
    assert model.checkpoint == "/path/to/stage1/checkpoint/"
    assert model.template.name == "minigpt4_vicuna0" and model.template.config.assistant_suffix == "###"
    assert len(model.processor.config.prompts) == 2 and model.processor.config.max_answer_tokens == 160
    assert stage.run.batch_size_train == 12
    assert stage.datasets["cc_sbu_align"].config.storage == "/my/cc_sbu_align"
    assert len(experiment.notes) == len(set(experiment.notes)) == 10 + 4 + 5


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
    experiment = load_config(write("eval.yaml", text))
    (stage,) = experiment.stages
    assert stage.model.language_model.config.quantization == "int8" and stage.datasets == {}
    assert len(experiment.notes) == 5 + 3 + 1


def test_old_keys_work_as_options_and_in_stages(write, minigpt4):
    write("x.yaml", STAGE1 + "stages:\n  - name: a\n    model:\n      llama_model: /from/stage\n")
    experiment = load_config("x.yaml", ["model.ckpt=/c.pth", "stages.a.run.amp=false"])
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
            )
        )
    message = "expected an integer, got 'big' (it is now model.vision_encoder.image_size)"
    assert str(caught.value) == f"x.yaml:4: model.image_size: {message}"


def test_no_qformer_replaces_the_packaged_connector(write, minigpt4):
    text = STAGE1.replace("model_type: pretrain_vicuna0\n", "model_type: pretrain_vicuna0\n  has_qformer: False\n")
    connector = load_config(write("x.yaml", text)).stages[0].model.connector
    assert connector.name == "patch_merge" and connector.freeze is None


def test_a_native_file_has_no_notes(write):
    assert load_config(write("x.yaml", MODEL + "run: {save_freq: 5, device: cpu}\n")).notes == []
