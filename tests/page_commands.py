"""The commands of a page of the documentation, and how a test runs them."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path


def commands(page: str) -> list[list[str]]:
    """The lines of the page's shell blocks as words, continued lines joined and comments left out."""
    shell = "\n".join(re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)).replace("\\\n", " ")
    return [words for line in shell.splitlines() if (words := shlex.split(line, comments=True))]


def run(words: list[str], folder: Path, env: dict[str, str], typed: str = "", timeout: float = 300) -> str:
    """Run a command of a page, on two processes where it says more; what it prints is returned.

    A server is stopped once it says where its page is; ``typed`` is what a terminal is told.
    """
    head, rest = words[0], words[1:]
    if head == "torchrun":
        rest[rest.index("--nproc-per-node") + 1] = "2"
        rest.insert(0, "--standalone")
    module = {"minivlm": ["-m", "minivlm.cli"], "torchrun": ["-m", "torch.distributed.run"], "python": []}[head]
    process = subprocess.Popen(
        [sys.executable, *module, *rest],
        cwd=folder,
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = ""
    assert process.stdin and process.stdout
    process.stdin.write(typed)
    process.stdin.close()
    for line in process.stdout:
        said += line
        if "the page is at" in line:
            process.send_signal(signal.SIGINT)
    code = process.wait(timeout=timeout)
    assert code == 0, f"{' '.join(words)}\n{said}"
    return said
