"""``minivlm merge``: one folder that needs no other and says the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_minigpt4 import golden_minigpt4
from helpers import GOLDEN as MINIGPT4
from helpers import tiny_model
from safetensors.torch import load_file
from tuning_models import PHI, QKV, build, logits, section, stir

import minivlm
from minivlm.checkpoints import merge as merge_module
from minivlm.checkpoints.native import Manifest, read_config, read_manifest, save_model, trained_names
from minivlm.cli import main
from minivlm.models.lora import is_adapter
from minivlm.models.vlm import PARTS, VisionLanguageModel


def save(folder: Path, model: dict[str, Any]) -> VisionLanguageModel:
    built, processor, config = build(model)
    stir(built)
    save_model(folder, built, config, processor, Manifest(trained=trained_names(built)))
    return built


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A language model of transformers in a folder of its own."""
    plain, _, _ = build(section())
    plain.language_model.model.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def assert_self_contained(folder: Path) -> None:
    config, manifest = read_config(folder), read_manifest(folder)
    assert sorted(manifest.complete) == sorted(PARTS) and set(manifest.sources.values()) == {None}
    assert not any(map(is_adapter, load_file(folder / "model.safetensors")))
    for part in PARTS:
        assert config[part]["lora"] is config[part]["weights"] is config[part].get("path") is None
    assert config["language_model"]["tokenizer"] is config["checkpoint"] is None
    assert (folder / "tokenizer").is_dir()


