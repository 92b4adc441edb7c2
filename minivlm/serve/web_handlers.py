"""What happens on the demo page: sessions, questions, pictures. The layout is in ``web.py``."""

from __future__ import annotations

import html
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image

from minivlm.datasets.boxes import parse_boxes
from minivlm.processors.image import image_hash
from minivlm.serve.assistant import Assistant, Reply, Tools
from minivlm.serve.boxes import coloured, draw_boxes, preview
from minivlm.types import IMAGE_MARKER, SampleError

if TYPE_CHECKING:
    from minivlm.serve.chat import Chat

MAX_QUESTION = 4000
"""Characters of a question that the page takes."""
MAX_MEGAPIXELS = 80
"""A small file can hold a huge picture; decoded, one of this size takes 240 MB."""
_TAG = re.compile(r"^\s*\[\w+\]\s*")
UNREADABLE = "This file cannot be read as a picture. PNG, JPEG, WebP and GIF work."


@dataclass
class Task:
    """A shortcut of the page of MiniGPT-v2: the identifier that begins a question, and a usual question."""

    name: str
    tag: str
    question: str = ""


TASKS = (
    Task("No Tag", ""),
    Task("Grounding", "[grounding] ", "describe this image in detail"),
    Task("Refer", "[refer] "),
    Task("Detection", "[detection] "),
    Task("Identify", "[identify] ", "what is this"),
    Task("VQA", "[vqa] "),
)


@dataclass
class Session:
    """What belongs to one open page: its conversation and the picture that it is about.

    ``picture`` is the key of the picture, ``image`` the picture on which boxes are drawn and ``drawn`` the file for
    every text with boxes, and for every generated picture (by the number of its question). ``round`` counts the
    beginnings; an answer that was asked for in an earlier round is not shown any more.
    """

    chat: Assistant
    picture: str | None = None
    image: Image.Image | None = None
    drawn: dict[str | int, str] = field(default_factory=dict)
    round: int = 0

    def begin(self) -> None:
        """Begin anew about the picture."""
        self.chat.reset()
        self.drawn.clear()
        self.round += 1


class Handlers:
    """The events of the page; every function gets the session and gives it back.

    All conversations share ``tools``. With ``grounding``, boxes in the conversation are drawn on the picture. A model
    that does not see (``sees``) is asked without one.
    """

    def __init__(
        self,
        chat_factory: Callable[[], Chat],
        tools: Tools | None = None,
        *,
        grounding: bool = False,
        sees: bool = True,
    ):
        self.sees = sees
        self.chat_factory = chat_factory
        self.tools = tools or Tools()
        self.grounding = grounding

    def change_picture(self, picture: Any, session: Session | None) -> tuple[Any, ...]:
        """A picture was uploaded, pasted or removed -> (conversation, session)."""
        if isinstance(picture, OSError):
            raise gr.Error(str(picture), print_exception=False)  # drop_picture follows
        session = self._session(session, picture)
        return self._shown(session), session

    def drop_picture(self, session: Session | None) -> tuple[Any, ...]:
        """The upload cannot be read -> (picture, conversation, session)."""
        return None, [], self._session(session, None)

    def restart(self, session: Session | None) -> tuple[Any, ...]:
        """-> (conversation, question, session); the picture stays."""
        if session is not None:
            session.begin()
        return [], "", session

    def show(self, session: Session | None) -> list[dict[str, Any]]:
        """-> the conversation as it is."""
        return [] if session is None else self._shown(session)

    def ask(
        self,
        question: str,
        picture: Any,
        beams: float,
        temperature: float,
        session: Session | None,
        ocr: bool = True,
        generate: bool = False,
    ) -> Iterator[tuple[Any, ...]]:
        """Stream an answer -> (conversation, question, session); a picture to generate needs none to look at."""
        question = (question or "").strip()
        # What began without a picture goes on without one.
        talking = session is not None and session.picture is None and session.chat.exchanges
        if problem := _problem(question, picture, needs_picture=self.sees and not generate and not talking) or (
            _task_problem(question) if self.grounding else ""
        ):
            _warn(problem)
            yield gr.skip(), gr.skip(), session
            return
        session = self._session(session, picture)
        before, this_round = self._shown(session), session.round
        asked = [*before, self._message(session, "user", question)]
        yield asked, "", session
        images = [] if session.chat.num_images or picture is None else [picture]
        options = {"num_beams": int(beams), "temperature": float(temperature)}
        reply = Reply("")
        try:
            with closing(  # type: ignore[type-var]
                session.chat.stream(question, images, ocr=bool(ocr), generate=bool(generate), **options)
            ) as stream:
                for reply in stream:
                    if session.round != this_round:
                        return
                    if reply.growing:
                        shown = self._message(session, "assistant", _with_note(reply), whole=False)
                        yield [*asked, shown], gr.skip(), session
            problem = "" if reply.text else "The model answered with nothing."
        except SampleError as error:
            problem = f"No answer: {error.reason}"
        except Exception as error:  # the page must survive, and the operator must see what it was
            traceback.print_exc()
            problem = f"The model failed: {type(error).__name__}: {error}"
        if session.round != this_round:
            return
        if problem:
            # The question goes back into its box, since the conversation does not have it.
            _warn(problem)
            yield before, question, session
        else:
            yield self._shown(session), gr.skip(), session

    def _session(self, session: Session | None, picture: Any) -> Session:
        """The session, begun anew if the picture is not the one it is about."""
        session = session or Session(Assistant(self.chat_factory(), self.tools))
        key = None if picture is None else image_hash(picture)
        if key != session.picture:
            session.picture = key
            session.image = None if picture is None or not self.grounding else preview(picture)
            session.begin()
        return session

    def _shown(self, session: Session) -> list[dict[str, Any]]:
        """The conversation as the page shows it; the picture stands beside it."""
        messages = []
        for number, exchange in enumerate(session.chat.exchanges):
            messages.append(self._message(session, "user", exchange.question.replace(IMAGE_MARKER, "").strip()))
            picture = exchange.reply.picture
            if picture is not None and number not in session.drawn:
                session.drawn[number] = _saved(picture)
            generated = session.drawn.get(number, "")
            messages.append(self._message(session, "assistant", _with_note(exchange.reply), generated=generated))
        return messages

    def _message(
        self, session: Session, role: str, text: str, *, whole: bool = True, generated: str = ""
    ) -> dict[str, Any]:
        """One message, letter by letter: gradio would render HTML in it, and so fetch pictures from anywhere.

        With grounding, the boxes of a ``whole`` text are drawn on a picture below it. ``generated`` is the file of the
        picture that the answer asked for.
        """
        content: list[Any] = [coloured(text) if self.grounding else html.escape(text, quote=False)]
        if self.grounding and whole and (file := self._drawn(session, text)):
            content.append({"path": file, "alt_text": "the picture with the boxes of this message"})
        if generated:
            content.append({"path": generated, "alt_text": "the picture that was generated"})
        return {"role": role, "content": content if self.grounding or generated else content[0]}

    def _drawn(self, session: Session, text: str) -> str:
        """The file of the picture with the boxes of a text; empty without any."""
        if text not in session.drawn:
            drawn = None if session.image is None else draw_boxes(session.image, text)
            session.drawn[text] = "" if drawn is None else save_pil_to_cache(drawn, get_upload_folder())
        return session.drawn[text]


