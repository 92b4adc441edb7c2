"""How answers are chosen: top-k, penalties, runs that must not repeat; how fast they come; signs of several bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_minimind import GOLDEN, MODELS, is_first, section, weights
from helpers import tiny_model, write_yaml
from PIL import Image

from minivlm import cli
from minivlm.api import assemble
from minivlm.config.experiment import DemoConfig
from minivlm.config.loader import list_model_defaults, load_config, parse_model
from minivlm.evaluation.comparison import speed_of
from minivlm.processors.train_tokenizer import tokens_of_template, train_tokenizer
from minivlm.serve.chat import Chat, sampling_options
from minivlm.serve.loading import decoding
from minivlm.serve.terminal import run_terminal
from minivlm.serve.web_handlers import Handlers

RED = Image.new("RGB", (40, 30), (220, 30, 30))
QUESTION = "这个图片描述的是什么内容？"
ANSWER = "一只可爱的小猫坐在红色的椅子上，看着窗外的鸟🐦。"


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    """A random model with opinions, whose answers do not end by themselves, and its processor."""
    node = tiny_model()
    node["language_model"]["config"]["initializer_range"] = 0.3
    torch.manual_seed(0)
    model, processor, _ = assemble(parse_model(node, "test"))
    return model.eval(), processor


@pytest.fixture
def answer(parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """The ids of an answer; what reached the model is kept in ``answer.options``."""
    model, processor = parts
    generate = model.language_model.generate
    options: dict[str, Any] = {}
    found: list[torch.Tensor] = []

    def watched(*inputs: Any, **given: Any) -> torch.Tensor:
        options.clear()
        options.update(given)
        found.append(generate(*inputs, **given | {"eos_token_id": None}))
        return found[-1]

    monkeypatch.setattr(model.language_model, "generate", watched)

    def ask(**settings: Any) -> list[int]:
        torch.manual_seed(5)
        Chat(model, processor, max_new_tokens=24).ask("what is it?", [RED], **settings)
        return found[-1][0].tolist()

    ask.options = options  # type: ignore[attr-defined]
    return ask


# --- what is chosen -------------------------------------------------------------------------------------------------


def test_top_k_is_for_sampling_alone(answer: Any) -> None:
    greedy = answer()
    assert answer(top_k=3, top_p=0.5) == greedy and "top_k" not in answer.options
    assert answer(temperature=1.0, top_k=1, top_p=1.0) == greedy
    assert (answer.options["top_k"], answer.options["top_p"], answer.options["do_sample"]) == (1, 1.0, True)
    some = answer(temperature=1.5, top_k=4, top_p=1.0)
    assert some != greedy and some == answer(temperature=1.5, top_k=4, top_p=1.0), "seeded"
    wide = answer(temperature=1.5, top_k=0, top_p=1.0)
    assert wide != some, "0 takes nothing away"
    assert answer(temperature=1.5) == answer(temperature=1.5, top_k=50, top_p=0.9), "the defaults"


def test_tokens_as_likely_as_the_last_of_top_k_are_kept(
    parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the original, whose top-k drops what is less likely than the last."""
    model, processor = parts
    even: Any = lambda ids, scores: torch.zeros_like(scores)  # noqa: E731
    torch.manual_seed(0)
    chat = Chat(model, processor, max_new_tokens=30, temperature=1.0, top_k=2, top_p=1.0)
    chat.ask("what is it?", logits_processor=[even])
    assert chat.num_tokens > 2
    ids: list[torch.Tensor] = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda *a, **o: ids.append(generate(*a, **o)) or ids[-1])
    chat.ask("what is it?", logits_processor=[even])
    assert len(set(ids[0][0].tolist())) > 2


def test_penalty_counts_the_answer_alone(answer: Any) -> None:
    first, *_ = plain = answer()
    assert len(set(plain)) < len(plain), "the plain answer says something twice"
    punished = answer(repetition_penalty=1e6)
    assert punished[0] == first and len(set(punished)) == len(punished)


def runs(ids: list[int], size: int) -> list[tuple[int, ...]]:
    return list(zip(*(ids[start:] for start in range(size))))


def test_no_run_of_tokens_comes_twice(answer: Any) -> None:
    for size in (1, 2):
        assert len(set(runs(answer(temperature=0.3), size))) < len(runs(answer(temperature=0.3), size))
        assert "no_repeat_ngram_size" not in answer.options
        found = runs(answer(temperature=0.3, no_repeat_ngram_size=size), size)
        assert len(set(found)) == len(found)


