"""``minivlm convert``: checkpoints of other projects as model folders, and back."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minivlm.export import Job, assemble_own, read_model, to_minigpt4

if TYPE_CHECKING:
    from minivlm.config import ModelConfig


def main(argv: Sequence[str]) -> int:
    """Convert one checkpoint; errors are those of loading and saving."""
    parser = argparse.ArgumentParser(
        prog="minivlm convert",
        description="Write a .pth file of MiniGPT-4 as a model folder (with --cfg-path, which says what the model "
        "consists of), or a model folder as such a file (with --to minigpt4).",
    )
    parser.add_argument("source", help="a .pth or .safetensors file, or a folder that minivlm wrote")
    parser.add_argument("target", help="what to write; must not exist")
    parser.add_argument("--to", choices=("minivlm", "minigpt4"), default="minivlm", help="format of the target")
    parser.add_argument("--cfg-path", help="experiment file with the model that a .pth file belongs to")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="override keys of that file")
    arguments = parser.parse_args(argv)
    source, target = arguments.source, Path(arguments.target)
    if target.exists():
        parser.error(f"{target} exists; name another target, or remove it first")
    if arguments.to == "minigpt4":
        if arguments.cfg_path or arguments.options:
            parser.error("--to minigpt4 reads a model folder, which describes itself: leave out --cfg-path")
        to_minigpt4(Job(source, target))
    else:
        to_folder(source, target, arguments.cfg_path, arguments.options)
    return 0


def to_folder(source: str, target: Path, cfg_path: str | None, options: Sequence[str]) -> None:
    """A checkpoint as a model folder; a file needs the experiment file that names its parts.

    Raises ConfigError, ModelError or CheckpointError.
    """
    from minivlm.checkpoints.native import Manifest, save_model

    model, processor, config = assemble_own(source, cfg_path, options)
    save_model(target, model, config, processor, Manifest(trained=model.trained_before))
    print(f"{target}: a model folder; talk to it: minivlm chat {target}")


def merge_main(argv: Sequence[str]) -> int:
    """``minivlm merge``: one folder that needs no other; errors are those of loading and saving."""
    parser = argparse.ArgumentParser(
        prog="minivlm merge",
        description="Write base, vision encoder, connector and adapters as one model folder that needs no other.",
    )
    parser.add_argument("source", help="a folder that minivlm wrote, or (with --cfg-path) a foreign checkpoint")
    parser.add_argument("target", help="the folder to write; must not exist")
    parser.add_argument("--cfg-path", help="experiment file with the model that a foreign checkpoint belongs to")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="override keys of that file")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="how to store it; default: as it was")
    arguments = parser.parse_args(argv)
    if arguments.options and not arguments.cfg_path:
        parser.error("--options override keys of a file: name it with --cfg-path")
    target = Path(arguments.target)
    if target.exists():
        parser.error(f"{target} exists; name another target, or remove it first")
    merge(read_model(arguments.source, arguments.cfg_path, arguments.options), target, arguments.dtype)
    return 0


def merge(config: ModelConfig, target: Path, dtype: str | None = None) -> None:
    """A model as one folder; its base is loaded without quantisation. Raises like :func:`to_folder`."""
    from minivlm.api import assemble
    from minivlm.checkpoints.merge import merge_model

    _, _, config = assemble(config, meta=True)  # what the checkpoint says of itself
    assert config.language_model
    if getattr(config.language_model.config, "quantization", None):
        print("language_model.quantization: null, since adapters are merged into the base as it was before")
        config.language_model.config.quantization = None
    model, processor, config = assemble(config)
    print(merge_model(model, config, processor, target, dtype))
    print(f"{target}: a model folder that needs no other; talk to it: minivlm chat {target}")
