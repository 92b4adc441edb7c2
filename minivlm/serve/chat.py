"""A conversation with a model: pictures are encoded once, answers can be streamed."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from minivlm.processors.sharing import content_key
from minivlm.types import IMAGE_TOKEN_ID, Batch, Message, SampleError

if TYPE_CHECKING:
    import torch

    from minivlm.models.vlm import VisionLanguageModel
    from minivlm.processors.processor import VLMProcessor

log = logging.getLogger(__name__)

_POLL = 0.1
"""Seconds between looks at whether an answer that waits for the model is still wanted."""


@dataclass
class _State:
    """What was said, and the visual tokens [n, T, D] of the pictures shown so far, with a hash of each."""

    messages: list[Message] = field(default_factory=list)
    visual: torch.Tensor | None = None
    keys: list[bytes] = field(default_factory=list)

    @property
    def num_images(self) -> int:
        return len(self.keys)

    @property
    def rows(self) -> Sequence[torch.Tensor]:
        return () if self.visual is None else self.visual.unbind()


@dataclass
class _Turn:
    """A question on its way: the conversation it belongs to, the prompt, and how to answer it."""

    state: _State
    messages: list[Message]
    batch: Batch
    options: dict[str, Any]
    visual: torch.Tensor | None = None
    keys: list[bytes] = field(default_factory=list)
    cancelled: threading.Event = field(default_factory=threading.Event)


class Chat:
    """One conversation.

    ``temperature`` 0 is greedy; above it answers are sampled, with ``top_k`` and then ``top_p``, also with beams. A
    conversation longer than ``max_length`` tokens (default: what processor and model take) is an error; with
    ``on_overflow: cut_left`` its oldest tokens are left out instead, so that ``max_new_tokens`` fit, as MiniGPT-4
    does. Several chats may share a model if they share ``lock``, which is held while the model works. A
    question that fails, is broken off, or is answered with nothing leaves the conversation as it was. A picture
    that was shown in this conversation or the one before is not encoded again.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        processor: VLMProcessor,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        num_beams: int = 1,
        top_k: int = 50,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
        no_repeat_ngram_size: int = 0,
        length_penalty: float = 1.0,
        min_new_tokens: int | None = None,
        max_length: int | None = None,
        on_overflow: str = "error",
        lock: threading.Lock | None = None,
    ):
        self.model = model
        self.processor = processor
        self.max_length = max_length
        self.on_overflow = on_overflow
        self.options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "num_beams": num_beams,
            "top_k": top_k,
            "top_p": top_p,
            "repetition_penalty": repetition_penalty,
            "no_repeat_ngram_size": no_repeat_ngram_size,
            "length_penalty": length_penalty,
            "min_new_tokens": min_new_tokens,
        }
        self.num_tokens = 0
        """Tokens of the last answer."""
        self.seconds = 0.0
        """What they took, with the pictures and the prompt."""
        self._pictures = getattr(processor, "pictures", "take")  # a user's own may not know of models that see nothing
        self._lock = lock or threading.Lock()
        self._state = _State()
        self._before = _State()

    @property
    def messages(self) -> list[Message]:
        """The conversation so far (a copy), ``<image>`` where a picture stands."""
        return list(self._state.messages)

    @property
    def num_images(self) -> int:
        """Number of pictures shown so far."""
        return self._state.num_images

    @property
    def sees(self) -> bool:
        """Whether the model takes pictures; a language model alone does not."""
        return self._pictures == "take"

    def reset(self) -> None:
        """Begin a new conversation; an answer on its way stays without effect."""
        if self._state.num_images:
            self._before = self._state
        self._state = _State()
        self.num_tokens, self.seconds = 0, 0.0

    def ask(self, text: str, images: Sequence[Any] = (), **options: Any) -> str:
        """The whole answer to a question; ``images`` are new pictures (paths or PIL), as many as new markers.

        Without a marker ``<image>`` in the text the pictures stand in front of it. ``options`` go before
        those of the chat; any that transformers' ``generate`` knows is allowed. Raises :class:`SampleError`
        for an unreadable picture, a wrong number of markers, or a conversation that has become too long.
        """
        turn = self._prepare(text, images, options)
        return self._keep(turn, self._generate(turn))

    def stream(self, text: str, images: Sequence[Any] = (), **options: Any) -> Iterator[str]:
        """As :meth:`ask`, but yields the growing text of the answer; the last item is the whole.

        Closing the iterator stops the model. With beams there is only the whole answer, since the best beam
        is known at the end.
        """
        turn = self._prepare(text, images, options)
        items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        worker = threading.Thread(target=self._work, args=(turn, items), name="minivlm-answer", daemon=True)
        worker.start()
        try:
            ids: list[int] = []
            shown = ""
            while isinstance(item := items.get(), list):
                ids += item
                text = self.processor.decode_partial(ids)
                if text != shown:
                    shown = text
                    yield shown
            if isinstance(item, BaseException):
                raise item
            answer = self._keep(turn, item)
            if answer != shown or not shown:
                yield answer
        finally:
            turn.cancelled.set()
            worker.join()

    def _prepare(self, text: str, images: Sequence[Any], options: dict[str, Any]) -> _Turn:
        """Everything that can go wrong before the model is needed."""
        state = self._state
        text = self.processor.template.with_images(text, len(images))
        question = Message("user", text)
        if self._pictures == "drop":
            question, images = self.processor.template.without_images(question), ()
        messages = [*state.messages, question]
        batch = self.processor.prompt(messages, images, encoded_images=state.num_images, any_length=True)
        settings = self.options | options
        limit, used = self.context_length(), batch.input_ids.shape[1]
        if self.on_overflow == "cut_left":
            settings["keep_last"] = self._room(batch, limit - settings["max_new_tokens"])
            return _Turn(state, messages, batch, settings)
        if used >= limit:
            count = state.num_images + batch.num_images
            reason = f"the conversation has {used} tokens{self.processor.describe_pictures(count)}"
            advice = "begin a new conversation" + (", with fewer pictures" if count > 1 else "")
            raise SampleError("prompt", f"{reason} and the model takes {limit}; {advice}")
        settings["max_new_tokens"] = min(settings["max_new_tokens"], limit - used)
        return _Turn(state, messages, batch, settings)

    def _room(self, batch: Batch, room: int) -> int | None:
        """How many of the last tokens fit, or None if all do; warns when parts of a picture are lost."""
        if room < 1:
            raise SampleError("prompt", "max_new_tokens leaves no room for the conversation; lower it")
        if batch.input_ids.shape[1] <= room:
            return None
        lost = int((batch.input_ids[:, :-room] == IMAGE_TOKEN_ID).sum())
        if lost:
            log.warning(
                "the conversation is too long: its beginning is left out, and with it %d visual tokens; the model no "
                "longer sees the whole picture. Begin a new conversation.",
                lost,
            )
        return room

    def context_length(self) -> int:
        """The smallest limit of the processor, the chat and the model."""
        hf: Any = getattr(getattr(self.model.language_model, "model", None), "config", None)
        text = hf.get_text_config() if hasattr(hf, "get_text_config") else hf
        own = getattr(text, "max_position_embeddings", None)
        limits = [self.processor.config.max_length, self.max_length, own]
        return min(limit for limit in limits if isinstance(limit, int) and limit > 0)

    def _work(self, turn: _Turn, items: queue.SimpleQueue[Any]) -> None:
        """The thread behind :meth:`stream`: lists of new ids, then the answer or what went wrong."""
        streamer = _Streamer(items) if turn.options["num_beams"] == 1 else None
        try:
            items.put(self._generate(turn, streamer))
        except BaseException as error:  # it belongs to the caller's thread
            items.put(error)

    def _generate(self, turn: _Turn, streamer: _Streamer | None = None) -> str:
        import torch
        from transformers import StoppingCriteriaList

        options = self.processor.generation_options() | sampling_options(turn.options)
        options["stopping_criteria"] = StoppingCriteriaList([_Cancelled(turn.cancelled)])
        if streamer is not None:
            options["streamer"] = streamer
        while not self._lock.acquire(timeout=_POLL):
            if turn.cancelled.is_set():
                return ""
        try:
            start = time.perf_counter()
            with torch.inference_mode():
                turn.visual = self._encode(turn)
                ids = self.model.generate(turn.batch.to(self.model.device), visual=turn.visual, **options).cpu()
            self.num_tokens, self.seconds = ids.shape[1], time.perf_counter() - start
        finally:
            self._lock.release()
        return self.processor.decode(ids)[0]

    def _encode(self, turn: _Turn) -> torch.Tensor | None:
        """Visual tokens of the whole conversation; only what was not shown before goes through the encoder."""
        import torch

        batch, state = turn.batch, turn.state
        if not batch.num_images:
            turn.keys = state.keys
            return state.visual
        distinct = [_key(batch.pictures([number])) for number in range(batch.num_distinct)]
        known = {key: row for each in (self._before, state) for key, row in zip(each.keys, each.rows)}
        new = [number for number, key in enumerate(distinct) if key not in known]
        if new:
            with self.model.as_trained():
                encoded = self.model.encode_images(batch.pictures(new).to(self.model.device))
            known |= zip((distinct[number] for number in new), encoded)
        turn.keys = state.keys + [distinct[number] for number in batch.image_index or range(len(distinct))]
        return torch.stack([known[key] for key in turn.keys])

    def _keep(self, turn: _Turn, answer: str) -> str:
        # Templates refuse a turn without text, so an empty answer would end the conversation for good.
        if answer:
            turn.state.messages = [*turn.messages, Message("assistant", answer)]
            turn.state.visual, turn.state.keys = turn.visual, turn.keys
        return answer


