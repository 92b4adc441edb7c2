"""Original MiniGPT-4 files, unchanged: they load with the real parts, with one note for each renamed key, and build."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minivlm.config import load_config
from minivlm.config.legacy_table import FROZEN_QFORMER
from minivlm.config.source import leaves, parse_yaml

LLM = "/llm"
DATA = """\
datasets:
  cc_sbu_align:
    batch_size: 12
    vis_processor:
      train:
        name: "blip2_image_train"
        image_size: SIZE
    text_processor:
      train:
        name: "blip_caption"
    build_info:
      storage: /data/cc_sbu_align/
"""
RUN = """\
run:
  task: image_text_pretrain
  lr_sched: "linear_warmup_cosine_lr"
  init_lr: 3e-5
  min_lr: 1e-5
  warmup_lr: 1e-6
  weight_decay: 0.05
  max_epoch: 5
  num_workers: 4
  warmup_steps: 200
  iters_per_epoch: 200
  seed: 42
  output_dir: "output/minigpt4_stage2_finetune"
  amp: True
  resume_ckpt_path: null
  evaluate: False
  train_splits: ["train"]
  device: "cuda"
  world_size: 1
  dist_url: "env://"
  distributed: True
"""
ALL = """\
model:
  arch: minigpt4
  model_type: pretrain_vicuna0
  image_size: 224
  drop_path_rate: 0
  use_grad_checkpoint: False
  vit_precision: "fp16"
  freeze_vit: True
  freeze_qformer: True
  has_qformer: True
  num_query_token: 32
  q_former_model: ""
  vit_model: "eva_clip_g"
  llama_model: "LLAMA"
  prompt_path: "prompts.txt"
  prompt_template: '###Human: {} ###Assistant: '
  max_txt_len: 160
  end_sym: "###"
  low_resource: False
  device_8bit: 0
  ckpt: ""
  prompt: ""
  lora_r: -1
  use_grad_checkpoint_llm: False
  max_context_len: 3800
"""
FIRST_ERA = """\
model:
  arch: mini_gpt4
  model_type: pretrain_vicuna
  freeze_vit: True
  freeze_qformer: True
  max_txt_len: 160
  end_sym: "###"
  prompt_path: "prompts.txt"
  prompt_template: '###Human: {} ###Assistant: '
  ckpt: '/stage1/checkpoint/'
"""
LLAMA2 = """\
model:
  arch: minigpt4
  model_type: pretrain_llama2
  max_txt_len: 160
  end_sym: "</s>"
  has_qformer: False
  prompt_path: "prompts.txt"
  prompt_template: '[INST] {} [/INST] '
  llama_model: "LLAMA"
"""
V2 = """\
model:
  arch: minigpt_v2
  model_type: pretrain
  max_txt_len: 1024
  image_size: 448
  end_sym: "</s>"
  llama_model: "LLAMA"
  use_grad_checkpoint: True
  chat_template: True
  lora_r: 64
  lora_alpha: 16
"""
DEMO = """\
model:
  arch: ARCH
  model_type: TYPE
  max_txt_len: 500
  end_sym: "</s>"
  low_resource: True
  prompt_template: '[INST] {} [/INST]'
  ckpt: '/weights/checkpoint.pth'
  lora_r: 64
  lora_alpha: 16
datasets:
  cc_sbu_align:
    vis_processor:
      train:
        name: "blip2_image_eval"
        image_size: SIZE
    text_processor:
      train:
        name: "blip_caption"
run:
  task: image_text_pretrain
