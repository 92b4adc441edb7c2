"""Parts that LAVIS provides, through the real bridge, with a stand-in for LAVIS at its other end."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT, make_lavis_python, tiny_model
from PIL import Image

import minivlm
from minivlm.api import assemble
from minivlm.checkpoints.native import CheckpointError, Manifest, save_model
from minivlm.config import load_config
from minivlm.config.loader import parse_model
from minivlm.datasets.base import DatasetError
from minivlm.datasets.configs import LavisDatasetConfig
from minivlm.datasets.feature_cache import FeatureCache, FeatureCacheError, frozen_parts
from minivlm.datasets.fill_cache import fill_cache
from minivlm.datasets.lavis import LavisBuilder
from minivlm.doctor import main as doctor
from minivlm.lavis import client, server
from minivlm.lavis.client import LavisError, connect, request
from minivlm.lavis.configs import LavisEnvironment
from minivlm.models.base import ModelError
from minivlm.models.configs import LavisVisionConfig
from minivlm.models.tuning import apply_freeze
from minivlm.models.vision.lavis import LavisVisionEncoder
from minivlm.processors.configs import LavisImageConfig
from minivlm.processors.lavis import LavisImageTransform, process_text
from minivlm.types import IMAGE_MARKER, Message, Sample, SampleError

ENCODER = {"size": 32, "mean": [0.5] * 3, "std": [0.25] * 3}


@pytest.fixture(autouse=True)
def _python(fake_lavis: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIVLM_LAVIS_PYTHON", fake_lavis)


def encoder(model: str = "fake_extractor", **settings: Any) -> LavisVisionEncoder:
    return LavisVisionEncoder(LavisVisionConfig(**{"model": model, "type": "base", "device": "cpu", **settings}))


def weights(folder: Path, name: str, *scales: float) -> str:
    torch.save({"model": {"weight": torch.tensor(scales)}}, folder / name)
    return str(folder / name)


def section(**settings: Any) -> dict[str, Any]:
    """Section ``model`` of a tiny model on an encoder of LAVIS."""
    node = {"name": "lavis", "model": "fake_extractor", "type": "base", "device": "cpu", **settings}
    return {**tiny_model(), "vision_encoder": node}


# --- messages -------------------------------------------------------------------------------------------------------


def test_messages_come_back_as_they_were_sent() -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::2], "b": np.zeros((0, 4), dtype=np.uint8)}
    stream = io.BytesIO()
    server.write_message(stream, {"text": "ü"}, arrays)
    server.write_message(stream, {"next": 1})
    stream.seek(0)
    header, found = server.read_message(stream)
    assert header == {"text": "ü"} and list(found) == ["a", "b"]
    assert all(np.array_equal(found[k], arrays[k]) and found[k].dtype == arrays[k].dtype for k in arrays)
    assert server.read_message(stream) == ({"next": 1}, {})
    with pytest.raises(EOFError):
        server.read_message(stream)


@pytest.mark.parametrize("cut", [3, 12, 40, -1])
def test_a_message_that_is_cut_off_is_refused(cut: int) -> None:
    stream = io.BytesIO()
    server.write_message(stream, {}, {"a": np.zeros(4, dtype=np.float32)})
    with pytest.raises(server.WireError):
        server.read_message(io.BytesIO(stream.getvalue()[:cut]))


def test_noise_and_pickles_are_refused() -> None:
    with pytest.raises(server.WireError, match="expected a message"):
        server.read_message(io.BytesIO(b"Downloading: 100%|####"))
    stream = io.BytesIO()
    server.write_message(stream, {}, {"a": np.zeros(4, dtype=np.float64)})
    stream.seek(0)
    with pytest.raises(server.WireError, match="float64"):
        server.read_message(stream)


# --- the encoder ----------------------------------------------------------------------------------------------------


def test_features_are_those_of_the_model() -> None:
    pixels = torch.randn(2, 3, 32, 32)
    expected = torch.nn.functional.avg_pool2d(pixels, 16).flatten(2).transpose(1, 2)
    built = encoder()
    assert (built.num_tokens, built.hidden_size, built.grid) == (4, 3, (2, 2))
    assert built.image_settings == {"resize": "squash", "interpolation": "nearest", **ENCODER}
    torch.testing.assert_close(built(pixels), expected)
    torch.testing.assert_close(encoder(output="vit")(pixels), -expected)
    torch.testing.assert_close(encoder(output="image_embeds_proj")(pixels), expected[:, :, :2])
    torch.testing.assert_close(encoder(options={"scale": 3})(pixels), 3 * expected)
    torch.testing.assert_close(built(pixels.half()).float(), expected, atol=1e-3, rtol=0)
    pooled = encoder("fake_forward")
    assert (pooled.num_tokens, pooled.grid) == (1, (1, 1))
    torch.testing.assert_close(pooled(pixels), expected.mean(1, keepdim=True))
    larger = encoder(image_size=96)
    assert larger.image_settings["size"] == 96 and larger.grid == (6, 6)


def test_a_checkpoint_takes_the_place_of_the_download(tmp_path: Path) -> None:
    pixels = torch.ones(1, 3, 32, 32)
    built = encoder(checkpoint=weights(tmp_path, "a.pth", 1.0, 2.0, 3.0))
    assert built(pixels)[0, 0].tolist() == [1, 2, 3]
    torch.save({"model": {"other.weight": torch.zeros(3)}}, tmp_path / "other.pth")
    with pytest.raises(ModelError, match="belongs to another model: none of its 1 tensors fits"):
        encoder(checkpoint=str(tmp_path / "other.pth"))
    with pytest.raises(ModelError, match=r"no\.pth"):
        encoder(checkpoint=str(tmp_path / "no.pth"))


def test_it_never_trains() -> None:
    built = encoder()
    for freeze in (None, True):
        apply_freeze("vision_encoder", built, freeze)
        model, _, config = assemble(parse_model(section() if freeze is None else section(freeze=True), "test"))
        assert model.is_frozen("vision_encoder") and not any("vision" in n for n, _ in model.named_parameters())
        assert config.vision_encoder is not None
    for wrong in (False, ["*"]):
        with pytest.raises(ModelError, match=r"vision_encoder\.freeze: this part cannot train; leave `freeze` out"):
            assemble(parse_model(section(freeze=wrong), "test"))


def test_identity_for_the_feature_cache(tmp_path: Path) -> None:
    """Every setting and every weight changes the hash; a restart, or where LAVIS lies, does not."""

    def identity(**settings: Any) -> str:
        model, _, config = assemble(parse_model(section(**settings), "test"))
        assert config.vision_encoder is not None
        return str(frozen_parts(model, {"vision_encoder": config.vision_encoder.config}))

    one, two = weights(tmp_path, "one.pth", 1.0, 2.0, 3.0), weights(tmp_path, "two.pth", 1.0, 2.0, 4.0)
    found = [
        identity(),
        identity(output="vit"),
        identity(image_size=64),
        identity(model="fake_forward"),
        identity(checkpoint=one),
        identity(checkpoint=two),
    ]
    assert len(set(found)) == len(found)
    fingerprint = encoder(checkpoint=one).fingerprint
    client.close_all()
    elsewhere = make_lavis_python(tmp_path)
    assert identity(python=elsewhere, checkpoint=one, timeout=60) == found[4]
    moved = weights(tmp_path, "moved.pth", 1.0, 2.0, 3.0)
    assert torch.equal(encoder(checkpoint=moved).fingerprint, fingerprint), "it is the same model"
    weights(tmp_path, "one.pth", 1.0, 2.0, 4.0)
    client.close_all()
    assert not torch.equal(encoder(checkpoint=one).fingerprint, fingerprint), "the same name with other content"


def test_features_go_through_the_cache(tmp_path: Path) -> None:
    model, processor, config = assemble(parse_model(section(), "test"))
    assert config.vision_encoder is not None
    picture = Image.new("RGB", (40, 30), (255, 128, 0))
    sample = Sample("s", [Message("user", f"{IMAGE_MARKER}what color?"), Message("assistant", "red")], [picture])
    direct = processor.encode(sample)
    settings = {"vision_encoder": config.vision_encoder.config}
    cache = FeatureCache.for_model(tmp_path, model, processor, settings=settings)
    assert fill_cache(cache, model, processor, [[sample]]).encoded == 1
    client.close_all()
    again = FeatureCache.for_model(tmp_path, model, processor, settings=settings)
    assert fill_cache(again, model, processor, [[sample]]).encoded == 0
    processor.feature_cache = again
    cached = processor.encode(sample)
    assert cached.features is not None and not cached.pixels
    assert all(process.closed for process in client._running.values()), "with a warm cache LAVIS is not even started"
    expected = model.vision_encoder(direct.pixels["image"][0][None])[0]
    torch.testing.assert_close(cached.features[0].float(), expected, atol=2e-3, rtol=0)


def test_a_saved_model_names_its_encoder_but_no_program(tmp_path: Path, fake_lavis: str) -> None:
    file = weights(tmp_path, "base.pth", 1.0, 2.0, 3.0)
    model, processor, config = assemble(parse_model(section(checkpoint=file, python=fake_lavis), "test"))
    save_model(tmp_path / "model", model, config, processor, Manifest())
    loaded, _ = minivlm.load(tmp_path / "model", device="cpu")
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(loaded.vision_encoder(pixels), model.eval().vision_encoder(pixels))
    saved = tmp_path / "model" / "config.yaml"
    evil, mark = tmp_path / "evil", tmp_path / "was run"
    evil.write_text(f"#!/bin/sh\ntouch '{mark}'\n")
    evil.chmod(0o755)
    assert fake_lavis in saved.read_text()
    saved.write_text(saved.read_text().replace(f"python: {fake_lavis}", f"python: {evil}"))
    assert str(evil) in saved.read_text()
    minivlm.load(tmp_path / "model", device="cpu")
    assert not mark.exists()
    weights(tmp_path, "base.pth", 1.0, 2.0, 4.0)
    client.close_all()
    with pytest.raises(CheckpointError, match="trained on other weights of vision_encoder"):
        minivlm.load(tmp_path / "model", device="cpu")


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_mistakes_are_explained_and_the_process_goes_on() -> None:
    with pytest.raises(ModelError, match=r"LAVIS has no model 'fake_extracter' .*: fake_extractor"):
        encoder("fake_extracter")
    with pytest.raises(ModelError, match="'fake_extractor' has no type 'large'; it has: base"):
        encoder(type="large")
    with pytest.raises(ModelError) as caught:
        encoder("fake_broken")
    message = str(caught.value)
    assert "RuntimeError: the features are broken" in message and "in extract_features: raise RuntimeError" in message
    with pytest.raises(ModelError, match=r"(?s)no route to the hub.*docs/lavis\.md says which files"):
        encoder("fake_offline")
    process = connect(LavisEnvironment())
    assert not process.closed and encoder().num_tokens == 4 and connect(LavisEnvironment()) is process


def test_a_process_that_ends_is_reported_and_replaced() -> None:
    before = connect(LavisEnvironment())
    with pytest.raises(ModelError, match=r"(?s)ended unexpectedly \(exit code 7\).*out of memory, sorry"):
        encoder("fake_dying")
    assert before.closed and encoder().num_tokens == 4
    process = connect(LavisEnvironment())
    os.kill(process._process.pid, signal.SIGKILL)
    with pytest.raises(ModelError, match=r"ended unexpectedly \(signal 9\)"):
        encoder("fake_forward")


class Code:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_files_of_weights_run_no_code(tmp_path: Path) -> None:
    """Neither those that are named to us nor those that only LAVIS's own configuration names."""
    ran, file = tmp_path / "ran", tmp_path / "evil.pth"
    torch.save({"model": {"weight": torch.ones(3), "more": Code(ran)}}, file)
    with pytest.raises(ModelError, match=r"evil\.pth is not loaded, since it is no file of weights, or holds code"):
        encoder(checkpoint=str(file))
    with pytest.raises(ModelError, match="Weights only load failed"):
        encoder(options={"pretrained": str(file)})
    assert not ran.exists()
    with pytest.raises(FileExistsError):
        ran.mkdir()
        torch.load(file, weights_only=False)  # as it would have been


