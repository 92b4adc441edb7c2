"""Files and folders of MiniMind-V: read in all their spellings, refused with the reason, written back to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_minimind import (
    MODELS,
    Compared,
    compared,
    golden_model,
    is_first,
    make_batch,
    original_state,
    section,
    settings,
    vision_folder,
    weights,
)
from helpers import write_yaml
from minimind_parts import CLIP, SIGLIP
from safetensors.torch import load_file, save_file
from torch import Tensor

from minivlm import api
from minivlm.api import assemble
from minivlm.checkpoints.inspection import inspect_path
from minivlm.checkpoints.minimind import V1, V1_MOE, V3
from minivlm.checkpoints.report import CheckpointError
from minivlm.checkpoints.to_minimind import write_minimind
from minivlm.config.loader import parse_model
from minivlm.convert import main as convert
from minivlm.export import main as export
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.tokenizer import load_tokenizer
from minivlm.types import IGNORE_INDEX

__all__ = ["compared"]
each_model = pytest.mark.parametrize("name", MODELS)
FIRST_DENSE = next(name for name in MODELS if is_first(name) and not settings(name)["use_moe"])
NEWEST_DENSE = next(name for name in MODELS if not is_first(name) and not settings(name)["use_moe"])


def load(name: str, checkpoint: str | Path | None, **changes: Any) -> VisionLanguageModel:
    given = section(name)
    for part, own in changes.items():
        given[part] = {**given.get(part, {}), **own}
    config = parse_model(given, "test")
    config.checkpoint = None if checkpoint is None else str(checkpoint)
    return assemble(config)[0].eval()


def same(ours: dict[str, Tensor], golden: dict[str, Tensor]) -> None:
    """The same names, types and values."""
    assert sorted(ours) == sorted(golden)
    for name, tensor in golden.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name


def language_state(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in original_state(name).items() if not key.startswith("vision_proj")}


def same_logits(name: str, model: VisionLanguageModel) -> None:
    """As the golden model, which the golden tests compare with the original."""
    ids = torch.arange(40, 60)[None]
    batch = make_batch(name, ids, torch.full_like(ids, IGNORE_INDEX))
    with torch.no_grad():
        ours, golden = (m(batch, return_logits=True).logits for m in (model, golden_model(name)[0]))
    torch.testing.assert_close(ours, golden)


def export_file(name: str, folder: Path, target: str, *more: str) -> Path:
    """``minivlm export`` of the golden model's ``.pth``."""
    given = section(name)
    given["checkpoint"] = str(weights(name))
    file = folder / "model.yaml"
    write_yaml(file, {"model": given})
    assert export([str(file), str(folder / target), *more]) == 0
    return folder / target


