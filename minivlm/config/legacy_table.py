"""The table of renamed and dropped keys of MiniGPT-4 (both eras) and LAVIS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from minivlm.config.legacy_eras import LAVIS_KEYS, ON_VICUNA, is_v1, section_of
from minivlm.config.legacy_text import is_packaged, read_prompts, split_template


@dataclass(frozen=True)
class Old:
    """What a rule's function is given: the value, its neighbours, and the whole file (all as written).

    ``names`` holds the path components that ``*`` stood for. The function returns the new keys and
    their values, or None to leave the key as it is; it raises ValueError if the value makes no sense.
    """

    value: Any
    section: Mapping[str, Any]
    root: Mapping[str, Any]
    names: tuple[str, ...]


New = Mapping[Any, Any]
"""New keys, as dotted strings or as paths, with their values."""


@dataclass(frozen=True)
class Rule:
    """One renamed or dropped key.

    ``old`` is a dotted path with ``*`` for any one component. ``new`` is a dotted path (its ``*`` are
    filled in order) or a function; with ``new=None``, or when the function returns nothing, the key is
    dropped, and ``why`` is the reason. ``remark`` is what to know about a key that was renamed.
    """

    old: str
    new: str | Callable[[Old], New | None] | None = None
    why: str = ""
    remark: str = ""


BENCHMARKS = {"refcoco+": "refcocop", "okvqa": "ok_vqa"}
"""Names of MiniGPT-v2's evaluation files that are spelt otherwise than those of its training data."""
FROZEN_QFORMER = ["qformer*", "query_tokens"]
"""``freeze_qformer`` leaves the projection behind the Q-Former trainable."""
_STREAMED = {"laion", "cc_sbu"}
_PICTURES = ("blip2_image_train", "blip2_image_eval")


# ------------------------------------------------------------------------------------------ model
def _arch(old: Old) -> New | None:
    wanted = "mini_gpt4" if is_v1(old.root) else "minigpt4"
    return {"model.arch": wanted} if old.value in ("mini_gpt4", "minigpt4") and old.value != wanted else None


def _model_type(old: Old) -> New | None:
    ours = old.section.get("arch") in (None, "mini_gpt4", "minigpt4")
    wanted = "pretrain_vicuna" if is_v1(old.root) else "pretrain_vicuna0"
    known = ours and old.value in ON_VICUNA and old.value != wanted
    # "pretrain_vicuna" was renamed with the arch; on its own the later name is what is meant.
    return {"model.model_type": wanted} if known else None


def _has_qformer(old: Old) -> New:
    return {"model.connector.name": "qformer" if _true(old.value) else "patch_merge"}


def _only_with_qformer(old: Old, new: dict[str, Any]) -> New:
    return new if _true(old.section.get("has_qformer", True)) else {}


def _freeze_qformer(old: Old) -> New:
    return _only_with_qformer(old, {"model.connector.freeze": list(FROZEN_QFORMER) if _true(old.value) else False})


def _num_query_token(old: Old) -> New:
    return _only_with_qformer(old, {"model.connector.num_query_tokens": old.value})


def _q_former_model(old: Old) -> New:
    return _only_with_qformer(old, {"model.connector.weights": old.value}) if old.value else {}


def _llama_model(old: Old) -> New:
    return {"model.language_model.path": old.value} if old.value else {}


def _vit_precision(old: Old) -> New:
    if old.value not in ("fp16", "bf16", "fp32"):
        raise ValueError(f"expected fp16, bf16 or fp32, got {old.value!r}")
    return {"model.vision_encoder.dtype": old.value}


def _checkpoint(old: Old) -> New:
    return {"model.checkpoint": old.value} if old.value else {}


def _prompt_path(old: Old) -> New:
    if not old.value or is_packaged(old.value):
        return {}
    return {"model.processor.prompts": read_prompts(old.value)}


def _prompt_template(old: Old) -> New:
    return split_template(old.value or "{}")


def _chat_template(old: Old) -> New:
    # The flag only switches the template on; `prompt_template` beside it says which one.
    if not _true(old.value) or old.section.get("prompt_template"):
        return {}
    return split_template("[INST] {} [/INST]")


def _end_sym(old: Old) -> New:
    return {"model.template.assistant_suffix": old.value}


def _low_resource(old: Old) -> New:
    return {"model.language_model.quantization": "int8" if _true(old.value) else None}


def _lora_r(old: Old) -> New:
    return {"model.language_model.lora.r": old.value} if _has_lora(old) else {"model.language_model.lora": None}


def _lora(key: str) -> Any:
    return lambda old: {f"model.language_model.lora.{key}": old.value} if _has_lora(old) else {}


def _has_lora(old: Old) -> bool:
    rank = old.section.get("lora_r", 1)
    return not isinstance(rank, (int, float)) or rank > 0


