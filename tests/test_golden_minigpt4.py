"""The numbers of the original MiniGPT-4, reproduced through the public API from its own files.

Entries are discovered: a set of other sizes, seeds and pictures (``MINIVLM_GOLDEN``) may lack some of them. Every
test counts what it compared and fails if that was nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from golden_minigpt4 import GOLDEN, golden_minigpt4
from safetensors.torch import load_file
from torch import Tensor

from minivlm import registry
from minivlm.api import assemble
from minivlm.config.experiment import RunConfig
from minivlm.config.loader import parse_model
from minivlm.evaluation.ranking import rank_candidates, sample_losses
from minivlm.models.tuning import parameter_groups
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.processor import VLMProcessor
from minivlm.serve.chat import Chat
from minivlm.types import IGNORE_INDEX, IMAGE_MARKER, IMAGE_TOKEN_ID, Batch, Message, Sample

EXPECTED: dict[str, Any] = json.loads((GOLDEN / "expected" / "expected.json").read_text())
TENSORS: dict[str, Tensor] = load_file(GOLDEN / "expected" / "tensors.safetensors")
INPUTS = GOLDEN / "inputs"
DEFAULT = Path(__file__).parent / "golden" / "minigpt4"
FLOATS, LOSSES, NORMS, CURVE = 1e-4, 1e-4, 1e-3, 1e-3  # the tolerances of the set's README
PLACE = "<Img><ImageHere></Img>"
"""How the original writes a picture; our templates add the tags around the marker."""


def named(prefix: str) -> list[str]:
    return [key for key in EXPECTED if key.startswith(prefix)]


def numbered(pattern: str) -> list[tuple[str, int]]:
    """Names of tensors that match, with the number in them."""
    found = [(name, re.fullmatch(pattern, name)) for name in sorted(TENSORS)]
    return [(name, int(match[1])) for name, match in found if match]


class Compared:
    """Comparisons with the golden numbers, counted."""

    def __init__(self) -> None:
        self.count = 0

    def entry(self, name: str) -> Any:
        """An entry of the set; another set than the default copy may lack it."""
        if name not in EXPECTED and GOLDEN != DEFAULT:
            pytest.skip(f"this set has no {name}")
        return EXPECTED[name]

    def close(self, ours: Tensor, name: str, tolerance: float = FLOATS) -> None:
        """Equal to a stored tensor, if the set has it."""
        if name in TENSORS:
            golden = TENSORS[name]
            assert ours.shape == golden.shape, f"{name}: {tuple(ours.shape)} against {tuple(golden.shape)}"
            torch.testing.assert_close(ours.detach().float(), golden.float(), rtol=0, atol=tolerance, msg=name)
            self.count += 1

    def rows(self, ours: Tensor, mask: Tensor, name: str, golden_mask: Tensor, tolerance: float = FLOATS) -> None:
        """The same for padded batches, where both masks are 1."""
        if name in TENSORS:
            golden = TENSORS[name]
            for row in range(len(ours)):
                mine, theirs = ours[row][mask[row].bool()], golden[row][golden_mask[row].bool()]
                torch.testing.assert_close(mine.detach().float(), theirs.float(), rtol=0, atol=tolerance, msg=name)
            self.count += 1

    def equal(self, ours: Any, golden: Any) -> None:
        """Exactly equal."""
        assert ours == golden
        self.count += 1


@pytest.fixture
def compared(record_property: Callable[[str, object], None]) -> Iterator[Compared]:
    counter = Compared()
    yield counter
    record_property("compared", counter.count)
    assert counter.count > 0 or GOLDEN != DEFAULT, "nothing was compared"


@cache
def parts(variant: str, template: str | None = None, **vision: Any) -> tuple[VisionLanguageModel, VLMProcessor]:
    """Model and processor of a variant of the set, read from the original's files."""
    section = golden_minigpt4(variant, **vision)
    section["template"] = template or section["template"]
    model, processor, _ = assemble(parse_model(section, "golden set"))
    return model.eval(), processor


def pictures() -> list[Any]:
    return [INPUTS / name for name in EXPECTED["images"]]


