"""The numbers of the original MiniMind-V, first and newest version, dense and with experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_minimind import (
    MODELS,
    Compared,
    build,
    compared,
    expected,
    golden_image,
    golden_json,
    golden_model,
    golden_tensors,
    has_experts,
    is_first,
    is_whole,
    make_batch,
    settings,
    v1_batch,
    v3_batch,
)
from torch import Tensor

from minivlm.checkpoints.minimind_folder import language_config
from minivlm.models.balance import per_layer, per_sequence
from minivlm.types import IGNORE_INDEX, Batch

__all__ = ["compared"]
each_model = pytest.mark.parametrize("name", MODELS)
FIRST = [name for name in MODELS if is_first(name)]
NEWEST = [name for name in MODELS if not is_first(name)]
SPLITS = {name: ("pretrain", "sft") if is_first(name) else ("single", "multi") for name in MODELS}
WHOLE = [name for name in MODELS if is_whole(name)]
"""The models of which the set has all embeddings, so that a sum over the vocabulary is the original's."""


def batch_of(name: str, split: str) -> Batch:
    return v1_batch(name, split)[0] if is_first(name) else v3_batch(name, split)


def get(tensors: dict[str, Tensor], *names: str) -> Tensor | None:
    return next((tensors[name] for name in names if name in tensors), None)


@each_model
@torch.no_grad()
def test_golden_minimind_v_features(compared: Compared, name: str) -> None:
    """Pictures through the encoder, class token kept in the first version, normed in the newest; the projection."""
    model, processor = golden_model(name)
    _, tensors, own = expected(name)
    for key in (key for key in tensors if key.startswith("features_eval/")):
        image = key.split("/")[1]
        features = model.vision_encoder(processor.load_pixels(golden_image(image))["image"][None])
        compared.close(features[0], tensors[key], what=key)
        compared.close(model.connector(features)[0], tensors.get(f"{own}/projected/{image}"), what=key)
    for split in SPLITS[name]:
        if (given := tensors.get(f"{own}/{split}/features")) is not None:
            compared.close(model.connector(given), tensors.get(f"{own}/{split}/projected"), what=split)


@pytest.mark.parametrize("name", MODELS)
def test_golden_minimind_v_hidden_states_and_logits(compared: Compared, name: str) -> None:
    """What goes into the language model, what comes out of it, and the logits of some positions."""
    for split in SPLITS[name]:
        compare_states(compared, name, split)


@torch.no_grad()
def compare_states(compared: Compared, name: str, split: str) -> None:
    model, _ = golden_model(name)
    numbers, tensors, own = expected(name)
    batch, start = batch_of(name, split), f"{own}/{split}/"
    embeds = model.embed(batch)
    hidden = model.language_model(embeds, None, torch.arange(embeds.shape[1])[None])
    for ours, golden in (
        (embeds, get(tensors, start + "input_embeds", start + "input_embeds_sample0")),
        (hidden, get(tensors, start + "final_hidden")),
    ):
        if golden is not None:
            rows = golden if golden.dim() == 3 else golden[None]
            compared.close(ours[: len(rows), : rows.shape[1]], rows, what=start)
    logits = get(tensors, start + "logits_at_positions_sample0")
    if logits is not None:
        ours = model.language_model.head(hidden[0, numbers["logit_positions"]])
        compared.close(ours, logits) if is_whole(name) else compared.close(*seen(ours, logits))


