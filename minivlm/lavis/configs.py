"""Settings that every part which LAVIS provides has in common (free of torch, as all schemas)."""

from __future__ import annotations

from dataclasses import dataclass

from minivlm.schema import setting


@dataclass(kw_only=True)
class LavisEnvironment:
    """How the process with LAVIS is started; parts with equal settings share one process."""

    python: str | None = setting(
        None, local=True, help="interpreter of the environment with LAVIS; default: `$MINIVLM_LAVIS_PYTHON`"
    )
    folder: str | None = setting(
        None,
        local=True,
        help="working folder of LAVIS; a folder `bert-base-uncased` in it stands for the one of the hub",
    )
    setup: str | None = setting(
        None, local=True, help="Python file that is run there once LAVIS is imported, e.g. to register own parts"
    )
    timeout: float = setting(
        1800, gt=0, local=True, help="seconds that one answer may take; the first may load or download weights"
    )
