"""Tar shards: what is read from them, in which order, and what happens to broken ones."""

from __future__ import annotations

import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pytest
from shard_files import pair, picture, served, write_shards, write_tar

from minivlm.datasets import shards as module
from minivlm.datasets.base import DatasetError
from minivlm.datasets.configs import WebDatasetConfig
from minivlm.datasets.doctor import check_dataset
from minivlm.datasets.shards import ShardStream, WebDatasetBuilder, expand_shards, read_shard
from minivlm.datasets.streams import Cursor, Lane, ShardError, ShuffledStream
from minivlm.processors.configs import BlipCaptionConfig
from minivlm.processors.image import open_image
from minivlm.schema import Part
from minivlm.types import Message, Sample, SampleError


def build(storage: Any, **settings: Any) -> ShardStream:
    settings = {"text_processor": None} | settings
    return WebDatasetBuilder(WebDatasetConfig(storage=storage, **settings), "mine").build("train")


def drawn(stream: Any, count: int, lane: Lane | None = None, cursor: Cursor | None = None) -> list[str]:
    found = [draw.sample for draw in islice(stream.draws(lane or Lane(seed=1), cursor), count)]
    return [sample.sample_id if isinstance(sample, SampleError) else sample.id for sample in found]


# --------------------------------------------------------------------------------------- what is read
def test_ranges_are_written_out(tmp_path: Path) -> None:
    write_shards(tmp_path, 3, 1)
    names = [Path(p).name for p in expand_shards(f"{tmp_path}/{{00000..00002}}.tar")]
    assert names == ["00000.tar", "00001.tar", "00002.tar"]
    several = expand_shards([f"{tmp_path}/0000{{0,2}}.tar", "memory://bucket/{08..11}.tar"])
    assert several[2:] == [f"memory://bucket/{n}.tar" for n in ("08", "09", "10", "11")] and len(several) == 6


def test_storage_that_cannot_be_meant_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="Unbalanced braces"):
        build(f"{tmp_path}/{{00..12.tar")
    with pytest.raises(DatasetError, match=r"there is no /path/to/0\.tar, nor any other of the 3 shards of `storage`"):
        build("/path/to/{0..2}.tar")
    with pytest.raises(DatasetError, match="names no shard"):
        build([])
    with pytest.raises(DatasetError, match="nosuch://"):
        build("nosuch://bucket/0.tar")
    with pytest.raises(DatasetError, match="has no split 'val'"):
        WebDatasetBuilder(WebDatasetConfig(storage="x"), "mine").build("val")


def test_a_package_that_a_url_needs_is_named() -> None:
    fsspec.register_implementation("cloud", "no_such_package.FileSystem", errtxt="Install no_such_package")
    with pytest.raises(DatasetError, match="cloud:// cannot be opened: Install no_such_package"):
        build("cloud://bucket/0.tar")


def test_a_sample_is_a_cleaned_caption_and_its_picture(tmp_path: Path) -> None:
    png = [("b.png", picture("blue", "png")), ("b.json", b'{"caption": "#2: Blue"}')]
    write_tar(tmp_path / "7.tar", [*pair("a", "red", "A (small) RED  boat."), *png])
    clean = Part("blip_caption", BlipCaptionConfig(prompt="see: ", max_words=3))
    first, second = build(f"{tmp_path}/7.tar", text_processor=clean).look(9)
    assert isinstance(first, Sample) and isinstance(second, Sample)
    assert (first.id, first.messages) == ("mine/7/a", [Message("assistant", "see: a small red")])
    assert (second.id, second.messages[0].content) == ("mine/7/b", "see: 2 blue")
    assert open_image(first.images[0]).size == (24, 20)
    assert open_image(first.images[0]).getpixel((5, 5))[0] > 200, "a picture can be opened again"


