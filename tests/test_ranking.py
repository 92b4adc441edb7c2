"""Ranking given answers by their loss."""

from __future__ import annotations

from typing import Any

import torch
from helpers import tiny_model

from minivlm.api import assemble
from minivlm.config.loader import parse_model
from minivlm.evaluation.ranking import rank_candidates, sample_losses
from minivlm.types import Message, Sample

CANDIDATES = ["red", "a green shape", "no"]


def parts() -> tuple[Any, Any]:
    torch.manual_seed(0)
    model, processor, _ = assemble(parse_model(tiny_model(), "test"))
    return model.eval(), processor


def question(text: str, answer: str | None = None) -> Sample:
    answers = [] if answer is None else [Message("assistant", answer)]
    return Sample(text, [Message("user", text), *answers])


def test_losses_of_samples_are_those_of_batches_of_one() -> None:
    model, processor = parts()
    samples = [question("what color?", "red"), question("what shape is in the image?", "a green circle")]
    encoded = [processor.encode(sample) for sample in samples]
    together = sample_losses(model, processor.collate(encoded))
    alone = [model(processor.collate([each])).loss for each in encoded]
    torch.testing.assert_close(together, torch.stack(alone))
    counts = torch.tensor([each.num_supervised for each in encoded])
    prompts = torch.tensor([len(each.input_ids) - each.num_supervised for each in encoded])
    positions = (prompts - 1).max() + counts.max()
    by_position = sample_losses(model, processor.collate(encoded), per="position")
    torch.testing.assert_close(by_position, together * counts / positions)


def test_the_likeliest_comes_first() -> None:
    model, processor = parts()
    samples = [question("what color?"), question("is it red?", "an answer that is replaced")]
    ranks = rank_candidates(model, processor, samples, CANDIDATES)
    for sample, order in zip(samples, ranks):
        losses = [
            float(model(processor.collate([processor.encode(question(sample.messages[0].content, c))])).loss)
            for c in CANDIDATES
        ]
        assert order == sorted(range(len(CANDIDATES)), key=lambda i: losses[i])
