"""What the programs that serve a model share: their arguments, the file they read, the device they use."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivlm.config.experiment import DemoConfig, ModelConfig, StageConfig
from minivlm.paths import WEIGHT_SUFFIXES, is_placeholder, is_weight_file
from minivlm.serve.flags import ServeError, add_flags, apply_flags, use_template

__all__ = [
    "ServeError",
    "add_arguments",
    "add_loading",
    "decoding",
    "load_model",
    "parse",
    "read_stage",
    "stage_of",
    "weights_written",
]

if TYPE_CHECKING:
    from minivlm.models.vlm import VisionLanguageModel
    from minivlm.processors.processor import VLMProcessor

_DECODING = (
    "max_new_tokens",
    "min_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "num_beams",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "length_penalty",
    "max_length",
    "on_overflow",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and on which device."""
    parser.add_argument("config", nargs="?", help="experiment file, or a folder that minivlm wrote")
    parser.add_argument("--cfg-path", "--model-path", metavar="CONFIG", help="the same")
    parser.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE", help="override keys of the file")
    add_loading(parser)


def add_loading(parser: argparse.ArgumentParser) -> None:
    """On which device, and what the flags say."""
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--gpu-id", type=int, metavar="N", help="use CUDA device N")
    device.add_argument("--device", help="auto (default), cpu, cuda, cuda:1, mps")
    add_flags(parser)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, ``cfg_path`` among them."""
    arguments = parser.parse_args(argv)
    arguments.cfg_path = arguments.cfg_path or arguments.config
    if arguments.cfg_path is None:
        parser.error("give an experiment file or the folder of a model: --cfg-path eval_configs/quickstart.yaml")
    return arguments


def stage_of(arguments: argparse.Namespace) -> StageConfig:
    """The stage that the arguments name, with what the flags say. Raises as :func:`read_stage` and the flags do."""
    return apply_flags(read_stage(arguments.cfg_path, arguments.options), arguments)


def read_stage(path: str, options: Sequence[str] = ()) -> StageConfig:
    """The last stage of an experiment file; a model folder stands for a file that names it.

    Raises ConfigError, or :class:`ServeError` if there is no checkpoint where the file says.
    """
    if Path(path).is_dir():
        if options:
            raise ServeError(f"--options change an experiment file, but {path} is a folder")
        stage = StageConfig(ModelConfig(checkpoint=path))
    elif not Path(path).exists() and not path.lower().endswith((".yaml", ".yml")):
        raise ServeError(f"there is neither a folder nor a file {path}; a run writes its model into run.output_dir")
    else:
        from minivlm.config import load_config

        experiment = load_config(path, options)
        for note in experiment.notes:
            print(f"note: {note}", file=sys.stderr)
        stage = experiment.stages[-1]
    start = stage.model.checkpoint
    if start and not (Path(start).exists() or is_weight_file(start) or is_placeholder(start)):
        raise ServeError(
            f"there is no model in {start}; correct model.checkpoint, or train it first: `python train.py "
            "--cfg-path FILE` with its experiment file, or `make quickstart` for the model of the quickstart"
        )
    return stage


def load_model(stage: StageConfig, arguments: argparse.Namespace) -> tuple[VisionLanguageModel, VLMProcessor]:
    """The model in eval mode on the device that the arguments or else ``run.device`` ask for, its processor."""
    import torch

    from minivlm.api import assemble, cast, resolve_device
    from minivlm.models.placement import place

    device = _device(arguments, stage.run.device)
    try:
        where = resolve_device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA says so with an assertion
        reason = str(error).splitlines()[0].partition(". ")[0]  # a list of all devices that there ever were follows
        raise ServeError(f"device {device} cannot be used: {reason}") from error
    print(f"loading the model onto {where}", file=sys.stderr, flush=True)
    model, processor, config = assemble(stage.model, frozen=True)
    use_template(arguments.conv_mode, processor, config)
    language_model = model.language_model
    if (
        where.type == "cpu"
        and getattr(language_model, "dtype", None) == torch.float16
        and not language_model.quantization
    ):
        print("note: a CPU is slow in fp16; the language model is kept in bf16", file=sys.stderr)
        cast(language_model, torch.bfloat16)
    return place(model, where).eval(), processor


def weights_written(stage: StageConfig) -> str | None:
    """When the newest file of weights was written that section ``model`` names here, as ISO time; None without one."""
    newest = 0.0
    for path in _paths(asdict(stage.model)):
        files = [path] if path.is_file() else path.rglob("*")
        newest = max([newest, *(file.stat().st_mtime for file in files if file.suffix in WEIGHT_SUFFIXES)])
    return datetime.fromtimestamp(newest, timezone.utc).isoformat() if newest else None


def _paths(section: Mapping[str, Any]) -> Iterator[Path]:
    """The files and folders that a section names at any depth."""
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _paths(value)
        elif key in ("checkpoint", "path", "weights") and value and Path(value).exists():
            yield Path(value)


def decoding(demo: DemoConfig) -> dict[str, Any]:
    """The settings of :class:`~minivlm.serve.chat.Chat` that section ``demo`` holds."""
    return {name: getattr(demo, name) for name in _DECODING}


def _device(arguments: argparse.Namespace, configured: str) -> str:
    """``cuda:N`` for --gpu-id N if there is CUDA; else --device, else what the file says."""
    if arguments.gpu_id is None:
        return arguments.device or configured
    import torch

    if not torch.cuda.is_available():
        print(f"note: --gpu-id {arguments.gpu_id}: no CUDA here, the best other device is used", file=sys.stderr)
        return "auto"
    if not 0 <= arguments.gpu_id < torch.cuda.device_count():
        raise ServeError(f"--gpu-id {arguments.gpu_id}: there are {torch.cuda.device_count()} CUDA devices, from 0 on")
    return f"cuda:{arguments.gpu_id}"
