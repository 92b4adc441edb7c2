"""Flags of the programs that serve a model, each a shorthand of a setting; names as in LLaVA and Mini-Gemini."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING, Any

from minivlm import registry
from minivlm.config.experiment import DemoConfig, ModelConfig, StageConfig
from minivlm.config.loader import parse_model
from minivlm.config.values import limits
from minivlm.schema import ModelPart

if TYPE_CHECKING:
    from minivlm.processors.processor import VLMProcessor

_LANGUAGE_MODEL = {"quantization": "quantization", "device_map": "device_map", "model_base": "path"}
"""Flags by what they set of ``model.language_model``."""
_DECODING: dict[str, tuple[type[int] | type[float], str]] = {
    "temperature": (float, "above 0 answers are sampled"),
    "top_k": (int, "sampled from so many of the likeliest tokens; 0: from all"),
    "top_p": (float, "and of those from the likeliest that make up this share"),
    "max_new_tokens": (int, "length of an answer"),
    "num_beams": (int, "beams of an answer"),
    "repetition_penalty": (float, "above 1 what was said is less likely"),
    "no_repeat_ngram_size": (int, "no run of so many tokens comes twice; 0: off"),
}
"""Flags that set the key of their name of section ``demo``: type and help."""


class ServeError(ValueError):
    """Something that keeps a program from starting; the message says what to do."""


def positive(text: str) -> int:
    """A number of things, for argparse."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What may be said of the language model, the template and the answers."""
    bits = parser.add_mutually_exclusive_group()
    for number, kind in ((8, "int8"), (4, "nf4")):
        text = f"only the language model in {number} bits (model.language_model.quantization: {kind})"
        bits.add_argument(f"--load-{number}bit", dest="quantization", action="store_const", const=kind, help=text)
    text = "its layers on several GPUs (model.language_model.device_map): auto, balanced, sequential, {module: device}"
    parser.add_argument("--device-map", type=_device_map, metavar="PLAN", help=text)
    text = "language model that a projector or adapters belong to (model.language_model.path)"
    parser.add_argument("--model-base", metavar="FOLDER", help=text)
    parser.add_argument("--conv-mode", metavar="TEMPLATE", help="another template than the model's own")
    for key, (number_type, meaning) in _DECODING.items():
        parser.add_argument(_flag(key), type=number_type, help=f"{meaning} (default: section demo of the file)")


def apply_flags(stage: StageConfig, arguments: argparse.Namespace) -> StageConfig:
    """The stage with what the flags say in it. Raises :class:`ServeError`, or RegistryError for a template."""
    if arguments.conv_mode is not None:
        registry.entry("template", arguments.conv_mode)
    language = {key: value for flag, key in _LANGUAGE_MODEL.items() if (value := getattr(arguments, flag)) is not None}
    decoding = {key: value for key in _DECODING if (value := getattr(arguments, key)) is not None}
    for item in dataclasses.fields(DemoConfig):
        if item.name in decoding and (problem := limits(decoding[item.name], item.metadata)):
            raise ServeError(f"{_flag(item.name)}: {problem}")
    if "temperature" in decoding:
        decoding["max_temperature"] = max(stage.demo.max_temperature, decoding["temperature"])
    model = dataclasses.replace(stage.model, language_model=_changed(stage.model.language_model, language))
    return dataclasses.replace(stage, model=model, demo=dataclasses.replace(stage.demo, **decoding))


def use_template(name: str | None, processor: VLMProcessor, model: ModelConfig) -> None:
    """Talk by the template of that name, with a note if it is not the one that the model was trained with."""
    assert model.template
    if name is None or name == model.template.name:
        return
    from minivlm.processors.template import Template

    print(f"note: --conv-mode {name}: this model was trained with the template {model.template.name}", file=sys.stderr)
    number = processor.template.chat_config.image_number  # of the model, not of the words around its turns
    node = {"name": name, "chat": {"image_number": number}}
    other = parse_model({"checkpoint": "", "template": node}, "--conv-mode").template
    assert other
    processor.template = Template(other.config)


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _changed(part: ModelPart | None, changes: dict[str, Any]) -> ModelPart | None:
    """A language model with other settings; one that the checkpoint describes has only these."""
    if not changes:
        return part
    if part is None:
        part = ModelPart("hf", registry.entry("language_model", "hf").config_class()())
    known = {field.name for field in dataclasses.fields(part.config)}
    if unknown := sorted(set(changes) - known):
        raise ServeError(f"model.language_model ({part.name}) has no setting {', '.join(unknown)}; leave out its flag")
    try:
        return dataclasses.replace(part, config=dataclasses.replace(part.config, **changes))
    except ValueError as error:
        raise ServeError(f"model.language_model.{error}") from error


def _device_map(text: str) -> Any:
    """A word, or a mapping as in YAML or JSON."""
    import yaml

    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"cannot be read: {text}") from error
    if not isinstance(found, (str, dict)):
        raise argparse.ArgumentTypeError(f"a word or a mapping is wanted, got {text}")
    return found