def test_flags_and_keys_reach_the_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    stream = Chat.stream

    def watched(chat: Chat, *arguments: Any, **options: Any) -> Any:
        made.append(sampling_options(chat.options))
        return stream(chat, *arguments, **options)

    monkeypatch.setattr(Chat, "stream", watched)
    demo = {"temperature": 0.5, "top_k": 12, "top_p": 1.0, "no_repeat_ngram_size": 3}
    file = str(write_yaml(tmp_path / "x.yaml", {"model": tiny_model(), "demo": demo}))
    for flags in ([], ["--top-k", "8", "--top-p", "0.7", "--repetition-penalty", "1.2", "--no-repeat-ngram-size", "0"]):
        assert cli.main(["chat", file, "--query", "x", "--device", "cpu", *flags]) == 0
    first, second = ({key: value for key, value in each.items() if key in demo} for each in made)
    assert first == demo
    assert second == {"temperature": 0.5, "top_k": 8, "top_p": 0.7} and made[1]["repetition_penalty"] == 1.2


def test_presets_of_minimind_have_their_sampling(tmp_path: Path) -> None:
    found = {}
    for arch, kind in list_model_defaults():
        if arch == "minimind_v":
            demo = load_config(write_yaml(tmp_path / "x.yaml", {"model": {"arch": arch, "model_type": kind}}))
            found[kind] = decoding(demo.stages[-1].demo)
    chosen = {kind: (each["temperature"], each["top_k"], each["top_p"]) for kind, each in found.items()}
    first, newest = (0.5, 12, 1.0), (0.7, 50, 0.85)
    assert chosen == {kind: newest if kind.startswith("v3") else first for kind in chosen} and len(chosen) == 6


# --- how fast, and in which signs -----------------------------------------------------------------------------------


def test_speed_is_told_where_an_answer_is(parts: tuple[Any, Any]) -> None:
    assert speed_of(24, 0.5) == "24 tokens, 48.0 tokens/s" and speed_of(0, 0.0) == ""
    told = re.compile(r"6 tokens, [\d.]+ tokens/s")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for output in (io.StringIO(), Terminal()):
        lines = iter(["what is it?", "/quit"])
        chat = Chat(*parts, max_new_tokens=6, min_new_tokens=6)
        run_terminal(chat, DemoConfig(), input=lambda prompt: next(lines), output=output)  # noqa: B023
        dim = output.isatty()
        assert re.search(
            r"\x1b\[2m\(\d+ tokens, .*\)\x1b\[0m\n" if dim else r"\n\(6 tokens, .*/s\)\n", output.getvalue()
        )
    handlers = Handlers(lambda: Chat(*parts, max_new_tokens=6, min_new_tokens=6))
    assert handlers.speed(None) == ""
    *_, (_, _, session) = handlers.ask("what is it?", RED, 1, 0.0, None, top_k=5)
    assert told.fullmatch(handlers.speed(session))
    handlers.restart(session)
    assert handlers.speed(session) == ""


def test_chinese_of_a_tokenizer_of_bytes_is_streamed_whole(tmp_path: Path) -> None:
    """Signs take several tokens each, and some tokens end within a sign; neither shows."""
    name = next(name for name in MODELS if is_first(name) and "moe" not in name)
    node = section(name)
    tokens = tokens_of_template(parse_model(node, "test").template.config)  # type: ignore[union-attr]
    texts = ["一只猫坐在椅子上", "看着窗外的鸟", "小狗在红色的花旁边", "可爱的小猫看着小狗"] * 3
    tokenizer = train_tokenizer(texts, tmp_path / "tokenizer", 300, tokens=tokens)
    node["language_model"]["tokenizer"] = str(tmp_path / "tokenizer")
    config = parse_model(node, "test")
    config.checkpoint = str(weights(name))
    model, processor, _ = assemble(config)
    ids = [*tokenizer(ANSWER, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert len(ids) > len(ANSWER) and any("\ufffd" in tokenizer.decode(ids[:n]) for n in range(len(ids)))

    def say(given: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -1e9)
        forced[:, ids[given.shape[1]]] = 0.0
        return forced

    chat = Chat(model.eval(), processor, max_new_tokens=len(ids))
    picture = sorted((GOLDEN / "images").iterdir())[0]
    seen = list(chat.stream(QUESTION, [picture], logits_processor=[say]))
    assert seen[-1] == ANSWER and chat.num_tokens == len(ids)
    assert all("\ufffd" not in text and ANSWER.startswith(text) for text in seen)
    assert len(seen) > len(ANSWER) / 2, "in pieces"
