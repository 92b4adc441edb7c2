"""How long a user waits for the first sign of life: the import, the list, the answer to a typo.

python benchmarks/startup.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 5


def seconds(command: list[str]) -> float:
    """The best of several runs."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=False)
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Print the seconds of each command, and those of a Python that does nothing."""
    with tempfile.TemporaryDirectory() as folder:
        typo = Path(folder) / "typo.yaml"
        typo.write_text("run: {inti_lr: 1e-3}\n")
        commands = {
            "python, nothing": ["-c", ""],
            "import minivlm": ["-c", "import minivlm"],
            "minivlm list": ["-m", "minivlm.cli", "list"],
            "answer to a typo": ["-m", "minivlm.cli", "train", "--cfg-path", str(typo)],
        }
        for name, arguments in commands.items():
            print(f"{name:<18} {seconds([sys.executable, *arguments]):.2f} s")


if __name__ == "__main__":
    main()