def test_an_answer_that_does_not_come(tmp_path: Path) -> None:
    encoder()  # LAVIS is imported
    start = time.monotonic()
    with pytest.raises(ModelError, match=r"gave no answer for 0\.5 s \(`timeout`\)"):
        encoder("fake_slow", timeout=0.5)
    assert time.monotonic() - start < 10


def test_ctrl_c_between_request_and_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer that is under way must not be taken for that of the next request."""
    process = connect(LavisEnvironment())

    def interrupted(stream: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(server, "read_message", interrupted)
        with pytest.raises(KeyboardInterrupt):
            encoder()
    assert process.closed and process._process.returncode is not None
    assert encoder().hidden_size == 3


def test_the_process_ends_with_its_parent() -> None:
    """Even if the parent is killed, and cannot say good-bye."""
    program = (
        "import os, signal\nfrom minivlm.lavis.client import connect\n"
        "from minivlm.lavis.configs import LavisEnvironment\n"
        "print(connect(LavisEnvironment())._process.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == -signal.SIGKILL
    limit = time.monotonic() + 20
    while time.monotonic() < limit and is_running(int(done.stdout)):
        time.sleep(0.05)
    assert not is_running(int(done.stdout))


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie that nobody has waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.is_file() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


STEPS = ("python3.11 -m venv", "pip install -r requirements-lavis.txt", "pip install --no-deps salesforce-lavis==1.0.2")


@pytest.mark.parametrize(
    ("python", "reason"),
    [
        (None, "no interpreter with LAVIS is named"),
        ("/no/such/python", "there is no interpreter /no/such/python"),
        ("false", r"ended unexpectedly \(exit code 1\)"),
        ("echo", "does not speak as minivlm's server does"),
    ],
)
def test_no_interpreter(python: str | None, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINIVLM_LAVIS_PYTHON")
    with pytest.raises(ModelError, match=reason) as caught:
        encoder(python=python)
    assert all(step in str(caught.value) for step in STEPS)


@pytest.mark.parametrize(
    ("name", "version", "reason"),
    [
        ("salesforce-lavis", None, "salesforce-lavis is not installed"),
        ("transformers", "5.23.0", r"transformers 5\.23\.0 is installed, needed 4\.25 or 4\.26"),
        ("timm", "1.0.31", r"timm 1\.0\.31 is installed, needed 0\.4\.12"),
        ("torch", "2.5.1+cpu", r"torch 2\.5\.1\+cpu is installed, needed 2\.6 or later"),
    ],
)
def test_wrong_versions(name: str, version: str | None, reason: str, tmp_path: Path) -> None:
    python = make_lavis_python(tmp_path, {name: version})
    with pytest.raises(ModelError, match=reason) as caught:
        encoder(python=python)
    assert all(step in str(caught.value) for step in STEPS)


def test_the_accepted_versions_are_those_of_the_requirements() -> None:
    lines = (ROOT / "requirements-lavis.txt").read_text().splitlines()
    wanted: dict[str, str | None] = dict(line.split("==") for line in lines if line[:1] != "#")
    assert client.wrong_versions({**wanted, "salesforce-lavis": "1.0.2"}) == []


def test_settings_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder, the user's file, and no path of ours among its own."""
    monkeypatch.setenv("PYTHONPATH", "/not/for/lavis")
    (tmp_path / "setup.py").write_text(
        "import os, sys\nfrom lavis.common.registry import registry\n"
        "assert '/not/for/lavis' not in sys.path, sys.path\n"
        "where = os.getcwd()\n"
        "class Where:\n    @classmethod\n    def from_config(cls, config):\n        return lambda text: text + where\n"
        "registry.mapping['processor_name_mapping']['where'] = Where\n"
    )
    own = LavisEnvironment(folder=str(tmp_path), setup=str(tmp_path / "setup.py"))
    assert process_text(own, "where", "in ") == f"in {tmp_path.resolve()}"
    with pytest.raises(LavisError, match="LAVIS has no processor 'where'"):
        process_text(LavisEnvironment(), "where", "")
    (tmp_path / "broken.py").write_text("raise RuntimeError('not today')")
    for _ in range(2):  # also the second time, when LAVIS itself is there
        with pytest.raises(LavisError, match="RuntimeError: not today"):
            process_text(LavisEnvironment(setup=str(tmp_path / "broken.py")), "fake_text", "")
    for wrong, reason in (({"folder": "/no/such"}, "no folder /no/such"), ({"setup": "/no.py"}, "no file /no.py")):
        with pytest.raises(LavisError, match=reason):
            connect(LavisEnvironment(**wrong))


