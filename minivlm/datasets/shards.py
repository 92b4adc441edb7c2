"""Pictures with captions in tar shards, as img2dataset and webdataset write them.

A shard holds ``<key>.jpg`` (or jpeg, png, webp) and ``<key>.json`` with ``caption``, side by side. Shards are read
from front to back, from a disk or over the net, and never unpacked.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import groupby, islice, takewhile
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import urlsplit

from minivlm import registry
from minivlm.datasets.base import DatasetBuilder, DatasetError
from minivlm.datasets.configs import WebDatasetConfig
from minivlm.datasets.streams import Cursor, Drawn, Lane, SampleStream, ShardError, shuffled
from minivlm.evaluation.vqa import evenly_spaced
from minivlm.types import Message, Sample, SampleError

PICTURES = ("jpg", "jpeg", "png", "webp")
MAX_FAILED_SHARDS = 100
"""So many different shards that fail one after the other end a run, however many there are."""
LOOKED_AT = 10
"""A check reads samples of so many shards."""
TIMEOUT = 60.0
"""Seconds without an answer from a web server."""
END_OF_TAR = bytes(1024)
CUT_OFF = "it is cut off: the mark at the end of a tar file is missing"
PIECE = 1 << 16


class WebDatasetBuilder(DatasetBuilder[WebDatasetConfig]):
    """One split, ``train``: a stream of captions with their pictures."""

    def build(self, split: str) -> ShardStream:
        """The stream; raises :class:`DatasetError` if no shard is there or none could be opened."""
        if split not in self.splits:
            raise DatasetError(
                f"dataset '{self.name}' has no split '{split}'{registry.suggest(split, self.splits)}; it has: train"
            )
        config = self.config
        shards = expand_shards(config.storage, self.name)
        part = config.text_processor
        clean = registry.get("processor", part.name)(part.config) if part else str
        return ShardStream(self.name, shards, config.resampled, config.shuffle_buffer, clean)


def expand_shards(storage: str | Sequence[str], name: str = "") -> list[str]:
    """Paths and URLs of all shards, brace ranges written out: ``a/{00..12}.tar``.

    Raises :class:`DatasetError` for braces that do not match, for shards of which none exists, and for a URL
    whose scheme is unknown or needs a package that is missing.
    """
    from braceexpand import braceexpand

    patterns = [storage] if isinstance(storage, str) else list(storage)
    try:
        shards = [os.path.expanduser(shard) for pattern in patterns for shard in braceexpand(pattern)]
    except ValueError as error:
        raise DatasetError(f"dataset '{name}': `storage`: {error}") from error
    if not shards:
        raise DatasetError(f"dataset '{name}': `storage` names no shard")
    for scheme in {scheme for shard in shards if (scheme := _scheme(shard)) not in ("", "http", "https")}:
        from fsspec import get_filesystem_class

        try:
            get_filesystem_class(scheme)
        except (ImportError, ValueError) as error:
            raise DatasetError(f"dataset '{name}': shards at {scheme}:// cannot be opened: {error}") from error
    if not any(_scheme(shard) or os.path.isfile(shard) for shard in shards):
        raise DatasetError(
            f"dataset '{name}': there is no {shards[0]}"
            + (f", nor any other of the {len(shards)} shards of `storage`" if len(shards) > 1 else "")
        )
    return shards


class _Record(NamedTuple):
    """What stood in a shard under one key (or why it ends), and the place behind it."""

    content: dict[str, Any] | ShardError
    shard: str
    turn: int
    after: Cursor


class ShardStream(SampleStream):
    """The samples of many shards, shuffled in blocks.

    A lane reads shard after shard: with ``resampled`` each drawn by its own, with replacement; otherwise its share
    of every pass over all shards, so that no sample comes twice in a pass. Each block of ``buffer`` samples is
    shuffled. A cursor is [shards read, samples read of the next, blocks read, samples given of the next block],
    so going on reads no more than one shard and one block again.
    """

    def __init__(
        self, name: str, shards: Sequence[str], resampled: bool, buffer: int, clean: Callable[[str], str] = str
    ):
        self.name, self.shards, self.resampled, self.buffer, self.clean = name, list(shards), resampled, buffer, clean
        names = shard_names(shards)  # not the paths, so that a run goes on when the folder was moved
        digest = hashlib.sha1("\n".join(names).encode()).hexdigest()[:12]
        self.names = {shard: f"{name}/{short}" for shard, short in zip(shards, names, strict=True)}
        self.signature = f"{len(shards)} shards {digest} resampled={resampled} buffer={buffer}"

    def check_lanes(self, count: int) -> None:
        """Lanes that share the passes need a shard each, or they would read the same one at a time."""
        if not self.resampled and len(self.shards) < count:
            raise DatasetError(
                f"dataset '{self.name}': {len(self.shards)} shards cannot be shared by {count} readers (processes x "
                "run.num_workers); lower run.num_workers, make smaller shards, or set resampled: true"
            )

    def draws(self, lane: Lane, cursor: Cursor | None = None) -> Iterator[Drawn]:
        """Samples of a lane without end; raises :class:`DatasetError` when shard after shard fails."""
        turn, skip, block, given = cursor or [0, 0, 0, 0]
        records = self._records(lane, turn, skip)
        for _, part in groupby(records, lambda record: self._place(lane, record.turn)[0]):  # no block spans passes
            while chunk := list(islice(part, self.buffer)):
                end = [*chunk[-1].after, block + 1, 0]
                random.Random(f"{lane.seed}/{self.name}/{lane.number}/block {block}").shuffle(chunk)
                for number, record in enumerate(chunk[given:], given + 1):
                    after = end if number == len(chunk) else [turn, skip, block, number]
                    yield Drawn(self._sample(record.content, record.shard), record.turn, after)
                turn, skip, block, given = end

    def look(self, limit: int) -> Iterator[Sample | SampleError]:
        """Samples from the front of a few shards in the order in which they stand there."""
        chosen = evenly_spaced(len(self.shards), min(LOOKED_AT, limit))
        share = math.ceil(limit / len(chosen))
        found = (
            self._sample(content, self.shards[number])
            for number in chosen
            for content in islice(self._read(self.shards[number]), share)
        )
        return islice(found, limit)

    def faults(self) -> Iterator[ShardError]:
        """Local shards that are missing or cut off."""
        for shard in self.shards:
            if not _scheme(shard) and (reason := _fault(Path(shard))):
                yield ShardError(self.names[shard], reason)

    def _read(self, shard: str) -> Iterator[dict[str, Any] | ShardError]:
        return read_shard(shard, self.names[shard])

    def _place(self, lane: Lane, turn: int) -> tuple[int, int]:
        """The pass and the place in it of the shard that a lane reads at a turn; resampling knows one pass."""
        return (0, turn) if self.resampled else divmod(lane.number + turn * lane.count, len(self.shards))

    def _shard(self, lane: Lane, turn: int) -> str:
        if self.resampled:
            return random.Random(f"{lane.seed}/{self.name}/{lane.number}/shard {turn}").choice(self.shards)
        data_pass, place = self._place(lane, turn)
        return self.shards[shuffled(len(self.shards), f"{lane.seed}/{self.name}/pass {data_pass}")[place]]

    def _records(self, lane: Lane, turn: int, skip: int) -> Iterator[_Record]:
        """All that a lane reads, without end."""
        failed: dict[str, str] = {}  # since the last sample
        while True:
            shard = self._shard(lane, turn)
            for number, content in enumerate(self._read(shard), 1):
                if not isinstance(content, ShardError):
                    failed.clear()
                elif number == 1:  # nothing at all was read from it
                    failed.setdefault(shard, content.reason)
                    self._check_hope(failed)
                if number > skip:
                    yield _Record(content, shard, turn, [turn, number])
            turn, skip = turn + 1, 0

    def _check_hope(self, failed: dict[str, str]) -> None:
        if len(failed) >= min(len(set(self.shards)), MAX_FAILED_SHARDS):
            raise DatasetError(
                f"dataset '{self.name}': no sample can be read, {len(failed)} of {len(self.shards)} shards failed in a "
                f"row; the first: {next(iter(failed.values()))}"
            )

    def _sample(self, content: dict[str, Any] | ShardError, shard: str) -> Sample | SampleError:
        if isinstance(content, ShardError):
            return content
        key = f"{self.names[shard]}/{content['__key__']}"
        try:
            caption = self.clean(_caption(content, key))
            if not caption.strip():
                raise SampleError(key, "nothing of its `caption` is left when it is cleaned")
            return Sample(key, [Message("assistant", caption)], [_picture(content, key, shard)])
        except SampleError as error:
            return error


class StoredPicture(io.BytesIO):
    """A picture file in memory that is decoded when it is needed; messages name it by its place."""

    def __init__(self, content: bytes, place: str):
        super().__init__(content)
        self.place = place

    def __str__(self) -> str:
        return self.place

    __repr__ = __str__


def read_shard(shard: str, name: str) -> Iterator[dict[str, Any] | ShardError]:
    """The members of a shard by key: ``{"__key__": ..., "json": bytes, "jpg": bytes}``.

    If the shard cannot be opened or is cut off, the last item, with the id ``name``, says so.
    """
    from webdataset.tariterators import group_by_keys, tar_file_iterator

    empty = True
    try:
        with open_shard(shard) as opened:
            stream = _Tail(opened)
            members = tar_file_iterator(stream, select_files=_is_wanted)
            for content in group_by_keys({**member, "__url__": shard} for member in members):
                empty = False
                yield content
            while stream.read(PIECE):  # tarfile takes a cut between or in headers for the end
                pass
            if _is_tar(shard) and stream.tail != END_OF_TAR:
                raise ValueError(CUT_OFF)
    except Exception as error:  # what the backends of fsspec raise has no common class
        yield ShardError(name, f"{shard}: {_reason(error)}; the rest of it is skipped")
        return
    if empty:
        yield ShardError(name, f"{shard} holds no <key>.json beside a <key>.jpg")


class _Tail:
    """A stream that keeps the last bytes that were read of it."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.tail = stream, b""

    def read(self, size: int) -> bytes:
        content = self.stream.read(size)
        self.tail = (self.tail + content[-len(END_OF_TAR) :])[-len(END_OF_TAR) :]
        return content


