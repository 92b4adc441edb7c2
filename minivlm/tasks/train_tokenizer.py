"""``minivlm train-tokenizer``: from files of text to a folder that ``language_model.tokenizer`` takes."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from minivlm.config.experiment import Experiment
from minivlm.config.loader import load_config, parse_model
from minivlm.datasets.base import DatasetError
from minivlm.datasets.texts import experiment_texts, read_texts
from minivlm.io import atomic_folder, readable_size
from minivlm.processors.configs import TemplateConfig
from minivlm.processors.tokenizer import TokenizerError
from minivlm.processors.train_tokenizer import bytes_per_token, tokens_of_template, train_tokenizer

HELD_OUT_EVERY = 20
"""One text in so many is not learned from: 5 %."""
MOST_HELD_OUT = 10_000
_PRINT_EVERY = 10
"""Seconds between lines of progress."""


def main(argv: Sequence[str]) -> int:
    """Train one tokenizer. Raises ConfigError, RegistryError, DatasetError or TokenizerError for bad input."""
    parser = argparse.ArgumentParser(
        prog="minivlm train-tokenizer",
        description="Train a byte-level BPE tokenizer on files of text, or on the data of an experiment.",
    )
    text = ".txt; .json or .jsonl of text or turns; experiment file (.yaml), whose training data say the texts"
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help=text)
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="new or empty folder")
    parser.add_argument("--vocab-size", type=int, default=6400, help="entries, special tokens included (default 6400)")
    text = "whose special tokens it has (default minimind_v1: <unk> <s> </s>; minimind_v3: ChatML)"
    parser.add_argument("--template", default="minimind_v1", help=text)
    parser.add_argument("--special", nargs="+", default=(), metavar="TOKEN", help="more special tokens")
    arguments = parser.parse_args(argv)
    output = arguments.output
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise TokenizerError(f"--output: {output} exists and is not an empty folder; name another one")
    template = _template(arguments.template)
    try:
        tokens = tokens_of_template(template, arguments.special)
    except TokenizerError as error:
        raise TokenizerError(f"--template {arguments.template}: {error}; minimind_v1 and minimind_v3 do") from error
    corpus = Corpus(arguments.inputs, template)
    with atomic_folder(output) as folder:
        tokenizer = train_tokenizer(corpus, folder, arguments.vocab_size, tokens=tokens)
    print(f"{output}: {summary(tokenizer, corpus)}")
    if len(tokenizer) < arguments.vocab_size:
        print(
            f"note: there is too little text for {arguments.vocab_size:,} entries; "
            f"set the model's vocab_size to {len(tokenizer)} or give more text",
            file=sys.stderr,
        )
    return 0


def _template(name: str) -> TemplateConfig:
    template = parse_model({"checkpoint": "", "template": {"name": name}}, "--template").template
    assert template
    config: TemplateConfig = template.config
    return config


class Corpus(Iterable[str]):
    """The texts to learn from, with lines of progress; ``held_out`` are kept back while it is read.

    ``template`` writes the samples of experiments that name none.
    """

    def __init__(self, paths: Sequence[Path], template: TemplateConfig):
        self.paths = paths
        self.template = template
        self.held_out: list[str] = []
        self._sources = [_source(path) for path in paths]  # a typo in an experiment file shows before all reading

    def _texts(self) -> Iterator[str]:
        for source in self._sources:
            if isinstance(source, Experiment):
                yield from experiment_texts(source, self.template)
            else:
                yield from read_texts([source])

    def __iter__(self) -> Iterator[str]:
        self.held_out.clear()
        number = size = 0
        start = printed = time.perf_counter()
        for number, text in enumerate(self._texts(), 1):
            size += len(text.encode("utf-8"))
            if (now := time.perf_counter()) - printed > _PRINT_EVERY:
                print(f"{number:,} texts, {readable_size(size)} read, {now - start:.0f} s", file=sys.stderr, flush=True)
                printed = now
            if number % HELD_OUT_EVERY == 0 and len(self.held_out) < MOST_HELD_OUT:
                self.held_out.append(text)
            else:
                yield text
        if not size:
            raise DatasetError(f"there is no text in {', '.join(map(str, self.paths))}")
        print(f"{number:,} texts, {readable_size(size)} read; learning", file=sys.stderr, flush=True)


def _source(path: Path) -> Path | Experiment:
    return load_config(path) if path.suffix.lower() in (".yaml", ".yml") else path


def summary(tokenizer: Any, corpus: Corpus) -> str:
    """Entries, and how short text becomes that was not learned from."""
    entries = f"{len(tokenizer):,} entries"
    if not any(corpus.held_out):
        return f"{entries}; too few texts to hold some out"
    ratio = bytes_per_token(tokenizer, corpus.held_out)
    return f"{entries}, {ratio:.2f} bytes per token on {len(corpus.held_out):,} held-out texts"
