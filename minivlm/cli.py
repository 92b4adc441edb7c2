"""The command line: ``minivlm COMMAND``; ``minivlm --help`` lists the commands.

Arguments are parsed and the experiment file is checked before anything heavy is imported.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from minivlm import __version__, registry

if TYPE_CHECKING:
    from minivlm.config import Experiment

INTERRUPTED = 130
BAD_INPUT = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, tuple[Callable[[list[str]], int], str]] = {
        "train": (train, "run an experiment file: all its stages, then its evaluation"),
        "eval": (evaluate, "evaluate the last stage of an experiment file"),
        "chat": (chat, "talk to a model in the terminal"),
        "demo": (demo, "open the web page of a model"),
        "generate": (generate, "answers about a folder of pictures or a JSONL file, in batches"),
        "compare": (compare, "several models asked about the same pictures, side by side, with scores"),
        "train-tokenizer": (train_tokenizer, "learn a byte-level BPE tokenizer from text or an experiment's data"),
        "check-data": (check_data, "read the data of an experiment file and report what is wrong"),
        "check-root": (check_root, "compare a folder with the tree that a published system trains in"),
        "prepare-captions": (prepare_captions, "make img2dataset's download list from lists of {url, caption}"),
        "inspect": (inspect, "say what a file of weights or a folder holds, and what it is good for"),
        "convert": (convert, "write MiniGPT-4's .pth files as model folders, and back"),
        "download": (download, "fetch the base models of an experiment file, or one, from the hub or a mirror folder"),
        "export": (export, "write a model in the format of another project (transformers, llava, imp, mgm, minigpt4)"),
        "merge": (merge, "write base, encoder, connector and adapters as one folder that needs no other"),
        "cache": (cache, "encode the pictures of an experiment file ahead of its training"),
        "prepare-deepspeed": (prepare_deepspeed, "compile what DeepSpeed needs on this machine, before a run"),
        "list": (list_names, "registered names, by kind"),
        "doctor": (doctor, "versions, devices, missing extras"),
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"minivlm {__version__}\n\nusage: minivlm COMMAND ...\n")
        for name, (_, summary) in commands.items():
            print(f"  {name:<17} {summary}")
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    if arguments[0] not in commands:
        near = registry.suggest(arguments[0], commands)
        print(f"minivlm: unknown command '{arguments[0]}'{near}; minivlm --help lists them", file=sys.stderr)
        return BAD_INPUT
    return commands[arguments[0]][0](arguments[1:])


def guarded(work: Callable[[], int]) -> int:
    """Run ``work``; errors that mean bad input become one message and exit code 2, without a traceback."""
    from minivlm.config import ConfigError

    try:
        return work()
    except (ConfigError, registry.RegistryError) as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if not getattr(type(error), "__module__", "").startswith("minivlm") and not isinstance(
            error, (OSError, ImportError)
        ):
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return BAD_INPUT


def train(argv: list[str]) -> int:
    """``minivlm train`` and ``train.py``."""
    parser = _experiment_parser("train", "Run an experiment file.")
    parser.add_argument("--dry-run", action="store_true", help="show what would happen; nothing is trained or written")
    arguments = _parse(parser, argv)

    def work() -> int:
        experiment = _load(arguments)
        return _dry_run(experiment) if arguments.dry_run else _run(experiment, argv)

    return guarded(work)


def evaluate(argv: list[str]) -> int:
    """``minivlm eval``: the last stage with ``run.evaluate``, on the model that the stage has trained."""
    arguments = _parse(_experiment_parser("eval", "Evaluate the last stage of an experiment file."), argv)

    def work() -> int:
        experiment = _load(arguments)
        stage = experiment.stages[-1]
        given = any(option.startswith("model.checkpoint") for option in arguments.options or ())
        given |= stage.run.evaluate and stage.model.checkpoint is not None  # the file itself trains nothing
        stage.run.evaluate = True
        if not given:
            stage.model.checkpoint = stage.run.output_dir  # what it has trained, not what it started from
        experiment.stages = [stage]
        return _run(experiment, argv)

    return guarded(work)


def _load(arguments: argparse.Namespace) -> Experiment:
    from minivlm.config import load_config

    experiment = load_config(arguments.cfg_path, arguments.options or ())
    for note in experiment.notes:
        print(f"note: {note}", file=sys.stderr)
    return experiment


def _dry_run(experiment: Experiment) -> int:
    from rich.console import Console

    from minivlm.runners.dry_run import dry_run

    return 0 if dry_run(experiment, Console()) else 1


def _run(experiment: Experiment, argv: Sequence[str]) -> int:
    from rich.console import Console

    from minivlm.models.base import ModelError
    from minivlm.runners.experiment import is_main_process, run_experiment
    from minivlm.runners.runner import Interrupted

    start = time.perf_counter()
    try:
        run_experiment(experiment, Console())
    except Interrupted as stop:
        if is_main_process():
            print(f"\n{stop}\nto go on: {_command_to_go_on(argv)}", file=sys.stderr)
        return INTERRUPTED
    except ModelError as error:
        read = {name for (_, key), name in experiment.variables.items() if f"{key}:" in str(error)}
        hint = f"; the environment variable {', '.join(sorted(read))} names another" if read else ""
        raise type(error)(f"{error}{hint}") from error
    if is_main_process():
        stage = experiment.stages[-1]
        folder = shlex.quote(stage.run.output_dir)
        command = f"{_python()} demo.py --cfg-path {folder}" if _is_script() else f"minivlm demo {folder}"
        print(f"finished in {time.perf_counter() - start:.0f} s{_peak_memory()}")
        print(f"model: {folder}\ntalk to it: {command}")
    return 0


def _command_to_go_on(argv: Sequence[str]) -> str:
    """The command that was given, without what would start it anew or from elsewhere."""
    script = sys.argv[0] if _is_script() else "-m minivlm.cli train"
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    launcher = _python() if processes == 1 else f"torchrun --nproc-per-node {processes}"
    kept = [word for word in argv if not word.startswith("run.resume=")]
    if kept and kept[-1] == "--options":
        kept.pop()
    return f"{launcher} {script} {shlex.join(kept)}"


def _peak_memory() -> str:
    """The most memory that this process took so far, where the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        return ""
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return f", {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.1f} GiB of memory at most"


