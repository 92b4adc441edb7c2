"""The public API and the model folder: what is saved is what is loaded, and nothing else is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model, write_yaml
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import minivlm
from minivlm import api
from minivlm.checkpoints.native import (
    MANIFEST,
    WEIGHTS,
    CheckpointError,
    Manifest,
    find_model_folder,
    is_model_folder,
    load_weights,
    read_manifest,
    save_model,
    trained_names,
)
from minivlm.config import ConfigError, load_config
from minivlm.config.loader import parse_model
from minivlm.models.base import ModelError
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.processor import VLMProcessor
from minivlm.runners.experiment import run_experiment
from minivlm.types import Message, Sample

logging.set_verbosity_error()
logging.disable_progress_bar()

RED = Image.new("RGB", (40, 30), (220, 30, 30))
SAMPLES = [
    Sample("a", [Message("user", "<image>\nwhat color is it?"), Message("assistant", "red")], [RED]),
    Sample("b", [Message("user", "what is a triangle?"), Message("assistant", "a shape")]),
]
QUIET = Console(quiet=True)


def section(**changes: dict[str, Any] | str) -> dict[str, Any]:
    """``tiny_model`` with changed nodes."""
    model = tiny_model()
    for name, settings in changes.items():
        model[name] = {**model[name], **settings} if isinstance(settings, dict) else settings
    return model


def llm(**settings: Any) -> dict[str, Any]:
    return {"config": {**tiny_model()["language_model"]["config"], **settings}}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as one downloads them: a CLIP encoder of three layers and two Llamas, one with tied embeddings."""
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(7)
    vit = {**tiny_model()["vision_encoder"]["config"], "num_hidden_layers": 3}
    CLIPVisionModel(CLIPVisionConfig(**{k: v for k, v in vit.items() if k != "model_type"})).save_pretrained(
        folder / "clip"
    )
    settings = {k: v for k, v in llm()["config"].items() if k != "model_type"}
    LlamaForCausalLM(LlamaConfig(**settings, vocab_size=360)).save_pretrained(folder / "llama")
    LlamaForCausalLM(LlamaConfig(**settings, vocab_size=360, tie_word_embeddings=True)).save_pretrained(folder / "tied")
    LlamaForCausalLM(LlamaConfig(**settings, vocab_size=360)).save_pretrained(folder / "other")
    return folder


def built(model: dict[str, Any], seed: int = 0) -> tuple[VisionLanguageModel, VLMProcessor, Any]:
    torch.manual_seed(seed)
    return api.assemble(parse_model(model, "test"))


