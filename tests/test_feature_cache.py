"""The cache behind the last frozen module: what it keeps, when it is valid, and what survives a kill."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_minigpt4 import golden_minigpt4
from helpers import ROOT, losses, tiny_model, write_yaml
from rich.console import Console
from transformers import CLIPVisionConfig, CLIPVisionModel

from minivlm.api import assemble
from minivlm.cli import cache as cache_command
from minivlm.config import load_config
from minivlm.config.loader import parse_model
from minivlm.datasets import feature_cache, fill_cache
from minivlm.datasets.feature_cache import FeatureCache, FeatureCacheError
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors import fingerprint
from minivlm.processors import image as image_module
from minivlm.processors import processor as processor_module
from minivlm.processors.processor import VLMProcessor
from minivlm.runners import features
from minivlm.runners.engines import DDPEngine, SingleEngine
from minivlm.runners.experiment import Splits, run_experiment
from minivlm.types import Batch, Message, Sample

QFORMER = {
    "name": "qformer",
    "freeze": ["qformer*", "query_tokens"],
    "num_query_tokens": 5,
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 2,
    "intermediate_size": 48,
}
FRONT, ENCODER = (5, 24), (4, 16)


@pytest.fixture
def minigpt(tiny_experiment: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A frozen encoder, a frozen Q-Former and a linear layer that trains, with a cache."""
    tiny_experiment["model"]["connector"] = dict(QFORMER)
    tiny_experiment["model"]["language_model"]["freeze"] = True
    tiny_experiment["run"]["feature_cache"] = str(tmp_path / "cache")
    return tiny_experiment


def build(**sections: Any) -> tuple[VisionLanguageModel, VLMProcessor]:
    torch.manual_seed(0)
    model, processor, _ = assemble(parse_model({**tiny_model(), "connector": dict(QFORMER), **sections}, "test"))
    return model, processor


def train(content: dict[str, Any], folder: Path, *options: str) -> tuple[Path, str]:
    """The folder of a run and what it printed."""
    experiment = load_config(write_yaml(folder / "x.yaml", content), options)
    console = Console(record=True, width=400, file=open(os.devnull, "w"))  # noqa: SIM115
    run_experiment(experiment, console)
    return Path(experiment.stages[-1].run.output_dir), console.export_text()


def files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.safetensors"))


# --- what is cached -------------------------------------------------------------------------------------------------


def test_features_end_behind_the_last_frozen_module() -> None:
    model, _ = build()
    model.train()
    pixels = {"image": torch.randn(2, 3, 32, 32)}
    assert model.has_frozen_front and model.feature_shape == FRONT
    hidden = model.extract_features(pixels)
    assert hidden.shape == (2, *FRONT) and not hidden.requires_grad
    whole = model.connector(model.vision_encoder(pixels["image"]))
    ids = torch.zeros(1, 1, dtype=torch.long)
    assert torch.equal(model.encode_images(Batch(ids, ids, pixels=pixels)), whole)
    assert torch.equal(model.encode_images(Batch(ids, ids, features=hidden)), whole)
    whole.sum().backward()
    assert {name for name, p in model.connector.named_parameters() if p.grad is not None} == {
        "linear.weight",
        "linear.bias",
    }


@pytest.mark.parametrize(
    "sections",
    [
        {"connector": {**QFORMER, "freeze": ["qformer*"]}},
        {"connector": {**QFORMER, "freeze": ["query_tokens", "qformer.encoder.layer.0*"]}},
        {"connector": {"name": "mlp", "freeze": True}},
    ],
    ids=["query tokens train", "a layer trains", "no front"],
)
def test_a_front_that_trains_is_not_cached(sections: dict[str, Any]) -> None:
    model, _ = build(**sections)
    assert not model.has_frozen_front and model.feature_shape == ENCODER
    assert model.extract_features({"image": torch.randn(1, 3, 32, 32)}).shape == (1, *ENCODER)


def test_a_front_behind_an_encoder_that_trains_is_not_cached(tmp_path: Path) -> None:
    section = tiny_model()["vision_encoder"] | {"freeze": False}
    model, processor = build(vision_encoder=section)
    assert not model.has_frozen_front
    with pytest.raises(FeatureCacheError, match=r"set model\.vision_encoder\.freeze: true"):
        FeatureCache.for_model(tmp_path, model, processor)


