"""Few rows that are multiplied as columns give what a linear layer gives, and only while an answer is made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from minivlm.models.configs import HFLanguageModelConfig
from minivlm.models.language import few_rows
from minivlm.models.language.few_rows import MOST_ROWS, FewRowsLinear, fast_few_rows
from minivlm.models.language.hf import HFLanguageModel

LARGE = {"in_features": 512, "out_features": 256}


@pytest.fixture(autouse=True)
def mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products are right with any library."""
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)


def test_without_mkl_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    layer = nn.Linear(**LARGE)
    with fast_few_rows(layer):
        assert type(layer) is nn.Linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1,), (2, 1), (1, 3), (2, 3), (), (0, 1), (MOST_ROWS + 1, 1)])
def test_the_same_product(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer, rows = nn.Linear(bias=bias, **LARGE), torch.randn(*shape, 512)
    expected = layer(rows)
    with fast_few_rows(layer):
        assert type(layer) is FewRowsLinear
        found = layer(rows)
    assert type(layer) is nn.Linear
    assert found.shape == expected.shape and found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_only_large_layers_in_full_precision() -> None:
    class Own(nn.Linear):
        pass

    layers = nn.ModuleDict(
        {
            "large": nn.Linear(**LARGE),
            "small": nn.Linear(16, 16),
            "in half precision": nn.Linear(**LARGE).bfloat16(),
            "own": Own(**LARGE),
            "elsewhere": nn.Linear(**LARGE, device="meta"),
        }
    )
    with fast_few_rows(layers):
        assert [name for name, layer in layers.items() if type(layer) is FewRowsLinear] == ["large"]


def test_an_error_leaves_no_trace() -> None:
    layer = nn.Linear(**LARGE)
    with pytest.raises(RuntimeError, match="stop"), fast_few_rows(layer), fast_few_rows(layer):
        raise RuntimeError("stop")
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_are_the_same(beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"model_type": "llama", **sizes, "initializer_range": 0.3}
    model = HFLanguageModel(HFLanguageModelConfig(config=config), 64).eval()
    embeds, mask = model.embed(torch.randint(3, 64, (2, 9))), torch.ones(2, 9, dtype=torch.long)
    calls: list[int] = []

    def counted(layer: FewRowsLinear, rows: Tensor) -> Tensor:
        calls.append(rows.numel() // layer.in_features)
        return original(layer, rows)

    original = FewRowsLinear.forward
    monkeypatch.setattr(FewRowsLinear, "forward", counted)
    answers = []
    for least in (few_rows.LEAST_WEIGHTS, 1):
        monkeypatch.setattr(few_rows, "LEAST_WEIGHTS", least)
        answers.append(
            model.generate(embeds, mask, max_new_tokens=8, num_beams=beams, eos_token_id=None, pad_token_id=0)
        )
        assert bool(calls) == (least == 1)
    assert torch.equal(*answers) and {18 if beams == 1 else 54, 2 * beams} <= set(calls)
