"""Embedding scales, mixtures of experts: their load-balancing loss, and their matrices in files of transformers 4."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import tiny_model
from torch import Tensor
from tuning_models import batch, build

from minivlm.checkpoints.foreign import Format, translate
from minivlm.checkpoints.llava_hf import LLAVA_HF
from minivlm.checkpoints.mgm import LANGUAGE
from minivlm.models.base import ModelError
from minivlm.models.configs import HFLanguageModelConfig
from minivlm.models.language.hf import HFLanguageModel
from minivlm.models.splice import splice
from minivlm.models.vlm import VisionLanguageModel
from minivlm.types import IMAGE_TOKEN_ID, Batch

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
GEMMA = {"head_dim": 16, "pad_token_id": 0}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "olmoe": {"num_experts": 4},
    "granitemoe": {"num_local_experts": 4},
}
FORM = Format("experts", "model.checkpoint", (), LANGUAGE, always=())
WEIGHT = 0.5


def language(model_type: str, **settings: Any) -> HFLanguageModel:
    options = {
        name: settings.pop(name) for name in ("scale_visual", "router_loss", "dtype", "attention") if name in settings
    }
    config = {"model_type": model_type, **SIZES, **settings}
    return HFLanguageModel(HFLanguageModelConfig(config=config, **options), 50).eval()


def experts(model_type: str = "mixtral", **options: Any) -> VisionLanguageModel:
    """A model with a mixture of experts, the same numbers at every call."""
    section = tiny_model()
    own = section["language_model"]
    config = {"model_type": model_type, **SIZES, "num_experts_per_tok": 2, **EXPERTS[model_type]}
    section["language_model"] = {**own, "config": config, **options}
    return build(section)[0]


def padded(model: VisionLanguageModel) -> Batch:
    """Two rows, of which the second ends in padding."""
    made = batch(model)
    made.attention_mask[1, -3:] = 0
    assert made.labels is not None
    made.labels[1, -3:] = -100
    return made


# --- scales ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "settings", "scale"),
    [
        ("gemma", GEMMA, 32**0.5),
        ("gemma2", {**GEMMA, "attention": "eager"}, 32**0.5),
        ("gemma3_text", GEMMA, 32**0.5),
        ("llama", {}, 1.0),
        ("granite", {"embedding_multiplier": 2.0}, 1.0),
        ("gemma", {**GEMMA, "scale_visual": False}, 1.0),
    ],
)
def test_what_visual_tokens_are_multiplied_by(model_type: str, settings: dict[str, Any], scale: float) -> None:
    assert language(model_type, **settings).embed_scale == pytest.approx(scale)
    with torch.device("meta"):
        assert language(model_type, **settings).embed_scale == pytest.approx(scale)


def test_a_folder_of_transformers_is_not_read_with_another_scale() -> None:
    """LLaVA of transformers does not multiply visual tokens, whatever its language model does with text."""
    file = SimpleNamespace(tensors={"lm_head.weight": torch.zeros(1)})
    for scale, wrong in ((True, True), (False, False)):
        model = SimpleNamespace(language_model=language("gemma", **GEMMA, scale_visual=scale))
        reason = LLAVA_HF.explain(file, model)  # type: ignore[arg-type]
        assert ("set model.language_model.scale_visual: false" in (reason or "")) == wrong


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_visual_token_that_is_a_words_embedding_counts_as_that_word(dtype: str) -> None:
    """To the bit, also where the square root of the width is no number of the type."""
    made = language("gemma", **GEMMA, dtype=dtype)
    rows = made.model.get_input_embeddings().weight[7:9]
    ids = torch.tensor([[5, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, 6]])
    embeds = made.embed(ids.clamp(min=0))
    result = splice(embeds, ids, rows[None], scale=made.embed_scale)
    assert torch.equal(result, made.embed(torch.tensor([[5, 7, 8, 6]])))


# --- the router's loss ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", sorted(EXPERTS))
def test_the_router_loss_is_the_models_own(model_type: str) -> None:
    model = experts(model_type, router_loss=WEIGHT)
    made = padded(model)
    with torch.no_grad():
        mask = made.attention_mask
        theirs = model.language_model.model(
            inputs_embeds=model.embed(made), attention_mask=mask, output_router_logits=True
        ).aux_loss
        plain = model.eval()(made)
        output = model.train()(made)
    torch.testing.assert_close(output.router_loss, theirs)
    torch.testing.assert_close(output.loss, plain.loss + WEIGHT * theirs)
    torch.testing.assert_close(output.loss_sum, output.loss * output.token_count)
    assert plain.router_loss is None


def test_padding_does_not_count() -> None:
    model = experts(router_loss=WEIGHT).train()
    made = batch(model)
    longer = Batch(
        *(torch.nn.functional.pad(t, (0, 5), value=v) for t, v in ((made.input_ids, 9), (made.attention_mask, 0))),
        labels=torch.nn.functional.pad(made.labels, (0, 5), value=-100),
        pixels=made.pixels,
    )
    torch.testing.assert_close(model(longer).router_loss, model(made).router_loss)


def test_micro_batches_are_weighted_by_their_tokens() -> None:
    """As the runner adds them up: summed losses, divided by the tokens of all batches and processes."""
    model = experts(router_loss=WEIGHT).train()
    one, two = batch(model, 1), padded(model)
    outputs = [model(one), model(two)]
    counts = [int(output.token_count) for output in outputs]
    assert counts[0] != counts[1]
    whole = sum(output.loss_sum for output in outputs) / sum(counts)
    with torch.no_grad():
        words = sum(model.eval()(each).loss_sum for each in (one, two)) / sum(counts)
    balance = sum(count * output.router_loss.item() for count, output in zip(counts, outputs)) / sum(counts)
    assert float(whole) == pytest.approx(float(words) + WEIGHT * balance, rel=1e-5)


def gradients(**options: Any) -> dict[str, Tensor]:
    model = experts(**options)
    model.train()(padded(model)).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_the_router_learns_from_it_also_under_checkpointing() -> None:
    without, with_loss = gradients(), gradients(router_loss=WEIGHT)
    again = gradients(router_loss=WEIGHT, gradient_checkpointing=True)
    gate = next(name for name in without if name.endswith("layers.1.mlp.gate.weight"))
    assert not torch.allclose(without[gate], with_loss[gate])
    assert set(with_loss) == set(again)
    for name, gradient in with_loss.items():
        torch.testing.assert_close(again[name], gradient)


def test_a_model_without_experts_has_none() -> None:
    with pytest.raises(ModelError, match=r"router_loss: LlamaForCausalLM has no mixture of experts.*set it to null"):
        language("llama", router_loss=0.02)


# --- experts in files -----------------------------------------------------------------------------------------------


def stored(count: int = 3) -> dict[str, Tensor]:
    """One layer's experts as files of transformers 4 have them; the order of names is not that of numbers."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"w3": (6, 4), "w2": (4, 6), "w1": (6, 4)}
    return {
        f"model.layers.1.block_sparse_moe.experts.{number}.{name}.weight": torch.randn(shape, generator=draw)
        for number in reversed(range(count))
        for name, shape in shapes.items()
    }