_NO_QFORMER = "the model has no Q-Former"
_NO_LORA = "lora_r says that there is no LoRA"
_MODEL = (
    Rule("model.arch", _arch),
    Rule("model.model_type", _model_type),
    Rule("model.vit_model", "model.vision_encoder.name"),
    Rule("model.image_size", "model.vision_encoder.image_size"),
    Rule("model.drop_path_rate", "model.vision_encoder.drop_path_rate"),
    Rule("model.use_grad_checkpoint", "model.vision_encoder.gradient_checkpointing"),
    Rule("model.vit_precision", _vit_precision),
    Rule("model.freeze_vit", "model.vision_encoder.freeze"),
    Rule("model.has_qformer", _has_qformer),
    Rule("model.freeze_qformer", _freeze_qformer, _NO_QFORMER, "its projection stays trainable"),
    Rule("model.num_query_token", _num_query_token, _NO_QFORMER),
    Rule("model.q_former_model", _q_former_model, "it names no file, or there is no Q-Former"),
    Rule("model.llama_model", _llama_model, "it names no folder"),
    Rule("model.low_resource", _low_resource),
    Rule("model.device_8bit", None, "the model goes to run.device"),
    Rule("model.lora_r", _lora_r),
    Rule("model.lora_alpha", _lora("alpha"), _NO_LORA),
    Rule("model.lora_dropout", _lora("dropout"), _NO_LORA),
    Rule("model.lora_target_modules", _lora("target_modules"), _NO_LORA),
    Rule("model.use_grad_checkpoint_llm", "model.language_model.gradient_checkpointing"),
    Rule("model.ckpt", _checkpoint, "it names no file"),
    Rule(
        "model.prompt_path",
        _prompt_path,
        "the packaged prompts are taken",
        "the prompts in the file",
    ),
    Rule("model.prompt_template", _prompt_template),
    Rule("model.chat_template", _chat_template, "the template says how a message is wrapped"),
    Rule("model.end_sym", _end_sym),
    Rule("model.max_txt_len", "model.processor.max_answer_tokens"),
    Rule("model.max_context_len", "model.processor.max_length"),
    Rule("model.prompt", None, "MiniGPT-4 never used it"),
)


# --------------------------------------------------------------------------------------- datasets
def _image_size(old: Old) -> New:
    return {"model.processor.image.size": old.value}


def _image_name(old: Old) -> New:
    """One processor for all: the one of training, if any node names it."""
    nodes = [section_of(old.root, "preprocess"), *section_of(old.root, "datasets").values()]
    pictures = [node["vis_processor"] for node in nodes if isinstance(node, dict) and "vis_processor" in node]
    splits = [split for each in pictures if isinstance(each, dict) for split in each.values()]
    given = [split.get("name") for split in splits if isinstance(split, dict)]
    names = [name for name in _PICTURES if name in given]
    return {"model.processor.image.name": names[0]} if names and old.value in _PICTURES else {}


def _scale(old: Old) -> New:
    if not is_v1(old.root):
        return {}
    share = [old.section.get("min_scale", 0.5), old.section.get("max_scale", 1.0)]
    return {"model.processor.image.random_crop": share}


def _caption(key: str) -> Any:
    """The rule of a key of a text processor: only the streamed datasets clean their captions."""

    def rule(old: Old) -> New:
        dataset, split = old.names
        cleans = dataset in _STREAMED and split == "train"
        return {("datasets", dataset, "text_processor", key): old.value} if cleans else {}

    return rule


def _numbers(old: Old, section: str, key: str) -> list[int]:
    """The values of ``key`` in all datasets of a section."""
    nodes = section_of(old.root, section).values()
    return [node[key] for node in nodes if isinstance(node, dict) and isinstance(node.get(key), int)]


def _eval_batch_size(old: Old) -> New:
    if "batch_size_eval" in section_of(old.root, "run"):
        return {}
    return {"run.batch_size_eval": min(_numbers(old, "evaluation_datasets", "batch_size"), default=old.value)}


def _eval_tokens(old: Old) -> New:
    return {"run.max_len": max(_numbers(old, "evaluation_datasets", "max_new_tokens"), default=old.value)}


def _eval_file(old: Old) -> New:
    (name,) = old.names
    known = {} if BENCHMARKS.get(name, name) == name else {("datasets", name, "name"): BENCHMARKS[name]}
    return known | {
        ("datasets", name, "annotations", "test"): old.value,
        "run.evaluate": True,
        "run.test_splits": ["test"],
    }


def _task(old: Old) -> New | None:
    evaluates = old.value == "image_text_pretrain" and "evaluation_datasets" in old.root
    return {"run.task": "vqa"} if evaluates else None


_NO_IMAGE_NAME = "model.processor.image tells how a picture is treated"
_NO_SCALE = "the original ignores it, too"
_NO_TEXT = "the texts of this dataset are taken as they are"
_NO_PREPROCESS = "model.processor.text tells how a text is treated"
_SMALLEST = "one for all datasets: the smallest"
_NO_DOWNLOAD = "nothing is downloaded"


