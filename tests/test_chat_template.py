"""Jinja chat templates: transformers, given one, writes and tokenises the prompts that ours does."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
from jinja2.exceptions import TemplateError as JinjaError
from test_template import BUILD, CONVERSATIONS, TEMPLATES, talk, template, tokenizer_of
from tokenizers import AddedToken

from minivlm.checkpoints.to_transformers import chat_template
from minivlm.processors.chat_template import to_jinja
from minivlm.processors.configs import ProcessorConfig, TemplateConfig
from minivlm.processors.processor import VLMProcessor
from minivlm.processors.template import Template, Text, count_slots, tokenize
from minivlm.types import IMAGE_TOKEN_ID, Message

TOKENS = 3


def with_image_token(tokenizer: Any) -> Any:
    own = copy.deepcopy(tokenizer)
    own.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    return own


def plain(messages: list[Message]) -> list[dict[str, Any]]:
    return [{"role": m.role, "content": m.content} for m in messages if m.content is not None]


def written(config: TemplateConfig, turns: list[dict[str, Any]], *, answer: bool = False) -> str:
    tokenizer = tokenizer_of("gpt2")
    text = tokenizer.apply_chat_template(
        turns, chat_template=to_jinja(config), tokenize=False, add_generation_prompt=answer
    )
    assert isinstance(text, str)
    return text


def theirs(form: Template, tokenizer: Any, messages: list[Message]) -> list[int]:
    """The ids that LlavaProcessor's own steps give: render, expand the pictures, tokenise."""
    processor = VLMProcessor(ProcessorConfig(), form, tokenizer, {}, TOKENS)
    tokenizer.chat_template = chat_template(processor, tokenizer)
    text = tokenizer.apply_chat_template(
        plain(messages), tokenize=False, add_generation_prompt=messages[-1].content is None
    )
    begins = {"add_special_tokens": False} if text.startswith(tokenizer.bos_token) else {}
    return tokenizer(text.replace("<image>", "<image>" * TOKENS), **begins)["input_ids"]


@pytest.mark.parametrize("kind", BUILD)
def test_every_packaged_template_has_the_same_ids(kind: str) -> None:
    own, tokenizer = tokenizer_of(kind), with_image_token(tokenizer_of(kind))
    image = tokenizer.convert_tokens_to_ids("<image>")
    compared = 0
    for name in TEMPLATES:
        form = template(name)
        for title, messages in CONVERSATIONS.items():
            for whole in (messages, [*messages[:-1], Message("assistant", None)]):
                segments = form.render(whole, chat=True)
                ids, _ = tokenize(segments, own, [TOKENS] * count_slots(segments), form.chat_config.bos)
                wanted = [image if token == IMAGE_TOKEN_ID else token for token in ids]
                assert theirs(form, tokenizer, whole) == wanted, (name, title)
                compared += 1
    assert compared == len(TEMPLATES) * len(CONVERSATIONS) * 2


@pytest.mark.parametrize("bos", ["auto", "always"])
@pytest.mark.parametrize("kind", ["gpt2", "llama3"])
def test_bos_is_there_once(bos: str, kind: str) -> None:
    form = Template(TemplateConfig(user_prefix="USER: ", bos=bos))
    ids = theirs(form, with_image_token(tokenizer_of(kind)), talk("look", None))
    begins = tokenizer_of(kind).bos_token_id
    assert ids.count(begins) == (bos == "always" or kind == "llama3") and (begins not in ids or ids[0] == begins)


def test_system_text_within_the_first_user_turn() -> None:
    config = TemplateConfig(
        system='Be "brief" {{ }}.', system_suffix="\n\n", system_in_user=True, user_prefix="[", user_suffix="]"
    )
    form = Template(config)
    for messages in (talk("a", "b", "c"), talk("a", system="other"), talk("a", system="")):
        segments = form.render(messages, chat=True)
        assert written(config, plain(messages)) == "".join(s.text for s in segments if isinstance(s, Text))
    assert written(config, plain(talk("a", "b", "c"))) == '[Be "brief" {{ }}.\n\na]b[c]'


def test_content_in_parts() -> None:
    picture, text = {"type": "image"}, {"type": "text", "text": "What?"}
    turns = [{"role": "user", "content": [picture, text]}]
    assert written(template("llava_v1").config, turns, answer=True).endswith("USER: <image>\nWhat? ASSISTANT:")
    asked = "<image>\nWhat?\nReference OCR Token: a\n"
    for turns in ([{"role": "user", "content": asked}], [{"role": "user", "content": f"{asked[8:-1]}<image>\n"}]):
        assert written(template("llava_v1").config, turns, answer=True).endswith(f"USER: {asked} ASSISTANT:")
    turns = [{"role": "user", "content": [picture, picture, text]}]
    assert written(template("qa").config, turns, answer=True) == "Question: <image>\n<image>\nWhat?\nAnswer:"


@pytest.mark.parametrize(
    ("name", "turns", "reason"),
    [
        ("qa", [("assistant", "a")], "take turns"),
        ("vicuna_v1", [("user", "a"), ("user", "b")], "take turns"),
        ("vicuna_v1", [("user", "a"), ("assistant", " ")], "answer is empty"),
        ("vicuna_v1", [("user", [{"type": "image"}, {"type": "image"}])], "one picture"),
        ("qa", [("user", [{"type": "video"}])], "not video"),
    ],
)
def test_what_ours_refuses_is_refused(name: str, turns: list[Any], reason: str) -> None:
    with pytest.raises(JinjaError, match=reason):
        written(template(name).config, [{"role": role, "content": content} for role, content in turns])


def test_a_leading_answer_is_dropped_where_ours_does() -> None:
    config = dataclasses.replace(template("qa").config, leading_assistant="drop")
    turns = [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "a"}]
    assert written(config, turns) == "Question: a\n"


def test_a_leading_answer_is_kept_where_ours_does() -> None:
    settings = {"leading_assistant": "keep", "system": "s", "system_in_user": True}
    config = dataclasses.replace(template("qa").config, **settings)
    turns = [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "a"}]
    ours = Template(config).render([Message(turn["role"], turn["content"]) for turn in turns])
    assert (
        written(config, turns)
        == "".join(s.text for s in ours if isinstance(s, Text))
        == "Answer: hi</s>\nQuestion: sa\n"
    )
