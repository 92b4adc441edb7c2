"""Which of the published layouts a file has, and what that layout means without saying it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minivlm.config.source import KeyPath

ON_VICUNA = ("pretrain_vicuna", "pretrain_vicuna0")
"""Model types on Vicuna v0, under the names of both eras."""
LAVIS_KEYS = {"amp", "dist_url", "world_size", "distributed", "resume_ckpt_path", "save_last", "val_freq"}
"""Keys of `run` that no file of today has."""
_PROCESSORS = {"vis_processor", "text_processor"}
_TRAINING_KEYS = {"train_splits", "max_epoch", "max_iters", "init_lr"}
_CAPTIONS = {"laion", "cc_sbu", "cc_sbu_align"}
"""Datasets of pictures with nothing but a caption."""


def section_of(root: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of the file; what is no mapping is reported elsewhere."""
    section = root.get(name)
    return section if isinstance(section, dict) else {}


def is_old(root: Mapping[str, Any]) -> bool:
    """Whether a file is of the old layout, and not one of today's that names a MiniGPT-4 model."""
    datasets = section_of(root, "datasets").values()
    has_processors = any(isinstance(node, dict) and _PROCESSORS & set(node) for node in datasets)
    return has_processors or bool(LAVIS_KEYS & set(section_of(root, "run")))


def is_v1(root: Mapping[str, Any]) -> bool:
    """Whether a file is of April to July 2023, whose pictures and chat were others."""
    model = section_of(root, "model")
    if model.get("model_type") not in ON_VICUNA:
        return False
    says_so = model.get("arch") == "minigpt4" and is_old(root) and "batch_size_train" in section_of(root, "run")
    return says_so or model.get("arch") == "mini_gpt4"


def implied(root: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """What a file of the old layout means without saying it: key -> (value, the reason).

    Without prompts MiniGPT-4 trains on the bare picture and its caption, and without `chat_template: True`
    MiniGPT-v2 on the bare instruction; the packaged templates are for files that say more.
    """
    model = section_of(root, "model")
    if not (_TRAINING_KEYS & set(section_of(root, "run")) and is_old(root)):
        return {}
    template = any(model.get(key) for key in ("prompt_template", "template"))
    if model.get("arch") == "minigpt_v2" and not (template or model.get("chat_template")):
        why = "without chat_template: True an instruction stands bare in training"
        wrapping = ("user_prefix", "user_suffix", "assistant_prefix")
        talking = {"user_suffix": " ", "assistant_prefix": "[/INST]"}  # beside the prefix, which is its own
        return {f"model.template.{key}": ("", why) for key in wrapping} | {
            f"model.template.chat.{key}": (value, "talking is not changed by it") for key, value in talking.items()
        }
    captions = set(section_of(root, "datasets")) <= _CAPTIONS
    if model.get("arch") in ("minigpt4", "mini_gpt4") and captions and not (template or model.get("prompt_path")):
        return {"model.template.name": ("plain", "it names no prompts, so a caption follows the bare picture")}
    return {}


def carriers(root: Mapping[str, Any]) -> list[tuple[KeyPath, str]]:
    """The dataset nodes of a demo or evaluation file that only tell how to treat pictures and texts."""
    run, datasets = root.get("run"), root.get("datasets")
    if not isinstance(run, dict) or not isinstance(datasets, dict) or _TRAINING_KEYS & set(run):
        return []
    why = "this file trains nothing, and the node only told how to treat pictures and texts"
    return [
        (("datasets", str(key)), why)
        for key, node in datasets.items()
        if isinstance(node, dict) and node and set(node) <= _PROCESSORS
    ]
