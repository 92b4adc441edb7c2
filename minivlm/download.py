"""``minivlm download``: the base models of an experiment file as local folders, from the hub or a mirror folder.

A folder ``owner--name`` appears only when it is whole. What a broken-off download has got lies beside it under a
name of its own, and the next one goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivlm.io import TEMPORARY, atomic_folder, readable_size, write_json
from minivlm.schema import walk_parts

if TYPE_CHECKING:
    from minivlm.config import Experiment

RECORD = "minivlm_download.json"
"""In every folder that was fetched: ``id``, ``revision`` as asked for, ``commit``, and ``files`` with their sizes."""
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_TEXT_ENDINGS = (".json", ".txt", ".model", ".jinja")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin", "non_lora_trainables.bin", "mm_projector.bin")
_DESCRIBED_BY = ("config.json", "adapter_config.json", "mm_projector.bin", "open_clip_config.json")
_LFS = b"version https://git-lfs"


class DownloadError(ValueError):
    """A model that cannot be had: no network, no such revision, an incomplete mirror."""


@dataclass(frozen=True)
class Model:
    """A model of the hub in one revision; of a tokenizer alone no weights are wanted."""

    id: str
    revision: str | None = None
    weights: bool = True

    @property
    def folder(self) -> str:
        """Its name below the folder of all models."""
        return self.id.replace("/", "--")

    def __str__(self) -> str:
        return f"{self.id} at {self.revision}" if self.revision else self.id


@dataclass(frozen=True)
class Use:
    """A key of an experiment file that names a model, and the environment variable that it is read from."""

    key: str
    model: Model
    variable: str | None = None


def main(argv: Sequence[str]) -> int:
    """Fetch one model, or all of a file; raises ConfigError, CheckpointError or :class:`DownloadError`."""
    parser = argparse.ArgumentParser(
        prog="minivlm download",
        description="Fetch the base models that an experiment file names by their ids on the Hugging Face hub, in the "
        "revisions it names, and its weights that lie on a server; or one model by its id.",
    )
    parser.add_argument("id", nargs="?", help="a single model, e.g. microsoft/phi-2")
    parser.add_argument("--revision", help="commit, tag or branch of a single model")
    parser.add_argument("--cfg-path", help="experiment file")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="override keys of that file")
    parser.add_argument("--to", type=Path, default=Path("models"), metavar="FOLDER", help="default: models")
    parser.add_argument("--mirror", type=Path, metavar="FOLDER", help="copy from its owner/name, owner--name or name")
    arguments = parser.parse_args(argv)
    if (arguments.id is None) == (arguments.cfg_path is None):
        parser.error("give either the id of a model or --cfg-path")
    if arguments.id is None and arguments.revision:
        parser.error("--revision belongs to a single model; a file names its own")
    if arguments.id:
        if not _HUB_ID.fullmatch(arguments.id):
            raise DownloadError(f"'{arguments.id}' is not the id of a model on the hub (owner/name)")
        uses, urls = [Use("", Model(arguments.id, arguments.revision))], []
    else:
        from minivlm.config import load_config

        experiment = load_config(arguments.cfg_path, arguments.options)
        uses, urls = uses_of(experiment), urls_of(experiment)
    folders = {model: fetch(model, arguments.to, arguments.mirror) for model in distinct(uses)}
    _fetch_urls(urls)
    print(advice(uses, {model.id: folder for model, folder in folders.items()}))
    return 0


def uses_of(experiment: Experiment) -> list[Use]:
    """All keys of all stages that name a model on the hub; those for all stages alike once, as ``model.<part>``."""
    found: dict[str, dict[str, Use]] = {}
    for stage in experiment.stages:
        for part in ("vision_encoder", "connector", "language_model"):
            for place, node in walk_parts(f"model.{part}", getattr(stage.model, part)):
                for setting in ("path", "tokenizer"):
                    given = getattr(node.config, setting, None)
                    if isinstance(given, str) and is_hub_id(given):
                        key = f"{place}.{setting}"
                        model = Model(given, getattr(node.config, "revision", None), weights=setting == "path")
                        use = Use(key, model, experiment.variables.get((stage.name, key)))
                        found.setdefault(key, {})[stage.name] = use
    uses: list[Use] = []
    for key, by_stage in found.items():
        if len({use.model.id for use in by_stage.values()}) == 1:
            uses += dict.fromkeys(by_stage.values())
        else:
            uses += [Use(f"stages.{stage}.{key}", use.model, use.variable) for stage, use in by_stage.items()]
    return uses


def urls_of(experiment: Experiment) -> list[tuple[str, str]]:
    """Keys and URLs of the weights that lie on a server."""
    from minivlm.paths import is_url

    found: dict[str, str] = {}
    for stage in experiment.stages:
        given = {"model.checkpoint": stage.model.checkpoint}
        for part in ("vision_encoder", "connector", "language_model"):
            given[f"model.{part}.weights"] = getattr(getattr(stage.model, part), "weights", None)
        found |= {url: key for key, url in given.items() if url and is_url(url)}
    return [(key, url) for url, key in found.items()]


def is_hub_id(path: str) -> bool:
    """Whether a path means a model on the hub: ``owner/name``, and no folder of that name is there."""
    return bool(_HUB_ID.fullmatch(path)) and not Path(path).is_dir()


def distinct(uses: Iterable[Use]) -> list[Model]:
    """Every model once, with weights if one use wants them; raises for one that is wanted in two revisions."""
    models: dict[str, Model] = {}
    for use in uses:
        other = models.setdefault(use.model.id, use.model)
        if other.revision != use.model.revision:
            raise DownloadError(f"{other.id} is wanted in two revisions, {other.revision} and {use.model.revision}")
        models[other.id] = other if other.weights else use.model
    return list(models.values())


def fetch(model: Model, to: Path, mirror: Path | None = None) -> Path:
    """The folder of a model below ``to``, fetched or copied unless it is there; prints what was done.

    Raises :class:`DownloadError` if it cannot be had; the folder then is as it was before.
    """
    target = to.expanduser() / model.folder
    if target.exists() and _is_whole(model, target):
        print(f"{target}: {model} is there")
        return target
    try:
        if mirror is None:
            _from_hub(model, target)
        else:
            _from_mirror(model, target, mirror.expanduser())
    except OSError as error:
        raise DownloadError(f"{model}: {target} cannot be written: {error}") from error
    files = _record(target)["files"]
    origin = "the hub" if mirror is None else f"{mirror}"
    print(f"{target}: {model} from {origin}, {len(files)} files, {readable_size(sum(files.values()))}")
    return target


def _is_whole(model: Model, target: Path) -> bool:
    """Whether a folder holds the model; raises :class:`DownloadError` if it is another one's, which is kept."""
    record = _record(target)
    if record.get("id") != model.id:
        raise DownloadError(
            f"{target} exists and is none of minivlm download's; use it as it is, or name another folder with --to"
        )
    if model.revision not in (None, record["revision"], record["commit"]):
        has = record["revision"] or record["commit"] or "an unknown revision"
        raise DownloadError(f"{target} holds {has}, not {model.revision}; delete it, or name another folder with --to")
    files = record["files"]
    there = all((target / name).is_file() and (target / name).stat().st_size == size for name, size in files.items())
    return there and (not model.weights or any(_is_weights(name) for name in files))


