"""Base models as local folders: from a hub, from a mirror, whole or not at all."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_hub import FakeHub, serve
from helpers import ROOT, tiny_model, write_yaml

from minivlm import download
from minivlm.cli import main
from minivlm.download import RECORD, DownloadError, Model, fetch, wanted_files

MODEL = {
    "config.json": b'{"model_type": "phi"}',
    "tokenizer.json": b"{}",
    "merges.txt": b"a b",
    "model.safetensors": b"weights " * 9,
}
CLUTTER = {
    "README.md": b"read me",
    "pytorch_model.bin": b"the same weights",
    "pytorch_model.bin.index.json": b"{}",
    "model.gguf": b"again",
    "flax_model.msgpack": b"again",
    "modeling_phi.py": b"import os",
    "onnx/config.json": b"{}",
}


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """A mirror folder with one model in each of the three layouts."""
    for place in ("owner/one", "owner--two", "three"):
        write(tmp_path / "mirror" / place, MODEL | CLUTTER)
    return tmp_path / "mirror"


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def content(folder: Path) -> dict[str, bytes]:
    """The files of a fetched folder, without our record."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != RECORD}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub on loopback that the client of huggingface_hub talks to."""
    from huggingface_hub import constants

    hub = FakeHub()
    hub.models["owner/one"] = {"main": MODEL | CLUTTER, "v1": {**MODEL, "model.safetensors": b"older"}}
    with serve(hub):
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        yield hub


# what is fetched


def test_only_what_is_read_is_wanted() -> None:
    assert wanted_files([*MODEL, *CLUTTER], weights=True) == sorted(MODEL)
    assert wanted_files([*MODEL, *CLUTTER], weights=False) == ["config.json", "merges.txt", "tokenizer.json"]
    torch_only = ["config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tf_model.h5"]
    assert wanted_files(torch_only, weights=True) == torch_only[:3]
    assert wanted_files(["../x.json", "a/b.json", "training_args.bin", "mm_projector.bin"], True) == [
        "mm_projector.bin"
    ]


@pytest.mark.parametrize("name", ["owner/one", "owner/two", "owner/three"])
def test_a_mirror_is_copied_from_in_any_layout(mirror: Path, tmp_path: Path, name: str) -> None:
    folder = fetch(Model(name), tmp_path / "models", mirror)
    assert folder == tmp_path / "models" / name.replace("/", "--")
    assert content(folder) == MODEL
    (folder / "config.json").touch()
    before = (folder / "config.json").stat().st_mtime_ns
    fetch(Model(name), tmp_path / "models", tmp_path / "nowhere")  # it is there, so nothing is asked of the mirror
    assert (folder / "config.json").stat().st_mtime_ns == before
    (folder / "merges.txt").write_bytes(b"a")
    fetch(Model(name), tmp_path / "models", mirror)
    assert content(folder) == MODEL


def test_a_hub_gives_the_revision_that_was_asked_for(hub: FakeHub, tmp_path: Path) -> None:
    newest = fetch(Model("owner/one"), tmp_path / "a")
    assert content(newest) == MODEL and sorted(hub.fetched) == sorted(MODEL)
    assert json.loads((newest / RECORD).read_text())["commit"] == hub.commit("owner/one", "main")
    hub.fetched.clear()
    older = fetch(Model("owner/one", hub.commit("owner/one", "v1")), tmp_path / "b")
    assert content(older)["model.safetensors"] == b"older"
    assert [path.name for path in (tmp_path / "b").iterdir()] == [older.name]
    hub.fetched.clear()
    assert fetch(Model("owner/one"), tmp_path / "a") == newest
    assert hub.fetched == []
    with pytest.raises(DownloadError, match=r"holds \w+, not v1; delete it, or .*--to"):
        fetch(Model("owner/one", "v1"), tmp_path / "a")


def test_what_broke_off_goes_on_and_is_never_taken_for_whole(hub: FakeHub, tmp_path: Path) -> None:
    hub.broken.add("model.safetensors")
    with pytest.raises(DownloadError, match=r"owner/one: .*kept for the next try"):
        fetch(Model("owner/one"), tmp_path)
    assert not (tmp_path / "owner--one").exists()
    hub.broken.clear()
    hub.fetched.clear()
    assert content(fetch(Model("owner/one"), tmp_path)) == MODEL
    assert "model.safetensors" in hub.fetched and "merges.txt" not in hub.fetched
    assert [path.name for path in tmp_path.glob("*own*")] == ["owner--one"]