# --- processors -----------------------------------------------------------------------------------------------------


def image_transform(processor: str = "fake_image_eval", **options: Any) -> LavisImageTransform:
    return LavisImageTransform(LavisImageConfig(processor=processor, options=options), ENCODER)


def test_pictures_go_through_the_processor() -> None:
    picture = Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3))
    resized = np.asarray(picture.resize((32, 32), Image.Resampling.NEAREST), dtype=np.float32)
    expected = (torch.from_numpy(resized).permute(2, 0, 1) / 255 - 0.5) / 0.25
    torch.testing.assert_close(image_transform()(picture), expected)
    other = image_transform(mean=[0.0] * 3, std=[1.0] * 3)
    torch.testing.assert_close(other(picture), expected * 0.25 + 0.5)
    assert image_transform().fingerprint == image_transform().fingerprint != other.fingerprint
    with pytest.raises(LavisError, match=r"made \[3, 16, 16\] of a picture, but the encoder wants \[3, 32, 32\]"):
        image_transform(image_size=16)(picture)
    with pytest.raises(LavisError, match="LAVIS has no processor 'fake_image_evil'"):
        image_transform("fake_image_evil")(picture)


def test_random_processors_follow_the_seed() -> None:
    picture, transform = Image.new("RGB", (40, 40)), image_transform("fake_image_train")
    before = torch.get_rng_state()
    first, second, none = transform(picture, "7/a/0"), transform(picture, "7/b/0"), transform(picture)
    assert torch.equal(transform(picture, "7/a/0"), first) and not torch.equal(first, second)
    assert torch.equal(transform(picture), none) and not torch.equal(none, first)
    assert torch.equal(torch.get_rng_state(), before), "a resumed training would go on with other numbers"