def _key(picture: Batch) -> bytes:
    return content_key([*picture.pixels.values(), *([] if picture.features is None else [picture.features])])


class _Streamer:
    """Passes new ids on; transformers calls ``put`` and ``end``."""

    def __init__(self, items: queue.SimpleQueue[Any]):
        self._items = items
        self._prompt = True

    def put(self, ids: torch.Tensor) -> None:
        # The first call holds the prompt, which is empty where the prompt is embeddings.
        if not self._prompt:
            self._items.put(ids.reshape(-1).tolist())
        self._prompt = False

    def end(self) -> None:
        """The answer itself follows, nothing to do."""


class _Cancelled:
    """A stopping criterion of transformers: nobody waits for the answer any more."""

    def __init__(self, event: threading.Event):
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids.new_full((len(input_ids),), self._event.is_set()).bool()


def sampling_options(options: dict[str, Any]) -> dict[str, Any]:
    """The chat's options as transformers wants them: only those that have an effect."""
    without_effect = {"repetition_penalty": 1.0, "length_penalty": 1.0, "min_new_tokens": None, "keep_last": None}
    without_effect["no_repeat_ngram_size"] = 0
    if options["num_beams"] == 1:
        without_effect["length_penalty"] = options["length_penalty"]
    options = {key: value for key, value in options.items() if without_effect.get(key, ...) != value}
    temperature, top_k, top_p = (options.pop(key) for key in ("temperature", "top_k", "top_p"))
    if temperature > 0:
        sampling = {"temperature": float(temperature), "top_k": int(top_k), "top_p": float(top_p)}
        return options | {"do_sample": True} | sampling
    return options | {"do_sample": False}
