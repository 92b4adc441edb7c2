"""run.engine: deepspeed: its settings, the same training under every ZeRO stage, its checkpoints, its compilation.

Most runs are of one process, in this one: what is shared out then is whole, and all else is as with several.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, losses, tiny_model, write_yaml
from rich.console import Console
from runs_in_one_group import on_two_processes
from safetensors.torch import load_file
from torch import Tensor

from minivlm.api import assemble
from minivlm.cli import main
from minivlm.config import ConfigError, load_config
from minivlm.config.deepspeed import fill_deepspeed, fill_sizes, names, offloads_optimizer, read_deepspeed, zero_stage
from minivlm.config.experiment import RunConfig
from minivlm.config.loader import parse_model
from minivlm.models.vlm import VisionLanguageModel
from minivlm.runners import deepspeed_build
from minivlm.runners.deepspeed_build import import_deepspeed, load_operator, refuse_stale_lock
from minivlm.runners.deepspeed_engine import DeepSpeedEngine
from minivlm.runners.engines import EngineError
from minivlm.runners.experiment import run_experiment
from minivlm.runners.runner import Runner
from minivlm.tasks.base import Task
from minivlm.types import Batch

CPU = torch.device("cpu")
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """A process group with this process only; DeepSpeed takes one in its life."""
    before = {key: os.environ.get(key) for key in ("LOCAL_RANK", "DS_ACCELERATOR")}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    import deepspeed.comm.comm

    gc.collect()
    dist.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    for key, value in before.items():
        os.environ.pop(key, None)
        os.environ.update({key: value} if value is not None else {})


@pytest.fixture
def experiment(tiny_experiment: dict[str, Any]) -> dict[str, Any]:
    """Four steps of two micro batches, with embeddings that are the head as well."""
    tiny_experiment["model"]["language_model"]["config"]["tie_word_embeddings"] = True
    more = {"accum_grad_iters": 2, "max_epoch": 2, "max_steps": 4, "save_freq": 2, "lr_sched": "constant_lr"}
    tiny_experiment["run"] |= {"engine": "deepspeed", "deepspeed": "zero2", **more}
    return tiny_experiment


def train(experiment: dict[str, Any], folder: Path, name: str, *options: str) -> Path:
    config = write_yaml(folder / "x.yaml", experiment)
    run_experiment(load_config(config, [f"run.output_dir={folder / name}", *options]), QUIET)
    return folder / name


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def assert_close(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    assert losses(one) == pytest.approx(losses(other), abs=tolerance)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=tolerance, rtol=0, msg=name)


# --- settings -------------------------------------------------------------------------------------------------------


def run_of(**changes: Any) -> RunConfig:
    return RunConfig(**{"engine": "deepspeed", "batch_size_train": 4, "global_batch_size": 64, **changes})


@pytest.mark.parametrize("name", names())
def test_what_the_packaged_settings_leave_open_comes_from_the_run(name: str) -> None:
    settings = fill_deepspeed(run_of(deepspeed=name), processes=8, precision="bf16")
    assert settings["train_micro_batch_size_per_gpu"] == 4
    assert settings["gradient_accumulation_steps"] == 2 and settings["train_batch_size"] == 64
    assert settings["gradient_clipping"] == 1.0
    assert settings["bf16"]["enabled"] is True and settings["fp16"]["enabled"] is False
    assert zero_stage(settings) == int(name[4]) and offloads_optimizer(settings) == ("offload" in name)
    assert "optimizer" not in settings and "scheduler" not in settings
    fill_sizes(settings, 100)
    zero = settings["zero_optimization"]
    assert zero["reduce_bucket_size"] == 10_000
    if name.startswith("zero3"):
        assert zero["stage3_prefetch_bucket_size"] == 9_000 and zero["stage3_param_persistence_threshold"] == 1_000
    assert "auto" not in json.dumps(settings)


def test_there_are_the_settings_of_the_recipes() -> None:
    assert names() == ["zero2", "zero2_offload", "zero3", "zero3_offload"]


def test_what_contradicts_the_run_is_refused_with_both_values(tmp_path: Path) -> None:
    given = {
        "train_batch_size": 256,
        "train_micro_batch_size_per_gpu": 4,
        "fp16": {"enabled": True},
        "gradient_clipping": 0.5,
        "bf16": {"check_grad_overflow": False},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.5, "betas": [0.9, 0.999]}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}},
        "zero_optimization": {"stage": 1},
    }
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(given))
    with pytest.raises(ConfigError) as error:
        fill_deepspeed(run_of(deepspeed=str(file)), processes=8, precision="bf16")
    said = str(error.value)
    assert "train_batch_size is 256, but 4 per process x 2 accumulation x 8 processes makes it 64" in said
    assert "fp16.enabled is true, but run.precision (bf16) makes it false" in said
    assert "gradient_clipping is 0.5, but run.max_grad_norm makes it 1.0" in said
    assert "lr is 0.5, but the run makes it 0.0001" in said
    assert "scheduler.params.warmup_num_steps is 3, but the rate follows run.lr_sched" in said
    assert "bf16.check_grad_overflow is false, but a step that is not finite must change no weight" in said
    assert len(said.splitlines()) == 6 and str(file) in said
    file.write_text(json.dumps(given | {"optimizer": {"type": "Lamb"}}))
    with pytest.raises(ConfigError, match=r"optimizer.type is Lamb, but minivlm trains with AdamW"):
        fill_deepspeed(run_of(deepspeed=str(file)), processes=8, precision="bf16")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "needs it: one of zero2, zero2_offload, zero3, zero3_offload, or the path of a JSON file"),
        ("", "there is no file"),
        ("{", "cannot be read as JSON"),
        ('{"zero_optimization": {"stage": 0}}', "stage must be 1, 2 or 3 .without ZeRO, use run.engine: ddp"),
    ],
)
def test_settings_that_are_none(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "mine.json"
    if content:
        file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_deepspeed(run_of(deepspeed=None if content is None else str(file)))


def test_a_key_that_deepspeed_does_not_know_is_one_message(alone: None, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"zero_optimization": {"stage": 2, "overlap_com": true}}')
    with pytest.raises(EngineError, match=r"run.deepspeed: DeepSpeed refuses the settings: .*overlap_com"):
        DeepSpeedEngine(CPU, "fp32", RunConfig(engine="deepspeed", deepspeed=str(file)))


def test_without_deepspeed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(EngineError, match=r'pip install "minivlm\[deepspeed\]"'):
        import_deepspeed(CPU)


def test_a_device_that_deepspeed_does_not_have() -> None:
    with pytest.raises(EngineError, match="runs on cuda and cpu, not on mps"):
        import_deepspeed(torch.device("mps"))


def test_the_dry_run_names_the_settings(
    experiment: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_yaml(tmp_path / "x.yaml", experiment)
    assert main(["train", str(file), "--dry-run", "--options", "run.deepspeed=zero3_offload"]) == 0
    assert "DeepSpeed zero3_offload: ZeRO-3, the optimiser's state in the CPU's memory" in capsys.readouterr().out
    mine = tmp_path / "mine.json"
    mine.write_text('{"zero_optimization": {"stage": 2}, "train_batch_size": 64}')
    assert main(["train", str(file), "--dry-run", "--options", f"run.deepspeed={mine}"]) == 0
    shown = capsys.readouterr().out
    assert "with 1 process this is refused" in shown and "train_batch_size is 64, but 4 per process x 2" in shown
    assert main(["train", str(file), "--options", "run.deepspeed=zero4"]) == 2
    assert "run.deepspeed: there is no file zero4" in capsys.readouterr().err


# --- one process ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zero2_offload", "zero3"])
def test_a_run_equals_one_without_deepspeed_and_goes_on_from_a_checkpoint(
    alone: None, experiment: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    plain = train(experiment, tmp_path, "plain", "run.engine=single")
    whole = train(experiment, tmp_path, "whole", f"run.deepspeed={name}")
    assert_close(whole, plain)
    norms = [[json.loads(line)["grad_norm"] for line in (p / "log.jsonl").open()] for p in (whole, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    checkpoint = whole / "checkpoints" / "step_00000002"
    assert sorted(p.name for p in checkpoint.iterdir()) == [
        "deepspeed",
        "deepspeed.json",
        "model",
        "random.pt",
        "state.json",
    ]

    after_step = Runner._after_step

    def dying(self: Runner, log: Any) -> None:
        after_step(self, log)
        if self.state.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_after_step", dying)
        with pytest.raises(KeyboardInterrupt):
            train(experiment, tmp_path, "broken", f"run.deepspeed={name}")
    torch.manual_seed(5)  # whatever another process would have done meanwhile
    broken = train(experiment, tmp_path, "broken", f"run.deepspeed={name}")
    assert losses(broken) == losses(whole)
    assert all(torch.equal(tensor, weights(broken)[key]) for key, tensor in weights(whole).items())


def test_bf16_keeps_the_weights_narrow_and_its_masters_in_fp32(
    alone: None, experiment: dict[str, Any], tmp_path: Path
) -> None:
    two, three = (
        train(experiment, tmp_path, name, f"run.deepspeed={name}", "run.precision=bf16", "run.init_lr=1e-5")
        for name in ("zero2", "zero3")
    )
    plain = train(experiment, tmp_path, "plain", "run.engine=single", "run.precision=bf16", "run.init_lr=1e-5")
    assert losses(two) == pytest.approx(losses(three), abs=2e-3)
    assert losses(two) == pytest.approx(losses(plain), abs=2e-2)
    assert {tensor.dtype for tensor in weights(three).values()} == {torch.bfloat16}
    shard = next((two / "checkpoints" / "step_00000004" / "deepspeed").glob("*optim_states.pt"))
    masters = _load_shard(shard)["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    assert all(tensor.dtype == torch.float32 for tensor in masters)
    # Updates that are lost on a bf16 weight add up in its master.
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in masters)


def _load_shard(file: Path) -> Any:
    from minivlm.runners.deepspeed_engine import _load_safely

    return _load_safely(str(file), "cpu")


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_a_step_that_is_not_finite_changes_nothing(
    alone: None, experiment: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    forward = VisionLanguageModel.forward
    calls = []

    def exploding(self: Any, batch: Batch, return_logits: bool = False) -> Any:
        output = forward(self, batch, return_logits)
        calls.append(1)
        if len(calls) == 3:  # of the second step; its gradients are finite, the value is not
            output.loss_sum = output.loss_sum + float("inf")
        return output

    monkeypatch.setattr(VisionLanguageModel, "forward", exploding)
    options = (f"run.deepspeed={name}", "run.max_steps=3", "run.save_freq=1", "run.keep_last=3")
    out = train(experiment, tmp_path, "out", *options)
    before, after, last = (weights(out / "checkpoints" / f"step_0000000{step}") for step in (1, 2, 3))
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not all(torch.equal(after[key], last[key]) for key in before)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_the_best_weights_are_taken_and_evaluated(
    alone: None, experiment: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    experiment["run"] |= {"valid_splits": ["test"], "test_splits": ["test"], "eval_freq": 1}
    evaluate = Task.evaluate
    found: list[float] = []

    def growing(self: Task, *given: Any, full: bool = False, **options: Any) -> dict[str, float]:
        found.append(evaluate(self, *given, full=full, **options)["loss"])
        return {"loss": found[-1] if full else float(len(found))}

    monkeypatch.setattr(Task, "evaluate", growing)
    out = train(experiment, tmp_path, "out", f"run.deepspeed={name}")
    assert len(found) == 5 and found[3] < found[0]
    assert found[4] == pytest.approx(found[0], abs=1e-6), "the last one is of the weights of the first"
    first, last = load_file(out / "best" / "model.safetensors"), weights(out / "checkpoints" / "step_00000004")
    assert all(torch.equal(weights(out)[key], tensor) for key, tensor in first.items())
    assert not all(torch.equal(last[key], tensor) for key, tensor in first.items())


def test_stages_and_a_feature_cache(alone: None, experiment: dict[str, Any], tmp_path: Path) -> None:
    experiment["stages"] = [
        {"name": "align", "model": {"language_model": {"freeze": True}}},
        {"name": "tune", "run": {"deepspeed": "zero3"}},
    ]
    experiment["run"] |= {"max_steps": 2, "save_freq": 2}
    cache = f"run.feature_cache={tmp_path / 'cache'}"
    shared = train(experiment, tmp_path, "shared", cache)
    plain = train(experiment, tmp_path, "plain", cache, "run.engine=single")
    for stage in ("align", "tune"):
        assert_close(shared / stage, plain / stage)


def test_checkpoints_of_something_else_are_refused(alone: None, experiment: dict[str, Any], tmp_path: Path) -> None:
    experiment["run"] |= {"max_steps": 1, "save_freq": 1}
    zero2 = train(experiment, tmp_path, "zero2")
    plain = train(experiment, tmp_path, "plain", "run.engine=single")
    resume = f"run.resume={zero2}/checkpoints/step_00000001"
    with pytest.raises(ValueError, match="written under ZeRO-2, this run is under ZeRO-3"):
        train(experiment, tmp_path, "a", resume, "run.deepspeed=zero3", "run.max_steps=2")
    with pytest.raises(ValueError, match=r"was written with run.engine: deepspeed; go on with that, or start anew"):
        train(experiment, tmp_path, "b", resume, "run.engine=single", "run.max_steps=2")
    with pytest.raises(ValueError, match=r"was not written with run.engine: deepspeed"):
        train(experiment, tmp_path, "c", f"run.resume={plain}/checkpoints/step_00000001", "run.max_steps=2")
    with pytest.raises(ValueError, match="other trainable parameters"):
        train(experiment, tmp_path, "d", resume, "run.max_steps=2", "model.connector.freeze=true")
    shard = next((zero2 / "checkpoints" / "step_00000001" / "deepspeed").glob("*optim_states.pt"))
    torch.save({"optimizer_state_dict": print}, shard)  # a program, which must not be let in
    with pytest.raises(ValueError, match="is damaged, or no state of DeepSpeed's"):
        train(experiment, tmp_path, "e", resume, "run.max_steps=2")


def test_adapters_in_the_mining_find_weights_that_are_shared_out(
    alone: None, experiment: dict[str, Any], tmp_path: Path
) -> None:
    from golden_mgm import parts

    mined = parts("llama_base")
    mined["connector"] = {**mined["connector"], "lora": {"r": 2}}
    experiment["model"] |= mined
    settings = read_deepspeed(RunConfig(engine="deepspeed", deepspeed="zero3"))
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "zero3.json").write_text(json.dumps(settings))
    shared = train(experiment, tmp_path, "shared", f"run.deepspeed={tmp_path / 'zero3.json'}", "run.max_steps=2")
    plain = train(experiment, tmp_path, "plain", "run.engine=single", "run.max_steps=2")
    assert losses(shared) == pytest.approx(losses(plain), abs=1e-5)


def test_quantised_weights_are_not_shared_out(alone: None) -> None:
    model, _, _ = assemble(parse_model(tiny_model(), "test"))
    model.language_model.quantization = "int8"
    engine = DeepSpeedEngine(CPU, "fp32", RunConfig(engine="deepspeed", deepspeed="zero3"))
    with pytest.raises(EngineError, match=r"quantised weights \(model.language_model\); use zero2"):
        engine.prepare(model, engine.optimizer([{"params": list(model.connector.parameters())}], (0.9, 0.999)))


def test_a_batch_of_text_sends_a_blank_picture_along() -> None:
    section = tiny_model()
    section["vision_encoder"]["freeze"] = False
    model, _, _ = assemble(parse_model(section, "test"))
    seen: list[Any] = []
    model.vision_encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    ids = torch.tensor([[5, 6, 7]])
    batch = Batch(ids, torch.ones_like(ids), labels=ids)
    plain = model.train()(batch).loss
    model.always_encodes = True
    blank = model(batch).loss
    assert seen == [(1, 3, 32, 32)]
    assert torch.equal(plain, blank)
    blank.backward()
    assert all(float(p.grad.abs().max()) == 0 for p in model.connector.parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in model.vision_encoder.parameters()) > 10


@pytest.mark.slow
def test_a_kill_while_saving_leaves_the_earlier_checkpoint(
    alone: None, experiment: dict[str, Any], tmp_path: Path
) -> None:
    """The process dies when the shards are written and the folder is not yet whole."""
    config = write_yaml(tmp_path / "x.yaml", experiment)
    program = (
        "import os, signal, sys\nfrom minivlm.runners import runner\nfrom minivlm.cli import main\n"
        "write = runner.write_state\n"
        "def dying(folder, state, rngs):\n"
        "    if state.step == 4:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    write(folder, state, rngs)\n"
        "runner.write_state = dying\nsys.exit(main(['train', *sys.argv[1:]]))"
    )
    out = tmp_path / "broken"
    killed = subprocess.run(
        [sys.executable, "-c", program, str(config), "--options", f"run.output_dir={out}"],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if key not in ("LOCAL_RANK", "DS_ACCELERATOR")},
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = {p.name[:12] for p in (out / "checkpoints").iterdir()}
    assert left == {"step_0000000", ".unfinished-"}
    assert list((out / "checkpoints").glob(".unfinished-*/deepspeed/*optim_states.pt"))
    whole = train(experiment, tmp_path, "whole")
    # the two processes may divide their work among threads in other ways
    assert losses(train(experiment, tmp_path, "broken")) == pytest.approx(losses(whole), abs=1e-6)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step_00000002", "step_00000004"]


# --- two processes --------------------------------------------------------------------------------------------------


def trained_on_two(folder: Path, runs: list[tuple[dict[str, Any], list[str]]], timeout: float = 400) -> str:
    """Run experiments one after the other in one process group; what the first process prints."""
    files = [str(write_yaml(folder / f"{number}.yaml", experiment)) for number, (experiment, _) in enumerate(runs)]
    return on_two_processes(folder, [(file, options) for file, (_, options) in zip(files, runs, strict=True)], timeout)


def test_two_processes_equal_ddp(experiment: dict[str, Any], tmp_path: Path) -> None:
    """With a batch of text on one of them: ZeRO-3 must come first, when DeepSpeed has not been used yet."""
    experiment["run"] |= {"batch_size_train": 1, "max_steps": 2, "seed": 3}
    kinds = {"zero3": ["run.deepspeed=zero3"], "zero2": [], "ddp": ["run.engine=ddp"]}
    trained_on_two(tmp_path, [(experiment, [f"run.output_dir={tmp_path / k}", *o]) for k, o in kinds.items()])
    assert_close(tmp_path / "zero2", tmp_path / "ddp")
    assert_close(tmp_path / "zero3", tmp_path / "ddp")
    shards = (tmp_path / "zero3" / "checkpoints" / "step_00000002" / "deepspeed").glob("*optim_states.pt")
    assert len(list(shards)) == 2


def variations(experiment: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Models whose modules are called in unusual ways, or not on every process."""
    from golden_mgm import parts

    queries = {"name": "qformer", "num_query_tokens": 4, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
    queries |= {"cross_attention_every": 2, "intermediate_size": 32, "freeze": ["qformer*", "query*"]}
    experts = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    language = experiment["model"]["language_model"]
    mined = parts("llama_hd")
    mined["vision_encoder"]["freeze"] = True
    return {
        "a frozen front": {"connector": queries},
        "adapters": {"language_model": {**language, "lora": {"r": 4}}},
        "experts": {"language_model": {**language, "router_loss": 0.02, "config": language["config"] | experts}},
        "two resolutions": mined,
        "checkpointing": {"language_model": {**language, "gradient_checkpointing": True}},
    }


@pytest.mark.slow
def test_two_processes_with_every_weight_shared_out(
    experiment: dict[str, Any], tmp_path: Path, llava_data: Path
) -> None:
    """No parameter is small enough to stay whole; half of the batches are text; answers are generated together."""
    settings = read_deepspeed(RunConfig(engine="deepspeed", deepspeed="zero3"))
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "zero3.json").write_text(json.dumps(settings))
    records = json.loads((llava_data / "train.json").read_text())
    (tmp_path / "mixed.json").write_text(json.dumps(records + [{**records[-1], "id": f"text {n}"} for n in range(20)]))
    experiment["datasets"]["colours"]["annotations"]["train"] = str(tmp_path / "mixed.json")
    experiment["run"] |= {"task": "vqa", "valid_splits": ["test"], "test_splits": ["test"], "eval_freq": 2}
    experiment["run"] |= {"batch_size_train": 2, "group_by_modality_length": True, "init_lr": 2e-3}
    experiment["run"]["deepspeed"] = str(tmp_path / "zero3.json")
    models = variations(experiment)
    runs = []
    for number, kind in enumerate(models):
        folder = tmp_path / str(number)
        for name, *options in (
            ("zero3",),
            ("again", "run.max_steps=2"),
            ("again", f"run.resume={folder}/again/checkpoints/step_00000002"),
            ("zero2", "run.deepspeed=zero2"),
            ("ddp", "run.engine=ddp"),
        ):
            changed = {**experiment, "model": experiment["model"] | models[kind]}
            runs.append((changed, [f"run.output_dir={folder / name}", *options]))
    trained_on_two(tmp_path, runs, timeout=1500)
    for number, kind in enumerate(models):
        zero3, again, zero2, ddp = (tmp_path / str(number) / name for name in ("zero3", "again", "zero2", "ddp"))
        assert_close(zero2, ddp)
        assert_close(zero3, ddp)
        assert losses(again) == losses(zero3), kind
        metrics = [json.loads((folder / "done.json").read_text())["metrics"] for folder in (zero3, ddp)]
        assert metrics[0] == metrics[1], kind