def _is_script() -> bool:
    return sys.argv[0].endswith("train.py")


def _python() -> str:
    """The interpreter as the user would type it: by its path when it lies below the current folder."""
    path = os.path.relpath(sys.executable)
    return "python" if path.startswith("..") else path


def chat(argv: list[str]) -> int:
    """``minivlm chat FOLDER_OR_YAML``."""
    return _talk("chat", ["--cli"], argv)


def demo(argv: list[str]) -> int:
    """``minivlm demo FOLDER_OR_YAML``."""
    return _talk("demo", [], argv)


def _talk(command: str, flags: list[str], argv: list[str]) -> int:
    from minivlm.serve.demo import main as demo_main

    return demo_main([*argv, *flags], f"minivlm {command}")


def generate(argv: list[str]) -> int:
    """``minivlm generate FOLDER_OR_YAML --input PICTURES_OR_JSONL --output JSONL``."""
    from minivlm.serve.generate import main as generate_main

    return guarded(lambda: generate_main(argv))


def compare(argv: list[str]) -> int:
    """``minivlm compare MODEL... --images FOLDER|--data YAML --output FOLDER``."""
    from minivlm.serve.compare import main as compare_main

    return guarded(lambda: compare_main(argv))


def train_tokenizer(argv: list[str]) -> int:
    """``minivlm train-tokenizer INPUT... --output FOLDER``."""
    from minivlm.tasks.train_tokenizer import main as train_tokenizer_main

    return guarded(lambda: train_tokenizer_main(argv))


def check_data(argv: list[str]) -> int:
    """``minivlm check-data``: read samples of every dataset and report."""
    parser = _experiment_parser("check-data", "Read the data of an experiment file and report what is wrong.")
    parser.add_argument("--limit", type=int, default=1000, help="samples to read of every split (default 1000)")
    _add_deep(parser)
    arguments = _parse(parser, argv)

    def work() -> int:
        from rich.console import Console

        from minivlm.tasks.check_data import check_experiment

        deep = arguments.deep or arguments.write_missing is not None
        experiment = _load(arguments)
        return 0 if check_experiment(experiment, Console(), arguments.limit, deep, arguments.write_missing) else 1

    return guarded(work)


def check_root(argv: list[str]) -> int:
    """``minivlm check-root [ROOT]``: models, data and results of a published system, and what of them lacks."""
    from pathlib import Path

    description = "Compare a folder with the tree that a published system trains in, and say what is missing."
    parser = argparse.ArgumentParser(prog="minivlm check-root", description=description)
    parser.add_argument("root", nargs="?", type=Path, default=Path(), help="folder with model_zoo, data (default: .)")
    parser.add_argument("--system", default="mini_gemini", help="whose tree, or a YAML file with one of your own")
    parser.add_argument("--for", nargs="+", default=(), dest="files", metavar="YAML", help="only what these files need")
    _add_deep(parser)
    arguments = parser.parse_args(argv)

    def work() -> int:
        from rich.console import Console

        from minivlm.tasks.check_root import check_root as check

        deep = arguments.deep or arguments.write_missing is not None
        fine = check(arguments.root, arguments.system, Console(), arguments.files, deep, arguments.write_missing)
        return 0 if fine else 1

    return guarded(work)