def _processors(place: str) -> tuple[Rule, ...]:
    """The rules for ``vis_processor`` at ``place``."""
    picture = f"{place}vis_processor.*"
    return (
        Rule(f"{picture}.name", _image_name, _NO_IMAGE_NAME),
        Rule(f"{picture}.image_size", _image_size),
        Rule(f"{picture}.mean", lambda old: {"model.processor.image.mean": old.value}),
        Rule(f"{picture}.std", lambda old: {"model.processor.image.std": old.value}),
        Rule(f"{picture}.min_scale", _scale, _NO_SCALE),
        Rule(f"{picture}.max_scale", _scale, _NO_SCALE),
    )


_TEXT_KEYS = ("name", "prompt", "max_words")


_DATASETS = (
    *_processors("preprocess."),
    *_processors("datasets.*."),
    *(Rule(f"preprocess.text_processor.*.{key}", None, _NO_PREPROCESS) for key in _TEXT_KEYS),
    *(Rule(f"datasets.*.text_processor.*.{key}", _caption(key), _NO_TEXT) for key in _TEXT_KEYS),
    Rule("datasets.*.data_type", None, "every dataset here holds pictures"),
    Rule("datasets.*.build_info.storage", "datasets.*.storage"),
    Rule("datasets.*.build_info.image_path", "datasets.*.images"),
    Rule("datasets.*.build_info.ann_path", "datasets.*.annotations"),
    Rule("datasets.*.build_info.images.storage", "datasets.*.images"),
    Rule("datasets.*.build_info.annotations.*.storage", "datasets.*.annotations.*"),
    Rule("datasets.*.build_info.annotations.*.url", None, _NO_DOWNLOAD),
    Rule("datasets.*.build_info.annotations.*.md5", None, _NO_DOWNLOAD),
    Rule("evaluation_datasets.*.eval_file_path", _eval_file, remark="in minivlm's own format, see docs/data.md"),
    Rule("evaluation_datasets.*.img_path", "datasets.*.images"),
    Rule("evaluation_datasets.*.max_new_tokens", _eval_tokens, remark="one for all datasets: the largest"),
    Rule("evaluation_datasets.*.batch_size", _eval_batch_size, "run.batch_size_eval is given", _SMALLEST),
)


# -------------------------------------------------------------------------------------------- run
def _runner(old: Old) -> New | None:
    return {"run.runner": "runner_base"} if old.value == "runner_iter" else None


def _max_iters(old: Old) -> New:
    inner = old.section.get("iters_per_inner_epoch")
    if isinstance(old.value, int) and isinstance(inner, int) and inner > 0:
        return {"run.max_steps": old.value, "run.max_epoch": -(-old.value // inner)}
    return {"run.max_steps": old.value}


def _amp(old: Old) -> New:
    return {"run.precision": "auto" if _true(old.value) else "fp32"}


def _resume(old: Old) -> New:
    return {"run.resume": old.value} if old.value else {}


def _wandb(old: Old) -> New:
    return {"run.trackers": ["wandb"]} if _true(old.value) else {}


def _save_freq(old: Old) -> New | None:
    return {} if LAVIS_KEYS & set(old.section) else None


def _ratios(old: Old) -> New:
    if not isinstance(old.value or {}, dict):
        raise ValueError(f"expected a mapping from datasets to ratios, got {old.value!r}")
    return {("datasets", str(name), "sample_ratio"): ratio for name, ratio in (old.value or {}).items()}


_LAUNCHER = "torchrun says it"
_NOT_RANKED = "a task generates answers; minivlm.evaluation.ranking ranks given ones"
_RUN = (
    Rule("run.task", _task),
    Rule("run.runner", _runner, remark="run.max_steps is its length"),
    Rule("run.max_iters", _max_iters),
    Rule("run.iters_per_inner_epoch", "run.iters_per_epoch"),
    Rule("run.amp", _amp),
    Rule("run.resume_ckpt_path", _resume, "run.resume decides: by default an interrupted run goes on"),
    Rule("run.world_size", None, _LAUNCHER),
    Rule("run.dist_url", None, _LAUNCHER),
    Rule("run.distributed", None, _LAUNCHER),
    Rule("run.wandb_log", _wandb, "no tracker is the default"),
    Rule("run.save_freq", _save_freq, "it counted epochs; run.save_freq counts steps, by default one epoch's"),
    Rule("run.val_freq", None, "it counted epochs; run.eval_freq counts steps, by default one epoch's"),
    Rule("run.save_last", None, "the last checkpoint is always kept"),
    Rule("run.train_dataset_ratios", _ratios),
    Rule("run.use_dist_eval_sampler", None, "evaluation runs on the first process"),
    Rule("run.lr_layer_decay", None, "every part has one learning rate"),
    Rule("run.min_len", None, "an answer may be as short as the model likes"),
    Rule("run.num_ans_candidates", None, _NOT_RANKED),
    Rule("run.inference_method", None, _NOT_RANKED),
    Rule("run.prompt", None, "the dataset itself words its questions"),
    Rule("run.name", "run.job_name"),
    Rule("run.save_path", "run.output_dir"),
)

RULES = (*_MODEL, *_DATASETS, *_RUN)
"""All rules; the first that matches a key is used."""


def _true(value: Any) -> bool:
    """A flag of the old files; raises ValueError for anything that is none."""
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {value!r}")
    return value
