"""``minivlm export --to transformers``: the folder is LLaVA for plain transformers, and reads back as ours."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import PIL
import pytest
import torch
from golden_imp import golden_image
from helpers import tiny_model, write_yaml
from safetensors.torch import load_file, save_file
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.utils import logging

from minivlm import api
from minivlm.checkpoints import to_transformers
from minivlm.checkpoints.files import WeightFile
from minivlm.checkpoints.foreign import load_foreign, translate
from minivlm.checkpoints.llava_hf import LLAVA_HF, describe_config
from minivlm.checkpoints.native import Manifest, save_model
from minivlm.checkpoints.report import CheckpointError
from minivlm.cli import main
from minivlm.config.loader import parse_model
from minivlm.processors.configs import ImageConfig
from minivlm.processors.image import ImageTransform, open_image
from minivlm.types import Message, Sample

logging.set_verbosity_error()
logging.disable_progress_bar()

SIGLIP = {"model_type": "siglip_vision_model", "num_hidden_layers": 3}
QWEN = {"model_type": "qwen2", "num_key_value_heads": 1}
CASES: dict[str, dict[str, Any]] = {
    # name: changes of the parts' settings, of the picture's, template
    "clip_llama": {"vision": {}, "language": {}, "image": {"resize": "shortest_edge"}, "template": "vicuna_v1"},
    "clip_llama_tied": {
        "vision": {"layer": -2, "class_token": "keep"},
        "language": {"tie_word_embeddings": True},
        "image": {"resize": "pad"},
        "template": "minigpt_v2",
    },
    "siglip_qwen": {
        "vision": {"layer": -2, "config": SIGLIP},
        "language": {**QWEN, "vocab_size": 384},
        "image": {"resize": "squash"},
        "template": "chatml_direct",
    },
    "siglip_qwen_tied": {
        "vision": {"config": SIGLIP},
        "language": {**QWEN, "tie_word_embeddings": True},
        "image": {"resize": "pad", "interpolation": "bilinear"},
        "template": "qa",
    },
}
QUESTION, OTHER = "what is it?", "and which color has the large shape in the middle?"
NEW_TOKENS = 6
LEVELS = {"nearest": 0, "bilinear": 2, "bicubic": 6, "lanczos": 24}
"""By how many of 255 levels the order of passes may change a pixel."""
PICTURES = ("wide", "square", "gray")

READER = """
import json, sys
sys.modules["torchvision"] = None
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, pictures, questions, new_tokens = sys.argv[1], sys.argv[2].split(","), sys.argv[3].split("|"), int(sys.argv[4])
def ask(picture, text):
    parts = [{"type": "image", "image": Image.open(picture)}] if picture else []
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]

options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
found = {}
for case in sys.argv[5:]:
    processor = AutoProcessor.from_pretrained(f"{folder}/{case}")
    model = AutoModelForImageTextToText.from_pretrained(f"{folder}/{case}").eval()
    batches = {
        "pictures": [ask(picture, questions[0]) for picture in pictures],
        "text": [ask(None, questions[0])],
        "padded": [ask(pictures[0], questions[0]), ask(pictures[1], questions[1])],
    }
    for name, talks in batches.items():
        inputs = processor.apply_chat_template(talks, processor_kwargs={"padding": True}, **options)
        at = inputs["attention_mask"].cumsum(-1).sub(1).clamp(min=0)
        with torch.inference_mode():
            found[f"{case}.{name}.logits"] = model(**inputs, position_ids=at).logits
            ids = model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        found[f"{case}.{name}.new"] = ids[:, inputs["input_ids"].shape[1]:].contiguous()
        found |= {f"{case}.{name}.{key}": value for key, value in inputs.items()}
assert not any(name.split(".")[0] == "minivlm" for name in sys.modules)
save_file({key: value.contiguous() for key, value in found.items()}, f"{folder}/found.safetensors")
"""


def section(case: str) -> dict[str, Any]:
    changes, model = CASES[case], tiny_model()
    encoder, language = model["vision_encoder"], model["language_model"]
    encoder["config"] |= changes["vision"].get("config", {})
    encoder |= {key: value for key, value in changes["vision"].items() if key != "config"}
    language["config"] |= changes["language"]
    return model | {"template": changes["template"], "processor": {"image": {"name": "image", **changes["image"]}}}


def build(content: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model, processor, config = api.assemble(parse_model(content, "test"))
    for name, parameter in model.named_parameters():  # larger than they begin, so that answers differ
        if name.endswith("bias") or parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval(), processor, config


@functools.cache
def built(case: str) -> Any:
    return build(section(case))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of every case, exported by the command."""
    folder = tmp_path_factory.mktemp("exported")
    for case in CASES:
        model, processor, config = built(case)
        save_model(folder / "ours" / case, model, config, processor, Manifest())
        assert main(["export", str(folder / "ours" / case), str(folder / case), "--to", "transformers"]) == 0
    return folder


