"""MiniGPT-4 and LAVIS files parse as they are, with one note for each key that has a new name."""

from __future__ import annotations

import pytest
from config_texts import ALL_KEYS

from minivlm.config.legacy import translate
from minivlm.config.legacy_table import FROZEN_QFORMER, RULES
from minivlm.config.legacy_text import read_prompts, split_template
from minivlm.config.source import leaves, parse_yaml

EXPECTED_MODEL = {
    "arch": "mini_gpt4",
    "model_type": "pretrain_vicuna",
    "vision_encoder": {
        "name": "eva_clip_g",
        "image_size": 224,
        "drop_path_rate": 0,
        "gradient_checkpointing": False,
        "dtype": "fp16",
        "freeze": True,
    },
    "connector": {
        "name": "qformer",
        "freeze": FROZEN_QFORMER,
        "num_query_tokens": 32,
        "weights": "https://host/blip2_pretrained_flant5xxl.pth",
    },
    "language_model": {
        "path": "/path/to/vicuna",
        "quantization": None,
        "lora": {"r": 64, "alpha": 16},
        "gradient_checkpointing": True,
    },
    "template": {
        "user_prefix": "###Human: ",
        "user_suffix": " ",
        "assistant_prefix": "###Assistant: ",
        "assistant_suffix": "###",
    },
    "processor": {
        "prompts": [
            "<image> Describe this image in detail.",
            "<image> Take a look at this image and describe what you notice.",
        ],
        "max_answer_tokens": 160,
        "max_length": 3800,
        "image": {
            "name": "blip2_image_train",
            "size": 224,
            "mean": [1, 2, 3],
            "std": [4, 5, 6],
            "random_crop": [0.5, 1],
        },
    },
    "checkpoint": "/path/to/ckpt.pth",
}
EXPECTED_DATASETS = {
    "laion": {
        "batch_size": 64,
        "sample_ratio": 115,
        "type": "defaults",
        "text_processor": {"name": "blip_caption", "prompt": "a ", "max_words": 50},
        "storage": "/data/laion/{00000..10488}.tar",
    },
    "coco_caption": {
        "batch_size": 6,
        "annotations": {"train": "/data/a.json", "val": "/data/b.json"},
        "images": "/data/images",
    },
    "gqa": {"images": "/data/gqa", "annotations": "/data/gqa.json", "sample_ratio": 3},
    "refcoco+": {"name": "refcocop", "annotations": {"test": "/eval/refcoco"}, "images": "/eval/images"},
}
EXPECTED_RUN = {
    "task": "vqa",
    "runner": "runner_base",
    "lr_sched": "linear_warmup_cosine_lr",
    "init_lr": 1e-4,
    "min_lr": 8e-5,
    "warmup_lr": 1e-6,
    "warmup_steps": 5000,
    "lr_decay_rate": None,
    "weight_decay": 0.05,
    "beta2": 0.999,
    "max_steps": 20001,
    "max_epoch": 5,
    "iters_per_epoch": 5000,
    "accum_grad_iters": 1,
    "batch_size_eval": 8,
    "precision": "auto",
    "num_workers": 4,
    "seed": 42,
    "output_dir": "output/stage1",
    "evaluate": True,
    "train_splits": ["train"],
    "test_splits": ["test"],
    "log_freq": 50,
    "device": "cuda",
    "trackers": ["wandb"],
    "job_name": "minigpt4_pretrain",
    "max_len": 30,
    "num_beams": 5,
}


def translated(text: str):
    tree = parse_yaml(text, "old.yaml")
    return tree, translate(tree)


def test_every_key_of_the_spec_is_translated(prompts):
    tree, done = translated(ALL_KEYS)
    assert done.problems == []
    assert tree.values["model"] == EXPECTED_MODEL
    assert tree.values["datasets"] == EXPECTED_DATASETS
    assert tree.values["run"] == EXPECTED_RUN
    assert set(tree.values) == {"model", "datasets", "run"}
    _, again = translated("")
    assert again.notes == []


def test_there_is_one_note_for_each_old_key(prompts):
    before = parse_yaml(ALL_KEYS, "old.yaml")
    _, done = translated(ALL_KEYS)
    written = {".".join(path): before.locate(path).line for path, _ in leaves(before.values)}
    written["run.train_dataset_ratios"] = written.pop("run.train_dataset_ratios.gqa")
    for name in ("mean", "std"):  # lists have leaves of their own
        key = f"datasets.laion.vis_processor.train.{name}"
        written[key] = [written.pop(f"{key}.{i}") for i in range(3)].pop()
    native = {
        *(f"run.{key}" for key in EXPECTED_RUN if f"run.{key}" in written and key not in ("runner", "task")),
        "model.arch",
        "model.model_type",
        "run.train_splits.0",
        "datasets.laion.batch_size",
        "datasets.coco_caption.batch_size",
        "datasets.laion.sample_ratio",
        "datasets.laion.type",
    }
    noted = [note.split(": ")[1].split(" is ")[0] for note in done.notes]
    assert sorted(noted) == sorted(set(written) - native)
    for note, key in zip(done.notes, noted):
        assert note.startswith(f"old.yaml:{written[key]}: ")
    assert "old.yaml:14: model.llama_model is now model.language_model.path" in done.notes
    assert "old.yaml:22: model.prompt is dropped: MiniGPT-4 never used it" in done.notes