def pixels() -> Tensor:
    """All pictures [N, 3, H, W], as the set has them or else as we make them."""
    if "pixels" in TENSORS:
        return TENSORS["pixels"]
    return torch.stack([parts("vicuna0")[1].load_pixels(picture)["image"] for picture in pictures()])


def variant_of(case: str) -> str:
    return "v2" if case.startswith("v2") else "llama2" if case.startswith("llama2") else "vicuna0"


def user_text(text: str, template: Any) -> str:
    """The user's own words in a prompt that the original has wrapped already, our marker for its pictures."""
    before = template.user_prefix
    for after in (template.user_suffix + template.assistant_prefix, template.user_suffix + "[/INST]"):
        if after and text.startswith(before) and text.endswith(after):
            text = text[len(before) : -len(after)]
    return text.replace(PLACE, IMAGE_MARKER)


def picture_features(model: VisionLanguageModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Output of the encoder, and the visual tokens behind the connector."""
    with torch.no_grad():
        features = model.vision_encoder(pixels)
        return features, model.connector(features)


# --- pictures and vision --------------------------------------------------------------------------------------------


def test_golden_minigpt4_pixels(compared: Compared) -> None:
    _, processor = parts("vicuna0")
    ours = torch.stack([processor.load_pixels(picture)["image"] for picture in pictures()])
    compared.close(ours, "pixels", 0)
    for name in TENSORS:
        if match := re.fullmatch(r"pixels(\d+)\.(.+)", name):
            transform = registry.get("processor", "blip2_image_eval")
            config = registry.entry("processor", "blip2_image_eval").config_class()(size=int(match[1]))
            small = transform(config, parts("vicuna0")[0].vision_encoder.image_settings)
            from minivlm.processors.image import open_image

            compared.close(small(open_image(INPUTS / f"{match[2]}.png")), name, 0)


def test_golden_minigpt4_vision_encoder(compared: Compared) -> None:
    model, _ = parts("vicuna0")
    encoder: Any = model.vision_encoder
    blocks: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *args: blocks.append(args[2])) for block in encoder.vit.blocks]
    features, visual = picture_features(model, pixels())
    for hook in hooks:
        hook.remove()
    compared.close(blocks[-1], "vit_out")
    for name, number in numbered(r"vit_block(\d+)_first2"):
        compared.close(blocks[number][:2], name)
    compared.close(features, "ln_vision_out")
    compared.close(visual, "projected")
    compared.close(encoder.vit.pos_embed, "pos_embed_loaded")


def test_golden_minigpt4_qformer(compared: Compared) -> None:
    model, _ = parts("vicuna0")
    connector: Any = model.connector
    with torch.no_grad():
        features = model.vision_encoder(pixels())
        queries = connector.query_tokens.expand(len(features), -1, -1)
        output = connector.qformer(query_embeds=queries, encoder_hidden_states=features, output_hidden_states=True)
    compared.close(output.last_hidden_state, "qformer_out")
    for name, number in numbered(r"qformer_hidden(\d+)_first2"):
        compared.close(output.hidden_states[number][:2], name)


def test_golden_minigpt4_other_image_size(compared: Compared) -> None:
    """Positions are interpolated while the file is read."""
    model, processor = parts("vicuna0", image_size=compared.entry("interp_image_size"))
    encoder: Any = model.vision_encoder
    blocks: list[Tensor] = []
    hook = encoder.vit.blocks[-1].register_forward_hook(lambda *args: blocks.append(args[2]))
    _, visual = picture_features(model, processor.load_pixels(pictures()[1])["image"][None])
    hook.remove()
    compared.close(encoder.vit.pos_embed, "interp.pos_embed")
    compared.close(blocks[-1], "interp.vit_out")
    compared.close(visual, "interp.projected")


def test_golden_minigpt4_without_qformer(compared: Compared) -> None:
    model, _ = parts("llama2")
    compared.close(picture_features(model, pixels())[1], "llama2.projected")


# --- names, what trains ---------------------------------------------------------------------------------------------


def test_golden_minigpt4_every_parameter_has_a_place(compared: Compared) -> None:
    """The original's full state dict is ours under other names, in the same shapes."""
    model, _ = parts("vicuna0")
    shapes = sorted(
        shape
        for key, (shape, _) in compared.entry("full_state_keys").items()
        if not key.endswith(("position_ids", "inv_freq"))
    )
    compared.equal(sorted(list(tensor.shape) for tensor in model.state_dict().values()), shapes)


@pytest.mark.parametrize(
    ("variant", "entry"), [("vicuna0", "trainable"), ("v2", "minigptv2_trainable")], ids=["trainable", "lora"]
)
def test_golden_minigpt4_trainable(compared: Compared, variant: str, entry: str) -> None:
    model, _ = parts(variant)
    ours = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    compared.equal(sorted(original_name(name) for name in ours), sorted(compared.entry(entry)))


def test_golden_minigpt4_modes_in_training(compared: Compared) -> None:
    """Frozen parts stay in eval mode; the original leaves its frozen language model out, which changes nothing."""
    model, _ = parts("vicuna0")
    model.train()
    connector: Any = model.connector
    ours = {
        "visual_encoder": model.vision_encoder.training,
        "ln_vision": model.vision_encoder.ln_vision.training,
        "Qformer": connector.qformer.training,
        "llama_proj": connector.linear.training,
    }
    model.eval()
    golden = compared.entry("training_flags_after_model_train")
    compared.equal(ours, {name: golden[name] for name in ours})


def original_name(name: str) -> str:
    """The original's name of a trainable parameter."""
    name = name.replace("connector.linear.", "llama_proj.")
    name = name.replace("language_model.model.", "llama_model.base_model.model.")
    return re.sub(r"(lora_[AB])\.default\.", r"\1.", name)


# --- text -----------------------------------------------------------------------------------------------------------


def test_golden_minigpt4_tokenizer(compared: Compared) -> None:
    """A text that begins with a blank has one piece less in the fast tokenizer; no template makes such a text."""
    _, processor = parts("vicuna0")
    for case in EXPECTED.get("tokenizer_cases", []):
        if not case["text"].startswith(" "):
            compared.equal(processor.tokenizer(case["text"], add_special_tokens=False)["input_ids"], case["ids"])
            compared.equal(processor.tokenizer(case["text"])["input_ids"], case["ids_bos"])
    stated = compared.entry("tokenizer")
    special = {"bos": processor.tokenizer.bos_token_id, "eos": processor.tokenizer.eos_token_id}
    compared.equal(special, {key: stated[key] for key in special})
    compared.equal(processor.tokenizer.convert_tokens_to_ids(stated["pad_token"]), stated["pad_id"])


@pytest.mark.parametrize("entry", ["blip_caption", "blip_caption_prompt"])
def test_golden_minigpt4_captions(compared: Compared, entry: str) -> None:
    cleaner = registry.entry("processor", "blip_caption")
    for case in compared.entry(entry):
        settings = {key: case[key] for key in ("prompt", "max_words") if key in case}
        clean = registry.get("processor", "blip_caption")(cleaner.config_class()(**settings))
        compared.equal(clean(case["in"]), case["out"])


def test_golden_minigpt4_prompt_list(compared: Compared) -> None:
    """The preset's alignment prompts, rendered for training."""
    node = {"arch": "minigpt4", "model_type": "pretrain_vicuna0", "language_model": {"path": str(GOLDEN / "llama")}}
    section = parse_model(node, "preset")
    assert section.processor
    _, processor = parts("vicuna0")
    rendered = []
    for prompt in section.processor.config.prompts:
        text = processor.template.with_images(prompt, 1)
        segments = processor.template.render([Message("user", text), Message("assistant", None)])
        rendered.append(
            "".join(getattr(s, "text", "<ImageHere>" if "Slot" in type(s).__name__ else "") for s in segments)
        )
    compared.equal(rendered, compared.entry("prompt_list"))


# --- training -------------------------------------------------------------------------------------------------------


def train_processor(case: str) -> VLMProcessor:
    """Stage 1 has bare pictures and 32 tokens, stage 2 has 160, MiniGPT-v2 300; a name may state another length."""
    template = "plain" if case.startswith("stage1") else None
    processor = parts(variant_of(case), template)[1]
    stated = re.search(r"(?:trunc|max)(\d+)", case)
    limit = int(stated[1]) if stated else 32 if case.startswith("stage1") else 300 if case.startswith("v2") else 160
    processor.config.max_answer_tokens = limit
    return processor


def train_samples(entry: dict[str, Any], processor: VLMProcessor) -> list[Sample]:
    """The batch of a case: pictures 1 and 2 of the set, unless its texts have no place for them."""
    config = processor.template.config
    samples = []
    for row in range(len(entry["labels"])):
        if "conv_q" in entry:
            questions, answers = (entry[key][row].split(entry["connect_sym"]) for key in ("conv_q", "conv_a"))
        else:
            answers = [entry["answers"][row]]
            asked = entry["instruction_input"][row] if "instruction_input" in entry else entry.get("prompt", PLACE)
            questions = [user_text(asked, config)]
        turns = [
            message
            for question, answer in zip(questions, answers, strict=True)
            for message in (Message("user", question.replace(PLACE, IMAGE_MARKER)), Message("assistant", answer))
        ]
        images = [pictures()[1 + row]] * turns[0].content.count(IMAGE_MARKER)  # type: ignore[union-attr]
        samples.append(Sample(str(row), turns, images))
    return samples


@pytest.mark.parametrize("case", [key.removeprefix("train.") for key in named("train.")])
def test_golden_minigpt4_training(compared: Compared, case: str) -> None:
    entry = EXPECTED[f"train.{case}"]
    model = parts(variant_of(case))[0]
    processor = train_processor(case)
    batch = processor.collate([processor.encode(sample) for sample in train_samples(entry, processor)])
    golden_mask = torch.tensor(entry["attention_mask"])
    for row, labels in enumerate(entry["labels"]):
        kept = [label for label, seen in zip(labels, entry["attention_mask"][row], strict=True) if seen]
        compared.equal(batch.labels[row][batch.attention_mask[row].bool()].tolist(), kept)  # type: ignore[index]
    compared.rows(model.embed(batch), batch.attention_mask, f"{case}.inputs_embeds", golden_mask)
    model.zero_grad()
    output = model(batch, return_logits=True)
    compared.rows(output.logits, batch.attention_mask, f"{case}.logits", golden_mask)
    assert abs(float(output.loss) - entry["loss"]) < LOSSES
    output.loss.backward()
    gradients = {original_name(n): p.grad for n, p in model.named_parameters() if p.requires_grad}
    for name, norm in entry["grad_norm"].items():
        assert float(gradients[name].norm()) == pytest.approx(norm, rel=NORMS), name
        compared.close(gradients[name], f"{case}.grad.{name}")
    compared.count += 1 + len(entry["grad_norm"])
    model.zero_grad()
    if f"{case}.loss_none" in TENSORS:
        with torch.no_grad():
            compared.close(sample_losses(model, batch, per="position"), f"{case}.loss_none", LOSSES)
    compare_condition(compared, case, model, batch)


def compare_condition(compared: Compared, case: str, model: VisionLanguageModel, batch: Batch) -> None:
    """The original's own intermediate steps: the prompt's embeddings, and the answers' ids, without BOS."""
    embeds = model.embed(batch)
    first = [int((labels != IGNORE_INDEX).nonzero()[0]) for labels in batch.labels]  # type: ignore[union-attr]
    ends = batch.attention_mask.sum(1).tolist()
    for kind, mask in (("cond_embeds", "cond_atts"), ("prompt_wrap_embeds", "prompt_wrap_atts")):
        if f"{case}.{kind}" in TENSORS:
            for row, begin in enumerate(first):
                golden = TENSORS[f"{case}.{kind}"][row][TENSORS[f"{case}.{mask}"][row].bool()]
                torch.testing.assert_close(embeds[row, 1:begin].detach(), golden, rtol=0, atol=FLOATS)
            compared.count += 1
    if f"{case}.part_targets" in TENSORS:
        for row, (begin, end) in enumerate(zip(first, ends, strict=True)):
            golden = TENSORS[f"{case}.part_targets"][row][TENSORS[f"{case}.regress_atts"][row].bool()]
            compared.equal(batch.labels[row, begin:end].tolist(), golden.tolist())  # type: ignore[index]


def test_golden_minigpt4_twelve_steps(compared: Compared) -> None:
    """Groups, schedule and updates of a whole training, with the optimiser that the runner makes."""
    entry = compared.entry("train_12_steps")
    config, steps = entry["config"], entry["steps"]
    section = golden_minigpt4("vicuna0")
    model, processor, resolved = assemble(parse_model(section, "golden set"))
    processor.config.max_answer_tokens = 160
    names = ("init_lr", "min_lr", "warmup_lr", "warmup_steps", "max_epoch", "iters_per_epoch", "weight_decay")
    run = RunConfig(compat="minigpt4", **{name: config[name] for name in names})
    schedule = registry.get("lr_scheduler", run.lr_sched)(
        run, config["max_epoch"] * config["iters_per_epoch"], config["iters_per_epoch"]
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, resolved, run.init_lr, run.weight_decay))
    groups = [
        {"n": len(g["params"]), "weight_decay": g["weight_decay"], "betas": list(g["betas"]), "eps": g["eps"]}
        | {"shapes": [list(p.shape) for p in g["params"]]}
        for g in optimizer.param_groups
    ]
    compared.equal(groups, EXPECTED.get("optim_groups", groups))
    prompt = user_text(config["prompt"], processor.template.config)
    model.train()
    for number, step in enumerate(steps):
        samples = [
            Sample(str(row), [Message("user", prompt), Message("assistant", answer)], [pictures()[row]])
            for row, answer in zip(step["images"], config["answers"], strict=True)
        ]
        for group in optimizer.param_groups:
            group["lr"] = schedule(number)
        assert group["lr"] == pytest.approx(step["lr"], rel=1e-9)
        output = model(processor.collate([processor.encode(sample) for sample in samples]))
        assert abs(float(output.loss) - step["loss"]) < CURVE
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        compared.count += 2
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            compared.close(parameter, f"train12.{original_name(name)}", CURVE)


