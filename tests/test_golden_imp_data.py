"""Imp's pictures, ids, labels, batches and orders of samples, as the original made them."""

# ruff: noqa: F401, F811  (`compared` is a fixture that comes from elsewhere)

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch
import yaml
from golden_imp import (
    GENERATIONS,
    GOLDEN,
    Compared,
    compared,
    golden_image,
    golden_json,
    golden_tensors,
)
from torch import Tensor

from minivlm import registry
from minivlm.datasets.configs import LlavaJsonConfig
from minivlm.datasets.grouping import group_by_length, group_by_modality, interleaved, longest_first
from minivlm.datasets.llava_json import LlavaJsonBuilder
from minivlm.datasets.training_set import TrainingSet
from minivlm.models.configs import HFVisionConfig
from minivlm.models.vision.hf import HFVisionEncoder
from minivlm.processors.configs import ImageConfig, ProcessorConfig, TemplateConfig
from minivlm.processors.image import ImageTransform, open_image
from minivlm.processors.processor import VLMProcessor
from minivlm.processors.template import Template, TemplateError, Text, count_slots, tokenize
from minivlm.processors.tokenizer import load_tokenizer
from minivlm.schema import Part
from minivlm.types import IGNORE_INDEX, IMAGE_MARKER, Message, Sample, SampleError

MODES = {"square": "squash", "pad": "pad", "crop": "crop"}
"""Imp's words for what becomes of a picture's shape, and ours."""
PICTURE_WORDS = {"v1": 729, "v15": 700}
"""What a picture counts in the lengths of the sampler."""
JOINS = {"v1": longest_first, "v15": interleaved}
NAMES = {"v1": "vicuna_v1"}
"""Templates that the original has a second time under another name."""
SUPERVISED_HERE = ("assistant_word_inside_text", "eos_string_inside_text", "endoftext_inside_text")
"""Samples that the original does not learn from, since a separator stands inside their text."""


SPECIAL = {"phi2": ["</s>"], "plain": [], "qwen2": ["<|im_end|>", "<|im_start|>"]}
"""Templates of expected_preprocess.json, and what Imp adds to the tokenizer for each: first the end token."""
PIXELS = [str(file.relative_to(GOLDEN)) for file in sorted(GOLDEN.rglob("expected_pixels*.safetensors"))]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def template(name: str) -> Template:
    return Template(TemplateConfig(**yaml.safe_load(registry.get("template", name).read_text())))


def tokenizer(*special: str) -> Any:
    """Imp's tokenizer; ``special`` are added as it adds them, the first one as the end token."""
    made = load_tokenizer(str(GOLDEN / "tokenizer"))
    if special:
        made.add_special_tokens({"eos_token": special[0]})
        made.add_special_tokens({"additional_special_tokens": list(special[1:])})
    return made


@cache
def image_settings() -> dict[str, Any]:
    """What the encoder says of its pictures."""
    with torch.device("meta"):
        return dict(HFVisionEncoder(HFVisionConfig(path=str(GOLDEN / "siglip-tiny"))).image_settings)


def processor(name: str = "phi2", *special: str, tokens_per_image: int = 1, **settings: Any) -> VLMProcessor:
    """With one position for a picture, ids are those of the original before it splices."""
    config = ProcessorConfig(Part("image", ImageConfig()), **settings)
    transforms = {"image": ImageTransform(ImageConfig(), image_settings())}
    return VLMProcessor(config, template(name), tokenizer(*special), transforms, tokens_per_image)


def samples(file: str) -> dict[str, Sample]:
    """The records of a file; one picture with several places is given once for each."""
    config = LlavaJsonConfig(annotations=str(GOLDEN / file), images=str(GOLDEN / "images"))
    found = {}
    for sample in LlavaJsonBuilder(config, file).build("train"):
        turns = sum(IMAGE_MARKER in (message.content or "") for message in sample.messages)
        sample.images = sample.images[:1] * turns
        found[sample.id] = sample
    return found


def check_ids(compared: Compared, sample: Sample, made: VLMProcessor, golden: dict[str, Any]) -> None:
    """Ids and labels of a sample, up to the exceptions."""
    if any(message.role == "assistant" and not message.content for message in sample.messages):
        with pytest.raises(SampleError, match=f"{sample.id}.*answer is empty"):
            made.encode(sample)
        return
    encoded = made.encode(sample)
    compared.equal(encoded.input_ids, golden["input_ids"])
    if sample.id not in SUPERVISED_HERE or encoded.labels == golden["labels"]:
        compared.equal(encoded.labels, golden["labels"])
        return
    assert set(golden["labels"]) == {IGNORE_INDEX}, f"{sample.id} is discarded whole, or learned as here"
    answer = made.tokenizer.decode([label for label in encoded.labels if label != IGNORE_INDEX]).strip()
    whole = f"{sample.messages[-1].content}{made.template.config.assistant_suffix}"
    assert answer == whole or (len(encoded.input_ids) == made.config.max_length and whole.startswith(answer))


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", PIXELS)
def test_golden_imp_pixels(file: str, compared: Compared) -> None:
    for name, golden in golden_tensors(file).items():
        _, mode, picture = name.split(".")
        transform = ImageTransform(ImageConfig(resize=MODES[mode]), image_settings())
        compared.close(transform(open_image(golden_image(picture))), golden, 0, name)


def test_golden_imp_pixels_of_all_modes_are_there(compared: Compared) -> None:
    compared.equal({name.split(".")[1] for file in PIXELS for name in golden_tensors(file)}, set(MODES))


