"""Mini-Gemini's shipped files, stage 1, stage 2 and HD, with options alone and tiny parts, under every engine.

Each is run by one process, by two under DDP, and by two under DeepSpeed at the ZeRO level that the file names: in fp32,
where all must agree, and in bf16, as they are meant to be trained. All on CPUs (gloo). There an offloaded state lies
where it would lie anyhow, and torch's AdamW updates it: offloading from a GPU to the CPU is not tried here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_mgm import golden_json
from helpers import ROOT, losses, run_train
from mini_gemini_parts import data_options, write_data, write_tiny
from runs_in_one_group import on_two_processes
from safetensors.torch import load_file
from torch import Tensor

from minivlm.checkpoints.native import read_manifest
from minivlm.cli import main
from minivlm.config import load_config
from minivlm.datasets.feed import make_feed
from minivlm.models.hub import hash_tensors
from minivlm.runners.runner import Runner

pytestmark = pytest.mark.slow

CONFIGS = ROOT / "train_configs"
STAGES = ("stage1", "stage2", "hd_stage2")
LEVELS = {
    "2b": ("zero2_offload", "zero2", "zero2"),
    "7b": ("zero2_offload", "zero2_offload", "zero2"),
    "8x7b": ("zero3", "zero3", "zero3"),
}
"""What ``run.deepspeed`` is in the files."""
NARROW = ("2b", "8x7b")
"""Those also run in bf16: one under ZeRO-2 and one under ZeRO-3."""
STEPS, LONG = 4, 20
TOLERANCE = 1e-5
"""Of losses near 6, in fp32: sums over samples are made in another order."""
UPDATE_TOLERANCE = 0.01
"""Of the norm of a tensor's update."""
each_size = pytest.mark.parametrize("size", LEVELS)


class Runs:
    """The runs of all sizes: what they need beside the file, and where they are."""

    def __init__(self, place: Path):
        self.place = place
        self.data = write_data(place / "data")
        self.encoders: dict[str, set[str]] = {}
        """By size the fingerprints of the encoder in memory, behind the training of each stage by one process."""

    def folder(self, size: str, engine: str, stage: str) -> Path:
        return self.place / size / engine / stage

    def of(self, size: str, engine: str, stage: str, **run: Any) -> tuple[str, list[str]]:
        """File and options; the ZeRO level stays that of the file."""
        file = CONFIGS / f"mini_gemini_{size}_{stage}.yaml"
        pixels = golden_json(f"llama_{'hd' if 'hd' in stage else 'base'}/config.json")["image_size_aux"]
        given = [*data_options(file, self.data), f"model.vision_encoder.high.image_size={pixels}"]
        if stage == "stage1":
            given.append(f"model.language_model.dtype={'bf16' if engine == 'bf16' else 'fp32'}")
        else:
            given.append(f"model.checkpoint={self.folder(size, engine, 'stage1')}")
        settings = {"output_dir": self.folder(size, engine, stage), "device": "cpu", "num_workers": 0}
        settings |= {"precision": "bf16" if engine == "bf16" else "fp32", "batch_size_train": 2, "max_steps": STEPS}
        settings |= {"global_batch_size": 4, "save_freq": 1, "keep_last": STEPS}
        if engine in ("single", "ddp"):
            settings |= {"engine": engine, "deepspeed": "null"}
        return str(file), given + [f"run.{key}={value}" for key, value in (settings | run).items()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Everything trained once: by two processes in one launch, then by this one."""
    made = Runs(tmp_path_factory.mktemp("end_to_end"))
    with pytest.MonkeyPatch.context() as patch:
        for size in LEVELS:
            for variable, path in write_tiny(made.place / f"zoo_{size}", size).items():
                patch.setenv(variable, path)
        chosen = {"deepspeed": LEVELS, "bf16": NARROW, "ddp": LEVELS}
        listed = [made.of(size, kind, stage) for kind, sizes in chosen.items() for size in sizes for stage in STAGES]
        stage1 = f"{made.folder('8x7b', 'deepspeed', 'stage1')}"
        file, given = made.of("8x7b", "zero3_offload", "stage2", deepspeed="zero3_offload")
        listed.append((file, [*given, f"model.checkpoint={stage1}"]))
        listed.append(long_run(made, "whole"))
        on_two_processes(made.place, listed)
        finish = Runner._finish
        for size in LEVELS:
            for stage in STAGES:
                seen = made.encoders.setdefault(size, set())

                def noting(self: Runner, seen: set[str] = seen) -> None:
                    seen.add(hash_tensors(self.model.vision_encoder.state_dict().items()))
                    finish(self)

                patch.setattr(Runner, "_finish", noting)
                file, given = made.of(size, "single", stage)
                assert main(["train", "--cfg-path", file, "--options", *given]) == 0
        patch.setattr(Runner, "_finish", finish)
        yield made


def long_run(runs: Runs, name: str) -> tuple[str, list[str]]:
    """8x7B's second stage under ZeRO-3, long enough to be stopped in the middle."""
    more = {"output_dir": runs.folder("8x7b", "long", name), "max_steps": LONG, "save_freq": 1000}
    file, given = runs.of("8x7b", "long", "stage2", **more)
    return file, [*given, f"model.checkpoint={runs.folder('8x7b', 'deepspeed', 'stage1')}"]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def at_start(folder: Path) -> dict[str, Tensor]:
    """The weights behind the first step, whose rate is 0."""
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[0])["lr"] == 0
    return weights(folder / "checkpoints" / "step_00000001")


