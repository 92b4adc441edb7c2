"""The side of LAVIS: a script that the interpreter of its environment runs.

It imports nothing of minivlm, only the standard library before the first request, and then LAVIS. When it starts
it sends its versions; then every request gets one answer, until stdin ends. A message is ``MAGIC``, the length of
a JSON header (8 bytes, big-endian), the header, and the bytes of the arrays that ``header["arrays"]`` lists as
``[name, dtype, shape]``. What LAVIS prints goes to stderr.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import pickle
import platform
import random
import runpy
import signal
import sys
import traceback
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

MAGIC = b"MVL\x01"
DTYPES = ("uint8", "int64", "float32")
PACKAGES = ("salesforce-lavis", "transformers", "timm", "fairscale", "torch", "torchvision", "numpy")
MAX_HEADER = 1 << 30
FILES = ("pretrained", "finetuned")
"""Where a model's configuration names its weights."""

Header = dict[str, Any]
Arrays = dict[str, Any]
Answer = tuple[Header, Arrays]


class WireError(ValueError):
    """Bytes that are no message, or a stream that ends within one."""


class Refused(ValueError):
    """A request that cannot be granted; the message says all, no traceback is needed."""


def write_message(stream: IO[bytes], header: Header, arrays: Arrays | None = None) -> None:
    """Send a header (plain data) and numpy arrays by name."""
    listed = [[name, str(array.dtype), list(array.shape)] for name, array in (arrays or {}).items()]
    text = json.dumps({**header, "arrays": listed}).encode()
    stream.write(MAGIC + len(text).to_bytes(8, "big") + text)
    for array in (arrays or {}).values():
        stream.write(array.tobytes())
    stream.flush()


def read_message(stream: IO[bytes]) -> Answer:
    """The next header and its arrays; raises EOFError at the end and :class:`WireError` for anything else."""
    start = stream.read(12)
    if not start:
        raise EOFError
    size = int.from_bytes(start[4:], "big")
    if start[:4] != MAGIC or len(start) < 12 or size > MAX_HEADER:
        raise WireError(f"expected a message, got {start!r}")
    header = json.loads(_exactly(stream, size))
    arrays = {}
    for name, dtype, shape in header.pop("arrays"):
        import numpy as np

        if dtype not in DTYPES:
            raise WireError(f"unknown array type {dtype!r}")
        raw = _exactly(stream, math.prod(shape) * np.dtype(dtype).itemsize)
        arrays[name] = np.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)  # a bytearray can be written to
    return header, arrays


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise WireError(f"the stream ended after {len(data)} of {size} bytes")
    return data


# -- LAVIS -----------------------------------------------------------------------------------------------------

_models: dict[str, Any] = {}
_processors: dict[str, Any] = {}
_datasets: dict[str, Any] = {}


@functools.cache
def lavis_registry() -> Any:
    """LAVIS's registry; imports LAVIS on the first call and runs the user's file."""
    _load_file(Path(__file__).resolve().parents[1] / "torchvision_guard.py").install()
    _load_tensors_only()
    from lavis.common.registry import registry  # with all of LAVIS, whose parts register themselves

    for file in sys.argv[1:]:
        runpy.run_path(file)
    return registry


def _load_tensors_only() -> None:
    """Let ``torch.load`` run no code from files, whoever calls it and whatever the caller asks for."""
    import torch

    load = torch.load
    if getattr(load, "tensors_only", False):
        return

    @functools.wraps(load)
    def load_tensors(*arguments: Any, **options: Any) -> Any:
        return load(*arguments, **{**options, "weights_only": True})

    load_tensors.tensors_only = True  # type: ignore[attr-defined]
    torch.load = load_tensors


def _load_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _registered(kind: str, name: str) -> Any:
    """The class that LAVIS registered under a name; raises :class:`Refused` with the nearest names."""
    registry = lavis_registry()
    known = registry.mapping[f"{kind}_name_mapping"]
    if name not in known:
        near = difflib.get_close_matches(name, list(known), n=3) or sorted(known)
        raise Refused(f"LAVIS has no {kind} '{name}' (it has, for instance: {', '.join(near[:12])})")
    return known[name]


