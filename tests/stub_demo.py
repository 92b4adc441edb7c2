"""A demo page whose model is a stand-in that gives known answers: ``python tests/stub_demo.py PAGE [PIPELINE]``.

With the folder of a pipeline it reads text and draws pictures, too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from minivlm.config.experiment import DemoConfig
from minivlm.serve.assistant import Tools
from minivlm.serve.web import launch
from minivlm.types import Message

ANSWERS = {
    "[detection] wheel": "<p>wheel</p> {<15><60><35><90>}<delim>{<65><60><85><90>}",
    "[grounding] describe this image in detail": (
        "<p>a red cart</p> {<10><30><90><75>} stands on <p>two wheels</p> {<15><60><35><90>}<delim>{<65><60><85><90>}"
        " beside <p>the sun</p> {<75><2><97><27>}"
    ),
    "[refer] the sun": "{<75><2><97><27>}",
    "draw a cat <GEN>": "Here is a cat in the snow. <h> a photo of a cat in the snow, 4k </h>",
    "[refer] nonsense": "<p>bad</p> {<90><10><20><300>} <p>open {<1><2> {<6><5><5><5>} <b onclick=alert(1)>x</b>",
}
"""What the model says to a question; to any other it says what it was asked."""


class StubChat:
    """What the page asks of a :class:`~minivlm.serve.chat.Chat`."""

    sees = True

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.num_images = 0

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]

    def stream(self, text: str, images: Sequence[Any] = (), **options: Any) -> Iterator[str]:
        answer = ANSWERS.get(text, f"I was asked: {text}")
        words = answer.split(" ")
        for count in range(1, len(words) + 1):
            yield " ".join(words[:count])
        self.messages += [Message("user", text), Message("assistant", answer)]
        self.num_images += len(images)


if __name__ == "__main__":
    examples = ["[grounding] describe this image in detail", "[detection] wheel"]
    config = DemoConfig(title="Stand-in", page=sys.argv[1], examples=examples)
    if len(sys.argv) > 2:
        config = replace(config, ocr=True, generation=True, image_generator=sys.argv[2], image_steps=2, image_size=64)
    launch(StubChat, config, tools=Tools.of(config))  # type: ignore[arg-type]