def test_training_from_the_cache_is_the_same_training(minigpt: dict[str, Any], tmp_path: Path) -> None:
    plain, _ = train(minigpt, tmp_path, f"run.output_dir={tmp_path}/plain", "run.feature_cache=null")
    cached, said = train(minigpt, tmp_path, f"run.output_dir={tmp_path}/cached", "run.max_epoch=2")
    assert losses(cached)[:6] == pytest.approx(losses(plain), rel=1e-3)  # features are kept in half precision
    assert re.search(r"24 pictures of 0\.2344 KiB.* 24 encoded now", said)
    [file] = files(tmp_path / "cache")
    about = json.loads((file.parent / "about.json").read_text())
    assert about["shape"] == list(FRONT) and set(about["frozen"]) == {"vision_encoder", "connector"}


def test_a_warm_cache_opens_no_picture_and_runs_no_frozen_module(
    minigpt: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minigpt["run"] |= {"test_splits": ["test"], "valid_splits": ["test"], "max_epoch": 2}
    first, _ = train(minigpt, tmp_path, f"run.output_dir={tmp_path}/a")
    before = {file: file.stat().st_mtime_ns for file in files(tmp_path / "cache")}

    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("not behind a warm cache")

    monkeypatch.setattr(processor_module, "open_image", never)
    monkeypatch.setattr(VisionLanguageModel, "extract_features", never)
    monkeypatch.setattr("minivlm.models.connectors.qformer.QFormerConnector.front", never)
    again, said = train(minigpt, tmp_path, f"run.output_dir={tmp_path}/b")
    assert losses(again) == losses(first) and "; 0 encoded now" in said
    assert {file: file.stat().st_mtime_ns for file in files(tmp_path / "cache")} == before


def test_a_picture_is_read_once_to_know_it(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(b"one")
    first = image_module.image_hash(file)
    before = image_module._file_hash.cache_info().misses
    assert image_module.image_hash(str(file)) == first and image_module._file_hash.cache_info().misses == before
    file.write_bytes(b"two")
    os.utime(file, (1, 1))
    assert image_module.image_hash(file) != first
    with pytest.raises(OSError, match=r"b\.png"):
        image_module.image_hash(tmp_path / "b.png")


def test_filling_has_no_dropout_and_leaves_the_mode(llava_data: Path, tmp_path: Path) -> None:
    model, processor = build()
    cache = FeatureCache.for_model(tmp_path, model, processor)
    model.train()
    model.connector.qformer.train()
    image = llava_data / "images" / "0.png"
    fill_cache.fill_cache(cache, model, processor, [[Sample("s", [Message("assistant", "a")], [image])]])
    assert model.training
    with torch.no_grad():
        pixels = {name: p[None] for name, p in processor.load_pixels(image).items()}
        expected = model.eval().extract_features(pixels)[0]
    stored = cache.get(processor.image_key(image))
    assert stored is not None and stored.dtype == torch.float16
    torch.testing.assert_close(stored.float(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("workers", [0, 2])
def test_features_beyond_half_precision_are_refused(workers: int, llava_data: Path, tmp_path: Path) -> None:
    """And the processes that read pictures end."""
    model, processor = build()
    with torch.no_grad():
        model.connector.qformer.encoder.layer[-1].output_query.LayerNorm.weight.fill_(1e6)
    cache = FeatureCache.for_model(tmp_path, model, processor)
    samples = [Sample("s", [], [llava_data / "images" / "0.png"])]
    with pytest.raises(FeatureCacheError, match=r"reach [\d.e+]+, which half precision does not hold"):
        fill_cache.fill_cache(cache, model, processor, [samples], workers=workers)
    assert not files(tmp_path) and not multiprocessing.active_children()


# --- when a cache is valid ------------------------------------------------------------------------------------------


def folder(root: Path, change: Callable[[VisionLanguageModel], None] | None = None, **sections: Any) -> str:
    """Name of the cache of a model; ``change`` is made to the model first."""
    model, processor = build(**sections)
    if change:
        with torch.no_grad():
            change(model)
    return FeatureCache.for_model(root, model, processor, "fp32", sections).folder.name


CHANGES: dict[str, dict[str, Any]] = {
    "query tokens": {"change": lambda model: model.connector.query_tokens[0, 0, 0].add_(1e-3)},
    "Q-Former's weights": {"change": lambda model: model.connector.qformer.layernorm.bias[0].add_(1e-3)},
    "encoder's weights": {"change": lambda model: next(model.vision_encoder.parameters()).mul_(1.001)},
    "encoder's dtype": {"change": lambda model: model.vision_encoder.half()},
    "size of the transform": {"processor": {"name": "vlm", "image": {"name": "image", "size": 48}}},
    "settings of the encoder": {"vision_encoder": tiny_model()["vision_encoder"] | {"class_token": "keep"}},
    "settings of the Q-Former": {"connector": {**QFORMER, "cross_attention_every": 1}},
    "a Q-Former that trains": {"connector": {**QFORMER, "freeze": False}},
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_changes_the_features_gives_another_cache(what: str, tmp_path: Path) -> None:
    assert folder(tmp_path) == folder(tmp_path) != folder(tmp_path, **CHANGES[what])


def test_precision_and_code_give_another_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = build()
    names = {FeatureCache.for_model(tmp_path, model, processor, kind).folder for kind in ("fp32", "bf16")}
    assert len(names) == 2
    code = tmp_path / "qformer.py"
    getfile = fingerprint.inspect.getfile

    def edited(kind: type) -> str:
        return str(code) if kind.__name__ == "QFormerConnector" else getfile(kind)

    for text in ("a = 1", "a = 2"):
        code.write_text(text)
        monkeypatch.setattr(fingerprint.inspect, "getfile", edited)
        names.add(FeatureCache.for_model(tmp_path, model, processor, "fp32").folder)
    assert len(names) == 4


def test_what_trains_does_not_matter(tmp_path: Path) -> None:
    def trained(model: VisionLanguageModel) -> None:
        model.connector.linear.weight.mul_(2)

    assert folder(tmp_path, trained) == folder(tmp_path)


NO_CHANGES: dict[str, dict[str, Any]] = {
    "recomputation": {"vision_encoder": tiny_model()["vision_encoder"] | {"gradient_checkpointing": True}},
    "dropout of the Q-Former": {"connector": {**QFORMER, "dropout": 0.3}},
}


@pytest.mark.parametrize("what", NO_CHANGES)
def test_settings_of_training_give_the_same_cache(what: str, tmp_path: Path) -> None:
    assert typed_folder(tmp_path) == typed_folder(tmp_path, **NO_CHANGES[what])


def test_drop_path_of_a_frozen_encoder_gives_the_same_cache(tmp_path: Path) -> None:
    sections = [golden_minigpt4(checkpoint=None, drop_path_rate=rate) for rate in (0.0, 0.5)]
    assert len({typed_folder(tmp_path, **section) for section in sections}) == 1


def test_the_content_of_a_folder_counts_and_not_its_name(tmp_path: Path) -> None:
    CLIPVisionModel(CLIPVisionConfig(**tiny_model()["vision_encoder"]["config"])).save_pretrained(tmp_path / "a")
    for name in ("b", "c"):
        shutil.copytree(tmp_path / "a", tmp_path / name)
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    (tmp_path / "c" / "config.json").write_text(json.dumps({**config, "num_attention_heads": 4}))
    nodes = [{"name": "hf", "path": str(tmp_path / name), "freeze": True} for name in "abc"]
    a, b, c = (typed_folder(tmp_path, vision_encoder=node) for node in nodes)
    assert a == b != c, "other heads with the same weights are another encoder"


def typed_folder(root: Path, **sections: Any) -> str:
    """Name of the cache of a model as a run computes it."""
    torch.manual_seed(0)
    model, processor, config = assemble(parse_model({**tiny_model(), "connector": dict(QFORMER), **sections}, "test"))
    assert config.vision_encoder and config.connector
    settings = {"vision_encoder": config.vision_encoder.config, "connector": config.connector.config}
    return FeatureCache.for_model(root, model, processor, "fp32", settings).folder.name


def test_settings_tell_encoders_without_weights_apart() -> None:
    class Model:
        vision_encoder, connector, has_frozen_front = torch.nn.Identity(), torch.nn.Identity(), False

    parts = [feature_cache.frozen_parts(Model(), {"vision_encoder": {"patch": n}}) for n in (8, 16)]  # type: ignore[arg-type]
    assert parts[0] != parts[1]


def test_a_cache_of_another_encoder_is_left_and_named(minigpt: dict[str, Any], tmp_path: Path) -> None:
    train(minigpt, tmp_path, f"run.output_dir={tmp_path}/a")
    [old] = {file.parent for file in files(tmp_path / "cache")}
    _, said = train(minigpt, tmp_path, f"run.output_dir={tmp_path}/b", "model.processor.image.resize=pad")
    assert f"not used: {old}, made with other transforms\n" in said and "24 encoded now" in said
    _, said = train(minigpt, tmp_path, f"run.output_dir={tmp_path}/c", "run.seed=7", "run.precision=bf16")
    assert f"not used: {old}, made with other frozen modules, precision\n" in said
    with pytest.raises(FeatureCacheError, match=re.escape(f"give the folder above, {old.parent}")):
        train(minigpt, tmp_path, f"run.output_dir={tmp_path}/d", f"run.feature_cache={old}")


# --- broken files, kills, several processes -------------------------------------------------------------------------


def test_broken_files_are_named_ignored_and_made_up_for(minigpt: dict[str, Any], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    first, _ = train(minigpt, tmp_path, f"run.output_dir={tmp_path}/a")
    [file] = files(tmp_path / "cache")
    file.write_bytes(file.read_bytes()[:-100])
    wrong, foreign = file.with_name("wrong.safetensors"), file.with_name("zzz.safetensors")
    save_file({"features": torch.zeros(2, 7, 24).half()}, wrong, {"pictures": "a b"})
    save_file({"x": torch.zeros(2)}, foreign)
    again, said = train(minigpt, tmp_path, f"run.output_dir={tmp_path}/b")
    assert losses(again) == losses(first) and "24 encoded now" in said
    for name, reason in (
        (file, "it cannot be read"),
        (wrong, r"it holds F16 of shape \[2, 7, 24\], wanted F16 of \[2, 5, 24\]"),
        (foreign, "it cannot be read"),
    ):
        assert re.search(rf"ignored {re.escape(str(name))}: {reason}", said)


def test_a_file_that_goes_while_it_is_used_is_an_error(llava_data: Path, tmp_path: Path) -> None:
    model, processor = build()
    cache = FeatureCache.for_model(tmp_path, model, processor)
    cache.add({"a": torch.ones(FRONT).half(), "b": torch.zeros(FRONT).half()})
    other = FeatureCache(cache.folder, FRONT)
    assert len(other) == 2 and torch.equal(other.get("b"), torch.zeros(FRONT).half()) and other.get("c") is None
    fresh = FeatureCache(cache.folder, FRONT)
    shutil.rmtree(cache.folder)
    with pytest.raises(FeatureCacheError, match="has changed or gone since the start"):
        fresh.get("a")


KILLED = """
import sys, time
from minivlm.cli import cache
from minivlm.datasets import fill_cache
from minivlm.models.vlm import VisionLanguageModel

fill_cache.FILE_BYTES = 1                 # a file for every batch
fill_cache.fill_cache.__kwdefaults__["batch_size"] = 4
extract = VisionLanguageModel.extract_features

def slow(self, pixels):
    time.sleep(0.3)
    return extract(self, pixels)

VisionLanguageModel.extract_features = slow
sys.exit(cache([sys.argv[1]]))
"""


def test_a_kill_loses_nothing_that_was_finished(minigpt: dict[str, Any], tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "x.yaml", minigpt)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    process = subprocess.Popen([sys.executable, str(script), str(config)], cwd=ROOT, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while len(files(tmp_path / "cache")) < 2:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = files(tmp_path / "cache")
    whole = len(kept) * 4
    assert 8 <= whole < 24
    old, young = (kept[0].with_name(f".unfinished-{name}.safetensors-1") for name in ("old", "young"))
    for unfinished in (old, young):
        unfinished.write_bytes(kept[0].read_bytes()[:50])
    os.utime(old, (time.time() - 3600,) * 2)
    _, said = train(minigpt, tmp_path)
    assert f"24 pictures of 0.2344 KiB, 0.0 MiB; {24 - whole} encoded now" in said
    assert not old.exists(), "what a kill left behind is removed"
    assert young.exists(), "what another process may be writing is not"


def test_two_processes_build_a_cache_that_training_uses(minigpt: dict[str, Any], tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "x.yaml", minigpt)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "-m", "minivlm.cli", "cache", str(config)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("24 encoded now") == 1
    assert len(files(tmp_path / "cache")) == 2, "each process took its share"
    assert "; 0 encoded now" in train(minigpt, tmp_path)[1]


class TwoNodes(SingleEngine):
    """The first of two processes whose folders differ."""

    world = 2


def test_a_folder_that_processes_do_not_share_is_an_error(
    minigpt: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "SECONDS_TO_APPEAR", 0.1)
    stage = load_config(write_yaml(tmp_path / "x.yaml", minigpt)).stages[0]
    model, processor, stage.model = assemble(stage.model)
    engine = TwoNodes(torch.device("cpu"), "fp32")
    with pytest.raises(FeatureCacheError, match="a folder that all processes share"):
        features.prepare_cache(stage, model, processor, engine, Splits(stage).all(), Console(quiet=True))


# --- the command and bad input --------------------------------------------------------------------------------------


def test_the_command_fills_the_caches_of_all_stages(
    minigpt: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], llava_data: Path
) -> None:
    data = Path(shutil.copytree(llava_data, tmp_path / "data"))
    (data / "images" / "3.png").write_bytes(b"no picture")
    (data / "images" / "5.png").unlink()
    minigpt["datasets"]["colours"] |= {"annotations": str(data / "train.json"), "images": str(data / "images")}
    minigpt["run"] |= {"max_bad_share": 0.2}
    minigpt["stages"] = [
        {"name": "align"},
        {"name": "tune", "model": {"connector": {"freeze": False}}},
        {"name": "last"},
    ]
    assert cache_command([str(write_yaml(tmp_path / "x.yaml", minigpt)), "--options", "run.num_workers=1"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("22 pictures of") == 2 and said.count("22 encoded now") == 2
    assert "22 pictures of 0.2344 KiB" in said and "22 pictures of 0.125 KiB" in said
    assert "last: left out, since an earlier stage trains its connector" in said
    assert said.count("2 samples cannot be used") == 2
    assert "sample 'r3': cannot read picture" in said and "sample 'r5'" in said
    minigpt["stages"] = minigpt["stages"][:1]
    out, said = train(minigpt, tmp_path)
    assert "; 0 encoded now" in said, "the bad picture is not tried in vain: it is known by now"
    named = {json.loads(line)["id"] for line in (out / "bad_samples.jsonl").read_text().splitlines()}
    assert named == {"r3", "r5"}


def test_the_command_needs_a_folder(
    tiny_experiment: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cache_command([str(write_yaml(tmp_path / "x.yaml", tiny_experiment))]) == 2
    assert "--options run.feature_cache=" in capsys.readouterr().err


def test_a_picture_that_changes_while_the_cache_is_filled_is_bad(llava_data: Path, tmp_path: Path) -> None:
    """Its features must not be kept as those of the old content."""
    model, processor = build()
    images = [Path(shutil.copy(llava_data / "images" / f"{n}.png", tmp_path)) for n in (0, 1)]
    samples = [Sample(image.stem, [], [image]) for image in images]
    keys = [processor.image_key(image) for image in images]
    load, changed = processor.load_pixels, False

    def load_pixels(image: Any, seed: str | None = None) -> dict[str, torch.Tensor]:
        nonlocal changed
        if image == images[0] and not changed:
            changed = True
            shutil.copy(llava_data / "images" / "2.png", image)
            os.utime(image, (1, 1))
        return load(image, seed)

    processor.load_pixels = load_pixels  # type: ignore[method-assign]
    cache = FeatureCache.for_model(tmp_path / "cache", model, processor)
    done = fill_cache.fill_cache(cache, model, processor, [samples])
    assert list(done.bad) == ["0"] and "changed while the cache was filled" in done.bad["0"]
    assert list(done.unreadable) == keys[:1] and done.encoded == 1
    assert keys[0] not in cache and keys[1] in cache


def test_a_picture_that_could_not_be_encoded_stays_bad(llava_data: Path, tmp_path: Path) -> None:
    model, processor = build()
    image = llava_data / "images" / "0.png"
    cache = FeatureCache.for_model(tmp_path, model, processor)
    cache.unreadable = {processor.image_key(image): "cannot read it"}
    with pytest.raises(OSError, match="cannot read it"):
        cache.get(processor.image_key(image))


# --- where things lie -----------------------------------------------------------------------------------------------


def test_what_computes_features_may_lie_elsewhere(tmp_path: Path) -> None:
    """``meta`` stands for the main memory beside a GPU."""
    model, _ = build(connector={"name": "mlp", "freeze": False})
    model.move_features("meta")
    assert {p.device.type for p in model.vision_encoder.parameters()} == {"meta"}
    assert model.device.type == "cpu"

    def step() -> None:
        engine = DDPEngine(torch.device("cpu"), "fp32")
        parameters = [p for p in model.parameters() if p.requires_grad and p.device.type == "cpu"]
        wrapped = engine.prepare(model.train(), engine.optimizer([{"params": parameters}], (0.9, 0.999)))
        ids = torch.tensor([[5, 6, 7]])
        wrapped(Batch(ids, torch.ones_like(ids), labels=ids)).loss.backward()

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        step()
        gc.collect()  # a reducer that outlives its process group may wait for ever when it goes
    finally:
        torch.distributed.destroy_process_group()
    assert model.connector.layers[0].weight.grad is not None