def test_a_client_that_gives_back_half_of_it_is_not_believed(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def half(_: str, *, local_dir: Path, **__: Any) -> str:
        write(local_dir, {"config.json": MODEL["config.json"], "model.safetensors": b"wei"})
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", half)
    with pytest.raises(
        DownloadError, match=r"merges.txt, model.safetensors, tokenizer.json could not be fetched whole"
    ):
        fetch(Model("owner/one"), tmp_path)
    assert not (tmp_path / "owner--one").exists()


# what goes wrong


def test_the_hub_refuses_in_words(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with pytest.raises(DownloadError, match=r"^owner/one at v9: the hub has the model, but not this revision"):
        fetch(Model("owner/one", "v9"), tmp_path)
    with pytest.raises(DownloadError, match=r"^owner/none: the hub has no such model, or it is private.*HF_TOKEN"):
        fetch(Model("owner/none"), tmp_path)
    hub.gated.add("owner/one")
    with pytest.raises(DownloadError, match=r"^owner/one: its owners ask for consent.*hf auth login"):
        fetch(Model("owner/one"), tmp_path)
    hub.models["owner/empty"] = {"main": {"README.md": b"x", "model.gguf": b"x"}}
    with pytest.raises(DownloadError, match=r"^owner/empty: it has no config.json and no weights"):
        fetch(Model("owner/empty"), tmp_path)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"^owner/one: the hub does not answer .*--mirror"):
        fetch(Model("owner/one"), tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match=r"^owner/one: HF_HUB_OFFLINE is set.*--mirror"):
        fetch(Model("owner/one"), tmp_path)


def test_a_full_disk_is_seen_before_and_while_it_fills(
    mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.shutil, "copyfile", full)
    with pytest.raises(DownloadError, match=r"owner/one: .*owner--one cannot be written: .*No space left"):
        fetch(Model("owner/one"), tmp_path / "models", mirror)
    assert list((tmp_path / "models").iterdir()) == []
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=5))
    with pytest.raises(DownloadError, match=r"0.1 KiB are needed, 0.0 KiB are free in .*--to"):
        fetch(Model("owner/one"), tmp_path / "models", mirror)


BROKEN_MIRRORS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not there": (lambda f: f.rename(f.with_name("other")), r"no folder .*owner/one, .*owner--one or .*/one"),
    "a pointer": (
        lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
        "model.safetensors is a pointer of Git LFS",
    ),
    "no weights": (lambda f: [p.unlink() for p in [*f.glob("*.bin"), *f.glob("*.safetensors")]], "has no weights"),
    "a shard lacks": (
        lambda f: write(f, {"model.safetensors.index.json": b'{"weight_map": {"a": "model-2.safetensors"}}'}),
        "model.safetensors.index.json names 1 shards that are not there: model-2.safetensors",
    ),
    "no index": (lambda f: write(f, {"model.safetensors.index.json": b"[]"}), "is no list of shards"),
    "another revision": (
        lambda f: write(f, {RECORD: b'{"id": "owner/one", "revision": "v2", "commit": null, "files": {}}'}),
        "one holds v2",
    ),
}


@pytest.mark.parametrize("case", BROKEN_MIRRORS)
def test_an_incomplete_mirror_is_refused(mirror: Path, tmp_path: Path, case: str) -> None:
    spoil, words = BROKEN_MIRRORS[case]
    spoil(mirror / "owner" / "one")
    with pytest.raises(DownloadError, match=words):
        fetch(Model("owner/one", "v1"), tmp_path / "models", mirror)
    assert not (tmp_path / "models").exists() or list((tmp_path / "models").iterdir()) == []


def test_a_folder_of_the_user_is_left_alone(mirror: Path, tmp_path: Path) -> None:
    write(tmp_path / "models" / "owner--one", {"config.json": b"mine"})
    with pytest.raises(DownloadError, match=r"exists and is none of minivlm download's"):
        fetch(Model("owner/one"), tmp_path / "models", mirror)
    assert content(tmp_path / "models" / "owner--one") == {"config.json": b"mine"}


# the command