OURS = "language_model.model.model.layers.1.mlp.experts."


def test_experts_are_stacked_and_go_back() -> None:
    files = stored(11)  # more than ten: "10" sorts before "2"
    made = translate(FORM, files)
    assert set(made.tensors) == {OURS + "gate_up_proj", OURS + "down_proj"}
    for number in range(11):
        one = {name: files[f"model.layers.1.block_sparse_moe.experts.{number}.{name}.weight"] for name in ("w1", "w3")}
        assert torch.equal(made.tensors[OURS + "gate_up_proj"][number], torch.cat([one["w1"], one["w3"]]))
    back, lost = FORM.back(made.tensors)
    assert not lost and set(back) == set(files)
    assert all(torch.equal(back[name], files[name]) for name in files)


@pytest.mark.parametrize("name", ["1.w1", "0.w3", "0.w2"])
def test_an_expert_that_lacks_a_matrix_is_not_made_up(name: str) -> None:
    """The rest keeps the file's names, so that the report shows it as what has no place."""
    files = stored()
    del files[f"model.layers.1.block_sparse_moe.experts.{name}.weight"]
    broken = OURS + ("down_proj" if name.endswith("w2") else "gate_up_proj")
    made = translate(FORM, files)
    assert broken not in made.tensors and len(made.tensors) > 1
    assert all(made.theirs[each] == each for each in made.tensors if not each.startswith(OURS))


@pytest.mark.parametrize("shape", [(), (5, 4)])
def test_an_expert_of_another_shape(shape: tuple[int, ...]) -> None:
    files = stored()
    files["model.layers.1.block_sparse_moe.experts.0.w1.weight"] = torch.zeros(shape)
    assert set(translate(FORM, files).tensors) > {OURS + "down_proj"}
    assert OURS + "gate_up_proj" not in translate(FORM, files).tensors