def train_a_little(model: VisionLanguageModel, processor: VLMProcessor) -> None:
    """Two real steps of everything that is not frozen."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(processor.collate([processor.encode(s) for s in SAMPLES])).loss.backward()
        optimizer.step()
    model.eval()


def logits(model: VisionLanguageModel, processor: VLMProcessor) -> Tensor:
    with torch.no_grad():
        return model.eval()(processor.collate([processor.encode(s) for s in SAMPLES]), True).logits  # type: ignore


def saved(model: dict[str, Any], folder: Path, seed: int = 0) -> tuple[VisionLanguageModel, VLMProcessor, Any]:
    """Build, train and save a model."""
    vlm, processor, config = built(model, seed)
    train_a_little(vlm, processor)
    save_model(folder, vlm, config, processor, Manifest(trained=trained_names(vlm), step=2))
    return vlm, processor, config


def case(name: str, bases: Path) -> dict[str, Any]:
    clip = {"name": "hf", "path": str(bases / "clip"), "config": None}
    llama = {"path": str(bases / "llama"), "config": None}
    return {
        "from scratch": section(),
        "all trained": section(vision_encoder={"freeze": False}),
        "all frozen but the connector": section(language_model={"freeze": True}),
        "tied embeddings": section(language_model=llm(tie_word_embeddings=True)),
        "frozen bases": section(vision_encoder=clip, language_model={**llama, "freeze": True}),
        "trained bases": section(vision_encoder={**clip, "freeze": False}, language_model=llama),
        "trained base, last layer but one": section(vision_encoder={**clip, "freeze": False, "layer": -2}),
        "partly trained base": section(language_model={**llama, "freeze": ["*embed_tokens*", "*layers.0.*"]}),
        "partly trained encoder": section(vision_encoder={**clip, "freeze": ["*layers.0.*"], "layer": -2}),
        "tied base": section(language_model={"path": str(bases / "tied"), "config": None}),
        "tied base, partly trained": section(
            language_model={"path": str(bases / "tied"), "config": None, "freeze": ["*layers.1.*"]}
        ),
        "tied base, embeddings frozen": section(
            language_model={"path": str(bases / "tied"), "config": None, "freeze": ["*embed_tokens*"]}
        ),
        "other template and connector": section(
            template="vicuna_v1", connector={"name": "mlp", "depth": 1, "norm": True, "merge": 2}
        ),
    }[name]


CASES = [
    "from scratch",
    "all trained",
    "all frozen but the connector",
    "tied embeddings",
    "frozen bases",
    "trained bases",
    "trained base, last layer but one",
    "partly trained base",
    "partly trained encoder",
    "tied base",
    "tied base, partly trained",
    "tied base, embeddings frozen",
    "other template and connector",
]


@pytest.mark.parametrize("name", CASES)
def test_a_saved_model_is_loaded_bit_by_bit(name: str, bases: Path, tmp_path: Path) -> None:
    model, processor, _ = saved(case(name, bases), tmp_path / "model")
    expected = logits(model, processor)
    torch.manual_seed(99)
    again, its_processor = minivlm.load(tmp_path / "model", device="cpu")
    assert not again.training
    assert set(again.state_dict()) == set(model.state_dict())
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key
    assert torch.equal(logits(again, its_processor), expected)
    assert vars(its_processor.template.config) == vars(processor.template.config)
    assert vars(its_processor.transforms["image"]) == vars(processor.transforms["image"])
    assert its_processor.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_the_file_holds_what_no_base_provides(bases: Path, tmp_path: Path) -> None:
    saved(case("frozen bases", bases), tmp_path / "a")
    assert {key.split(".")[0] for key in load_file(tmp_path / "a" / WEIGHTS)} == {"connector"}
    manifest = read_manifest(tmp_path / "a")
    assert manifest.complete == ["connector"] and manifest.step == 2
    assert manifest.sources["vision_encoder"]["path"] == str(bases / "clip")  # type: ignore[index]
    saved(case("partly trained base", bases), tmp_path / "b")
    language = {k for k in load_file(tmp_path / "b" / WEIGHTS) if k.startswith("language_model.")}
    assert any(".layers.1." in k for k in language) and not any(".layers.0." in k for k in language)
    saved(case("trained bases", bases), tmp_path / "c")
    assert read_manifest(tmp_path / "c").complete == ["vision_encoder", "connector", "language_model"]


def test_adapters_keep_what_an_earlier_stage_trained(bases: Path, tmp_path: Path) -> None:
    """Layers with adapters have other names in memory than in a file."""
    saved(case("partly trained base", bases), tmp_path / "first")
    base = section(language_model={"path": str(bases / "llama"), "config": None, "lora": {"r": 2}})
    model, processor, config = built(base | {"checkpoint": str(tmp_path / "first")})
    train_a_little(model, processor)
    trained = trained_names(model, model.trained_before)
    save_model(tmp_path / "second", model, config, processor, Manifest(trained=trained))
    again, other, _ = built({"checkpoint": str(tmp_path / "second")}, seed=1)
    assert torch.equal(logits(again, other), logits(model, processor))


@pytest.mark.parametrize("name", ["trained bases", "tied base"])
def test_a_complete_model_does_not_need_its_bases(name: str, bases: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(bases, tmp_path / "bases")
    model, processor, _ = saved(case(name, tmp_path / "bases"), tmp_path / "model")
    expected = logits(model, processor)
    shutil.rmtree(tmp_path / "bases")
    assert torch.equal(logits(*minivlm.load(tmp_path / "model", device="cpu")), expected)


def test_a_base_with_other_weights_is_refused(bases: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(bases / "llama", tmp_path / "base")
    trained = section(language_model={"path": str(tmp_path / "base"), "config": None, "freeze": True})
    saved(trained, tmp_path / "model")
    shutil.rmtree(tmp_path / "base")
    shutil.copytree(bases / "other", tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"trained on other weights of language_model than those in .*base: hash"):
        minivlm.load(tmp_path / "model", device="cpu")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ModelError, match="there is no folder"):
        minivlm.load(tmp_path / "model", device="cpu")


def test_a_checkpoint_of_another_model_is_refused_with_a_report(tmp_path: Path) -> None:
    saved(section(), tmp_path / "model")
    wider = section(connector={"hidden_size": 48}, language_model=llm(num_hidden_layers=3))
    model, _, _ = built(wider)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, tmp_path / "model")
    report = str(caught.value)
    assert "is a checkpoint of another model" in report
    assert "missing      9  (language_model.model.model.layers.2." in report
    assert "wrong shape  3  (connector.layers.0.weight is (32, 16), wanted (48, 16)" in report
    assert "unexpected   0" in report and "matched" in report
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items()), "nothing was filled"
    fewer, _, _ = built(section(language_model=llm(num_hidden_layers=1)))
    with pytest.raises(CheckpointError, match=r"unexpected   9  \(language_model\.model\.model\.layers\.1\."):
        load_weights(fewer, tmp_path / "model")


def test_loading_reports_what_matched(tmp_path: Path) -> None:
    saved(section(), tmp_path / "model")
    model, _, _ = built(section(), seed=5)
    report = load_weights(model, tmp_path / "model")
    assert report.complete and not report.unexpected and len(report.matched) == len(model.state_dict())


def test_damaged_folders(tmp_path: Path) -> None:
    saved(section(), tmp_path / "model")
    weights = tmp_path / "model" / WEIGHTS
    whole = weights.read_bytes()
    for content in (whole[:50], whole[:-100], b"", b"no tensors at all"):
        weights.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{WEIGHTS} cannot be read"):
            minivlm.load(tmp_path / "model", device="cpu")
    tensors = load_file_bytes(whole, tmp_path)
    tensors.pop("connector.layers.0.bias")
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match=r"missing      1  \(connector\.layers\.0\.bias\)"):
        minivlm.load(tmp_path / "model", device="cpu")
    weights.unlink()
    with pytest.raises(CheckpointError, match=rf"model\.checkpoint: there is no file .*{WEIGHTS}"):
        minivlm.load(tmp_path / "model", device="cpu")
    manifest = tmp_path / "model" / MANIFEST
    raw = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**raw, "format": 99, "minivlm": "9.9"}))
    with pytest.raises(CheckpointError, match=r"written by a newer minivlm \(9\.9\); update this one"):
        minivlm.load(tmp_path / "model", device="cpu")
    for text, message in (
        ("{", "cannot be read"),
        ("[1]", "is no manifest of minivlm"),
        ('{"format": "1", "sources": []}', "is no manifest of minivlm: see format, sources"),
    ):
        manifest.write_text(text)
        with pytest.raises(CheckpointError, match=f"{MANIFEST} {message}"):
            minivlm.load(tmp_path / "model", device="cpu")
    manifest.write_text(json.dumps(raw))
    (tmp_path / "model" / "config.yaml").write_text("connector: {name: mlp}")
    with pytest.raises(CheckpointError, match=r"config\.yaml does not describe vision_encoder, language_model"):
        minivlm.load(tmp_path / "model", device="cpu")


def load_file_bytes(content: bytes, folder: Path) -> dict[str, Tensor]:
    (folder / "copy.safetensors").write_bytes(content)
    return load_file(folder / "copy.safetensors")


def test_the_manifest_of_a_later_version_may_know_more(tmp_path: Path) -> None:
    saved(section(), tmp_path / "model")
    manifest = tmp_path / "model" / MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "something_new": 1}))
    assert read_manifest(tmp_path / "model").step == 2


def test_an_interrupted_save_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, config = saved(section(), tmp_path / "model")
    before = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(processor.tokenizer, "save_pretrained", full)
    with pytest.raises(OSError, match="no space left"):
        save_model(tmp_path / "model", model, config, processor, Manifest())
    assert {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


# --- finding and loading --------------------------------------------------------------------------------------------


def test_a_model_is_found_in_the_folder_of_its_run(tmp_path: Path) -> None:
    saved(section(), tmp_path / "run" / "one" / "model")
    saved(section(), tmp_path / "run" / "two" / "model")
    os.utime(tmp_path / "run" / "two" / "model", (1, 1))
    assert is_model_folder(tmp_path / "run" / "one" / "model") and not is_model_folder(tmp_path / "run")
    one = tmp_path / "run" / "one" / "model"
    assert find_model_folder(one) == find_model_folder(one.parent) == find_model_folder(str(one.parent)) == one
    assert find_model_folder(tmp_path / "run") == one, "the newest of several stages"
    os.utime(one, (0, 0))
    assert find_model_folder(tmp_path / "run") == tmp_path / "run" / "two" / "model"
    with pytest.raises(CheckpointError, match="there is no folder"):
        find_model_folder(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no minivlm model \(manifest\.json and config\.yaml\)"):
        minivlm.load(tmp_path / "empty")


def test_loading_a_configuration_file(tmp_path: Path) -> None:
    file = write_yaml(tmp_path / "x.yaml", {"model": section()})
    model, processor = minivlm.load(file, device="cpu", options=["model.connector.depth=3"])
    assert not model.training and len([p for p in model.connector.parameters()]) == 6
    assert processor.tokens_per_image == 4
    with pytest.raises(ConfigError, match="vision_encodr"):
        minivlm.load(write_yaml(tmp_path / "y.yaml", {"model": {"vision_encodr": {"name": "hf"}}}))
    with pytest.raises(ConfigError, match="nowhere"):
        minivlm.load(tmp_path / "nowhere.yaml")


def test_one_of_several_stages(tmp_path: Path) -> None:
    stages = [{"name": name, "model": {"connector": {"name": "mlp", "depth": n}}} for name, n in (("a", 1), ("b", 3))]
    file = write_yaml(tmp_path / "x.yaml", {"model": section(), "stages": stages})
    depth = {
        name: len(list(minivlm.load(file, stage=name)[0].connector.parameters())) // 2 for name in ("a", "b", None)
    }
    assert depth == {"a": 1, "b": 3, None: 3}
    with pytest.raises(KeyError, match="no stage 'c'; stages: a, b"):
        minivlm.load(file, stage="c")


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), (torch.float64, torch.float64)]
)
def test_the_type_of_the_weights(name: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    file = write_yaml(tmp_path / "x.yaml", {"model": section()})
    model, processor = minivlm.load(file, device="cpu", dtype=name)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert logits(model, processor).dtype == dtype


def test_every_part_keeps_its_type_unless_another_is_asked_for(tmp_path: Path) -> None:
    """Language models are mostly stored in half precision, which a CPU can compute with."""
    for name, kind in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        parts = section(language_model={"dtype": name, "freeze": True})
        model, processor = minivlm.load(write_yaml(tmp_path / "x.yaml", {"model": parts}), device="cpu")
        assert {p.dtype for p in model.language_model.parameters()} == {kind}
        assert {p.dtype for p in model.connector.parameters()} == {torch.float32}
        assert logits(model, processor).dtype == kind and logits(model, processor).isfinite().all()


def test_a_checkpoint_brings_its_parts_and_a_section_may_replace_them(tmp_path: Path) -> None:
    model, processor, _ = saved(section(template="vicuna_v1"), tmp_path / "model")
    whole = write_yaml(tmp_path / "a.yaml", {"model": {"checkpoint": str(tmp_path / "model")}})
    again, its_processor = minivlm.load(whole, device="cpu")
    assert torch.equal(logits(again, its_processor), logits(model, processor))
    other = write_yaml(tmp_path / "b.yaml", {"model": {"checkpoint": str(tmp_path / "model"), "template": "qa"}})
    again, its_processor = minivlm.load(other, device="cpu")
    assert its_processor.template.config.user_prefix == "Question: "
    assert torch.equal(again.connector.layers[0].weight, model.connector.layers[0].weight)


def test_packaged_models_in_laviss_form() -> None:
    zoo = minivlm.model_zoo()
    assert dict(zoo)["quickstart"] == ["easy_vqa"] and len(zoo) == sum(len(types) for _, types in zoo)
    assert "quickstart" in str(zoo) and str(zoo).splitlines()[0].split() == ["Architectures", "Types"]
    model, vis_processors, text_processors = minivlm.load_model_and_preprocess("quickstart", "easy_vqa", is_eval=True)
    assert not model.training
    pixels = vis_processors["eval"](RED.convert("RGBA"))
    size = model.vision_encoder.image_settings["size"]
    assert pixels.shape == (3, size, size) and torch.equal(vis_processors["train"](RED), pixels)
    assert text_processors["eval"]("what?") == text_processors["train"]("what?") == "what?"
    features = model.extract_features({"image": pixels[None]})
    assert features.shape == (1, model.vision_encoder.num_tokens, model.vision_encoder.hidden_size)
    training, _, _ = minivlm.load_model_and_preprocess("quickstart", "easy_vqa", is_eval=False)
    assert training.training and not training.vision_encoder.training
    with pytest.raises(ConfigError, match=r"unknown arch 'quickstrat' \(did you mean 'quickstart'\?\)"):
        minivlm.load_model_and_preprocess("quickstrat", "easy_vqa")


def test_names_of_the_package() -> None:
    assert set(minivlm.__all__) == {"__version__", "load", "load_model_and_preprocess", "model_zoo"}
    assert minivlm.load is api.load
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        minivlm.laod  # noqa: B018


# --- stages ---------------------------------------------------------------------------------------------------------


def test_weights_of_an_earlier_stage_are_kept_when_they_are_frozen_later(
    tiny_experiment: dict[str, Any], bases: Path, tmp_path: Path
) -> None:
    """Stage one trains the encoder and the connector, stage two only the language model, stage three the connector.

    The last folder must hold all of it, although the encoder was frozen when it was written.
    """
    tiny_experiment["model"]["vision_encoder"] = {"name": "hf", "path": str(bases / "clip"), "freeze": False}
    tiny_experiment["model"]["language_model"] |= {"path": str(bases / "llama"), "config": None, "freeze": True}
    trains = {"freeze": False}
    frozen = {"freeze": True}
    tiny_experiment["run"] |= {"max_steps": 2}
    tiny_experiment["stages"] = [
        {"name": "one"},
        {"name": "two", "model": {"vision_encoder": frozen, "connector": frozen, "language_model": trains}},
        {"name": "three", "model": {"vision_encoder": frozen, "language_model": frozen}},
    ]
    file = write_yaml(tmp_path / "x.yaml", tiny_experiment)
    experiment = load_config(file)
    folders = [Path(stage.run.output_dir) / "model" for stage in experiment.stages]
    run_experiment(experiment, QUIET)
    one, two, three = (minivlm.load(folder, device="cpu")[0].state_dict() for folder in folders)
    base, _, _ = built(section(vision_encoder={"path": str(bases / "clip"), "config": None}))

    def moved(part: str, before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
        return any(not torch.equal(before[key], after[key]) for key in before if key.startswith(f"{part}."))

    assert moved("vision_encoder", base.state_dict(), one)
    assert [moved("vision_encoder", one, two), moved("vision_encoder", two, three)] == [False, False]
    assert [moved("connector", one, two), moved("connector", two, three)] == [False, True]
    assert [moved("language_model", one, two), moved("language_model", two, three)] == [True, False]
    manifests = [read_manifest(folder) for folder in folders]
    assert set(manifests[0].trained) < set(manifests[1].trained) == set(manifests[2].trained)
    assert manifests[2].complete == ["vision_encoder", "connector", "language_model"]
