"""Training a byte-level BPE tokenizer (Sennrich et al. 2016, on bytes as in GPT-2) from text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def train_tokenizer(
    texts: Iterable[str],
    folder: str | Path,
    vocab_size: int,
    *,
    lowercase: bool = False,
    special_tokens: Sequence[str] = ("<pad>", "<s>", "</s>"),
) -> Any:
    """Train on ``texts``, save a transformers tokenizer folder and return the tokenizer.

    The special tokens are padding, begin and end; every byte has an id, so nothing is ever unknown.
    ``lowercase`` suits a small model whose data are in lower case: it then reads any spelling.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos = special_tokens[:3]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)
    fast.save_pretrained(folder)
    return fast