@pytest.fixture(scope="module")
def found(exported: Path) -> dict[str, Any]:
    """What plain transformers makes of the folders, in a process without minivlm."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    pictures = ",".join(str(golden_image(name)) for name in PICTURES)
    command = [sys.executable, "-c", READER, str(exported), pictures, f"{QUESTION}|{OTHER}", str(NEW_TOKENS), *CASES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=exported)
    assert done.returncode == 0, done.stderr
    return load_file(exported / "found.safetensors")


def sample(processor: Any, picture: str | None, text: str) -> Any:
    pictures = [golden_image(picture)] if picture else []
    content = processor.template.with_images(text, len(pictures))
    return processor.prompt_sample(Sample("s", [Message("user", content)], pictures), chat=True)


@pytest.mark.parametrize("case", CASES)
def test_plain_transformers_gives_the_same(case: str, exported: Path, found: dict[str, Any]) -> None:
    model, processor, _ = built(case)
    token = json.loads((exported / case / "config.json").read_text())["image_token_index"]
    batches = {
        "pictures": [sample(processor, name, QUESTION) for name in PICTURES],
        "text": [sample(processor, None, QUESTION)],
        "padded": [sample(processor, PICTURES[0], QUESTION), sample(processor, PICTURES[1], OTHER)],
    }
    answers = []
    for name, samples in batches.items():
        batch = processor.collate(samples, for_generation=True)
        theirs = {key.rpartition(".")[2]: value for key, value in found.items() if key.startswith(f"{case}.{name}.")}
        assert torch.equal(theirs["attention_mask"], batch.attention_mask)
        assert torch.equal(theirs["input_ids"], batch.input_ids.masked_fill(batch.input_ids < 0, token))
        if name != "text":
            torch.testing.assert_close(theirs["pixel_values"], batch.pixels["image"], rtol=0, atol=1e-6)
        with torch.inference_mode():
            logits = model(batch, return_logits=True).logits
        seen = batch.attention_mask.bool()
        rows = model.language_model.vocab_size
        torch.testing.assert_close(theirs["logits"][seen][:, :rows], logits[seen], rtol=0, atol=1e-5)
        if theirs["logits"].shape[-1] > rows:  # the row of <image> is never an answer
            assert (theirs["logits"][seen][:, rows:] < logits[seen].max(-1, keepdim=True).values).all()
        options = processor.generation_options() | {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        ours = model.generate(batch, **options)
        assert torch.equal(theirs["new"], ours)
        answers += ours.tolist()
    assert (batches["padded"][0].input_ids != batches["padded"][1].input_ids) and len(answers) == 6
    assert len({tuple(answer) for answer in answers}) > 1, "all answers are the same: the model is too plain a test"


@pytest.mark.parametrize("resize", ["squash", "shortest_edge", "pad"])
@pytest.mark.parametrize("interpolation", LEVELS)
def test_pixels(resize: str, interpolation: str) -> None:
    """The same, but where Pillow before 13 has another order of passes than ours: then by some of 255 levels."""
    settings = ImageConfig(size=32, resize=resize, interpolation=interpolation, mean=[0.5, 0.4, 0.3], std=[0.5] * 3)
    ours = ImageTransform(settings, {})
    theirs = LlavaImageProcessorPil(**to_transformers.picture_settings_of(ours))
    pillow = int(PIL.__version__.split(".")[0])
    for name in ("wide", "tall", "square", "small", "gray", "palette"):
        picture = open_image(golden_image(name))
        found = theirs(picture, return_tensors="pt")["pixel_values"][0]
        other_order = pillow < 13 and name == "tall" and resize != "pad"  # what is padded is a square
        tolerance = LEVELS[interpolation] / 255 / 0.5 + 1e-6 if other_order else 1e-6
        torch.testing.assert_close(found, ours(picture), rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_what_the_folder_holds(case: str, exported: Path) -> None:
    model, processor, _ = built(case)
    config = json.loads((exported / case / "config.json").read_text())
    tensors = load_file(exported / case / "model.safetensors")
    rows = max(model.language_model.vocab_size, len(processor.tokenizer) + 1)
    tied = "tied" in case
    assert config["architectures"] == ["LlavaForConditionalGeneration"] and "auto_map" not in config
    assert config["image_seq_length"] == processor.tokens_per_image
    assert config["text_config"]["vocab_size"] == rows and config["tie_word_embeddings"] is tied
    assert config["vision_config"]["num_hidden_layers"] == len(model.vision_encoder.model.encoder.layers)
    assert [tensor.shape[0] for name, tensor in tensors.items() if "embed_tokens" in name] == [rows]
    assert sum("lm_head" in name for name in tensors) == (0 if tied else 1)
    generation = json.loads((exported / case / "generation_config.json").read_text())
    assert generation["eos_token_id"] == processor.generation_options()["eos_token_id"]
    assert (exported / case / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("case", CASES)
def test_the_folder_reads_back_as_ours(case: str, exported: Path) -> None:
    original, processor, _ = built(case)
    folder = exported / case
    read = {name: json.loads((folder / name).read_text()) for name in ("config.json", "preprocessor_config.json")}
    described = describe_config(read["config.json"], read["preprocessor_config.json"])
    assert described["language_model"].pop("dtype") == "fp32"
    described["language_model"]["tokenizer"] = str(folder)
    described["template"] = CASES[case]["template"]
    model, again, _ = api.assemble(parse_model(described, "test"))
    tensors = load_file(folder / "model.safetensors")
    report = load_foreign(
        model, WeightFile(str(folder), folder / "model.safetensors", tensors), LLAVA_HF, "model.checkpoint"
    )
    assert report.fits and not report.ignored
    batches = [p.collate([sample(p, "wide", QUESTION)]) for p in (processor, again)]
    assert torch.equal(batches[0].pixels["image"], batches[1].pixels["image"])
    assert torch.equal(batches[0].input_ids, batches[1].input_ids)
    with torch.inference_mode():
        ours, theirs = (m.eval()(b, return_logits=True).logits for m, b in zip((original, model), batches))
    torch.testing.assert_close(theirs[..., : ours.shape[-1]], ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["clip_llama", "siglip_qwen"])
def test_names_of_every_version(case: str) -> None:
    """In memory, as published with ``vision_model``, and as written today."""
    model, processor, _ = built(case)
    llava = to_transformers._llava(model, len(processor.tokenizer) + 1, len(processor.tokenizer))
    own = set(model.state_dict())
    names = dict.fromkeys(llava.state_dict(), torch.empty(0))

    def published(name: str) -> str:
        name = name.replace("model.language_model.", "language_model.model.").removeprefix("model.")
        return name.replace("lm_head.", "language_model.lm_head.").replace(
            "vision_tower.", "vision_tower.vision_model."
        )

    old = {published(name) for name in names} | {
        "vision_tower.vision_model.embeddings.position_ids",
        "vision_tower.vision_model.head.probe",
        "vision_tower.vision_model.encoder.layers.99.mlp.fc1.bias",
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq",
    }
    between = {name.replace("vision_tower.", "vision_tower.vision_model.") for name in names}
    for spelling in (set(names), old, between):
        given = translate(LLAVA_HF, dict.fromkeys(spelling, torch.empty(0)), own)
        assert set(given.tensors) == own
        assert sum(map(len, given.ignored.values())) == (4 if spelling is old else 0)
        assert LLAVA_HF.recognises(spelling)
    assert not LLAVA_HF.recognises(own)


def test_a_file_without_its_head_is_refused(exported: Path) -> None:
    model, _, _ = build(section("clip_llama") | {"language_model": {**section("clip_llama")["language_model"]}})
    tensors = load_file(exported / "clip_llama" / "model.safetensors")
    cut = {n: t for n, t in tensors.items() if "lm_head" not in n}
    with pytest.raises(CheckpointError, match="lacks the output head"):
        load_foreign(model, WeightFile("x", Path("x"), cut), LLAVA_HF, "model.checkpoint")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vision_feature_layer": [-2, -5]}, "one layer is taken"),
        ({"projector_hidden_act": "relu", "multimodal_projector_bias": False}, "relu.*bias"),
        ({"vision_config": {"model_type": "vit"}}, "vit: clip_vision_model and siglip_vision_model"),
    ],
)
def test_other_llavas_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        describe_config({"model_type": "llava", **changes})


def test_published_llava_is_described() -> None:
    """What llava-hf's first config.json leaves out is that of LLaVA-1.5 7B."""
    found = describe_config(
        {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}, "torch_dtype": "float16"},
        {"size": {"shortest_edge": 336}, "do_center_crop": True, "resample": 3, "image_mean": None},
    )
    encoder, language = found["vision_encoder"], found["language_model"]
    assert (encoder["layer"], encoder["class_token"], encoder["config"]["image_size"]) == (-2, "drop", 336)
    assert language["config"]["vocab_size"] == 32064 and language["dtype"] == "fp16"
    assert found["processor"]["image"] == {"name": "image", "resize": "shortest_edge", "interpolation": "bicubic"}
    model, processor, _ = api.assemble(
        parse_model(found | {"language_model": {**language, "tokenizer": "asset:quickstart"}}, "test"), meta=True
    )
    assert processor.tokens_per_image == 576 and sum(p.numel() for p in model.vision_encoder.parameters()) > 2.9e8


