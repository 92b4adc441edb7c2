"""Loading processes: errors keep type and words, and no process outlives its program."""

from __future__ import annotations

import json
import multiprocessing
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, run_train, write_yaml

from minivlm.datasets.base import DatasetError
from minivlm.datasets.loading import load
from minivlm.types import SampleError

ERRORS = {"data": DatasetError("no good"), "sample": SampleError("17", "no caption"), "disk": OSError(5, "broken")}


class Letters(torch.utils.data.Dataset[str]):
    """The keys themselves; some are errors, and ``wait`` takes for ever."""

    def __getitem__(self, key: str) -> str:
        if key in ERRORS:
            raise ERRORS[key]
        if key == "bug":
            return {}["nowhere"]
        if key == "wait":
            time.sleep(600)
        return key


class Stream(torch.utils.data.IterableDataset[str]):
    """A letter and an error."""

    def __iter__(self) -> Any:
        yield "a"
        raise ERRORS["sample"]


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_arrive_in_their_place_with_type_and_words(workers: int) -> None:
    for key, error in ERRORS.items():
        items = load(Letters(), ["a", "b", key, "c"], workers=workers)
        assert [next(items), next(items)] == ["a", "b"]
        with pytest.raises(type(error)) as raised:
            next(items)
        assert str(raised.value) == str(error)
    with pytest.raises(SampleError, match=r"^sample '17': no caption$"):
        list(load(Stream(), workers=workers))
    with pytest.raises(KeyError, match="nowhere" if workers == 0 else "Original Traceback"):
        list(load(Letters(), ["bug"], workers=workers))
    assert not multiprocessing.active_children()


def test_processes_that_wait_end_together() -> None:
    start = time.monotonic()
    with closing(load(Letters(), ["a", *["wait"] * 9], workers=2, ahead=1)) as items:
        assert next(items) == "a"
        assert len(multiprocessing.active_children()) == 2
    assert not multiprocessing.active_children()
    assert time.monotonic() - start < 8, "one after the other takes 10 s and leaves them alive"


def test_a_program_ends_although_a_traceback_holds_the_loader(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(
        "import sys\nfrom test_loading import Letters, load\n"
        "items = load(Letters(), ['a', *['wait'] * 9], workers=2)\nnext(items)\nsys.exit(7)\n"
    )
    path = f"import sys, runpy; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}; runpy.run_path({str(script)!r})"
    ended = subprocess.run([sys.executable, "-c", path], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (7, "")


def test_training_without_pictures_says_so_once_and_ends(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    tiny_experiment["datasets"]["colours"]["images"] = str(tmp_path / "empty")
    tiny_experiment["datasets"]["colours"]["annotations"] = str(pictured(tiny_experiment, tmp_path))
    tiny_experiment["run"] |= {"num_workers": 2, "mix": "sample"}
    result = run_train(write_yaml(tmp_path / "x.yaml", tiny_experiment), timeout=60)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    (message,) = result.stderr.strip().splitlines()
    assert message.startswith("DatasetError: 24 bad samples in a row, the last: sample 'r")


def pictured(experiment: dict[str, Any], folder: Path) -> Path:
    """The training records that have a picture."""
    records = json.loads(Path(experiment["datasets"]["colours"]["annotations"]["train"]).read_text())
    file = folder / "pictured.json"
    file.write_text(json.dumps([record for record in records if "image" in record]))
    return file


def test_ctrl_c_does_not_wait_for_a_server_that_never_answers(tiny_experiment: dict[str, Any], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        tiny_experiment["datasets"] = {"laion": {"storage": f"{address}/{{0..9}}.tar"}}
        tiny_experiment["run"] |= {"num_workers": 2, "max_steps": 4}
        config = write_yaml(tmp_path / "x.yaml", tiny_experiment)
        command = [sys.executable, str(ROOT / "train.py"), "--cfg-path", str(config)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        server.settimeout(60)
        open_calls = [server.accept() for _ in range(2)]
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=20)
        assert len(open_calls) == 2
    assert process.returncode == 130
    assert "stopped at step 0 of 4; the state is saved" in stderr and "Traceback" not in stderr