def _record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    keys = {"id", "revision", "commit", "files"}
    return record if isinstance(record, dict) and keys <= set(record) and isinstance(record["files"], dict) else {}


def wanted_files(names: Iterable[str], weights: bool) -> list[str]:
    """What minivlm reads of a model: settings, tokenizer, and the weights in one format, safetensors if there are any.

    Nothing in sub-folders, no other formats, no code. Of LLaVA's adapters and projectors also the files beside.
    """
    from minivlm.models.hub import weight_names

    top = [name for name in names if Path(name).name == name and name != RECORD]
    chosen = weight_names(top) + [name for name in top if name in _ADAPTERS] if weights else []
    suffix = Path(chosen[0]).suffix if chosen else None
    texts = [name for name in top if name.endswith(_TEXT_ENDINGS)]
    indices = [name for name in texts if name.endswith(".index.json")]
    unused = {name for name in indices if not name.endswith(f"{suffix}.index.json")}
    return sorted({*texts, *chosen} - unused)


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".bin"))


def _check_names(model: Model, names: Sequence[str], where: str) -> None:
    """Refuse what minivlm could not load, before anything is fetched."""
    lacking = []
    if not any(name in _DESCRIBED_BY for name in names) and model.weights:
        lacking.append("config.json")
    if not any(_is_weights(name) for name in names) and model.weights:
        lacking.append("weights (*.safetensors or pytorch_model*.bin)")
    if lacking or not names:
        raise DownloadError(f"{model}: {where} has no {' and no '.join(lacking or ['file that minivlm reads'])}")


def _finish(model: Model, folder: Path, commit: str | None, names: Iterable[str]) -> None:
    """Write the record into a folder whose files are all there; raises :class:`DownloadError` if one is not."""
    files = {name: (folder / name).stat().st_size for name in names}
    for name in files:
        with (folder / name).open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise DownloadError(f"{model}: {name} is a pointer of Git LFS, not the file: run git lfs pull there")
    for index in (name for name in files if name.endswith(".index.json")):
        try:
            shards = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DownloadError(f"{model}: {index} is no list of shards") from error
        if lacking := sorted(set(shards) - set(files)):
            raise DownloadError(f"{model}: {index} names {len(lacking)} shards that are not there: {lacking[0]}, ...")
    write_json(folder / RECORD, {"id": model.id, "revision": model.revision, "commit": commit, "files": files})


