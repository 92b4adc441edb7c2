"""The conversation in a terminal."""

from __future__ import annotations

import builtins
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from minivlm.config.experiment import DemoConfig
from minivlm.serve.assistant import Assistant, Tools
from minivlm.serve.image_generation import save_picture
from minivlm.types import SampleError

if TYPE_CHECKING:
    from PIL.Image import Image

    from minivlm.serve.assistant import Reply
    from minivlm.serve.chat import Chat

_COMMANDS = """\
  /help         this list
  /quit         leave (as do Ctrl-D, and Ctrl-C while nothing is being answered)
  anything else is a question; Ctrl-C breaks off an answer"""
HELP = f"""\
  /image PATH   talk about a picture, from the beginning (several paths: several pictures)
  /reset        begin again with the same picture
{_COMMANDS}"""
TEXT_HELP = f"""\
  /reset        begin again
{_COMMANDS}"""
"""Of a model that takes no pictures."""
TAKES_NONE = "this model has no vision encoder: it takes no pictures"
QUESTION = "you: "
ANSWER = "model: "
_DIM = "\x1b[2m{}\x1b[0m"


def run_terminal(
    chat: Chat,
    demo: DemoConfig,
    images: Sequence[Any] = (),
    *,
    tools: Tools | None = None,
    input: Callable[[str], str] = builtins.input,
    output: TextIO | None = None,
) -> None:
    """Read questions and commands until the end of the input, and write answers as they come.

    ``images`` are the pictures (PIL) that the first conversation is about.
    ``input`` is called with the prompt, as Python's own; EOFError and KeyboardInterrupt end the conversation.
    ``output`` is standard output by default. With ``tools`` the text in pictures is read, and pictures are written to
    ``demo.generated_image``.
    """
    session = _Terminal(Assistant(chat, tools), Path(demo.generated_image), output or sys.stdout)
    session.say(f"{demo.title}\n{session.help}")
    if demo.examples:
        session.say("  for example: " + " | ".join(demo.examples))
    if images and not session.chat.sees:
        session.say(TAKES_NONE)
    elif images:
        session.begin(list(images))
    while True:
        try:
            line = input(QUESTION).strip()
        except (EOFError, KeyboardInterrupt):
            session.say("\nbye")
            return
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            session.say("bye")
            return
        if line:
            session.handle(command, rest.strip(), line)


class _Terminal:
    """The chat and the pictures that it is about; those it draws go to ``target``."""

    def __init__(self, chat: Assistant, target: Path, output: TextIO):
        self.chat = chat
        self.target = target
        self.output = output
        self.images: list[Any] = []
        self.help = HELP if chat.sees else TEXT_HELP

    def say(self, text: str, end: str = "\n") -> None:
        self.output.write(text + end)
        self.output.flush()

    def handle(self, command: str, rest: str, line: str) -> None:
        """One line that is neither empty nor the end."""
        if command == "/help":
            self.say(self.help)
        elif command == "/reset":
            self.chat.reset()
            self.say("a new conversation" + (" about the same picture" if self.images else ""))
        elif command == "/image":
            self.show(rest)
        elif command.startswith("/") and not Path(line).exists():
            self.say(f"unknown command {command}; /help lists the commands")
        elif command.startswith("/"):
            self.say(f"to talk about that picture: /image {line}")
        else:
            self.answer(line)

    def show(self, text: str) -> None:
        """New pictures and with them a new conversation; one that cannot be read changes nothing."""
        from minivlm.processors.image import open_image

        if not self.chat.sees:
            self.say(TAKES_NONE)
            return
        if not text:
            self.say("which picture? /image PATH")
            return
        try:
            images = [open_image(path) for path in _paths(text)]
        except (OSError, ValueError) as error:
            self.say(str(error))
            return
        self.begin(images)

    def begin(self, images: list[Any]) -> None:
        """A new conversation about these pictures."""
        self.images = images
        self.chat.reset()
        sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
        self.say(f"a new conversation about {'this picture' if len(images) == 1 else 'these pictures'} ({sizes})")
        if self.chat.tools.ocr is not None:
            found = self.chat.tools.ocr.text(images)
            self.say(f"OCR Token: {found}" if found else "(no text in it)")

    def answer(self, question: str) -> None:
        """Stream one answer; an error is told and the conversation goes on."""
        # Pictures go with the first question that was answered; the chat keeps them from then on.
        images = [] if self.chat.num_images else self.images
        if not self.images and not self.chat.messages and self.chat.sees:
            self.say("(no picture yet: /image PATH)")
        self.say(ANSWER, end="")
        before = len(self.chat.messages)
        try:
            with closing(self.chat.stream(question, images)) as stream:  # type: ignore[type-var]
                self.write_growing(stream)
        except KeyboardInterrupt:
            kept = len(self.chat.messages) > before
            self.say(" ... broken off; " + ("there is no picture" if kept else "the question was taken back"))
        except SampleError as error:
            self.say(f"(no answer) {error.reason}")

    def write_growing(self, stream: Iterator[Reply]) -> None:
        """Write what every text adds to the one before, and what becomes of the picture."""
        shown = noted = ""
        is_terminal = self.output.isatty()  # a file needs no more than the beginning and the end of the drawing
        for reply in stream:
            text = reply.text
            if not text.startswith(shown):  # the tokenizer has changed its mind about a character
                self.say(f"\n{ANSWER}", end="")
                shown = ""
            self.say(text[len(shown) :], end="")
            shown = text
            if reply.note and not (reply.growing and noted and not is_terminal):
                self.say(("\r" if reply.growing and noted else "\n") + f"({reply.note})", end="")
                noted = reply.note
            if reply.picture is not None:
                self.write_picture(reply.picture)
        self.say("" if shown else "(the model answered with nothing; the question was taken back)")
        if shown and (speed := self.chat.speed):
            self.say((_DIM if is_terminal else "{}").format(f"({speed})"))

    def write_picture(self, picture: Image) -> None:
        """Into a file of its own; where that cannot be written, into the folder for temporary files."""
        where = f"({picture.width} x {picture.height})"
        try:
            self.say(f"\npicture: {save_picture(picture, self.target)} {where}", end="")
        except OSError as error:
            self.say(f"\n({error})", end="")
            try:
                file = save_picture(picture, Path(tempfile.gettempdir()) / self.target.name)
                self.say(f"\npicture: {file} {where}", end="")
            except OSError:
                self.say("\n(nor to the folder for temporary files)", end="")


def _paths(text: str) -> list[Path]:
    """The paths of a line: one that exists as it stands, else words quoted as in a shell.

    A ValueError says that quotes do not match.
    """
    whole = Path(text).expanduser()
    if whole.is_file():
        return [whole]
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"cannot understand {text}: {error}") from error
    paths = [Path(word).expanduser() for word in words]
    # A missing file whose name has blanks is better named as it was typed.
    return paths if len(paths) == 1 or any(path.is_file() for path in paths) else [whole]