# --- compilation ----------------------------------------------------------------------------------------------------


def test_a_lock_that_nobody_holds_is_reported_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_stale_lock(tmp_path)  # there is none
    lock = tmp_path / "lock"
    lock.touch()
    os.utime(lock, (0, 0))
    with pytest.raises(EngineError, match=f"(?s){lock} was left behind .* Delete it .rm {lock}. and run"):
        refuse_stale_lock(tmp_path)
    with lock.open():  # as its writer has it until it is done
        refuse_stale_lock(tmp_path)
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        lock.unlink()

    monkeypatch.setattr(deepspeed_build.time, "sleep", sleep)
    lock.touch()  # another machine may have it for a moment
    os.utime(lock)
    refuse_stale_lock(tmp_path)
    assert len(waited) == 1


class Builder:
    """Stands for one of DeepSpeed's."""

    name = "cpu_adam"
    fails = False

    def load(self, verbose: bool) -> str:
        if self.fails:
            raise RuntimeError("no compiler")
        return "the operator"


def test_compiling_is_announced_once_and_a_failure_says_what_else_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(deepspeed_build, "_builder", lambda name: Builder())
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin")
    assert load_operator("CPUAdamBuilder") == "the operator"
    said = capsys.readouterr().err
    assert "compiling DeepSpeed's cpu_adam" in said and str(tmp_path) in said
    assert os.environ["PATH"].split(os.pathsep)[0] == os.path.dirname(sys.executable), "for ninja"
    folder = deepspeed_build.build_folder("cpu_adam")
    (folder / "cpu_adam.so").touch()
    assert load_operator("CPUAdamBuilder") == "the operator"
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(Builder, "fails", True)
    with pytest.raises(EngineError, match=r"no compiler(?s:.*)use run.deepspeed: zero2 or zero3"):
        load_operator("CPUAdamBuilder")
    (folder / "lock").touch()
    os.utime(folder / "lock", (0, 0))
    with pytest.raises(EngineError, match="was left behind"):
        load_operator("CPUAdamBuilder")


def test_nothing_is_compiled_on_a_cpu(alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator that DeepSpeed would compile at its first use there is left out; the optimiser is torch's."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    engine = DeepSpeedEngine(CPU, "fp32", RunConfig(engine="deepspeed", deepspeed="zero3_offload"))
    assert type(engine.optimizer([{"params": [torch.zeros(2, requires_grad=True)]}], (0.9, 0.999))) is torch.optim.AdamW
    assert main(["prepare-deepspeed"]) == 0
    assert not list(tmp_path.rglob("*.so"))