def _once(cache: dict[str, Any], make: Any, spec: dict[str, Any]) -> Any:
    """What ``make`` builds from ``spec``, built once."""
    key = json.dumps(spec, sort_keys=True)
    if key not in cache:
        cache[key] = make(**spec)
    return cache[key]


class Model:
    """A LAVIS model with its own configuration, and what the other side must know of it."""

    def __init__(
        self,
        name: str,
        type: str,
        options: dict[str, Any],
        checkpoint: str | None,
        image_size: int | None,
        device: str,
        output: str,
    ):
        import torch
        from omegaconf import OmegaConf

        cls = _registered("model", name)
        types = list(cls.PRETRAINED_MODEL_CONFIG_DICT)
        if type not in types:
            raise Refused(f"LAVIS's model '{name}' has no type '{type}'; it has: {', '.join(map(str, types))}")
        whole = OmegaConf.load(cls.default_config_path(type))
        sizes = {} if image_size is None else {"image_size": image_size}
        files = {} if checkpoint is None else dict.fromkeys(FILES, checkpoint)
        config = OmegaConf.merge(whole.model, options, sizes, files)
        shapes = None if checkpoint is None else _read_shapes(checkpoint)
        torch.manual_seed(0)  # weights that no file fills are the same in every process
        model = cls.from_config(config)
        if shapes is not None:
            _check_fit(model, shapes, str(checkpoint))
        if device == "auto":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            model = model.float()  # as LAVIS does: half precision is for GPUs
        self.model, self.device, self.output = model.to(device).eval(), device, output
        node = whole.preprocess.vis_processor.eval
        picture = _registered("processor", node.name).from_config(OmegaConf.merge(node, sizes))
        image = picture_settings(node.name, picture)
        shape = self.features(torch.zeros(1, 3, image["size"], image["size"])).shape
        self.info = {
            "image": image,
            "num_tokens": shape[1],
            "hidden_size": shape[2],
            "parameters": sum(p.numel() for p in model.parameters()),
            "fingerprint": self.fingerprint([name, type, output, _without_files(OmegaConf.to_container(config))]),
        }

    def fingerprint(self, spec: Any) -> str:
        """Hash of all that decides about the features: LAVIS, its settings, own code, and every weight."""
        import torch

        settings = [importlib.metadata.version("salesforce-lavis"), spec]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for file in sys.argv[1:]:
            digest.update(Path(file).read_bytes())
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def features(self, pixels: Any) -> Any:
        """[N, 3, H, W] -> float32 [N, tokens, channels]."""
        import torch

        with torch.inference_mode():
            found = self._run(pixels.to(self.device)).float().cpu()
        return found if found.dim() == 3 else found.unsqueeze(1)

    def _run(self, pixels: Any) -> Any:
        import torch

        model = self.model
        if self.output == "vit":
            if not hasattr(model, "visual_encoder"):
                raise Refused(f"LAVIS's {type(model).__name__} has no visual_encoder: set output to image_embeds")
            if not hasattr(model, "ln_vision"):
                return model.visual_encoder.forward_features(pixels)
            with model.maybe_autocast() if hasattr(model, "maybe_autocast") else contextlib.nullcontext():
                return model.ln_vision(model.visual_encoder(pixels))
        if hasattr(model, "extract_features"):
            modes = inspect.signature(model.extract_features).parameters
            samples = {"image": pixels, "text_input": None}
            found = model.extract_features(samples, **({"mode": "image"} if "mode" in modes else {}))
        elif hasattr(model, "forward_image"):
            found = model.forward_image(pixels)
            found = found[0] if isinstance(found, tuple) else found
        else:
            raise Refused(
                f"LAVIS's {type(model).__name__} has neither extract_features nor forward_image; "
                "`output: vit` may work, or a model such as blip2_feature_extractor"
            )
        if isinstance(found, torch.Tensor):
            if self.output != "image_embeds":
                raise Refused(f"LAVIS's {type(model).__name__} gives one tensor: set output to image_embeds")
            return found
        return getattr(found, self.output)


