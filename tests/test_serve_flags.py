"""Flags of chat, demo and generate: pictures of a command line, one question, bits, templates, devices."""

from __future__ import annotations

import functools
import http.server
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_imp import GOLDEN as IMP
from golden_mgm import GOLDEN, golden_json
from helpers import tiny_model, write_yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from test_dual import section
from test_golden_mgm import FOLDERS, as_published

from minivlm import cli
from minivlm.api import assemble
from minivlm.api import load as load_api
from minivlm.checkpoints.native import Manifest, save_model
from minivlm.config.errors import ConfigError
from minivlm.config.loader import load_config, parse_model
from minivlm.models import vlm
from minivlm.models.base import ModelError
from minivlm.models.configs import HFLanguageModelConfig
from minivlm.models.language.hf import HFLanguageModel
from minivlm.models.placement import place, plan_layers
from minivlm.models.vlm import PARTS, VisionLanguageModel
from minivlm.serve.chat import Chat
from minivlm.serve.pictures import read_pictures
from minivlm.serve.terminal import run_terminal

FOLDER = next(name for name in FOLDERS if name.startswith("llama"))


@pytest.fixture(scope="module")
def published() -> Path:
    """A folder of the original's, its tokenizer in it."""
    folder = as_published(FOLDER)
    tokenizer = GOLDEN / "tokenizers" / golden_json(f"{FOLDER}/expected.json")["tokenizer"]
    for file in tokenizer.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, Path]:
    red, blue = tmp_path / "red.png", tmp_path / "blue, or so.png"
    Image.new("RGB", (40, 30), "red").save(red)
    Image.new("RGB", (30, 50), "blue").save(blue)
    return red, blue


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A server on loopback of what lies in the folder of the test."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def chat(*arguments: Any) -> int:
    return cli.main(["chat", *map(str, arguments), "--device", "cpu"])


