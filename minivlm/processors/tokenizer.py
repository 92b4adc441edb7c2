"""Tokenizers: loaded by folder or hub id, always the fast kind, since masks need character offsets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).parent.parent / "assets"


class TokenizerError(ValueError):
    """A tokenizer that cannot be loaded or does not fit."""


def load_tokenizer(
    path: str, revision: str | None = None, special_tokens: Mapping[str, str | list[str]] | None = None
) -> Any:
    """Load a tokenizer; ``asset:NAME`` is one that ships with the package.

    ``special_tokens`` are given their role, and a new id where the tokenizer has none for them.
    Raises :class:`TokenizerError` if there is none, if it cannot tell character offsets, or for an unknown role.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    if path.startswith("asset:"):
        path = str(ASSETS / path.removeprefix("asset:"))
    if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not Path(path).is_dir():
        raise TokenizerError(
            f"model.language_model.tokenizer: there is no folder '{path}'; `minivlm train-tokenizer` makes one"
        )
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a model_type of another project in the folder's config.json is no news here
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except Exception as error:  # it reads the config.json beside the tokenizer, too, where anything may be wrong
        # What transformers says when it cannot read tokenizer.model for any reason.
        hint = "; sentencepiece and protobuf do not go together (minivlm doctor)" if "tiktoken" in str(error) else ""
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TokenizerError(f"model.language_model: cannot load a tokenizer from '{path}': {why}{hint}") from error
    finally:
        logging.set_verbosity(verbosity)
    if not tokenizer.is_fast:
        raise TokenizerError(f"the tokenizer of '{path}' has no fast version, which tells character offsets")
    if special_tokens:
        try:
            tokenizer.add_special_tokens(dict(special_tokens))
        except (ValueError, TypeError, AssertionError) as error:
            raise TokenizerError(f"model.language_model.special_tokens: {error}") from error
    if tokenizer.pad_token_id is None:
        # Only fills rows that a mask hides, so any id will do; the vocabulary must not grow.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if hasattr(tokenizer, "legacy"):
        # transformers does not save it, and without it Llama's text behind a special token has other ids.
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    return tokenizer