LORAS: dict[str, dict[str, Any]] = {
    "every layer": {"r": 2},
    "shared A": {"r": 2, "shared_a": QKV},
    "two layers": {"r": 3, "alpha": 1, "target_modules": ["layers.1.*.q_proj", "fc1"]},
}


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS.keys())
def test_the_merged_folder_says_the_same(
    lora: dict[str, Any], base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = logits(save(tmp_path / "tuned", section(lora, path=base, config=None)))
    assert main(["merge", str(tmp_path / "tuned"), str(tmp_path / "whole")]) == 0
    said = capsys.readouterr().out
    assert "largest difference of the probe's logits, in fp32: " in said and "unchanged" in said
    assert " of language_model" in said
    shutil.rmtree(base)
    shutil.rmtree(tmp_path / "tuned")
    assert_self_contained(tmp_path / "whole")
    (tmp_path / "whole").rename(tmp_path / "moved")
    again, _ = minivlm.load(tmp_path / "moved", device="cpu")
    torch.testing.assert_close(logits(again), before, rtol=0, atol=1e-5)


def test_adapters_of_every_part_and_a_base_beside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = section({"r": 2})
    model["vision_encoder"]["lora"] = model["connector"]["lora"] = {"r": 2}
    before = save(tmp_path / "tuned", model)
    assert main(["merge", str(tmp_path / "tuned"), str(tmp_path / "whole")]) == 0
    said = capsys.readouterr().out
    assert "of vision_encoder" in said and "of connector" in said and "after the merge of its adapters" in said
    again, _ = minivlm.load(tmp_path / "whole", device="cpu")
    torch.testing.assert_close(logits(again), logits(before), rtol=0, atol=1e-5)
    assert_self_contained(tmp_path / "whole")


def test_lora_on_a_merged_folder_and_merged_again(tmp_path: Path) -> None:
    save(tmp_path / "tuned", section({"r": 2}))
    assert main(["merge", str(tmp_path / "tuned"), str(tmp_path / "whole")]) == 0
    model = section({"r": 3}) | {"checkpoint": str(tmp_path / "whole")}
    built, processor, config = build(model)
    stir(built)
    trained = trained_names(built, built.trained_before)
    save_model(tmp_path / "custom", built, config, processor, Manifest(trained=trained))
    names = [n for n in load_file(tmp_path / "custom" / "model.safetensors") if n.startswith("language_model.")]
    assert names and all(map(is_adapter, names))
    assert main(["merge", str(tmp_path / "custom"), str(tmp_path / "second")]) == 0
    shutil.rmtree(tmp_path / "whole")
    assert_self_contained(tmp_path / "second")
    again, _ = minivlm.load(tmp_path / "second", device="cpu")
    torch.testing.assert_close(logits(again), logits(built), rtol=0, atol=1e-5)


@pytest.mark.parametrize("from_folder", [False, True])
def test_a_head_tied_to_the_embeddings_is_untied(from_folder: bool, tmp_path: Path) -> None:
    tied = {**PHI, "tie_word_embeddings": True}
    model = section({"r": 2, "target_modules": ["lm_head", "fc1"]}, config=tied)
    if from_folder:
        build(section(config=tied))[0].language_model.model.save_pretrained(tmp_path / "base")
        model["language_model"] |= {"path": str(tmp_path / "base"), "config": None}
    before = save(tmp_path / "tuned", model)
    inner = before.language_model.model
    assert inner.lm_head.base_layer.weight is inner.model.embed_tokens.weight
    assert main(["merge", str(tmp_path / "tuned"), str(tmp_path / "whole")]) == 0
    assert read_config(tmp_path / "whole")["language_model"]["config"]["tie_word_embeddings"] is False
    again, _ = minivlm.load(tmp_path / "whole", device="cpu")
    torch.testing.assert_close(logits(again), logits(before), rtol=0, atol=1e-5)
    embeddings = again.language_model.model.get_input_embeddings().weight
    assert torch.equal(embeddings, inner.model.embed_tokens.weight), "they have no adapter"


def test_a_tie_without_adapters_stays(tmp_path: Path) -> None:
    tied = {**PHI, "tie_word_embeddings": True}
    before = save(tmp_path / "tuned", section({"r": 2, "target_modules": "all-linear"}, config=tied))
    assert main(["merge", str(tmp_path / "tuned"), str(tmp_path / "whole")]) == 0
    again, _ = minivlm.load(tmp_path / "whole", device="cpu")
    assert again.language_model.model.lm_head.weight is again.language_model.model.model.embed_tokens.weight
    torch.testing.assert_close(logits(again), logits(before), rtol=0, atol=1e-5)


def test_a_quantised_base_is_read_unquantised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = {**PHI, "hidden_size": 64, "intermediate_size": 128}
    build(section(config=wide))[0].language_model.model.save_pretrained(tmp_path / "base")
    node = {"path": str(tmp_path / "base"), "config": None}
    quantised = save(tmp_path / "tuned", section({"r": 2}, **node, quantization="nf4"))
    plain = build(section({"r": 2}, **node))[0]
    state = {name: t for name, t in quantised.state_dict().items() if is_adapter(name) or "connector" in name}
    plain.load_state_dict(state | quantised.vision_encoder.state_dict(prefix="vision_encoder."), strict=False)
    assert main(["merge", str(tmp_path / "tuned"), str(tmp_path / "whole")]) == 0
    assert "language_model.quantization: null" in capsys.readouterr().out
    assert read_config(tmp_path / "whole")["language_model"]["quantization"] is None
    again, _ = minivlm.load(tmp_path / "whole", device="cpu")
    torch.testing.assert_close(logits(again), logits(plain), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("given", "stored"), [("bf16", torch.bfloat16), (None, torch.float32)])
def test_the_type_of_the_result(given: str | None, stored: torch.dtype, tmp_path: Path) -> None:
    save(tmp_path / "tuned", section({"r": 2}))
    options = ["--dtype", given] if given else []
    assert main(["merge", str(tmp_path / "tuned"), str(tmp_path / "whole"), *options]) == 0
    assert {t.dtype for t in load_file(tmp_path / "whole" / "model.safetensors").values()} == {stored}
    again, _ = minivlm.load(tmp_path / "whole", device="cpu")
    assert again.language_model.dtype == stored


def test_a_base_in_half_precision_stays_so(tmp_path: Path) -> None:
    build(section(dtype="bf16"))[0].language_model.model.save_pretrained(tmp_path / "base")
    save(tmp_path / "tuned", section({"r": 2}, path=str(tmp_path / "base"), config=None))
    assert main(["merge", str(tmp_path / "tuned"), str(tmp_path / "whole")]) == 0
    state = load_file(tmp_path / "whole" / "model.safetensors")
    assert {t.dtype for name, t in state.items() if name.startswith("language_model.")} == {torch.bfloat16}
    assert minivlm.load(tmp_path / "whole", device="cpu")[0].language_model.dtype == torch.bfloat16


def test_without_adapters_it_collects_the_parts(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = save(tmp_path / "stage1", section(None, path=base, config=None))
    assert main(["merge", str(tmp_path / "stage1"), str(tmp_path / "whole")]) == 0
    assert "none, the model has no adapters" in capsys.readouterr().out
    shutil.rmtree(base)
    assert_self_contained(tmp_path / "whole")
    torch.testing.assert_close(logits(minivlm.load(tmp_path / "whole", device="cpu")[0]), logits(before))


def test_a_foreign_checkpoint_with_its_experiment_file(tmp_path: Path) -> None:
    import yaml

    model = golden_minigpt4("v2")
    model.pop("checkpoint", None)
    file = tmp_path / "x.yaml"
    file.write_text(yaml.safe_dump({"model": model, "run": {"evaluate": True}}))
    source = str(MINIGPT4 / "minigptv2_tiny.pth")
    assert main(["merge", source, str(tmp_path / "whole"), "--cfg-path", str(file)]) == 0
    assert_self_contained(tmp_path / "whole")
    merged, _ = minivlm.load(tmp_path / "whole", device="cpu")
    plain, _, _ = build({**model, "checkpoint": source})
    torch.testing.assert_close(logits(merged), logits(plain), rtol=1e-5, atol=1e-4)  # logits of some tens


def test_another_answer_is_an_error_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "tuned", section({"r": 2}))

    def wrong(part: str, module: Any) -> list[str]:
        for parameter in module.parameters():
            parameter.data.mul_(1.1)
        return []

    monkeypatch.setattr(merge_module, "merge_lora", wrong)
    assert main(["merge", str(tmp_path / "tuned"), str(tmp_path / "whole")]) == 2
    assert "the merged model differs from what it was made of" in capsys.readouterr().err
    assert not (tmp_path / "whole").exists()


def test_the_command_refuses_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(tmp_path / "nothing"), str(tmp_path / "whole")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    for arguments in ([str(tmp_path), str(tmp_path)], [str(tmp_path), "x", "--options", "model.arch=x"]):
        with pytest.raises(SystemExit):
            main(["merge", *arguments])
    assert "name another target" in (said := capsys.readouterr().err) and "name it with --cfg-path" in said


def test_a_complete_checkpoint_draws_no_random_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A language model whose weights are all in the folder is not initialised; the folder fills all of it."""
    before = save(tmp_path / "whole", tiny_model())
    from transformers import PreTrainedModel

    drawn: list[str] = []
    monkeypatch.setattr(PreTrainedModel, "_initialize_weights", lambda model, *_: drawn.append(type(model).__name__))
    again, _ = minivlm.load(tmp_path / "whole", device="cpu")
    torch.testing.assert_close(logits(again), logits(before), rtol=0, atol=0)
    assert json.loads((tmp_path / "whole" / "manifest.json").read_text())["complete"] == list(PARTS)
    assert drawn and not any("Llama" in name for name in drawn)
