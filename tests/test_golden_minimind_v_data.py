"""MiniMind-V's pictures, prompts, ids and masks, v1 and the newest, as the original made them.

The original's tokenizers are no part of the project. Where ``$MINIVLM_GOLDEN/minimind_v_tokenizers`` is there, ids
and labels are compared one by one; otherwise, with a tokenizer made here that has the same special tokens, what is
compared are the texts, and of the stored ids the special tokens and placeholders with their masks.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import ROOT
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from minivlm import registry
from minivlm.datasets.configs import LlavaJsonConfig
from minivlm.datasets.llava_json import LlavaJsonBuilder, messages_of
from minivlm.models.vision.hf import picture_settings
from minivlm.processors.chat_template import to_jinja
from minivlm.processors.configs import ImageConfig, ProcessorConfig, TemplateConfig
from minivlm.processors.image import ImageTransform, open_image
from minivlm.processors.processor import VLMProcessor
from minivlm.processors.template import ImageSlot, Template, Text
from minivlm.processors.tokenizer import load_tokenizer
from minivlm.types import IGNORE_INDEX, IMAGE_TOKEN_ID, Encoded, Message, Sample, SampleError

DEFAULT = ROOT / "tests" / "golden"
FOLDER = Path(os.environ.get("MINIVLM_GOLDEN", DEFAULT))
GOLDEN, TOKENIZERS = FOLDER / "minimind_v", FOLDER / "minimind_v_tokenizers"
SPECIAL = {
    "v1": ["<unk>", "<s>", "</s>"],
    "head": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<unused_{n}>" for n in range(3, 12)), "<|image_pad|>"],
}
"""Special tokens in the order of their ids."""
PICTURE: list[Any] = [GOLDEN / "images" / "img_exact.png"]
DROPPED_QUESTION = ("p3",)
"""A last question without an answer: the original drops it, here it stays, unsupervised."""


def tokenizers_of(generation: str) -> list[bool]:
    """Whether to take the real tokenizer: not, and so where it is there."""
    return [False, True] if (TOKENIZERS / generation).is_dir() else [False]


@cache
def tensors(generation: str) -> dict[str, Tensor]:
    """The tensors that are expected of a generation."""
    return load_file(GOLDEN / generation / "expected.safetensors")


@cache
def expected(generation: str) -> dict[str, Any]:
    """The numbers and texts that are expected of a generation."""
    found: dict[str, Any] = load_json(GOLDEN / generation / "expected.json")
    return found


def load_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def template(name: str, **changes: Any) -> Template:
    written = yaml.safe_load(registry.get("template", name).read_text(encoding="utf-8"))
    return Template(TemplateConfig(**(written | changes)))


@cache
def own_tokenizer(generation: str) -> Any:
    """Bytes and the special tokens of a generation."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = SPECIAL[generation]
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special), special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator([], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=special[1], eos_token=special[2])


def tokenizer(generation: str, real: bool) -> Any:
    return load_tokenizer(str(TOKENIZERS / generation)) if real else own_tokenizer(generation)


def original(generation: str) -> dict[str, Any]:
    """The original's settings."""
    files = sorted(file for file in (GOLDEN / generation).glob("*_config.json") if "vision" not in file.stem)
    found: dict[str, Any] = load_json(files[0])  # in which all models of a generation agree
    return found


def greedy(generation: str) -> list[dict[str, Any]]:
    """The prompts about pictures of all models of a generation; another set than the default copy may have none."""
    cases = [case for key, named in expected(generation).items() if key.endswith("/greedy") for case in named.values()]
    assert cases or FOLDER != DEFAULT
    return cases


def placeholder_ids(generation: str) -> list[int]:
    """What the original has for a picture: 25 x `<` and 25 x `>`, or 64 x one token."""
    settings = original(generation)
    return list(settings["image_ids"]) * settings.get("image_token_len", 1)


def form_of(generation: str, **changes: Any) -> Template:
    """The template of a generation, with the set's number of positions for a picture."""
    settings = original(generation)
    placeholder = {settings["image_special_token"]: settings.get("image_token_len", 1)}
    return template({"v1": "minimind_v1", "head": "minimind_v3"}[generation], placeholder=placeholder, **changes)


