"""The metric ``vqa_accuracy``."""

from __future__ import annotations

from collections.abc import Sequence

from minivlm.evaluation.exact_match import exact_match
from minivlm.evaluation.text import normalise

PEOPLE = 10


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """min(1, others who said so / 3), the mean over leaving out each of ten people (Antol et al. 2015).

    Texts are compared after :func:`normalise`; numerals and articles stay as they are. With fewer answers any
    one of them is right.
    """
    if len(answers) < PEOPLE:
        return exact_match(prediction, answers)
    same = [normalise(answer) == normalise(prediction) for answer in answers]
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same)