def test_shards_of_fsspec_and_of_a_web_server_hold_the_same(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, 2, 3)
    memory = fsspec.filesystem("memory")
    for name in ("00000.tar", "00001.tar"):
        memory.pipe(f"/shards/{name}", (tmp_path / name).read_bytes())
    local = drawn(build(pattern), 12)
    assert drawn(build("memory://shards/{00000..00001}.tar"), 12) == local
    with served(tmp_path) as address:
        assert drawn(build(f"{address}/{{00000..00001}}.tar"), 12) == local


# -------------------------------------------------------------------------------------------- order
def test_lanes_draw_their_own_shards(tmp_path: Path) -> None:
    stream = build(write_shards(tmp_path, 6, 4), shuffle_buffer=8)
    lanes = [drawn(stream, 40, Lane(number, 4, seed=1)) for number in range(4)]
    assert len({tuple(ids) for ids in lanes}) == 4
    assert drawn(stream, 40, Lane(2, 4, seed=1)) == lanes[2]
    assert drawn(stream, 40, Lane(2, 4, seed=2)) != lanes[2]
    assert lanes[0] != sorted(lanes[0])


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_without_resampling_a_pass_holds_every_sample_once(tmp_path: Path, lanes: int) -> None:
    stream = build(write_shards(tmp_path, 6, 5), resampled=False, shuffle_buffer=7)
    share = 30 // lanes
    read = [drawn(stream, 2 * share, Lane(number, lanes, seed=3)) for number in range(lanes)]
    everything = sorted(f"mine/{shard:05d}/{shard:05d}{number:04d}" for shard in range(6) for number in range(5))
    first = [sample for ids in read for sample in ids[:share]]
    second = [sample for ids in read for sample in ids[share:]]
    assert sorted(first) == sorted(second) == everything
    assert first != second


def test_more_readers_than_shards_is_an_error_without_resampling(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, 2, 1)
    with pytest.raises(DatasetError, match="2 shards cannot be shared by 4 readers"):
        build(pattern, resampled=False).check_lanes(4)
    build(pattern, resampled=False).check_lanes(2)
    build(pattern).check_lanes(4)


@pytest.mark.parametrize("resampled", [True, False])
@pytest.mark.parametrize("buffer", [1, 4, 9])
def test_every_cursor_goes_on_with_the_next_sample(tmp_path: Path, resampled: bool, buffer: int) -> None:
    stream = build(write_shards(tmp_path, 4, 5), resampled=resampled, shuffle_buffer=buffer)
    lane = Lane(1, 2, seed=5)
    found = list(islice(stream.draws(lane), 36))
    ids = [draw.sample.id for draw in found]  # type: ignore[union-attr]
    for place in range(1, 30):
        assert drawn(stream, 6, lane, found[place - 1].after) == ids[place : place + 6], place


def test_going_on_reads_one_block_again_not_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = build(write_shards(tmp_path, 4, 5), shuffle_buffer=5)
    far = list(islice(stream.draws(Lane()), 203))[-1].after
    opened = []
    monkeypatch.setattr(module, "read_shard", lambda shard, name: opened.append(shard) or read_shard(shard, name))
    assert len(drawn(stream, 1, Lane(), far)) == 1
    assert len(opened) <= 2


def test_a_sequence_becomes_a_stream_whose_lanes_share_each_pass() -> None:
    stream = ShuffledStream([Sample(str(n), []) for n in range(10)])
    lanes = [drawn(stream, 12, Lane(number, 3, seed=1)) for number in range(3)]
    together = [sample for turn in zip(*lanes, strict=True) for sample in turn]
    for start in (0, 10, 20):
        assert sorted(together[start : start + 10], key=int) == [str(n) for n in range(10)]
    assert together[:10] != together[10:20]
    assert drawn(stream, 5, Lane(1, 3, seed=1), [7]) == lanes[1][7:12]
    tiny = ShuffledStream([Sample("only", [])])
    assert drawn(tiny, 2, Lane(3, 4)) == ["only", "only"]


# ------------------------------------------------------------------------------------------- faults
def cut_off(folder: Path, name: str = "00001.tar") -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])


