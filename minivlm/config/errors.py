"""What is wrong with a config: a list of problems, each with its place, and the error that carries it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One fault: the file as the user named it, its line where there is one, the key, and what is wrong."""

    file: str
    line: int | None
    key: str
    message: str

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        return ": ".join(part for part in (where, self.key, self.message) if part)


class ConfigError(Exception):
    """A config that cannot be used; the text lists all of its problems, one a line, file by file."""

    def __init__(self, problems: Iterable[Problem]):
        # Stages share sections, so the same fault can be found once per stage.
        unique = list(dict.fromkeys(problems))
        files = list(dict.fromkeys(problem.file for problem in unique))
        files.sort(key=lambda name: name.startswith("--"))  # --options come last
        self.problems: list[Problem] = sorted(unique, key=lambda p: (files.index(p.file), p.line or 0))
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)
