"""The demo program: a model as a web page, or in the terminal."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivlm.config.errors import ConfigError
from minivlm.registry import RegistryError
from minivlm.serve.assistant import Assistant, Tools
from minivlm.serve.image_generation import device_beside, save_picture
from minivlm.serve.loading import ServeError, add_arguments, decoding, load_model, parse, stage_of
from minivlm.types import SampleError

if TYPE_CHECKING:
    from PIL.Image import Image

    from minivlm.config.experiment import DemoConfig, StageConfig
    from minivlm.serve.chat import Chat

BAD_INPUT = 2
"""Exit code for what the user can put right."""


def main(argv: Sequence[str] | None = None, prog: str = "demo.py") -> int:
    """Run the demo; returns the exit code. Nothing heavy is imported before the arguments are checked."""
    arguments = parse(_parser(prog), argv)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return _run(arguments)
    except (ConfigError, RegistryError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    except ValueError as error:
        # ServeError, and ModelError, CheckpointError, TokenizerError, whose modules import torch.
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


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Talk to a model about pictures.")
    add_arguments(parser)
    parser.add_argument("--ocr", action="store_true", help="add the text in the pictures to every question (demo.ocr)")
    parser.add_argument("--gen", action="store_true", help="draw the pictures that answers ask for (demo.generation)")
    parser.add_argument("--output-file", metavar="FILE", help="with --cli: the picture's name (default: generate.png)")
    parser.add_argument("--cli", action="store_true", help="in the terminal instead of the browser")
    parser.add_argument("--image-file", metavar="FILE", help="with --cli: path or URL, or several with commas between")
    parser.add_argument("--query", help="print one answer and end")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="also open a public link through gradio's servers")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    stage = stage_of(arguments)
    stage.demo = _with_flags(stage.demo, arguments)
    tools = Tools.of(stage.demo)
    images = _pictures(stage, arguments)
    factory = _chats(stage, arguments, tools)
    if arguments.query is not None:
        return _answer(Assistant(factory(), tools), arguments.query, images, stage.demo)
    if arguments.cli:
        from minivlm.serve.terminal import run_terminal

        _line_editing()
        run_terminal(factory(), stage.demo, images, tools=tools)
        return 0
    from minivlm.serve.web import launch

    launch(factory, stage.demo, tools=tools, host=arguments.host, port=arguments.port, share=arguments.share)
    return 0


def _with_flags(demo: DemoConfig, arguments: argparse.Namespace) -> DemoConfig:
    """Section ``demo`` with what the arguments switch on. Raises ServeError for a file that holds no picture."""
    flags: dict[str, Any] = {"ocr": arguments.ocr, "generation": arguments.gen}
    flags["generated_image"] = arguments.output_file
    try:
        demo = replace(demo, **{key: value for key, value in flags.items() if value})
    except ValueError as error:
        raise ServeError(f"--output-file: {error}") from error
    in_terminal = arguments.cli or arguments.query is not None
    if arguments.output_file and not (demo.generation and in_terminal):
        raise ServeError(
            "--output-file names the picture that is drawn in the terminal: add --gen, and to demo.py --cli or --query"
        )
    return demo


def _answer(assistant: Assistant, query: str, images: Sequence[Image], demo: DemoConfig) -> int:
    """One question, answered on standard output. Raises ServeError for one that cannot be answered."""
    try:
        reply = assistant.ask(query, images)
    except SampleError as error:
        raise ServeError(error.reason) from error
    print(reply.text)
    if assistant.speed:
        print(f"({assistant.speed})", file=sys.stderr)
    if reply.picture is not None:
        print(f"picture: {save_picture(reply.picture, Path(demo.generated_image))}", file=sys.stderr)
    if reply.note:
        print(reply.note, file=sys.stderr)
    return 0


def _pictures(stage: StageConfig, arguments: argparse.Namespace) -> list[Image]:
    """What --image-file names, read before the model is loaded."""
    if arguments.image_file is None:
        return []
    if not arguments.cli and arguments.query is None:
        raise ServeError("--image-file is for --cli and --query; on the page pictures are uploaded")
    from minivlm.serve.pictures import read_pictures

    return read_pictures(arguments.image_file, stage.demo.max_upload_mb)


def _chats(stage: StageConfig, arguments: argparse.Namespace, tools: Tools) -> Callable[[], Chat]:
    """Load the model; the result makes conversations that share it."""
    model, processor = load_model(stage, arguments)
    if tools.generator is not None and stage.demo.image_device is None:
        tools.generator.device = device_beside(model.device)
    from minivlm.serve.chat import Chat

    return partial(Chat, model, processor, lock=threading.Lock(), **decoding(stage.demo))


def _line_editing() -> None:
    """Arrow keys and history at the prompt, where Python has readline."""
    try:
        import readline  # noqa: F401
    except ImportError:
        pass
