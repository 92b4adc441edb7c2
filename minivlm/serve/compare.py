"""``minivlm compare``: models asked about a folder of pictures, one after the other; answers, scores, a page."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivlm.config.experiment import StageConfig
from minivlm.evaluation.comparison import Comparison, draw_comparison, render_html, speed, speed_of
from minivlm.evaluation.report import percent
from minivlm.io import atomic_file, write_atomic, write_json
from minivlm.registry import suggest
from minivlm.serve.flags import apply_flags
from minivlm.serve.generate import PROMPT
from minivlm.serve.loading import ServeError, add_loading, decoding, load_model, read_stage
from minivlm.serve.records import AnswerFile, Record, read_records
from minivlm.types import SampleError

if TYPE_CHECKING:
    from minivlm.serve.chat import Chat

FACTS = ("tokens", "seconds")
"""What a line of ``answers.jsonl`` says of its answer."""


def main(argv: Sequence[str]) -> int:
    """Ask every model about every picture; returns 0, or 1 if some could not be answered.

    Raises ConfigError, ServeError, DatasetError, ModelError or CheckpointError for what the user can put right.
    """
    arguments = _parser().parse_args(argv)
    folder = Path(arguments.images)
    if not folder.is_dir():
        raise ServeError(f"--images: there is no folder {folder}")
    names = labels(arguments.models)
    stages = [apply_flags(read_stage(model), arguments) for model in arguments.models]
    pictures = read_records(folder, arguments.question)
    keywords = read_keywords(arguments.keywords, [record["image"] for record in pictures])
    records = [
        {"model": model, **picture, "decoding": decoding(stage.demo)}
        for model, stage in zip(arguments.models, stages, strict=True)
        for picture in pictures
    ]
    output = Path(arguments.output)
    answers = AnswerFile(output / "answers.jsonl", records, FACTS)
    if kept := len(records) - len(answers.todo):
        note = f"{kept} of {len(records)} answers are kept from an earlier run; delete {answers.path} to ask again"
        print(f"note: {note}", file=sys.stderr)
    if answers.todo:
        _ask_all(answers, stages, names, folder, arguments)
    answers.finish()
    lines = [line or {} for line in answers.lines()]
    size = len(pictures)
    rows = [lines[start : start + size] for start in range(0, len(lines), size)]
    asked = [record["image"] for record in pictures]
    found = Comparison(arguments.question, folder, asked, names, rows, keywords)
    write_report(found, output)
    return _summary(found, output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minivlm compare", description="Ask models about a folder of pictures and show their answers side by side."
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="experiment file, or a folder that minivlm wrote")
    parser.add_argument("--images", required=True, metavar="FOLDER", help="the pictures, at any depth")
    parser.add_argument("--question", default=PROMPT, help=f"asked about every picture (default: {PROMPT})")
    text = "JSON: {picture: [words]}; an answer with one of its words is right"
    parser.add_argument("--keywords", type=Path, metavar="FILE", help=text)
    parser.add_argument("--output", required=True, metavar="FOLDER", help="for the report; an earlier run is continued")
    add_loading(parser)
    parser.set_defaults(temperature=0.0)  # as in generate: the same answers the next time
    return parser


def labels(models: Sequence[str]) -> list[str]:
    """What the columns are called: the paths without what they have in common. Raises :class:`ServeError`."""
    paths = [os.path.abspath(model) for model in models]
    if twice := next((model for model, path in zip(models, paths, strict=True) if paths.count(path) > 1), None):
        raise ServeError(f"{twice} is named twice")
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [Path(os.path.relpath(path, common)).as_posix() for path in paths]


def read_keywords(path: Path | None, pictures: Sequence[str]) -> dict[str, list[str]]:
    """The words of every picture, which the file names with or without its ending. Raises :class:`ServeError`."""
    if path is None:
        return {}
    try:
        written = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ServeError(f"--keywords: {path} cannot be read: {error}") from error
    if not isinstance(written, dict):
        raise ServeError(f"--keywords: {path} must hold {{picture: [words]}}")
    known = {os.path.splitext(name)[0]: name for name in pictures} | {name: name for name in pictures}
    found: dict[str, list[str]] = {}
    for name, words in written.items():
        if name not in known:
            raise ServeError(f"--keywords: {path} names '{name}', which is no picture here{suggest(name, known)}")
        words = [words] if isinstance(words, str) else words
        if not isinstance(words, list) or not words or not all(isinstance(w, str) and w.strip() for w in words):
            raise ServeError(f"--keywords: {path}: '{name}' needs a word or a list of words")
        found[known[name]] = [word.strip() for word in words]
    return found


def _ask_all(
    answers: AnswerFile, stages: Sequence[StageConfig], names: Sequence[str], folder: Path, arguments: Any
) -> None:
    """One model in memory at a time; one that has nothing left to answer is not loaded."""
    size = len(answers.records) // len(stages)
    try:
        with answers:
            _leave_out_unreadable(answers, folder)
            todo = answers.todo
            for place, (stage, name) in enumerate(zip(stages, names, strict=True)):
                numbers = [number for number in todo if number // size == place]
                if numbers:
                    print(f"\n{name} ({place + 1} of {len(stages)})", flush=True)
                    _ask_model(answers, numbers, stage, folder, arguments)
                    gc.collect()
    except KeyboardInterrupt:
        print(f"\n{len(answers.todo)} answers are left; the same command goes on with them", file=sys.stderr)
        raise


def _leave_out_unreadable(answers: AnswerFile, folder: Path) -> None:
    from minivlm.processors.image import open_image

    reasons: dict[str, str] = {}
    for number in answers.todo:
        name = answers.records[number]["image"]
        if name not in reasons:
            try:
                open_image(folder / name)
                reasons[name] = ""
            except OSError as error:
                reasons[name] = str(error)
        if reasons[name]:
            answers.add(number, "error", reasons[name])


def _ask_model(answers: AnswerFile, numbers: Sequence[int], stage: StageConfig, folder: Path, arguments: Any) -> None:
    import torch

    from minivlm.serve.chat import Chat

    model, processor = load_model(stage, arguments)
    chat = Chat(model, processor, **decoding(stage.demo))
    for number in numbers:
        record = answers.records[number]
        print(f"\n[Image]: {record['image']}\n[Q]: {record['prompt']}\n[A]: ", end="", flush=True)
        chat.reset()
        torch.manual_seed(stage.run.seed)  # for every picture: a run that goes on answers the same
        try:
            text = _print_growing(chat, record, folder)
        except SampleError as error:
            print(f"(no answer) {error.reason}")
            answers.add(number, "error", error.reason)
            continue
        print(f"\n({speed_of(chat.num_tokens, chat.seconds)})", flush=True)
        answers.add(number, "answer", text, tokens=chat.num_tokens, seconds=round(chat.seconds, 4))


def _print_growing(chat: Chat, record: Record, folder: Path) -> str:
    """Print the answer as it comes; returns the whole."""
    shown = ""
    with closing(chat.stream(record["prompt"], [folder / record["image"]])) as stream:  # type: ignore[type-var]
        for text in stream:
            if not text.startswith(shown):  # the tokenizer has changed its mind about a character
                print("\n[A]: ", end="")
                shown = ""
            print(text[len(shown) :], end="", flush=True)
            shown = text
    return shown


def write_report(found: Comparison, output: Path) -> None:
    """Write ``results.json``, ``report.html`` and, with matplotlib, ``report.png``."""
    results: Mapping[str, Any] = {"question": found.question, "models": found.scores()}
    write_json(output / "results.json", results)
    write_atomic(output / "report.html", render_html(found, "Models side by side"))
    try:
        with atomic_file(output / "report.png") as file:
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
    bad = [
        f"  {name}: {error}"
        for number, name in enumerate(found.pictures)
        if (error := next((line["error"] for lines in found.answers if "error" in (line := lines[number])), None))
    ]
    if bad:
        print(f"{len(bad)} of {len(found.pictures)} pictures could not be used:", *bad, sep="\n", file=sys.stderr)
    return 1 if bad else 0
