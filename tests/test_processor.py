"""The processor: pictures, lengths, prompts, batches and text again."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from minivlm.processors import fingerprint
from minivlm.processors.configs import ImageConfig, ProcessorConfig, TemplateConfig
from minivlm.processors.image import ImageTransform, crop_to_square, image_hash, open_image, pad_to_square
from minivlm.processors.processor import VLMProcessor
from minivlm.processors.template import Template
from minivlm.processors.tokenizer import TokenizerError, load_tokenizer
from minivlm.types import IGNORE_INDEX, IMAGE_TOKEN_ID, Batch, Encoded, Message, Sample, SampleError

CLIP = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
QA = {"user_prefix": "q:", "assistant_prefix": " a:", "answer_prefix": " ", "assistant_suffix": "</s>"}
RED = Image.new("RGB", (8, 8), (255, 0, 0))
BLUE = Image.new("RGB", (8, 8), (0, 0, 255))


def processor(template: dict[str, Any] | None = None, tokens: int = 3, **settings: Any) -> VLMProcessor:
    transform = ImageTransform(ImageConfig(), {"size": 4, **HALF})
    form = Template(TemplateConfig(**(QA if template is None else template)))
    return VLMProcessor(
        ProcessorConfig(**settings), form, load_tokenizer("asset:quickstart"), {"image": transform}, tokens
    )


def sample(*texts: str | None, images: list[Any] | None = None, first: str = "user", id: str = "s") -> Sample:
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return Sample(id, [Message(roles[i % 2], text) for i, text in enumerate(texts)], images or [])


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def text_of(p: VLMProcessor, ids: list[int]) -> str:
    """Ids as text, visual tokens as @."""
    return "".join("@" if token == IMAGE_TOKEN_ID else p.tokenizer.decode([token]) for token in ids)


# --- picture transforms ---------------------------------------------------------------------------------------------

SIZES = [(56, 56), (55, 55), (71, 71), (83, 83), (56, 80), (200, 57), (13, 300), (300, 10), (57, 56), (30, 31)]


@pytest.fixture
def pillow13(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's resize with the order of passes that it has since version 13, also under an older one."""
    plain = Image.Image.resize

    def ordered(self: Image.Image, size: Any, resample: Any = None, **rest: Any) -> Image.Image:
        width, height = self.width - size[0], self.height - size[1]
        columns_first = height > 0 and height > 2 * width
        first = plain(self, (self.width, size[1]), resample, **rest) if columns_first else self
        return plain(first, size, resample, **rest)

    monkeypatch.setattr(Image.Image, "resize", ordered)


@pytest.mark.usefixtures("pillow13")
@pytest.mark.parametrize("size", SIZES)
def test_equal_to_transformers_bit_by_bit(size: tuple[int, int]) -> None:
    """55, 71 and 83 are sides at which a scale in floating point would lose a row of the picture."""
    picture = noise(*size)
    clip = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    siglip = SiglipImageProcessorPil(size={"height": 56, "width": 56})
    for settings, other in (
        ({"resize": "shortest_edge", **CLIP}, clip),
        ({"resize": "squash", **HALF}, siglip),
    ):
        ours = ImageTransform(ImageConfig(), {"size": 56, **settings})(picture)
        theirs = other(picture, return_tensors="np")["pixel_values"][0]
        assert ours.dtype == torch.float32 and ours.is_contiguous()
        assert np.array_equal(ours.numpy(), theirs)


@pytest.mark.parametrize("side", range(40, 240, 7))
def test_a_square_keeps_every_row(side: int) -> None:
    """A white square stays white up to its border, whatever its side."""
    white = Image.new("RGB", (side, side), (255, 255, 255))
    pixels = ImageTransform(ImageConfig(), {"size": 224, "resize": "shortest_edge", **HALF})(white)
    assert pixels.shape == (3, 224, 224) and pixels.min() == 1


def test_squash_against_pil_and_numpy() -> None:
    picture = noise(31, 17)
    ours = ImageTransform(ImageConfig(interpolation="bilinear"), {"size": 8, **CLIP})(picture)
    values = np.asarray(picture.resize((8, 8), Image.Resampling.BILINEAR), dtype=np.float64) / 255
    expected = ((values - CLIP["mean"]) / CLIP["std"]).transpose(2, 0, 1)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("width", "height"), [(40, 20), (20, 40)])