def test_no_rule_is_idle(prompts):
    """Every rule of the table is exercised by the text above, but for these, which other tests cover."""
    elsewhere = {"model.lora_dropout", "model.lora_target_modules", "run.name", "run.save_path"}
    paths: set[tuple[str, ...]] = set()

    def walk(node, path=()):
        paths.add(path)
        for key, item in node.items() if isinstance(node, dict) else ():
            walk(item, (*path, key))

    walk(parse_yaml(ALL_KEYS, "old.yaml").values)
    for rule in RULES:
        if rule.old.startswith("preprocess."):
            continue  # the same rules as below `datasets.*.`
        pattern = rule.old.split(".")
        hit = any(len(p) == len(pattern) and all(a in ("*", b) for a, b in zip(pattern, p)) for p in paths)
        assert hit != (rule.old in elsewhere), rule.old


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "model: {has_qformer: False, freeze_qformer: True, num_query_token: 32}",
            {"connector": {"name": "patch_merge"}},
        ),
        ("model: {freeze_qformer: False}", {"connector": {"freeze": False}}),
        ("model: {low_resource: True}", {"language_model": {"quantization": "int8"}}),
        ("model: {lora_r: -1, lora_alpha: 16}", {"language_model": {"lora": None}}),
        (
            "model: {lora_dropout: 0.1, lora_target_modules: [q_proj]}",
            {"language_model": {"lora": {"dropout": 0.1, "target_modules": ["q_proj"]}}},
        ),
        ("model: {ckpt: '', prompt_path: '', q_former_model: ''}", {}),
        (
            "model: {chat_template: True}",
            {"template": {"user_prefix": "[INST] ", "user_suffix": " ", "assistant_prefix": "[/INST]"}},
        ),
        ("model: {chat_template: False}", {}),
        ("model: {template: vicuna, end_sym: '###'}", {"template": {"name": "vicuna", "assistant_suffix": "###"}}),
        (
            "model: {prompt_template: ''}",
            {"template": dict.fromkeys(["user_prefix", "user_suffix", "assistant_prefix"], "")},
        ),
        ("model: {arch: blip2, model_type: pretrain_vicuna}", {"arch": "blip2", "model_type": "pretrain_vicuna"}),
    ],
)
def test_values_of_model_keys(text, expected):
    tree, done = translated(text)
    assert tree.values["model"] == expected and done.problems == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("run: {amp: False}", {"precision": "fp32"}),
        ("run: {wandb_log: False}", {}),
        ("run: {resume_ckpt_path: out/checkpoint_3.pth}", {"resume": "out/checkpoint_3.pth"}),
        ("run: {runner: runner_base, save_freq: 100}", {"runner": "runner_base", "save_freq": 100}),
        ("run: {max_iters: 7}", {"max_steps": 7}),
        ("run: {name: n, save_path: p}", {"job_name": "n", "output_dir": "p"}),
    ],
)
def test_values_of_run_keys(text, expected):
    tree, done = translated(text)
    assert tree.values["run"] == expected and done.problems == []


def test_a_demo_file_keeps_no_dataset():
    text = """\
model: {arch: minigpt4, model_type: pretrain_vicuna0, low_resource: True}
datasets:
  cc_sbu_align:
    vis_processor: {train: {name: blip2_image_eval, image_size: 224}}
    text_processor: {train: {name: blip_caption}}
run: {task: image_text_pretrain}
"""
    tree, done = translated(text)
    assert tree.values["datasets"] == {} and tree.values["model"]["processor"] == {
        "image": {"name": "blip2_image_eval", "size": 224}
    }
    assert any(
        note.startswith("old.yaml:3: datasets.cc_sbu_align is dropped: this file trains nothing") for note in done.notes
    )
    tree, _ = translated(text.replace("run: {", "run: {init_lr: 1e-4, "))
    assert tree.values["datasets"] == {"cc_sbu_align": {}}