# --- inference ------------------------------------------------------------------------------------------------------


def chat_parts(name: str) -> tuple[VisionLanguageModel, VLMProcessor]:
    """``vicuna0``, ``llama2``, or ``<system>_template_on_<variant>_model``."""
    crossed = re.fullmatch(r"(.+)_template_on_(.+)_model", name)
    if not crossed:
        return parts(name)
    templates = {"minigptv2": "minigpt_v2", "vicuna0": "minigpt4_vicuna0", "llama2": "minigpt4_llama2"}
    return parts(crossed[2], templates[crossed[1]])


def text_runs(ids: Sequence[int]) -> list[list[int]]:
    """The ids of the text in front of, between and behind the pictures."""
    runs: list[list[int]] = [[]]
    for before, now in zip([0, *ids], ids):
        if now != IMAGE_TOKEN_ID:
            runs[-1].append(now)
        elif before != IMAGE_TOKEN_ID:
            runs.append([])
    return runs


def rendered(processor: VLMProcessor, messages: list[Message]) -> str:
    """The prompt for talking as the original writes it."""
    segments = processor.template.render([*messages, Message("assistant", None)], chat=True)
    return "".join(getattr(s, "text", "<ImageHere>" if "Slot" in type(s).__name__ else "") for s in segments)


@pytest.mark.parametrize("name", [key.removeprefix("chat.") for key in named("chat.")])
def test_golden_minigpt4_chat(compared: Compared, name: str) -> None:
    entry = EXPECTED[f"chat.{name}"]
    model, processor = chat_parts(name)
    picture = INPUTS / entry["image"]
    first = Message("user", processor.template.with_images(entry["question"], 1))
    compared.equal(rendered(processor, [first]), entry["prompt"])
    batch = processor.prompt([first], [picture])
    compared.equal(text_runs(batch.input_ids[0].tolist()), entry["segment_ids"])
    with torch.no_grad():
        compared.close(model.embed(batch), f"chat.{name}.context_emb")
        compared.close(model(batch, return_logits=True).logits, f"chat.{name}.logits")
    made_there = entry.get("generate", {})
    longest = max((len(made["new_ids"]) for made in made_there.values()), default=0)
    for kind, made in made_there.items():
        ours = generate(model, batch, made, longest)
        compared.equal((kind, ours), (kind, made.get("new_ids_transformers5", made["new_ids"])))
        if made.get("text") and ours == made["new_ids"]:
            compared.equal(spoken(ours), made["text"])
    if "second_turn_prompt" not in entry:
        return
    prompt = entry["second_turn_prompt"]
    start, history = prompt.index(entry["question"]) + len(entry["question"]), processor.template.chat_config
    said, asked = prompt[start + len(history.user_suffix + history.assistant_prefix) :].split(history.user_prefix, 1)
    second = asked.removesuffix(history.user_suffix + history.assistant_prefix)
    messages = [first, Message("assistant", said), Message("user", second)]
    compared.equal(rendered(processor, messages), prompt)
    batch = processor.prompt(messages, [picture])
    compared.equal(batch.input_ids.shape[1], entry["second_turn_len"])
    with torch.no_grad():
        compared.close(model.embed(batch), f"chat.{name}.second_turn_emb")