@pytest.mark.parametrize(
    ("model_type", "parameters", "tensors"),
    [
        ("v1_small", 27_272_192, 77),
        ("v1", 109_340_160, 149),
        ("v1_small_moe", 96_494_592, None),
        ("v1_moe", 411_379_200, None),
        ("v3", 65_094_912, 97),
        ("v3_moe", 199_599_360, 177),
    ],
)
def test_sizes_of_the_packaged_models(model_type: str, parameters: int, tensors: int | None, tmp_path: Path) -> None:
    """Parameters and tensors of the published files, in which there is no encoder."""
    (tmp_path / "config.json").write_text(json.dumps(CLIP if "v1" in model_type else SIGLIP))
    given = {"vision_encoder": {"path": str(tmp_path)}, "language_model": {"tokenizer": "asset:quickstart"}}
    model, _, _ = assemble(parse_model({"arch": "minimind_v", "model_type": model_type, **given}, "test"), meta=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == parameters
    assert model.connector.tokens_per_image == (50 if "v1" in model_type else 64)
    form = {"v1_small": V1, "v1": V1}.get(model_type, V1_MOE if "v1" in model_type else V3)
    names, lost = form.back({n: t for n, t in model.state_dict().items() if not n.startswith("vision")}, 32)
    assert all(name.endswith("e_score_correction_bias") for name in lost)
    assert tensors in (None, len(names))


# --- reading --------------------------------------------------------------------------------------------------------


@each_model
def test_spellings_of_a_file(name: str, tmp_path: Path) -> None:
    """Names of torch.compile, buffers, a file misnamed as the original's table has it, nested, safetensors."""
    state = original_state(name)
    compiled = {f"_orig_mod.{key}": tensor for key, tensor in state.items()}
    masked = {**state, "layers.0.attention.mask": torch.zeros(1, 1, 4, 4)}
    torch.save(compiled, tmp_path / "512_vllm_sft.pth")
    torch.save({"model": masked, "epoch": 2}, tmp_path / "nested.pth")
    save_file({key: tensor.clone() for key, tensor in state.items()}, tmp_path / "plain.safetensors")
    for file in tmp_path.iterdir():
        model = load(name, file)
        same_logits(name, model)
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        assert not model.load_reports[-1].still_random


@each_model
def test_the_language_model_alone(name: str, tmp_path: Path) -> None:
    """As the start of a stage: the projection is new."""
    file = tmp_path / "512_llm.pth"
    torch.save(language_state(name), file)
    torch.manual_seed(0)
    model = load(name, None, language_model={"weights": str(file)})
    same_logits(name, model)
    with pytest.raises(
        CheckpointError, match=r"holds a language model of MiniMind.*give it as model\.language_model\."
    ):
        load(name, file)
    whole = load(name, None, language_model={"weights": str(weights(name))}, connector={"weights": str(weights(name))})
    assert torch.equal(next(whole.connector.parameters()), next(golden_model(name)[0].connector.parameters()))


def test_a_file_of_another_size_or_version() -> None:
    """One message that names the setting."""
    config = {"hidden_size": 2 * settings(FIRST_DENSE)["dim"]}
    with pytest.raises(CheckpointError, match=r"does not fit: width of the language model: 64 .*config\.hidden_size"):
        load(
            FIRST_DENSE,
            weights(FIRST_DENSE),
            language_model={"config": section(FIRST_DENSE)["language_model"]["config"] | config},
        )
    layers = {"num_hidden_layers": 5}
    with pytest.raises(CheckpointError, match=r"layers of the language model: \d+ in the file, 5 in the model"):
        load(
            FIRST_DENSE,
            weights(FIRST_DENSE),
            language_model={"config": section(FIRST_DENSE)["language_model"]["config"] | layers},
        )
    with pytest.raises(
        CheckpointError, match=r"language model is of the type llama .*model_type v1 or v1_small.* qwen3 "
    ):
        load(NEWEST_DENSE, weights(FIRST_DENSE))


def test_a_language_model_without_norms_in_its_attention(tmp_path: Path) -> None:
    """MiniMind2 of 2025: a Llama in the names of transformers, which the newest version has, too."""
    state = {key: t for key, t in language_state(NEWEST_DENSE).items() if "q_norm" not in key and "k_norm" not in key}
    torch.save(state, tmp_path / "llm_512.pth")
    assert dict(inspect_path(str(tmp_path / "llm_512.pth")))["good for"] == "model.language_model.weights"
    config = section(NEWEST_DENSE)["language_model"]["config"] | {"model_type": "llama"}
    given = {"weights": str(tmp_path / "llm_512.pth")}
    model = load(NEWEST_DENSE, None, language_model={"config": config, **given})
    ours = model.language_model.state_dict()["model.model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(ours, state["model.layers.0.self_attn.q_proj.weight"].float())
    with pytest.raises(CheckpointError, match=r"of the type llama \(as MiniMind2 of 2025.*that of this model is qwen3"):
        load(NEWEST_DENSE, None, language_model=given)


def test_the_tokenizer_of_a_folder_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands in front of the preset's, which the template comes from."""
    monkeypatch.setenv("MINIVLM_MINIMIND_V1_TOKENIZER", "no/where")
    folder = export_file(FIRST_DENSE, tmp_path, "llava", "--to", "transformers", "--no-check")
    given = section(FIRST_DENSE)
    del given["language_model"]["tokenizer"]
    write_yaml(tmp_path / "again.yaml", {"model": given | {"checkpoint": str(folder)}})
    model, processor = api.load(tmp_path / "again.yaml", device="cpu")
    same_logits(FIRST_DENSE, model)
    assert processor.tokenizer.get_vocab()["<image>"] == len(load_tokenizer("asset:quickstart"))
    assert processor.template.config.assistant_prefix == "<s>assistant"


def test_a_file_that_lacks_something(tmp_path: Path) -> None:
    for name, lost in ((FIRST_DENSE, "layers.1.ffn_norm.weight"), (NEWEST_DENSE, "vision_proj.mlp.3.bias")):
        state = original_state(name)
        del state[lost]
        torch.save(state, tmp_path / "cut.pth")
        with pytest.raises(CheckpointError, match=r"missing +1 "):
            load(name, tmp_path / "cut.pth")
    state = original_state(FIRST_DENSE)
    torch.save({**state, "output.weight": state["output.weight"] + 1}, tmp_path / "two.pth")
    with pytest.raises(CheckpointError, match="differ there, but are one tensor"):
        load(FIRST_DENSE, tmp_path / "two.pth")


def test_inspect(tmp_path: Path) -> None:
    for name in MODELS:
        rows = dict(inspect_path(str(weights(name))))
        assert rows["holds"].startswith("MiniMind-V, ") and rows["good for"] == "model.checkpoint"
        width = settings(name).get("dim") or settings(name)["hidden_size"]
        assert rows["width of the language model"] == f"{width} (model.language_model.config.hidden_size)"
    torch.save(language_state(FIRST_DENSE), tmp_path / "llm.pth")
    assert dict(inspect_path(str(tmp_path / "llm.pth")))["good for"] == "model.language_model.weights"


def original_folder(name: str, target: Path, language_only: bool = False) -> Path:
    """What the original's export writes: its own configuration, code of its own, ``pytorch_model.bin``."""
    target.mkdir()
    config = settings(name)
    if language_only:
        config = {key: value for key, value in config.items() if "image" not in key}
    config["model_type"] = "minimind" if is_first(name) or language_only else "minimind-v"
    config["auto_map"] = {"AutoModelForCausalLM": "model_vlm.MiniMindVLM"}
    (target / "config.json").write_text(json.dumps(config))
    (target / "model_vlm.py").write_text("raise SystemExit('this code must not run')")
    torch.save(language_state(name) if language_only else original_state(name), target / "pytorch_model.bin")
    api.load_tokenizer("asset:quickstart").save_pretrained(target)
    return target


@each_model
def test_a_folder_of_the_original(name: str, tmp_path: Path) -> None:
    """It says its sizes by itself; only the vision encoder is elsewhere."""
    folder = original_folder(name, tmp_path / "minimind")
    given = {
        "checkpoint": str(folder),
        "vision_encoder": {"name": "hf", "path": str(vision_folder(name.split("/")[0]))},
    }
    model, _, config = assemble(parse_model(given, "test"))
    same_logits(name, model.eval())
    assert config.template and config.template.name == ("minimind_v1" if is_first(name) else "minimind_v3")
    connector = golden_model(name)[0].connector.state_dict()
    assert all(torch.equal(tensor, connector[key]) for key, tensor in model.connector.state_dict().items())
    rows = dict(inspect_path(str(folder)))
    assert rows["holds"].startswith("MiniMind-V, ") and rows["good for"] == "model.checkpoint"


@each_model
def test_a_folder_of_the_language_model(name: str, tmp_path: Path) -> None:
    folder = original_folder(name, tmp_path / "minimind", language_only=True)
    given = section(name)
    given["language_model"] = {"name": "hf", "path": str(folder), "config": None, "tokenizer": None}
    same_logits(name, assemble(parse_model(given, "test"))[0].eval())


def test_a_folder_whose_experts_transformers_does_not_have(tmp_path: Path) -> None:
    name = next(name for name in MODELS if is_first(name) and settings(name)["use_moe"])
    folder = original_folder(name, tmp_path / "minimind")
    config = json.loads((folder / "config.json").read_text())
    for change, text in (({"norm_topk_prob": False}, "norm_topk_prob False"), ({"dim": "wide"}, "does not describe")):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=text):
            assemble(parse_model({"checkpoint": str(folder)}, "test"))


# --- writing --------------------------------------------------------------------------------------------------------


@each_model
def test_golden_minimind_v_written_back(compared: Compared, name: str, tmp_path: Path) -> None:
    """``.pth`` to the model folder of minivlm to ``.pth``, to the bit; the whole and the language model alone."""
    write_yaml(tmp_path / "sizes.yaml", {"model": section(name)})
    folder, file = str(tmp_path / "folder"), tmp_path / "again.pth"
    assert convert([str(weights(name)), folder, "--cfg-path", str(tmp_path / "sizes.yaml")]) == 0
    assert export([folder, str(file), "--to", "minimind", "--dtype", "fp16"]) == 0
    same(torch.load(file, weights_only=True), original_state(name))
    file = export_file(name, tmp_path, "llm.pth", "--to", "minimind_llm")
    written = torch.load(file, weights_only=True)
    same({key: tensor.half() for key, tensor in written.items()}, language_state(name))
    compared.equal(all(tensor.dtype == torch.float32 for tensor in written.values()), True)


@each_model
def test_golden_minimind_v_through_transformers(compared: Compared, name: str, tmp_path: Path) -> None:
    """``.pth`` to a folder of a class of transformers to ``.pth``, to the bit."""
    folder = export_file(name, tmp_path, "folder", "--to", "transformers_llm")
    kind = json.loads((folder / "config.json").read_text())
    assert "auto_map" not in kind and kind["architectures"][0].endswith("ForCausalLM")
    given = section(name)
    given["language_model"] = {"name": "hf", "path": str(folder), "config": None, "tokenizer": None}
    given["connector"] = {"weights": str(weights(name))}
    write_yaml(tmp_path / "again.yaml", {"model": given})
    assert export([str(tmp_path / "again.yaml"), str(tmp_path / "b.pth"), "--to", "minimind", "--dtype", "fp16"]) == 0
    again = torch.load(tmp_path / "b.pth", weights_only=True)
    same(again, original_state(name))
    compared.equal(len(again), len(original_state(name)))
    model = load(name, None, language_model={"weights": str(folder)})  # beside an encoder of a stage to come
    same_logits(name, model)


def test_the_first_version_as_llava_of_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole, with its encoder and the class token; the newest is refused, since LLaVA norms nothing."""
    folder = export_file(FIRST_DENSE, tmp_path, "llava", "--to", "transformers")
    config = json.loads((folder / "config.json").read_text())
    assert config["projector_hidden_act"] == "linear" and config["vision_feature_select_strategy"] == "full"
    assert "logits differ by at most" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"final_norm: true.*\n.*its layers are LayerNorm"):
        export_file(NEWEST_DENSE, tmp_path, "second", "--to", "transformers")


@pytest.mark.parametrize("name", [name for name in MODELS if is_first(name)])
def test_golden_minimind_v_through_llava_of_transformers(compared: Compared, name: str, tmp_path: Path) -> None:
    """The whole model, projection and experts, there and back to the bit."""
    folder = export_file(name, tmp_path, "llava", "--to", "transformers", "--no-check")
    assert dict(inspect_path(str(folder)))["connector"].strip() == "linear"
    for form, wanted in (("minimind", original_state(name)), ("minimind_llm", language_state(name))):
        file = tmp_path / f"{form}.pth"
        assert export([str(folder), str(file), "--to", form, "--dtype", "fp16"]) == 0
        same(torch.load(file, weights_only=True), wanted)
        compared.equal(len(wanted) > 0, True)


def test_the_row_of_the_placeholder_does_not_come_back(tmp_path: Path) -> None:
    """Where the tokenizer has an entry for every embedding, LLaVA's `<image>` gets one more; MiniMind-V has none."""
    given = section(FIRST_DENSE)
    rows = len(load_tokenizer("asset:quickstart"))
    given["language_model"]["config"] |= {"vocab_size": rows}
    file, _ = write_minimind(tmp_path / "first.pth", assemble(parse_model(given, "test"))[0])
    write_yaml(tmp_path / "model.yaml", {"model": given | {"checkpoint": str(file)}})
    assert export([str(tmp_path / "model.yaml"), str(tmp_path / "llava"), "--to", "transformers", "--no-check"]) == 0
    table = load_file(tmp_path / "llava" / "model.safetensors")["language_model.model.embed_tokens.weight"]
    assert len(table) == rows + 1
    assert export([str(tmp_path / "llava"), str(tmp_path / "again.pth"), "--to", "minimind"]) == 0
    first, again = (torch.load(each, weights_only=True) for each in (file, tmp_path / "again.pth"))
    same(again, first)


def test_a_projector_of_two_linear_layers_is_one(tmp_path: Path) -> None:
    """Also where the second is not the identity: there is nothing between them."""
    folder = export_file(FIRST_DENSE, tmp_path, "llava", "--to", "transformers", "--no-check")
    tensors, (first, second) = (
        load_file(folder / "model.safetensors"),
        (f"multi_modal_projector.linear_{k}." for k in (1, 2)),
    )
    gen = torch.Generator().manual_seed(0)
    for kind in ("weight", "bias"):
        tensors[second + kind] = torch.randn(tensors[second + kind].shape, generator=gen)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model, _, _ = assemble(parse_model({"checkpoint": str(folder)}, "test"))
    features = torch.randn(1, 50, tensors[first + "weight"].shape[1], generator=gen)
    layer = torch.nn.functional.linear
    inside = layer(features, tensors[first + "weight"], tensors[first + "bias"])
    wanted = layer(inside, tensors[second + "weight"], tensors[second + "bias"])
    torch.testing.assert_close(model.connector(features), wanted)


@each_model
def test_file_names(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a name of its own a file has the original's for its width, experts and stage."""
    width = settings(name).get("dim") or settings(name)["hidden_size"]
    moe = "_moe" if settings(name)["use_moe"] else ""
    file = tmp_path / "minimind_v_sft.yaml"
    write_yaml(file, {"model": {**section(name), "checkpoint": str(weights(name))}})
    for form in ("minimind", "minimind_llm"):
        assert export([str(file), str(tmp_path / form), "--to", form]) == 0
    found = sorted(each.name for each in tmp_path.glob("*/*.pth"))
    v1, v3 = (
        [f"{width}{moe}_llm.pth", f"{width}{moe}_vlm_sft.pth"],
        [f"llm_{width}{moe}.pth", f"sft_vlm_{width}{moe}.pth"],
    )
    assert found == (v1 if is_first(name) else v3)
    for form in ("minimind", "minimind_llm"):  # stages and the language model share a folder
        assert form == "minimind" or export([str(file), str(tmp_path / "minimind"), "--to", form]) == 0
        with pytest.raises(CheckpointError, match=r"\.pth exists; name another file"):
            export([str(file), str(tmp_path / "minimind"), "--to", form])
    other = tmp_path / "model.yaml"
    shutil.copy(file, other)
    with pytest.raises(CheckpointError, match="nothing tells whether this is a model of the stage pretrain or sft"):
        export([str(other), str(tmp_path / "nowhere"), "--to", "minimind"])
    assert not (tmp_path / "nowhere").exists()


def test_what_minimind_does_not_have(tmp_path: Path) -> None:
    """Each with the setting that stands in the way."""
    usual = section(FIRST_DENSE)["language_model"]["config"]
    for change, text in (
        ({"config": {**usual, "rope_theta": 5e4}}, "rope_theta is 50000.0, the code of MiniMind-V has 10000.0"),
        ({"config": {**usual, "tie_word_embeddings": False}}, "its head is not tied"),
        ({"config": {**usual, "attention_bias": True}}, "has no place for .*bias"),
        ({"config": {**usual, "model_type": "mistral"}}, "it is mistral; MiniMind-V has llama"),
        ({"config": usual, "lora": {"r": 2, "target_modules": ["q_proj"]}}, "minivlm merge"),
    ):
        given = section(FIRST_DENSE)
        given["language_model"] |= change
        write_yaml(tmp_path / "sft.yaml", {"model": given})
        with pytest.raises(CheckpointError, match=text):
            export([str(tmp_path / "sft.yaml"), str(tmp_path / "out.pth"), "--to", "minimind"])
    given = section(FIRST_DENSE) | {"connector": {"name": "mlp", "depth": 1}}
    write_yaml(tmp_path / "sft.yaml", {"model": given})
    with pytest.raises(CheckpointError, match=r"model\.connector: it is MLPConnector, MiniMind-V has linear"):
        export([str(tmp_path / "sft.yaml"), str(tmp_path / "out.pth"), "--to", "minimind"])
    assert not (tmp_path / "out.pth").exists()
