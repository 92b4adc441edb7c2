"""What the documents say is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from PIL import Image

README = (ROOT / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def block_with(text: str, language: str, first_line: str) -> str:
    return next(b for b in blocks(text, language) if b.startswith(first_line))


def run(folder: Path, *command: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder like the repository's root, with the files that the README asks the reader to write."""
    for name in ("train.py", "demo.py", "train_configs", "eval_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for language, name in (("yaml", "my_experiment.yaml"), ("python", "my_encoder.py"), ("yaml", "my_patches.yaml")):
        (tmp_path / name).write_text(block_with(README, language, f"# {name}"))
    return tmp_path


def test_key_reference_is_up_to_date() -> None:
    from minivlm.config.reference import reference

    assert (ROOT / "docs" / "configuration.md").read_text() == reference(), (
        "run: python -m minivlm.config.reference > docs/configuration.md"
    )


def test_pictures_and_files_of_the_documents_exist() -> None:
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).is_file(), f"{document.name}: {target}"


def test_yaml_of_the_documents_is_yaml() -> None:
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    read = [yaml.safe_load(block) for document in documents for block in blocks(document.read_text(), "yaml")]
    assert len(read) > 3 and all(isinstance(content, dict) for content in read)


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^make ([a-z-]+)", README, flags=re.MULTILINE))
    assert {"quickstart", "test", "demo"} <= targets
    for target in targets:
        assert re.search(rf"^{target}\b.*:", makefile, flags=re.MULTILINE), target


def test_experiment_of_the_readme_dry_runs_and_checks(workplace: Path) -> None:
    dry = run(workplace, "train.py", "--cfg-path", "my_experiment.yaml", "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "what trains" in dry.stdout and "depth: 3" in dry.stdout
    assert not (workplace / "output").exists()
    check = run(workplace, "-m", "minivlm.cli", "check-data", "my_experiment.yaml", "--limit", "20")
    assert check.returncode == 0, check.stderr


def test_typo_of_the_readme_is_answered_as_printed(workplace: Path) -> None:
    said = block_with(README, "text", "my_experiment.yaml:").strip()
    file = workplace / "my_experiment.yaml"
    line = int(re.search(r":(\d+):", said)[1])  # type: ignore[index]
    lines = file.read_text().splitlines()
    lines[next(i for i, text in enumerate(lines) if "output_dir" in text)] = "  ouput_dir: output/my_experiment"
    file.write_text("\n".join(lines))
    result = run(workplace, "train.py", "--cfg-path", "my_experiment.yaml")
    assert result.returncode == 2
    assert re.sub(r":\d+:", f":{line}:", result.stderr.strip()) == said
    assert f"my_experiment.yaml:{lines.index('  ouput_dir: output/my_experiment') + 1}:" in result.stderr


def test_encoder_of_the_readme_trains(workplace: Path) -> None:
    options = ["stages.align.run.max_steps=2", "stages.instruct.run.max_steps=2", "run.evaluate=false"]
    options += ["stages.instruct.run.test_splits=[]", "stages.instruct.run.valid_splits=[]"]
    options += ["datasets.easy_vqa.max_samples=64", "run.device=cpu", "run.feature_cache=null"]
    result = run(workplace, "train.py", "--cfg-path", "my_patches.yaml", "--options", *options)
    assert result.returncode == 0, result.stderr
    assert (workplace / "output" / "my_patches" / "instruct" / "model" / "manifest.json").is_file()


def test_dataset_of_the_data_page_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minivlm import registry

    page = (ROOT / "docs" / "data.md").read_text()
    (tmp_path / "own.py").write_text(blocks(page, "python")[0])
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    registry.import_user_file(tmp_path / "own.py")
    assert registry.get("dataset", "one_question")(None).build("train")[0].images == ["red.png"]


@pytest.mark.slow
def test_quickstart_reaches_its_promise_and_the_readme_commands_follow(workplace: Path) -> None:
    """The commands that `make quickstart` and `make demo` run, and the rest of the README on their result."""
    import json

    result = run(workplace, "train.py", "--cfg-path", "train_configs/quickstart.yaml", timeout=1800)
    assert result.returncode == 0, result.stderr
    scores = json.loads((workplace / "output/quickstart/instruct/done.json").read_text())["metrics"]
    assert scores["accuracy/colour"] >= 0.97 and scores["accuracy/shape"] >= 0.97
    assert scores["accuracy/yes/no"] >= 0.95
    assert scores["majority/accuracy"] < 0.7 and scores["shuffled/accuracy"] < 0.7
    again = run(workplace, "train.py", "--cfg-path", "train_configs/quickstart.yaml")
    assert "done before" in again.stdout
    evaluated = run(workplace, "-m", "minivlm.cli", "eval", "train_configs/quickstart.yaml", timeout=900)
    assert evaluated.returncode == 0, evaluated.stderr
    Image.new("RGB", (64, 64), "white").save(workplace / "shape.png")
    (workplace / "snippet.py").write_text(block_with(README, "python", "import minivlm"))
    snippet = run(workplace, "snippet.py")
    assert snippet.returncode == 0, snippet.stderr
    assert snippet.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["supervised_loss.py", "loader.py", "startup.py", "minigpt4_size.py", "feature_cache.py --quick"]
)
def test_benchmarks_of_the_readme_run(command: str) -> None:
    script, *options = command.split()
    assert f"benchmarks/{script}" in README
    result = run(ROOT, f"benchmarks/{script}", *options, timeout=900)
    assert result.returncode == 0, result.stderr
    assert re.search(r"\d", result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", ["minimind_v_training.py --quick", "minimind_v_generation.py --quick", "minimind_v_memory.py"]
)
def test_benchmarks_of_the_minimind_page_run(command: str) -> None:
    """Their exit code tells of a missed goal."""
    assert f"benchmarks/{command.split()[0]}" in (ROOT / "docs" / "minimind_v.md").read_text()
    result = run(ROOT, f"benchmarks/{command.split()[0]}", *command.split()[1:], timeout=1800)
    assert result.returncode == 0, result.stdout + result.stderr