def experiment(tmp_path: Path, **sections: Any) -> str:
    model = tiny_model()
    model["vision_encoder"] = {"name": "hf", "path": "owner/one", "revision": "v1"}
    model["language_model"] = {"name": "hf", "path": "${oc.env:MINIVLM_TEST_LLM,owner/two}", "tokenizer": "owner/three"}
    return str(write_yaml(tmp_path / "x.yaml", {"model": model, "datasets": {"easy_vqa": {}}, **sections}))


def test_a_file_is_served_whole_and_says_how_to_use_it(
    mirror: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MINIVLM_TEST_LLM", raising=False)
    to = tmp_path / "models"
    path = experiment(tmp_path)
    assert main(["download", "--cfg-path", path, "--to", str(to), "--mirror", str(mirror)]) == 0
    said = capsys.readouterr().out
    assert f"export MINIVLM_TEST_LLM={to}/owner--two\n" in said
    options = f"model.vision_encoder.path={to}/owner--one model.language_model.tokenizer={to}/owner--three"
    assert f"--options {options}\n" in said
    assert content(to / "owner--two") == MODEL and "model.safetensors" not in content(to / "owner--three")
    monkeypatch.setenv("MINIVLM_TEST_LLM", str(to / "owner--two"))
    assert main(["download", "--cfg-path", path, "--to", str(to), "--options", *options.split()]) == 0
    assert capsys.readouterr().out.strip() == "the file names no model on the hub"


def test_stages_with_models_of_their_own(
    mirror: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MINIVLM_TEST_LLM", raising=False)
    other = {"language_model": {"path": "owner/one", "revision": "v1", "tokenizer": None}}
    path = experiment(tmp_path, stages=[{"name": "a"}, {"name": "b", "model": other}])
    to = tmp_path / "models"
    assert main(["download", "--cfg-path", path, "--to", str(to), "--mirror", str(mirror)]) == 0
    said = capsys.readouterr().out
    assert f"export MINIVLM_TEST_LLM={to}/owner--two\n" in said
    assert f"stages.b.model.language_model.path={to}/owner--one" in said
    other["language_model"]["revision"] = "v2"
    path = experiment(tmp_path, stages=[{"name": "a"}, {"name": "b", "model": other}])
    assert main(["download", "--cfg-path", path, "--to", str(to), "--mirror", str(mirror)]) == 2
    assert "owner/one is wanted in two revisions, v1 and v2" in capsys.readouterr().err


def test_weights_on_a_server_are_fetched_into_the_cache(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIVLM_CACHE", str(tmp_path / "cache"))
    url = f"{hub.url}/owner/one/resolve/main/model.safetensors"
    options = ["model.vision_encoder.path=null", "model.vision_encoder.config.model_type=clip_vision_model"]
    options += [f"model.language_model.path={tmp_path}", "model.language_model.tokenizer=null"]
    options += [f"model.connector.weights={url}"]
    assert main(["download", "--cfg-path", experiment(tmp_path), "--options", *options]) == 0
    said = capsys.readouterr().out
    assert f"{url} (model.connector.weights)" in said
    assert Path(said.split(": http")[0]).read_bytes() == MODEL["model.safetensors"]


def test_a_single_model(mirror: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = tmp_path / "models"
    assert main(["download", "owner/one", "--revision", "v1", "--to", str(to), "--mirror", str(mirror)]) == 0
    said = capsys.readouterr().out
    assert f"--options 'model.<part>.path={to}/owner--one'" in said and "v1 was asked for" in said
    assert main(["download", "../one", "--to", str(to)]) == 2
    assert "'../one' is not the id of a model" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["download"])


def test_commands_of_the_data_page(
    hub: FakeHub, mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "data.md").read_text()
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^minivlm download .*", page, re.MULTILINE)]
    assert len(commands) == 3
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MINIVLM_TEST_LLM", raising=False)
    Path(experiment(tmp_path)).rename("experiment.yaml")
    hub.models["owner/two"] = hub.models["owner/three"] = {"v1": MODEL, "main": MODEL}
    hub.models["microsoft/phi-2"] = {commands[2][commands[2].index("--revision") + 1]: MODEL}
    for words in commands:
        assert main([str(mirror) if word == "/mnt/hub" else word for word in words[1:]]) == 0
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"owner--one", "owner--two", "owner--three"}
    assert content(tmp_path / "bases" / "microsoft--phi-2") == MODEL
