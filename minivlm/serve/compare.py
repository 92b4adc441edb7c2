"""``minivlm compare``: models asked about the same pictures, one after the other; answers, scores, a page."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivlm.config.experiment import StageConfig
from minivlm.evaluation.comparison import Asked, Comparison, draw_comparison, render_html, speed, speed_of
from minivlm.evaluation.report import percent
from minivlm.io import atomic_file, write_atomic, write_json
from minivlm.serve.asked import ask_dataset, ask_folder
from minivlm.serve.flags import apply_flags, positive
from minivlm.serve.generate import PROMPT
from minivlm.serve.loading import ServeError, add_loading, decoding, load_model, read_stage, weights_written
from minivlm.serve.records import AnswerFile
from minivlm.types import SampleError

if TYPE_CHECKING:
    from minivlm.serve.chat import Chat

FACTS = ("tokens", "seconds")
"""What a line of ``answers.jsonl`` says of its answer."""
QUESTIONS = 24
PICTURE = "report.png"
_SHOWN = 3
"""Pictures that the summary names of those for which the same answers are missing."""


def main(argv: Sequence[str]) -> int:
    """Ask every model every question; returns 0, or 1 if some could not be answered.

    Raises ConfigError, ServeError, DatasetError, ModelError or CheckpointError for what the user can put right.
    """
    arguments = _parser().parse_args(argv)
    title, asked = _what_to_ask(arguments)
    names = labels(arguments.models)
    stages = [apply_flags(read_stage(model), arguments) for model in arguments.models]
    models = [
        {"model": model, "weights_written": weights_written(stage), "decoding": decoding(stage.demo)}
        for model, stage in zip(arguments.models, stages, strict=True)
    ]
    records = [{**model, "image": each.name, "prompt": each.question} for model in models for each in asked]
    output = Path(arguments.output)
    answers = AnswerFile(output / "answers.jsonl", records, FACTS, versions=("weights_written",))
    if answers.outdated:
        note = f"{answers.outdated} answers of an earlier run are asked for again: the weights are others now"
        print(f"note: {note}", file=sys.stderr)
    if kept := len(records) - len(answers.todo):
        note = f"{kept} of {len(records)} answers are kept from an earlier run; delete {answers.path} to ask again"
        print(f"note: {note}", file=sys.stderr)
    if answers.todo:
        _ask_all(answers, stages, names, asked, arguments)
    answers.finish()
    lines = [line or {} for line in answers.lines()]
    rows = [lines[start : start + len(asked)] for start in range(0, len(lines), len(asked))]
    found = Comparison(title, asked, names, rows)
    write_report(found, output)
    return _summary(found, output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minivlm compare", description="Ask models about the same pictures and show their answers side by side."
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="experiment file, or a folder that minivlm wrote")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", metavar="FOLDER", help="the pictures, at any depth")
    text = "experiment file whose data hold pictures, questions and right answers (those of its last stage)"
    source.add_argument("--data", metavar="YAML", help=text)
    parser.add_argument("--question", help=f"asked about every picture of --images (default: {PROMPT})")
    text = "JSON: {picture: [words]} of --images; an answer with one of its words is right"
    parser.add_argument("--keywords", type=Path, metavar="FILE", help=text)
    parser.add_argument("--split", help="of --data (default: test)")
    text = f"questions of --data, evenly spaced over the split (default: {QUESTIONS})"
    parser.add_argument("--max-samples", type=positive, metavar="N", help=text)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="for the report; an earlier run is continued")
    add_loading(parser)
    parser.set_defaults(temperature=0.0)  # as in generate: the same answers the next time
    return parser


def _what_to_ask(arguments: argparse.Namespace) -> tuple[str, list[Asked]]:
    """The questions, and what stands above them."""
    source, other = ("--images", ("split", "max_samples")) if arguments.images else ("--data", ("question", "keywords"))
    for flag in other:
        if getattr(arguments, flag) is not None:
            raise ServeError(f"--{flag.replace('_', '-')} says nothing with {source}; leave it out")
    if arguments.images:
        question = arguments.question or PROMPT
        report = Path(arguments.output) / PICTURE
        return question, ask_folder(Path(arguments.images), question, arguments.keywords, report)
    split = arguments.split or "test"
    return f"{arguments.data}: {split}", ask_dataset(arguments.data, split, arguments.max_samples or QUESTIONS)


def labels(models: Sequence[str]) -> list[str]:
    """What the columns are called: the paths without what they have in common. Raises :class:`ServeError`."""
    paths = [os.path.abspath(model) for model in models]
    if twice := next((model for model, path in zip(models, paths, strict=True) if paths.count(path) > 1), None):
        raise ServeError(f"{twice} is named twice")
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [Path(os.path.relpath(path, common)).as_posix() for path in paths]


def _ask_all(
    answers: AnswerFile, stages: Sequence[StageConfig], names: Sequence[str], asked: Sequence[Asked], arguments: Any
) -> None:
    """One model in memory at a time; one that has nothing left to answer is not loaded."""
    try:
        with answers:
            _leave_out_unreadable(answers, asked)
            todo = answers.todo
            for place, (stage, name) in enumerate(zip(stages, names, strict=True)):
                numbers = [number for number in todo if number // len(asked) == place]
                if numbers:
                    print(f"\n{name} ({place + 1} of {len(stages)})", flush=True)
                    _ask_model(answers, numbers, stage, asked, arguments)
                    gc.collect()
    except KeyboardInterrupt:
        print(f"\n{len(answers.todo)} answers are left; the same command goes on with them", file=sys.stderr)
        raise


def _leave_out_unreadable(answers: AnswerFile, asked: Sequence[Asked]) -> None:
    from minivlm.processors.image import open_image

    reasons: dict[int, str] = {}
    for number in answers.todo:
        place = number % len(asked)
        if place not in reasons:
            try:
                open_image(asked[place].picture)
                reasons[place] = ""
            except OSError as error:
                reasons[place] = str(error)
        if reasons[place]:
            answers.add(number, "error", reasons[place])


def _ask_model(
    answers: AnswerFile, numbers: Sequence[int], stage: StageConfig, asked: Sequence[Asked], arguments: Any
) -> None:
    import torch

    from minivlm.serve.chat import Chat

    model, processor = load_model(stage, arguments)
    chat = Chat(model, processor, **decoding(stage.demo))
    for number in numbers:
        each = asked[number % len(asked)]
        print(f"\n[Image]: {each.name}\n[Q]: {each.text}\n[A]: ", end="", flush=True)
        chat.reset()
        torch.manual_seed(stage.run.seed)  # for every picture: a run that goes on answers the same
        try:
            text = _print_growing(chat, each)
        except SampleError as error:
            print(f"(no answer) {error.reason}")
            answers.add(number, "error", error.reason)
            continue
        print(f"\n({speed_of(chat.num_tokens, chat.seconds)})", flush=True)
        answers.add(number, "answer", text, tokens=chat.num_tokens, seconds=round(chat.seconds, 4))


def _print_growing(chat: Chat, asked: Asked) -> str:
    """Print the answer as it comes; returns the whole."""
    shown = ""
    with closing(chat.stream(asked.question, [asked.picture])) as stream:  # type: ignore[type-var]
        for text in stream:
            if not text.startswith(shown):  # the tokenizer has changed its mind about a character
                print("\n[A]: ", end="")
                shown = ""
            print(text[len(shown) :], end="", flush=True)
            shown = text
    return shown


def write_report(found: Comparison, output: Path) -> None:
    """Write ``results.json``, ``report.html`` and, with matplotlib, ``report.png``."""
    results: Mapping[str, Any] = {"question": found.title, "models": found.scores()}
    write_json(output / "results.json", results)
    write_atomic(output / "report.html", render_html(found, "Models side by side"))
    try:
        with atomic_file(output / PICTURE) as file:
            if not draw_comparison(found, file):
                print("note: report.png lacks signs that no font here has; report.html has them", file=sys.stderr)
    except ImportError:
        print("note: there is no report.png without matplotlib", file=sys.stderr)


def _summary(found: Comparison, output: Path) -> int:
    print()
    for score in found.scores():
        right = f"{score['hits']} of {score['scored']} right ({percent(score['share'])}), " if score["scored"] else ""
        print(f"{score['model']}: {right}{score['answered']} answers, {speed(score['tokens_per_second'])} tokens/s")
    print(f"report: {output / 'report.html'}")
    missing = sum(score["failed"] for score in found.scores())
    if missing:
        total = len(found.models) * len(found.asked)
        print(f"{missing} of {total} answers are missing:", *_reasons(found), sep="\n", file=sys.stderr)
    return 1 if missing else 0


def _reasons(found: Comparison) -> list[str]:
    """Why answers are missing: a line a reason, with its pictures, and its models if others have answered."""
    pictures: dict[str, dict[str, None]] = defaultdict(dict)  # of strings in their order
    models: dict[str, dict[str, None]] = defaultdict(dict)
    for model, lines in zip(found.models, found.answers, strict=True):
        for each, line in zip(found.asked, lines, strict=True):
            if "error" in line:
                pictures[line["error"]][each.name] = models[line["error"]][model] = None
    texts = []
    for reason, names in pictures.items():
        text = ", ".join(list(names)[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        by = f" ({', '.join(models[reason])})" if len(models[reason]) < len(found.models) else ""
        texts.append(f"  {text}{by}: {reason}")
    return texts
