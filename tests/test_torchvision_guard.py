"""The guard for torchvision, each case in a fresh interpreter because imports cannot be undone."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

WATCHED = "any(type(f).__module__ == 'minivlm.torchvision_guard' for f in sys.meta_path)"

needs_torchvision = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed"
)


def run(code: str, *extra_path: Path) -> str:
    """Run ``code`` in a new interpreter that finds minivlm (and ``extra_path`` first); return its output."""
    path = os.pathsep.join(str(p) for p in (*extra_path, ROOT))
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def fake_torchvision(folder: Path, extension: bytes | None) -> Path:
    """A package named torchvision whose extension library holds the given bytes."""
    package = folder / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from torchvision import part\n")
    (package / "part.py").write_text("value = 7\n")
    if extension is not None:
        (package / "_C.so").write_bytes(extension)
    return folder


@pytest.mark.parametrize(
    "statement",
    [
        "import timm",
        "from transformers import LlamaForCausalLM",
        "import peft",
        "import torchvision.transforms.v2",
        "import torchvision; from torchvision.models import resnet18",
    ],
)
@needs_torchvision
def test_minivlm_first(statement: str) -> None:
    run(f"import minivlm; {statement}; assert 'torchvision' in sys.modules; assert not {WATCHED}")


@needs_torchvision
def test_transformers_first() -> None:
    run(f"import transformers; import minivlm; assert {WATCHED}; import timm; assert not {WATCHED}")


@needs_torchvision
def test_torchvision_tried_before_minivlm() -> None:
    run("""
        try:
            import torchvision
        except RuntimeError:
            pass
        import minivlm
        import torchvision, timm
    """)


@needs_torchvision
def test_state_agrees_with_torchvision() -> None:
    run("""
        import minivlm
        from minivlm import torchvision_guard
        assert not torchvision_guard.was_needed()
        import torch, torchvision
        from torchvision.extension import _has_ops
        assert hasattr(torch.ops.torchvision, "nms")
        assert torchvision_guard.was_needed() == (not _has_ops() and torch.version.cuda is None)
        assert type(torchvision.__loader__).__module__ != "minivlm.torchvision_guard"
        assert torchvision.__spec__.loader is torchvision.__loader__
    """)


def test_importing_minivlm_loads_neither_torch_nor_torchvision() -> None:
    run("import minivlm; assert not {'torch', 'torchvision'} & set(sys.modules)")


def test_looking_for_torchvision_does_not_import_torch(tmp_path: Path) -> None:
    out = run(
        f"""
        import importlib.util, minivlm
        assert importlib.util.find_spec("torchvision").name == "torchvision"
        assert "torch" not in sys.modules and {WATCHED}
        import torchvision
        print(torchvision.part.value, {WATCHED})
        """,
        fake_torchvision(tmp_path, None),
    )
    assert out.split() == ["7", "False"]


REPORT = """
    from minivlm import torchvision_guard
    import torch
    {patch}
    import torchvision
    print(torchvision_guard.was_needed(), hasattr(torch.ops.torchvision, "nms"))
"""


def test_library_that_does_not_load(tmp_path: Path) -> None:
    path = fake_torchvision(tmp_path, b"not a library")
    out = run(REPORT.format(patch="torch.version.cuda = None"), path)
    assert out.split() == ["True", "True"]


@pytest.mark.parametrize(
    "patch",
    [
        "torch.version.cuda = None; torch.ops.load_library = lambda path: None",  # it loads
        "torch.version.cuda = '13.0'",  # torch has CUDA: a mismatch is the user's to see
    ],
)
def test_healthy_torchvision_is_left_alone(tmp_path: Path, patch: str) -> None:
    path = fake_torchvision(tmp_path, b"not a library")
    assert run(REPORT.format(patch=patch), path).split() == ["False", "False"]


def test_other_errors_are_not_hidden(tmp_path: Path) -> None:
    path = fake_torchvision(tmp_path, b"not a library")
    code = """
        import minivlm, torch
        def fail(path): raise RuntimeError("odd")
        torch.version.cuda = None
        torch.ops.load_library = fail
        try:
            import torchvision
        except RuntimeError as error:
            print(error)
    """
    assert run(code, path).split() == ["odd"]


def test_operators_that_exist_are_not_declared_twice(tmp_path: Path) -> None:
    path = fake_torchvision(tmp_path, b"not a library")
    patch = """torch.version.cuda = None
    mine = torch.library.Library("torchvision", "DEF")
    for name in torchvision_guard.OPERATORS:
        mine.define(name + torchvision_guard._SIGNATURE)"""
    assert run(REPORT.format(patch=patch), path).split() == ["False", "True"]


def test_torchvision_not_installed() -> None:
    run("""
        from pathlib import Path
        import minivlm
        from minivlm import torchvision_guard
        sys.path[:] = [folder for folder in sys.path if not (Path(folder) / "torchvision").exists()]
        try:
            import torchvision
        except ModuleNotFoundError as error:
            assert error.name == "torchvision"
        else:
            raise AssertionError("imported")
        assert not torchvision_guard.was_needed() and "torch" not in sys.modules
    """)


def test_torchvision_already_imported(tmp_path: Path) -> None:
    run(
        f"import torchvision; import minivlm; assert not {WATCHED}; assert 'torch' not in sys.modules",
        fake_torchvision(tmp_path, b"not a library"),
    )


def test_installing_twice_watches_once() -> None:
    out = run("""
        from minivlm import torchvision_guard
        torchvision_guard.install()
        torchvision_guard.install()
        print(sum(type(f).__name__ == "_Finder" for f in sys.meta_path))
    """)
    assert out.split() == ["1"]