def seen(ours: Tensor, golden: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of the rows that the trimmed copy has."""
    kept = ours.abs().sum(0) > 0
    return ours[:, kept], golden[:, kept]


@pytest.mark.parametrize(("name", "split"), [(name, split) for name in WHOLE for split in SPLITS[name]])
@torch.no_grad()
def test_golden_minimind_v_losses(compared: Compared, name: str, split: str) -> None:
    """The mean over the trained tokens, and in the first version every token's own loss."""
    model, _ = golden_model(name)
    numbers, tensors, own = expected(name)
    batch = batch_of(name, split)
    output = model(batch, return_logits=True)
    loss = output.loss
    if is_first(name):
        mask = v1_batch(name, split)[1]
        loss = output.loss_sum / mask.sum()  # where the original counts targets that give no loss
        targets = expected(name)[1][f"{split}/Y"].long()
        each = torch.nn.functional.cross_entropy(
            output.logits[:, :-1].transpose(1, 2), targets, ignore_index=0, reduction="none"
        )
        compared.close(each, tensors.get(f"{own}/{split}/token_loss"))
    compared.close(loss, numbers.get(f"{own}/{split}/loss"))


@pytest.mark.parametrize(("name", "split"), [(n, s) for n in NEWEST if has_experts(n) for s in SPLITS[n]])
def test_golden_minimind_v_balance_loss(compared: Compared, name: str, split: str) -> None:
    """Layer by layer, times its weight, on top of the loss in training and not in evaluation."""
    weight = settings(name)["router_aux_loss_coef"]
    model, _ = build(name, router_loss=weight, router_loss_form="per_layer")
    numbers, _, own = expected(name)
    batch = v3_batch(name, split)
    with torch.no_grad():
        output = model.train()(batch)
        assert model.eval()(batch).router_loss is None
    compared.close(output.router_loss * weight, numbers.get(f"{own}/{split}/aux_loss_train"), 1e-7)
    if is_whole(name):
        compared.close(output.loss, numbers.get(f"{own}/{split}/train_total"))


@pytest.mark.parametrize("name", [name for name in MODELS if has_experts(name)])
@torch.no_grad()
def test_golden_minimind_v_routers(compared: Compared, name: str) -> None:
    """Which experts are chosen with which weights; the balance loss of the first version, which it never used."""
    model, _ = golden_model(name)
    numbers, tensors, own = expected(name)
    batch = batch_of(name, SPLITS[name][0])
    if is_first(name):  # which has seen one position less
        batch = Batch(
            batch.input_ids[:, :-1], batch.attention_mask[:, :-1], features=batch.features, pixels=batch.pixels
        )
    decoder: Any = model.language_model.model.model
    routed = decoder(inputs_embeds=model.embed(batch), output_router_logits=True).router_logits
    for layer, logits in enumerate(routed):
        scores = logits.float().softmax(-1)
        golden = tensors.get(f"{own}/router_probs_layer{layer}_sample0")
        compared.close(scores[: batch.input_ids.shape[1]], golden)
        if f"{own}/route_idx_layer{layer}" in tensors:
            chosen = scores.topk(tensors[f"{own}/route_idx_layer{layer}"].shape[1], -1).indices.sort(-1).values
            compared.equal(chosen.tolist(), tensors[f"{own}/route_idx_layer{layer}"].tolist())
            picked = scores.gather(-1, chosen)
            compared.close(picked / picked.sum(-1, keepdim=True), tensors.get(f"{own}/route_weight_layer{layer}"))
        if f"{own}/aux_layer{layer}" in numbers:
            loss = per_sequence(logits, batch.attention_mask, settings(name)["num_experts_per_tok"])
            compared.close(loss * settings(name)["aux_loss_alpha"], numbers[f"{own}/aux_layer{layer}"], 1e-7)


def test_balance_is_one_per_expert_of_a_token() -> None:
    """Even routers, and padding that counts in no form."""
    even = torch.eye(4).repeat(3, 1) * 50
    mask = torch.ones(2, 6)
    torch.testing.assert_close(per_layer(even, mask, 1), torch.tensor(1.0))
    one = torch.tensor([[9.0, 0, 0, 0]]).repeat(8, 1)
    half = torch.tensor([[1.0, 1, 1, 1], [1.0, 1, 0, 0]])
    mixed = torch.cat([one, torch.randn(8, 4, generator=torch.Generator().manual_seed(0))])
    for loss in (per_layer, per_sequence):
        assert float(loss(one, torch.ones(2, 4), 1)) > 3.9
        padded = mixed.clone().view(4, 4, 4)
        padded[1, 2:] = 7.0
        changed = padded.clone()
        changed[1, 2:] = -3.0
        seen_mask = torch.cat([torch.ones(1, 4), half[1:], torch.ones(2, 4)])
        torch.testing.assert_close(loss(padded.flatten(0, 1), seen_mask, 2), loss(changed.flatten(0, 1), seen_mask, 2))


def prompt_batch(name: str, ids: list[int], image: str | None = None) -> Batch:
    made = make_batch(name, torch.tensor([ids]), torch.full((1, len(ids)), IGNORE_INDEX), [image] if image else [])
    made.padding_side = "left"
    return made


@each_model
def test_golden_minimind_v_greedy(compared: Compared, name: str) -> None:
    """Greedy ids with a picture and without."""
    model, _ = golden_model(name)
    numbers, _, own = expected(name)
    cases = {**numbers.get(f"{own}/greedy", {}), None: numbers.get(f"{own}/greedy_text_only")}
    for image, case in cases.items():
        if case:
            batch = prompt_batch(name, case["prompt_ids"], image)
            ids = model.generate(batch, max_new_tokens=len(case["new_ids"]), eos_token_id=None, pad_token_id=0)
            compared.equal(ids[0].tolist(), case["new_ids"])


@pytest.mark.parametrize("name", NEWEST)
@torch.no_grad()
def test_golden_minimind_v_masked_texts(compared: Compared, name: str) -> None:
    """A batch of two texts, the second padded on the right."""
    model, _ = golden_model(name)
    _, tensors, own = expected(name)
    if not {f"{own}/masked/input_ids", f"{own}/masked/attention_mask"} <= tensors.keys():
        return
    ids, mask = (tensors[f"{own}/masked/{key}"].long() for key in ("input_ids", "attention_mask"))
    positions = torch.arange(ids.shape[1])[None].expand_as(ids)
    for seen_mask in (mask, None):  # right padding needs no mask
        hidden = model.language_model(model.language_model.embed(ids), seen_mask, positions)
        compared.close(hidden[0], tensors.get(f"{own}/masked/hidden_sample0"))
        compared.close(hidden[1, : int(mask[1].sum())], tensors.get(f"{own}/masked/hidden_sample1_valid"))


@pytest.mark.parametrize("name", [name for name in WHOLE if is_first(name)])
@torch.no_grad()
def test_golden_minimind_v_sampler(compared: Compared, name: str) -> None:
    """Probabilities in front of a draw, each draw replaced by the likeliest id."""
    model, _ = golden_model(name)
    numbers, tensors, own = expected(name)
    key = next((key for key in tensors if key.startswith(f"{own}/sampler_ids_")), None)
    asked, probabilities = numbers.get(f"{own}/greedy_text_only"), tensors.get(str(key).replace("_ids_", "_probs_"))
    if key is None or asked is None or probabilities is None:  # of another set than the default copy
        return
    temperature, top_k = (float(part[1:]) for part in key.split("_ids_")[-1].split("_")[:2])
    ids = list(asked["prompt_ids"])
    penalty = float(key.rsplit("_rp", 1)[1])
    for golden_ids, golden_probs in zip(tensors[key], probabilities, strict=True):
        logits = model(prompt_batch(name, ids), return_logits=True).logits[0, -1]
        logits[sorted(set(ids))] /= penalty  # the original divides negative ones, too, where transformers multiplies
        kept = (logits / temperature).topk(int(top_k))
        compared.equal(sorted(kept.indices.tolist()), sorted(golden_ids.tolist()))
        order = {i: float(p) for i, p in zip(kept.indices.tolist(), kept.values.softmax(-1), strict=True)}
        compared.close([order[i] for i in golden_ids.tolist()], golden_probs)
        ids.append(int(kept.indices[0]))


@pytest.mark.parametrize("name", [name for name in WHOLE if not is_first(name)])
@torch.no_grad()
def test_golden_minimind_v_sampler_of_the_newest(compared: Compared, name: str) -> None:
    """Penalty, temperature, top-k and top-p are those of transformers, whichever of the first two comes first."""
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    model, _ = golden_model(name)
    numbers, tensors, own = expected(name)
    start = f"{own}/sampler_top8_ids_"
    for key in (key for key in tensors if key.startswith(start)):
        form = key.removeprefix(start)
        temperature, top_p, top_k, penalty = (float(part.lstrip("tpkr")) for part in form.split("_"))
        steps = LogitsProcessorList(
            [
                RepetitionPenaltyLogitsProcessor(penalty),
                TemperatureLogitsWarper(temperature),
                TopKLogitsWarper(int(top_k)),
                TopPLogitsWarper(top_p),
            ]
        )
        ids = list(numbers.get(f"{own}/sampler_prompt_ids", []))
        probabilities, counts = (tensors.get(key.replace("top8_ids", new)) for new in ("top8_probs", "support"))
        if not ids or probabilities is None or counts is None:
            continue
        for golden_ids, golden_probs, count in zip(tensors[key], probabilities, counts, strict=True):
            logits = model(prompt_batch(name, ids), return_logits=True).logits[:, -1]
            probs = steps(torch.tensor([ids]), logits)[0].softmax(-1)
            kept = golden_ids >= 0
            compared.close(probs[golden_ids[kept].long()], golden_probs[kept])
            compared.equal(int((probs > 0).sum()), int(count))
            ids.append(int(probs.argmax()))


@pytest.mark.parametrize("table", ["plain", "yarn16"])
def test_golden_minimind_v_rotary_table(compared: Compared, table: str) -> None:
    """Cosines and sines of the newest version's positions, also those of ``inference_rope_scaling``."""
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    tensors, positions = golden_tensors("head/expected.safetensors"), golden_json("head/expected.json")
    listed = "rope_positions" in positions
    for key in (key for key in tensors if listed and key.startswith("rope") and key.endswith(f"_{table}_cos")):
        size = int(key.removeprefix("rope").split("_")[0])
        ours = language_config({"hidden_size": size, "head_dim": size, "inference_rope_scaling": table == "yarn16"})
        rotary = Qwen3RotaryEmbedding(Qwen3Config(**{k: v for k, v in ours.items() if k != "model_type"}))
        cos, sin = rotary(torch.zeros(1, dtype=torch.float32), torch.tensor([positions["rope_positions"]]))
        compared.close(cos[0], tensors[key], what=key)
        compared.close(sin[0], tensors.get(key.replace("_cos", "_sin")), what=key)
