"""The registry: exact names, lazy targets, errors with suggestions, and parts that users bring."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from minivlm import registry
from minivlm.registry import KINDS, RegistryError
from minivlm.schema import Part, setting


@pytest.fixture(autouse=True)
def same_registry_afterwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test registers or imports is gone after it."""
    entries, modules = dict(registry._entries), set(sys.modules)
    monkeypatch.setattr(registry, "_plugins_loaded", True)
    yield
    registry._entries.clear()
    registry._entries.update(entries)
    for name in set(sys.modules) - modules:
        if name.startswith("minivlm_user_") or name.startswith("plugin_under_test"):
            del sys.modules[name]


class Red:
    """A red part.

    More of it.
    """


class Blue:
    pass


def test_every_kind_has_entries_and_names_are_sorted() -> None:
    assert set(KINDS) == {
        "vision_encoder", "connector", "language_model", "template", "processor",
        "dataset", "task", "metric", "runner", "lr_scheduler",
    }  # fmt: skip
    for kind in KINDS:
        found = registry.names(kind)
        assert found and found == sorted(set(found)), kind
        assert all(registry.entry(kind, name).name == name for name in found)
    assert {"hf", "timm", "efficientnet_lite0"} <= set(registry.names("vision_encoder"))


def test_decorator_direct_call_and_string_target() -> None:
    assert registry.register("metric", "red")(Red) is Red
    registry.register("metric", "direct", Red, summary="given")
    registry.register("metric", "join", "os.path:join")
    assert registry.get("metric", "red") is Red
    assert registry.get("metric", "direct") is Red
    assert registry.get("metric", "join") is __import__("os").path.join
    assert registry.entry("metric", "red").summary == "A red part."
    assert registry.entry("metric", "direct").summary == "given"
    assert registry.entry("metric", "join").summary == ""
    assert {"red", "direct", "join"} <= set(registry.names("metric"))


def test_a_string_target_is_imported_on_first_use_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugin_under_test_lazy.py").write_text("class Thing:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry.register("metric", "lazy", "plugin_under_test_lazy:Thing", config="plugin_under_test_lazy:Missing")
    assert "lazy" in registry.names("metric")
    assert registry.entry("metric", "lazy").target == "plugin_under_test_lazy:Thing"
    assert "plugin_under_test_lazy" not in sys.modules
    assert registry.get("metric", "lazy").__name__ == "Thing"
    assert "plugin_under_test_lazy" in sys.modules
    with pytest.raises(RegistryError, match=r"metric 'lazy' cannot be loaded from plugin_under_test_lazy:Missing"):
        registry.entry("metric", "lazy").config_class()


@pytest.mark.parametrize("target", ["no_such_module_here:X", "os.path:no_such_name"])
def test_a_target_that_cannot_be_imported(target: str) -> None:
    registry.register("metric", "broken", target)
    with pytest.raises(RegistryError, match=f"metric 'broken' cannot be loaded from {target}"):
        registry.get("metric", "broken")


def test_a_name_is_taken_once() -> None:
    registry.register("connector", "mine", Red)
    registry.register("connector", "mine", Red)  # a cell of a notebook that is run again
    registry.register("metric", "mine", Blue)  # another kind has names of its own
    with pytest.raises(RegistryError, match=r"connector 'mine' is registered twice: .*:Red and .*:Blue"):
        registry.register("connector", "mine", Blue)
    assert registry.get("connector", "mine") is Red
    with pytest.raises(RegistryError, match=r"vision_encoder 'hf' is registered twice"):
        registry.register("vision_encoder", "hf")(Blue)
    assert registry.entry("vision_encoder", "hf").target == "minivlm.models.vision.hf:HFVisionEncoder"


def test_unknown_names_bring_the_nearest_and_the_command() -> None:
    with pytest.raises(RegistryError) as caught:
        registry.get("vision_encoder", "efficientnet_lite")
    assert str(caught.value) == (
        "unknown vision_encoder 'efficientnet_lite' (did you mean 'efficientnet_lite0'?); "
        "`minivlm list vision_encoder` shows all of them"
    )
    with pytest.raises(RegistryError) as caught:
        registry.get("connector", "zzzzzz")
    assert "did you mean" not in str(caught.value) and "`minivlm list connector`" in str(caught.value)
    with pytest.raises(RegistryError):  # names are exact
        registry.get("connector", "MLP")


@pytest.mark.parametrize(
    "call", [lambda k: registry.register(k, "x", Red), registry.names, lambda k: registry.get(k, "x")]
)
def test_unknown_kinds(call: object) -> None:
    with pytest.raises(RegistryError, match=r"unknown kind 'conector' \(did you mean 'connector'\?\); kinds: vision_"):
        call("conector")  # type: ignore[operator]


def test_the_config_is_a_dataclass() -> None:
    @dataclass
    class Settings:
        size: int = 1

    registry.register("metric", "with", Red, config=Settings)
    registry.register("metric", "without", Red)
    registry.register("metric", "wrong", Red, config=Blue)
    registry.register("metric", "instance", Red, config=Settings())
    assert registry.entry("metric", "with").config_class() is Settings
    assert registry.entry("metric", "without").config_class() is registry.NoSettings
    for name in ("wrong", "instance"):
        with pytest.raises(RegistryError, match=f"config of metric '{name}' must be a dataclass"):
            registry.entry("metric", name).config_class()


