"""Loading processes: what they make comes in order, their errors keep type and words, and they always end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator, Iterable, Iterator
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data._utils.signal_handling import _remove_worker_pids

GRACE = 2.0
"""Seconds in which loading processes may end by themselves; one that waits for a server would take minutes."""


def load(
    data: Dataset[Any],
    order: Iterable[Any] | None = None,
    *,
    workers: int = 0,
    pin: bool = False,
    seed: int = 0,
    ahead: int = 4,
) -> Generator[Any]:
    """The items of ``data`` by the keys of ``order`` (None: all; a stream has none), made by ``workers`` processes.

    Each holds at most ``ahead`` items in store. An error of ours is raised here as it was raised there. However
    this generator or the program ends, the processes end as well: they only read, so nothing is lost.
    """
    loader: DataLoader[Any] = DataLoader(
        _TellingStream(data) if isinstance(data, IterableDataset) else _Telling(data),
        batch_size=None,
        sampler=order,
        collate_fn=_as_it_is,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=ahead if workers else None,
        worker_init_fn=quiet_worker,
        generator=torch.Generator().manual_seed(seed),  # its own, so that dropout resumes exactly
    )
    iterator: Any = iter(loader)
    # A traceback may keep this generator alive, so the end of the program must not wait for its end.
    kill = Finalize(None, _kill, [iterator], exitpriority=0) if workers else None
    try:
        for item in iterator:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        if kill:
            _close(iterator)
            kill()


def quiet_worker(_: int) -> None:
    """Set-up of a loading process: the main process decides what Ctrl-C and SIGTERM mean."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Telling(Dataset[Any]):
    """Gives errors as values: raised in a loading process they would lose their type and words."""

    def __init__(self, data: Any):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.data[key]
        except Exception as error:
            return _told(error)


class _TellingStream(IterableDataset[Any]):
    """The same for a stream, which ends with its first error."""

    def __init__(self, data: Iterable[Any]):
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.data
        except Exception as error:
            yield _told(error)


def _told(error: Exception) -> Exception:
    """An error with a message for the user; any other is raised, since torch adds where it came from."""
    if isinstance(error, OSError) or type(error).__module__.startswith("minivlm"):
        return error
    raise error


def _as_it_is(item: Any) -> Any:
    return item


def _close(iterator: Any) -> None:
    """Let the processes end, and kill those that do not: torch alone waits for one after the other."""
    _forget(iterator)
    timer = threading.Timer(GRACE, _kill, [iterator])
    timer.start()
    try:
        iterator._shutdown_workers()
    finally:
        timer.cancel()


def _kill(iterator: Any) -> None:
    _forget(iterator)
    for worker in iterator._workers:
        worker.kill()  # they ignore SIGTERM


def _forget(iterator: Any) -> None:
    """From now on torch does not take the end of a process for a failure."""
    if iterator._worker_pids_set:
        _remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
