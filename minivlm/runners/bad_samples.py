"""What to do about samples that training had to skip."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from rich.console import Console

from minivlm.datasets.base import DatasetError
from minivlm.runners.logs import read_log
from minivlm.types import Batch, SampleError

BAD_SAMPLES = "bad_samples.jsonl"
FEW = 1000
"""Before so many samples of a stream were read, the share of bad ones is taken as if they had been."""


class BadSamples:
    """The skipped samples: each is written down once, by the main process, and too many end the run.

    ``total`` is the size of the data, of which every bad sample counts once, whichever process met it. A stream
    has none (None): there what every process skipped counts against what it read so far.
    """

    def __init__(self, folder: Path, max_share: float, total: int | None, console: Console, is_main: bool = True):
        self.file, self.max_share, self.total, self.console = folder / BAD_SAMPLES, max_share, total, console
        self.is_main = is_main
        self.skipped = self.read = 0
        self.fresh: list[SampleError] = []
        """What this process met and the others do not know of yet."""
        self._named: set[str] = set()

    def state(self) -> list[int]:
        """What a checkpoint keeps of this process: samples skipped and read."""
        return [self.skipped, self.read]

    def written(self) -> list[str]:
        """The ids that were written down, which the main process tells the others."""
        return [record["id"] for record in read_log(self.file)] if self.is_main else []

    def restore(self, state: Sequence[int], written: Sequence[str]) -> None:
        """Go on counting."""
        self.skipped, self.read = state
        self._named = set(written)

    def note(self, batches: Sequence[Batch]) -> None:
        """Count what was skipped for the batches."""
        for batch in batches:
            self.read += len(batch.sample_ids) + len(batch.skipped)
            self.skipped += len(batch.skipped)
            self.fresh += [error for error in batch.skipped if error.sample_id not in self._named]

    def share(self, met: Sequence[Sequence[SampleError]]) -> None:
        """Take over what was ``fresh`` on all processes, and write it down."""
        self.fresh = []
        for error in chain.from_iterable(met):
            if error.sample_id in self._named:
                continue
            self._named.add(error.sample_id)
            if self.is_main:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"id": error.sample_id, "reason": error.reason}) + "\n")
                self.console.print(f"skipped {error}", style="yellow", markup=False, highlight=False, soft_wrap=True)

    def check(self, skipped: int, read: int) -> None:
        """Raise :class:`DatasetError` when more than ``run.max_bad_share`` are bad; the sums are of all processes."""
        count = len(self._named) if self.total else skipped
        if count > self.max_share * (self.total or max(read, FEW)):
            raise DatasetError(
                f"{count} of {self.total or f'the {read}'} samples {'' if self.total else 'read so far '}are bad, more "
                f"than run.max_bad_share ({self.max_share:.2%}); they are listed in {self.file}"
            )