def refusal(content: dict[str, Any], target: Path) -> str:
    model, processor, _ = build(content)
    with pytest.raises(CheckpointError) as caught:
        to_transformers.export_transformers(model, processor, target)
    assert list(target.parent.iterdir()) == []
    return str(caught.value)


def test_all_differences_are_named_at_once(tmp_path: Path) -> None:
    content = section("clip_llama")
    content["vision_encoder"] |= {"class_token": "only", "image_size": 48}
    content["connector"] = {"name": "mlp", "depth": 3}
    content["language_model"]["lora"] = {"r": 2, "target_modules": ["q_proj"]}
    content["processor"]["image"]["size"] = 32
    content["template"] = {"name": "vicuna_v1", "chat": {"image_number": "Image {number}:"}}
    message = refusal(content, tmp_path / "x")
    for part in (
        "image_number",
        "class_token: only",
        "image_size: 48",
        "Linear, GELU, Linear, GELU",
        "minivlm merge",
        "image.size: 32",
    ):
        assert part in message, message
    assert message.count("\n") == 6


PHI = {"model_type": "phi", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
PHI |= {"num_attention_heads": 2, "partial_rotary_factor": 0.5}
GEMMA = {"model_type": "gemma2", "num_key_value_heads": 1, "head_dim": 16}


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("vision_encoder", {"config": SIGLIP, "final_norm": True}, "final_norm"),
        ("vision_encoder", {"config": {"model_type": "dinov2"}}, "it is dinov2"),
        ("connector", {"name": "linear"}, "it is LinearConnector"),
        ("connector", {"merge": 2}, "merge 2"),
        ("connector", {"norm": True}, "LayerNorm, Linear"),
        ("connector", {"hidden_size": 48}, "hidden_size: 48"),
        ("language_model", {"config": PHI}, "head of PhiForCausalLM has a bias"),
        ("language_model", {"attention": "eager", "config": GEMMA}, "capped at 30"),
        (
            "language_model",
            {"attention": "eager", "config": GEMMA},
            "scale_visual: visual tokens are multiplied by 5.65",
        ),
        ("language_model", {"config": {"model_type": "granite", "logits_scaling": 4.0}}, "scaled by 0.25"),
    ],
)
def test_refusals(part: str, change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    content = section("clip_llama")
    own = content[part]
    content[part] = own | {k: {**own[k], **v} if isinstance(v, dict) else v for k, v in change.items()}
    if change.get("name") == "linear":
        content[part] = change
    assert reason in refusal(content, tmp_path / "x")


def test_a_head_whose_bias_is_zero_passes(tmp_path: Path) -> None:
    content = section("clip_llama")
    content["language_model"]["config"] = PHI
    model, processor, _ = build(content)
    torch.nn.init.zeros_(model.language_model.model.lm_head.bias)
    done = to_transformers.export_transformers(model, processor, tmp_path / "x")
    assert done.comparison and done.comparison.logits < 1e-5 and done.comparison.other_ids == []
    assert len(done.notes) == 1 and "backend='pil'" in done.notes[0]


def test_other_logits_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, _ = build(section("clip_llama"))
    honest = to_transformers._llava

    def wrong(*arguments: Any) -> Any:
        llava = honest(*arguments)
        llava.model.multi_modal_projector.linear_2.bias.data = torch.ones(32)
        return llava

    monkeypatch.setattr(to_transformers, "_llava", wrong)
    with pytest.raises(CheckpointError, match="other logits"):
        to_transformers.export_transformers(model, processor, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    to_transformers.export_transformers(model, processor, tmp_path / "x", check=False)
    assert (tmp_path / "x" / "config.json").is_file()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yaml = write_yaml(tmp_path / "model.yaml", {"model": section("clip_llama"), "run": {"output_dir": str(tmp_path)}})
    command = ["export", str(yaml), str(tmp_path / "x"), "--to", "transformers", "--dtype", "bf16"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "bfloat16" in shown and "logits differ by at most" in shown
    assert {t.dtype for t in load_file(tmp_path / "x" / "model.safetensors").values()} == {torch.bfloat16}
    with pytest.raises(SystemExit):
        main(command)
    assert "exists; name another target" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command[:2], str(tmp_path / "y"), "--to", "minigpt4", "--dtype", "bf16"])
    assert "leave out --cfg-path" in capsys.readouterr().err
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert main(["export", str(tmp_path / "x.safetensors"), str(tmp_path / "y"), "--to", "transformers"]) == 2
    assert "--cfg-path" in capsys.readouterr().err
    assert main(["export", str(tmp_path), str(tmp_path / "y"), "--to", "transformers", "--options", "a=b"]) == 2
    assert "is a folder" in capsys.readouterr().err
