"""Cleaning of captions."""

from __future__ import annotations

import re

from minivlm.processors.configs import BlipCaptionConfig


class BlipCaption:
    """Captions as BLIP and MiniGPT-4's first stage write them: lower case, few marks, at most so many words."""

    def __init__(self, config: BlipCaptionConfig):
        self.config = config

    def __call__(self, text: str) -> str:
        """The cleaned caption behind the prompt."""
        text = re.sub(r'[.!"()*#:;~]', " ", text.lower())
        text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
        return self.config.prompt + " ".join(text.split(" ")[: self.config.max_words])
