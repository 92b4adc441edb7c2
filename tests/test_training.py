"""The training loop: what it optimises, on one process and on two, and what stops it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import losses, run_train, tiny_model, write_yaml
from rich.console import Console

from minivlm.config import load_config
from minivlm.datasets.base import DatasetError
from minivlm.datasets.sampling import BatchPlan
from minivlm.runners.experiment import run_experiment
from minivlm.runners.logs import _smooth
from minivlm.runners.precision import PrecisionError, cpu_has_bf16, resolve_precision

QUIET = Console(quiet=True)


def train(content: dict[str, Any], tmp_path: Path, *options: str) -> Path:
    config = write_yaml(tmp_path / "x.yaml", content)
    run_experiment(load_config(config, options), QUIET)
    return Path(load_config(config, options).stages[-1].run.output_dir)


def test_two_processes_equal_one_with_twice_the_batch(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    tiny_experiment["run"] |= {"max_epoch": 3, "max_steps": 8}
    config = write_yaml(tmp_path / "x.yaml", tiny_experiment)
    one = run_train(config, "run.batch_size_train=8", "run.num_workers=1", f"run.output_dir={tmp_path}/one")
    two = run_train(config, "run.batch_size_train=4", f"run.output_dir={tmp_path}/two", processes=2)
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    a, b = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(a) == 8
    assert a == pytest.approx(b, abs=1e-5)
    assert a[-1] < a[0]


def test_two_processes_train_the_encoder_on_mixed_and_text_only_batches(
    tiny_experiment: dict[str, Any], tmp_path: Path
) -> None:
    tiny_experiment["model"]["vision_encoder"] |= {"freeze": False}
    tiny_experiment["run"] |= {"batch_size_train": 1, "group_by_length": False}  # one process meets text alone
    config = write_yaml(tmp_path / "x.yaml", tiny_experiment)
    two = run_train(config, processes=2)
    assert two.returncode == 0, two.stderr
    one = run_train(config, "run.batch_size_train=2", f"run.output_dir={tmp_path}/one")
    assert one.returncode == 0, one.stderr
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (4, 2), (2, 4)])
def test_accumulation_does_not_change_the_result(
    tiny_experiment: dict[str, Any], tmp_path: Path, batch: int, accumulation: int
) -> None:
    """Samples differ in their number of supervised tokens, so a mean of means would differ."""
    tiny_experiment["run"] |= {"max_steps": 1, "group_by_length": False, "max_grad_norm": 1e9}
    out = train(tiny_experiment, tmp_path, f"run.batch_size_train={batch}", f"run.accum_grad_iters={accumulation}")
    record = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    reference = train(tiny_experiment, tmp_path, "run.batch_size_train=8", f"run.output_dir={tmp_path}/reference")
    expected = json.loads((reference / "log.jsonl").read_text().splitlines()[0])
    for key in ("loss", "grad_norm", "supervised_tokens"):
        assert record[key] == pytest.approx(expected[key], rel=1e-5), key


def test_a_tiny_model_learns_its_data_by_heart(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    tiny_experiment["datasets"]["colours"]["max_samples"] = 8
    tiny_experiment["run"] |= {"batch_size_train": 8, "max_epoch": 60, "init_lr": 1e-2, "warmup_steps": 5}
    tiny_experiment["model"]["vision_encoder"]["freeze"] = False
    out = train(tiny_experiment, tmp_path)
    assert losses(out)[-1] < 0.05


def test_loss_starts_at_the_log_of_the_vocabulary(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    assert losses(train(tiny_experiment, tmp_path))[0] == pytest.approx(math.log(360), abs=0.4)


def test_parts_have_their_own_learning_rate_and_frozen_ones_do_not_move(
    tiny_experiment: dict[str, Any], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    tiny_experiment["model"]["connector"] |= {"init_lr": 1e-9}
    before = train(tiny_experiment, tmp_path, "run.max_steps=1", f"run.output_dir={tmp_path}/a")
    after = train(tiny_experiment, tmp_path, f"run.output_dir={tmp_path}/b")
    first, second = (load_file(p / "model" / "model.safetensors") for p in (before, after))
    for name, tensor in first.items():
        moved = (second[name] - tensor).abs().max().item()
        if name.startswith("vision_encoder."):
            assert moved == 0, name
        elif name.startswith("connector."):
            assert moved < 1e-7, name
    assert any((second[n] - t).abs().max() > 1e-3 for n, t in first.items() if n.startswith("language_model."))


def test_bad_pictures_are_skipped_counted_and_named(
    tiny_experiment: dict[str, Any], tmp_path: Path, llava_data: Path
) -> None:
    data = Path(shutil.copytree(llava_data, tmp_path / "data"))
    (data / "images" / "3.png").write_bytes(b"no picture")
    (data / "images" / "5.png").unlink()
    tiny_experiment["datasets"]["colours"] |= {"annotations": str(data / "train.json"), "images": str(data / "images")}
    out = train(tiny_experiment, tmp_path, "run.max_bad_share=0.2", "run.max_epoch=2")
    named = [json.loads(line)["id"] for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(named) == ["r3", "r5"]
    with pytest.raises(DatasetError, match="max_bad_share"):
        train(tiny_experiment, tmp_path, f"run.output_dir={tmp_path}/strict", "run.max_bad_share=0.01")
    with pytest.raises(ValueError, match=r"'r[35]'"):
        train(tiny_experiment, tmp_path, f"run.output_dir={tmp_path}/raise", "run.on_bad_sample=raise")


def test_empty_and_too_small_data_are_errors(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="25 training samples do not fill one batch of 64"):
        train(tiny_experiment, tmp_path, "run.batch_size_train=64")
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    with pytest.raises(DatasetError, match="empty"):
        train(tiny_experiment, tmp_path, f"datasets.colours.annotations={empty}")
    with pytest.raises(DatasetError, match="no dataset has a split 'nights'"):
        train(tiny_experiment, tmp_path, "run.train_splits=[nights]")


def test_non_finite_steps_are_skipped_then_the_run_aborts(
    tiny_experiment: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minivlm.models.vlm import VisionLanguageModel
    from minivlm.runners.runner import TrainingError

    forward = VisionLanguageModel.forward
    calls = []

    def exploding(self: Any, batch: Any, return_logits: bool = False) -> Any:
        output = forward(self, batch, return_logits)
        calls.append(1)
        if len(calls) in bad:
            output.loss_sum = output.loss_sum * float("nan")
        return output

    monkeypatch.setattr(VisionLanguageModel, "forward", exploding)
    bad = {2}
    out = train(tiny_experiment, tmp_path)
    values = losses(out)
    assert math.isnan(values[1]) and all(math.isfinite(v) for i, v in enumerate(values) if i != 1)
    bad = set(range(1, 100))
    with pytest.raises(TrainingError, match="not finite"):
        train(tiny_experiment, tmp_path, f"run.output_dir={tmp_path}/nan", "run.nan_patience=2")


def test_weighted_mixing_follows_the_ratios(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    plan = BatchPlan([1000, 10], batch_size=101, seed=0, ratios=[1.0, 3.0])
    drawn = [index for number in range(plan.batches_per_pass) for index in plan.batch(number)]
    share = sum(index >= 1000 for index in drawn) / len(drawn)
    assert share == pytest.approx(0.75, abs=0.05)
    tiny_experiment["datasets"]["again"] = {**tiny_experiment["datasets"]["colours"], "sample_ratio": 2}
    assert len(losses(train(tiny_experiment, tmp_path))) == 12


def test_every_sample_comes_once_a_pass_and_lengths_are_grouped() -> None:
    lengths = [(7 * i) % 100 for i in range(1000)]
    left_over = BatchPlan([9], batch_size=4, seed=1, lengths=list(range(9)))
    assert any(8 in left_over.batch(n) for n in range(40)), "the longest sample is not always the one left over"
    plan = BatchPlan([1000], batch_size=10, seed=1, lengths=lengths)
    first = [plan.batch(n) for n in range(100)]
    assert sorted(i for batch in first for i in batch) == list(range(1000))
    spread = sum(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in first) / 100
    assert spread < 10
    assert [plan.batch(n) for n in range(100, 200)] != first
    assert plan.batch(3) == first[3], "a batch is a function of its number"
    halves = [plan.share(5, rank, 2) for rank in range(2)]
    assert sorted(halves[0] + halves[1]) == sorted(plan.batch(5))


def test_precision_is_resolved_and_fp16_on_cpu_refused() -> None:
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu) == ("bf16" if cpu_has_bf16() else "fp32")
    assert resolve_precision("fp32", cpu) == "fp32"
    with pytest.raises(PrecisionError, match="fp16"):
        resolve_precision("fp16", cpu)


def test_bf16_trains_like_fp32(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    full = losses(train(tiny_experiment, tmp_path))
    half = losses(train(tiny_experiment, tmp_path, "run.precision=bf16", f"run.output_dir={tmp_path}/bf16"))
    assert half == pytest.approx(full, abs=0.1) and half != full


def test_stages_hand_on_their_weights(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    import minivlm

    tiny_experiment["stages"] = [
        {"name": "align", "model": {"language_model": {"freeze": True}}},
        {"name": "tune", "model": {"connector": {"freeze": True}}},
    ]
    train(tiny_experiment, tmp_path)
    aligned, _ = minivlm.load(tmp_path / "out" / "align")
    tuned, _ = minivlm.load(tmp_path / "out" / "tune")
    first, second = aligned.state_dict(), tuned.state_dict()
    for name in first:
        same = torch.equal(first[name], second[name])
        assert same == (not name.startswith("language_model.") or "rotary" in name), name


def test_loss_curve_and_config_are_written(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    from PIL import Image

    out = train(tiny_experiment, tmp_path, "run.trackers=[tensorboard]")
    assert Image.open(out / "loss_curve.png").size == (960, 480)
    assert "init_lr: 0.005" in (out / "config.yaml").read_text()
    assert list((out / "tensorboard").iterdir())


def test_a_smoothed_loss_does_not_lag() -> None:
    falling = [100 - n for n in range(100)]
    smoothed = _smooth([float(n) for n in falling])
    assert smoothed[:98] == pytest.approx(falling[:98])  # on a line the mean of both sides is the value itself
    assert smoothed[98:] == pytest.approx([2.5, 2.0])
    assert _smooth([1.0, 1.0, 7.0, 1.0, 1.0]) == pytest.approx([1, 3, 3, 3, 1])


def test_best_checkpoint_by_validation(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    tiny_experiment["run"] |= {"valid_splits": ["test"], "eval_freq": 2, "init_lr": 1e-2}
    out = train(tiny_experiment, tmp_path)
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    validations = [e for e in events if "lr" not in e]
    assert [e["step"] for e in validations] == [2, 4, 6]
    best = min(validations, key=lambda e: e["loss"])
    assert json.loads((out / "best" / "manifest.json").read_text())["step"] == best["step"]


def test_typo_is_answered_without_torch(tmp_path: Path) -> None:
    content = {"model": tiny_model(), "run": {"inti_lr": 1e-3}, "datasets": {}}
    config = write_yaml(tmp_path / "x.yaml", content)
    line = config.read_text().splitlines().index("  inti_lr: 0.001") + 1
    blocker = tmp_path / "block"
    blocker.mkdir()
    (blocker / "torch.py").write_text("raise SystemExit('torch was imported')")
    result = run_train(config, env={"PYTHONPATH": str(blocker)})
    assert result.returncode == 2
    assert f"{config}:{line}" in result.stderr and "did you mean 'init_lr'" in result.stderr
    assert "torch was imported" not in result.stderr and "Traceback" not in result.stderr


def test_a_checkpoint_for_all_stages_is_where_the_first_one_starts(
    tiny_experiment: dict[str, Any], tmp_path: Path
) -> None:
    base = train(tiny_experiment, tmp_path, f"run.output_dir={tmp_path}/base")
    tiny_experiment["stages"] = [{"name": "one"}, {"name": "two"}]
    tiny_experiment["model"]["checkpoint"] = str(base)
    train(tiny_experiment, tmp_path)
    one, two = losses(tmp_path / "out" / "one"), losses(tmp_path / "out" / "two")
    assert two[0] < one[0], "the second stage goes on from the first, not from the common start"


def test_eval_command_scores_what_was_trained(
    tiny_experiment: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from minivlm.cli import evaluate

    tiny_experiment["run"] |= {"test_splits": ["test"], "init_lr": 1e-2, "max_epoch": 3}
    base = train(tiny_experiment, tmp_path, f"run.output_dir={tmp_path}/base", "run.max_steps=1")
    tiny_experiment["model"]["checkpoint"] = str(base)
    trained = train(tiny_experiment, tmp_path)
    done = json.loads((trained / "done.json").read_text())["metrics"]["loss"]
    capsys.readouterr()
    assert evaluate([str(tmp_path / "x.yaml")]) == 0
    assert f"{done:.4f}" in capsys.readouterr().out
