"""``minivlm generate``: answers about many pictures, in batches, from a folder or a JSONL file to a JSONL file."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from minivlm.evaluation.comparison import speed_of
from minivlm.serve.flags import positive
from minivlm.serve.loading import ServeError, add_arguments, decoding, load_model, parse, stage_of
from minivlm.serve.ocr import OCR
from minivlm.serve.records import AnswerFile, read_records, record_name, to_sample
from minivlm.types import Encoded, Sample, SampleError

if TYPE_CHECKING:
    from minivlm.processors.processor import VLMProcessor
    from minivlm.serve.chat import Chat
    from minivlm.types import Batch

PROMPT = "Describe this image in detail."
_SHOWN = 10
"""Failed records that the summary names."""
_PRINT_EVERY = 60
"""Seconds between lines of progress where there is no terminal."""


def main(argv: Sequence[str] | None = None) -> int:
    """Answer all records; returns 0, or 1 if some could not be answered.

    Raises ConfigError, ServeError, DatasetError, ModelError or CheckpointError for what the user can put right.
    """
    arguments = parse(_parser(), argv)
    stage = stage_of(arguments)
    source = Path(arguments.input)
    images = Path(arguments.images) if arguments.images else source if source.is_dir() else source.parent
    if not images.is_dir():
        raise ServeError(f"--images: there is no folder {images}")
    ocr = OCR(stage.demo.ocr_confidence) if arguments.ocr or stage.demo.ocr else None
    records = read_records(source, arguments.prompt)
    answers = AnswerFile(Path(arguments.output), records)
    if kept := len(records) - len(answers.todo):
        print(f"{kept} of {len(records)} records were answered before", file=sys.stderr)
    speed = ""
    if answers.todo:
        model, processor = load_model(stage, arguments)
        from minivlm.serve.chat import Chat

        chat = Chat(model, processor, **decoding(stage.demo))
        sizes = {"batch_size": arguments.batch_size, "num_workers": arguments.num_workers}
        try:
            with answers:
                speed = answer_records(chat, answers, images, **sizes, seed=stage.run.seed, ocr=ocr)
        except KeyboardInterrupt:
            print(f"\n{len(answers.todo)} records are left; the same command goes on with them", file=sys.stderr)
            raise
    answers.finish()
    return _summary(answers, speed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minivlm generate", description="Answers about many pictures, in batches.")
    add_arguments(parser)
    parser.add_argument("--input", required=True, help="folder of pictures, or JSONL: {image, prompt or question, ...}")
    parser.add_argument("--output", required=True, help="JSONL: the records with `answer`; an earlier run is continued")
    parser.add_argument("--images", help="folder of the pictures of a JSONL file (default: the file's own)")
    parser.add_argument("--prompt", default=PROMPT, help=f"for records without one (default: {PROMPT})")
    parser.add_argument("--batch-size", type=positive, default=8, help="records at a time (default 8)")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that read pictures (default 0)")
    parser.add_argument("--ocr", action="store_true", help="add the text in the pictures to every question (demo.ocr)")
    # Whatever section demo says: many answers are wanted to be the same the next time.
    parser.set_defaults(temperature=0.0)
    return parser


def answer_records(
    chat: Chat,
    answers: AnswerFile,
    images: Path,
    *,
    batch_size: int,
    num_workers: int = 0,
    seed: int = 0,
    ocr: OCR | None = None,
) -> str:
    """Answer what is left to do, records of similar length together; ``chat`` says how. Returns what it says of speed.

    A record that cannot be used gets its line with an ``error``. A question has the same prompt as in a
    conversation, so that with greedy decoding the answers are those that :meth:`Chat.ask` gives one by one; ``ocr``
    adds the text in its pictures.
    """
    import torch

    from minivlm.tasks.base import batches_by_length, evaluating

    torch.manual_seed(seed)
    processor = chat.processor
    samples: list[Sample] = []
    numbers = {record_name(number, answers.records[number]): number for number in answers.todo}
    tokens, seconds = 0, 0.0
    with _progress(len(numbers)) as advance:

        def fail(error: SampleError) -> None:
            answers.add(numbers[error.sample_id], "error", error.reason)
            advance(1)

        for name, number in numbers.items():
            try:
                with_images = processor.template.with_images
                samples.append(to_sample(name, answers.records[number], images, with_images, sees=chat.sees))
            except SampleError as error:
                fail(error)
        encode = partial(_encode, processor, chat.context_length(), ocr)
        collate = partial(processor.collate, for_generation=True)
        with evaluating(chat.model):
            for places, batch, bad in batches_by_length(samples, encode, collate, batch_size, num_workers):
                for each in bad:
                    fail(each)
                if batch is None:
                    continue
                start = time.perf_counter()
                texts, count = _answers(chat, batch)
                tokens, seconds = tokens + count, seconds + time.perf_counter() - start
                for place, text in zip(places, texts, strict=True):
                    answers.add(numbers[samples[place].id], "answer", text)
                advance(len(places))
    return speed_of(tokens, seconds)


def _encode(processor: VLMProcessor, limit: int, ocr: OCR | None, sample: Sample) -> Encoded:
    """The prompt of a question as a conversation has it."""
    if ocr is not None:
        sample = _with_text(sample, ocr)
    encoded = processor.prompt_sample(sample, chat=True)
    if (size := len(encoded.input_ids)) >= limit:
        pictures = processor.describe_pictures(len(sample.images))
        reason = f"the prompt has {size} tokens{pictures} and the model takes {limit}"
        raise SampleError(sample.id, f"{reason}; shorten it, or use fewer pictures")
    return encoded


def _with_text(sample: Sample, ocr: OCR) -> Sample:
    """The question with the text in its pictures."""
    (question,) = sample.messages
    try:
        text = f"{question.content}{ocr.reference(sample.images)}"
    except OSError:
        return sample  # the processor says what is wrong with the picture
    return replace(sample, messages=[replace(question, content=text)])


def _answers(chat: Chat, batch: Batch) -> tuple[list[str], int]:
    """The answers to a batch of prompts, and how many tokens they have, without those that fill up rows."""
    import torch

    from minivlm.serve.chat import sampling_options

    options = chat.processor.generation_options() | sampling_options(chat.options)
    room = chat.context_length() - batch.input_ids.shape[1]
    options["max_new_tokens"] = min(options["max_new_tokens"], room)
    try:
        ids = chat.model.generate(batch.to(chat.model.device), **options).cpu()
    except torch.OutOfMemoryError as error:
        size = len(batch.input_ids)
        raise ServeError(
            f"{size} records at a time need more memory than {chat.model.device} has; run the command again with "
            f"--batch-size {max(1, size // 2)}, it goes on where it stopped"
        ) from error
    return chat.processor.decode(ids), int((ids != options["pad_token_id"]).sum())


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """``advance(records)`` for a bar; without a terminal a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn()
    start = printed = time.perf_counter()
    done = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, speed="")

        def advance(records: int) -> None:
            nonlocal done, printed
            done += records
            now = time.perf_counter()
            speed = f"{done / (now - start):.1f} records/s"
            bar.update(task, completed=done, speed=speed)
            if not console.is_terminal and (now - printed > _PRINT_EVERY or done == total):
                left = (now - start) / done * (total - done)
                console.print(f"{done} of {total} records, {speed}, {left:.0f} s left")
                printed = now

        yield advance


def _summary(answers: AnswerFile, speed: str) -> int:
    failed = answers.failed
    print(f"{len(answers.records) - len(failed)} answers in {answers.path}" + (f" ({speed})" if speed else ""))
    if not failed:
        return 0
    print(f"{len(failed)} records could not be answered; run the command again when they are mended:", file=sys.stderr)
    for number, reason in sorted(failed.items())[:_SHOWN]:
        print(f"  {record_name(number, answers.records[number])}: {reason}", file=sys.stderr)
    if len(failed) > _SHOWN:
        print(f"  ... and {len(failed) - _SHOWN} more: their lines have the key `error`", file=sys.stderr)
    return 1
