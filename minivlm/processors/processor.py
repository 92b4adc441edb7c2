"""The processor: a sample becomes ids, labels and pixels; ids become text again."""

from __future__ import annotations

import inspect
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from minivlm.processors.configs import ProcessorConfig
from minivlm.processors.image import ImageTransform, image_hash, open_image
from minivlm.processors.sharing import Picture, share_equal
from minivlm.processors.template import Segment, Template, TemplateError, count_slots, tokenize
from minivlm.types import (
    IGNORE_INDEX,
    IMAGE_MARKER,
    IMAGE_TOKEN_ID,
    Batch,
    Encoded,
    Message,
    Sample,
    SampleError,
)

if TYPE_CHECKING:
    import torch


class FeatureLookup(Protocol):
    """What the processor asks a feature cache."""

    def get(self, key: str) -> torch.Tensor | None:
        """Features [tokens, channels] of a picture, or None."""


class VLMProcessor:
    """Template, tokenizer and picture transforms of one model.

    ``transforms`` has one entry for every picture input of the encoder. ``feature_cache`` may be set; then
    pictures are neither decoded nor transformed, and one that it lacks makes its sample a bad one. ``pictures`` is
    another word than ``take`` for a model without an encoder: its setting ``pictures``.
    """

    pictures: str = "take"

    def __init__(
        self,
        config: ProcessorConfig,
        template: Template,
        tokenizer: Any,
        transforms: Mapping[str, ImageTransform],
        tokens_per_image: int,
    ):
        self.config = config
        self.template = template
        self.tokenizer = tokenizer
        self.transforms = dict(transforms)
        self.tokens_per_image = tokens_per_image
        self.feature_cache: FeatureLookup | None = None

    def encode(self, sample: Sample, seed: int | None = None) -> Encoded:
        """A sample as numbers; in training ``seed`` decides what is drawn at random (prompts, system texts, crops).

        Without it, the loss of an evaluation is wanted: pictures are not cropped, prompts drawn as by 0.

        Raises :class:`SampleError` for a bad picture, a wrong marker count, roles out of order, a sample
        with nothing supervised, or one that is too long.
        """
        messages = self._with_prompt(sample, seed or 0)
        encoded = self._encode(sample.id, messages, sample.images, chat=False, seed=seed)
        answered = encoded.num_supervised > 0
        self._limit(encoded)
        # LLaVA, whose way cut_right is, keeps a sample that has lost its answers.
        if not (answered and (encoded.num_supervised or self.config.on_overflow == "cut_right")):
            raise SampleError(sample.id, "nothing is supervised: no answer, or it was cut off")
        return encoded

    def prompt_sample(self, sample: Sample, *, chat: bool = False) -> Encoded:
        """The generation prompt of a sample: its messages with the last answer left open.

        ``chat`` selects the template's form for talking.
        """
        messages = self._with_prompt(sample, 0)
        if messages and messages[-1].role == "assistant":
            messages.pop()
        messages.append(Message("assistant", None))
        encoded = self._encode(sample.id, messages, sample.images, chat=chat)
        self._refuse_long(encoded)
        return encoded

    def prompt(
        self,
        messages: Sequence[Message | Mapping[str, str]],
        images: Sequence[Any] = (),
        *,
        chat: bool = True,
        encoded_images: int = 0,
        any_length: bool = False,
    ) -> Batch:
        """A generation prompt for a conversation as a batch of one.

        Messages may be ``{"role": ..., "content": ...}`` with ``<image>`` where a picture stands; ``chat``
        selects the template's form for talking. The first ``encoded_images`` markers belong to pictures whose
        visual tokens the caller has; ``images`` and the batch then hold only those that follow. Raises
        :class:`SampleError`, of more tokens than ``max_length`` only if the caller does not take ``any_length``.
        """
        turns = [m if isinstance(m, Message) else Message(m["role"], m["content"]) for m in messages]
        if not turns or turns[-1].content is not None:
            turns.append(Message("assistant", None))
        encoded = self._encode("prompt", turns, list(images), chat=chat, encoded_images=encoded_images)
        if not any_length:
            self._refuse_long(encoded)
        return self.collate([encoded], for_generation=True)

    def collate(self, samples: Sequence[Encoded], *, for_generation: bool = False) -> Batch:
        """Pad to the longest sample: on the right for training, on the left for generation.

        Raises ValueError if visual tokens and reserved positions differ.
        """
        import torch

        length = max(len(s.input_ids) for s in samples)
        pad_id = self.tokenizer.pad_token_id or 0
        ids = torch.full((len(samples), length), pad_id, dtype=torch.long)
        labels = torch.full((len(samples), length), IGNORE_INDEX, dtype=torch.long)
        mask = torch.zeros((len(samples), length), dtype=torch.long)
        for row, sample in enumerate(samples):
            count = len(sample.input_ids)
            if sample.input_ids.count(IMAGE_TOKEN_ID) != sum(sample.tokens_per_image):
                raise ValueError(f"sample '{sample.sample_id}': image positions and visual tokens differ")
            columns = slice(length - count, length) if for_generation else slice(0, count)
            ids[row, columns] = torch.tensor(sample.input_ids)
            labels[row, columns] = torch.tensor(sample.labels)
            mask[row, columns] = 1
        pixels, features, index = _stack_images(samples)
        sizes = [size for s in samples for size in s.tokens_per_image]
        return Batch(
            input_ids=ids,
            attention_mask=mask,
            labels=None if for_generation else labels,
            pixels=pixels,
            features=features,
            image_index=index,
            image_tokens=sizes if any(size != self.tokens_per_image for size in sizes) else None,
            padding_side="left" if for_generation else "right",
            sample_ids=[s.sample_id for s in samples],
            skipped=[error for s in samples for error in s.skipped],
        )

    def decode(self, ids: torch.Tensor) -> list[str]:
        """New ids [B, T] as text, cut at the end token and at the template's stop strings."""
        return [self._decode_row(row.tolist()) for row in ids]

    def decode_partial(self, ids: Sequence[int]) -> str:
        """What the ids of an unfinished answer say for sure.

        A character whose bytes are not complete and a tail that could begin a stop string are held back, so
        the text only grows while ids follow.
        """
        text = self._cut(list(ids)).rstrip("\ufffd")
        starts = (stop[:size] for stop in self.template.stop for size in range(len(stop) - 1, 0, -1))
        held = max((len(start) for start in starts if text.endswith(start)), default=0)
        return text[: len(text) - held].strip()

    def _decode_row(self, ids: list[int]) -> str:
        return self._cut(ids).strip()

    def _cut(self, ids: list[int]) -> str:
        """The text in front of the first end token and the first stop string."""
        for end in (self.tokenizer.eos_token_id, self.tokenizer.pad_token_id):
            if end is not None and end in ids:
                ids = ids[: ids.index(end)]
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        for stop in self.template.stop:
            text = text.split(stop)[0]
        return text

    def generation_options(self) -> dict[str, Any]:
        """End tokens and stop strings for ``model.generate``."""
        tokens = self.tokenizer.get_added_vocab()
        single = {tokens[s] for s in self.template.stop if s in tokens} | {self.tokenizer.eos_token_id} - {None}
        # What is no token of its own has several spellings in ids, so the text decides.
        strings = [s for s in self.template.stop if s not in tokens]
        options: dict[str, Any] = {"eos_token_id": sorted(single), "pad_token_id": self.tokenizer.pad_token_id}
        if strings:
            options |= {"stop_strings": strings, "tokenizer": self.tokenizer}
        return options

    def image_key(self, image: Any) -> str:
        """Key of a picture in the feature cache."""
        return image_hash(image)

    def load_pixels(self, image: Any, seed: str | None = None) -> dict[str, torch.Tensor]:
        """Every input of the encoder, [3, H, W] each, of one picture; ``seed`` as for :class:`ImageTransform`."""
        opened = open_image(image, keep_alpha=any(_weighs_alpha(each) for each in self.transforms.values()))
        return {
            name: transform(opened, seed) if _takes_seed(transform) else transform(opened)
            for name, transform in self.transforms.items()
        }

    def _with_prompt(self, sample: Sample, seed: int) -> list[Message]:
        """A picture that has only a caption gets a user turn: one of the prompts, or the bare picture."""
        messages = list(sample.messages)
        if not sample.images or len(messages) > 1 or any(m.role != "assistant" for m in messages):
            return messages
        prompts = self.config.prompts or [IMAGE_MARKER]
        text = random.Random(f"{seed}/{sample.id}").choice(prompts)
        return [Message("user", self.template.with_images(text, len(sample.images))), *messages]

    def _encode(
        self,
        sample_id: str,
        messages: Sequence[Message],
        images: Sequence[Any],
        *,
        chat: bool,
        encoded_images: int = 0,
        seed: int | None = None,
    ) -> Encoded:
        form = self.template.chat_config if chat else self.template.config
        pictures = encoded_images + len(images)
        if pictures and self.pictures == "refuse":
            raise SampleError(
                sample_id,
                "it has a picture, but the model has no vision encoder (model.vision_encoder: none); "
                "`pictures: drop` there leaves pictures out",
            )

        segments = self._segments(sample_id, messages, pictures, chat, seed)
        if pictures and self.pictures == "drop":
            messages, images, pictures = [self.template.without_images(each) for each in messages], (), 0
            segments = self._segments(sample_id, messages, pictures, chat, seed)
        sizes = [self.tokens_per_image] * pictures
        try:
            ids, labels = tokenize(segments, self.tokenizer, sizes, form.bos, form.eos)
        except TemplateError as error:
            raise SampleError(sample_id, str(error)) from error
        encoded = Encoded(ids, labels, tokens_per_image=sizes, sample_id=sample_id)
        try:
            self._add_images(encoded, images, seed)
        except OSError as error:
            raise SampleError(sample_id, str(error)) from error
        return encoded

    def _segments(
        self, sample_id: str, messages: Sequence[Message], pictures: int, chat: bool, seed: int | None
    ) -> list[Segment]:
        """The rendered messages, which must have a place for every picture."""
        draw = None if seed is None else random.Random(f"{seed}/{sample_id}/template")
        try:
            segments = self.template.render(messages, chat=chat, pictures=pictures, draw=draw)
        except TemplateError as error:
            raise SampleError(sample_id, str(error)) from error
        if count_slots(segments) != pictures:
            written = sum((message.content or "").count(IMAGE_MARKER) for message in messages)
            raise SampleError(sample_id, f"{written} {IMAGE_MARKER} markers in the text, but {pictures} pictures")
        return segments

    def _add_images(self, encoded: Encoded, images: Sequence[Any], seed: int | None) -> None:
        if self.feature_cache is not None and images:
            encoded.features = [self._cached(self.feature_cache, image) for image in images]
            return
        for number, image in enumerate(images):
            own = None if seed is None else f"{seed}/{encoded.sample_id}/{number}"
            for name, pixels in self.load_pixels(image, own).items():
                encoded.pixels.setdefault(name, []).append(pixels)

    def _cached(self, cache: FeatureLookup, image: Any) -> torch.Tensor:
        features = cache.get(self.image_key(image))
        if features is None:  # pixels instead would not go into one batch with features
            raise OSError(
                f"picture {image} is not in the feature cache: the file has changed or appeared since it was filled"
            )
        return features

    def _limit(self, encoded: Encoded) -> None:
        """Cut text behind the last picture, never a picture unless ``on_overflow`` says so."""
        if self.config.max_answer_tokens is not None:
            first = next((i for i, label in enumerate(encoded.labels) if label != IGNORE_INDEX), 0)
            self._shorten(encoded, first + self.config.max_answer_tokens)
        if self.config.on_overflow == "error":
            self._refuse_long(encoded)
        self._shorten(encoded, self.config.max_length)

    def _shorten(self, encoded: Encoded, limit: int) -> None:
        if self.config.on_overflow != "cut_right" and IMAGE_TOKEN_ID in encoded.input_ids[limit:]:
            self._refuse_long(encoded, limit)
        encoded.input_ids, encoded.labels = encoded.input_ids[:limit], encoded.labels[:limit]
        left = encoded.input_ids.count(IMAGE_TOKEN_ID)
        for number, size in enumerate(encoded.tokens_per_image):
            encoded.tokens_per_image[number] = min(size, left)
            left -= encoded.tokens_per_image[number]

    def _refuse_long(self, encoded: Encoded, limit: int | None = None) -> None:
        limit = limit or self.config.max_length
        if len(encoded.input_ids) > limit:
            raise SampleError(
                encoded.sample_id,
                f"{len(encoded.input_ids)} tokens{self.describe_pictures(len(encoded.tokens_per_image))} do not fit "
                f"into {limit}; shorten the text, use fewer pictures or raise model.processor.max_length",
            )

    def describe_pictures(self, count: int) -> str:
        """What so many pictures take, for messages."""
        each = self.tokens_per_image
        return f" ({count * each} of them visual, {each} a picture)" if count else ""


def _takes_seed(transform: Any) -> bool:
    """A user's own transform may have no use for one."""
    return "seed" in inspect.signature(transform).parameters


def _weighs_alpha(transform: Any) -> bool:
    return getattr(transform, "alpha", "drop") == "weigh"


def _stack_images(samples: Sequence[Encoded]) -> tuple[dict[str, torch.Tensor], torch.Tensor | None, list[int] | None]:
    """The distinct pictures of a batch, as pixels by input name or cached features, and which one each picture is."""
    import torch

    with_images = [s for s in samples if s.tokens_per_image]
    cached = all(s.features is not None for s in with_images)
    pictures: list[Picture] = []
    for sample in with_images:
        if cached:
            pictures += [{"features": features.float()} for features in sample.features or ()]
        else:
            pictures += [dict(zip(sample.pixels, each, strict=True)) for each in zip(*sample.pixels.values())]
    if not pictures:
        return {}, None, None
    unique, index = share_equal(pictures)
    stacked = {name: torch.stack([picture[name] for picture in unique]) for name in unique[0]}
    return ({}, stacked["features"], index) if cached else (stacked, None, index)