@pytest.mark.parametrize(
    ("model", "run", "expected"),
    [
        ("{arch: mini_gpt4, model_type: pretrain_vicuna}", "{amp: True}", ("mini_gpt4", "pretrain_vicuna")),
        ("{arch: mini_gpt4, model_type: pretrain_vicuna0}", "{amp: True}", ("mini_gpt4", "pretrain_vicuna")),
        ("{arch: minigpt4, model_type: pretrain_vicuna}", "{amp: True}", ("minigpt4", "pretrain_vicuna0")),
        (
            "{arch: minigpt4, model_type: pretrain_vicuna0}",
            "{amp: True, batch_size_train: 12}",
            ("mini_gpt4", "pretrain_vicuna"),
        ),
        (
            "{arch: minigpt4, model_type: pretrain_llama2}",
            "{amp: True, batch_size_train: 12}",
            ("minigpt4", "pretrain_llama2"),
        ),
        ("{arch: mini_gpt4, model_type: pretrain_llama2}", "{amp: True}", ("minigpt4", "pretrain_llama2")),
        # One of today's files, in which the batch size is no sign of an era.
        ("{arch: minigpt4, model_type: pretrain_vicuna0}", "{batch_size_train: 12}", ("minigpt4", "pretrain_vicuna0")),
    ],
)
def test_the_era_of_a_file(model, run, expected):
    tree, done = translated(f"model: {model}\nrun: {run}\n")
    assert (tree.values["model"]["arch"], tree.values["model"]["model_type"]) == expected and not done.problems


@pytest.mark.parametrize(
    ("model", "datasets", "template"),
    [
        ("", "{laion: {batch_size: 64}, cc_sbu: {batch_size: 64}}", {"name": "plain"}),
        ('end_sym: "\\n"', "{laion: {}}", {"name": "plain", "assistant_suffix": "\n"}),
        ("prompt_path: '', prompt_template: ''", "{cc_sbu_align: {}}", {"name": "plain"}),
        ("template: qa", "{laion: {}}", "qa"),
        ("prompt_template: 'Q: {} A: '", "{laion: {}}", {"user_prefix": "Q: ", "user_suffix": " "}),
        ("", "{llava_detail: {}}", None),  # its instructions need a template
    ],
)
def test_without_prompts_a_caption_follows_the_bare_picture(model, datasets, template):
    text = f"model: {{arch: minigpt4, model_type: pretrain_vicuna0, {model}}}\ndatasets: {datasets}\nrun: RUN\n"
    tree, done = translated(text.replace("RUN", "{amp: True, init_lr: 1e-4}"))
    got = tree.values["model"].get("template")
    if isinstance(template, dict):
        assert got.items() >= template.items()
        implied = [note for note in done.notes if "is set to 'plain'" in note]
        assert len(implied) == (template.get("name") == "plain")
    else:
        assert got == template
    for today in ("{init_lr: 1e-4}", "{amp: True}"):  # neither old nor a file that trains
        assert "plain" not in str(translated(text.replace("RUN", today))[0].values["model"].get("template"))


def test_the_packaged_prompts_stand_for_the_file_of_the_original(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree, done = translated("model: {prompt_path: prompts/alignment.txt}\n")
    assert tree.values["model"] == {} and done.problems == [] and "packaged prompts" in done.notes[0]
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "alignment.txt").write_text("<Img><ImageHere></Img> What?\n")
    tree, _ = translated("model: {prompt_path: prompts/alignment.txt}\n")
    assert tree.values["model"] == {"processor": {"prompts": ["<image> What?"]}}


def test_wrong_and_contradicting_values_are_problems_with_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, done = translated(
        "model:\n  prompt_path: prompts/no.txt\n  prompt_template: Human\n  freeze_qformer: 1\n"
        "  vit_precision: 8\n  ckpt: a\n  checkpoint: b\nrun:\n  train_dataset_ratios: 3\n"
    )
    lines = [str(problem) for problem in done.problems]
    assert lines[0].startswith("old.yaml:2: model.prompt_path: the file of prompts 'prompts/no.txt' cannot be read")
    assert lines[1].startswith("old.yaml:3: model.prompt_template: expected a text with one {}")
    assert lines[2] == "old.yaml:4: model.freeze_qformer: expected true or false, got 1"
    assert lines[3].startswith("old.yaml:5: model.vit_precision: expected fp16")
    assert lines[4] == (
        "old.yaml:6: model.ckpt: says 'a' for model.checkpoint, but model.checkpoint in line 7 says 'b'"
    )
    assert lines[5].startswith("old.yaml:9: run.train_dataset_ratios: expected a mapping")


def test_prompt_files_and_templates(write):
    file = write("empty.txt", "no marker\n")
    with pytest.raises(ValueError, match="no line of"):
        read_prompts(file)
    with pytest.raises(ValueError, match="expected the path"):
        read_prompts(5)
    split = split_template("[INST] {} [/INST] ")
    assert "".join(split.values()) == "[INST]  [/INST] " and split["model.template.assistant_prefix"] == "[/INST] "
