"""The demo program: a model as a web page, or in the terminal."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minivlm.config.errors import ConfigError
from minivlm.config.experiment import DemoConfig, ModelConfig, StageConfig
from minivlm.paths import is_placeholder, is_weight_file
from minivlm.registry import RegistryError

if TYPE_CHECKING:
    from minivlm.serve.chat import Chat

BAD_INPUT = 2
"""Exit code for what the user can put right."""


class DemoError(ValueError):
    """Something that keeps the demo from starting; the message says what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit code. Nothing heavy is imported before the arguments are checked."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return _run(arguments)
    except (ConfigError, RegistryError, DemoError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    except ValueError as error:
        # ModelError, CheckpointError, TokenizerError; their classes live in modules that import torch.
        if not type(error).__module__.startswith("minivlm"):
            raise
        print(error, file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("\nbye", file=sys.stderr)
        return 0


def _terminate(number: int, frame: object) -> None:
    """A plain `kill` ends the program as Ctrl-C does, so that uploads are removed."""
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="demo.py", description="Talk to a model about pictures.")
    parser.add_argument("--cfg-path", required=True, help="experiment file, or a folder that minivlm wrote")
    parser.add_argument("--cli", action="store_true", help="in the terminal instead of the browser")
    device = parser.add_mutually_exclusive_group()
    device.add_argument("--gpu-id", type=int, metavar="N", help="use CUDA device N")
    device.add_argument("--device", help="auto (default), cpu, cuda, cuda:1, mps")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="also open a public link through gradio's servers")
    parser.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE", help="override keys of the file")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    stage = _read(arguments.cfg_path, arguments.options)
    factory = _load(stage.model, _device(arguments, stage.run.device), stage.demo)
    if arguments.cli:
        from minivlm.serve.terminal import run_terminal

        _line_editing()
        run_terminal(factory(), stage.demo)
        return 0
    from minivlm.serve.web import launch

    launch(factory, stage.demo, host=arguments.host, port=arguments.port, share=arguments.share)
    return 0


def _read(path: str, options: Sequence[str]) -> StageConfig:
    """The last stage of an experiment file; a model folder stands for a file that names it."""
    if Path(path).is_dir():
        if options:
            raise DemoError(f"--options change an experiment file, but {path} is a folder")
        stage = StageConfig(ModelConfig(checkpoint=path))
    else:
        from minivlm.config import load_config

        experiment = load_config(path, options)
        for note in experiment.notes:
            print(f"note: {note}", file=sys.stderr)
        stage = experiment.stages[-1]
    start = stage.model.checkpoint
    if start and not (Path(start).exists() or is_weight_file(start) or is_placeholder(start)):
        raise DemoError(
            f"there is no model in {start}; train it first: `python train.py --cfg-path FILE` "
            "with its experiment file, or `make quickstart` for the model of the quickstart"
        )
    return stage


def _device(arguments: argparse.Namespace, configured: str) -> str:
    """``cuda:N`` for --gpu-id N if there is CUDA; else --device, else what the file says."""
    if arguments.gpu_id is None:
        return arguments.device or configured
    import torch

    if not torch.cuda.is_available():
        print(f"note: --gpu-id {arguments.gpu_id}: no CUDA here, the best other device is used", file=sys.stderr)
        return "auto"
    if not 0 <= arguments.gpu_id < torch.cuda.device_count():
        raise DemoError(f"--gpu-id {arguments.gpu_id}: there are {torch.cuda.device_count()} CUDA devices, from 0 on")
    return f"cuda:{arguments.gpu_id}"


def _load(config: ModelConfig, device: str, demo: DemoConfig) -> Callable[[], Chat]:
    """Load the model; the result makes conversations that share it."""
    import torch

    from minivlm.api import assemble, resolve_device
    from minivlm.serve.chat import Chat

    try:
        where = resolve_device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA says so with an assertion
        raise DemoError(f"device {device} cannot be used: {str(error).splitlines()[0]}") from error
    print(f"loading the model onto {where}", file=sys.stderr, flush=True)
    model, processor, _ = assemble(config)
    model.to(where).eval()
    lock = threading.Lock()

    def make() -> Chat:
        return Chat(
            model,
            processor,
            max_new_tokens=demo.max_new_tokens,
            temperature=demo.temperature,
            num_beams=demo.num_beams,
            lock=lock,
        )

    return make


def _line_editing() -> None:
    """Arrow keys and history at the prompt, where Python has readline."""
    try:
        import readline  # noqa: F401
    except ImportError:
        pass
