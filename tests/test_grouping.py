"""Micro batches of one modality and of similar lengths: orders, shares of processes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import losses, run_train, write_yaml
from rich.console import Console

from minivlm.config import ConfigError, load_config
from minivlm.config.experiment import RunConfig
from minivlm.datasets.base import DatasetError
from minivlm.datasets.feed import Feed, PlannedFeed, make_feed
from minivlm.datasets.grouping import group_by_length, group_by_modality, in_order, interleaved, longest_first
from minivlm.datasets.sampling import ModalityPlan
from minivlm.datasets.streams import ShuffledStream
from minivlm.datasets.training_set import Source, TrainingSet
from minivlm.runners.experiment import run_experiment
from minivlm.runners.runner import Runner
from minivlm.types import Batch, Encoded, Message, Sample, SampleError

LENGTHS = [100 + i % 37 if i % 3 else -1 - i % 23 for i in range(200)]
"""Two of three samples have a picture."""


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plan(batch: int = 4, processes: int = 1, accumulation: int = 1, **changes: Any) -> ModalityPlan:
    settings: dict[str, Any] = {"sizes": [150, 50], "seed": 3, "join": in_order} | changes
    made = ModalityPlan(batch_size=batch, processes=processes, accumulation=accumulation, **settings)
    made.lengths = LENGTHS
    return made


# --- orders ---------------------------------------------------------------------------------------------------------


def test_the_order_of_llava() -> None:
    """One generator for all, and left-overs in the order of the data, as LLaVA's trainer has it."""
    lengths = [-52, 88, 43, 58, 81, 29, -20, 54, 28, -110, 31, -35, -48, -35, 113, 31, 63, -117, 97, 74, -85, 78, 52]
    lengths += [55, 117, 81, 42, 39, -43, -72, 108, 16, -5, -110, 80, 85, 8, 7, -24, 17, 70, 80, 112, 86, -19, -76, 65]
    lengths += [-111, 112, -51]
    expected = [24, 40, 26, 30, 34, 23, 19, 7, 22, 14, 42, 3, 20, 12, 28, 47, 33, 6, 43, 35, 37, 45, 11, 38, 18, 27]
    expected += [10, 48, 1, 36, 41, 15, 8, 17, 9, 32, 29, 49, 13, 21, 46, 16, 4, 5, 31, 0, 2, 25, 39, 44]
    one = generator(5)
    assert group_by_modality(lengths, 3, 1, inside=one, between=one, join=in_order) == expected


def test_left_overs_are_joined_in_three_ways() -> None:
    lengths = [9, 1, 5, 7, 3]
    assert in_order([4, 0, 2], [1, 3], lengths) == [0, 1, 2, 3, 4]
    assert interleaved([4, 0, 2], [1, 3], lengths) == [4, 1, 0, 3, 2]
    assert interleaved([4], [1, 3, 0], lengths) == [4, 1, 3, 0]
    assert longest_first([4, 0, 2], [1, 3], lengths) == [0, 3, 2, 4, 1]


@pytest.mark.parametrize("sign", [1, -1])
def test_one_kind_of_samples_is_grouped_by_length_alone(sign: int) -> None:
    lengths = [1 + (7 * i) % 50 for i in range(60)]
    signed = [sign * length for length in lengths]
    order = group_by_modality(signed, 4, 2, inside=generator(0), between=generator(1), join=in_order)
    assert order == [i for mega in group_by_length(lengths, 4, 2, generator(1)) for i in mega]


def test_micro_batches_of_a_step_hold_about_as_much() -> None:
    lengths = [1 + (13 * i) % 101 for i in range(160)]
    for mega in group_by_length(lengths, 4, 4, generator(0)):
        sums = [sum(lengths[i] for i in mega[k : k + 4]) for k in range(0, 16, 4)]
        assert max(sums) - min(sums) < 101 / 2, "less than half of the longest sample"


# --- the plan -------------------------------------------------------------------------------------------------------


