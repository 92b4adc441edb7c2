"""Batches of streams: where they come from, and how a run goes on in the middle of them."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import losses, run_train, write_yaml
from rich.console import Console
from shard_files import pair, served, write_shards, write_tar

from minivlm.cli import main
from minivlm.config import load_config
from minivlm.config.experiment import RunConfig
from minivlm.datasets.base import DatasetError
from minivlm.datasets.configs import WebDatasetConfig
from minivlm.datasets.feature_cache import FeatureCacheError
from minivlm.datasets.feed import StreamedFeed, make_feed
from minivlm.datasets.shards import WebDatasetBuilder
from minivlm.datasets.training_set import Source, build_split
from minivlm.processors.image import open_image
from minivlm.runners.experiment import run_experiment
from minivlm.runners.runner import Interrupted, Runner
from minivlm.types import Batch, Encoded, Sample, SampleError

QUIET = Console(quiet=True)


class FakeProcessor:
    """Pictures are opened, texts do not matter."""

    def encode(self, sample: Sample, seed: int = 0) -> Encoded:
        try:
            for image in sample.images:
                open_image(image)
        except OSError as error:
            raise SampleError(sample.id, str(error)) from error
        return Encoded([1, 2], [-100, 2], sample_id=sample.id)

    def collate(self, samples: list[Encoded]) -> Batch:
        ids = torch.tensor([sample.input_ids for sample in samples])
        skipped = [error for sample in samples for error in sample.skipped]
        return Batch(ids, ids, sample_ids=[s.sample_id for s in samples], skipped=skipped)


def rows(name: str, count: int) -> list[Sample]:
    return [Sample(f"{name}/{number}", []) for number in range(count)]


def shards(key: str, storage: str, ratio: float | None = None, size: int | None = None, **settings: Any) -> Source:
    config = WebDatasetConfig(storage=storage, text_processor=None, **settings)
    return Source(key, WebDatasetBuilder(config, key).build("train"), ratio, size)


def feed(sources: list[Source], rank: int = 0, world: int = 1, **run: Any) -> StreamedFeed:
    settings = RunConfig(**{"batch_size_train": 4, "seed": 1} | run)
    made = make_feed(sources, FakeProcessor(), settings, rank=rank, world=world)  # type: ignore[arg-type]
    assert isinstance(made, StreamedFeed)
    return made


def ids(source: StreamedFeed, start: int, stop: int) -> list[list[str]]:
    return [batch.sample_ids for batch in source.batches(start, stop)]


# ------------------------------------------------------------------------------------------ batches
def test_a_batch_comes_from_one_dataset_drawn_by_ratio_on_every_process_by_itself() -> None:
    sources = [Source("a", rows("a", 50), 3.0), Source("b", rows("b", 20), 1.0, batch_size=2)]
    orders = []
    for rank in range(2):
        batches = ids(feed(sources, rank, 2, mix="batch"), 0, 400)
        orders.append([batch[0][0] for batch in batches])
        for batch in batches:
            assert len({sample[0] for sample in batch}) == 1
            assert len(batch) == {"a": 4, "b": 2}[batch[0][0]]
        assert Counter(orders[-1])["a"] / 400 == pytest.approx(0.75, abs=0.07)
    assert orders[0] != orders[1]


def test_processes_and_workers_share_a_pass_of_a_sized_dataset() -> None:
    sources = [Source("a", rows("a", 24))]
    read = [batch for rank in range(2) for batch in ids(feed(sources, rank, 2, mix="batch", num_workers=2), 0, 3)]
    assert len(read) == 6
    # Three batches of two lanes: one lane is a batch ahead of the other, so a few of the next pass are in.
    assert len({sample for batch in read for sample in batch}) >= 20


def test_length_of_an_epoch(tmp_path: Path) -> None:
    stream = shards("s", write_shards(tmp_path, 1, 2))
    assert feed([stream]).steps_per_epoch == 10_000
    assert feed([stream], iters_per_epoch=7).steps_per_epoch == 7
    sized = [Source("a", rows("a", 50)), Source("b", rows("b", 20), batch_size=2)]
    assert feed(sized, mix="batch").steps_per_epoch == 12 + 10
    assert feed(sized, mix="batch", world=2, accum_grad_iters=2).steps_per_epoch == (6 + 5) // 2


def test_a_dataset_smaller_than_its_batch_is_named(tmp_path: Path) -> None:
    small = Source("small", rows("a", 7), batch_size=4)
    message = r"datasets\.small: 7 samples do not fill one batch of 4 x 2 processes; lower datasets\.small\.batch_size"
    with pytest.raises(DatasetError, match=message):
        feed([small], world=2, mix="batch")
    with pytest.raises(DatasetError, match=message):
        feed([small, shards("s", write_shards(tmp_path, 1, 2))], world=2)
    assert feed([small], mix="batch").size == 7


def test_more_loading_processes_than_shards_is_an_error_at_the_start(tmp_path: Path) -> None:
    few = shards("few", write_shards(tmp_path, 3, 2), resampled=False)
    with pytest.raises(DatasetError, match="3 shards cannot be shared by 4 readers"):
        feed([few], world=2, num_workers=2)


def test_a_stream_cannot_be_cut_to_its_first_samples(tmp_path: Path) -> None:
    config = WebDatasetConfig(storage=write_shards(tmp_path, 1, 2), text_processor=None, max_samples=1)
    with pytest.raises(DatasetError, match=r"datasets\.s: .*max_samples"):
        build_split({"s": WebDatasetBuilder(config, "s")}, ["train"])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_go_on_from_any_place(tmp_path: Path, workers: int) -> None:
    """Streams with and without resampling and a sized dataset, of 2 processes; the state went through JSON."""

    def make() -> StreamedFeed:
        sources = [
            shards("a", write_shards(tmp_path / "a", 3, 4), 2.0, shuffle_buffer=5),
            shards("b", write_shards(tmp_path / "b", 4, 3), size=3, resampled=False, shuffle_buffer=4),
            Source("c", rows("c", 10), batch_size=2),
        ]
        return feed(sources, 1, 2, num_workers=workers)

    whole = ids(make(), 0, 16)
    for place in (1, 6, 9):
        first, second = make(), make()
        assert [batch.sample_ids for batch in islice(first.batches(0, 16), place)] == whole[:place]
        second.restore(json.loads(json.dumps(first.state())))
        assert ids(second, place, 16) == whole[place:]


# ------------------------------------------------------------------------------------------- faults
@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_samples_and_shards_travel_with_the_batches(tmp_path: Path, workers: int) -> None:
    write_tar(tmp_path / "0.tar", [("a.jpg", b"no picture"), ("a.json", b'{"caption": "x"}'), *pair("b", "red")])
    source = shards("s", f"{tmp_path}/{{0..1}}.tar", shuffle_buffer=8)
    batches = list(feed([source], num_workers=workers).batches(0, 8))
    assert {sample for batch in batches for sample in batch.sample_ids} == {"s/0/b"}
    reasons = {error.sample_id: error.reason for batch in batches for error in batch.skipped}
    assert set(reasons) == {"s/0/a", "s/1"}
    assert "cannot read picture a.jpg in" in reasons["s/0/a"] and "No such file" in reasons["s/1"]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_ends_a_run_keeps_its_type_and_words(tmp_path: Path, workers: int) -> None:
    (tmp_path / "0.tar").write_bytes(b"no tar")
    broken = shards("s", f"{tmp_path}/0.tar")
    with pytest.raises(DatasetError, match="1 of 1 shards failed in a row") as error:
        next(feed([broken], num_workers=workers).batches(0, 8))
    assert "Traceback" not in str(error.value)
    bad = [("a.jpg", b"none"), ("a.json", b'{"caption": "x"}')]
    write_tar(tmp_path / "1.tar", bad)
    hopeless = shards("s", f"{tmp_path}/1.tar", shuffle_buffer=1)
    with pytest.raises(DatasetError, match=r"datasets\.s: 100 bad samples in a row, the last: sample 's/1/a'"):
        next(feed([hopeless], num_workers=workers).batches(0, 8))
    with pytest.raises(SampleError, match="sample 's/1/a': cannot read"):
        next(feed([hopeless], num_workers=workers, on_bad_sample="raise").batches(0, 8))


# ------------------------------------------------------------------------------------------ training
@pytest.fixture
def streamed(tiny_experiment: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The tiny experiment with tar shards beside its records."""
    storage = write_shards(tmp_path / "shards", 3, 5)
    tiny_experiment["datasets"]["laion"] = {"storage": storage, "shuffle_buffer": 6, "sample_ratio": 3}
    tiny_experiment["run"] |= {"iters_per_epoch": 8, "max_epoch": 3, "max_steps": 20, "save_freq": 5}
    return tiny_experiment