def open_shard(shard: str) -> AbstractContextManager[BinaryIO]:
    """A shard as a stream of bytes: a local file, http(s), or what fsspec knows (s3://, gs://, hf://, ...)."""
    scheme = _scheme(shard)
    if scheme in ("http", "https"):
        from urllib.request import urlopen

        return urlopen(shard, timeout=TIMEOUT)
    if scheme:
        import fsspec

        return fsspec.open(shard, "rb")
    return open(shard, "rb")


def shard_names(shards: Sequence[str]) -> list[str]:
    """The paths of shards below the folder that they share, without ``.tar``: different for different shards."""
    paths = [shard.split("/") for shard in shards]
    levels = zip(*(folders for *folders, _ in paths), strict=False)
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
    return ["/".join(path[shared:]).removesuffix(".tar") for path in paths]


def _scheme(shard: str) -> str:
    scheme, mark, _ = shard.partition("://")
    return scheme if mark else ""


def _reason(error: Exception) -> str:
    """What an error says, without what webdataset adds to it."""
    text = str(error.args[0]) if type(error) is ValueError and error.args else str(error)
    return text.partition(" @ ")[0] or type(error).__name__


def _is_wanted(member: str) -> bool:
    return member.lower().endswith((".json", *(f".{ending}" for ending in PICTURES)))


