"""What to do about samples that training had to skip."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from minivlm.datasets.base import DatasetError
from minivlm.runners.logs import read_log
from minivlm.types import Batch

BAD_SAMPLES = "bad_samples.jsonl"
FEW = 1000
"""Before so many samples of a stream were read, the share of bad ones is taken as if they had been."""


class BadSamples:
    """The skipped samples of one process: each is written down once, and too many end the run.

    ``total`` is the size of the data, of which every bad sample counts once. A stream has none (None): there
    what was skipped counts against what was read so far.
    """

    def __init__(self, folder: Path, max_share: float, total: int | None, console: Console):
        self.file, self.max_share, self.total, self.console = folder / BAD_SAMPLES, max_share, total, console
        self.count = self.read = 0
        self._named: set[str] = set()

    def state(self) -> list[int]:
        """What a checkpoint keeps of this process."""
        return [self.count, self.read]

    def restore(self, state: Sequence[int], is_main: bool) -> None:
        """Go on counting; the main process also knows what was written down, by all of them."""
        if is_main:
            self._named = {record["id"] for record in read_log(self.file)}
        self.count, self.read = (len(self._named), 0) if self.total else state

    def note(self, batches: Sequence[Batch]) -> None:
        """Count and write down what was skipped for the batches."""
        for batch in batches:
            self.read += len(batch.sample_ids) + len(batch.skipped)
            for error in batch.skipped:
                is_new = error.sample_id not in self._named
                self.count += is_new or self.total is None
                if not is_new:
                    continue
                self._named.add(error.sample_id)
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"id": error.sample_id, "reason": error.reason}) + "\n")
                self.console.print(f"skipped {error}", style="yellow", markup=False, highlight=False, soft_wrap=True)

    def check(self, count: int, read: int) -> None:
        """Raise :class:`DatasetError` when the bad samples of all processes are more than ``run.max_bad_share``."""
        if count > self.max_share * (self.total or max(read, FEW)):
            raise DatasetError(
                f"{count} of {self.total or f'the {read}'} samples {'' if self.total else 'read so far '}are bad, more "
                f"than run.max_bad_share ({self.max_share:.2%}); they are listed in {self.file}"
            )