class Loaded:
    """The models that commands have loaded, and the prompts that they were given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.models: list[VisionLanguageModel] = []
        self.options: list[dict[str, Any]] = []
        self.batches: list[Any] = []
        generate = VisionLanguageModel.generate

        def watched(model: VisionLanguageModel, batch: Any, **options: Any) -> torch.Tensor:
            self.models.append(model)
            self.batches.append(batch)
            self.options.append(options)
            return generate(model, batch, **options)

        monkeypatch.setattr(VisionLanguageModel, "generate", watched)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    return Loaded(monkeypatch)


# --- questions and pictures -----------------------------------------------------------------------------------------


def test_one_question_about_several_pictures(
    published: Path, pictures: tuple[Path, Path], loaded: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    both = tuple(path.rename(path.with_name(path.name.replace(", or so", ""))) for path in pictures)
    given = ["--image-file", f"{both[0]}, {both[1]}", "--query", "Which is red?", "--temperature", "0"]
    assert chat(published, *given, "--max-new-tokens", "3") == 0
    said = capsys.readouterr()
    assert said.out.endswith("\n") and "you:" not in said.out
    assert loaded.batches[0].input_ids.lt(0).sum() == 2 * loaded.models[0].connector.tokens_per_image
    assert (loaded.options[0]["max_new_tokens"], loaded.options[0]["do_sample"]) == (3, False)
    assert cli.main(["chat", "--model-path", str(published), *given[2:], "--device", "cpu"]) == 0
    assert not (loaded.batches[1].input_ids < 0).any(), "a question of text alone"


def test_pictures_of_the_command_line_are_those_of_the_conversation(
    published: Path, pictures: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {**run_terminal.__kwdefaults__, "input": lambda prompt: "/quit"}
    monkeypatch.setattr(run_terminal, "__kwdefaults__", kept)
    assert chat(published, "--image-file", pictures[1]) == 0
    assert "a new conversation about this picture (30 x 50)" in capsys.readouterr().out


def test_addresses_are_fetched(pictures: tuple[Path, Path], address: str, tmp_path: Path) -> None:
    red, blue = pictures
    assert [image.size for image in read_pictures(f"{red},{address}/red.png", 1)] == [(40, 30)] * 2
    assert [image.size for image in read_pictures(str(blue), 1)] == [(30, 50)], "a name with a comma"
    (tmp_path / "page.html").write_text("no picture")
    (tmp_path / "large.png").write_bytes(b"x" * (2**20 + 1))
    for name, reason in (
        (f"{address}/none.png", "cannot be fetched: .*404"),
        (f"{address}/page.html", "no picture that can be read"),
        (f"{address}/large.png", "more than 1 MB"),
        ("http://127.0.0.1:1/x.png", "cannot be fetched"),
        (f"{address}/a b.png", "cannot be fetched: .*control characters"),
        (" , ", "names no picture"),
        ("file:///etc/passwd", "there is no picture"),
        (str(tmp_path / "page.html"), "cannot read picture"),
    ):
        with pytest.raises(ValueError, match=f"--image-file: .*{reason}"):
            read_pictures(name, 1)


def test_bad_flags_are_told_before_the_model_is_loaded(
    published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minivlm.api.assemble", lambda *a: pytest.fail("loaded"))
    for arguments, reason in (
        (["--image-file", tmp_path / "none.png"], "there is no picture"),
        (["--conv-mode", "vicuna_v11"], "did you mean 'vicuna_v1'"),
        (["--temperature", "3"], "--temperature: must be at most 2, got 3.0"),
        (["--top-k", "-1"], "--top-k: must be at least 0, got -1"),
        (["--top-p", "0"], "--top-p: must be greater than 0, got 0.0"),
        (["--max-new-tokens", "0"], "--max-new-tokens: must be at least 1"),
        (["--device-map", "balancd"], "auto, balanced, sequential or a mapping, got 'balancd'"),
    ):
        assert chat(published, "--query", "x", *arguments) == 2
        assert reason in capsys.readouterr().err
    assert cli.main(["demo", str(published), "--image-file", "x.png"]) == 2
    assert "--image-file is for --cli and --query" in capsys.readouterr().err
    for arguments in (["--load-4bit", "--load-8bit"], ["--device-map", "3"], ["--top-k", "a few"]):
        with pytest.raises(SystemExit):
            chat(published, *arguments)
        assert "minivlm chat: error: " in capsys.readouterr().err


# --- templates ------------------------------------------------------------------------------------------------------


def test_another_template_is_used_with_a_note(
    published: Path, loaded: Loaded, capsys: pytest.CaptureFixture[str], pictures: tuple[Path, Path]
) -> None:
    for mode in ("vicuna_v1", "llama_3"):
        arguments = ["--query", "x", "--max-new-tokens", "1", "--conv-mode", mode, "--image-file"]
        assert chat(published, *arguments, f"{pictures[0]},{pictures[0]}") == 0
        note = f"note: --conv-mode {mode}: this model was trained with the template vicuna_v1"
        assert (note in capsys.readouterr().err) == (mode != "vicuna_v1")
    tokenizer = load_api(published, device="cpu")[1].tokenizer
    texts = [tokenizer.decode([i for i in batch.input_ids[0] if i >= 0]) for batch in loaded.batches]
    assert "USER: Image 1:" in texts[0] and "start_header_id" in texts[1]
    assert all("Image 2:" in text for text in texts), "pictures are numbered as the model wants it"


# --- a base ----------------------------------------------------------------------------------------------------------


def test_generation_settings_of_a_base_do_not_count(tmp_path: Path) -> None:
    """Its penalties, sampling and lengths would be added to what is asked for; a checkpoint keeps none of them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    node: dict[str, Any] = section()["language_model"]
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**node["config"] | {"vocab_size": 300, "eos_token_id": 7}))
    base.save_pretrained(tmp_path)
    said = {"do_sample": True, "repetition_penalty": 1e6, "min_new_tokens": 3, "max_length": 4, "eos_token_id": 7}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    config = HFLanguageModelConfig(path=str(tmp_path))
    embeds, mask = torch.randn(1, 3, base.config.hidden_size), torch.ones(1, 3, dtype=torch.long)
    ours = HFLanguageModel(config, 300).eval()
    assert ours.model.generation_config.eos_token_id == 7
    ids = ours.generate(embeds, mask, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    step = embeds
    for token in ids[0]:
        with torch.no_grad():
            assert ours.head(ours(step, None, torch.arange(step.shape[1])[None]))[0, -1].argmax() == token
        step = torch.cat([step, ours.embed(token[None, None])], 1)
    assert len(set(ids[0].tolist())) < 12, "or there is nothing to punish"


def test_adapters_find_their_base(tmp_path: Path, loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder of adapters names none that is here."""
    golden = IMP / "v15"
    for file in (*(f for f in golden.iterdir() if f.is_file()), *(IMP / "tokenizer").iterdir()):
        (tmp_path / file.name).symlink_to(file.resolve())
    arguments = ["--model-path", golden / "stage2_lora", "--query", "x", "--max-new-tokens", "1"]
    assert chat(*arguments) == 2
    assert chat(*arguments, "--model-base", tmp_path) == 0
    (model,) = loaded.models
    assert model.language_model.adapter_parameters and "loaded" in capsys.readouterr().err
    assert all(model.is_frozen(part) for part in PARTS)


# --- bits -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ours with these parts."""
    model, processor, config = assemble(parse_model(section(), "test"))
    folder = tmp_path_factory.mktemp("own") / "model"
    save_model(folder, model, config, processor, Manifest())
    return folder


@pytest.mark.parametrize(
    ("source", "flag", "kind"),
    [(source, "--load-4bit", "Linear4bit") for source in ("own", "file", "published")]
    + [(source, "--load-8bit", "Linear8bitLt") for source in ("own", "published")],
)
def test_only_the_language_model_is_quantised(
    source: str,
    flag: str,
    kind: str,
    request: pytest.FixtureRequest,
    pictures: tuple[Path, Path],
    loaded: Loaded,
    tmp_path: Path,
) -> None:
    folder = request.getfixturevalue("own" if source == "file" else source)
    file = {"model": {"checkpoint": str(folder), "language_model": {"name": "hf"}}}
    config = write_yaml(tmp_path / "x.yaml", file) if source == "file" else folder
    arguments = ["--query", "x", "--max-new-tokens", "2", "--image-file", pictures[0]]
    assert chat(config, flag, *arguments) == 0
    model = loaded.models[0]
    quantised = {name.split(".")[0] for name, module in model.named_modules() if type(module).__name__ == kind}
    assert quantised == {"language_model"}
    others = [*model.vision_encoder.parameters(), *model.connector.parameters()]
    assert {parameter.dtype for parameter in others} == {torch.float32}


def test_what_cannot_be_quantised_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_yaml(tmp_path / "x.yaml", {"model": tiny_model()})
    assert chat(file, "--load-4bit", "--query", "x") == 2
    assert "only trained weights that can be read again are quantised" in capsys.readouterr().err


def test_eight_bits_beside_bf16_answer_quietly(
    published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Bitsandbytes would tell with every layer of every token that it computes in fp16."""
    for file in published.iterdir():
        (tmp_path / file.name).symlink_to(file.resolve())
    (tmp_path / "model.safetensors").unlink()
    tensors = load_file(published / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.WARNING)
    assert chat(tmp_path, "--load-8bit", "--query", "x", "--max-new-tokens", "2") == 0
    assert "will be cast" not in caplog.text


def test_half_precision_becomes_bf16_on_a_cpu(
    published: Path, loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in published.iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).symlink_to(file.resolve())
    tensors = load_file(published / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    assert chat(tmp_path, "--query", "x", "--max-new-tokens", "1") == 0
    assert {p.dtype for p in loaded.models[0].language_model.parameters()} == {torch.bfloat16}
    assert "kept in bf16" in capsys.readouterr().err
    assert not any(p.requires_grad for p in loaded.models[0].parameters()), "what trains would be in fp32"


def test_a_gpu_encodes_pictures_in_the_type_of_the_language_model(
    pictures: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in training and evaluation; the CPU stands for the GPU that is not here."""
    content = section()
    content["language_model"]["dtype"] = "bf16"
    model, processor, _ = assemble(parse_model(content, "test"), frozen=True)
    model.eval()
    found = []
    connect = model.connector.forward
    monkeypatch.setattr(model.connector, "forward", lambda tokens: found.append(tokens.dtype) or connect(tokens))
    talk = Chat(model, processor, max_new_tokens=1)
    batch = processor.prompt([{"role": "user", "content": "<image>what?"}], [pictures[1]])
    for excluded in (vlm._FULL_PRECISION, ("meta",)):
        monkeypatch.setattr(vlm, "_FULL_PRECISION", excluded)
        talk.ask("what?", [pictures[len(found) // 2]])
        model.generate(batch, max_new_tokens=1, pad_token_id=0)
    assert found == [torch.float32] * 2 + [torch.bfloat16] * 2
    content["language_model"]["dtype"] = "fp32"
    assert not isinstance(assemble(parse_model(content, "test"), frozen=True)[0].as_trained(), torch.autocast)


# --- devices --------------------------------------------------------------------------------------------------------


def spread(device_map: Any) -> VisionLanguageModel:
    torch.manual_seed(0)
    section = tiny_model()
    section["language_model"]["device_map"] = device_map
    model, _, _ = assemble(parse_model(section, "test"))
    return place(model, torch.device("cpu")).eval()


BY_MODULE = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "cpu"}


def test_layers_by_a_map_of_ones_own(published: Path, pictures: tuple[Path, Path], loaded: Loaded) -> None:
    """There is one device here, so what is tested is that every module is reached through accelerate's hooks."""
    arguments = ["--query", "what is it?", "--image-file", pictures[0], "--temperature", "0", "--max-new-tokens", "4"]
    given = ", ".join(f"{module}: {device}" for module, device in BY_MODULE.items())
    for device_map in ([], ["--device-map", f"{{{given}}}"]):
        assert chat(published, *arguments, *device_map) == 0
    plain, dispatched = loaded.models
    inner: Any = dispatched.language_model
    assert inner.model.hf_device_map == BY_MODULE and inner.main_device == dispatched.device == torch.device("cpu")
    hooked = {name for name, module in inner.model.named_modules() if hasattr(module, "_hf_hook")}
    assert {"", *BY_MODULE} - {"model.layers"} <= hooked and not any(hasattr(m, "_hf_hook") for m in plain.modules())
    batch = loaded.batches[0]
    with torch.no_grad():
        for found in zip(*(m(batch, return_logits=True).logits for m in (plain, dispatched)), strict=True):
            assert torch.equal(*found)


@pytest.mark.parametrize(
    ("device_map", "reason"),
    [
        ("auto", "auto spreads the layers over several GPUs, but the device is cpu"),
        ("sequential", "sequential spreads the layers"),
        ({"model.embed": 0}, r"has no model\.embed; it has model, model\.embed_tokens, model\.layers"),
        ({"model.embed_tokens": "cpu", "lm_head": "cpu"}, "does not say where model.layers.0"),
        ({"": "disk"}, "every module goes to a GPU or to cpu"),
        ({}, "every module goes to a GPU or to cpu"),
        ({"": "gpu"}, "cannot be followed"),
    ],
)
def test_maps_that_cannot_be_followed(device_map: Any, reason: str) -> None:
    with pytest.raises(ModelError, match=f"device_map.*{reason}"):
        spread(device_map)


def test_layers_are_shared_among_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.utils.modeling.get_max_memory", lambda given: given)  # GPUs that are not there
    section = tiny_model()
    section["language_model"]["config"] |= {"num_hidden_layers": 6, "vocab_size": 500}
    inner: Any = assemble(parse_model(section, "test"))[0].language_model.model
    layer = sum(p.nbytes for p in inner.model.layers[0].parameters())
    whole = sum(p.nbytes for p in inner.parameters())

    def layers(kind: str, memory: int, reserved: int = 0) -> list[int]:
        found = plan_layers(inner, kind, {0: memory, 1: memory}, reserved)
        places = [
            next(d for key, d in found.items() if not key or f"model.layers.{n}.".startswith(f"{key}."))
            for n in range(6)
        ]
        assert places == sorted(places) and next(iter(found.values())) == 0
        return [places.count(0), places.count(1)]

    assert layers("sequential", 2 * whole) == [6, 0]
    assert all(layers("balanced", 2 * whole)), "both have some"
    first, second = layers("sequential", whole, reserved=whole // 2)
    assert first < second, "the encoder takes room on the first"
    with pytest.raises(ModelError, match=r"do not fit into 2 GPUs with .* quantise them"):
        layers("auto", 2 * layer)


def test_maps_are_checked_and_belong_to_this_machine(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    tiny_experiment["model"]["language_model"]["device_map"] = "automatic"
    file = write_yaml(tmp_path / "x.yaml", tiny_experiment)
    with pytest.raises(ConfigError, match="device_map: auto, balanced, sequential or a mapping, got 'automatic'"):
        load_config(file)
    tiny_experiment["model"]["language_model"]["device_map"] = {"": "cpu"}
    from rich.console import Console

    from minivlm.runners.experiment import run_experiment

    with pytest.raises(ModelError, match="device_map is for talking to a model"):
        run_experiment(load_config(write_yaml(file, tiny_experiment)), Console(quiet=True))
