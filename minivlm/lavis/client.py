"""minivlm's side of LAVIS: starts the process, checks its versions, asks and waits.

A request says everything that it needs, so a process can be replaced at any time: after an error, or in the
worker of a DataLoader, which starts one of its own with the first request.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivlm.lavis import server
from minivlm.lavis.configs import LavisEnvironment

if TYPE_CHECKING:
    import numpy as np

PYTHON_VARIABLE = "MINIVLM_LAVIS_PYTHON"
START_SECONDS = 60.0
ACCEPTED: dict[str, tuple[str, ...]] = {
    "salesforce-lavis": ("1.0.",),
    "transformers": ("4.25.", "4.26."),
    "timm": ("0.4.12",),
    "fairscale": ("0.4.",),
    "torch": ("",),
    "numpy": ("",),
}
"""How the versions begin that LAVIS 1.0.2 works with (its own pins; any numpy, torch from ``MIN_TORCH`` on)."""
MIN_TORCH = (2, 6)
"""Before, code in a file of weights could run in spite of ``weights_only`` (CVE-2025-32434)."""
HOW_TO = f"""\
LAVIS needs an environment of its own. In the folder of minivlm's repository:
  python3.11 -m venv .venv-lavis
  .venv-lavis/bin/pip install -r requirements-lavis.txt
  .venv-lavis/bin/pip install --no-deps salesforce-lavis==1.0.2
Then name its interpreter, .venv-lavis/bin/python, by `python:` or by {PYTHON_VARIABLE}."""

Arrays = dict[str, "np.ndarray[Any, Any]"]


class LavisError(ValueError):
    """LAVIS's environment is missing or wrong, its process ended, or LAVIS refused a request."""


def request(
    environment: LavisEnvironment, command: str, arrays: Arrays | None = None, **fields: Any
) -> tuple[dict[str, Any], Arrays]:
    """Send a command of :mod:`minivlm.lavis.server` and return the answer's header and arrays.

    Raises :class:`LavisError` with what LAVIS said.
    """
    return connect(environment).request({"command": command, **fields}, arrays, environment.timeout)


def connect(environment: LavisEnvironment) -> LavisProcess:
    """The running process of an environment, started if there is none in this process of ours."""
    command = [find_python(environment.python), str(Path(server.__file__).resolve())]
    if environment.setup is not None:
        setup = absolute(environment.setup)
        if not Path(setup).is_file():
            raise LavisError(f"LAVIS: there is no file {setup} (`setup`)")
        command.append(setup)
    folder = absolute(environment.folder) if environment.folder else os.getcwd()
    if not Path(folder).is_dir():
        raise LavisError(f"LAVIS: there is no folder {folder} (`folder`)")
    key = (os.getpid(), folder, *command)  # a forked worker must not use its parent's pipe
    with _lock:
        if key not in _running or _running[key].closed:
            _running[key] = LavisProcess(command, folder)
        return _running[key]


def find_python(python: str | None) -> str:
    """Absolute path of the interpreter that the settings or the environment name."""
    named = python or os.environ.get(PYTHON_VARIABLE)
    if not named:
        raise LavisError(f"no interpreter with LAVIS is named (`python:` or {PYTHON_VARIABLE})\n{HOW_TO}")
    found = shutil.which(os.path.expanduser(named))
    if found is None:
        raise LavisError(f"there is no interpreter {named}\n{HOW_TO}")
    return os.path.abspath(found)  # not resolved: the link of a virtual environment is what makes it one


def absolute(path: str) -> str:
    """A path as the other process, which may work in another folder, can use it."""
    return os.path.abspath(os.path.expanduser(path))