def generate(model: VisionLanguageModel, batch: Batch, made: dict[str, Any], longest: int) -> list[int]:
    options = dict(made["settings"])
    options["min_new_tokens"] = options.pop("min_length", None)
    return model.generate(batch, max_new_tokens=longest, **options)[0].tolist()


def spoken(ids: list[int]) -> str:
    """As the slow tokenizer decodes without special tokens; it keeps what follows a broken UTF-8 sequence."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(GOLDEN / "llama" / "tokenizer.model"))
    special = {model.bos_id(), model.eos_id(), model.unk_id(), model.piece_to_id("$$")}  # the last one pads
    return model.decode([token for token in ids if token not in special])


@pytest.mark.parametrize("name", [key.removeprefix("chat.") for key in named("chat.")])
def test_golden_minigpt4_long_conversation(
    compared: Compared, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is left of a conversation that is too long, with a warning when the picture is lost."""
    entry = EXPECTED[f"chat.{name}"]
    model, processor = chat_parts(name)
    seen: list[int] = []
    plain = model.language_model.generate

    def watched(embeds: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(embeds.shape[1])
        return plain(embeds, *args, **options)

    monkeypatch.setattr(model.language_model, "generate", watched)
    for key, kept in entry.items():
        if limits := re.fullmatch(r"trim_max_new(\d+)_max_length(\d+)_kept", key):
            chat = Chat(
                model, processor, max_new_tokens=int(limits[1]), max_length=int(limits[2]), on_overflow="cut_left"
            )
            chat.ask(entry["question"], [INPUTS / entry["image"]])
            compared.equal(seen[-1], kept)
            message = Message("user", processor.template.with_images(entry["question"], 1))
            ids = processor.prompt([message], [INPUTS / entry["image"]]).input_ids[0].tolist()
            assert ("visual tokens" in caplog.text) == (IMAGE_TOKEN_ID in ids[:-kept])


def test_golden_minigpt4_v2_chat(compared: Compared) -> None:
    entry = compared.entry("v2_chat")
    model, processor = parts("v2")
    text = entry["prompt"].removeprefix(processor.template.chat_config.user_prefix).removesuffix(" [/INST]")
    message = Message("user", text.replace(PLACE, IMAGE_MARKER))
    compared.equal(rendered(processor, [message]), entry["prompt"])
    image = next((EXPECTED[key]["image"] for key in named("chat.")), None)
    if image is None:
        pytest.skip("this set does not say which picture it was")
    batch = processor.prompt([message], [INPUTS / image])
    compared.equal(text_runs(batch.input_ids[0].tolist()), entry["segment_ids"])
    with torch.no_grad():
        compared.close(model.embed(batch), "v2.chat_context_emb")
        compared.close(model(batch, return_logits=True).logits, "v2.chat_logits")
    compared.equal(
        model.generate(batch, max_new_tokens=len(entry["greedy_new_ids"]))[0].tolist(), entry["greedy_new_ids"]
    )


def test_golden_minigpt4_two_pictures(compared: Compared) -> None:
    _, processor = parts("vicuna0")
    model = parts("vicuna0")[0]
    text = user_text(compared.entry("two_image_prompt"), processor.template.config)
    golden = TENSORS.get("two_image.context_emb")
    if golden is None:
        return
    matches = 0
    for pair in permutations(pictures(), 2):  # which two it was, the set does not say
        batch = processor.collate([processor.prompt_sample(Sample("two", [Message("user", text)], list(pair)))])
        embeds = model.embed(batch).detach()
        matches += embeds.shape == golden.shape and float((embeds - golden).abs().max()) < FLOATS
    compared.equal(matches, 1)


def test_golden_minigpt4_stop_words(compared: Compared) -> None:
    entry = compared.entry("stop_word_case")
    model, processor = parts("vicuna0")
    talk = compared.entry("chat.vicuna0")
    message = Message("user", processor.template.with_images(talk["question"], 1))
    batch = processor.prompt([message], [INPUTS / talk["image"]])
    stop = processor.tokenizer.decode(entry["stop_ids"])
    limit = 2 * len(entry["new_ids"])
    ids = model.generate(batch, max_new_tokens=limit, stop_strings=[stop], tokenizer=processor.tokenizer)
    compared.equal(ids[0].tolist(), entry["new_ids"])


def prompts_of(entry: dict[str, Any], processor: VLMProcessor) -> list[Sample]:
    config = processor.template.config
    return [
        Sample(str(row), [Message("user", user_text(text, config))], [INPUTS / image])
        for row, (text, image) in enumerate(zip(entry["texts"], entry["images"], strict=True))
    ]


def test_golden_minigpt4_batch_generation(compared: Compared) -> None:
    entry = compared.entry("batch_generate")
    model, processor = parts("vicuna0")
    encoded = [processor.prompt_sample(sample) for sample in prompts_of(entry, processor)]
    ids = model.generate(processor.collate(encoded, for_generation=True), max_new_tokens=entry["max_new_tokens"])
    for ours, raw, answer in zip(ids.tolist(), entry["raw"], entry["answers"], strict=True):
        compared.equal(ours, raw[1:])  # the old library gave back a BOS of its own
        compared.equal(spoken(ours).strip(), answer.strip())


def test_golden_minigpt4_ranking(compared: Compared) -> None:
    entry = compared.entry("multi_select")
    model, processor = parts("vicuna0")
    samples = prompts_of(entry, processor)
    compared.equal(rank_candidates(model, processor, samples, entry["candidates"], per="position"), entry["ranks"])


def test_golden_minigpt4_every_kind_is_there() -> None:
    """The default copy holds every kind of entry that the tests above look for, whichever set they read."""
    entries = set(json.loads((DEFAULT / "expected" / "expected.json").read_text()))
    tensors = set(load_file(DEFAULT / "expected" / "tensors.safetensors"))
    whole = ("interp_image_size", "v2_chat", "stop_word_case", "batch_generate", "multi_select", "train_12_steps")
    whole += ("two_image_prompt", "trainable", "minigptv2_trainable", "blip_caption", "blip_caption_prompt")
    whole += (
        "tokenizer",
        "prompt_list",
        "training_flags_after_model_train",
        "optim_groups",
        "full_state_keys",
        "tokenizer_cases",
    )
    assert set(whole) <= entries
    for prefix in ("train.stage1", "train.stage2", "train.mixed", "train.llama2", "train.v2_", "chat."):
        assert any(name.startswith(prefix) for name in entries), prefix
    endings = (".inputs_embeds", ".logits", ".labels", ".attention_mask", ".loss", ".context_emb", ".second_turn_emb")
    endings += (".loss_none", ".cond_embeds", ".part_targets", ".chat_logits")
    assert all(any(name.endswith(end) for name in tensors) for end in endings)
    assert any(".grad." in name for name in tensors) and any(name.startswith("train12.") for name in tensors)
    patterns = (r"vit_block(\d+)_first2", r"qformer_hidden(\d+)_first2", r"pixels(\d+)\..*")
    assert all(any(re.fullmatch(pattern, name) for name in tensors) for pattern in patterns)