def test_a_pass_takes_every_sample_once_and_micro_batches_are_of_one_kind() -> None:
    made = plan(processes=2, accumulation=2)
    assert made.batches_per_pass == 25
    shares = [made.share(number, rank, 2) for number in range(25) for rank in range(2)]
    assert all(len(share) == 4 for share in shares)
    assert sorted(i for share in shares for i in share) == list(range(200))
    mixed = [k for k, share in enumerate(shares) if len({LENGTHS[i] > 0 for i in share}) > 1]
    assert min(mixed, default=50) >= 50 - 2 * 4, "only the left-overs at the end may be mixed"
    assert {LENGTHS[share[0]] > 0 for share in shares[:42]} == {True, False}


def test_a_batch_depends_on_seed_and_number_alone() -> None:
    """So a run that goes on needs no state, and goes through the same batches."""
    whole = plan(processes=2, accumulation=2)
    batches = [whole.batch(number) for number in range(60)]
    for number in (59, 3, 31, 24, 25):
        assert plan(processes=2, accumulation=2).batch(number) == batches[number]
    assert batches[:25] != batches[25:50], "every pass has an order of its own"
    assert plan(seed=4, processes=2, accumulation=2).batch(0) != batches[0]


def test_steps_do_not_depend_on_who_takes_part_in_them() -> None:
    """Four micro batches a step, of one, two or four processes."""
    steps = []
    for processes in (1, 2, 4):
        made = plan(processes=processes, accumulation=4 // processes)
        shares = [
            made.share(number, rank, processes) for number in range(made.batches_per_pass) for rank in range(processes)
        ]
        steps.append([shares[k : k + 4] for k in range(0, 48, 4)])
    assert steps[0] == steps[1] == steps[2]


# --- the feed -------------------------------------------------------------------------------------------------------


class FakeProcessor:
    """A picture takes ten positions, texts do not matter."""

    tokens_per_image = 10

    def encode(self, sample: Sample, seed: int = 0) -> Encoded:
        return Encoded([1, 2], [-100, 2], sample_id=sample.id)

    def collate(self, samples: list[Encoded]) -> Batch:
        ids = torch.tensor([sample.input_ids for sample in samples])
        return Batch(ids, ids, sample_ids=[s.sample_id for s in samples])


class Broken(list[Sample]):
    """The first sample cannot be made."""

    def __getitem__(self, index: Any) -> Any:
        if index == 0:
            raise SampleError("first", "broken")
        return super().__getitem__(index)


def talk(name: str, words: int, pictures: int) -> Sample:
    turns = [Message("user", "word " * words), Message("assistant", None)]
    return Sample(name, turns, ["x.png"] * pictures)


SAMPLES = [talk(f"{'picture' if k % 2 else 'text'}/{k}", 1 + k % 7, k % 2) for k in range(64)]


def feed(source: Source | None = None, rank: int = 0, world: int = 1, **run: Any) -> Feed:
    given: dict[str, Any] = {"batch_size_train": 4, "group_by_modality_length": True, "on_bad_sample": "raise"} | run
    source = source or Source("a", SAMPLES)
    return make_feed([source], FakeProcessor(), RunConfig(**given), rank=rank, world=world)  # type: ignore[arg-type]


def ids(source: Feed, start: int, stop: int) -> list[list[str]]:
    return [batch.sample_ids for batch in source.batches(start, stop)]


def test_lengths_count_words_and_visual_tokens() -> None:
    samples = Broken([talk("x", 1, 0), talk("a", 3, 1), talk("b", 3, 0), talk("c", 0, 0), talk("d", 0, 2)])
    data = TrainingSet([samples], FakeProcessor(), 0, "skip")  # type: ignore[arg-type]
    assert data.signed_lengths() == [1, 13, -3, -1, 20]
    assert data.lengths() == [0, 55, 15, 0, 80]


def test_processes_see_one_kind_at_a_time_and_go_on_anywhere() -> None:
    shares = [ids(feed(rank=rank, world=2, accum_grad_iters=2), 0, 8) for rank in range(2)]
    assert sorted(name for share in shares for batch in share for name in batch) == sorted(s.id for s in SAMPLES)
    for share in shares:
        kinds = [{name.split("/")[0] for name in batch} for batch in share]
        assert all(len(kind) == 1 for kind in kinds[:4])
    assert ids(feed(rank=1, world=2, accum_grad_iters=2), 5, 12)[:3] == shares[1][5:8]


def test_a_checkpoint_tells_the_plans_apart() -> None:
    signatures = [
        feed(**settings).signature
        for settings in (
            {},
            {"compat": "imp"},
            {"compat": "imp_v1"},
            {"accum_grad_iters": 2},
            {"group_by_modality_length": False},
            {"group_by_modality_length": False, "group_by_length": False},
        )
    ]
    assert len(set(signatures)) == 6
    assert feed(compat="llava").signature == signatures[0], "no order is LLaVA's"


@pytest.mark.parametrize(
    ("compat", "join"), [(None, in_order), ("llava", in_order), ("imp", interleaved), ("imp_v1", longest_first)]
)
def test_compat_decides_about_left_overs(compat: str | None, join: Any) -> None:
    made = feed(compat=compat)
    assert isinstance(made, PlannedFeed) and isinstance(made.plan, ModalityPlan) and made.plan.join is join


def test_what_cannot_be_grouped_is_refused(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"takes every sample once.*datasets\.a\.sample_ratio"):
        feed(Source("a", SAMPLES, ratio=2.0))
    with pytest.raises(DatasetError, match="needs datasets with a length; a is a stream"):
        feed(Source("a", ShuffledStream(SAMPLES)))
    with pytest.raises(DatasetError, match="do not fill one batch of 80"):
        feed(batch_size_train=80)
    tiny_experiment["run"] |= {"group_by_modality_length": True, "mix": "batch"}
    with pytest.raises(ConfigError, match=r"run: group_by_modality_length .* needs mix: sample"):
        load_config(write_yaml(tmp_path / "x.yaml", tiny_experiment))


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed_experiment(tiny_experiment: dict[str, Any], llava_data: Path, tmp_path: Path) -> dict[str, Any]:
    """24 records with a picture and 16 of text, in optimiser steps of 8."""
    records = json.loads((llava_data / "train.json").read_text())
    text = records.pop()
    records += [{**text, "id": f"t{k}"} for k in range(16)]
    (tmp_path / "mixed.json").write_text(json.dumps(records))
    tiny_experiment["datasets"]["colours"]["annotations"] = {"train": str(tmp_path / "mixed.json")}
    tiny_experiment["run"] |= {"group_by_modality_length": True, "global_batch_size": 8, "batch_size_train": 2}
    return tiny_experiment


def test_two_processes_train_as_one(mixed_experiment: dict[str, Any], tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "x.yaml", mixed_experiment)
    two = run_train(config, processes=2)
    assert two.returncode == 0, two.stderr
    run_experiment(load_config(config, [f"run.output_dir={tmp_path}/one"]), Console(quiet=True))
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    assert len(losses(tmp_path / "one")) == 5


def test_a_run_goes_on_in_the_middle_of_a_pass(
    mixed_experiment: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = Console(quiet=True)
    mixed_experiment["run"] |= {"max_epoch": 2, "save_freq": 3}
    config = write_yaml(tmp_path / "x.yaml", mixed_experiment)
    run_experiment(load_config(config, [f"run.output_dir={tmp_path}/whole"]), quiet)
    after_step = Runner._after_step

    def dying(self: Runner, log: Any) -> None:
        after_step(self, log)
        if self.state.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_after_step", dying)
        with pytest.raises(KeyboardInterrupt):
            run_experiment(load_config(config), quiet)
    run_experiment(load_config(config), quiet)
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 10
