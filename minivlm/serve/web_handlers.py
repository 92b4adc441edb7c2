"""What happens on the demo page: sessions, questions, pictures. The layout is in ``web.py``."""

from __future__ import annotations

import html
import traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from minivlm.processors.image import image_hash
from minivlm.types import IMAGE_MARKER, SampleError

if TYPE_CHECKING:
    from minivlm.serve.chat import Chat

MAX_QUESTION = 4000
"""Characters of a question that the page takes."""
MAX_MEGAPIXELS = 80
"""A small file can hold a huge picture; decoded, one of this size takes 240 MB."""
UNREADABLE = "This file cannot be read as a picture. PNG, JPEG, WebP and GIF work."


@dataclass
class Session:
    """What belongs to one open page: its conversation and the key of the picture that it is about.

    ``round`` counts the beginnings; an answer that was asked for in an earlier round is not shown any more.
    """

    chat: Chat
    picture: str | None = None
    round: int = 0

    def begin(self, picture: str | None) -> None:
        """Begin anew, about another picture or the same."""
        self.chat.reset()
        self.picture = picture
        self.round += 1


class Handlers:
    """The events of the page; every function gets the session and gives it back."""

    def __init__(self, chat_factory: Callable[[], Chat]):
        self.chat_factory = chat_factory

    def change_picture(self, picture: Any, session: Session | None) -> tuple[Any, ...]:
        """A picture was uploaded, pasted or removed -> (conversation, session)."""
        if isinstance(picture, OSError):
            raise gr.Error(str(picture), print_exception=False)  # drop_picture follows
        session = self._session(session, picture)
        return _shown(session.chat), session

    def drop_picture(self, session: Session | None) -> tuple[Any, ...]:
        """The upload cannot be read -> (picture, conversation, session)."""
        return None, [], self._session(session, None)

    def restart(self, session: Session | None) -> tuple[Any, ...]:
        """-> (conversation, question, session); the picture stays."""
        if session is not None:
            session.begin(session.picture)
        return [], "", session

    def ask(
        self, question: str, picture: Any, beams: float, temperature: float, session: Session | None
    ) -> Iterator[tuple[Any, ...]]:
        """Stream an answer -> (conversation, question, session)."""
        question = (question or "").strip()
        if problem := _problem(question, picture):
            _warn(problem)
            yield gr.skip(), gr.skip(), session
            return
        session = self._session(session, picture)
        before, this_round = _shown(session.chat), session.round
        asked = [*before, _message("user", question)]
        yield asked, "", session
        images = [] if session.chat.num_images else [picture]
        options = {"num_beams": int(beams), "temperature": float(temperature)}
        answer = ""
        try:
            with closing(session.chat.stream(question, images, **options)) as stream:  # type: ignore[type-var]
                for answer in stream:
                    if session.round != this_round:
                        return
                    yield [*asked, _message("assistant", answer)], gr.skip(), session
            problem = "" if answer else "The model answered with nothing."
        except SampleError as error:
            problem = f"No answer: {error.reason}"
        except Exception as error:  # the page must survive, and the operator must see what it was
            traceback.print_exc()
            problem = f"The model failed: {type(error).__name__}: {error}"
        if problem and session.round == this_round:
            # The question goes back into its box, since the conversation does not have it.
            _warn(problem)
            yield before, question, session

    def _session(self, session: Session | None, picture: Any) -> Session:
        """The session, begun anew if the picture is not the one it is about."""
        session = session or Session(self.chat_factory())
        key = None if picture is None else image_hash(picture)
        if key != session.picture:
            session.begin(key)
        return session


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


def _problem(question: str, picture: Any) -> str:
    """Why a question cannot be asked, or nothing."""
    if not question:
        return "Type a question first."
    if picture is None:
        return "Upload a picture first."
    if isinstance(picture, OSError):
        return str(picture)
    if len(question) > MAX_QUESTION:
        return f"The question is too long: {len(question)} characters, at most {MAX_QUESTION}."
    return ""


def _shown(chat: Chat) -> list[dict[str, str]]:
    """The conversation as the page shows it; the picture stands beside it."""
    return [_message(m.role, (m.content or "").replace(IMAGE_MARKER, "").strip()) for m in chat.messages]


def _message(role: str, text: str) -> dict[str, str]:
    """One message, letter by letter: gradio would render HTML in it, and so fetch pictures from anywhere."""
    return {"role": role, "content": html.escape(text, quote=False)}


def _warn(text: str) -> None:
    gr.Warning(html.escape(text, quote=False))
