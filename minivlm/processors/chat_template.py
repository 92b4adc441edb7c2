"""A template as a Jinja chat template, the form in which transformers and what builds on it take one."""

from __future__ import annotations

import json
from collections.abc import Iterable

from minivlm.processors.configs import TemplateConfig
from minivlm.types import IMAGE_MARKER

_SETTINGS = (
    *("system", "system_prefix", "system_suffix", "system_in_user", "user_prefix", "user_suffix", "user_text"),
    *("assistant_prefix", "answer_prefix", "assistant_suffix", "turn_end", "turn_separator"),
    *("think_prefix", "think_suffix", "think_open"),
    *("image_separator", "markers", "leading_assistant"),
)
_PROMPT = """\
{%- macro content_of(message) -%}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{- '<image>' + image_separator -}}
{%- elif part['type'] == 'text' -%}
{{- part['text'] -}}
{%- else -%}
{{- raise_exception('a message holds pictures and text, not ' + part['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set turns = messages -%}
{%- if turns and turns[0]['role'] == 'system' -%}
{%- set system = content_of(turns[0]) -%}
{%- set turns = turns[1:] -%}
{%- endif -%}
{%- if turns and turns[0]['role'] == 'assistant' and leading_assistant == 'drop' -%}
{%- set turns = turns[1:] -%}
{%- endif -%}
{%- set led = 1 if turns and turns[0]['role'] == 'assistant' and leading_assistant in ['keep', 'alone'] else 0 -%}
{%- set system = system_prefix + system + system_suffix if system else '' -%}
{%- set prompt -%}
{{- '' if system_in_user else system -}}
{%- for message in turns -%}
{%- if message['role'] != ['user', 'assistant'][(loop.index0 + led) % 2] -%}
{{- raise_exception('the user and the assistant must take turns') -}}
{%- endif -%}
{%- set content = content_of(message) -%}
{%- if message['role'] == 'user' -%}
{%- if markers == 'collapse_to_front' and '<image>' in content -%}
{%- if message['content'] is not string and content.count('<image>') > 1 -%}
{{- raise_exception('a message of this model holds one picture') -}}
{%- endif -%}
{%- set end = content[content.rstrip()|length:] -%}
{%- set content = ('<image>\\n' + content.replace('<image>', '').strip()).strip() + end -%}
{%- endif -%}
{%- if user_text == 'drop' -%}
{%- set content = '<image>' * content.count('<image>') -%}
{%- endif -%}
{{- ('' if loop.first else turn_separator) + user_prefix + (system if system_in_user and loop.index0 == led else '') -}}
{{- content.replace('<image>', image) + user_suffix -}}
{%- else -%}
{%- if not content.strip() -%}
{{- raise_exception('an answer is empty') -}}
{%- endif -%}
{%- if think_suffix -%}
{%- set parts = content.rpartition(think_suffix.strip()) -%}
{%- set thoughts = parts[0].strip().removeprefix(think_prefix.strip()).strip('\\n') -%}
{%- set content = think_prefix + thoughts + think_suffix + parts[2].lstrip('\\n') -%}
{%- endif -%}
{{- assistant_prefix + answer_prefix + content.replace('<image>', image) + assistant_suffix + turn_end -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- assistant_prefix + think_prefix + ('' if think_open else think_suffix) -}}
{%- endif -%}
{%- endset -%}
{{- bos if bos and (bos_always or prompt.startswith(bos)) else '' -}}
{%- for text in prompt.split('<image>') -%}
{{- '' if loop.first else '<image>' -}}
{%- set blank = namespace(due=blank_behind_image and not loop.first and text and not text.startswith(' ')) -%}
{%- for token in never_behind_blank if text.startswith(token) -%}
{%- set blank.due = false -%}
{%- endfor -%}
{{- (' ' if blank.due else '') + text -}}
{%- endfor -%}
"""


def to_jinja(
    config: TemplateConfig,
    *,
    bos: str = "",
    bos_always: bool = False,
    blank_behind_image: bool = False,
    tokens: Iterable[str] = (),
) -> str:
    """The Jinja template that writes the prompts of ``config`` (of a template, its ``chat_config``).

    The content of a message is a text with ``<image>`` markers, or a list of ``{"type": "image"}`` and ``{"type":
    "text", "text": ...}``. ``bos`` is the text of that token if prompts begin with it, ``bos_always`` says that the
    tokenizer does not add it; one that does leaves it out where a prompt itself begins so, and it is written then, too.
    ``blank_behind_image`` is for tokenizers that put a blank in front of a text, but not behind a special token in
    its middle: our texts begin anew behind a picture. It puts none in front of its added ``tokens``.
    """
    settings = {name: getattr(config, name) for name in _SETTINGS}
    settings["image"] = config.image.replace("{image}", IMAGE_MARKER)
    settings |= {"bos": bos, "bos_always": bos_always, "blank_behind_image": blank_behind_image}
    ends = (config.user_suffix, config.assistant_suffix)  # what may stand right behind a picture
    settings["never_behind_blank"] = [token for token in tokens if any(end.startswith(token) for end in ends)]
    lines = [f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}" for name, value in settings.items()]
    return "\n".join([*lines, _PROMPT])