"""


@pytest.fixture
def llama(tmp_path: Path) -> str:
    """A folder of the size of a tiny Llama, as ``llama_model`` names it."""
    folder = tmp_path / "llama"
    folder.mkdir()
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = {"model_type": "llama", "vocab_size": 400, "num_attention_heads": 2, **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def load(write: Any, text: str, options: list[str] | None = None) -> Any:
    """The only stage of a file; every old key has exactly one note, which names its line, and no other key has one."""
    options = [f"model.language_model.path={LLM}", *(options or ())] if "llama_model" not in text else options
    experiment = load_config(write("x.yaml", text), options)
    (stage,) = experiment.stages
    before = parse_yaml(text, "x.yaml")
    noted = [note.split(": ")[1].split(" is ")[0] for note in experiment.notes]
    assert len(noted) == len(set(noted)), "one note for a key"
    now = {"model.arch", "model.model_type", *(f"run.{key}" for key in vars(stage.run) if key != "save_freq")}
    now |= {f"datasets.{name}.{key}" for name in stage.datasets for key in ("batch_size", "sample_ratio")}
    old = {".".join(path) for path, _ in leaves(before.values)} - now - {"run.train_splits.0"}
    if not stage.datasets:
        old |= {"datasets.cc_sbu_align"}  # nothing is left of it
    assert set(noted) == old
    for note, key in zip(experiment.notes, noted, strict=True):
        assert note.startswith(f"x.yaml:{before.locate(tuple(key.split('.'))).line}: ")
    return stage


def build(stage: Any) -> Any:
    """The whole model in its real size, without memory."""
    from minivlm.api import assemble

    stage.model.language_model.config.tokenizer = "asset:quickstart"
    model, processor, _ = assemble(stage.model, meta=True)
    return model, processor


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_second_stage_with_every_key_of_the_model(write, prompts, llama):
    text = ALL.replace("LLAMA", llama) + DATA.replace("SIZE", "224") + RUN + "  wandb_log: True\n  job_name: stage2\n"
    stage = load(write, text)
    vision, connector, language = stage.model.vision_encoder, stage.model.connector, stage.model.language_model
    assert (vision.name, vision.freeze, vision.config.image_size) == ("eva_clip_g", True, 224)
    assert (vision.config.dtype, vision.config.class_token) == ("fp16", "keep")
    assert (connector.name, connector.freeze, connector.config.num_query_tokens) == ("qformer", FROZEN_QFORMER, 32)
    assert (language.name, language.freeze, language.config.path) == ("hf", True, llama)
    assert language.config.quantization is None and language.lora is None
    assert stage.model.checkpoint is None and stage.model.processor.config.max_answer_tokens == 160
    assert stage.datasets["cc_sbu_align"].config.storage == "/data/cc_sbu_align/"
    assert stage.datasets["cc_sbu_align"].config.batch_size == 12 and stage.run.trackers == ["wandb"]
    assert stage.run.compat == "minigpt4" and stage.run.mix == "batch" and stage.run.max_grad_norm is None
    model, processor = build(stage)
    assert trained(model) == {"connector.linear.weight", "connector.linear.bias"}
    assert model.vision_encoder.num_tokens == 257 and processor.tokens_per_image == 32


def test_second_stage_of_the_first_era(write, prompts):
    stage = load(write, FIRST_ERA + DATA.replace("SIZE", "224") + RUN + "  batch_size_train: 12\n")
    assert (stage.model.arch, stage.model.model_type) == ("mini_gpt4", "pretrain_vicuna")
    assert stage.model.template.name == "minigpt4_vicuna0_v1"
    assert stage.model.processor.config.image.config.random_crop == [0.5, 1.0]
    assert stage.model.connector.name == "qformer" and stage.model.connector.freeze == FROZEN_QFORMER
    assert stage.model.template.config.assistant_suffix == "###"
    assert stage.model.checkpoint == "/stage1/checkpoint/" and stage.run.batch_size_train == 12
    assert stage.model.vision_encoder.weights is stage.model.connector.weights is None, "the folder holds them"


def test_second_stage_on_llama2(write, prompts, llama):
    stage = load(write, LLAMA2.replace("LLAMA", llama) + DATA.replace("SIZE", "224") + RUN)
    assert stage.model.connector.name == "patch_merge" and stage.model.template.name == "minigpt4_llama2"
    model, processor = build(stage)
    assert processor.tokens_per_image == 64 and model.connector.linear.in_features == 5632
    assert trained(model) == {"connector.linear.weight", "connector.linear.bias"}


def test_a_switched_off_qformer_leaves_the_class_token_out(write, prompts, llama):
    """The packaged encoder keeps the class token for the Q-Former; the other connector ignores it."""
    text = LLAMA2.replace("pretrain_llama2", "pretrain_vicuna0").replace("LLAMA", llama)
    _, processor = build(load(write, text + DATA.replace("SIZE", "224") + RUN))
    assert processor.tokens_per_image == 64


def test_fine_tuning_of_minigpt_v2(write, llama):
    stage = load(write, V2.replace("LLAMA", llama) + DATA.replace("SIZE", "448") + RUN)
    language = stage.model.language_model
    assert (language.lora.r, language.lora.alpha, language.lora.dropout) == (64, 16, 0.05)
    assert language.lora.target_modules == ["q_proj", "v_proj"] and stage.model.language_model.freeze is True
    assert stage.model.vision_encoder.config.gradient_checkpointing and stage.model.processor.config.max_length == 3800
    model, processor = build(stage)
    assert processor.tokens_per_image == 256
    adapters = {f"language_model.{name}" for name in model.language_model.adapter_parameters}
    assert len(adapters) == 8
    assert trained(model) == {"connector.linear.weight", "connector.linear.bias"} | adapters


def test_lora_can_be_switched_off(write, llama):
    text = V2.replace("LLAMA", llama).replace("lora_r: 64", "lora_r: -1")
    stage = load(write, text + DATA.replace("SIZE", "448") + RUN)
    assert stage.model.language_model.lora is None
    assert trained(build(stage)[0]) == {"connector.linear.weight", "connector.linear.bias"}


@pytest.mark.parametrize(
    ("arch", "model_type", "size"),
    [("minigpt4", "pretrain_vicuna0", 224), ("minigpt4", "pretrain_llama2", 224), ("minigpt_v2", "pretrain", 448)],
)
def test_demo_files(write, arch, model_type, size, tmp_path):
    from minivlm.api import assemble
    from minivlm.checkpoints.native import CheckpointError

    text = DEMO.replace("ARCH", arch).replace("TYPE", model_type).replace("SIZE", str(size))
    stage = load(write, text)
    assert stage.datasets == {} and stage.model.processor.config.image.config.size == size
    assert stage.model.language_model.config.quantization == "int8"
    assert stage.model.checkpoint == "/weights/checkpoint.pth", "reading it is another matter"
    with pytest.raises(CheckpointError, match=r"there is no file /weights/checkpoint\.pth"):
        assemble(stage.model, meta=True)