def _without_files(config: Any) -> dict[str, Any]:
    """Settings without the places of files, since the weights themselves are hashed."""
    return {key: value for key, value in config.items() if key not in FILES}


def _read_shapes(checkpoint: str) -> dict[str, Any]:
    """Shape by name of a file's tensors; a file that holds code or no tensors is refused."""
    import torch

    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(checkpoint))
    except pickle.UnpicklingError as error:
        raise Refused(
            f"{checkpoint} is not loaded, since it is no file of weights, or holds code beside them"
        ) from error
    state = state.get("model", state) if isinstance(state, dict) else {}
    return {key: tensor.shape for key, tensor in state.items() if isinstance(tensor, torch.Tensor)}


def _check_fit(model: Any, shapes: dict[str, Any], checkpoint: str) -> None:
    """LAVIS loads whatever fits and says nothing; a file of which nothing fits is refused here."""
    own = model.state_dict()
    fitting = sum(key in own and own[key].shape == shape for key, shape in shapes.items())
    if not fitting:
        raise Refused(f"{checkpoint} belongs to another model: none of its {len(shapes)} tensors fits")
    print(f"{checkpoint}: {fitting} of {len(shapes)} tensors fit, the model has {len(own)}")


def picture_settings(name: str, processor: Any) -> dict[str, Any]:
    """Size, resizing, mean and std of a processor that resizes and normalises; another is refused."""
    found: dict[str, Any] = {}
    for step in getattr(getattr(processor, "transform", None), "transforms", ()):
        if type(step).__name__ == "Resize":
            sizes = {step.size} if isinstance(step.size, int) else set(step.size)
            squash = not isinstance(step.size, int) and len(step.size) == 2
            if len(sizes) == 1:
                found.update(size=sizes.pop(), resize="squash" if squash else "shortest_edge")
            found["interpolation"] = step.interpolation.value
        elif type(step).__name__ == "Normalize":
            found.update(mean=[float(x) for x in step.mean], std=[float(x) for x in step.std])
    if len(found) != 5:
        raise Refused(f"LAVIS's picture processor '{name}' does not resize to a square and normalise")
    return found


def _make_processor(name: str, options: dict[str, Any]) -> Any:
    from omegaconf import OmegaConf

    return _registered("processor", name).from_config(OmegaConf.create(options))


class _Picture:
    """Stands for a picture that a dataset opens: only its path is wanted, not its pixels."""

    def __init__(self, path: str):
        self.path = path

    def convert(self, mode: str) -> _Picture:
        return self


@contextlib.contextmanager
def _unopened_pictures() -> Iterator[None]:
    from PIL import Image

    module: Any = Image
    original = module.open
    module.open = lambda file, *args, **options: _Picture(os.path.abspath(file))
    try:
        yield
    finally:
        module.open = original


def _make_datasets(
    builder: str,
    config: str | None,
    annotations: dict[str, Any] | None,
    images: str | None,
    text_processor: str | None,
    options: dict[str, Any],
) -> Any:
    """The datasets of a builder by split, which leave pictures as they are."""
    from omegaconf import OmegaConf

    made = _registered("builder", builder)(config)
    made.config = OmegaConf.merge(made.config, options)
    made.config.vis_processor = None  # then LAVIS passes them on as they are
    if text_processor is not None:
        made.config.text_processor = {split: {"name": text_processor} for split in ("train", "eval")}
    info = made.config.build_info
    if annotations is not None:  # a file that is its own url is used where it lies
        info.annotations = {split: {"url": file, "storage": file} for split, file in annotations.items()}
    if images is not None:
        info[made.config.data_type].storage = images
    return made.build_datasets()


