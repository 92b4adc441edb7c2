"""However a file is mutilated, the answer is a config or a list of problems with lines, never a crash."""

from __future__ import annotations

import random

import pytest
import yaml
from config_texts import ALL_KEYS, MODEL

from minivlm.config import ConfigError, load_config

STAGES = (
    MODEL
    + """\
datasets: {easy_vqa: , mine: {name: llava_json, annotations: {train: a}}}
run: {seed: 1, job_name: 's${run.seed}', train_splits: [a]}
stages:
- name: a
  run: {seed: 2}
- name: b
  model: {connector: {name: mlp, depth: 2}}
  datasets: {mine: easy_vqa}
"""
)
VALUES = [None, 3, -1.5, "x", True, [], [1, {"a": 2}], {}, {"a": 1}, {"name": "mlp"}, "???", "${nope}", {1: 2}, [[]]]
OPTIONS = [
    [],
    ["run.seed=3"],
    ["stages=3"],
    ["model=3"],
    ["stages.a=3"],
    ["run=null"],
    ["datasets.mine=llava_json"],
    ["run.train_splits.0=z"],
    ["model.template.cut.0=x"],
    ["model.llama_model=x"],
]


def paths(node, path=()):
    """The paths of all keys and list items."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from paths(item, (*path, key))


def mutilate(tree, rng: random.Random):
    """Replace, delete or rename something."""
    path = rng.choice(list(paths(tree)))
    node = tree
    for key in path[:-1]:
        node = node[key]
    what = rng.choice(["replace", "replace", "delete", "rename"])
    if what == "replace":
        node[path[-1]] = rng.choice(VALUES)
    elif what == "delete" or isinstance(node, list):
        del node[path[-1]]
    else:
        node[f"{path[-1]}x"] = node.pop(path[-1])
    return tree


@pytest.mark.parametrize("text", [STAGES, ALL_KEYS], ids=["stages", "legacy"])
def test_mutilated_files_never_crash(write, text):
    rng = random.Random(0)
    refused = 0
    for _ in range(60):
        write("x.yaml", yaml.safe_dump(mutilate(yaml.safe_load(text), rng), sort_keys=False))
        try:
            load_config("x.yaml", rng.choice(OPTIONS))
        except ConfigError as error:
            refused += 1
            assert error.problems
            assert all(problem.line for problem in error.problems if problem.file == "x.yaml"), str(error)
    assert refused > 20