def processor(generation: str, real: bool, form: Template, **settings: Any) -> VLMProcessor:
    """Of the pictures only the positions are made."""
    size = len(placeholder_ids(generation))
    return VLMProcessor(ProcessorConfig(**settings), form, tokenizer(generation, real), {}, size)


def theirs(ids: Sequence[int], generation: str) -> list[int]:
    """Our ids with the original's placeholders."""
    fill = placeholder_ids(generation)
    found = iter(range(len(ids)))
    return [fill[next(found) % len(fill)] if token == IMAGE_TOKEN_ID else token for token in ids]


def unpadded(row: Tensor) -> list[int]:
    """A row without the zeros at its end."""
    ids = row.tolist()
    while ids and ids[-1] == 0:
        ids.pop()
    return ids


def skeleton(ids: Iterable[int], flags: Iterable[bool], marks: set[int]) -> list[tuple[int, bool]]:
    """Special tokens and placeholders with whether they are supervised."""
    return [(token, flag) for token, flag in zip(ids, flags, strict=True) if token in marks]


def check(encoded: Encoded, ids: list[int], flags: list[bool], generation: str, real: bool, full: bool) -> None:
    """Compare with a stored row; ``full`` says that the row was cut at its end."""
    supervised = [label != IGNORE_INDEX for label in encoded.labels]
    if real:
        assert (theirs(encoded.input_ids, generation), supervised) == (ids, flags), encoded.sample_id
        return
    marks = (1, 2, IMAGE_TOKEN_ID)  # the ids of all else are another tokenizer's
    ours = theirs([token if token in marks else -1 for token in encoded.input_ids], generation)
    bare, stored = (
        skeleton(*each, {1, 2, *placeholder_ids(generation)}) for each in ((ours, supervised), (ids, flags))
    )
    assert (bare[: len(stored)] if full else bare) == stored, encoded.sample_id


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "kind", "alpha"), [("v1", "eval", "drop"), ("v1", "dataset", "weigh"), ("head", "eval", "drop")]
)
def test_golden_minimind_v_pixels(generation: str, kind: str, alpha: str) -> None:
    raw = load_json(GOLDEN / generation / "preprocessor.json")
    size = raw["size"].get("height") or raw["crop_size"]["height"]
    # v1 resizes to a square before CLIP's own processor, which then has nothing left to cut off
    transform = ImageTransform(ImageConfig(size=size, resize="squash", alpha=alpha), picture_settings(raw))
    compared = 0
    for picture in sorted((GOLDEN / "images").iterdir()):
        golden = tensors(generation).get(f"pixels_{kind}/{picture.name}")
        if golden is None:
            continue
        pixels = transform(open_image(picture, keep_alpha=alpha == "weigh"))
        step = size // golden.shape[-1]
        torch.testing.assert_close(pixels[:, ::step, ::step], golden, rtol=0, atol=1e-4)
        stats = tensors(generation)[f"pixels_eval_stats/{picture.name}"]
        if kind == "eval":
            found = torch.stack([pixels.mean(), pixels.std(), pixels.abs().sum()]).to(stats)
            torch.testing.assert_close(found, stats, rtol=1e-4, atol=1e-4)
        compared += 1
    assert compared


def test_golden_minimind_v_alpha_matters() -> None:
    """A picture with an alpha ramp has other pixels where the resize weighs by it."""
    picture = GOLDEN / "images" / "img_rgba.png"
    one, other = tensors("v1")[f"pixels_eval/{picture.name}"], tensors("v1")[f"pixels_dataset/{picture.name}"]
    assert (one - other).abs().max() > 0.01
    transforms = {"image": ImageTransform(ImageConfig(size=224, alpha="weigh"), {"mean": [0.0] * 3, "std": [1.0] * 3})}
    made = VLMProcessor(ProcessorConfig(), form_of("v1"), own_tokenizer("v1"), transforms, 1)
    weighed = made.load_pixels(picture)["image"]
    made.transforms["image"].alpha = "drop"
    assert weighed.shape == (3, 224, 224) and (weighed - made.load_pixels(picture)["image"]).abs().max() > 0.01


