"""Talking to Mini-Gemini: several pictures, unequal batches, text alone, base and HD; each picture encoded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_mgm import GOLDEN
from helpers import tiny_model
from PIL import Image
from test_dual import CLIP, CONVNEXT
from test_golden_mgm import FOLDERS, load

from minivlm.api import assemble
from minivlm.config.loader import parse_model
from minivlm.models import vlm
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.configs import TemplateConfig
from minivlm.processors.image import image_hash, open_image
from minivlm.processors.processor import VLMProcessor
from minivlm.processors.sharing import content_key, share_equal
from minivlm.processors.template import ImageSlot, Template, Text
from minivlm.serve.chat import Chat
from minivlm.types import IMAGE_TOKEN_ID, Batch, Message, Sample, SampleError

PICTURES = list({image_hash(open_image(path)): path for path in sorted((GOLDEN / "images").iterdir())}.values())
"""Different ones: some differ only where they are transparent."""
FREE = {"max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
each_folder = pytest.mark.parametrize("folder", FOLDERS)


def ask(text: str, *images: Any, id: str = "x") -> Sample:
    return Sample(id, [Message("user", "<image>\n" * len(images) + text)], list(images))


def prompts(processor: VLMProcessor, samples: list[Sample]) -> Batch:
    return processor.collate([processor.prompt_sample(s, chat=True) for s in samples], for_generation=True)


def shown(processor: VLMProcessor, *messages: Message, chat: bool = True, pictures: int | None = None) -> str:
    segments = processor.template.render([*messages, Message("assistant", None)], chat=chat, pictures=pictures)
    return "".join(s.text if isinstance(s, Text) else "<image>" for s in segments)


class Seen:
    """How many pictures an encoder was given, call by call."""

    def __init__(self, model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch):
        self.calls: list[int] = []
        encode = model.vision_encoder.encode

        def counted(pixels: Any) -> Any:
            self.calls.append(len(next(iter(pixels.values()))))
            return encode(pixels)

        monkeypatch.setattr(model.vision_encoder, "encode", counted)


# --- several pictures -----------------------------------------------------------------------------------------------


@each_folder
def test_unequal_batches_answer_as_one_by_one(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = load(folder)
    a, b, c, *_ = PICTURES
    samples = [
        ask("What?", a),
        ask("Compare these pictures, please.", b, c),
        ask("Tell me a long story about nothing at all."),
        ask("Which is the first?", a, b, a),
    ]
    seen = Seen(model, monkeypatch)
    batch = prompts(processor, samples)
    together = model.generate(batch, **FREE)
    assert batch.image_index == [0, 1, 2, 0, 1, 0] and seen.calls == [3]
    alone = [model.generate(prompts(processor, [sample]), **FREE)[0] for sample in samples]
    assert together.tolist() == [ids.tolist() for ids in alone]
    assert seen.calls == [3, 1, 2, 2], "no call for text alone"
    swapped = model.generate(prompts(processor, [ask("Compare these pictures, please.", c, b)]), **FREE)
    embeds = [model.embed(prompts(processor, [s])) for s in (samples[1], ask("Compare these pictures, please.", c, b))]
    assert swapped.shape == together[1:2].shape and not torch.allclose(*embeds), "their order matters"


@each_folder
def test_several_pictures_are_numbered_as_in_the_original_chat(folder: str) -> None:
    _, processor = load(folder)
    one, two = Message("user", "<image>\nq"), Message("user", "<image>\n<image>\nq")
    assert "Image" not in shown(processor, one, pictures=1)
    assert "Image 1:<image>\nImage 2:<image>\nq" in shown(processor, two, pictures=2)
    later = shown(processor, one, Message("assistant", "a"), Message("user", "<image>\nr"), pictures=2)
    assert "Image 1:<image>\nq" in later and "Image 2:<image>\nr" in later
    assert "Image" not in shown(processor, two, chat=False, pictures=2), "training has never seen the numbers"


def test_markers_become_one_only_where_pictures_lack() -> None:
    template = Template(TemplateConfig(markers="collapse_to_front"))
    messages = [Message("user", "is <image> like <image>?"), Message("assistant", "no")]

    def slots(pictures: int | None) -> int:
        return sum(isinstance(s, ImageSlot) for s in template.render(messages, pictures=pictures))

    assert [slots(None), slots(1), slots(2), slots(3)] == [1, 1, 2, 1]
    _, processor = load(FOLDERS[0])
    with pytest.raises(SampleError, match="3 <image> markers in the text, but 2 pictures"):
        processor.prompt([Message("user", "<image><image><image>?")], PICTURES[:2])
    front = template.render(messages, pictures=2)[:4]
    assert front == [ImageSlot(), Text("\n"), ImageSlot(), Text("\nis  like ?")]


@each_folder
def test_a_conversation_of_text_then_of_pictures(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = load(folder)
    monkeypatch.setattr(processor, "decode", lambda ids: ["an answer"] * len(ids))
    seen = Seen(model, monkeypatch)
    chat = Chat(model, processor, max_new_tokens=2)
    assert chat.ask("Hello?") == "an answer" and seen.calls == []
    chat.ask("What are these?", PICTURES[:2])
    chat.ask("And once more the second?", PICTURES[1:2])
    chat.ask("And this?", [PICTURES[2]])
    assert seen.calls == [2, 1] and chat.num_images == 4
    chat.reset()
    chat.ask("Which are these?", [PICTURES[1], PICTURES[3], PICTURES[3]])
    assert seen.calls == [2, 1, 1], "those of the conversation before are still there"
    fresh = processor.prompt([{"role": "user", "content": "<image>" * 3}], [PICTURES[i] for i in (1, 3, 3)])
    with torch.inference_mode():
        torch.testing.assert_close(chat._state.visual, model.encode_images(fresh))


@pytest.mark.parametrize("folder", [name for name in FOLDERS if "hd" in name])
def test_too_many_pictures_say_how_long_one_is(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = load(folder)
    each = processor.tokens_per_image
    monkeypatch.setattr(processor.config, "max_length", each)
    reason = rf"\({each} of them visual, {each} a picture\) do not fit into {each}; .*model\.processor\.max_length"
    with pytest.raises(SampleError, match=reason):
        prompts(processor, [ask("What?", PICTURES[0])])
    monkeypatch.setattr(processor.config, "max_length", 10**6)
    chat = Chat(model, processor, max_length=2 * each)
    reason = rf"\({2 * each} of them visual, {each} a picture\) and the model takes {2 * each}; .* with fewer pictures"
    with pytest.raises(SampleError, match=reason):
        chat.ask("What?", PICTURES[:2])


# --- each picture once ----------------------------------------------------------------------------------------------


def trainable(freeze: bool, **high: Any) -> tuple[VisionLanguageModel, VLMProcessor]:
    torch.manual_seed(0)
    encoder = {"name": "dual", "low": CLIP, "high": {**CONVNEXT, **high}, "freeze": freeze}
    section = {**tiny_model(), "vision_encoder": encoder, "connector": {"name": "patch_info_mining"}}
    model, processor, _ = assemble(parse_model(section, "test"))
    return model.train(), processor


def records(processor: VLMProcessor) -> tuple[Batch, Batch]:
    """Five pictures of which two differ, and the same batch with all five in it."""
    red, blue = (Image.new("RGB", (40, 30), colour) for colour in ("red", "blue"))
    rows = [[red], [blue, red], [], [red.copy()], [blue]]
    samples = [ask("what?", *images, id=str(n)) for n, images in enumerate(rows)]
    for number, sample in enumerate(samples):
        sample.messages.append(Message("assistant", f"answer {number}"))
    batch = processor.collate([processor.encode(sample) for sample in samples])
    assert batch.image_index == [0, 1, 0, 0, 1] and (batch.num_images, batch.num_distinct) == (5, 2)
    whole = batch.pictures(batch.image_index)
    assert (whole.num_images, whole.num_distinct, whole.image_index) == (5, 5, None)
    return batch, whole


@pytest.mark.parametrize("freeze", [True, False])
def test_shared_pictures_train_as_repeated_ones(freeze: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = trainable(freeze)
    found = []
    seen = Seen(model, monkeypatch)
    for batch in records(processor):
        model.zero_grad()
        loss = model(batch).loss
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    assert seen.calls == [2, 5]
    torch.testing.assert_close(*(loss for loss, _ in found))
    one, other = (gradients for _, gradients in found)
    assert one.keys() == other.keys() and any(name.startswith("connector.") for name in one)
    assert any(name.startswith("vision_encoder.high") for name in one) != freeze
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], rtol=1e-4, atol=1e-6)


def test_pictures_that_are_encoded_at_random_are_encoded_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the original's training, whose frozen encoder drops paths."""
    model, processor = trainable(True, drop_path_rate=0.9, drop_path_when_frozen=True)
    for name, parameter in model.vision_encoder.named_parameters():
        if name.endswith("gamma"):  # the scale of a block, at first almost nothing
            parameter.data.fill_(1)
    batch, _ = records(processor)
    seen = Seen(model, monkeypatch)
    with torch.no_grad():
        visual = model.encode_images(batch)
        again = model.eval().encode_images(batch)
    assert seen.calls == [5, 2] and len(visual) == len(again) == 5
    assert torch.equal(again[0], again[2]) and torch.equal(again[0], again[3])
    assert not (torch.equal(visual[0], visual[2]) and torch.equal(visual[0], visual[3]))