def test_a_shard_that_is_cut_off_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    stream = build(write_shards(tmp_path, 3, 8), resampled=False, shuffle_buffer=4)
    cut_off(tmp_path)
    found = [draw.sample for draw in islice(stream.draws(Lane()), 40)]
    errors = {s.sample_id: s.reason for s in found if isinstance(s, SampleError)}
    assert list(errors) == ["mine/00001"]
    assert "00001.tar" in errors["mine/00001"] and errors["mine/00001"].endswith(
        "end of data; the rest of it is skipped"
    )
    good = {s.id for s in found if isinstance(s, Sample)}
    assert 16 < len(good) < 24, "what stands in front of the cut is used"


@pytest.mark.parametrize("place", ["in a header", "between members", "inside the mark at the end"])
@pytest.mark.parametrize("remote", [False, True])
def test_every_cut_is_noticed(tmp_path: Path, place: str, remote: bool) -> None:
    whole = write_tar(tmp_path / "0.tar", [*pair("a", "red"), *pair("b", "blue")])
    with tarfile.open(whole) as tar:
        members = tar.getmembers()
        third, end = tar.getmember("b.jpg").offset, members[-1].offset_data + 512
    where = {"in a header": third + 100, "between members": third, "inside the mark at the end": end + 512}[place]
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[:where])
    with served(tmp_path) as address:
        *read, last = read_shard(f"{address}/cut.tar" if remote else str(cut), "cut")
    keys = [content["__key__"] for content in read if isinstance(content, dict)]
    assert keys == (["a", "b"] if place.startswith("inside") else ["a"])
    assert isinstance(last, ShardError) and last.sample_id == "cut"
    assert last.reason.endswith("the mark at the end of a tar file is missing; the rest of it is skipped")


def test_the_mark_at_the_end_is_found_wherever_it_lies(tmp_path: Path) -> None:
    """tarfile reads 10240 bytes at a time, and writers fill the last block or do not."""
    for size in range(512, 12 * 1024, 512):
        shard = write_tar(tmp_path / "0.tar", [("a.json", b" " * size), ("a.jpg", b"x")])
        assert [type(content) for content in read_shard(str(shard), "0")] == [dict], size
        shard.write_bytes(shard.read_bytes().rstrip(b"\0") + bytes(511 + 1024))
        assert [type(content) for content in read_shard(str(shard), "0")] == [dict], size


def test_the_only_shard_may_be_cut_off(tmp_path: Path) -> None:
    stream = build(write_shards(tmp_path, 1, 8))
    cut_off(tmp_path, "00000.tar")
    found = drawn(stream, 40)
    assert found.count("mine/00000") > 2 and len(set(found)) > 3


def test_shards_of_several_folders_are_told_apart(tmp_path: Path) -> None:
    patterns = [write_shards(tmp_path / folder, 2, 1) for folder in ("cc", "sbu")]
    (tmp_path / "cc" / "00001.tar").unlink()
    (tmp_path / "sbu" / "00001.tar").unlink()
    builder = WebDatasetBuilder(WebDatasetConfig(storage=patterns, text_processor=None), "mine")
    assert check_dataset(builder, "train").findings["shard"].count == 2
    stream = builder.build("train")
    expected = {"mine/cc/00000/000000000", "mine/sbu/00000/000000000", "mine/cc/00001", "mine/sbu/00001"}
    assert set(drawn(stream, 60)) == expected


def test_the_signature_follows_names_and_order_not_the_folder(tmp_path: Path) -> None:
    before = build(write_shards(tmp_path / "a", 3, 1)).signature
    (tmp_path / "a").rename(tmp_path / "b")
    assert build(f"{tmp_path}/b/{{00000..00002}}.tar").signature == before
    assert build(f"{tmp_path}/b/{{00002..00000}}.tar").signature != before
    assert build(f"{tmp_path}/b/{{00001..00003}}.tar").signature != before