def connector(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith("connector.")}


def updates(folder: Path) -> dict[str, Tensor]:
    """What the training has added to each tensor."""
    before = at_start(folder)
    return {name: tensor - before[name] for name, tensor in weights(folder).items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def settings_of(folder: Path) -> Any:
    return load_config(folder / "config.yaml").stages[0].run


@each_size
def test_every_engine_gives_the_losses_and_weights_of_one_process(runs: Runs, size: str) -> None:
    for stage, level in zip(STAGES, LEVELS[size], strict=True):
        single, ddp, deepspeed = (runs.folder(size, engine, stage) for engine in ("single", "ddp", "deepspeed"))
        assert (settings_of(deepspeed).engine, settings_of(deepspeed).deepspeed) == ("deepspeed", level)
        assert len(list((deepspeed / "checkpoints" / "step_00000004" / "deepspeed").glob("*optim_states.pt"))) == 2
        expected = losses(single)
        assert len(expected) == STEPS and len(set(expected)) == STEPS
        updated = updates(single)
        # AdamW moves a weight by the rate at every step; where it is far less, gradients are near its epsilon: noise.
        rates = sum(json.loads(line)["lr"] for line in (single / "log.jsonl").read_text().splitlines())
        clear = {name for name, tensor in updated.items() if tensor.abs().max() > 0.1 * rates}
        assert {name for name in updated if "connector.query" not in name and "connector.key" not in name} <= clear
        for folder in (ddp, deepspeed):
            assert losses(folder) == pytest.approx(expected, abs=TOLERANCE), (stage, folder)
            ours = updates(folder)
            assert ours.keys() == updated.keys()
            assert all(ours[name].abs().max() < 0.2 * rates for name in ours.keys() - clear)
            for name in clear:
                error = (ours[name] - updated[name]).norm() / updated[name].norm()
                assert error < UPDATE_TOLERANCE, (folder, name)


def test_the_connector_of_8x7b_trains_at_twice_the_rate(runs: Runs) -> None:
    for stage in STAGES[1:]:
        moved = updates(runs.folder("8x7b", "deepspeed", stage))
        language, projector = (
            max(float(tensor.abs().max()) for name, tensor in moved.items() if name.startswith(part))
            for part in ("language_model.", "connector.projector.")
        )
        assert 1.5 < projector / language < 2.5


def test_an_optimiser_kept_in_the_cpus_memory_is_the_same_under_zero_3(runs: Runs) -> None:
    offloaded, plain = (runs.folder("8x7b", engine, "stage2") for engine in ("zero3_offload", "deepspeed"))
    assert settings_of(offloaded).deepspeed == "zero3_offload"
    assert losses(offloaded) == pytest.approx(losses(plain), abs=TOLERANCE)


@pytest.mark.parametrize("size", NARROW)
def test_bf16_follows_fp32(runs: Runs, size: str) -> None:
    for stage in STAGES:
        narrow = runs.folder(size, "bf16", stage)
        assert {tensor.dtype for tensor in weights(narrow).values()} == {torch.bfloat16}
        assert losses(narrow) == pytest.approx(losses(runs.folder(size, "deepspeed", stage)), abs=0.03)


@each_size
def test_what_trains_changes_and_what_is_frozen_does_not(runs: Runs, size: str) -> None:
    assert len(runs.encoders[size]) == 1, "the encoder is the same behind every stage"
    for engine in ("single", "deepspeed"):
        for stage in STAGES:
            folder = runs.folder(size, engine, stage)
            parts = {"connector"} if stage == "stage1" else {"connector", "language_model"}
            before, after = at_start(folder), weights(folder)
            assert {name.split(".")[0] for name in after} == parts
            assert set(read_manifest(folder / "model").complete) == parts
            for name, tensor in after.items():  # but what moves all shares of attention alike, and they sum to 1
                assert not torch.equal(tensor, before[name]) or name in ("connector.key.0.bias", "connector.key.1.bias")


@each_size
def test_stage_2_and_hd_both_start_from_the_first_stage(runs: Runs, size: str) -> None:
    for engine in ("single", "ddp", "deepspeed", *(["bf16"] if size in NARROW else [])):
        first = weights(runs.folder(size, engine, "stage1"))
        for stage in STAGES[1:]:
            folder = runs.folder(size, engine, stage)
            assert_equal(connector(at_start(folder)), first)
            assert any(not torch.equal(weights(folder)[name], tensor) for name, tensor in first.items())


def test_the_second_stages_have_met_steps_of_text_alone(runs: Runs) -> None:
    import minivlm
    from minivlm.datasets.training_set import build_datasets, build_split

    for stage in STAGES[1:]:
        folder = runs.folder("2b", "single", stage)
        _, processor = minivlm.load(folder, device="cpu")
        file, given = runs.of("2b", "single", stage)
        config = load_config(file, given).stages[0]
        feed = make_feed(build_split(build_datasets(config.datasets), ["train"]), processor, config.run)
        pictures = [batch.num_images for batch in feed.batches(0, STEPS * feed.accumulation)]
        assert 0 in pictures and any(pictures)


@each_size
def test_the_hd_model_answers(runs: Runs, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    picture = str(runs.data / "MGM-Finetune" / "coco" / "red.jpg")
    answers = []
    for engine in ("single", "deepspeed", *(["bf16"] if size in NARROW else [])):
        given = [str(runs.folder(size, engine, "hd_stage2")), "--image-file", picture, "--device", "cpu"]
        given += ["--query", "What colour is it?", "--temperature", "1", "--max-new-tokens", "8"]
        torch.manual_seed(3)  # greedy, the tied Gemma would repeat the newline before its answer
        assert main(["chat", *given]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and all(answer.strip() for answer in answers)


def test_a_run_under_zero_3_that_was_stopped_goes_on_to_the_bit(runs: Runs) -> None:
    """SIGTERM to torchrun, as a scheduler sends it, and the same command again."""
    file, given = long_run(runs, "stopped")
    stopped, whole = (runs.folder("8x7b", "long", name) for name in ("stopped", "whole"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*launcher, str(ROOT / "train.py"), "--cfg-path", file, "--options", *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    log, end = stopped / "log.jsonl", time.monotonic() + 120
    while not (log.is_file() and len(log.read_text().splitlines()) >= 3):
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert "the state is saved" in said and "to go on: torchrun --nproc-per-node 2" in said
    reached = len(losses(stopped))
    assert 3 <= reached < LONG and (stopped / "checkpoints" / f"step_{reached:08d}" / "deepspeed").is_dir()
    again = run_train(Path(file), *given, processes=2)
    assert again.returncode == 0, again.stderr[-3000:]
    assert f"(step {reached} of {LONG})" in again.stdout
    assert losses(stopped) == losses(whole)
    assert_equal(weights(stopped), weights(whole))
