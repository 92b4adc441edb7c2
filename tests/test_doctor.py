from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minivlm import doctor

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {package.name: package for package in doctor.CORE}


def setup_literal(name: str) -> Any:
    """The value of a constant in setup.py, without running it."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py has no {name}")


def names(requirements: list[str]) -> list[str]:
    return [re.match(r"[\w.-]+", requirement)[0] for requirement in requirements]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A pretended machine where everything is as tested; tests change ``versions`` and ``faults``."""
    versions = {package.name: package.tested for package in doctor.CORE}
    for members in doctor.EXTRAS.values():
        versions |= members
    faults: dict[str, Exception] = {}
    monkeypatch.setattr(doctor, "_version", versions.get)
    monkeypatch.setattr(doctor, "_load", faults.get)
    monkeypatch.setattr(doctor.torchvision_guard, "was_needed", lambda: False)
    return {"versions": versions, "faults": faults}


def test_tables_agree_with_setup_and_constraints() -> None:
    constraints = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert [package.name for package in doctor.CORE] == names(setup_literal("CORE"))
    extras = setup_literal("EXTRAS")
    assert {extra: list(members) for extra, members in doctor.EXTRAS.items()} == {
        extra: names(requirements) for extra, requirements in extras.items()
    }
    tested = {package.name: package.tested for package in doctor.CORE}
    for members in doctor.EXTRAS.values():
        tested |= members
    assert tested == {name: constraints.get(name) for name in tested}


def test_healthy(machine: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    machine["versions"]["torch"] = PACKAGES["torch"].tested + "+cpu"
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert "minivlm is ready" in out
    assert "missing" not in out and "untested" not in out


def test_missing_torch_is_one_clear_line(machine: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    machine["versions"]["torch"] = None
    for name in ("torchvision", "timm", "peft"):
        machine["faults"][PACKAGES[name].module] = ModuleNotFoundError("No module named 'torch'", name="torch")
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert f'torch missing: pip install "torch=={PACKAGES["torch"].tested}"' in out
    assert re.search(r"timm .* not checked: needs torch", out)
    assert "accelerators not checked, since torch does not load" in out
    assert out.count("\n  - ") == 1


def test_broken_package(machine: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    machine["faults"]["timm"] = RuntimeError("operator torchvision::nms\n does not exist")
    assert doctor.main(["--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["timm"]["state"] == "broken"
    assert found["problems"] == [
        f"timm {PACKAGES['timm'].tested} is installed but does not load: "
        "RuntimeError: operator torchvision::nms does not exist"
    ]


def test_missing_part_of_a_healthy_package_is_its_own_fault(machine: dict[str, Any]) -> None:
    machine["faults"]["peft"] = ModuleNotFoundError("No module named 'torch.odd'", name="torch.odd")
    found = doctor.collect()
    assert found["packages"]["peft"]["state"] == "broken"


def test_untested_versions_are_told_but_no_problem(machine: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    machine["versions"] |= {"timm": "1.0.99", "onnxruntime": "9.9"}
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert re.search(r"timm +1\.0\.99 .*untested version", out)
    assert f"onnxruntime 9.9, tested {doctor.EXTRAS['ocr']['onnxruntime']}" in out


def test_missing_extra_names_the_command(machine: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    machine["versions"]["rapidocr"] = None
    assert doctor.main([]) == 0
    assert 'rapidocr missing: pip install "minivlm[ocr]"' in capsys.readouterr().out


def test_guard_is_told(machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no workaround needed" in doctor.collect()["torchvision_guard"]
    monkeypatch.setattr(doctor.torchvision_guard, "was_needed", lambda: True)
    assert "works around it" in doctor.collect()["torchvision_guard"]
    monkeypatch.setattr(doctor.torchvision_guard, "was_needed", lambda: False)
    machine["faults"][PACKAGES["torchvision"].module] = OSError("no")
    assert "not checked" in doctor.collect()["torchvision_guard"]


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("model name\t: X1\nflags\t\t: fpu avx512_bf16 amx_bf16\n", ("X1", ["AVX512-BF16", "AMX"])),
        ("model name\t: X2\nflags\t\t: fpu avx2\n", ("X2", [])),
        ("Features\t: fp asimd bf16\n", (None, ["Arm BF16"])),
        (None, (None, None)),
    ],
)
def test_bf16_of_the_processor(
    monkeypatch: pytest.MonkeyPatch, cpuinfo: str | None, expected: tuple[str | None, list[str] | None]
) -> None:
    def read(path: Path, *args: Any, **kwargs: Any) -> str:
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return cpuinfo

    monkeypatch.setattr(Path, "read_text", read)
    cpu = doctor._cpu()
    name, bf16 = expected
    assert cpu["bf16"] == bf16
    assert name is None or cpu["name"] == name


def test_graphics_cards_are_listed(machine: dict[str, Any]) -> None:
    found = doctor.collect()
    found["devices"]["cuda"] = [{"name": "Card", "memory_bytes": 24 * 2**30, "capability": "7.5", "bf16": False}]
    assert re.search(r"cuda:0 +Card, 24\.0 GiB, capability 7\.5, no bf16", doctor.render(found))


def test_for_real_with_torch_that_does_not_load(tmp_path: Path) -> None:
    """No traceback, valid JSON and exit code 1, even if imports print and torch raises."""
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("print('noise')\nraise OSError('libtorch.so: cannot open')\n")
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from minivlm.doctor import main; sys.exit(main(['--json']))"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["packages"]["torch"]["error"] == "OSError: libtorch.so: cannot open"
    assert len(found["problems"]) == 1, found["problems"]
    assert found["packages"]["timm"]["error"] == "needs torch"
    assert found["packages"]["rich"]["state"] in ("ok", "untested version")
    assert "Traceback" not in done.stderr