def test_a_url_that_fails_is_named_and_the_rest_goes_on(tmp_path: Path) -> None:
    write_shards(tmp_path, 2, 3)
    with served(tmp_path) as address:
        stream = build(f"{address}/{{00000..00002}}.tar")
        found = list(islice(stream.draws(Lane(seed=2)), 30))
    errors = {s.reason for s, _, _ in found if isinstance(s, SampleError)}
    assert errors == {f"{address}/00002.tar: HTTP Error 404: File not found; the rest of it is skipped"}
    assert {s.id[:10] for s, _, _ in found if isinstance(s, Sample)} == {"mine/00000", "mine/00001"}


@pytest.mark.parametrize("resampled", [True, False])
def test_when_every_shard_fails_the_first_reason_is_told(tmp_path: Path, resampled: bool) -> None:
    for name in ("0.tar", "1.tar"):
        (tmp_path / name).write_bytes(b"no tar at all")
    stream = build(f"{tmp_path}/{{0..2}}.tar", resampled=resampled)
    with pytest.raises(DatasetError, match=r"3 of 3 shards failed in a row; the first: \S+/\d\.tar"):
        next(stream.draws(Lane()))


def test_shards_without_samples_do_not_hang(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.txt", b"x")])
    with pytest.raises(DatasetError, match=r"holds no <key>\.json beside"):
        next(build(f"{tmp_path}/0.tar").draws(Lane()))


FAULTY = {
    "no .json": [("a.jpg", picture("red"))],
    "cannot be read": [("a.jpg", picture("red")), ("a.json", b"{")],
    "no `caption`": [("a.jpg", picture("red")), ("a.json", b'{"caption": null}')],
    "nothing of its `caption` is left": [("a.jpg", picture("red")), ("a.json", b'{"caption": "(!)"}')],
    "no picture": [("a.json", b'{"caption": "red"}')],
}


@pytest.mark.parametrize("reason", FAULTY)
def test_a_faulty_sample_is_named_with_its_reason(tmp_path: Path, reason: str) -> None:
    write_tar(tmp_path / "0.tar", [*FAULTY[reason], *pair("b", "red")])
    clean = Part("blip_caption", BlipCaptionConfig())
    bad, good = build(f"{tmp_path}/0.tar", text_processor=clean).look(5)
    assert isinstance(bad, SampleError) and not isinstance(bad, ShardError)
    assert bad.sample_id == "mine/0/a" and reason in bad.reason
    assert isinstance(good, Sample) and good.id == "mine/0/b"


def test_a_picture_that_cannot_be_read_is_named_by_its_place(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.jpg", picture("red")[:200]), ("a.json", b'{"caption": "red"}')])
    (sample,) = build(f"{tmp_path}/0.tar").look(5)
    with pytest.raises(OSError, match=r"cannot read picture a\.jpg in .*0\.tar: "):
        open_image(sample.images[0])  # type: ignore[union-attr]


def test_the_doctor_names_broken_shards_samples_and_pictures(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, 4, 3)
    cut_off(tmp_path, "00003.tar")
    (tmp_path / "00002.tar").unlink()
    no_caption = [("c.jpg", picture("red")), ("c.json", b"{}")]
    no_picture = [("p.jpg", b"none"), ("p.json", b'{"caption": "red"}')]
    write_tar(tmp_path / "00001.tar", [*no_caption, *no_picture, *pair("g", "red")])
    builder = WebDatasetBuilder(WebDatasetConfig(storage=pattern, text_processor=None), "mine")
    report = check_dataset(builder, "train")
    named = {kind: [sample_id for sample_id, _ in finding.examples] for kind, finding in report.findings.items()}
    assert named.pop("shard") == ["mine/00002", "mine/00003"]
    assert named.pop("record") == ["mine/00001/c"]
    assert named.pop("unreadable picture") == ["mine/00001/p"]
    assert report.total is None and report.bad == 2
    # A bare caption has no marker: that is the prompt's affair.
    assert set(named) == {"marker count"}
    assert check_dataset(builder, "train", limit=2).checked == 1, "one of a shard, the other is gone"