def _add_deep(parser: argparse.ArgumentParser) -> None:
    from pathlib import Path

    parser.add_argument("--deep", action="store_true", help="look for the picture files of all records")
    parser.add_argument(
        "--write-missing", type=Path, metavar="FOLDER", help="as --deep, and write lists of records without pictures"
    )


def prepare_captions(argv: list[str]) -> int:
    """``minivlm prepare-captions``: lists of pictures with captions as a TSV to download from."""
    from pathlib import Path

    parser = argparse.ArgumentParser(
        prog="minivlm prepare-captions", description="Make img2dataset's download list from lists of {url, caption}."
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT.json", help="JSON array or JSON lines")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="LIST.tsv", help="url<TAB>caption, with a heading"
    )
    arguments = parser.parse_args(argv)

    def work() -> int:
        from minivlm.datasets.caption_list import prepare_captions as prepare

        print(f"{arguments.output}: {prepare(arguments.inputs, arguments.output)}")
        return 0

    return guarded(work)


def cache(argv: list[str]) -> int:
    """``minivlm cache``: fill run.feature_cache with the pictures of all stages."""
    description = "Encode the pictures of an experiment file ahead of its training, into run.feature_cache."
    arguments = _parse(_experiment_parser("cache", description), argv)

    def work() -> int:
        from rich.console import Console

        from minivlm.runners.build_cache import build_caches

        build_caches(_load(arguments), Console())
        return 0

    return guarded(work)


def inspect(argv: list[str]) -> int:
    """``minivlm inspect FILE_OR_FOLDER``: what it holds and which key takes it; nothing in it is executed."""
    parser = argparse.ArgumentParser(prog="minivlm inspect", description="Say what a file or folder holds.")
    parser.add_argument("path", help=".pth, .safetensors, a folder of Hugging Face, a folder that minivlm wrote")
    path = parser.parse_args(argv).path

    def work() -> int:
        from minivlm.checkpoints.inspection import inspect_path, render

        print(render(path, inspect_path(path)))
        return 0

    return guarded(work)


def convert(argv: list[str]) -> int:
    """``minivlm convert SOURCE TARGET``."""
    from minivlm.convert import main as convert_main

    return guarded(lambda: convert_main(argv))


def download(argv: list[str]) -> int:
    """``minivlm download ID`` or ``--cfg-path YAML``."""
    from minivlm.download import main as download_main

    return guarded(lambda: download_main(argv))


def export(argv: list[str]) -> int:
    """``minivlm export SOURCE TARGET --to FORMAT``."""
    from minivlm.export import main as export_main

    return guarded(lambda: export_main(argv))


def merge(argv: list[str]) -> int:
    """``minivlm merge SOURCE TARGET``."""
    from minivlm.convert import merge_main

    return guarded(lambda: merge_main(argv))


def prepare_deepspeed(argv: list[str]) -> int:
    """``minivlm prepare-deepspeed``."""
    from minivlm.runners.deepspeed_build import main as prepare_main

    return guarded(lambda: prepare_main(argv))


def list_names(argv: list[str]) -> int:
    """``minivlm list [KIND]``: registered names; imports none of them."""
    from minivlm.config import list_model_defaults

    parser = argparse.ArgumentParser(prog="minivlm list", description="Registered names.")
    parser.add_argument("kind", nargs="?", choices=(*registry.KINDS, "model"), help="one kind only")
    kind = parser.parse_args(argv).kind
    if hasattr(signal, "SIGPIPE"):  # `minivlm list | head` ends quietly
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for each in (kind,) if kind else (*registry.KINDS, "model"):
        print(each)
        if each == "model":
            for arch, model_type in list_model_defaults():
                print(f"  arch: {arch}, model_type: {model_type}")
            continue
        for name in registry.names(each):
            print(f"  {name:<28} {registry.entry(each, name).summary}".rstrip())
    return 0


def doctor(argv: list[str]) -> int:
    """``minivlm doctor``."""
    from minivlm.doctor import main as doctor_main

    return doctor_main(argv)


def _experiment_parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"minivlm {command}", description=description)
    parser.add_argument("config", nargs="?", help="experiment file (or --cfg-path)")
    parser.add_argument("--cfg-path", help="experiment file")
    parser.add_argument("--options", nargs="+", metavar="KEY=VALUE", help="override keys, e.g. run.init_lr=1e-4")
    return parser


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    arguments = parser.parse_args(argv)
    arguments.cfg_path = arguments.cfg_path or arguments.config
    if arguments.cfg_path is None:
        parser.error("give an experiment file: --cfg-path train_configs/quickstart.yaml")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