def test_a_cache_refuses_random_processors(tmp_path: Path) -> None:
    node = {"name": "lavis", "processor": "fake_image_train"}
    model, processor, _ = assemble(parse_model({**section(), "processor": {"image": node}}, "test"))
    with pytest.raises(FeatureCacheError, match=r"LAVIS's processor for evaluation \(\*_eval\)"):
        FeatureCache.for_model(tmp_path, model, processor)


def test_a_model_with_a_processor_of_lavis() -> None:
    node = {"name": "lavis", "processor": "fake_image_eval"}
    model, processor, config = assemble(parse_model({**section(), "processor": {"image": node}}, "test"))
    sample = Sample("s", [Message("user", f"{IMAGE_MARKER}?"), Message("assistant", "red")], [Image.new("RGB", (9, 9))])
    batch = processor.collate([processor.encode(sample)])
    assert torch.equal(batch.pixels["image"], torch.full((1, 3, 32, 32), -2.0))
    loss = model(batch).loss
    assert loss is not None and loss.isfinite() and config.processor is not None


class Pictures(torch.utils.data.Dataset[tuple[torch.Tensor, int]]):
    """Pictures through a processor of LAVIS, and the process that asked."""

    def __init__(self) -> None:
        self.transform = image_transform()

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels = self.transform(Image.new("RGB", (32, 32), (255 * index, 0, 0)))
        return pixels, connect(LavisEnvironment())._process.pid


