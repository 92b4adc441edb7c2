"""``minivlm export``: a model in the format of another project."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minivlm.checkpoints.to_llava import Layout
    from minivlm.config import ModelConfig
    from minivlm.models.vlm import VisionLanguageModel
    from minivlm.processors.processor import VLMProcessor


@dataclass(frozen=True)
class Job:
    """What is to be exported. ``cfg_path`` and ``options`` belong to a ``source`` that does not describe itself."""

    source: str
    target: Path
    cfg_path: str | None = None
    options: Sequence[str] = ()
    dtype: str | None = None
    check: bool = True


def main(argv: Sequence[str]) -> int:
    """Export one model; errors are those of loading and saving."""
    parser = argparse.ArgumentParser(
        prog="minivlm export", description="Write a model in the format of another project."
    )
    parser.add_argument("source", help="a folder that minivlm wrote, an experiment file, or a file with --cfg-path")
    parser.add_argument("target", help="what to write; must not exist (minimind: a file, or its folder)")
    parser.add_argument("--to", choices=tuple(FORMATS), required=True, help="format of the target")
    parser.add_argument("--cfg-path", help="experiment file with the model that a file of weights belongs to")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="override keys of that file")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="storage type (default: as it is)")
    parser.add_argument(
        "--no-check", action="store_true", help="transformers: do not read the target back and compare logits"
    )
    given = parser.parse_args(argv)
    target = Path(given.target)
    if target.exists() and not (FORMATS[given.to].names_file and target.is_dir()):
        parser.error(f"{target} exists; name another target, or remove it first")
    form = FORMATS[given.to]
    if form.reads_folder and (given.cfg_path or given.options or given.dtype):
        parser.error(f"--to {given.to} reads a model folder as it is: leave out --cfg-path, --options and --dtype")
    form.write(Job(given.source, target, given.cfg_path, given.options, given.dtype, not given.no_check))
    return 0


def to_minigpt4(job: Job) -> None:
    """A model folder as a ``.pth`` file of MiniGPT-4."""
    from minivlm.checkpoints.export import export_minigpt4
    from minivlm.checkpoints.native import find_model_folder

    names = export_minigpt4(find_model_folder(job.source), job.target)
    print(f"{job.target}: {len(names)} tensors ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")


def to_transformers(job: Job) -> None:
    """A model as a folder of ``LlavaForConditionalGeneration``."""
    from minivlm.checkpoints.to_transformers import export_transformers

    model, processor = _assembled(job)
    _refuse_blind(model)
    done = export_transformers(model, processor, job.target, check=job.check)
    print(
        f"{job.target}: LlavaForConditionalGeneration, {done.parameters:,} parameters, "
        f"{' and '.join(done.dtypes)}, <image> is token {done.image_token_id}"
    )
    if done.comparison:
        print(
            f"read back by transformers (fp32): logits differ by at most {done.comparison.logits:.1e}, "
            f"pixels by {done.comparison.pixels:.1e}"
        )
    for note in done.notes:
        print(f"note: {note}")


def to_transformers_llm(job: Job) -> None:
    """The language model alone as a folder of its own class in transformers."""
    from minivlm.checkpoints.to_language_model import export_language_model

    model, processor = _assembled(job)
    difference = export_language_model(model, processor, job.target, check=job.check)
    print(f"{job.target}: {type(model.language_model.model).__name__}")
    if difference is not None:
        print(f"read back by transformers (fp32): logits differ by at most {difference:.1e}")


def to_minimind(job: Job) -> None:
    """Projection and language model as a ``.pth`` file of MiniMind-V."""
    _write_minimind(job, alone=False)


def to_minimind_llm(job: Job) -> None:
    """The language model alone as a ``.pth`` file of MiniMind."""
    _write_minimind(job, alone=True)


def _write_minimind(job: Job, alone: bool) -> None:
    from minivlm.checkpoints.native import read_manifest
    from minivlm.checkpoints.parts import model_folder
    from minivlm.checkpoints.to_minimind import write_minimind

    folder = model_folder(job.source)
    named = read_manifest(folder).stage if folder else ""
    stage = named if named not in ("", "train") else Path(job.source).stem  # "train": the file has one stage
    model, processor = _assembled(job)
    if not alone:
        _refuse_blind(model)
    file, names = write_minimind(job.target, model, alone=alone, stage=stage, tokenizer=processor.tokenizer)
    print(f"{file}: {len(names)} tensors ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")


def _refuse_blind(model: VisionLanguageModel) -> None:
    from minivlm.checkpoints.report import CheckpointError

    if not model.vision_encoder.inputs:
        raise CheckpointError(
            "a model of this format has a vision encoder and a connector, this one is a language model alone "
            "(model.vision_encoder: none): --to transformers_llm or minimind_llm"
        )


def _assembled(job: Job) -> tuple[VisionLanguageModel, VLMProcessor]:
    from minivlm.api import assemble, cast
    from minivlm.models.base import DTYPES

    model, processor, _ = assemble(read_model(job.source, job.cfg_path, job.options))
    if job.dtype:
        cast(model, DTYPES[job.dtype])
    return model.eval(), processor


def to_llava(job: Job) -> None:
    """A model in the layout of LLaVA and Imp: a whole one, LoRA, or a projector."""
    from minivlm.checkpoints.to_llava import LLAVA_LAYOUT

    _write_folder(job, LLAVA_LAYOUT)


def to_imp_v1(job: Job) -> None:
    """A model on Phi-2 in the layout of Imp-v1."""
    from minivlm.checkpoints.to_llava import IMP_V1_LAYOUT

    _write_folder(job, IMP_V1_LAYOUT)


def to_mgm(job: Job) -> None:
    """A model with two encoders in the layout of Mini-Gemini: a whole one, LoRA, or the file of the first stage."""
    from minivlm.checkpoints.to_mgm import MGM_LAYOUT

    _write_folder(job, MGM_LAYOUT)


def _write_folder(job: Job, layout: Layout) -> None:
    from minivlm.api import cast
    from minivlm.checkpoints.to_llava import write_folder
    from minivlm.models.base import DTYPES

    model, processor, config = assemble_own(job.source, job.cfg_path, job.options)
    _refuse_blind(model)
    if job.dtype:
        cast(model, DTYPES[job.dtype])
    names = write_folder(job.target, layout, model, processor, config)
    print(f"{job.target}: {len(names)} tensors ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")


def assemble_own(
    source: str, cfg_path: str | None = None, options: Sequence[str] = ()
) -> tuple[VisionLanguageModel, VLMProcessor, ModelConfig]:
    """Model, processor and section of :func:`read_model`; what a foreign folder gives counts as the model's own.

    What is written of it then does without that folder. Raises :class:`ModelError` for quantised weights of it.
    """
    from minivlm.api import assemble
    from minivlm.models.base import ModelError
    from minivlm.models.vlm import PARTS

    config = read_model(source, cfg_path, options)
    start = config.checkpoint
    model, processor, config = assemble(config)
    for part in PARTS:
        weights, module = getattr(config, part).weights, getattr(model, part)
        if start and weights and Path(weights) == Path(start):
            if module.quantization:
                raise ModelError(f"model.{part}: quantised weights are not written; set quantization: null")
            module.source = None
    return model, processor, config


def read_model(source: str, cfg_path: str | None = None, options: Sequence[str] = ()) -> ModelConfig:
    """Section ``model`` for a folder, an experiment file, or a file of weights and the experiment file ``cfg_path``.

    Raises ConfigError, or CheckpointError for a file of weights alone.
    """
    from minivlm.checkpoints.report import CheckpointError
    from minivlm.config import ModelConfig, load_config
    from minivlm.paths import is_weight_file

    if cfg_path:
        # The name of the file is no YAML and takes no part in the parsing; options have either of two forms.
        pairs = bool(options) and "=" not in options[0]
        stand_in = ["model.checkpoint", "source.pth"] if pairs else ["model.checkpoint=source.pth"]
        config = load_config(cfg_path, [*options, *stand_in]).stages[-1].model
        config.checkpoint = source
        return config
    if source.endswith((".yaml", ".yml")):
        return load_config(source, options).stages[-1].model
    if is_weight_file(source):
        raise CheckpointError(f"{source} does not say which model it belongs to: name its YAML file with --cfg-path")
    if options:
        raise CheckpointError(f"--options change an experiment file, but {source} is a folder")
    return ModelConfig(checkpoint=source)


@dataclass(frozen=True)
class Format:
    """A format of export.

    ``reads_folder``: it needs a model folder, whose files it takes as they are. ``names_file``: in a target that is a
    folder it makes a file, whose name it knows.
    """

    write: Callable[[Job], None]
    reads_folder: bool = field(default=False, kw_only=True)
    names_file: bool = field(default=False, kw_only=True)


FORMATS = {
    "transformers": Format(to_transformers),
    "transformers_llm": Format(to_transformers_llm),
    "minimind": Format(to_minimind, names_file=True),
    "minimind_llm": Format(to_minimind_llm, names_file=True),
    "llava": Format(to_llava),
    "imp": Format(to_llava),
    "imp_v1": Format(to_imp_v1),
    "mgm": Format(to_mgm),
    "mini_gemini": Format(to_mgm),
    "minigpt4": Format(to_minigpt4, reads_folder=True),
}