def wrong_versions(versions: Mapping[str, str | None]) -> list[str]:
    """What is wrong with the packages of an environment; empty if LAVIS can work with them."""
    problems = []
    for name, starts in ACCEPTED.items():
        version = versions.get(name)
        if version is None:
            problems.append(f"{name} is not installed")
        elif not version.startswith(starts):
            problems.append(f"{name} {version} is installed, needed {' or '.join(s.rstrip('.') for s in starts)}")
        elif name == "torch" and tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < MIN_TORCH:
            problems.append(
                f"torch {version} is installed, needed 2.6 or later, which runs no code from files of weights"
            )
    return problems


class LavisProcess:
    """One process with LAVIS; requests are answered in turn."""

    def __init__(self, command: list[str], folder: str):
        self.python = command[0]
        self.closed = False
        self._lock = threading.Lock()
        self._noise = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the process lives)
        # Paths for the packages of this interpreter would lead the other one astray.
        inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        try:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env={**inherited, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._noise,
                start_new_session=True,  # Ctrl-C in the terminal is not meant for it
            )
        except OSError as error:
            raise LavisError(f"{self.python} cannot be run: {error}\n{HOW_TO}") from error
        try:
            hello, _ = self._exchange(None, None, START_SECONDS)
        except LavisError as error:
            raise LavisError(f"{error}\n{HOW_TO}") from error
        self.versions: dict[str, str | None] = hello["versions"]
        problems = wrong_versions(self.versions)
        if problems:
            self.close()
            raise LavisError(f"the environment of {self.python} does not fit LAVIS: {'; '.join(problems)}\n{HOW_TO}")

    def request(
        self, header: dict[str, Any], arrays: Arrays | None, timeout: float | None
    ) -> tuple[dict[str, Any], Arrays]:
        """Send a request and wait for its answer; raises :class:`LavisError` with the other side's reason."""
        with self._lock:
            answer, found = self._exchange(header, arrays, timeout)
        if "error" in answer:
            prefix = "LAVIS failed with " if answer["traceback"] else ""
            raise LavisError("\n  ".join([prefix + answer["error"], *answer["traceback"]]))
        return answer, found

    def _exchange(
        self, header: dict[str, Any] | None, arrays: Arrays | None, timeout: float | None
    ) -> tuple[dict[str, Any], Arrays]:
        assert self._process.stdin is not None and self._process.stdout is not None
        expired = threading.Event()

        def end() -> None:
            expired.set()
            self._process.kill()

        timer = threading.Timer(timeout, end) if timeout else None
        try:
            if timer:
                timer.daemon = True
                timer.start()
            if header is not None:
                server.write_message(self._process.stdin, header, arrays)
            return server.read_message(self._process.stdout)
        except (OSError, EOFError, ValueError) as error:
            self.close(grace=1.0)  # a process whose pipe has ended is about to end, with a code that tells more
            raise LavisError(self._obituary(error, timeout if expired.is_set() else None)) from error
        except BaseException:  # Ctrl-C between request and answer: the next answer would be the wrong one
            self.close()
            raise
        finally:
            if timer:
                timer.cancel()

    def _obituary(self, error: Exception, expired: float | None) -> str:
        if expired:
            what = f"gave no answer for {expired:g} s (`timeout`)"
        elif isinstance(error, server.WireError):
            what = f"does not speak as minivlm's server does: {error}"
        else:
            code = self._process.returncode
            what = f"ended unexpectedly ({f'exit code {code}' if code >= 0 else f'signal {-code}'})"
        self._noise.seek(0)
        tail = self._noise.read().decode(errors="replace").strip().splitlines()[-12:]
        return "\n  ".join([f"the process of LAVIS ({self.python}) {what}", *tail])

    def close(self, grace: float = 0.0) -> None:
        """End the process, after ``grace`` seconds if it does not end by itself; closing twice is allowed."""
        self.closed = True
        try:
            self._process.wait(grace)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:  # what could not be sent
                pass


_running: dict[tuple[Any, ...], LavisProcess] = {}
_lock = threading.Lock()


@atexit.register
def close_all() -> None:
    """End every process that this one started."""
    for key, process in _running.items():
        if key[0] == os.getpid():
            process.close()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
