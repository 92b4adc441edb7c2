"""The template engine: what is rendered, what is supervised, and that ids and mask never disagree."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import yaml
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from minivlm import registry
from minivlm.processors.configs import TemplateConfig
from minivlm.processors.template import (
    Cut,
    ImageSlot,
    Segment,
    Template,
    TemplateError,
    Text,
    adds_bos,
    begins,
    count_slots,
    tokenize,
)
from minivlm.processors.tokenizer import load_tokenizer
from minivlm.types import IGNORE_INDEX, IMAGE_TOKEN_ID, Message

TEMPLATES = registry.names("template")


def template(name: str) -> Template:
    return Template(TemplateConfig(**yaml.safe_load(registry.get("template", name).read_text())))


def talk(*texts: str | None, system: str | None = None) -> list[Message]:
    """Messages of the user and the assistant in turns."""
    turns = [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return [*([Message("system", system)] if system is not None else []), *turns]


def show(segments: list[Segment]) -> str:
    """Segments as one string: [supervised], @ for a picture, | for a cut."""
    marks = {ImageSlot: "@", Cut: "|"}
    return "".join(
        (f"[{s.text}]" if s.supervised else s.text) if isinstance(s, Text) else marks[type(s)] for s in segments
    )


def rendered(messages: list[Message], chat: bool = False, **settings: Any) -> str:
    return show(Template(TemplateConfig(**settings)).render(messages, chat=chat))


SIMPLE: dict[str, Any] = {"user_prefix": "U:", "assistant_prefix": "A:", "answer_prefix": " ", "assistant_suffix": "."}


# --- rendering ------------------------------------------------------------------------------------------------------


def test_the_order_of_all_the_parts() -> None:
    config = TemplateConfig(
        system="sys", system_prefix="(", system_suffix=")", user_prefix="<u>", user_suffix="</u>",
        assistant_prefix="<a>", answer_prefix="~", assistant_suffix="</a>", turn_end="!", turn_separator="+",
        image="{{image}}".replace("{{", "<i>{").replace("}}", "}</i>"),
    )  # fmt: skip
    assert show(Template(config).render(talk("<image>q1", "a1", "q2", "a2"))) == (
        "(sys)<u><i>@</i>q1</u><a>[~a1</a>]!+<u>q2</u><a>[~a2</a>]!"
    )


def test_texts_of_one_kind_are_joined_and_empty_ones_are_left_out() -> None:
    segments = Template(TemplateConfig(**SIMPLE)).render(talk("q", "a"))
    assert segments == [Text("U:qA:"), Text(" a.", True)]
    assert Template(TemplateConfig()).render(talk("", "a")) == [Text("a", True)]


def test_an_open_turn_ends_behind_the_assistants_prefix() -> None:
    assert rendered(talk("q", None), **SIMPLE) == "U:qA:"
    assert rendered(talk("q", "a", "r", None), **SIMPLE) == "U:qA:[ a.]U:rA:"
    assert rendered(talk("q", None), **SIMPLE, cut=["answer"]) == "U:qA:|"


def test_a_last_question_without_an_answer_is_kept() -> None:
    assert rendered(talk("q"), **SIMPLE) == "U:q"


def test_the_system_text() -> None:
    settings = {**SIMPLE, "system": "default", "system_prefix": "S:", "system_suffix": "/"}
    assert rendered(talk("q", "a"), **settings) == "S:default/U:qA:[ a.]"
    assert rendered(talk("q", "a", system="own"), **settings) == "S:own/U:qA:[ a.]"
    assert rendered(talk("q", "a", system=""), **settings) == "U:qA:[ a.]"
    inside = {**settings, "system_in_user": True}
    assert rendered(talk("q", "a", "r", "b"), **inside) == "U:S:default/qA:[ a.]U:rA:[ b.]"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<image>q", "@q"),
        ("q<image>", "q@"),
        ("is <image> like <image>?", "is @ like @?"),
        ("<image><image>", "@@"),
        ("no picture", "no picture"),
    ],
)
def test_pictures_stay_where_they_are(content: str, expected: str) -> None:
    assert rendered(talk(content, "a"), user_suffix="|") == expected + "|[a]"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<image>\nq", "@\nq"),
        ("q\n<image>", "@\nq"),
        ("  is it <image> red? ", "@\nis it  red?"),
        ("<image>", "@"),
        ("<image><image>\nq", "@\nq"),
        ("  kept ", "  kept "),
    ],
)
def test_pictures_collapse_to_the_front(content: str, expected: str) -> None:
    """As the LLaVA family does: one marker and a line break; text without pictures is not touched."""
    assert rendered(talk(content, "a"), markers="collapse_to_front", user_suffix="|") == expected + "|[a]"


@pytest.mark.parametrize("content", ["<image>\n q\nReference: a\n", "q\nReference: a<image>\n"])
def test_the_end_of_what_is_said_stays_in_a_chat(content: str) -> None:
    config = TemplateConfig(markers="collapse_to_front", user_suffix="|")
    messages = talk(content, None)
    assert show(Template(config).render(messages, chat=True)) == "@\nq\nReference: a\n|"
    assert show(Template(config).render(messages)) == "@\nq\nReference: a|"


def test_text_around_pictures_and_pictures_in_answers_are_not_supervised() -> None:
    assert rendered(talk("<image>q", "see <image> there"), image="<{image}>") == "<@>q[see ]<@>[ there]"


def test_user_text_may_be_dropped() -> None:
    assert rendered(talk("<image>\ndescribe <image> this", "a"), user_text="drop", assistant_suffix="\n") == "@@[a\n]"
    assert rendered(talk("what?", "a"), user_text="drop") == "[a]"


def test_cuts_around_the_answer() -> None:
    assert rendered(talk("q", "a", "r", "b"), **SIMPLE, cut=["image", "answer"], turn_end="~") == (
        "U:qA:|[ a.]|~U:rA:|[ b.]|~"
    )


def test_only_the_last_answer_may_be_supervised() -> None:
    assert rendered(talk("q", "a", "r", "b"), **SIMPLE, supervise="last") == "U:qA: a.U:rA:[ b.]"
    assert rendered(talk("q", "a", "r", None), **SIMPLE, supervise="last") == "U:qA:[ a.]U:rA:"


def test_the_form_for_talking() -> None:
    config = TemplateConfig(**SIMPLE, chat={"system": "S", "assistant_suffix": ""})
    messages = talk("q", "a", "r", None)
    assert show(Template(config).render(messages)) == "U:qA:[ a.]U:rA:"
    assert show(Template(config).render(messages, chat=True)) == "SU:qA:[ a]U:rA:"
    with pytest.raises(TemplateError, match="unknown keys asistant_suffix"):
        Template(TemplateConfig(chat={"asistant_suffix": ""}))


@pytest.mark.parametrize("image", ["", "<Img></Img>", "{image}{image}"])
def test_the_place_of_a_picture_must_be_named_once(image: str) -> None:
    with pytest.raises(TemplateError, match=r"must hold \{image\} once"):
        Template(TemplateConfig(image=image))
    with pytest.raises(TemplateError, match=r"must hold \{image\} once"):
        Template(TemplateConfig(chat={"image": image}))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no user turn"),
        ([Message("system", "s")], "no user turn"),
        (talk("q", ""), "turn 2: the answer is empty"),
        (talk("q", " \n"), "turn 2: the answer is empty"),
        ([Message("assistant", "a")], "turn 1 is from 'assistant', but 'user' is due"),
        ([Message("user", "q"), Message("user", "r")], "turn 2 is from 'user', but 'assistant' is due"),
        ([*talk("q", "a"), Message("system", "s")], "turn 3 is from 'system', but 'user' is due"),
        (talk("q", None, "r", "a"), "turn 2 has no text"),
        ([Message("user", None)], "turn 1 has no text"),
        ([Message("tool", "x")], "turn 1 is from 'tool', but 'user' is due"),
    ],
)
def test_turns_out_of_order(messages: list[Message], reason: str) -> None:
    with pytest.raises(TemplateError, match=re.escape(reason)):
        Template(TemplateConfig()).render(messages)


def test_a_leading_assistant_may_be_dropped() -> None:
    messages = [Message("assistant", "hello"), *talk("q", "a")]
    assert rendered(messages, **SIMPLE, leading_assistant="drop") == "U:qA:[ a.]"
    with pytest.raises(TemplateError, match="no user turn"):
        rendered(messages[:1], **SIMPLE, leading_assistant="drop")


def test_a_leading_assistant_may_be_kept() -> None:
    messages = [Message("assistant", "hello"), *talk("q", "a")]
    system: dict[str, Any] = {"system": "S", "system_in_user": True, "turn_separator": "+", "leading_assistant": "keep"}
    assert rendered(messages, **SIMPLE, **system) == "A:[ hello.]+U:SqA:[ a.]"
    assert rendered(messages[1:], **SIMPLE, **system) == "U:SqA:[ a.]"
    with pytest.raises(TemplateError, match="no user turn"):
        rendered(messages[:1], **SIMPLE, **system)
    with pytest.raises(TemplateError, match="turn 2 is from 'assistant', but 'user' is due"):
        rendered([*messages[:1], *messages[:1]], **SIMPLE, **system)


def test_messages_are_not_changed() -> None:
    messages = talk("q", "a", system="s")
    before = [Message(m.role, m.content) for m in messages]
    rendered(messages, **SIMPLE)
    assert messages == before


def test_what_ends_an_answer() -> None:
    def stops(**settings: Any) -> list[str]:
        return Template(TemplateConfig(**settings)).stop

    assert stops(stop=["###"], assistant_suffix="</s>") == ["###"]
    assert stops(assistant_suffix=" </s>") == ["</s>"]
    assert stops(assistant_suffix="\n") == ["\n"]
    assert stops() == []


def test_pictures_are_counted() -> None:
    assert count_slots([Text("a"), ImageSlot(), Cut(), ImageSlot()]) == 2 and count_slots([]) == 0


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. "
)
KNOWN = {
    "vicuna_v1": VICUNA + "USER: @\nWhat? ASSISTANT:[ Red.</s>]USER: Why? ASSISTANT:[ So.</s>]",
    "llava_v1": VICUNA.replace("user ", "human ").replace("user's", "human's")
    + "USER: @\nWhat? ASSISTANT:[ Red.</s>]USER: Why? ASSISTANT:[ So.</s>]",
    "phi_2": VICUNA + "USER: @\nWhat? ASSISTANT:[ Red.<|endoftext|>]USER: Why? ASSISTANT:[ So.<|endoftext|>]",
    "mistral_instruct": "[INST] @\nWhat? [/INST][ Red. </s>]<s>[INST] Why? [/INST][ So. </s>]",
    "chatml_direct": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n@\nWhat?<|im_end|>"
    "<|im_start|>assistant\n[Red.<|im_end|>]<|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n[So.<|im_end|>]",
    "gemma": "<start_of_turn>user\n@\nWhat?<end_of_turn>\n<start_of_turn>model\n[Red.<end_of_turn>\n<eos>]"
    "<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n[So.<end_of_turn>\n<eos>]",
    "plain": "@[Red.\n][So.\n]",
    "qa": "Question: @\nWhat?\nAnswer:[ Red.</s>]\nQuestion: Why?\nAnswer:[ So.</s>]\n",
    "minigpt4_vicuna0": "###Human: <Img>@</Img>\nWhat? ###Assistant: |[Red.###]|"
    "###Human: Why? ###Assistant: |[So.###]|",
}
KNOWN["minigpt4_vicuna0_v1"] = KNOWN["minigpt4_vicuna0"]


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_published_forms(name: str) -> None:
    shown = show(template(name).render(talk("<image>\nWhat?", "Red.", "Why?", "So.")))
    assert shown.replace("][", "") == KNOWN[name].replace("][", "")


@pytest.mark.parametrize(("name", "end"), [("minigpt4_vicuna0", "Assistant: "), ("minigpt4_vicuna0_v1", "Assistant:")])
def test_minigpt4_talks_in_another_form(name: str, end: str) -> None:
    shown = show(template(name).render(talk("<image> What?", "Red.", "Why?", None), chat=True))
    assert shown.replace("[", "").replace("]", "") == (
        "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to "
        "you. Please answer my questions.###Human: <Img>@</Img> What?###Assistant: Red."
        f"###Human: Why?###{end}"
    )


def test_pictures_without_a_place_stand_in_front() -> None:
    assert template("minigpt4_vicuna0").with_images("What?", 2) == "<image> <image> What?"
    assert template("llava_v1").with_images("What?", 1) == "<image>\nWhat?"
    assert template("llava_v1").with_images("Look: <image>", 1) == "Look: <image>"


# --- tokenizers -----------------------------------------------------------------------------------------------------

TEXTS = [
    "Question: what color is the shape?\nAnswer: red\n",
    VICUNA + "USER: what is it? ASSISTANT: a small red triangle",
    "###Human: look ###Assistant: two cats###",
    "user\nis it blue? model\nassistant\nsystem\n\nyes, it is",
    "yes no 12 7 a b c d e f g h i j",
] * 4
CONTROL = re.compile(r"<\|\w+\|>|<(?:start|end)_of_turn>|<eos>")
LLAMA3_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def control_tokens() -> list[AddedToken]:
    """Every special token that a registered template writes."""
    found = {token for name in TEMPLATES for token in CONTROL.findall(registry.get("template", name).read_text())}
    return [AddedToken(token, special=True, normalized=False) for token in sorted(found)]


def finished(tokenizer: Tokenizer, **special: str) -> Any:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **special)
    fast.add_tokens(control_tokens(), special_tokens=True)
    return fast


def byte_level(*, trim: bool = False, bos: bool = False, words: str | None = None) -> Any:
    """As GPT-2 (Phi-2); with ``words`` as LLaMA 3."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    split = [pre_tokenizers.Split(Regex(words), "isolated")] if words else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    after: list[Any] = [processors.ByteLevel(trim_offsets=trim)]
    after += [processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])] if bos else []
    tokenizer.post_processor = processors.Sequence(after)
    return finished(tokenizer, pad_token="<pad>")


