"""The task: what is measured on a split, during and after training."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.utils.data import Dataset

from minivlm.config.experiment import RunConfig
from minivlm.datasets.base import DatasetError
from minivlm.datasets.loading import load
from minivlm.evaluation.vqa import evenly_spaced
from minivlm.types import Batch, Encoded, Sample, SampleError

if TYPE_CHECKING:
    from rich.table import Table

log = logging.getLogger(__name__)

_MOST_NATS = 700.0
"""Above this a perplexity is no number any more."""

Progress = Callable[[int, int], None]
"""Called with the number of finished samples and the number of all."""


class TaskProcessor(Protocol):
    """What a task asks of a processor."""

    def encode(self, sample: Sample) -> Encoded:
        """A training sample as numbers."""

    def prompt_sample(self, sample: Sample) -> Encoded:
        """The prompt for the sample's last answer."""

    def collate(self, encoded: list[Encoded], for_generation: bool = False) -> Batch:
        """A batch, padded on the left for generation."""

    def decode(self, ids: torch.Tensor) -> list[str]:
        """The texts of generated ids [B, T]."""


class Task:
    """Mean loss per supervised token; the base of the tasks that measure something else.

    ``metric_name`` is the key of :meth:`evaluate`'s answer that decides which checkpoint is the best.
    """

    metric_name: str = "loss"
    higher_is_better: bool = False

    def __init__(self, run: RunConfig):
        self.run = run
        self.results: dict[str, Any] = {}
        """What the last :meth:`evaluate` found, more fully than the metrics it returns."""

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
        """Metrics of a split: ``{"loss": nats per supervised token}``.

        ``model`` is the bare model, not its DDP wrapper; it is left in the mode in which it came. With
        ``max_samples``, that many samples are taken, spread evenly over the split. ``report_dir``,
        ``train_samples`` and ``full`` serve tasks that write a report. Raises :class:`DatasetError` if
        nothing can be measured or too many samples are bad (``run.max_bad_share``), and the
        :class:`SampleError` of the first bad sample if ``run.on_bad_sample`` is ``raise``.
        """
        chosen, bad = collect(samples, max_samples)
        batches = EvalBatches(self.run, processor, chosen, bad, generation=False)
        loss_sum, tokens, done = 0.0, 0, 0
        with evaluating(model):
            for numbers, batch in batches:
                output = model(batch.to(device))
                loss_sum += float(output.loss_sum)
                tokens += int(output.token_count)
                done += len(numbers)
                if progress:
                    progress(done, len(chosen))
        if not tokens:
            raise DatasetError("the evaluation split has no supervised token, so there is no loss to measure")
        metrics = {"loss": loss_sum / tokens}
        self.results = {"metrics": metrics, "count": done, "skipped": len(bad)}
        return metrics

    def render_table(self, results: dict[str, Any] | None = None) -> Table:
        """A table for the terminal of ``results`` (default: those of the last evaluation)."""
        from rich.table import Table

        table = Table("metric", "value")
        for name, value in (results or self.results).get("metrics", {}).items():
            table.add_row(name, f"{value:.4f}")
            if name == "loss":
                table.add_row("perplexity", f"{math.exp(min(value, _MOST_NATS)):.4g}")
        return table


def collect(samples: Sequence[Sample], limit: int | None) -> tuple[list[Sample], list[SampleError]]:
    """The samples (at most ``limit``, evenly spaced) and the errors of those that cannot be read."""
    good: list[Sample] = []
    bad: list[SampleError] = []
    for number in evenly_spaced(len(samples), limit):
        try:
            good.append(samples[number])
        except SampleError as error:
            bad.append(error)
    return good, bad


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode without gradients; the mode of before comes back also after an error."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


@dataclass
class _Source(Dataset[tuple[list[int], "Batch | None", list[SampleError]]]):
    """Batch ``i`` of given groups of samples; made in a worker process where there are any."""

    samples: Sequence[Sample]
    groups: list[list[int]]
    encode: Callable[[Sample], Encoded]
    collate: Callable[[list[Encoded]], Batch]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> tuple[list[int], Batch | None, list[SampleError]]:
        numbers: list[int] = []
        encoded: list[Encoded] = []
        bad: list[SampleError] = []
        for number in self.groups[index]:
            try:
                encoded.append(self.encode(self.samples[number]))
                numbers.append(number)
            except SampleError as error:
                bad.append(error)
        return numbers, self.collate(encoded) if encoded else None, bad


def batches_by_length(
    samples: Sequence[Sample],
    encode: Callable[[Sample], Encoded],
    collate: Callable[[list[Encoded]], Batch],
    batch_size: int,
    num_workers: int = 0,
) -> Generator[tuple[list[int], Batch | None, list[SampleError]]]:
    """``(numbers of samples, their batch, errors of those that cannot be used)``, samples of similar length together.

    The longest come first, so that a lack of memory shows at once. The batch is None where no sample is left.
    """
    # Characters stand for tokens: exact lengths would cost every picture to be opened and kept.
    order = sorted(range(len(samples)), key=lambda number: _size(samples[number]), reverse=True)
    groups = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    yield from load(_Source(samples, groups, encode, collate), workers=min(num_workers, len(groups)), ahead=2)


class EvalBatches:
    """Iterates over ``(numbers of the samples, batch)`` of :func:`batches_by_length`.

    Bad samples are added to ``bad``; the iteration ends with a :class:`DatasetError` if they are too many.
    """

    def __init__(
        self,
        run: RunConfig,
        processor: TaskProcessor,
        samples: list[Sample],
        bad: list[SampleError],
        *,
        generation: bool,
    ):
        self.run = run
        self.bad = bad
        self.total = len(samples) + len(bad)
        self._samples = samples
        self._encode = processor.prompt_sample if generation else processor.encode
        self._collate = partial(processor.collate, for_generation=generation)

    def __iter__(self) -> Iterator[tuple[list[int], Batch]]:
        self._refuse_bad()
        size, workers = self.run.batch_size_eval, self.run.num_workers
        with closing(batches_by_length(self._samples, self._encode, self._collate, size, workers)) as batches:
            for numbers, batch, bad in batches:
                self.bad += bad
                self._refuse_bad()
                if batch is not None:
                    yield numbers, batch
        if self.bad:
            log.warning("%d of %d samples were skipped; the first: %s", len(self.bad), self.total, self.bad[0])

    def _refuse_bad(self) -> None:
        if self.bad and self.run.on_bad_sample == "raise":
            raise self.bad[0]
        if len(self.bad) > self.run.max_bad_share * self.total:
            raise DatasetError(
                f"{len(self.bad)} of the {self.total} samples of the evaluation cannot be used, more than "
                f"run.max_bad_share = {self.run.max_bad_share:g}; the first: {self.bad[0]}"
            )


def _size(sample: Sample) -> tuple[int, int]:
    return len(sample.images), sum(len(message.content or "") for message in sample.messages)
