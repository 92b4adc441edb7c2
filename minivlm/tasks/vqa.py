"""Visual question answering: greedy answers, accuracy per question type, two baselines, a report."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minivlm import registry
from minivlm.datasets.base import DatasetError
from minivlm.evaluation.vqa import (
    Metric,
    Prediction,
    evenly_spaced,
    majority_baseline,
    predict,
    question_of,
    score,
    shuffle_pictures,
)
from minivlm.tasks.base import EvalBatches, Progress, Task, TaskProcessor, collect, evaluating
from minivlm.types import Sample, SampleError

if TYPE_CHECKING:
    from rich.table import Table

log = logging.getLogger(__name__)


class VQATask(Task):
    """Answers questions and counts how many are right.

    ``metric`` names an entry of the registry's kind ``metric``; ``shuffled_samples`` caps the baseline
    with shuffled pictures, which costs a second pass.
    """

    metric_name = "accuracy"
    higher_is_better = True
    metric: str = "exact_match"
    shuffled_samples: int = 2000

    def evaluate(
        self,
        model: Any,
        processor: TaskProcessor,
        samples: Sequence[Sample],
        *,
        device: torch.device | str,
        max_samples: int | None = None,
        progress: Progress | None = None,
        report_dir: str | Path | None = None,
        train_samples: Sequence[Sample] | None = None,
        full: bool = False,
    ) -> dict[str, float]:
        """``{"accuracy": .., "accuracy/<question type>": ..}``, values from 0 to 1.

        With ``full`` also ``majority/...`` (from ``train_samples``) and ``shuffled/...`` (the same model
        with the pictures of other samples). With ``report_dir``, writes ``results.json``,
        ``predictions.jsonl``, ``grid.png`` and ``report.html`` there. For errors see :class:`Task`.
        """
        metric: Metric = registry.get("metric", self.metric)
        chosen, bad = self._questions(samples, max_samples)
        extra = min(len(chosen), self.shuffled_samples) if full else 0
        with evaluating(model):
            ask = partial(self._answer, model, processor, device=device)
            answers = ask(chosen, bad, progress=_shifted(progress, 0, len(chosen) + extra))
            if not answers:
                raise DatasetError("the evaluation split has no sample that can be used")
            numbers = sorted(answers)  # of the samples whose pictures and prompts were in order
            answered = [chosen[number] for number in numbers]
            shuffled = self._shuffled(answered) if full else {}
            shift = len(answered), len(answered) + len(shuffled)
            blind = ask(list(shuffled.values()), [], progress=_shifted(progress, *shift))
        predictions = [predict(chosen[number], answers[number], metric) for number in numbers]
        baselines: dict[str, dict[int, Prediction]] = {}
        if full and train_samples is not None:
            baselines["majority"] = dict(enumerate(majority_baseline(train_samples, answered, metric)))
        if blind:
            places = list(shuffled)
            baselines["shuffled"] = {
                places[n]: predict(answered[places[n]], answer, metric) for n, answer in sorted(blind.items())
            }
        self.results = self._results(predictions, baselines, bad)
        if report_dir is not None:
            self._write(Path(report_dir), predictions, baselines, answered)
        return self.results["metrics"]

    def render_table(self, results: dict[str, Any] | None = None) -> Table:
        """A table of the score beside its baselines."""
        from minivlm.evaluation.report import render_table

        return render_table(results or self.results)

    def _questions(self, samples: Sequence[Sample], limit: int | None) -> tuple[list[Sample], list[SampleError]]:
        readable, bad = collect(samples, limit)
        good = []
        for sample in readable:
            try:
                question_of(sample)
                good.append(sample)
            except SampleError as error:
                bad.append(error)
        return good, bad

    def _shuffled(self, samples: list[Sample]) -> dict[int, Sample]:
        """An evenly spaced part of the samples with the pictures of others, by the sample's number."""
        places = evenly_spaced(len(samples), self.shuffled_samples)
        moved = shuffle_pictures([samples[place] for place in places], seed=self.run.seed)
        return {places[number]: sample for number, sample in moved.items()}

    def _answer(
        self,
        model: Any,
        processor: TaskProcessor,
        samples: list[Sample],
        bad: list[SampleError],
        *,
        device: torch.device | str,
        progress: Callable[[int], None],
    ) -> dict[int, str]:
        """The generated answer of every sample that can be encoded, by the sample's number."""
        answers: dict[int, str] = {}
        options = {"max_new_tokens": self.run.max_len, "num_beams": self.run.num_beams}
        if hasattr(processor, "generation_options"):  # end tokens and stop strings of the template
            options |= processor.generation_options()
        for numbers, batch in EvalBatches(self.run, processor, samples, bad, generation=True):
            ids = model.generate(batch.to(device), **options)
            answers |= zip(numbers, processor.decode(ids), strict=True)
            progress(len(answers))
        return answers

    def _results(
        self,
        predictions: list[Prediction],
        baselines: dict[str, dict[int, Prediction]],
        bad: list[SampleError],
    ) -> dict[str, Any]:
        own = score(predictions)
        metrics = own.flat()
        results: dict[str, Any] = {"metrics": metrics, "metric": self.metric, "model": asdict(own)}
        for name, records in baselines.items():
            theirs = score(records.values())
            metrics |= theirs.flat(f"{name}/")
            # A part of the split may be easier than the whole: the model's own score on the same part.
            same = score(predictions[number] for number in records)
            results[name] = asdict(theirs) | {"model_on_same_samples": asdict(same)}
        results["skipped"] = {"count": len(bad), "first": [str(error) for error in bad[:10]]}
        keys = ("max_len", "num_beams", "batch_size_eval", "seed")
        return results | {"settings": {key: getattr(self.run, key) for key in keys}}

    def _write(
        self,
        folder: Path,
        predictions: list[Prediction],
        baselines: dict[str, dict[int, Prediction]],
        samples: list[Sample],
    ) -> None:
        """Writes the numbers first: they must not be lost if a picture cannot be drawn."""
        from minivlm.evaluation.report import write_report

        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.results, indent=2, ensure_ascii=False)
        (folder / "results.json").write_text(text + "\n", encoding="utf-8")
        with open(folder / "predictions.jsonl", "w", encoding="utf-8") as file:
            for number, (record, sample) in enumerate(zip(predictions, samples, strict=True)):
                line = asdict(record)
                line["images"] = [str(image) for image in sample.images if isinstance(image, (str, Path))]
                for name, records in baselines.items():
                    if number in records:
                        line[f"{name}_prediction"] = records[number].prediction
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        try:
            write_report(folder, self.results, predictions, samples, title=self.run.job_name or "")
        except ImportError as error:
            log.warning("no grid.png and report.html in %s: %s", folder, error)


def _shifted(progress: Progress | None, done_before: int, total: int) -> Callable[[int], None]:
    """The progress of one of two passes as progress of both."""

    def report(done: int) -> None:
        if progress:
            progress(done_before + done, total)

    return report
