"""Experiment files: YAML in, typed and checked stages out, with every mistake named by file and line."""

from __future__ import annotations

from minivlm.config.errors import ConfigError, Problem
from minivlm.config.experiment import Experiment, ModelConfig, RunConfig, StageConfig, to_container
from minivlm.config.loader import list_model_defaults, load_config, parse_model

__all__ = [
    "ConfigError",
    "Experiment",
    "ModelConfig",
    "Problem",
    "RunConfig",
    "StageConfig",
    "list_model_defaults",
    "load_config",
    "parse_model",
    "to_container",
]
