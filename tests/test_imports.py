"""What imports what: the direction of the layers, no circles, and nothing heavy at the start."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "minivlm"
HEAVY = ("torch", "torchvision", "transformers", "timm", "tokenizers", "peft", "numpy", "PIL", "gradio", "matplotlib")

LAYERS = (
    {"registry", "schema", "types", "io", "paths", "version", "torchvision_guard", "builtins", "lavis"},
    {"config", "processors", "models", "evaluation"},
    {"datasets", "checkpoints", "api"},
    {"tasks", "serve"},
    {"runners"},
    {"cli", "convert", "doctor", "download", "export"},
)
"""Ground floor first; a module imports from its own layer and from those before it."""
FLOOR = LAYERS[0]


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def is_type_checking(node: ast.AST) -> bool:
    if not isinstance(node, ast.If):
        return False
    return "TYPE_CHECKING" in (getattr(node.test, "id", ""), getattr(node.test, "attr", ""))


def imported(node: ast.AST, module: str) -> set[str]:
    """The modules of the house that one import statement names."""
    if isinstance(node, ast.Import):
        return {name for name in (alias.name for alias in node.names) if name.split(".")[0] == "minivlm"}
    assert isinstance(node, ast.ImportFrom)
    base = node.module or ""
    if node.level:
        parents = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
        base = ".".join([*parents[: len(parents) - node.level + 1], *([node.module] if node.module else [])])
    if base.split(".")[0] != "minivlm":
        return set()
    found = {f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in MODULES}
    return found or {base}


@cache
def imports(module: str, lazy: bool) -> set[str]:
    """What a module imports of the house at its top level, with ``lazy`` also inside functions."""
    found: set[str] = set()
    pending: list[ast.AST] = list(ast.parse(MODULES[module].read_text(encoding="utf-8")).body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= imported(node, module)
        elif is_type_checking(node):
            pending += node.orelse  # type: ignore[attr-defined]
        elif lazy or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            pending += ast.iter_child_nodes(node)
    return found - {module}


def area(module: str) -> str:
    """The first name below the package; empty for the package itself."""
    return module.partition(".")[2].partition(".")[0]


def test_the_walk_sees_what_it_must() -> None:
    assert len(MODULES) > 60
    assert "minivlm.models.splice" in imports("minivlm.models.vlm", lazy=False)
    assert "minivlm.api" not in imports("minivlm", lazy=False)
    assert "minivlm.api" in imports("minivlm", lazy=True)
    assert "minivlm.config" in imports("minivlm.cli", lazy=True) - imports("minivlm.cli", lazy=False)


def test_every_module_has_a_layer() -> None:
    known = set().union(*LAYERS)
    assert {area(module) for module in MODULES} - {""} == known


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"minivlm"}))
def test_no_import_runs_back_up(module: str) -> None:
    """Imports inside of functions count; the package's own lazy names (``minivlm.load``) do not."""
    level = {name: number for number, names in enumerate(LAYERS) for name in names}
    for other in imports(module, lazy=True):
        if other != "minivlm":  # its attributes are names of the ground floor
            assert level[area(other)] <= level[area(module)], f"{module} imports {other}"


def test_the_package_itself_imports_only_the_ground_floor() -> None:
    assert {area(module) for module in imports("minivlm", lazy=False)} <= FLOOR


@pytest.mark.parametrize("name", sorted(LAYERS[1]))
def test_siblings_of_the_first_layer_do_not_know_each_other(name: str) -> None:
    for module in MODULES:
        if area(module) == name:
            others = {area(other) for other in imports(module, lazy=True)} - {""}
            assert others <= FLOOR | {name}, module


def test_there_is_no_circle() -> None:
    """Neither between modules at their top level, nor between packages at all."""
    assert circle({module: imports(module, lazy=False) & set(MODULES) for module in MODULES}) == []
    areas: dict[str, set[str]] = {}
    for module in MODULES:
        if area(module):
            others = {area(other) for other in imports(module, lazy=True)}
            areas.setdefault(area(module), set()).update(others - {"", area(module)})
    assert circle(areas) == []


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of a graph, empty if there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for following in sorted(graph.get(node, ())):
            found = visit(following, [*path, node])
            if found:
                return found
        done.add(node)
        return []

    for start in sorted(graph):
        found = visit(start, [])
        if found:
            return found
    return []


def test_circles_are_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def fresh(code: str) -> list[str]:
    """The words that code prints in a fresh interpreter, which then tells what is heavy and how long it took."""
    program = (
        "import sys, time\nstart = time.perf_counter()\n"
        f"{code}\n"
        "seconds = time.perf_counter() - start\n"
        f"print('\\nHEAVY', *[m for m in {HEAVY!r} if m in sys.modules])\nprint('SECONDS', seconds)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


STARTS = {
    "import minivlm": "import minivlm",
    "minivlm list": "from minivlm.cli import main\nassert main(['list']) == 0",
    "minivlm --help": "from minivlm.cli import main\nassert main(['--help']) == 0",
    "schemas": "import minivlm\nfrom minivlm import registry\n"
    "for kind in registry.KINDS:\n    for name in registry.names(kind):\n"
    "        registry.entry(kind, name).config_class()",
}


@pytest.mark.parametrize("start", STARTS)
def test_nothing_heavy_at_the_start(start: str) -> None:
    """Half a second is the promise; the limit is generous because tests share their machine."""
    fresh("import minivlm")  # byte code is written, files are in memory
    *_, heavy, seconds = fresh(STARTS[start])
    assert heavy.strip() == "HEAVY"
    assert float(seconds.split()[1]) < 2.0


def test_list_names_everything() -> None:
    from minivlm import registry

    lines = fresh(STARTS["minivlm list"])
    for kind in registry.KINDS:
        assert kind in lines
        for name in registry.names(kind):
            assert any(line.strip().split(" ")[0] == name for line in lines), name
    assert "  arch: quickstart, model_type: easy_vqa" in lines