def _from_mirror(model: Model, target: Path, mirror: Path) -> None:
    owner, name = model.id.split("/")
    places = [mirror / owner / name, mirror / model.folder, mirror / name]
    source = next((place for place in places if place.is_dir()), None)
    if source is None:
        raise DownloadError(f"{model}: there is no folder {', '.join(map(str, places[:-1]))} or {places[-1]}")
    known = _record(source)
    commit = known.get("commit")
    if known and model.revision not in (None, commit, known["revision"]):
        raise DownloadError(f"{model}: {source} holds {known['revision'] or commit}")
    names = wanted_files((file.name for file in source.iterdir() if file.is_file()), model.weights)
    _check_names(model, names, str(source))
    _check_space(model, target, sum((source / name).stat().st_size for name in names))
    with atomic_folder(target) as folder:
        for name in names:
            shutil.copyfile(source / name, folder / name)
        _finish(model, folder, commit, names)
    if model.revision and not known:
        print(f"note: {source} does not say which revision it holds; {model.revision} was asked for")


def _from_hub(model: Model, target: Path) -> None:
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().model_info(model.id, revision=model.revision, files_metadata=True)
    except Exception as error:  # also what the HTTP library raises, which differs from version to version
        raise DownloadError(f"{model}: {_explain(error)}") from error
    listed = {file.rfilename: file.size for file in info.siblings or ()}
    sizes = {name: listed[name] for name in wanted_files(listed, model.weights)}
    _check_names(model, list(sizes), "it")
    unfinished = target.parent / f"{TEMPORARY}{target.name}-{info.sha}"  # the same next time
    _check_space(model, target, sum(size or 0 for size in sizes.values()) - _size_of(unfinished))
    try:
        huggingface_hub.snapshot_download(model.id, revision=info.sha, local_dir=unfinished, allow_patterns=[*sizes])
    except Exception as error:
        raise DownloadError(f"{model}: {_explain(error)}; what has been fetched is kept for the next try") from error
    # Without a network it gives back whatever lies there.
    there = {name: _size_of(unfinished / name) for name in sizes if (unfinished / name).is_file()}
    lacking = [name for name, size in sizes.items() if name not in there or size not in (None, there[name])]
    if lacking:
        raise DownloadError(f"{model}: {', '.join(lacking)} could not be fetched whole; try again")
    with atomic_folder(target) as folder:
        for name in sizes:
            os.replace(unfinished / name, folder / name)
        _finish(model, folder, info.sha, sizes)
    shutil.rmtree(unfinished, ignore_errors=True)


def _explain(error: Exception) -> str:
    """Why the hub did not give a model, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "its owners ask for consent: give it on its page of the hub, then run hf auth login or set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub has the model, but not this revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such model, or it is private: then run hf auth login or set HF_TOKEN"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing is fetched; unset it, or copy from a folder with --mirror"
    first_line = str(error).strip().split("\n")[0]
    if isinstance(error, OSError) and error.errno is not None:  # the disk: full, not writable
        return first_line
    reason = first_line or type(error).__name__
    return f"the hub does not answer or refuses ({reason}); --mirror copies from a folder instead"


def _check_space(model: Model, target: Path, needed: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        sizes = f"{readable_size(needed)} are needed, {readable_size(free)} are free"
        raise DownloadError(f"{model}: {sizes} in {target.parent}; name another folder with --to")


def _size_of(path: Path) -> int:
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.exists() else 0


def _fetch_urls(urls: Iterable[tuple[str, str]]) -> None:
    from minivlm.checkpoints.files import fetch as fetch_url

    for key, url in urls:
        print(f"{fetch_url(key, url)}: {url} ({key}), which is found there by itself")


def advice(uses: Sequence[Use], folders: Mapping[str, Path]) -> str:
    """How an experiment file gets to use the folders."""
    if not uses:
        return "the file names no model on the hub"
    lines: list[str] = []
    options: list[str] = []
    for use in uses:
        folder = str(folders[use.model.id].resolve())
        if use.variable:
            lines.append(f"export {use.variable}={shlex.quote(folder)}")
        elif use.key:
            options.append(shlex.quote(f"{use.key}={folder}"))
        else:
            options.append(shlex.quote(f"model.<part>.path={folder}"))
    lines += [f"--options {' '.join(dict.fromkeys(options))}"] if options else []
    return "\n".join(["to use what was fetched:", *(f"  {line}" for line in dict.fromkeys(lines))])