def test_shortest_edge_crops_the_middle(width: int, height: int) -> None:
    picture = Image.new("RGB", (width, height), (0, 0, 0))
    picture.paste((255, 255, 255), (width // 2 - 10, height // 2 - 10, width // 2 + 10, height // 2 + 10))
    pixels = ImageTransform(ImageConfig(interpolation="nearest"), {"size": 10, "resize": "shortest_edge", **HALF})(
        picture
    )
    assert pixels.shape == (3, 10, 10) and pixels.min() == 1


@pytest.mark.parametrize(("width", "height", "left", "top"), [(9, 4, 2, 0), (4, 9, 0, 2), (5, 4, 0, 0), (6, 6, 0, 0)])
def test_crop_takes_the_square_in_the_middle(width: int, height: int, left: int, top: int) -> None:
    """The odd pixel is left out behind; the square is then resized like any other picture."""
    picture, side = noise(width, height), min(width, height)
    square = picture.crop((left, top, left + side, top + side))
    assert crop_to_square(picture).tobytes() == square.tobytes()
    settings = {"size": 8, **HALF}
    ours = ImageTransform(ImageConfig(resize="crop"), settings)(picture)
    assert torch.equal(ours, ImageTransform(ImageConfig(resize="squash"), settings)(square))


def test_pad_to_square() -> None:
    wide = pad_to_square(Image.new("RGB", (5, 2), (9, 9, 9)), (1, 2, 3))
    assert wide.size == (5, 5)
    rows = np.asarray(wide)[:, 0].tolist()
    assert rows == [[1, 2, 3], [9, 9, 9], [9, 9, 9], [1, 2, 3], [1, 2, 3]]
    tall = np.asarray(pad_to_square(Image.new("RGB", (1, 4), (9, 9, 9)), (1, 2, 3)))
    assert tall[0].tolist() == [[1, 2, 3], [9, 9, 9], [1, 2, 3], [1, 2, 3]]
    assert np.array_equal(np.asarray(pad_to_square(RED, (0, 0, 0))), np.asarray(RED))


def test_the_padding_has_the_colour_of_the_mean() -> None:
    """127.5 becomes 127, as in LLaVA; after normalisation that is all but zero."""
    transform = ImageTransform(ImageConfig(resize="pad", interpolation="nearest"), {"size": 8, **HALF})
    pixels = transform(Image.new("RGB", (8, 4), (255, 255, 255)))
    assert pixels[:, 2:6].min() == 1
    border = torch.cat([pixels[:, :2], pixels[:, 6:]], dim=1)
    assert torch.equal(border, torch.full_like(border, float((np.float32(127) / np.float32(255) - 0.5) / 0.5)))


def test_own_settings_win_over_the_encoders() -> None:
    encoder = {"size": 8, "resize": "shortest_edge", "interpolation": "bilinear", **CLIP}
    given = ImageTransform(ImageConfig(size=6, std=[1.0, 1.0, 1.0]), encoder)
    assert (given.size, given.resize, given.interpolation) == (6, "shortest_edge", "bilinear")
    assert (given.mean, given.std) == (CLIP["mean"], [1.0] * 3)
    bare = ImageTransform(ImageConfig(), {"size": 8, **CLIP})
    assert (bare.resize, bare.interpolation) == ("squash", "bicubic")


def test_the_fingerprint_follows_every_setting() -> None:
    encoder = {"size": 8, **CLIP}
    changes = [
        {},
        {"size": 9},
        {"resize": "pad"},
        {"interpolation": "nearest"},
        {"mean": [0, 0, 0]},
        {"std": [1, 1, 1]},
    ]
    prints = [ImageTransform(ImageConfig(**change), encoder).fingerprint for change in changes]
    assert len(set(prints)) == len(changes)
    assert prints[0] == ImageTransform(ImageConfig(size=8, **CLIP), {"size": 3, **HALF}).fingerprint


# --- opening pictures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I", "I;16", "F"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    assert open_image(Image.new(mode, (3, 2))).mode == "RGB"


def test_alpha_is_dropped_not_blended(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (10, 20, 30, 0)).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(tmp_path / "a.png")):
        assert open_image(source).getpixel((0, 0)) == (10, 20, 30)


def test_pictures_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no picture .*none\.png"):
        open_image(tmp_path / "none.png")
    with pytest.raises(OSError, match="cannot read picture"):
        open_image(tmp_path)
    for name, content in (("text.png", b"no picture"), ("empty.jpg", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(OSError, match=f"cannot read picture .*{name}"):
            open_image(tmp_path / name)
    RED.save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(OSError, match="too large"):
        open_image(tmp_path / "large.png")


Image.init()
FORMATS = [kind for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF") if kind in Image.SAVE]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_raise_nothing_but_oserror(kind: str, tmp_path: Path) -> None:
    """A decoder meets cut and flipped bytes; anything but OSError would end a training."""
    whole = io.BytesIO()
    noise(40, 30).save(whole, kind)
    data, generator = whole.getvalue(), random.Random(0)
    refused = 0
    for attempt in range(60):
        damaged = bytearray(data[: generator.randrange(len(data))] if attempt % 3 == 0 else data)
        for _ in range(0 if attempt % 3 == 0 else 8):
            damaged[generator.randrange(min(len(damaged), 300))] = generator.randrange(256)
        (tmp_path / "x").write_bytes(damaged)
        try:
            assert open_image(tmp_path / "x").mode == "RGB"
        except OSError:
            refused += 1
    assert refused > 10


def test_hashes_tell_pictures_apart(tmp_path: Path) -> None:
    RED.save(tmp_path / "a.png")
    RED.save(tmp_path / "b.png")
    BLUE.save(tmp_path / "c.png")
    assert image_hash(tmp_path / "a.png") == image_hash(str(tmp_path / "b.png")) != image_hash(tmp_path / "c.png")
    assert image_hash(RED) == image_hash(RED.copy()) != image_hash(BLUE)
    assert image_hash(RED) != image_hash(RED.resize((4, 16)))
    one, two = RED.quantize(2), BLUE.quantize(2)  # the same indices, other colours
    assert one.tobytes() == two.tobytes() and image_hash(one) != image_hash(two)


# --- encoding a sample ----------------------------------------------------------------------------------------------


def test_a_training_sample() -> None:
    p = processor()
    encoded = p.encode(sample("<image>what?", "red", images=[RED]))
    assert text_of(p, encoded.input_ids) == "q:@@@what? a: red</s>"
    supervised = [token for token in encoded.labels if token != IGNORE_INDEX]
    assert p.tokenizer.decode(supervised) == " red</s>" and encoded.num_supervised == len(supervised)
    assert encoded.tokens_per_image == [3] and encoded.sample_id == "s" and encoded.features is None
    assert torch.equal(encoded.pixels["image"][0], p.transforms["image"](RED))


def test_pictures_keep_their_order() -> None:
    p = processor()
    encoded = p.encode(sample("<image>or<image>?", "one", "and <image>", "two", images=[RED, BLUE, RED]))
    assert text_of(p, encoded.input_ids) == "q:@@@or@@@? a: one</s>q:and @@@ a: two</s>"
    expected = [p.transforms["image"](x) for x in (RED, BLUE, RED)]
    assert all(torch.equal(a, b) for a, b in zip(encoded.pixels["image"], expected, strict=True))
    assert encoded.tokens_per_image == [3, 3, 3]


def test_every_input_of_the_encoder_gets_its_pixels() -> None:
    p = processor()
    p.transforms["high"] = ImageTransform(ImageConfig(), {"size": 9, **HALF})
    encoded = p.encode(sample("<image><image>?", "a", images=[RED, BLUE]))
    assert {name: [tuple(x.shape) for x in found] for name, found in encoded.pixels.items()} == {
        "image": [(3, 4, 4)] * 2,
        "high": [(3, 9, 9)] * 2,
    }


@pytest.mark.parametrize(
    ("content", "images", "reason"),
    [
        ("<image>?", [], "1 <image> markers in the text, but 0 pictures"),
        ("?", [RED], "0 <image> markers in the text, but 1 pictures"),
        ("<image><image>?", [RED], "2 <image> markers in the text, but 1 pictures"),
    ],
)
def test_markers_and_pictures_that_differ(content: str, images: list[Any], reason: str) -> None:
    with pytest.raises(SampleError, match=f"sample 's': {reason}"):
        processor().encode(sample(content, "a", images=images))


def test_bad_samples_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no picture")
    for bad, reason in (
        (sample("<image>", "a", images=[tmp_path / "x.png"]), "cannot read picture"),
        (sample("<image>", "a", images=[str(tmp_path / "y.png")]), "there is no picture"),
        (sample("?", ""), "turn 2: the answer is empty"),
        (sample("?"), "nothing is supervised"),
        (sample("a", "b", first="assistant"), "'user' is due"),
        (sample(), "no user turn"),
    ):
        with pytest.raises(SampleError, match=reason) as caught:
            processor().encode(bad)
        assert caught.value.sample_id == "s"


def test_a_sample_error_survives_a_worker_process() -> None:
    import pickle

    copy = pickle.loads(pickle.dumps(SampleError("x", "too long")))
    assert (copy.sample_id, copy.reason, str(copy)) == ("x", "too long", "sample 'x': too long")


# --- lengths --------------------------------------------------------------------------------------------------------


def test_a_long_answer_is_cut_at_its_end() -> None:
    whole = processor().encode(sample("<image>?", "yes " * 30, images=[RED]))
    cut = processor(max_length=20).encode(sample("<image>?", "yes " * 30, images=[RED]))
    assert cut.input_ids == whole.input_ids[:20] and cut.labels == whole.labels[:20]
    exact = processor(max_length=len(whole.input_ids)).encode(sample("<image>?", "yes " * 30, images=[RED]))
    assert exact.input_ids == whole.input_ids


@pytest.mark.parametrize("limit", range(1, 40))
def test_no_limit_cuts_inside_or_in_front_of_a_picture(limit: int) -> None:
    """Two pictures of three tokens each: a sample is refused, or holds both of them whole."""
    long = sample("<image>?", "yes", "and <image>?", "no no no no", images=[RED, BLUE])
    whole = processor().encode(long)
    behind = max(i for i, token in enumerate(whole.input_ids) if token == IMAGE_TOKEN_ID) + 1
    if limit < behind:
        with pytest.raises(SampleError, match=rf"\(6 of them visual, 3 a picture\) do not fit into {limit};"):
            processor(max_length=limit).encode(long)
    else:
        encoded = processor(max_length=limit).encode(long)
        assert encoded.input_ids == whole.input_ids[:limit]
        assert encoded.input_ids.count(IMAGE_TOKEN_ID) == sum(encoded.tokens_per_image) == 6


def test_a_sample_whose_answers_are_all_cut_off_is_refused() -> None:
    with pytest.raises(SampleError, match="nothing is supervised: no answer, or it was cut off"):
        processor(max_length=5).encode(sample("a very long question about colors", "red"))


@pytest.mark.parametrize("limit", range(1, 40))
def test_cut_right_cuts_wherever_the_limit_is(limit: int) -> None:
    """The batch tells how much of every picture is left; pixels and features of all of them stay."""
    long = sample("<image>?", "yes", "and <image>?", "no no no no", images=[RED, BLUE])
    whole = processor().encode(long)
    p = processor(max_length=limit, on_overflow="cut_right")
    encoded = p.encode(long)
    assert (encoded.input_ids, encoded.labels) == (whole.input_ids[:limit], whole.labels[:limit])
    assert sum(encoded.tokens_per_image) == encoded.input_ids.count(IMAGE_TOKEN_ID)
    first, second = encoded.tokens_per_image
    assert first == 3 or second == 0, "the first picture is cut only when the second is gone"
    short = sample("<image>?", "yes", images=[RED])
    assert p.encode(short).tokens_per_image == [min(3, encoded.tokens_per_image[0])]
    batch = p.collate([encoded])
    assert batch.num_images == 2
    assert batch.image_tokens == (None if (first, second) == (3, 3) else [first, second])


def test_cut_right_keeps_a_sample_that_has_lost_its_answers() -> None:
    """But not one that never had any; prompts are not cut."""
    p = processor(max_length=5, on_overflow="cut_right")
    long = sample("a very long question about colors", "red")
    encoded = p.encode(long)
    assert len(encoded.input_ids) == 5 and encoded.num_supervised == 0
    with pytest.raises(SampleError, match="nothing is supervised"):
        p.encode(sample("a very long question about colors"))
    with pytest.raises(SampleError, match="do not fit into 5"):
        p.prompt_sample(long)


def test_overflow_may_be_an_error() -> None:
    long = sample("?", "yes " * 30)
    count = len(processor().encode(long).input_ids)
    assert len(processor(max_length=count, on_overflow="error").encode(long).input_ids) == count
    with pytest.raises(SampleError, match=f"{count} tokens do not fit into {count - 1}"):
        processor(max_length=count - 1, on_overflow="error").encode(long)


@pytest.mark.parametrize("policy", ["cut_text", "error"])
def test_answers_may_have_a_length_of_their_own(policy: str) -> None:
    """Counted from the first supervised token; a limit that cuts by intention is no overflow."""
    p = processor(max_answer_tokens=4, on_overflow=policy)
    encoded = p.encode(sample("<image>?", "yes " * 30, images=[RED]))
    whole = processor().encode(sample("<image>?", "yes " * 30, images=[RED]))
    first = next(i for i, label in enumerate(whole.labels) if label != IGNORE_INDEX)
    assert encoded.input_ids == whole.input_ids[: first + 4] and encoded.num_supervised == 4
    short = sample("?", "no")
    assert p.encode(short).input_ids == processor().encode(short).input_ids


def test_a_picture_behind_the_answers_length_is_refused() -> None:
    with pytest.raises(SampleError, match="do not fit"):
        processor(max_answer_tokens=2).encode(sample("<image>?", "yes yes", "<image>?", "no", images=[RED, BLUE]))


def test_long_prompts_are_refused_and_never_cut() -> None:
    p = processor(max_length=8)
    with pytest.raises(SampleError, match=r"do not fit into 8; .*raise model\.processor\.max_length"):
        p.prompt([{"role": "user", "content": "what color is the shape in this picture?"}])
    with pytest.raises(SampleError, match="do not fit into 8"):
        p.prompt_sample(sample("<image>what color is it?", "red", images=[RED]))


# --- prompts --------------------------------------------------------------------------------------------------------


def test_the_prompt_of_a_sample_is_where_its_last_answer_begins() -> None:
    p = processor()
    whole = sample("<image>?", "yes", "why?", "so", images=[RED])
    prompt, trained = p.prompt_sample(whole), p.encode(whole)
    assert text_of(p, prompt.input_ids) == "q:@@@? a: yes</s>q:why? a:"
    assert trained.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert p.prompt_sample(sample("?")).input_ids == p.prompt_sample(sample("?", "no")).input_ids
    assert [m.content for m in whole.messages] == ["<image>?", "yes", "why?", "so"]


def test_a_prompt_from_messages() -> None:
    p = processor({**QA, "chat": {"user_prefix": "human:", "bos": "always"}})
    messages = [{"role": "user", "content": "<image>?"}, Message("assistant", "yes"), Message("user", "why?")]
    chat, plain = p.prompt(messages, [RED]), p.prompt(messages, [RED], chat=False)
    assert text_of(p, plain.input_ids[0].tolist()) == "q:@@@? a: yes</s>q:why? a:"
    assert text_of(p, chat.input_ids[0].tolist()) == "<s>human:@@@? a: yes</s>human:why? a:"
    assert chat.labels is None and chat.padding_side == "left" and chat.num_images == 1
    opened = [*messages, Message("assistant", None)]
    assert torch.equal(p.prompt(opened, [RED]).input_ids, chat.input_ids)
    assert len(messages) == 3
    with pytest.raises(SampleError, match="sample 'prompt': 1 <image> markers in the text, but 0 pictures"):
        p.prompt(messages)


def test_captions_get_a_user_turn() -> None:
    p = processor()
    caption = sample("a red square", images=[RED], first="assistant")
    assert text_of(p, p.encode(caption).input_ids) == "q:@@@ a: a red square</s>"
    assert text_of(p, p.prompt_sample(caption).input_ids) == "q:@@@ a:"
    assert text_of(p, p.prompt_sample(sample(images=[RED])).input_ids) == "q:@@@ a:"
    two = sample("two squares", images=[RED, BLUE], first="assistant")
    with pytest.raises(SampleError, match="1 <image> markers in the text, but 2 pictures"):
        p.encode(two)


def test_prompts_of_captions_are_drawn_by_seed_and_sample() -> None:
    prompts = [f"describe {word} " for word in "abcdefgh"] + ["look at <image> closely"]
    p = processor(prompts=prompts)

    def drawn(seed: int, name: str) -> str:
        caption = sample("red", images=[RED], first="assistant", id=name)
        return text_of(p, p.encode(caption, seed=seed).input_ids).removesuffix(" a: red</s>")

    found = {drawn(seed, "s") for seed in range(60)}
    assert found == {"q:@@@\n" + prompt for prompt in prompts[:-1]} | {"q:look at @@@ closely"}
    assert [drawn(seed, "s") for seed in range(9)] == [drawn(seed, "s") for seed in range(9)]
    assert [drawn(seed, "s") for seed in range(9)] != [drawn(seed, "t") for seed in range(9)]
    two = sample("two", images=[RED, BLUE], first="assistant")
    p.config.prompts = ["describe both"]
    assert text_of(p, p.encode(two).input_ids).startswith("q:@@@\n@@@\ndescribe both")
    text_only = sample("no picture", first="assistant")
    with pytest.raises(SampleError, match="'user' is due"):
        p.encode(text_only)


# --- batches --------------------------------------------------------------------------------------------------------


def batch_of(p: VLMProcessor, **options: Any) -> tuple[list[Encoded], Batch]:
    encoded = [
        p.encode(sample("<image>what color?", "red", images=[RED], id="a")),
        p.encode(sample("why?", "so", id="b")),
        p.encode(sample("<image>", "no", "<image>?", "yes yes yes", images=[BLUE, RED], id="c")),
    ]
    return encoded, p.collate(encoded, **options)


@pytest.mark.parametrize("generation", [False, True])
def test_padding(generation: bool) -> None:
    p = processor()
    encoded, batch = batch_of(p, for_generation=generation)
    longest = max(len(e.input_ids) for e in encoded)
    assert batch.input_ids.shape == batch.attention_mask.shape == (3, longest)
    assert (batch.labels is None) == generation and batch.padding_side == ("left" if generation else "right")
    for row, e in enumerate(encoded):
        count = len(e.input_ids)
        real = slice(longest - count, longest) if generation else slice(0, count)
        assert batch.input_ids[row, real].tolist() == e.input_ids
        assert batch.attention_mask[row, real].all() and batch.attention_mask[row].sum() == count
        padding = torch.ones(longest, dtype=torch.bool)
        padding[real] = False
        assert (batch.input_ids[row, padding] == p.tokenizer.pad_token_id).all()
        if batch.labels is not None:
            assert batch.labels[row, real].tolist() == e.labels
            assert (batch.labels[row, padding] == IGNORE_INDEX).all()
    assert batch.sample_ids == ["a", "b", "c"] and batch.num_images == 3
    expected = torch.stack([p.transforms["image"](x) for x in (RED, BLUE)])
    assert batch.image_index == [0, 1, 0], "the same picture is there once"
    assert torch.equal(batch.pixels["image"], expected)


def test_a_batch_without_pictures() -> None:
    p = processor()
    batch = p.collate([p.encode(sample("?", "no"))])
    assert batch.pixels == {} and batch.features is None and batch.num_images == 0


def test_reasons_for_skipped_samples_travel_with_the_batch() -> None:
    p = processor()
    encoded = p.encode(sample("?", "no"))
    encoded.skipped = [SampleError("bad", "why")]
    assert [error.sample_id for error in p.collate([encoded, encoded]).skipped] == ["bad", "bad"]


def test_positions_and_visual_tokens_must_agree() -> None:
    p = processor()
    encoded = p.encode(sample("<image>?", "no", images=[RED]))
    encoded.input_ids.remove(IMAGE_TOKEN_ID)
    encoded.labels.pop(2)
    with pytest.raises(ValueError, match="sample 's': image positions and visual tokens differ"):
        p.collate([encoded])


class Cache(dict):  # type: ignore[type-arg]
    """Features by key, as a feature cache offers them."""


def test_cached_features_stand_for_pixels() -> None:
    p = processor()
    p.feature_cache = Cache({image_hash(RED): torch.ones(5, 2).half(), image_hash(BLUE): torch.zeros(5, 2).half()})
    _, batch = batch_of(p)
    assert batch.pixels == {} and batch.features is not None and batch.num_images == 3
    assert batch.features.dtype == torch.float32
    assert batch.features[:, 0, 0].tolist() == [1, 0] and batch.image_index == [0, 1, 0]


def test_a_sample_with_a_picture_that_the_cache_lacks_is_a_bad_one() -> None:
    p = processor()
    p.feature_cache = Cache({image_hash(RED): torch.ones(5, 2)})
    for encode in (p.encode, p.prompt_sample):
        with pytest.raises(SampleError, match="is not in the feature cache: the file has changed or appeared"):
            encode(sample("<image><image>", "no", images=[RED, BLUE]))
    known, text = p.encode(sample("<image>", "no", images=[RED])), p.encode(sample("why", "no"))
    batch = p.collate([known, text])
    assert known.pixels == {} and batch.num_images == 1 and batch.features is not None


def test_only_transforms_that_take_a_seed_get_one() -> None:
    p, seeds = processor(), []

    class Own:
        def __call__(self, image: Image.Image, seed: str | None = None) -> torch.Tensor:
            seeds.append(seed)
            return torch.zeros(3, 4, 4)

    p.transforms = {"own": Own(), "plain": lambda image: torch.ones(3, 4, 4)}  # type: ignore[dict-item]
    assert p.load_pixels(RED, "7")["plain"].sum() == 48 and p.load_pixels(RED)["own"].sum() == 0
    assert seeds == ["7", None]


def test_the_fingerprint_follows_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(ImageTransform):
        pass

    def prints() -> list[str]:
        return [kind(ImageConfig(), {"size": 4, **HALF}).fingerprint for kind in (ImageTransform, Own)]

    before, getfile, code = prints(), fingerprint.inspect.getfile, tmp_path / "image.py"
    assert before == prints()
    code.write_text("a = 2")
    monkeypatch.setattr(fingerprint.inspect, "getfile", lambda k: str(code) if k is ImageTransform else getfile(k))
    assert not set(before) & set(prints()), "also that of the class below"


def test_a_missing_picture_is_a_bad_sample_with_a_cache_too(tmp_path: Path) -> None:
    p = processor()
    p.feature_cache = Cache()
    with pytest.raises(SampleError, match=r"gone\.png"):
        p.encode(sample("<image>", "no", images=[tmp_path / "gone.png"]))


def test_batches_move_between_devices() -> None:
    _, batch = batch_of(processor())
    moved = batch.to("meta")
    assert moved.input_ids.is_meta and moved.pixels["image"].is_meta and moved.sample_ids == ["a", "b", "c"]
    assert not batch.input_ids.is_meta


# --- text again -----------------------------------------------------------------------------------------------------


def test_answers_end_at_end_token_padding_and_stop_strings() -> None:
    p = processor({**QA, "stop": ["###", "human:"]})
    end, pad = p.tokenizer.eos_token_id, p.tokenizer.pad_token_id

    def ids(text: str) -> list[int]:
        return list(p.tokenizer(text, add_special_tokens=False)["input_ids"])

    rows = [
        ids(" red</s>blue"),
        [*ids(" red"), pad, pad],
        ids(" red ### blue"),
        ids(" red\nhuman: more ###"),
        [end, *ids("red")],
        ids(" red "),
    ]
    longest = max(map(len, rows))
    answers = p.decode(torch.tensor([row + [pad] * (longest - len(row)) for row in rows]))
    assert answers == ["red", "red", "red", "red", "", "red"]


def test_options_for_generation() -> None:
    by_token = processor().generation_options()
    assert by_token == {"eos_token_id": [2], "pad_token_id": 0}
    p = processor({**QA, "stop": ["</s>", "<s>", "###", "a"]})
    options = p.generation_options()
    assert options["eos_token_id"] == [1, 2]
    assert options["stop_strings"] == ["###", "a"] and options["tokenizer"] is p.tokenizer
    line = processor({"assistant_suffix": "\n"}).generation_options()
    assert line["stop_strings"] == ["\n"], "a piece of text may be part of many tokens"


# --- tokenizers -----------------------------------------------------------------------------------------------------


def test_tokenizers_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"there is no folder './nowhere'"):
        load_tokenizer("./nowhere")
    with pytest.raises(TokenizerError, match=r"there is no folder .*nothing"):
        load_tokenizer("asset:nothing")
    with pytest.raises(TokenizerError, match="cannot load a tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_padding_borrows_a_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("asset:quickstart")
    size = len(tokenizer)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id == loaded.eos_token_id == 2 and len(loaded) == size


def test_training_a_tokenizer(tmp_path: Path) -> None:
    from minivlm.processors.train_tokenizer import train_tokenizer

    texts = ["what color is the shape?", "a red triangle", "yes, no"] * 5
    trained = train_tokenizer(texts, tmp_path, 300, lowercase=True)
    loaded = load_tokenizer(str(tmp_path))
    assert len(loaded) == len(trained) <= 300
    assert loaded.convert_ids_to_tokens([0, 1, 2]) == ["<pad>", "<s>", "</s>"]
    ids = loaded("What COLOR is the shäpe? 日")["input_ids"]
    assert loaded.decode(ids) == "what color is the shäpe? 日" and loaded.unk_token_id not in ids
