"""The hash by which a checkpoint knows its bases: of what tensors hold, in whatever files they lie."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_minigpt4 import GOLDEN, golden_minigpt4
from safetensors.torch import load_file, save_file
from torch import Tensor

import minivlm
from minivlm import api
from minivlm.checkpoints.native import MANIFEST, Manifest, read_manifest, save_model, trained_names
from minivlm.checkpoints.report import CheckpointError
from minivlm.config.loader import parse_model
from minivlm.models.hub import HASH, hash_tensors, source_of

LLAMA = GOLDEN / "llama"


def in_shards(folder: Path, tensors: dict[str, Tensor], save: Callable[..., Any], names: tuple[str, str]) -> None:
    """Two files and the index of transformers; the later half of the tensors comes first."""
    listed = list(tensors)
    half = len(listed) // 2
    places = {}
    for name, keys in zip(names, (listed[half:], listed[:half])):
        save({key: tensors[key].clone() for key in keys}, folder / name)
        places |= dict.fromkeys(keys, name)
    index = f"{names[0].partition('-')[0]}{Path(names[0]).suffix}.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.fixture
def copies(tmp_path: Path) -> dict[str, str]:
    """The golden language model in one file, in two, in torch's format with the tables of older versions, in fp32."""
    tensors = load_file(LLAMA / "model.safetensors")
    folders = {name: tmp_path / name for name in ("one", "shards", "torch", "fp32", "other")}
    for folder in folders.values():
        shutil.copytree(LLAMA, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copy(LLAMA / "model.safetensors", folders["one"])
    in_shards(folders["shards"], tensors, save_file, ("model-00001-of-2.safetensors", "model-00002-of-2.safetensors"))
    old = tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    in_shards(folders["torch"], old, torch.save, ("pytorch_model-1.bin", "pytorch_model-2.bin"))
    save_file({name: tensor.float() for name, tensor in tensors.items()}, folders["fp32"] / "model.safetensors")
    last = next(name for name in reversed(tensors) if tensors[name].dim() == 2)
    save_file(tensors | {last: tensors[last] + 0.5}, folders["other"] / "model.safetensors")
    return {name: str(folder) for name, folder in folders.items()}


def test_containers_shards_and_storage_do_not_count(copies: dict[str, str]) -> None:
    hashes = {name: source_of(folder, None)["sha256"] for name, folder in copies.items()}
    other = hashes.pop("other")
    assert len(set(hashes.values())) == 1 and other not in hashes.values()
    assert other.startswith(HASH)
    assert source_of("owner/name", "abc") == {"path": "owner/name", "revision": "abc"}


def test_names_shapes_and_values_count() -> None:
    """A fine-tuned model often shares its first tensors, names and sizes with its base."""
    base = torch.zeros(500, 4096)
    variants = [{"a": base}, {"b": base}, {"a": base.view(4096, 500)}, {"a": base, "b": torch.ones(())}]
    for row in (0, 250, 495):
        changed = base.clone()
        changed[row : row + 5] = 1
        variants.append({"a": changed})
    assert len({hash_tensors(tensors.items()) for tensors in variants}) == len(variants)
    one_column = base.clone()
    one_column[:, :20] = 1
    assert hash_tensors([("a", one_column)]) != hash_tensors([("a", base)])


@pytest.fixture
def trained(copies: dict[str, str], tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """A model folder that names the first copy as its base; ``trained(copy)`` is a section upon another one."""
    section = golden_minigpt4("llama2")
    section["language_model"] |= {"path": copies["one"], "dtype": None}
    model, processor, config = api.assemble(parse_model(section, "test"))
    save_model(tmp_path / "model", model, config, processor, Manifest(trained=trained_names(model)))
    section["checkpoint"] = str(tmp_path / "model")
    return lambda name: {**section, "language_model": {**section["language_model"], "path": copies[name]}}


def test_a_base_that_someone_else_has_merged_is_taken(trained: Any, tmp_path: Path) -> None:
    expected = minivlm.load(tmp_path / "model", device="cpu")[0].state_dict()
    for name in ("shards", "torch"):
        model, _, _ = api.assemble(parse_model(trained(name), "test"))
        assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"other weights of language_model than those in .*other: hash \w+ ag"):
        api.assemble(parse_model(trained("other"), "test"))


def test_hashes_of_the_bytes_of_files_are_not_compared(trained: Any, tmp_path: Path) -> None:
    """Manifests of older versions have them."""
    file = tmp_path / "model" / MANIFEST
    content = json.loads(file.read_text())
    for source in content["sources"].values():
        if source:
            source["sha256"] = "0" * 64
    file.write_text(json.dumps(content))
    assert read_manifest(tmp_path / "model").sources["language_model"]["sha256"] == "0" * 64  # type: ignore[index]
    api.assemble(parse_model(trained("shards"), "test"))
