"""The YAML files of the original, of all kinds and both eras, up to the dry run: parts and data are tiny."""

from __future__ import annotations

import io
from typing import Any

import config_texts as texts
import pytest
from helpers import RECORD_KINDS, golden_options
from rich.console import Console

from minivlm.config import ConfigError, load_config
from minivlm.processors.template import Template
from minivlm.runners.dry_run import dry_run
from minivlm.types import Message

VICUNA, LLAMA2, V2 = ("minigpt4", "pretrain_vicuna0"), ("minigpt4", "pretrain_llama2"), ("minigpt_v2", "pretrain")
COMMON = ["run.device=cpu", "run.num_workers=0"]


def shown(write: Any, text: str, options: list[str]) -> tuple[Any, str]:
    """The stage of a file and what the dry run prints of it."""
    experiment = load_config(write("original.yaml", text), [*options, *COMMON])
    said = io.StringIO()
    assert dry_run(experiment, Console(file=said, width=200)), said.getvalue()
    return experiment.stages[0], said.getvalue()


@pytest.mark.parametrize(
    ("text", "model"),
    [(texts.STAGE2, VICUNA), (texts.STAGE2_V1, VICUNA), (texts.STAGE2_LLAMA2, LLAMA2)],
    ids=["head", "v1", "llama2"],
)
def test_second_stage(write, prompts, minigpt4_data, text, model):
    options = [*golden_options(*model), "model.checkpoint=null", f"datasets.cc_sbu_align.storage={minigpt4_data}"]
    stage, said = shown(write, text, [*options, "run.batch_size_train=2", "datasets.cc_sbu_align.batch_size=2"])
    assert len(stage.model.processor.config.prompts) == (2 if "mini_gpt4" in text else 4)
    end = stage.model.template.config.assistant_suffix
    assert "<Img>[image x" in said and f"A boat. It is red.{end}" in said and "1,000 steps" in said
    assert "step 200: 2.81e-05" in said, "the rate drops where the warm-up of the original ends"


@pytest.mark.parametrize(
    ("text", "model"),
    [(texts.STAGE1, VICUNA), (texts.STAGE1_V1, VICUNA), (texts.STAGE1_LLAMA2, LLAMA2)],
    ids=["head", "v1", "llama2"],
)
def test_first_stage(write, minigpt4_data, text, model):
    shards = [f"datasets.{name}.storage={minigpt4_data}/00000.tar" for name in ("laion", "cc_sbu")]
    sizes = ["run.batch_size_train=2", "datasets.laion.batch_size=2", "datasets.cc_sbu.batch_size=2"]
    stage, said = shown(write, text, [*golden_options(*model), *shards, *sizes])
    assert "20,000 steps" in said and "step 5000: 9.71e-05" in said
    assert "[image x" in said and "a boat\n" in said and "<Img>" not in said and "Human" not in said
    crop = stage.model.processor.config.image.config.random_crop
    assert crop == ([0.5, 1.0] if "mini_gpt4" in text else None)


def test_fine_tuning_of_minigpt_v2(write, minigpt4_data):
    options = [*golden_options(*V2), "model.checkpoint=null", "run.output_dir=out", "run.batch_size_train=2"]
    for kind, names in RECORD_KINDS.items():
        options += [f"datasets.{name}.annotations={minigpt4_data}/{kind}.json" for name in names]
    stage, said = shown(write, texts.V2_FINETUNE, options)
    assert len(stage.datasets) == 22 and "50,000 steps" in said and "[INST]" in said
    assert stage.datasets["refcoco"].config.identifier == "[refer]"
    assert stage.model.language_model.lora.r == 64 and stage.model.processor.config.max_answer_tokens == 1024


@pytest.mark.parametrize("flag", ["  chat_template: False\n", ""])
def test_instructions_stand_bare_without_the_chat_template(write, minigpt4_data, flag):
    text = texts.V2_FINETUNE.replace("  chat_template: True\n", flag)
    options = [*golden_options(*V2), "model.checkpoint=null", "run.output_dir=out", "run.batch_size_train=2"]
    for kind, names in RECORD_KINDS.items():
        options += [f"datasets.{name}.annotations={minigpt4_data}/{kind}.json" for name in names]
    stage, said = shown(write, text, options)
    assert "[INST]" not in said.partition("what trains")[2] and "[caption]" in said
    open_turn = [Message("user", "Why?"), Message("assistant", None)]
    talk = Template(stage.model.template.config).render(open_turn, chat=True)
    assert [segment.text for segment in talk] == ["<s>[INST] Why? [/INST]"]


def test_placeholders_of_the_fine_tuning_are_all_named(write):
    with pytest.raises(ConfigError) as caught:
        load_config(write("v2.yaml", texts.V2_FINETUNE))
    keys = [problem.key for problem in caught.value.problems if "still the placeholder" in problem.message]
    assert keys == ["model.llama_model", "model.ckpt", "run.output_dir"]
    assert sum("annotations: a required value is missing" in str(p) for p in caught.value.problems) == 22


@pytest.mark.parametrize(
    ("text", "model"),
    [(texts.EVAL, VICUNA), (texts.EVAL_V1, VICUNA), (texts.EVAL_LLAMA2, LLAMA2), (texts.EVAL_V2, V2)],
    ids=["vicuna", "v1", "llama2", "v2"],
)
def test_demo_files(write, text, model):
    options = [*golden_options(*model), "model.checkpoint=null", "model.language_model.quantization=null"]
    stage, said = shown(write, text, options)
    assert stage.datasets == {} and "a model to talk to" in said
    image = stage.model.processor.config.image
    assert image.name == "blip2_image_eval" and image.config.random_crop is None
    v1 = "mini_gpt4" in text
    assert (stage.model.template.name == "minigpt4_vicuna0_v1") == v1
    assert (stage.demo.temperature, stage.demo.max_new_tokens) == ((0.6, 500) if model == V2 else (1.0, 300))
    assert stage.demo.repetition_penalty == (1.0 if v1 else 1.05)


def test_benchmark_evaluation(write, minigpt4_data):
    options = [*golden_options(*V2), "model.checkpoint=null", "model.language_model.quantization=null"]
    options += [
        "run.save_path=out",
        *(f"evaluation_datasets.{name}.img_path={minigpt4_data}" for name in texts.BENCHMARKS),
    ]
    files = texts.BENCHMARKS.items()
    options += [f"evaluation_datasets.{name}.eval_file_path={minigpt4_data}/{kind}.json" for name, kind in files]
    stage, said = shown(write, texts.BENCHMARK_EVALUATION, options)
    assert stage.run.evaluate and stage.run.task == "vqa" and stage.run.output_dir == "out"
    assert (stage.run.max_len, stage.run.batch_size_eval) == (20, 10)
    metrics = {name: (part.name, part.config.metric) for name, part in stage.datasets.items()}
    assert metrics["refcoco+"] == ("refcocop", "box_iou") and metrics["okvqa"] == ("ok_vqa", "vqa_accuracy")
    assert metrics["gqa"] == ("gqa", "exact_match") and set(metrics) == set(texts.BENCHMARKS)
    assert "[vqa]" in said and "[refer]" in said and said.count("4 samples; task vqa") == 9


def test_pictures_of_another_size_than_the_encoder_takes(write):
    text = texts.STAGE1.replace(
        "model_type: pretrain_vicuna0\n", "model_type: pretrain_vicuna0\n  image_size: 448\n", 1
    )
    with pytest.raises(ConfigError, match=r"image_size: pictures of 224 pixels for an encoder of 448"):
        load_config(write("x.yaml", text), ["model.language_model.path=somewhere"])
