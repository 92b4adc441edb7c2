"""The schema of an experiment file: the sections ``model``, ``datasets``, ``run`` and ``stages``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minivlm.schema import ModelPart, Part, setting


@dataclass
class ModelConfig:
    """Section ``model``: the parts, or a checkpoint that describes them."""

    arch: str | None = setting(None, help="family of packaged defaults, as `minivlm list model` shows them")
    model_type: str | None = setting(None, help="member of the family")
    vision_encoder: ModelPart | None = setting(None, part="vision_encoder")
    connector: ModelPart | None = setting(None, part="connector")
    language_model: ModelPart | None = setting(None, part="language_model")
    template: Part | None = setting(None, part="template", help="how a conversation becomes text")
    processor: Part | None = setting(factory=lambda: {"name": "vlm"}, part="processor")
    checkpoint: str | None = setting(
        None,
        help="what to start from: a folder written by minivlm or one of LLaVA, Imp or Mini-Gemini, which alone also "
        "bring the parts, or a file (path or URL) of MiniGPT-4, MiniGPT-v2 or the first stage of Mini-Gemini",
    )

    def __post_init__(self) -> None:
        wrong = one_alone(*(part.name if part else None for part in (self.vision_encoder, self.connector)))
        if wrong:
            raise ValueError(wrong)


NO_VISION = "none"
"""Name of the encoder and the connector of a model that sees nothing; what is left out of a text model means it."""


def one_alone(encoder: str | None, connector: str | None) -> str | None:
    """The complaint about names of which only one is `none`; None for what fits, or what a checkpoint will name."""
    if None in (encoder, connector) or (encoder == NO_VISION) == (connector == NO_VISION):
        return None
    return (
        f"vision_encoder {encoder}, but connector {connector}: a model that sees has both, a language model alone "
        "neither (both none)"
    )


@dataclass
class RunConfig:
    """Section ``run``: the task, the optimiser, the loop and what it leaves behind."""

    task: str = setting("image_text_pretrain", registered="task")
    runner: str = setting("runner_base", registered="runner")
    output_dir: str = setting("output/run", help="folder for checkpoints, logs and reports")
    seed: int = setting(42, ge=0)
    evaluate: bool = setting(False, help="only evaluate, do not train")

    # data
    batch_size_train: int = setting(32, ge=1, help="samples per process and micro batch")
    batch_size_eval: int = setting(64, ge=1)
    global_batch_size: int | None = setting(
        None,
        ge=1,
        help="samples per optimiser step of all processes; accum_grad_iters then follows from batch_size_train and "
        "the number of processes",
    )
    accum_grad_iters: int | None = setting(
        None, ge=1, help="micro batches per optimiser step; default: 1, or what global_batch_size asks for"
    )
    mix: str = setting(
        "sample",
        choices=("sample", "batch"),
        help="what is drawn by sample_ratio: the dataset of every sample, or that of every batch of a process (always "
        "so when a dataset is a stream)",
    )
    num_workers: int = setting(0, ge=0, help="processes that load data")
    train_splits: list[str] = setting(factory=lambda: ["train"])
    valid_splits: list[str] = setting(factory=list)
    test_splits: list[str] = setting(factory=list)
    group_by_length: bool = setting(True, help="batch samples of similar length together")
    group_by_modality_length: bool = setting(
        False,
        help="as LLaVA-1.5: micro batches of samples with pictures or without, of similar length; `compat` imp and "
        "imp_v1 put the few that are left over into Imp's order",
    )
    on_bad_sample: str = setting("skip", choices=("skip", "raise"))
    max_bad_share: float = setting(0.01, ge=0, le=1, help="abort when more than this share is bad")
    feature_cache: str | None = setting(None, help="folder that keeps the output of the last frozen module per picture")

    # length of the training
    max_epoch: int = setting(1, ge=1)
    iters_per_epoch: int | None = setting(
        None, ge=1, help="optimiser steps of an epoch; default: the data once, 10000 for streams"
    )
    max_steps: int | None = setting(None, ge=1, help="stop after this many optimiser steps")

    # optimiser and schedule
    lr_sched: str = setting("linear_warmup_cosine_lr", registered="lr_scheduler")
    init_lr: float = setting(1e-4, gt=0)
    min_lr: float = setting(0.0, ge=0)
    warmup_lr: float = setting(0.0, ge=-1, help="rate at the start of the warm-up; -1: init_lr")
    lr_multi: dict[str, float] = setting(
        factory=dict,
        gt=0,
        help="factors on the learning rate of parameters by globs over their names in a checkpoint; the first that "
        'matches counts: `{"connector.projector.*": 2, "vision_encoder.*": 0.1}`',
    )
    warmup_steps: int = setting(0, ge=0)
    warmup_ratio: float | None = setting(None, ge=0, le=1, help="warm-up as a share of all steps, rounded up")
    lr_decay_rate: float | None = setting(None, gt=0, le=1, help="factor per epoch of the step schedule")
    compat: str | None = setting(
        None,
        choices=(None, "minigpt4", "lavis", "llava", "imp", "imp_v1", "minimind_v1", "minimind_v3"),
        help="count the steps of a schedule as this system did, for its published numbers; see runners/schedules.py",
    )
    weight_decay: float = setting(0.05, ge=0)
    beta1: float = setting(0.9, ge=0, lt=1)
    beta2: float = setting(0.999, ge=0, lt=1)
    max_grad_norm: float | None = setting(1.0, gt=0, help="clip the gradient norm; null: do not clip")

    # machine
    device: str = setting("auto", help="auto, cpu, cuda, cuda:1, mps")
    precision: str = setting("auto", choices=("auto", "bf16", "fp16", "fp32"))
    engine: str = setting(
        "auto", choices=("auto", "single", "ddp", "deepspeed"), help="auto: ddp under torchrun, else single"
    )
    deepspeed: str | None = setting(
        None,
        help="settings of engine deepspeed: zero2, zero2_offload, zero3, zero3_offload, or the path of a JSON file "
        "(docs/deepspeed.md)",
    )

    # state and logs
    resume: str = setting("auto", help="auto, none, or the path of a checkpoint")
    save_freq: int | None = setting(None, ge=1, help="optimiser steps between checkpoints; default: one an epoch")
    keep_last: int = setting(2, ge=1, help="checkpoints that are kept beside the best")
    eval_freq: int | None = setting(
        None, ge=1, help="optimiser steps between evaluations of valid_splits; default: one an epoch"
    )
    log_freq: int = setting(50, ge=1, help="steps between printed lines where there is no terminal")
    trackers: list[str] = setting(factory=list, choices=("tensorboard", "wandb"))
    job_name: str | None = setting(None, help="name shown by the trackers")
    nan_patience: int = setting(5, ge=0, help="non-finite steps in a row that are skipped before the run aborts")

    # evaluation by generation
    num_beams: int = setting(1, ge=1)
    max_len: int = setting(16, ge=1, help="new tokens per answer")
    max_eval_samples: int | None = setting(None, ge=1, help="evaluate only so many samples during training")

    def __post_init__(self) -> None:
        if self.warmup_ratio is not None and self.warmup_steps:
            raise ValueError(f"warmup_ratio {self.warmup_ratio:g} and warmup_steps {self.warmup_steps}: give one only")
        if self.group_by_modality_length and self.mix == "batch":
            raise ValueError("group_by_modality_length groups samples of all datasets, which needs mix: sample")
        if self.deepspeed and self.engine == "auto":
            raise ValueError(
                f"deepspeed {self.deepspeed} has no effect with engine auto: set engine deepspeed, or null"
            )


NEGATIVE_PROMPT = (
    "out of frame, lowres, text, error, cropped, worst quality, low quality, jpeg artifacts, ugly, duplicate, morbid, "
    "mutilated, out of frame, extra fingers, mutated hands, poorly drawn hands, poorly drawn face, mutation, deformed, "
    "blurry, dehydrated, bad anatomy, bad proportions, extra limbs, cloned face, disfigured, gross proportions, "
    "malformed limbs, missing arms, missing legs, extra arms, extra legs, fused fingers, too many fingers, long neck, "
    "username, watermark, signature"
)
"""What Mini-Gemini asks the image generator to avoid."""
PICTURE_FILES = (".png", ".jpg", ".jpeg", ".webp")
"""Endings of the files that generated pictures are written to."""


@dataclass
class DemoConfig:
    """Section ``demo``: what `demo.py` starts with."""

    title: str = "minivlm"
    page: str = setting(
        "chat",
        choices=("chat", "grounding"),
        help="grounding: MiniGPT-v2's task shortcuts, boxes marked on the picture, boxes of answers drawn on it",
    )
    examples: list[str] = setting(factory=list, help="questions offered below the text box")
    max_new_tokens: int = setting(64, ge=1)
    min_new_tokens: int | None = setting(None, ge=1, help="no answer ends before it has so many tokens")
    temperature: float = setting(0.0, ge=0, le=2, help="0: greedy")
    max_temperature: float = setting(2.0, gt=0, le=2, help="upper end of the slider on the page")
    top_p: float = setting(0.9, gt=0, le=1, help="sample among the likeliest tokens that make up this share")
    num_beams: int = setting(1, ge=1, le=10)
    repetition_penalty: float = setting(
        1.0, gt=0, help="above 1 what was said is less likely; MiniGPT-4: 1.05, before October 2023 1.0"
    )
    length_penalty: float = setting(1.0, help="with beams: above 0 favours long answers, below 0 short ones")
    max_length: int | None = setting(
        None, ge=1, help="tokens of a conversation with its answer; default: what the model takes"
    )
    on_overflow: str = setting(
        "error",
        choices=("error", "cut_left"),
        help="of a longer conversation; cut_left, as MiniGPT-4: its oldest tokens, pictures too, are left out",
    )
    max_upload_mb: int = setting(20, ge=1)
    ocr: bool = setting(
        False,
        help="add the text in the pictures to every question, as Mini-Gemini is used to; needs the extra `ocr`",
    )
    ocr_confidence: float = setting(0.1, ge=0, lt=1, help="text of this confidence or less is left out")
    generation: bool = setting(
        False,
        help="ask for a picture prompt (`<GEN>`, which Mini-Gemini knows) and draw it; needs the extra `generation`",
    )
    image_generator: str = setting(
        "stabilityai/stable-diffusion-xl-base-1.0", help="what draws: folder of a pipeline of diffusers, or hub id"
    )
    negative_prompt: str = setting(NEGATIVE_PROMPT, help="what the image generator is to avoid")
    image_steps: int | None = setting(None, ge=1, help="denoising steps of a picture; default: the pipeline's own")
    image_size: int | None = setting(
        None, ge=8, help="pixels of its sides, a multiple of 8; default: the pipeline's own"
    )
    image_seed: int | None = setting(None, ge=0, help="the same prompt gives the same picture; default: another one")
    image_device: str | None = setting(
        None, help="what draws on: cpu, cuda:1, ...; default: the last GPU if the model is on one, else its device"
    )
    generated_image: str = setting(
        "generate.png", help="file that a picture is written to in the terminal; the next are generate_2.png, ..."
    )

    def __post_init__(self) -> None:
        if self.temperature > self.max_temperature:
            raise ValueError(f"temperature {self.temperature:g} is above max_temperature {self.max_temperature:g}")
        if self.image_size is not None and self.image_size % 8:
            raise ValueError(f"image_size {self.image_size} is no multiple of 8")
        if not self.generated_image.lower().endswith(PICTURE_FILES):
            raise ValueError(f"generated_image {self.generated_image} must end in one of {', '.join(PICTURE_FILES)}")


@dataclass
class StageConfig:
    """One resolved stage of an experiment: what a runner is given."""

    model: ModelConfig
    datasets: dict[str, Part] = setting(factory=dict, part="dataset")
    run: RunConfig = field(default_factory=RunConfig)
    demo: DemoConfig = field(default_factory=DemoConfig)
    name: str = "train"


@dataclass
class Experiment:
    """A whole file: one or several stages that run one after the other.

    ``variables`` says of (stage, key) which environment variable can give the value.
    """

    stages: list[StageConfig]
    source: Path | None = None
    notes: list[str] = field(default_factory=list)
    imports: list[str] = field(default_factory=list)
    variables: dict[tuple[str, str], str] = field(default_factory=dict)

    def stage(self, name: str) -> StageConfig:
        """The stage of that name; raises KeyError with the known names."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(f"no stage '{name}'; stages: {', '.join(s.name for s in self.stages)}")


def to_container(value: Any) -> Any:
    """Plain dicts and lists of a config (parts as ``{name: ..., <settings>}``), ready for YAML."""
    import dataclasses

    if isinstance(value, Part):
        node: dict[str, Any] = {"name": value.name}
        for f in dataclasses.fields(value):
            if f.name not in ("name", "config"):
                node[f.name] = to_container(getattr(value, f.name))
        return node | to_container(value.config)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_container(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: to_container(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_container(item) for item in value]
    return str(value) if isinstance(value, Path) else value