def test_a_worker_of_a_loader_has_a_process_of_its_own() -> None:
    data = Pictures()
    (first, ours), (second, _) = data[0], data[1]
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context="fork")
    found = list(loader)
    assert torch.equal(found[0][0], first) and torch.equal(found[1][0], second)
    assert found[0][1] == found[1][1] != ours
    assert torch.equal(data[1][0], second), "the parent's pipe is as before"


def test_texts() -> None:
    assert process_text(LavisEnvironment(), "fake_text", "A Cat", prompt="see ") == "see a cat"


# --- datasets -------------------------------------------------------------------------------------------------------


@pytest.fixture
def lavis_data(tmp_path: Path) -> dict[str, Any]:
    """Settings of a dataset with captions, questions and evaluation records about one picture."""
    Image.new("RGB", (8, 8), (250, 0, 0)).save(tmp_path / "red.png")
    records = {
        "train": [
            {"image": "red.png", "caption": "a red square"},
            {"image": "red.png", "question": "what color?", "answer": ["dark", "red"], "question_id": 5},
            {"image": "missing.png", "caption": "nothing"},
            {"caption": "no picture"},
            {"image": "red.png", "caption": " "},
            {"video": "red.mp4"},
        ],
        "val": [{"image": "red.png", "caption": ["one", "two"]}, {"image": "red.png", "label": 3}],
    }
    for split, content in records.items():
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    files = {split: str(tmp_path / f"{split}.json") for split in records}
    return {"builder": "fake_dataset", "annotations": files, "images": str(tmp_path)}