def sentencepiece(scheme: str) -> Any:
    """As LLaMA's: blanks are letters, a blank stands in front, unknown characters are bytes."""
    blanks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    draft = Tokenizer(models.BPE(unk_token="<unk>"))
    draft.normalizer = blanks
    draft.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=480, special_tokens=special, show_progress=False)
    draft.train_from_iterator([text.replace("\n", " ") for text in TEXTS], trainer)
    learned = json.loads(draft.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(learned["vocab"], merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if scheme == "normalizer":
        tokenizer.normalizer = blanks
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return finished(tokenizer, unk_token="<unk>", pad_token="<unk>")


def quickstart() -> Any:
    tokenizer = load_tokenizer("asset:quickstart")
    tokenizer.add_tokens(control_tokens(), special_tokens=True)
    return tokenizer


BUILD: dict[str, Callable[[], Any]] = {
    "quickstart": quickstart,
    "gpt2": byte_level,
    "llama3": lambda: byte_level(words=LLAMA3_WORDS, bos=True),
    "trimmed offsets": lambda: byte_level(trim=True, bos=True),
    "sentencepiece": lambda: sentencepiece("first"),
    "sentencepiece always": lambda: sentencepiece("always"),
    "sentencepiece legacy": lambda: sentencepiece("normalizer"),
}


@cache
def tokenizer_of(name: str) -> Any:
    return BUILD[name]()


@cache
def byte_letters() -> dict[str, int]:
    """Letter of byte-level BPE -> byte (the table of GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def spell(tokenizer: Any, ids: list[int]) -> str:
    """The text of ids, byte by byte and without what a decoder tidies up."""
    raw = b""
    added = tokenizer.get_added_vocab()
    for token in tokenizer.convert_ids_to_tokens(ids):
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            raw += bytes([int(token[3:5], 16)])
        elif token in added:
            raw += token.encode()
        elif "<0x41>" in tokenizer.get_vocab():
            raw += token.replace("▁", " ").encode()
        else:
            raw += bytes(byte_letters()[letter] for letter in token)
    return raw.decode()


def alike(name: str, text: str) -> str:
    """A text as far as a tokenizer keeps it: sentencepiece invents blanks, the quickstart has no capitals."""
    return text.replace(" ", "") if name.startswith("sentencepiece") else text.lower() if name == "quickstart" else text


CONVERSATIONS = {
    "one turn": talk("<image>\nwhat color is it?", "red"),
    "three turns": talk("<image>\nwhat is it?", "a small, red triangle!", "why?", "12 é  ¿no? 日本", "look", "yes no"),
    "text only": talk("what is a triangle?", "a shape with three sides."),
    "picture behind": talk("what is it? <image>", "two cats", "and <image> in the middle?", "no"),
    "end marks in the text": talk("say </s> and ###", "the ### and </s> end, USER: x ASSISTANT: y"),
    "own system": talk("<image>what?", "it is\nblue", system="answer shortly."),
}
PAIRS = [(t, k) for t in TEMPLATES for k in BUILD]


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_the_mask_is_exactly_the_declared_spans(name: str, kind: str) -> None:
    """Supervised ids spell the declared spans and nothing else, the other ids all the rest."""
    form, tokenizer = template(name), tokenizer_of(kind)
    for title, messages in CONVERSATIONS.items():
        segments = form.render(messages)
        config = form.config
        spans = [
            config.answer_prefix + config.think_prefix + config.think_suffix + message.content + config.assistant_suffix
            for message in messages
            if message.role == "assistant" and message.content is not None
        ]
        assert "".join(s.text for s in segments if isinstance(s, Text) and s.supervised) == "".join(spans)
        ids, labels = tokenize(segments, tokenizer, [3] * count_slots(segments), config.bos)
        assert len(ids) == len(labels)
        assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels))
        assert ids.count(IMAGE_TOKEN_ID) == 3 * count_slots(segments)
        supervised = [token for token, label in zip(ids, labels) if label != IGNORE_INDEX]
        other = [t for t, label in zip(ids, labels) if label == IGNORE_INDEX and t != IMAGE_TOKEN_ID]
        rest = "".join(s.text for s in segments if isinstance(s, Text) and not s.supervised)
        if begins(config.bos, tokenizer):
            assert (ids[0], labels[0]) == (tokenizer.bos_token_id, IGNORE_INDEX)
            other = other[1:]
        assert alike(kind, spell(tokenizer, supervised)) == alike(kind, "".join(spans)), title
        assert alike(kind, spell(tokenizer, other)) == alike(kind, rest), title


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_the_generation_prompt_is_a_prefix_of_the_training_ids(name: str, kind: str) -> None:
    """For every answer of a conversation; then the first label behind the prompt is the first supervised one."""
    form, tokenizer = template(name), tokenizer_of(kind)
    for title, messages in CONVERSATIONS.items():
        whole = form.render(messages)
        ids, labels = tokenize(whole, tokenizer, [3] * count_slots(whole), form.config.bos)
        for index, message in enumerate(messages):
            if message.role == "assistant":
                forms = (False,) if form.config.chat else (False, True)
                for chat in forms:
                    start = form.render([*messages[:index], Message("assistant", None)], chat=chat)
                    prompt, _ = tokenize(start, tokenizer, [3] * count_slots(start), form.config.bos)
                    assert prompt == ids[: len(prompt)], (title, index)
                    assert labels[len(prompt)] == ids[len(prompt)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_training_teaches_a_stop_string(name: str) -> None:
    form = template(name)
    taught = any(stop in form.config.assistant_suffix for stop in form.stop)
    assert taught or (form.config.eos == "always" and not form.stop), "or the tokenizer's own end token"


# --- ids ------------------------------------------------------------------------------------------------------------


def test_text_is_cut_at_pictures_only_unless_the_template_says_so() -> None:
    """Ids depend on where text is cut: a run between two pictures is one string for the tokenizer."""
    tokenizer = tokenizer_of("sentencepiece always")

    def plain(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    segments: list[Segment] = [Text("ab"), Text("cd", True), ImageSlot(), Text("ef"), Cut(), Text("gh", True)]
    ids, labels = tokenize(segments, tokenizer, [2], "never")
    assert ids == plain("abcd") + [IMAGE_TOKEN_ID] * 2 + plain("ef") + plain("gh")
    assert labels[-len(plain("gh")) :] == plain("gh")
    assert plain("ef") + plain("gh") != plain("efgh")


def test_a_token_is_supervised_when_it_touches_a_span() -> None:
    tokenizer = tokenizer_of("gpt2")
    ids, labels = tokenize([Text("re"), Text("d", True)], tokenizer, [])
    assert ids == tokenizer("red")["input_ids"] and len(ids) == 1
    assert labels == ids
    assert tokenize([Text("red"), Text("", True)], tokenizer, [])[1] == [IGNORE_INDEX]


def test_pictures_of_different_sizes() -> None:
    tokenizer = tokenizer_of("gpt2")
    ids, _ = tokenize([ImageSlot(), Text("a"), ImageSlot()], tokenizer, [3, 1])
    assert ids == [IMAGE_TOKEN_ID] * 3 + tokenizer("a")["input_ids"] + [IMAGE_TOKEN_ID]


def test_begin_tokens() -> None:
    with_bos, without = tokenizer_of("llama3"), tokenizer_of("gpt2")
    assert adds_bos(with_bos) and not adds_bos(without) and not adds_bos(tokenizer_of("quickstart"))
    for tokenizer, policy, expected in [
        (with_bos, "auto", 1), (with_bos, "never", 0), (with_bos, "always", 1),
        (without, "auto", 0), (without, "never", 0), (without, "always", 1),
    ]:  # fmt: skip
        ids, labels = tokenize([Text("a"), Cut(), Text("b", True)], tokenizer, [], policy)
        assert ids.count(tokenizer.bos_token_id) == expected and len(ids) == 2 + expected
        assert ids[:expected] == [tokenizer.bos_token_id] * expected and labels[0] == IGNORE_INDEX
    nameless = PreTrainedTokenizerFast(tokenizer_object=without.backend_tokenizer)
    assert not adds_bos(nameless)
    with pytest.raises(TemplateError, match="has no BOS token"):
        tokenize([Text("a")], nameless, [], "always")


def test_nothing_to_tokenize() -> None:
    assert tokenize([], tokenizer_of("gpt2"), []) == ([], [])
    assert tokenize([ImageSlot()], tokenizer_of("gpt2"), [2]) == ([IMAGE_TOKEN_ID] * 2, [IGNORE_INDEX] * 2)
