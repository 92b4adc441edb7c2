"""Scores of visual question answering: overall, per question type, and of two baselines.

Pure Python: nothing here needs torch or a model.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from minivlm import registry
from minivlm.evaluation.exact_match import exact_match
from minivlm.evaluation.text import normalise
from minivlm.types import IMAGE_MARKER, Sample, SampleError

Metric = Callable[[str, Sequence[str]], float]
"""Takes a prediction and the accepted answers and returns a value from 0 to 1."""


@dataclass(frozen=True)
class Prediction:
    """One answered question; ``correct`` is what the metric says, from 0 to 1."""

    sample_id: str
    question: str
    question_type: str
    prediction: str
    answers: list[str]
    correct: float

    @property
    def is_right(self) -> bool:
        """Whether the answer counts as right where only right and wrong are shown."""
        return self.correct >= 0.5


@dataclass(frozen=True)
class TypeScore:
    """Accuracy (0 to 1) over ``count`` questions."""

    accuracy: float
    count: int


@dataclass(frozen=True)
class VQAScore:
    """Accuracy over all questions and per type; ``balanced`` is the mean of the types."""

    accuracy: float
    balanced: float
    count: int
    by_type: dict[str, TypeScore] = field(default_factory=dict)

    def flat(self, prefix: str = "") -> dict[str, float]:
        """``{"accuracy": .., "accuracy_balanced": .., "accuracy/<type>": ..}``, each behind ``prefix``."""
        values = {"accuracy": self.accuracy}
        if len(self.by_type) > 1:
            values["accuracy_balanced"] = self.balanced
            values |= {f"accuracy/{name}": part.accuracy for name, part in self.by_type.items()}
        return {prefix + key: value for key, value in values.items()}


@dataclass(frozen=True)
class Question:
    """What is asked about a sample and what answers are accepted."""

    text: str
    type: str
    answers: list[str]


def question_of(sample: Sample) -> Question:
    """The question of a sample: from its ``meta``, else its last user turn and the answer to it.

    Raises :class:`SampleError` if there is no question or no reference answer.
    """
    turns = question_answer_pairs(sample)
    text = sample.meta.get("question") or (turns[-1][0] if turns else "")
    answers = sample.meta.get("answers") or ([turns[-1][1]] if turns else [])
    if not text or not answers:
        raise SampleError(sample.id, "it has no question with a reference answer to be scored against")
    return Question(text, str(sample.meta.get("question_type", "all")), [str(a) for a in answers])


def question_answer_pairs(sample: Sample) -> list[tuple[str, str]]:
    """All user turns with the answer that follows, without picture markers."""
    pairs = []
    for asked, said in zip(sample.messages, sample.messages[1:], strict=False):
        if asked.role == "user" and said.role == "assistant" and said.content is not None:
            pairs.append(((asked.content or "").replace(IMAGE_MARKER, "").strip(), said.content))
    return pairs


def predict(sample: Sample, answer: str, metric: Metric = exact_match) -> Prediction:
    """The scored answer to the question of a sample, by the metric that its ``meta`` names, if it names one."""
    asked = question_of(sample)
    if "metric" in sample.meta:
        metric = registry.get("metric", sample.meta["metric"])
    value = float(metric(answer, asked.answers))
    return Prediction(sample.id, asked.text, asked.type, answer, asked.answers, value)


def score(records: Iterable[Prediction]) -> VQAScore:
    """Accuracy over all records and per question type; raises ValueError if there are none."""
    groups: dict[str, list[float]] = defaultdict(list)
    for record in records:
        groups[record.question_type].append(record.correct)
    if not groups:
        raise ValueError("there is no prediction to score")
    by_type = {name: TypeScore(sum(v) / len(v), len(v)) for name, v in sorted(groups.items())}
    count = sum(part.count for part in by_type.values())
    return VQAScore(
        accuracy=sum(sum(values) for values in groups.values()) / count,
        balanced=sum(part.accuracy for part in by_type.values()) / len(by_type),
        count=count,
        by_type=by_type,
    )


def majority_baseline(
    train_samples: Sequence[Sample], eval_samples: Sequence[Sample], metric: Metric = exact_match
) -> list[Prediction]:
    """What can be scored without looking: the most frequent training answer to the same question.

    A question that training never asks gets the most frequent training answer of all. Of equal counts,
    the answer that training gives first is taken. Raises ValueError if the training split has no
    answered question.
    """
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for number in range(len(train_samples)):
        try:
            pairs = _reference_pairs(train_samples[number])
        except SampleError:
            continue
        for question, answer in pairs:
            by_question[normalise(question)][answer] += 1
            overall[answer] += 1
    if not overall:
        raise ValueError("the training split has no answered question to take the majority answer from")
    default = overall.most_common(1)[0][0]
    best = {question: counts.most_common(1)[0][0] for question, counts in by_question.items()}
    return [predict(s, best.get(normalise(question_of(s).text), default), metric) for s in eval_samples]


def _reference_pairs(sample: Sample) -> list[tuple[str, str]]:
    """Questions with an answer: those of ``meta``, else those of the turns; captions answer none."""
    if sample.meta.get("question") and sample.meta.get("answers"):
        return [(str(sample.meta["question"]), str(answer)) for answer in sample.meta["answers"]]
    return [(question, answer) for question, answer in question_answer_pairs(sample) if question]


def shuffle_pictures(samples: Sequence[Sample], seed: int = 0) -> dict[int, Sample]:
    """Copies of the samples with the pictures of others, for the baseline of a model that cannot see.

    Pictures move only between samples with equally many, so markers still fit, and no sample keeps one
    of its own. The answer goes by the sample's number; samples for which that is impossible are left
    out: those without a picture, and some of those whose picture more than half of the samples share.
    The same seed gives the same result.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for number, sample in enumerate(samples):
        if sample.images:
            groups[len(sample.images)].append(number)
    keys = [_picture_key(sample) for sample in samples]
    pairs = [pair for group in groups.values() for pair in _derange(group, keys, seed)]
    return {number: replace(samples[number], images=list(samples[other].images)) for number, other in sorted(pairs)}


def _derange(group: list[int], keys: list[tuple[Any, ...]], seed: int) -> list[tuple[int, int]]:
    by_picture: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for number in group:
        by_picture[keys[number]].append(number)
    blocks = list(by_picture.values())
    random.Random(seed).shuffle(blocks)
    row = [number for block in blocks for number in block]
    # Samples of one picture stand together, so a shift by the longest block leaves none in its own.
    shift = max(len(block) for block in blocks)
    pairs = [(number, row[(place + shift) % len(row)]) for place, number in enumerate(row)]
    return [(a, b) for a, b in pairs if not set(keys[a]) & set(keys[b])]


def _picture_key(sample: Sample) -> tuple[Any, ...]:
    return tuple(id(image) if hasattr(image, "tobytes") else str(image) for image in sample.images)


def evenly_spaced(count: int, limit: int | None) -> list[int]:
    """At most ``limit`` of the numbers 0 to ``count - 1``, spread evenly over them."""
    if limit is None or limit >= count:
        return list(range(count))
    return [number * count // limit for number in range(limit)]