# --- ids and labels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", GENERATIONS)
def test_golden_imp_tokenizer(generation: str, compared: Compared) -> None:
    golden = golden_json(f"{generation}/expected_preprocess.json")
    made = tokenizer("</s>")
    compared.equal({token: made.convert_tokens_to_ids(token) for token in golden["special"]}, golden["special"])
    compared.equal(len(made), golden["len_tokenizer"])
    for case in golden["tokenizer_cases"]:
        compared.equal(made(case["text"])["input_ids"], case["ids"])
        segments = Template(TemplateConfig()).render([Message("user", case["text"])])
        compared.equal(tokenize(segments, made, [1] * count_slots(segments))[0], case["image_ids"])
        compared.equal(made.decode(case["ids"]), case["decoded"])
        compared.equal(made.decode(case["ids"], skip_special_tokens=True), case["decoded_skip"])


@pytest.mark.parametrize(
    ("generation", "key"),
    [(g, key) for g in GENERATIONS for key in SPECIAL if key in golden_json(f"{g}/expected_preprocess.json")],
)
def test_golden_imp_ids_and_labels(generation: str, key: str, compared: Compared) -> None:
    golden = golden_json(f"{generation}/expected_preprocess.json")
    made, found = processor(key, *SPECIAL[key]), samples("plain.json" if key == "plain" else "chat.json")
    for sample, expected in zip(found.values(), golden[key], strict=True):
        check_ids(compared, sample, made, expected)
    special = golden.get(f"{key}_special", {})
    compared.equal({token: made.tokenizer.convert_tokens_to_ids(token) for token in special}, special)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_golden_imp_length_limit(generation: str, compared: Compared) -> None:
    """The original's tokenizer cuts text-only samples; those with pictures are cut behind the splice."""
    golden = golden_json(f"{generation}/expected_preprocess.json")
    for key, rows in golden.items():
        if limit := re.fullmatch(r"phi2_model_max_length_(\d+)", key):
            cut = processor("phi2", "</s>", max_length=int(limit[1]), on_overflow="cut_right")
            for sample, expected in zip(samples("chat.json").values(), rows, strict=True):
                check_ids(compared, sample, processor("phi2", "</s>") if sample.images else cut, expected)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_golden_imp_prompts(generation: str, compared: Compared) -> None:
    golden = golden_json(f"{generation}/expected_prompts.json")
    for name, prompts in golden["prompts"].items():
        if name == "plain":  # stage 1 alone; the original renders what it never trains on (see ids and labels)
            continue
        made = template(NAMES.get(name, name))
        for turns, expected in zip(golden["turns"], prompts, strict=True):
            messages = [Message(("user", "assistant")[k % 2], text) for k, text in enumerate(turns)]
            if "" in turns[1::2]:  # the original leaves the turn open and goes on
                with pytest.raises(TemplateError, match="the answer is empty"):
                    made.render(messages, chat=True)
                continue
            segments = made.render(messages, chat=True)
            rendered = "".join(s.text if isinstance(s, Text) else IMAGE_MARKER for s in segments)
            if "" in turns[::2]:  # the original writes the name of the role only; ours is a question like any other
                config = made.chat_config
                assert rendered.endswith(config.user_prefix + config.user_suffix + config.assistant_prefix)
            else:
                compared.equal(rendered, expected)


# --- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", GENERATIONS)
def test_golden_imp_batch(generation: str, compared: Compared) -> None:
    golden = golden_tensors(f"{generation}/expected.safetensors")
    meta = golden_json(f"{generation}/meta.json")
    side = image_settings()["size"] // golden_json("siglip-tiny/config.json")["patch_size"]
    limit = meta.get("trunc.base.tokenizer_model_max_length", 1)
    before = {"input_ids": "batch.input_ids", "labels": "batch.labels", "attention_mask": "batch.attention_mask_in"}
    for made, names in (
        (processor("phi2", "</s>"), before),
        (processor("phi2", "</s>", tokens_per_image=side**2), behind("batch.base")),
        (
            processor("phi2", "</s>", tokens_per_image=side**2, max_length=limit, on_overflow="cut_right"),
            behind("trunc.base"),
        ),
    ):
        batch = made.collate([made.encode(sample) for sample in samples("batch.json").values()])
        for field, name in names.items():
            compared.close(getattr(batch, field), number(golden.get(name)), 0, name)


def behind(name: str) -> dict[str, str]:
    """Tensors behind the splice."""
    return {"labels": f"{name}.labels", "attention_mask": f"{name}.attention_mask"}


def number(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.long()


# --- orders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", GENERATIONS)
def test_golden_imp_lengths(generation: str, compared: Compared) -> None:
    made = processor("phi2", "</s>", tokens_per_image=PICTURE_WORDS[generation])
    data = TrainingSet([list(samples("batch.json").values())], made, 0, "raise")
    if golden := golden_json(f"{generation}/meta.json").get("modality_lengths"):
        compared.equal(data.signed_lengths(), golden)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_golden_imp_sampler(generation: str, compared: Compared) -> None:
    for case in golden_json(f"{generation}/expected_sampler.json"):
        lengths, sizes = case["lengths"], [abs(length) for length in case["lengths"]]
        batch, world = case["batch_size"], case["world_size"]
        order = group_by_modality(
            lengths,
            batch,
            world,
            inside=generator(case["global_torch_seed"]),
            between=generator(case["generator_seed"]),
            join=JOINS[generation],
        )
        compared.equal(order, case["modality_grouped"])
        grouped = group_by_length(sizes, batch, world, generator(case["plain_global_seed"]))
        compared.equal([index for mega in grouped for index in mega], case["length_grouped_of_abs"])
