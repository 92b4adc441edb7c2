"""Mini-Gemini's ids, labels, prompts, orders, batches and language models, as the original made them."""

# ruff: noqa: F401, F811  (`compared` is a fixture that comes from elsewhere)

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
import torch
from golden_compared import Compared
from golden_mgm import BASES, FOLDERS, GOLDEN, compared, golden_json
from golden_mgm_text import (
    START_END,
    WEIGHTS,
    batch_of,
    encoded,
    expected,
    messages,
    model,
    processor,
    template,
    tokenizer,
    train_samples,
    visual_tokens,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from minivlm.checkpoints.foreign import translate
from minivlm.datasets.grouping import group_by_length, group_by_modality, in_order
from minivlm.processors.template import ImageSlot, Segment, Template, Text, count_slots, tokenize
from minivlm.processors.tokenizer import load_tokenizer
from minivlm.types import IGNORE_INDEX, IMAGE_MARKER, IMAGE_TOKEN_ID, Batch, Encoded, Message

LOGITS, LOSSES = 1e-4, 1e-5
CASES = golden_json("templates.json")["preprocess"]
PROMPTS = golden_json("templates.json")["inference_prompts"]
PADS = {case["tokenizer"]: case["pad_token_id"] for case in CASES if case["pad_token_id"] is not None}
BROKEN_MASKS = ("llava_v0",)
"""The original's masks are off by some tokens; ours are the answers."""
each_folder = pytest.mark.parametrize("folder", FOLDERS)


def having(name: str) -> list[str]:
    """The checkpoints of whose outputs the set has this one."""
    return [folder for folder in FOLDERS if name in expected(folder)]


def ids_and_labels(case: dict[str, Any]) -> tuple[Template, Any, list[int], list[int]]:
    start_end = case["mm_use_im_start_end"]
    around = {"image": "{image}".join(START_END)} if start_end else {}
    made, words = template(case["template"], **around), tokenizer(case["tokenizer"], start_end)
    segments = made.render(messages(case["conversations"]))
    return made, words, *tokenize(segments, words, [1] * count_slots(segments))


# --- templates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({f"{case['template']} {case['tokenizer']}" for case in CASES}))
def test_golden_mini_gemini_ids_and_labels(name: str, compared: Compared) -> None:
    for case in (case for case in CASES if f"{case['template']} {case['tokenizer']}" == name):
        made, words, ids, labels = ids_and_labels(case)
        compared.equal(ids, case["input_ids"])
        compared.equal(len(words), case["vocab_len"])
        if case["template"] not in BROKEN_MASKS:
            compared.equal(labels, case["labels"])
            continue
        answers = [m.content for m in messages(case["conversations"]) if m.role == "assistant"]
        learned = words.decode([label for label in labels if label != IGNORE_INDEX])
        wanted = "".join(f"{answer}{made.config.assistant_suffix}" for answer in answers)
        assert learned.replace(" ", "") == wanted.replace(" ", "")


@pytest.mark.parametrize("golden", PROMPTS, ids=lambda golden: golden["template"])
def test_golden_mini_gemini_prompts(golden: dict[str, Any], compared: Compared) -> None:
    made = template(golden["template"])
    for turn in ("first_turn", "second_turn"):
        turns = [*talk(CASES)[: 1 if turn == "first_turn" else 3], Message("assistant", None)]
        rendered = made.render(turns, chat=True)
        compared.equal("".join(s.text if isinstance(s, Text) else IMAGE_MARKER for s in rendered), golden[turn])


def talk(cases: list[dict[str, Any]]) -> list[Message]:
    """The conversation of two turns with a picture, of which the prompts are made."""
    return next(messages(case["conversations"]) for case in cases if case["case"] == "two_turn_image")


@pytest.mark.parametrize(("name", "like"), [("v0_mmtag", "llava_v0"), ("v1_mmtag", "llava_v1")])
def test_golden_mini_gemini_tags_stand_in_training_only(name: str, like: str, compared: Compared) -> None:
    """The set has no training case of these two: they are the other form with another system text and tags."""
    made, other = template(name), template(like)
    theirs = Template(other.config)
    theirs.config.system, theirs.config.image = made.config.system, "<Image>{image}</Image>"
    compared.equal(made.render(talk(CASES)), theirs.render(talk(CASES)))
    assert "<Image>" not in "".join(
        s.text.replace(made.config.system, "") for s in made.render(talk(CASES), chat=True) if isinstance(s, Text)
    )


@pytest.mark.parametrize("tokens", sorted(PADS))
def test_golden_mini_gemini_pad_token(tokens: str, compared: Compared) -> None:
    """Where the tokenizer has none it is the unknown one; LLaMA-3, which has neither, is given one by its role."""
    folder, reserved = str(GOLDEN / "tokenizers" / tokens), "<|reserved_special_token_0|>"
    special = {"pad_token": reserved} if reserved in load_tokenizer(folder).get_vocab() else None
    compared.equal(load_tokenizer(folder, None, special).pad_token_id, PADS[tokens])


# --- orders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(golden_json("sampler.json"))))
def test_golden_mini_gemini_sampler(number: int, compared: Compared) -> None:
    case = golden_json("sampler.json")[number]
    lengths, size, world = case["lengths"], case["batch_size"], case["world_size"]
    one = torch.Generator().manual_seed(case["torch_seed"])
    order = group_by_modality(lengths, size, world, inside=one, between=one, join=in_order)
    compared.equal(order, case["modality_grouped"])
    one = torch.Generator().manual_seed(case["torch_seed"])
    grouped = group_by_length([abs(length) for length in lengths], size, world, one)
    compared.equal([index for mega in grouped for index in mega], case["length_grouped"])


# --- batches --------------------------------------------------------------------------------------------------------


@each_folder
def test_golden_mini_gemini_batch(folder: str, compared: Compared) -> None:
    golden, made = expected(folder), processor(folder)
    rows = train_samples()[: len(golden["batch.input_ids"])]
    batch = made.collate([made.encode(sample) for sample in rows])
    for field in ("input_ids", "labels", "attention_mask"):
        compared.close(getattr(batch, field), golden[f"batch.{field}"].long(), 0, field)


@each_folder
def test_golden_mini_gemini_splice(folder: str, compared: Compared) -> None:
    check_splice(folder, "splice", batch_of(folder), compared)


@pytest.mark.parametrize("folder", having("splice_left.labels"))
def test_golden_mini_gemini_left_padding(folder: str, compared: Compared) -> None:
    check_splice(folder, "splice_left", batch_of(folder, left=True), compared)


@pytest.mark.parametrize("folder", having("splice_trunc.labels"))
def test_golden_mini_gemini_truncation_inside_a_picture(folder: str, compared: Compared) -> None:
    limit = golden_json(f"{folder}/expected.json")["splice_trunc.max_length"]
    batch = batch_of(folder, max_length=limit, on_overflow="cut_right")
    assert batch.image_tokens is not None, "the cut is inside a picture"
    check_splice(folder, "splice_trunc", batch, compared)


def check_splice(folder: str, name: str, batch: Batch, compared: Compared) -> None:
    """Labels, mask, positions and embeddings; the original's are not yet scaled, and zero where nothing stands."""
    golden = {key.removeprefix(f"{name}."): t for key, t in expected(folder).items() if key.startswith(f"{name}.")}
    mask = batch.attention_mask
    compared.close(mask, golden["attention_mask"].long(), 0, "mask")
    compared.close(batch.labels, golden["labels"], 0, "labels")  # type: ignore[arg-type]
    seen: dict[str, Tensor] = {}
    whole = model(folder)
    hook = whole.language_model.register_forward_pre_hook(lambda _, given: seen.update(positions=given[2]))
    with torch.no_grad():
        whole(batch)
        embeds = whole.embed(batch)
    hook.remove()
    compared.close(seen["positions"] * mask, golden["position_ids"] * mask, 0, "positions")
    for row, theirs in zip(range(len(embeds)), golden.get("inputs_embeds", []), strict=False):
        there = mask[row].bool()
        scaled = theirs * whole.language_model.embed_scale
        compared.close(embeds[row][there], scaled[there], LOGITS, "embeddings")


@pytest.mark.parametrize("folder", having("two_images.inputs_embeds"))
def test_golden_mini_gemini_two_pictures_in_a_prompt(folder: str, compared: Compared) -> None:
    """The set does not tell the prompt, but its text can be read off the embeddings of the words."""
    golden, whole, visual = expected(folder)["two_images.inputs_embeds"][0], model(folder), visual_tokens(folder)
    words = whole.language_model.model.get_input_embeddings().weight.detach()
    made, scale = processor(folder, visual.shape[1]), whole.language_model.embed_scale
    distance, ids = (golden[:, None] - words).abs().amax(-1).min(-1)
    known = [int(token) if near < LOGITS else IMAGE_TOKEN_ID for near, token in zip(distance, ids)]
    segments: list[Segment] = []
    for is_picture, run in groupby(known, lambda token: token == IMAGE_TOKEN_ID):
        tokens = list(run)
        slots: list[Segment] = [ImageSlot()] * (len(tokens) // visual.shape[1])
        segments += slots if is_picture else [Text(made.tokenizer.decode(tokens, skip_special_tokens=True))]
    assert count_slots(segments) == len(visual) == 2
    ours, labels = tokenize(segments, made.tokenizer, [visual.shape[1]] * 2)
    batch = made.collate([Encoded(ours, labels, features=list(visual), tokens_per_image=[visual.shape[1]] * 2)])
    compared.close(whole.embed(batch)[0], golden * scale, LOGITS, "embeddings")


# --- language models ------------------------------------------------------------------------------------------------


@each_folder
def test_golden_mini_gemini_logits_and_loss(folder: str, compared: Compared) -> None:
    golden, numbers, batch = expected(folder), golden_json(f"{folder}/expected.json"), batch_of(folder)
    with torch.no_grad():
        output = model(folder)(batch, return_logits=True)
    compared.equal(int(output.token_count), numbers["n_supervised"])
    compared.close(output.loss, torch.tensor(numbers["loss"]), LOSSES, "loss")
    assert output.router_loss is None
    for row, mask in enumerate(batch.attention_mask.bool()):
        last = int(mask.nonzero()[-1])
        compared.close(output.logits[row, last], golden["logits_last"][row], LOGITS, "last logits")
        if "logits_stride8" in golden:
            ours = output.logits[row, ::8][mask[::8]]
            compared.close(ours, golden["logits_stride8"][row][mask[::8]], LOGITS, "logits")


@pytest.mark.parametrize("folder", [f for f in FOLDERS if "aux_loss" in golden_json(f"{f}/expected.json")])
def test_golden_mini_gemini_router_loss(folder: str, compared: Compared) -> None:
    numbers = golden_json(f"{folder}/expected.json")
    whole = model(folder, numbers["router_aux_loss_coef"])
    batch = batch_of(folder)
    with torch.no_grad():
        output = whole.train()(batch)
        evaluated = whole.eval()(batch)
    compared.close(output.router_loss, torch.tensor(numbers["aux_loss"]), LOSSES, "router loss")
    compared.close(output.loss, torch.tensor(numbers["loss_with_router"]), LOSSES, "loss with router")
    compared.close(evaluated.loss, torch.tensor(numbers["loss"]), LOSSES, "loss of an evaluation")


@each_folder
def test_golden_mini_gemini_greedy_ids(folder: str, compared: Compared) -> None:
    """The pictures of the training samples and questions of text only; no end token is set."""
    golden = golden_json(f"{folder}/expected.json")
    visual = visual_tokens(folder)
    with_picture = [sample for sample in train_samples() if sample.images][: len(visual)]
    known = {str(sample.images[0]).rpartition("/")[2]: tokens for sample, tokens in zip(with_picture, visual)}
    made, whole = processor(folder, visual.shape[1]), model(folder)
    for record in golden["generation"]:
        if record["image"] is not None and record["image"] not in known:
            continue
        pictures = [record["image"]] if record["image"] else []
        text = made.template.with_images(record["question"], len(pictures))
        batch = made.prompt([Message("user", text)], encoded_images=len(pictures))
        single = processor(folder).prompt([Message("user", text)], encoded_images=len(pictures))
        compared.equal(single.input_ids[0].tolist(), record["input_ids"])
        tokens = torch.stack([known[name] for name in pictures]) if pictures else None
        options = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": len(record["new_ids"])}
        compared.equal(whole.generate(batch, visual=tokens, **options)[0].tolist(), record["new_ids"])


@pytest.mark.parametrize("folder", BASES)
def test_golden_mini_gemini_weights_go_back(folder: str, compared: Compared, tmp_path: Any) -> None:
    """What the rules take in they give back to the bit, also as a file."""
    weights = load_file(GOLDEN / folder / "model.safetensors")
    given = translate(WEIGHTS, weights)
    language = {name: t for name, t in given.tensors.items() if name.startswith("language_model.model.model.layers.")}
    back, lost = WEIGHTS.back(language)
    save_file(back, tmp_path / "back.safetensors")
    assert not lost
    read = load_file(tmp_path / "back.safetensors")
    compared.equal(set(read), {name for name in weights if name.startswith("model.layers.")})
    for name, tensor in read.items():
        compared.close(tensor, weights[name], 0, name)
