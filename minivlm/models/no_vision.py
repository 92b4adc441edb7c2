"""The parts of a model that sees nothing: a language model alone, trained and served like any other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from minivlm.models.base import Connector, ModelError, VisionEncoder
from minivlm.models.configs import NoConnectorConfig, NoVisionConfig


class NoVisionEncoder(VisionEncoder):
    """An encoder without inputs, tokens and parameters; ``pictures`` says what the processor does with a picture."""

    hidden_size = 0
    grid = (0, 0)
    num_tokens = 0
    image_settings: Mapping[str, Any] = {}

    def __init__(self, config: NoVisionConfig):
        super().__init__()
        self.pictures = config.pictures

    @property
    def inputs(self) -> Mapping[str, Mapping[str, Any]]:
        """None: there is nothing to open a picture for."""
        return {}

    def forward(self, pixels: Tensor) -> Tensor:
        """Raises :class:`ModelError`: no picture comes this far."""
        raise ModelError("model.vision_encoder: none takes no pictures")


class NoConnector(Connector):
    """Gives no visual tokens."""

    tokens_per_image = 0

    def __init__(self, config: NoConnectorConfig, encoder: VisionEncoder, output_size: int):
        super().__init__()

    def forward(self, features: Tensor) -> Tensor:
        """Raises :class:`ModelError`: there are no features."""
        raise ModelError("model.connector: none takes no features")
