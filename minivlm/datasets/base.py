"""What a dataset is: a builder that offers, split by split, a sequence of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from minivlm.types import Sample

if TYPE_CHECKING:
    from minivlm.datasets.streams import SampleStream

ConfigT = TypeVar("ConfigT")


class DatasetError(ValueError):
    """A dataset that cannot be used: a file is missing, broken or empty."""


class DatasetBuilder(Generic[ConfigT]):
    """Builds the splits of one dataset; registered under kind ``dataset``.

    A subclass states its ``splits`` and returns from :meth:`build` any sequence whose items are
    :class:`Sample`; an item that cannot be made raises :class:`SampleError`. What has no length is returned as
    a :class:`~minivlm.datasets.streams.SampleStream`. Either is sent to worker processes, so it should be small
    or cheap to pickle.
    """

    splits: Sequence[str] = ("train",)

    def __init__(self, config: ConfigT, name: str = ""):
        self.config = config
        self.name = name

    def build(self, split: str) -> Sequence[Sample] | SampleStream:
        """The samples of a split; raises :class:`DatasetError` if there is no such split or file."""
        raise NotImplementedError