def _caption(content: dict[str, Any], key: str) -> str:
    if "json" not in content:
        raise SampleError(key, "it has no .json with its `caption`")
    try:
        record = json.loads(content["json"])
    except (ValueError, RecursionError) as error:
        raise SampleError(key, f"its .json cannot be read: {error}") from error
    caption = record.get("caption") if isinstance(record, dict) else None
    if not isinstance(caption, str) or not caption.strip():
        raise SampleError(key, "it has no `caption`")
    return caption


def _picture(content: dict[str, Any], key: str, shard: str) -> StoredPicture:
    for ending in PICTURES:
        if ending in content:
            return StoredPicture(content[ending], f"{content['__key__']}.{ending} in {shard}")
    raise SampleError(key, f"it has no picture ({', '.join(f'.{ending}' for ending in PICTURES)})")


def _is_tar(shard: str) -> bool:
    """Whether a shard is a tar file as it is, not a compressed one."""
    return PurePosixPath(urlsplit(shard).path if _scheme(shard) else shard).suffix == ".tar"


def _fault(file: Path) -> str:
    """What is wrong with a local shard as a whole, or an empty string."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, io.SEEK_END)
            stream.seek(max(0, size - len(END_OF_TAR)))
            if _is_tar(str(file)) and stream.read() != END_OF_TAR:
                return f"{file}: {CUT_OFF}"
    except OSError as error:
        return f"{file}: {error.strerror or error}"
    return ""