def choose_task(task: Task, question: str) -> str:
    """The question under a task: what was typed stays, else the task's usual question is offered."""
    typed = _TAG.sub("", question or "")
    if any(typed.strip() == other.question for other in TASKS):
        typed = task.question
    return task.tag + typed


def guard_upload(picture: gr.Image) -> gr.Image:
    """Make an upload safe: what cannot be read arrives as an OSError, and no address is fetched.

    This is done to the instance, since gradio writes a .pyi file beside the source of every subclass.
    """
    preprocess, move = picture.preprocess, picture.async_move_resource_to_block_cache

    def read(payload: Any) -> Any:
        try:
            return _too_large(payload) or preprocess(payload)
        except (OSError, SyntaxError, ValueError, gr.Error, Image.DecompressionBombError):
            return OSError(UNREADABLE)

    async def keep(file: Any) -> str | None:
        # gradio would fetch an address that a forged request names in the place of an uploaded file.
        if "://" in str(file):
            raise gr.Error("Pictures have to be uploaded.", print_exception=False)
        return await move(file)

    picture.preprocess = read
    picture.async_move_resource_to_block_cache = keep
    return picture


def _too_large(payload: Any) -> OSError | None:
    """What is wrong with the size of an upload; raises OSError if it is no picture, or no uploaded file."""
    if payload is None:
        return None
    if payload.path is None or (payload.url or "").startswith("data:"):
        raise OSError("no uploaded file")
    with Image.open(payload.path) as opened:  # reads the head only
        megapixels = opened.width * opened.height / 1e6
    if megapixels <= MAX_MEGAPIXELS:
        return None
    return OSError(f"This picture has {megapixels:.0f} megapixels; at most {MAX_MEGAPIXELS} are taken.")


def _saved(picture: Image.Image) -> str:
    """The file of a generated picture; empty, and told, where it cannot be written."""
    try:
        return save_pil_to_cache(picture, get_upload_folder(), format="png")
    except OSError as error:
        _warn(f"The picture cannot be kept: {error.strerror or error}.")
        return ""


def _with_note(reply: Reply) -> str:
    return f"{reply.text}\n({reply.note})" if reply.note else reply.text


def _problem(question: str, picture: Any, needs_picture: bool) -> str:
    """Why a question cannot be asked, or nothing."""
    if not question:
        return "Type a question first."
    if picture is None and needs_picture:
        return "Upload a picture first."
    if isinstance(picture, OSError):
        return str(picture)
    if len(question) > MAX_QUESTION:
        return f"The question is too long: {len(question)} characters, at most {MAX_QUESTION}."
    return ""


def _task_problem(question: str) -> str:
    """What a question with a task identifier lacks, or nothing."""
    if not _TAG.sub("", question):
        return "Type what to look for behind the task."
    if question.startswith("[identify]") and not parse_boxes(question):
        return "Drag over the picture to mark what to identify."
    return ""


def _warn(text: str) -> None:
    gr.Warning(html.escape(text, quote=False))
