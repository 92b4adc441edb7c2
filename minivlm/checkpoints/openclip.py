"""OpenCLIP's files (Ilharco et al. 2021) with a ConvNeXt: its stem and stages; the text model stays behind."""

from __future__ import annotations

from minivlm.checkpoints.foreign import Format, Rule, Size

_TRUNK = "visual.trunk."

CONVNEXT = Format(
    "OpenCLIP with a ConvNeXt",
    "model.vision_encoder.weights",
    (_TRUNK + "stem.#.*", _TRUNK + "stages.#.blocks.#.*"),
    (
        Rule(_TRUNK + "stem.*", "vision_encoder.stem.*"),
        Rule(_TRUNK + "stages.*", "vision_encoder.stages.*"),
        Rule("visual.*", why="of the head, which is not used"),
        Rule("*", why="of the text model"),
    ),
    always=("vision_encoder.*",),
    sizes=tuple(
        Size(
            f"channels of stage {stage}",
            "model.vision_encoder.widths",
            f"vision_encoder.stages.{stage}.blocks.#.gamma",
            0,
        )
        for stage in range(4)
    ),
    base=True,
)
FORMATS = (CONVNEXT,)
