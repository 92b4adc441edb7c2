"""What the golden tests count: comparisons with numbers of an original."""

from __future__ import annotations

from typing import Any

import torch


class Compared:
    """Comparisons with the golden numbers, counted; ``relative`` is the tolerance of floats beside the absolute one.

    It is eight steps of fp32 by default: processors sum in other orders, and features of 20 have steps of 2e-6.
    """

    def __init__(self, relative: float = 1e-6) -> None:
        self.count = 0
        self.relative = relative

    def close(
        self, ours: Any, golden: Any, tolerance: float = 1e-4, what: str = "", relative: float | None = None
    ) -> None:
        """Equal up to the tolerances; another set than the default copy may lack the numbers (None)."""
        if golden is not None:
            if relative is None:
                relative = self.relative if tolerance else 0.0
            ours, golden = (torch.as_tensor(each).detach().float() for each in (ours, golden))
            assert ours.shape == golden.shape, f"{what}: {tuple(ours.shape)} against {tuple(golden.shape)}"
            torch.testing.assert_close(ours, golden, rtol=relative, atol=tolerance, msg=lambda m: f"{what}: {m}")
            self.count += 1

    def equal(self, ours: Any, golden: Any) -> None:
        """Exactly equal."""
        assert ours == golden
        self.count += 1