def _record(dataset: Any, index: int) -> dict[str, Any]:
    """Paths and plain values of an item; its annotation adds what LAVIS leaves out of an evaluation split."""
    item = dataset[index]
    annotations = getattr(dataset, "annotation", None)
    annotation = annotations[index] if isinstance(annotations, list) and index < len(annotations) else None
    fields = {k: v for k, v in annotation.items() if _is_plain(v)} if isinstance(annotation, dict) else {}
    fields.update({key: value for key, value in item.items() if _is_plain(value)})
    return {"images": [value.path for value in item.values() if isinstance(value, _Picture)], "fields": fields}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(entry, (str, int, float)) for entry in value)
    return isinstance(value, (str, int, float))


# -- commands --------------------------------------------------------------------------------------------------


def answer_model(header: Header, arrays: Arrays) -> Answer:
    """Sizes, picture settings and fingerprint of a model."""
    return _once(_models, Model, header["model"]).info, {}


def answer_features(header: Header, arrays: Arrays) -> Answer:
    """``pixels`` [N, 3, H, W] -> ``features`` [N, tokens, channels]."""
    import torch

    model = _once(_models, Model, header["model"])
    return {}, {"features": model.features(torch.from_numpy(arrays["pixels"])).numpy()}


def answer_picture(header: Header, arrays: Arrays) -> Answer:
    """``picture`` [H, W, 3] through a picture processor -> ``pixels`` [3, H, W]."""
    import numpy as np
    import torch
    from PIL import Image

    processor = _once(_processors, _make_processor, header["processor"])
    random.seed(header["seed"])
    np.random.seed(header["seed"])
    torch.manual_seed(header["seed"])
    pixels = processor(Image.fromarray(arrays["picture"]))
    if not isinstance(pixels, torch.Tensor):
        raise Refused(f"LAVIS's processor '{header['processor']['name']}' makes no tensor of a picture")
    return {}, {"pixels": pixels.float().numpy()}


def answer_text(header: Header, arrays: Arrays) -> Answer:
    """``text`` through a text processor."""
    return {"text": _once(_processors, _make_processor, header["processor"])(header["text"])}, {}


def answer_dataset(header: Header, arrays: Arrays) -> Answer:
    """Split -> number of items."""
    return {"splits": {k: len(v) for k, v in _once(_datasets, _make_datasets, header["dataset"]).items()}}, {}


def answer_records(header: Header, arrays: Arrays) -> Answer:
    """Items ``start`` to ``stop`` of a split, each as JSON."""
    dataset = _once(_datasets, _make_datasets, header["dataset"])[header["split"]]
    records = []
    with _unopened_pictures():
        for index in range(header["start"], header["stop"]):
            try:
                record = _record(dataset, index)
            except Exception as error:
                record = {"error": f"{type(error).__name__}: {error}"}
            records.append(json.dumps(record))
    return {"records": records}, {}


COMMANDS = {
    "model": answer_model,
    "features": answer_features,
    "picture": answer_picture,
    "text": answer_text,
    "dataset": answer_dataset,
    "records": answer_records,
}


def versions() -> dict[str, str | None]:
    """Installed versions by distribution; None for what is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _last_frames(error: BaseException) -> list[str]:
    frames = traceback.extract_tb(error.__traceback__)[1:]
    lines = [f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames[-4:]]
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        lines.append("without network: docs/lavis.md says which files LAVIS wants and where")
    return lines


def main() -> None:
    """Answer until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other side, which ends this one
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [path for path in sys.path if os.path.realpath(path or ".") != here]
    write_message(answers, {"versions": versions()})
    while True:
        try:
            header, arrays = read_message(requests)
        except EOFError:
            return
        try:
            answer = COMMANDS[header["command"]](header, arrays)
        except Refused as error:
            answer = {"error": str(error), "traceback": []}, {}
        except (Exception, SystemExit) as error:  # LAVIS calls exit() when it does not know a dataset
            answer = {"error": f"{type(error).__name__}: {error}", "traceback": _last_frames(error)}, {}
        write_message(answers, *answer)


if __name__ == "__main__":
    main()
