"""The cache that is written in place gives the ids that transformers' own gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minivlm.models.configs import HFLanguageModelConfig
from minivlm.models.language import cache as roomy
from minivlm.models.language.hf import HFLanguageModel

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "moe_num_experts": 4, "moe_intermediate_size": 48, "moe_k": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "phi": {"num_key_value_heads": 4},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8},
    "mistral": {"sliding_window": 8},
    "mixtral": EXPERTS,
    "qwen3": {"head_dim": 8},
    "ernie4_5_moe": {**EXPERTS, "moe_num_shared_experts": 1, "moe_layer_start_index": 0},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 8, "top_p": 0.9, "repetition_penalty": 1.2},
    "two answers": {"do_sample": True, "num_return_sequences": 2},
    "end token": {"eos_token_id": list(range(3, 20))},
}


def build(family: str) -> HFLanguageModel:
    torch.manual_seed(0)
    config = {"model_type": family, **SIZES, **FAMILIES[family]}
    attention = "eager" if family == "gemma2" else "sdpa"  # its softcap
    return HFLanguageModel(HFLanguageModelConfig(config=config, attention=attention), 64).eval()


def prompts(model: HFLanguageModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of different lengths, padded on the left."""
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = mask[2, :1] = 0
    return model.embed(torch.randint(3, 64, (3, 9))), mask


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_the_default_cache(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roomy, "MOST_ROOM", 5)  # the tensors are made anew several times
    model = build(family)
    embeds, mask = prompts(model)
    for name, options in OPTIONS.items():
        answers = []
        for cache in ({}, {"cache_implementation": "dynamic"}):
            torch.manual_seed(1)
            new = {"max_new_tokens": 17, "pad_token_id": 0, "eos_token_id": None, **options, **cache}
            answers.append(model.generate(embeds, mask, **new))
        assert torch.equal(*answers), name


def test_it_is_used_where_it_can_be() -> None:
    layers = roomy.roomy_cache(build("llama").model).layers
    assert [type(layer) for layer in layers] == [roomy.RoomyLayer] * 2
    kinds = {type(layer) for layer in roomy.roomy_cache(build("gemma2").model).layers}
    assert roomy.RoomyLayer in kinds and len(kinds) == 2  # the other layers see a window only


def test_keys_stay_where_they_are() -> None:
    layer = roomy.RoomyLayer()
    states = torch.randn(2, 3, 12, 4)
    first, _ = layer.update(states[:, :, :5], states[:, :, :5])
    for k in range(5, 12):
        keys, values = layer.update(states[:, :, k : k + 1], -states[:, :, k : k + 1])
        assert keys.data_ptr() == first.data_ptr() and layer.get_seq_length() == k + 1
    assert torch.equal(keys, states) and torch.equal(values[:, :, 5:], -states[:, :, 5:])


def test_reordered_picked_and_cut_layers_go_on() -> None:
    """Beams and several answers put other tensors in the layer's place; the store must not be read again."""
    layer, plain = roomy.RoomyLayer(), roomy.DynamicLayer()
    for each in (layer, plain):
        torch.manual_seed(0)
        each.update(torch.randn(2, 1, 4, 3), torch.randn(2, 1, 4, 3))
        each.reorder_cache(torch.tensor([1, 0]))
        each.update(torch.randn(2, 1, 1, 3), torch.randn(2, 1, 1, 3))
        each.crop(-2)
        each.update(torch.randn(2, 1, 1, 3), torch.randn(2, 1, 1, 3))
        each.batch_select_indices(torch.tensor([0]))
        each.update(torch.randn(1, 1, 2, 3), torch.randn(1, 1, 2, 3))
        each.batch_repeat_interleave(3)
        each.update(torch.randn(3, 1, 2, 3), torch.randn(3, 1, 2, 3))
    assert torch.equal(layer.keys, plain.keys) and torch.equal(layer.values, plain.values)


def test_the_callers_own_cache_is_left_alone() -> None:
    from transformers import DynamicCache

    model = build("llama")
    embeds, mask = prompts(model)
    own = DynamicCache(config=model.model.config)
    model.generate(embeds, mask, max_new_tokens=3, pad_token_id=0, eos_token_id=None, past_key_values=own)
    assert own.get_seq_length() == 9 + 2
