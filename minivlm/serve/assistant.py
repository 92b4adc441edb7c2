"""A chat with its tools: text read in pictures is added to questions, prompts in answers become pictures."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minivlm.config.experiment import DemoConfig
from minivlm.serve.image_generation import GENERATE, GenerationError, ImageGenerator, picture_prompt, readable
from minivlm.serve.ocr import OCR
from minivlm.types import Message

if TYPE_CHECKING:
    from PIL.Image import Image

    from minivlm.serve.chat import Chat

_BROKEN_OFF = "no picture: broken off"
_CUT = "no picture: the answer ended within its prompt; raise demo.max_new_tokens (--max-new-tokens)"


@dataclass(frozen=True)
class Tools:
    """What all conversations of a program share; None is not used."""

    ocr: OCR | None = None
    generator: ImageGenerator | None = None

    @classmethod
    def of(cls, demo: DemoConfig) -> Tools:
        """The tools that section ``demo`` asks for; nothing is loaded. Raises ServeError without their packages."""
        generator = ImageGenerator(
            demo.image_generator,
            negative_prompt=demo.negative_prompt,
            steps=demo.image_steps,
            size=demo.image_size,
            seed=demo.image_seed,
            device=demo.image_device or "cpu",
        )
        return cls(OCR(demo.ocr_confidence) if demo.ocr else None, generator if demo.generation else None)


@dataclass(frozen=True)
class Reply:
    """An answer as the user sees it, the picture that belongs to it, and what is to be said about the picture.

    More follows while it is ``growing``.
    """

    text: str
    picture: Image | None = None
    note: str = ""
    growing: bool = False


@dataclass
class Exchange:
    """A question as it was typed, and its reply."""

    question: str
    reply: Reply


@dataclass
class _State:
    exchanges: list[Exchange] = field(default_factory=list)
    pictures: list[Any] = field(default_factory=list)


class Assistant:
    """A conversation of :class:`Chat` with ``tools``.

    What the model is asked is the question, the text in all pictures shown so far, and ``<GEN>`` for a picture, in
    the order of Mini-Gemini's command line and in every turn (MGM, inference).
    """

    def __init__(self, chat: Chat, tools: Tools | None = None):
        self.chat = chat
        self.tools = tools or Tools()
        self._state = _State()

    @property
    def exchanges(self) -> list[Exchange]:
        """The conversation so far (a copy) as the user sees it."""
        return list(self._state.exchanges)

    @property
    def messages(self) -> list[Message]:
        """The conversation so far (a copy) as the model sees it."""
        return self.chat.messages

    @property
    def num_images(self) -> int:
        """Number of pictures shown so far."""
        return self.chat.num_images

    @property
    def sees(self) -> bool:
        """Whether the model takes pictures."""
        return self.chat.sees

    def reset(self) -> None:
        """Begin a new conversation; an answer on its way stays without effect."""
        self.chat.reset()
        self._state = _State()

    def ask(self, question: str, images: Sequence[Any] = (), **options: Any) -> Reply:
        """The whole reply at once, with the arguments of :meth:`stream`; empty where the model has said nothing."""
        return [Reply(""), *self.stream(question, images, **options)][-1]

    def stream(
        self, question: str, images: Sequence[Any] = (), *, ocr: bool = True, generate: bool = True, **options: Any
    ) -> Iterator[Reply]:
        """The growing reply; the last one is the whole. The arguments are those of :meth:`Chat.stream`.

        ``ocr`` and ``generate`` leave a tool unused for this question. A failed picture leaves the answer, with a
        note. Closing the iterator stops the model, or the drawing.
        """
        state = self._state
        pictures = [*state.pictures, *images]
        reader = self.tools.ocr if ocr else None
        generator = self.tools.generator if generate else None
        asked = question + (_reference(reader, pictures) if reader else "") + (GENERATE if generator else "")
        answer = ""
        with closing(self.chat.stream(asked, images, **options)) as stream:  # type: ignore[type-var]
            for answer in stream:
                yield Reply(readable(answer, growing=True) if generator else answer, growing=True)
        if not answer:
            return  # the chat has not kept it either
        reply = Reply(readable(answer) if generator else answer)
        exchange = Exchange(question, reply)
        state.exchanges.append(exchange)
        state.pictures = pictures
        if generator and (prompt := picture_prompt(answer)):
            exchange.reply = Reply(reply.text, note=_BROKEN_OFF)
            for drawn in _draw(generator, prompt, reply.text):
                if not drawn.growing:
                    exchange.reply = drawn
                yield drawn
            return
        if generator and "<h>" in answer and "</h>" not in answer:
            exchange.reply = Reply(reply.text, note=_CUT)
        yield exchange.reply


def _reference(reader: OCR, pictures: Sequence[Any]) -> str:
    try:
        return reader.reference(pictures)
    except OSError:
        return ""  # the chat says what is wrong with the picture


class _Stopped(BaseException):
    """Nobody waits for the picture any more."""


def _draw(generator: ImageGenerator, prompt: str, text: str) -> Iterator[Reply]:
    """How far the picture is, then the picture, or why there is none."""
    replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
    unwanted = threading.Event()

    def progress(step: int, steps: int) -> None:
        if unwanted.is_set():
            raise _Stopped
        replies.put(Reply(text, note=f"drawing the picture: step {step} of {steps}", growing=True))

    def work() -> None:
        try:
            replies.put(Reply(text, generator.draw(prompt, progress)))
        except GenerationError as error:
            replies.put(Reply(text, note=f"no picture: {error}"))
        except _Stopped:
            pass

    threading.Thread(target=work, name="minivlm-picture", daemon=True).start()
    try:
        yield Reply(text, note="drawing the picture", growing=True)
        while True:
            reply = replies.get()
            yield reply
            if not reply.growing:
                return
    finally:
        unwanted.set()  # seen at its next step, for which nobody has to wait