def builder(settings: dict[str, Any], **more: Any) -> LavisBuilder:
    return LavisBuilder(LavisDatasetConfig(**{**settings, **more}), "x")


def test_items_become_samples(lavis_data: dict[str, Any]) -> None:
    made = builder(lavis_data)
    assert made.splits == ("train", "val")
    samples = made.build("train")
    red = Path(lavis_data["images"]) / "red.png"
    assert len(samples) == 6 and samples[0].images == [red] and samples[0].id == "fake_dataset/train/0"
    assert samples[0].messages == [Message("assistant", "a red square")] and samples[0].meta["image_id"] == 0
    assert samples[1].messages == [Message("user", "<image>\nwhat color?"), Message("assistant", "red")]
    assert samples[1].meta == {"question_id": 5, "question": "what color?", "answers": ["dark", "red"]}
    assert samples[2].images == [red.with_name("missing.png")], "the processor meets, counts and names it"
    with pytest.raises(SampleError, match=r"fake_dataset/train/3.*LAVIS cannot read it: KeyError: 'image'"):
        samples[3]
    with pytest.raises(SampleError, match=r"has no text \(its keys: caption, image, image_id, text_input\)"):
        samples[4]
    with pytest.raises(SampleError, match=r"LAVIS's item has no picture \(its keys: text_input, video\)"):
        samples[5]
    val = made.build("val")
    assert val[0].messages == [Message("assistant", "one")] and val[0].meta["answers"] == ["one", "two"]
    assert builder(lavis_data, answer="label").build("val")[1].messages[1] == Message("assistant", "3")
    assert len(builder(lavis_data, max_samples=2).build("train")) == 2
    processed = builder(lavis_data, text_processor="fake_text").build("train")
    assert processed[0].messages[0].content == "fake_text: a red square"