def user_file(folder: Path, name: str, body: str) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text("from minivlm.registry import register\n" + body)
    return file


def test_a_users_file_registers_its_parts_once(tmp_path: Path) -> None:
    file = user_file(
        tmp_path, "mine.py", "import builtins\nbuiltins.ran = getattr(builtins, 'ran', 0) + 1\n"
        "@register('metric', 'mine')\nclass Mine:\n    'My metric.'\n",
    )  # fmt: skip
    import builtins

    try:
        for path in (file, str(file), tmp_path / "." / "mine.py"):
            registry.import_user_file(path)
        assert builtins.ran == 1  # type: ignore[attr-defined]
    finally:
        del builtins.ran  # type: ignore[attr-defined]
    assert registry.get("metric", "mine").__name__ == "Mine"
    assert registry.entry("metric", "mine").summary == "My metric."


def test_two_users_files_of_one_name(tmp_path: Path) -> None:
    a = user_file(tmp_path / "a", "parts.py", "@register('metric', 'one')\nclass Part:\n    value = 1\n")
    b = user_file(tmp_path / "b", "parts.py", "@register('metric', 'two')\nclass Part:\n    value = 2\n")
    registry.import_user_file(a)
    registry.import_user_file(b)
    assert (registry.get("metric", "one").value, registry.get("metric", "two").value) == (1, 2)
    c = user_file(tmp_path / "c", "parts.py", "@register('metric', 'one')\nclass Part:\n    value = 3\n")
    with pytest.raises(RegistryError, match="metric 'one' is registered twice"):
        registry.import_user_file(c)
    assert registry.get("metric", "one").value == 1


def test_a_users_file_that_is_missing_or_broken_can_be_repaired(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"imports: there is no file .*nowhere\.py"):
        registry.import_user_file(tmp_path / "nowhere.py")
    with pytest.raises(RegistryError, match=r"imports: no\.such\.module failed with ModuleNotFoundError"):
        registry.import_user_file("no.such.module")
    file = user_file(tmp_path, "broken.py", "@register('metric', 'fixed')\nclass Part: pass\n1 / 0\n")
    with pytest.raises(RegistryError, match=r"broken\.py failed with ZeroDivisionError: division by zero"):
        registry.import_user_file(file)
    file.write_text(file.read_text().replace("1 / 0", "").replace("pass", "value = 4"))
    registry.import_user_file(file)
    assert registry.get("metric", "fixed").value == 4


def test_a_dotted_name_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user_file(tmp_path, "plugin_under_test_dotted.py", "@register('metric', 'dotted')\nclass Part: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry.import_user_file("plugin_under_test_dotted")
    assert "dotted" in registry.names("metric")


def installed_package(folder: Path, module: str, body: str) -> None:
    user_file(folder, f"{module}.py", body)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[minivlm.plugins]\nmine = {module}\n")


def test_an_installed_package_brings_parts_by_its_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "@register('vision_encoder', 'from_plugin')\nclass Encoder: pass\n"
    installed_package(tmp_path, "plugin_under_test_good", body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_plugins_loaded", False)
    assert registry.entry("connector", "mlp").name == "mlp"
    assert "plugin_under_test_good" not in sys.modules, "a built-in name does not need the plugins"
    assert registry.get("vision_encoder", "from_plugin").__name__ == "Encoder"
    assert "from_plugin" in registry.names("vision_encoder")


def test_a_broken_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed_package(tmp_path, "plugin_under_test_bad", "raise RuntimeError('no luck')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_plugins_loaded", False)
    with pytest.raises(RegistryError, match=r"plugin 'mine' \(plugin_under_test_bad\) failed: no luck"):
        registry.names("metric")


def test_suggestions_are_near_words_only() -> None:
    assert registry.suggest("conector", ["connector", "task"]) == " (did you mean 'connector'?)"
    assert registry.suggest("lr", ["lr1", "lr2"]) == " (did you mean 'lr2' or 'lr1'?)"
    assert registry.suggest("banana", ["connector"]) == ""
    assert registry.suggest("x", []) == ""


def test_setting_keeps_limits_and_only_those_given() -> None:
    @dataclass
    class Settings:
        needed: int = setting(ge=0, help="how many")
        share: float = setting(0.5, gt=0, le=1)
        names: list[str] = setting(factory=list, choices=("a", "b"))
        part: Part | None = setting(None, part="metric")

    fields = Settings.__dataclass_fields__
    assert dict(fields["needed"].metadata) == {"ge": 0, "help": "how many"}
    assert dict(fields["share"].metadata) == {"gt": 0, "le": 1}
    assert dict(fields["names"].metadata) == {"choices": ("a", "b")}
    assert dict(fields["part"].metadata) == {"part": "metric"}
    with pytest.raises(TypeError):
        Settings()  # type: ignore[call-arg]
    first, second = Settings(1), Settings(2)
    first.names.append("a")
    assert second.names == []