class Killed(BaseException):
    """Stands for a process that is gone."""


@pytest.mark.parametrize(("workers", "end"), [(0, "stop"), (2, "kill")])
def test_twenty_steps_over_shards_equal_ten_an_end_and_a_resume(
    streamed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, end: str
) -> None:
    """Killed two steps behind a checkpoint, or stopped by a signal in the middle of an epoch."""
    streamed["run"] |= {"num_workers": workers, "accum_grad_iters": 1 + workers // 2}
    streamed["model"]["language_model"]["config"]["attention_dropout"] = 0.2
    config = write_yaml(tmp_path / "x.yaml", streamed)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_experiment(load_config(config, [f"run.output_dir={whole}"]), QUIET)
    after_step = Runner._after_step

    def ending(self: Runner, log: Any) -> None:
        after_step(self, log)
        if self.state.step == 12:
            if end == "kill":
                raise Killed
            self.stop_signal = 2

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_after_step", ending)
        with pytest.raises(Killed if end == "kill" else Interrupted):
            run_experiment(load_config(config, [f"run.output_dir={broken}"]), QUIET)
    torch.manual_seed(0)
    run_experiment(load_config(config, [f"run.output_dir={broken}"]), QUIET)
    assert len(losses(whole)) == 20
    assert losses(broken) == losses(whole)


@pytest.mark.slow
def test_two_processes_go_on_with_their_own_cursors(streamed: dict[str, Any], tmp_path: Path) -> None:
    streamed["run"] |= {"max_steps": 8, "save_freq": 4, "num_workers": 1}
    config = write_yaml(tmp_path / "x.yaml", streamed)
    result = run_train(config, processes=2)
    assert result.returncode == 0, result.stderr
    whole = losses(tmp_path / "out")
    state = json.loads((tmp_path / "out" / "checkpoints" / "step_00000004" / "state.json").read_text())
    first, second = (process["feed"] for process in state["processes"])
    assert first != second
    back = f"run.resume={tmp_path}/out/checkpoints/step_00000004"
    result = run_train(config, back, processes=2)
    assert result.returncode == 0, result.stderr
    assert len(whole) == 8 and losses(tmp_path / "out") == whole


@pytest.mark.parametrize(
    "change", ["run.num_workers=2", "datasets.laion.shuffle_buffer=7", "datasets.laion.sample_ratio=2"]
)
def test_going_on_with_other_data_is_refused(streamed: dict[str, Any], tmp_path: Path, change: str) -> None:
    config = write_yaml(tmp_path / "x.yaml", streamed)
    run_experiment(load_config(config, ["run.max_steps=2"]), QUIET)
    (tmp_path / "out" / "done.json").unlink()
    with pytest.raises(ValueError, match=r"other data .*loading processes"):
        run_experiment(load_config(config, [change]), QUIET)


def test_training_names_broken_shards_and_counts_them(streamed: dict[str, Any], tmp_path: Path) -> None:
    cut = tmp_path / "shards" / "00001.tar"
    cut.write_bytes(cut.read_bytes()[:6000])
    with served(tmp_path / "shards") as address:
        streamed["datasets"] = {"laion": {"storage": f"{address}/0000{{0..3}}.tar", "shuffle_buffer": 8}}
        config = write_yaml(tmp_path / "x.yaml", streamed)
        run_experiment(load_config(config, ["run.max_bad_share=0.05"]), QUIET)
        named = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
        assert sorted(record["id"] for record in named) == ["laion/00001", "laion/00003"]
        assert any("404" in record["reason"] for record in named)
        with pytest.raises(
            DatasetError, match=r"\d+ of the \d+ samples read so far are bad, more than run.max_bad_share"
        ):
            run_experiment(load_config(config, ["run.max_bad_share=0", f"run.output_dir={tmp_path}/strict"]), QUIET)


def test_mixing_by_batch_is_an_option_of_sized_datasets(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    tiny_experiment["run"] |= {"mix": "batch", "save_freq": 2, "keep_last": 5}
    config = write_yaml(tmp_path / "x.yaml", tiny_experiment)
    run_experiment(load_config(config), QUIET)
    whole = losses(tmp_path / "out")
    assert len(whole) == 6  # 25 samples in batches of 4
    run_experiment(load_config(config, [f"run.resume={tmp_path}/out/checkpoints/step_00000002"]), QUIET)
    assert losses(tmp_path / "out") == whole


def test_evaluation_and_feature_cache_need_a_length(streamed: dict[str, Any], tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "x.yaml", streamed)
    with pytest.raises(DatasetError, match=r"datasets\.laion is a stream, which has no length"):
        run_experiment(load_config(config, ["run.valid_splits=[train]"]), QUIET)
    with pytest.raises(FeatureCacheError, match="needs datasets with a length; laion is a stream"):
        run_experiment(load_config(config, [f"run.feature_cache={tmp_path}/cache"]), QUIET)


def test_dry_run_and_check_show_samples_of_a_stream(
    streamed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del streamed["datasets"]["colours"]
    config = str(write_yaml(tmp_path / "x.yaml", streamed))
    assert main(["train", "--cfg-path", config, "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "sample laion/00000/000000000:" in shown and "a green picture" in shown
    assert "a stream; every batch from one dataset: laion 4 per process (ratio 3)" in shown
    assert main(["check-data", config]) == 0
    shown = capsys.readouterr().out
    assert "laion / train: 15 samples of a stream read" in shown and "a red picture" in shown
    (tmp_path / "shards" / "00002.tar").unlink()
    assert main(["check-data", config]) == 1
    assert "shard: 1 shards - fetch or make it again" in capsys.readouterr().out
