"""Training a byte-level BPE tokenizer (Sennrich et al. 2016, on bytes as in GPT-2) from text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minivlm.processors.configs import TemplateConfig
from minivlm.processors.tokenizer import TokenizerError

ROLES = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
"""Special tokens by their role in transformers, as the quickstart has them."""
BYTES = 256
_MARKER = re.compile(r"<[^<>\s]+>")


@dataclass(frozen=True)
class TokenizerTokens:
    """Tokens that are not learned: ``roles`` first, then ``special``, then ``words``, which decoding keeps."""

    roles: Mapping[str, str]
    special: tuple[str, ...] = ()
    words: tuple[str, ...] = ()

    @property
    def all(self) -> list[str]:
        """In the order of their ids."""
        return list(dict.fromkeys((*self.roles.values(), *self.special, *self.words)))


def tokens_of_template(template: TemplateConfig, special: Sequence[str] = ()) -> TokenizerTokens:
    """The tokens that a template writes between ``<`` and ``>``, and ``special``; ids begin as MiniMind's do.

    Id 0 stands for the unknown and fills rows (``<|endoftext|>`` for ChatML, else ``<unk>``), 1 begins a turn and 2
    ends an answer. Marks of thoughts are words, since they belong to an answer. Raises :class:`TokenizerError` for
    a template whose turns have no such marks.
    """
    begin, end = (_MARKER.findall(text) for text in (template.user_prefix, template.assistant_suffix))
    if not begin or not end:
        raise TokenizerError("its turns do not begin and end with tokens like <s> and </s>")
    texts = (template.system_prefix, template.system_suffix, template.user_suffix, template.assistant_prefix)
    found = _MARKER.findall(" ".join((*texts, template.image, *template.placeholder)))
    words = _MARKER.findall(template.think_prefix + template.think_suffix)
    first = "<|endoftext|>" if end[-1].startswith("<|") else "<unk>"
    roles = {"unk_token": first, "bos_token": begin[0], "eos_token": end[-1]}
    return TokenizerTokens(roles, (*begin, *end, *found, *special), tuple(words))


def train_tokenizer(
    texts: Iterable[str],
    folder: str | Path,
    vocab_size: int,
    *,
    lowercase: bool = False,
    tokens: TokenizerTokens = TokenizerTokens(ROLES),
) -> Any:
    """Train on ``texts``, save a transformers tokenizer folder and return the tokenizer.

    ``tokens`` have the first ids and may stand in the texts, and every byte has an id, so nothing is ever unknown; the
    same texts give the same tokenizer. ``lowercase`` suits a small model whose data are in lower case: it then reads
    any spelling. Raises :class:`TokenizerError` for a vocabulary without room for tokens and bytes.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < (least := BYTES + len(tokens.all)):
        raise TokenizerError(f"a vocabulary of {vocab_size} is too small: bytes and special tokens take {least}")
    tokenizer = Tokenizer(models.BPE())
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=tokens.all,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    marks = re.compile("|".join(map(re.escape, tokens.all)))  # they are never parts of what is learned
    tokenizer.train_from_iterator((piece for text in texts for piece in marks.split(text) if piece), trainer)
    tokenizer = Tokenizer.from_str(_with_words(tokenizer.to_str(), tokens.words))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens.roles)
    fast.save_pretrained(folder)
    return fast


def _with_words(content: str, words: Sequence[str]) -> str:
    """The trainer knows special tokens only."""
    settings = json.loads(content)
    for token in settings["added_tokens"]:
        token["special"] = token["content"] not in words
    return json.dumps(settings, ensure_ascii=False)


def bytes_per_token(tokenizer: Any, texts: Iterable[str]) -> float:
    """Bytes of UTF-8 that a token stands for, over all texts: more is shorter."""
    sizes = [(len(text.encode("utf-8")), len(tokenizer(text)["input_ids"])) for text in texts]
    return sum(size for size, _ in sizes) / max(1, sum(count for _, count in sizes))