# --- v1 -------------------------------------------------------------------------------------------------------------


def v1_samples(split: str, **settings: Any) -> list[Sample]:
    path = GOLDEN / "v1" / f"{split}.json"
    config = LlavaJsonConfig(annotations=str(path), images=str(GOLDEN / "images"), **settings)
    return list(LlavaJsonBuilder(config, split).build("train"))


@pytest.mark.parametrize("real", tokenizers_of("v1"))
@pytest.mark.parametrize("split", ["pretrain", "sft"])
def test_golden_minimind_v_v1_ids_and_masks(split: str, real: bool) -> None:
    stored = tensors("v1")
    rows = zip(*(stored[f"{split}/{name}"] for name in ("X", "Y", "loss_mask")), strict=True)
    length = original("v1")["max_seq_len"] if real else 10**6
    made = processor("v1", real, form_of("v1", supervise="last"), max_length=length)
    for sample, (x, y, mask) in zip(v1_samples(split, max_turns=1 if split == "sft" else None), rows, strict=True):
        full = bool(y[-1] != 0)
        ids = unpadded(torch.cat([x[:1], y]))
        flags = [False, *(bool(flag) for flag in mask)][: len(ids)]
        encoded = made.encode(sample)
        if sample.id in DROPPED_QUESTION:
            behind = [token for token in encoded.input_ids if token != IMAGE_TOKEN_ID]
            assert made.tokenizer.decode(behind).endswith(f"<s>user\n{sample.messages[-1].content}</s>\n")
            sample.messages.pop()
            encoded = made.encode(sample)
        check(encoded, ids, flags, "v1", real, full)


def test_golden_minimind_v_v1_learns_every_answer_by_default() -> None:
    """The original's mask covers the last answer alone, which is the option `supervise: last`."""
    made = processor("v1", False, form_of("v1"), max_length=10**6)
    several = [s for s in v1_samples("pretrain") if sum(m.role == "assistant" for m in s.messages) > 1]
    assert several
    for sample in several:
        answers = "".join(f"\n{m.content}</s>\n" for m in sample.messages if m.role == "assistant")
        labels = [label for label in made.encode(sample).labels if label != IGNORE_INDEX]
        assert made.tokenizer.decode(labels) == answers


def test_golden_minimind_v_v1_a_prompt_without_room_for_its_answer_is_refused() -> None:
    """The original then trains on nearly the whole prompt."""
    sample = v1_samples("pretrain")[0]
    short = len(placeholder_ids("v1")) + 60
    made = processor("v1", False, form_of("v1"), max_length=short)
    with pytest.raises(SampleError, match="nothing is supervised"):
        made.encode(sample)


@pytest.mark.parametrize("real", tokenizers_of("v1"))
def test_golden_minimind_v_v1_prompts(real: bool) -> None:
    form = form_of("v1")
    made = processor("v1", real, form)
    for golden in greedy("v1"):
        text = golden["prompt_text"].split("user\n", 1)[1].split("</s>", 1)[0]  # holds the placeholder
        encoded = made.prompt_sample(Sample("p", [Message("user", text)], PICTURE), chat=True)
        again = form.render([Message("user", text), Message("assistant", None)], chat=True)
        assert as_text(again, form.config) == golden["prompt_text"]
        flags = [False] * len(golden["prompt_ids"])
        check(encoded, golden["prompt_ids"], flags, "v1", real, full=True)


def as_text(segments: Iterable[Any], config: TemplateConfig) -> str:
    fill = "".join(piece * count for piece, count in config.placeholder.items())
    return "".join(s.text if isinstance(s, Text) else fill for s in segments if isinstance(s, (Text, ImageSlot)))


@pytest.mark.parametrize("real", tokenizers_of("v1"))
def test_golden_minimind_v_v1_a_blank_in_front_of_a_picture_is_harmless(real: bool) -> None:
    """In the original's text it melts with the first `<`, and the picture is not found."""
    made = processor("v1", real, form_of("v1"))
    sample = Sample("s", [Message("user", "Look: <image>"), Message("assistant", "ok")], PICTURE)
    assert made.encode(sample).input_ids.count(IMAGE_TOKEN_ID) == len(placeholder_ids("v1"))