def test_features_of_a_cache_are_shared_too() -> None:
    model, processor = trainable(True)
    batch, whole = records(processor)
    with torch.no_grad():
        features = model.extract_features(batch.pixels)
        batch.pixels, batch.features = {}, features
        torch.testing.assert_close(model.encode_images(batch), model.encode_images(whole))


def test_only_equal_pictures_are_shared() -> None:
    """Also such as differ at a single place, or in one of two inputs only."""
    plain = torch.zeros(3, 40, 40)
    dot = plain.clone()
    dot[1, 17, 23] = 1
    pairs = [(plain, plain), (dot, plain), (plain, dot), (plain.clone(), plain.clone()), (dot.clone(), plain)]
    pictures = [{"image": low, "high": high} for low, high in pairs]
    unique, index = share_equal(pictures)
    assert index == [0, 1, 2, 0, 1] and len(unique) == 3
    assert share_equal(pictures[:3]) == (pictures[:3], None)
    keys = [content_key(picture.values()) for picture in pictures]
    assert keys[0] == keys[3] and keys[1] == keys[4] and len(set(keys)) == 3
    assert content_key([torch.ones(2, 2).bfloat16()]) != content_key([torch.ones(4).bfloat16()])


@pytest.mark.parametrize("folder", FOLDERS[:1] + [name for name in FOLDERS if "hd" in name])
def test_large_features_are_there_for_one_picture_at_a_time(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = load(folder)
    batch = prompts(processor, [ask("?", *PICTURES[:3]), ask("?", PICTURES[0])])
    with torch.no_grad():
        whole = model.encode_images(batch)
        seen = Seen(model, monkeypatch)
        model.encode_images(batch)
        monkeypatch.setattr(vlm, "_FEATURE_BYTES", 1)
        parts = model.encode_images(batch)
        batch.features = model.extract_features(batch.pixels)
        cached = model.encode_images(batch)
    assert seen.calls == [3, 1, 1, 1, 3] and len(whole) == 4
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(cached, whole)


def test_nothing_is_split_while_the_connector_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = trainable(True)
    batch, _ = records(processor)
    seen = Seen(model, monkeypatch)
    monkeypatch.setattr(vlm, "_FEATURE_BYTES", 1)
    model(batch)
    model.connector.requires_grad_(False)
    model(batch)
    assert seen.calls == [2, 1, 1]
    model.always_encodes = True  # processes that wait for each other call the encoder equally often
    model(batch)
    assert seen.calls == [2, 1, 1, 2]
    model.eval()
    model(batch)
    assert seen.calls == [2, 1, 1, 2, 1, 1], "in an evaluation all do the same"


def test_positions_of_repeated_pictures_are_all_there() -> None:
    model, processor = trainable(True)
    batch, _ = records(processor)
    assert int((batch.input_ids == IMAGE_TOKEN_ID).sum()) == 5 * processor.tokens_per_image
    with torch.no_grad():
        assert model.encode_images(batch).shape[:2] == (5, processor.tokens_per_image)