def test_pictures_outside_the_folder_are_refused(lavis_data: dict[str, Any], tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    for place in (images / "a.png", tmp_path / "secret.png"):
        Image.new("RGB", (8, 8)).save(place)
    names = ["a.png", "sub/../a.png", str(images / "a.png"), "../secret.png", str(tmp_path / "secret.png")]
    (tmp_path / "train.json").write_text(json.dumps([{"image": name, "caption": "x"} for name in names]))
    samples = builder(lavis_data, images=str(images)).build("train")
    assert [samples[index].images for index in range(3)] == [[images / "a.png"]] * 3
    for index in (3, 4):
        with pytest.raises(SampleError, match=rf"train/{index}.*'\.\./secret\.png' leaves the folder `images`"):
            samples[index]


def test_long_datasets_come_in_pieces(lavis_data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = builder(lavis_data).build("train").records
    monkeypatch.setattr("minivlm.datasets.lavis.RECORDS_PER_REQUEST", 2)
    assert builder(lavis_data).build("train").records == whole and len(whole) == 6


def test_datasets_that_cannot_be_built(lavis_data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DatasetError, match=r"dataset 'x' has no split 'vall' \(did you mean 'val'"):
        builder(lavis_data).build("vall")
    with pytest.raises(DatasetError, match=r"dataset 'x': LAVIS has no builder 'fake_data' .*fake_dataset"):
        builder(lavis_data, builder="fake_data").build("train")
    with pytest.raises(DatasetError, match=r"FileNotFoundError.*no\.json"):
        builder(lavis_data, annotations={"train": "/no.json"}).build("train")
    monkeypatch.delenv("MINIVLM_LAVIS_PYTHON")
    with pytest.raises(DatasetError, match="dataset 'x': no interpreter with LAVIS is named"):
        builder(lavis_data).build("train")


def test_an_experiment_with_all_three(
    tiny_experiment: dict[str, Any], lavis_data: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From YAML through ``train.py``'s own function: encoder, cache, processor and dataset are LAVIS's."""
    from helpers import write_yaml

    from minivlm import cli

    image = {"name": "lavis", "processor": "fake_image_eval"}
    tiny_experiment["model"] = {**section(), "processor": {"image": image, "prompts": ["what is it?"]}}
    tiny_experiment["datasets"] = {"x": {"name": "lavis", **lavis_data}}
    tiny_experiment["run"] |= {"feature_cache": str(tmp_path / "cache"), "batch_size_train": 2, "max_steps": 2}
    tiny_experiment["run"] |= {"max_bad_share": 1.0}
    file = write_yaml(tmp_path / "experiment.yaml", tiny_experiment)
    assert cli.train(["--cfg-path", str(file), "--dry-run"]) == 0
    assert cli.train(["--cfg-path", str(file)]) == 0, capsys.readouterr().err
    assert "1 encoded now" in capsys.readouterr().out
    assert (tmp_path / "out" / "model" / "manifest.json").is_file()


# --- doctor ---------------------------------------------------------------------------------------------------------


def test_doctor_tells_of_lavis(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("minivlm.doctor._load", lambda module: None)  # no package of ours is imported for this
    doctor([])
    assert "salesforce-lavis 1.0.2" in capsys.readouterr().out
    monkeypatch.setenv("MINIVLM_LAVIS_PYTHON", make_lavis_python(tmp_path, {"timm": "1.0.31"}))
    code = doctor([])
    assert "timm 1.0.31 is installed, needed 0.4.12" in capsys.readouterr().out
    monkeypatch.delenv("MINIVLM_LAVIS_PYTHON")
    assert doctor([]) == code, "LAVIS is no core package"
    assert "not set up (MINIVLM_LAVIS_PYTHON names no interpreter)" in capsys.readouterr().out


def test_the_example_of_the_documents_passes_the_schema(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "lavis.md").read_text(), flags=re.DOTALL)
    (tmp_path / "experiment.yaml").write_text(block)
    (stage,) = load_config(tmp_path / "experiment.yaml").stages
    assert stage.model.vision_encoder is not None and stage.model.vision_encoder.freeze is None
    assert [part.name for part in (stage.model.vision_encoder, *stage.datasets.values())] == ["lavis", "lavis"]


def test_requests_of_several_threads_do_not_mix() -> None:
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda n: process_text(LavisEnvironment(), "fake_text", f"N{n}"), range(40)))
    assert texts == [f"n{n}" for n in range(40)]
    assert request(LavisEnvironment(), "text", processor={"name": "fake_text", "options": {}}, text="A")[0] == {
        "text": "a"
    }