# --- the newest -----------------------------------------------------------------------------------------------------


def head_samples() -> list[tuple[dict[str, Any], Sample, dict[str, Any]]]:
    """Expected prompts with the samples of their rows; a system text drawn by the original is written in."""
    rows = load_json(GOLDEN / "head" / "conversations.json")
    found = []
    for number, golden in enumerate(expected("head")["samples"]):
        row = rows[golden["row"]]
        messages = messages_of(row["conversations"])
        system = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n", golden["prompt"], re.DOTALL)
        if system and messages[0].role != "system":
            messages.insert(0, Message("system", system[1]))
        share = {"think_share": float("<think>\n\n</think>" in golden["prompt"]), "system_share": 0.0}
        found.append(
            (golden, Sample(str(number), messages, [GOLDEN / "images" / name for name in row["images"]]), share)
        )
    return found


@pytest.mark.parametrize("real", tokenizers_of("head"))
def test_golden_minimind_v_head_prompts_ids_and_labels(real: bool) -> None:
    stored = tensors("head")
    length = expected("head")["max_length"]
    samples = head_samples()
    assert len(samples) == len(stored["input_ids"])
    for (golden, sample, share), ids, labels in zip(samples, stored["input_ids"], stored["labels"], strict=True):
        form = form_of("head", **share)
        segments = form.render(sample.messages, draw=random.Random(0))
        assert as_text(segments, form.config) == golden["prompt"]
        learned = "".join(s.text for s in segments if isinstance(s, Text) and s.supervised)
        answers = re.findall(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>\n)", golden["prompt"], re.DOTALL)
        assert learned == "".join(answers)
        made = processor("head", real, form, max_length=length if real else 10**6)
        row = unpadded(ids)
        flags = [label != IGNORE_INDEX for label in labels.tolist()][: len(row)]
        check(made.encode(sample, seed=0), row, flags, "head", real, full=len(row) == length)


@pytest.mark.parametrize("real", tokenizers_of("head"))
def test_golden_minimind_v_head_generation_prompt(real: bool) -> None:
    form = form_of("head")
    for golden in greedy("head"):
        if golden.get("prompt_text") is None:
            continue
        text = golden["prompt_text"].split("user\n", 1)[1].split("<|im_end|>", 1)[0]
        messages = [Message("user", text)]
        segments = form.render([*messages, Message("assistant", None)], chat=True)
        assert as_text(segments, form.config) == golden["prompt_text"]
        encoded = processor("head", real, form).prompt_sample(Sample("p", messages, PICTURE), chat=True)
        check(encoded, golden["prompt_ids"], [False] * len(golden["prompt_ids"]), "head", real, full=True)


@pytest.mark.parametrize("real", tokenizers_of("head"))
@pytest.mark.parametrize("opens", [False, True])
def test_golden_minimind_v_head_chat_template(opens: bool, real: bool) -> None:
    """Prompts with thoughts and tools are those of a chat template: ours in Jinja, or the original's own."""
    tokens = tokenizer("head", real)
    tool = {"name": "look", "description": "Schaut näher hin", "parameters": {"x": {"type": "number"}}}
    talks: list[list[dict[str, Any]]] = [
        [{"role": "user", "content": "a"}],
        [{"role": "system", "content": "sys", "functions": [tool, tool]}, {"role": "user", "content": "a"}],
        [{"role": "user", "content": "a", "functions": json.dumps([tool])}],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "\nb", "reasoning_content": "because\nof"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\nd"},
            {"role": "user", "content": "e"},
        ],
    ]
    form = form_of("head", think_open=opens)
    for turns in talks:
        messages = messages_of(turns)
        if real:
            own, tools = turns, [tool] * json.dumps(turns).count("parameters") or None
            options: dict[str, Any] = {"tools": tools, "open_thinking": opens}
        else:
            own, options = [vars(message) for message in messages], {"chat_template": to_jinja(form.chat_config)}
        golden = tokens.apply_chat_template(own, tokenize=False, add_generation_prompt=True, **options)
        segments = form.render([*messages, Message("assistant", None)], chat=True)
        assert as_text(segments, form.config) == golden
