"""The visual half of Mini-Gemini's checkpoints (Li et al. 2024), later named MGM: both encoders, mining, projector."""

from __future__ import annotations

from minivlm.checkpoints import llava
from minivlm.checkpoints.foreign import Rule

_MINING = {"query": "query", "aux": "key", "val": "value"}
VISUAL = (
    *llava.tower("vision_encoder.low.model."),
    Rule("vision_tower_aux.vision_stem.*", "vision_encoder.high.stem.*"),
    Rule("vision_tower_aux.vision_stages.*", "vision_encoder.high.stages.*"),
    *(Rule(f"vlm_uni_{theirs}_projector.*", f"connector.{ours}.*") for theirs, ours in _MINING.items()),
    *llava.projector("connector.projector."),
)
"""Behind ``model.`` in a whole checkpoint; behind nothing or a prefix in a projector's."""
