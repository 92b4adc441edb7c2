"""The numbers of the original Imp, in both layouts of its checkpoints, reproduced through the public API."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_imp import GENERATIONS, GOLDEN, Compared, compared, golden_image, golden_json, golden_tensors
from helpers import write_yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from minivlm.api import assemble
from minivlm.checkpoints.llava import FUSED_LORA, LLAVA_LORA
from minivlm.config.loader import parse_model
from minivlm.datasets.configs import LlavaJsonConfig
from minivlm.datasets.llava_json import LlavaJsonBuilder
from minivlm.export import main as export
from minivlm.models.tuning import parameter_groups
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.processor import VLMProcessor
from minivlm.processors.template import ImageSlot, Text, tokenize
from minivlm.types import IMAGE_MARKER, IMAGE_TOKEN_ID, Batch, Encoded, Message

FEATURES, LOGITS, LOSSES, GRADIENTS = 1e-5, 1e-4, 1e-5, 1e-5  # the tolerances of the set's README
TRAINED, CURVE = 2e-3, 1e-4
TOKENIZER = GOLDEN / "tokenizer"
each_generation = pytest.mark.parametrize("generation", GENERATIONS)
MERGED = [name for name in GENERATIONS if (GOLDEN / name / "merged" / "model.safetensors").is_file()]
"""The trimmed copy has the merged folder of the newer layout only."""
__all__ = ["compared"]


@cache
def base(generation: str) -> tuple[VisionLanguageModel, VLMProcessor]:
    """The model without adapters, from its folder alone but for the tokenizer."""
    return load({"checkpoint": str(GOLDEN / generation), "language_model": language()})


def language(path: Path | None = None, **settings: Any) -> dict[str, Any]:
    """Node ``language_model`` of a folder without tokenizer."""
    node = {"name": "hf", "tokenizer": str(TOKENIZER), "special_tokens": {"eos_token": "</s>"}, **settings}
    return node | ({"path": str(path)} if path else {})


def load(section: dict[str, Any]) -> tuple[VisionLanguageModel, VLMProcessor]:
    model, processor, _ = assemble(parse_model(section, "golden set"))
    return model.eval(), processor


def with_adapters(generation: str, folder: Path | None = None, **settings: Any) -> VisionLanguageModel:
    """The model with the adapters and the projector of a folder, on the base of the set."""
    folder = folder or GOLDEN / generation / "stage2_lora"
    section = {"checkpoint": str(folder), "language_model": language(GOLDEN / generation, **settings)}
    return load(section)[0]


def expected(generation: str) -> dict[str, Tensor]:
    return golden_tensors(f"{generation}/expected.safetensors")


def meta(generation: str) -> dict[str, Any]:
    return golden_json(f"{generation}/meta.json")


def pixels(processor: VLMProcessor, names: Sequence[str]) -> Tensor:
    return torch.stack([processor.load_pixels(golden_image(name))["image"] for name in names])


def training_batch(processor: VLMProcessor) -> Batch:
    """The records of batch.json as training sees them."""
    settings = LlavaJsonConfig(annotations=str(GOLDEN / "batch.json"), images=str(GOLDEN / "images"))
    return processor.collate([processor.encode(s) for s in LlavaJsonBuilder(settings, "batch").build("train")])


def rows_batch(processor: VLMProcessor, rows: Sequence[str], names: Sequence[str]) -> Batch:
    """Bare texts with markers, all of it supervised, which take the pictures in order."""
    left = list(names)
    samples = []
    for row in rows:
        pieces = row.split(IMAGE_MARKER)
        segments: list[Any] = [Text(pieces[0], supervised=True)]
        for piece in pieces[1:]:
            segments += [ImageSlot(), Text(piece, supervised=True)]
        own = [left.pop(0) for _ in pieces[1:]]
        sizes = [processor.tokens_per_image] * len(own)
        ids, labels = tokenize(segments, processor.tokenizer, sizes)
        images = {"image": list(pixels(processor, own))} if own else {}
        samples.append(Encoded(ids, labels, pixels=images, tokens_per_image=sizes, sample_id=row))
    return processor.collate(samples)


def run(model: VisionLanguageModel, batch: Batch) -> Any:
    with torch.no_grad():
        return model(batch, return_logits=True)


def compare_rows(compared: Compared, ours: Tensor, golden: Tensor | None, mask: Tensor, tolerance: float) -> None:
    """Equal where the original's mask is 1; its padding may be longer."""
    if golden is None:
        return
    for mine, theirs, seen in zip(ours, golden, mask.bool(), strict=True):
        count = int(seen.sum())
        compared.close(mine[:count], theirs[:count], tolerance)


# --- the model ------------------------------------------------------------------------------------------------------


@each_generation
def test_golden_imp_features(compared: Compared, generation: str) -> None:
    model, processor = base(generation)
    golden = expected(generation)
    with torch.no_grad():
        features = model.vision_encoder(pixels(processor, meta(generation)["image_order"]))
        visual = model.connector(features)
    compared.close(features, golden.get("vision_features"), FEATURES)
    compared.close(visual, golden.get("projected"), FEATURES)


@each_generation
def test_golden_imp_batch(compared: Compared, generation: str) -> None:
    """Spliced inputs, labels, loss and logits of a training batch."""
    model, processor = base(generation)
    golden, batch = expected(generation), training_batch(processor)
    mask = golden["batch.base.attention_mask"]
    output = run(model, batch)
    with torch.no_grad():
        embeds = model.embed(batch)
    assert batch.labels is not None
    compare_rows(compared, embeds, golden.get("batch.base.inputs_embeds"), mask, FEATURES)
    compare_rows(compared, batch.labels, golden.get("batch.base.labels"), mask, 0)
    compared.equal(batch.attention_mask.sum(1).tolist(), mask.sum(1).tolist())
    compared.close(output.loss.reshape(1), golden.get("batch.base.loss"), LOSSES)
    every = golden.get("batch.base.logits_every_2nd_position")
    compare_rows(compared, output.logits[:, ::2], every, mask[:, ::2], LOGITS)


@each_generation
def test_golden_imp_several_pictures(compared: Compared, generation: str) -> None:
    """Two pictures in a row beside one and none, and three pictures in one place."""
    model, processor = base(generation)
    golden, about = expected(generation), meta(generation)
    batch = rows_batch(processor, about["multi.rows"], about["multi.image_names"])
    mask = golden["multi.base.attention_mask"]
    output = run(model, batch)
    assert batch.labels is not None
    compare_rows(compared, batch.labels, golden.get("multi.base.labels"), mask, 0)
    compare_rows(compared, output.logits, golden.get("multi.base.logits"), mask, LOGITS)
    compared.close(output.loss.reshape(1), golden.get("multi.base.loss"), LOSSES)
    with torch.no_grad():
        compare_rows(compared, model.embed(batch), golden.get("multi.base.inputs_embeds"), mask, FEATURES)
    row = about["multi.rows"][about["list5d.row"]].replace(IMAGE_MARKER, IMAGE_MARKER * 3)
    batch = rows_batch(processor, [row], ["wide", "tall", "gray"])
    mask = golden["list5d.base.attention_mask"]
    compared.equal(batch.attention_mask.tolist(), mask.tolist())
    compare_rows(compared, run(model, batch).logits, golden.get("list5d.base.logits"), mask, LOGITS)


@each_generation
def test_golden_imp_cut_inside_a_picture(compared: Compared, generation: str) -> None:
    """The compatibility switch cuts behind the splice, wherever that is."""
    about = meta(generation)
    longest = about["trunc.base.tokenizer_model_max_length"]
    settings = {"name": "vlm", "max_length": longest, "on_overflow": "cut_right", "image": {"name": "image"}}
    section = {"checkpoint": str(GOLDEN / generation), "language_model": language(), "processor": settings}
    model, processor = load(section)
    golden, batch = expected(generation), training_batch(processor)
    mask = golden["trunc.base.attention_mask"]
    assert batch.labels is not None
    compared.equal(batch.attention_mask.sum(1).tolist(), mask.sum(1).tolist())
    compare_rows(compared, batch.labels, golden.get("trunc.base.labels"), mask, 0)
    compared.close(run(model, batch).loss.reshape(1), golden.get("trunc.base.loss"), LOSSES)


@each_generation
@pytest.mark.parametrize("kind", ["base", "merged"])
def test_golden_imp_greedy(compared: Compared, generation: str, kind: str) -> None:
    """Greedy ids, from the model itself and with the adapters of the second stage."""
    model, processor = base(generation)
    model = model if kind == "base" else with_adapters(generation)
    for case in golden_json(f"{generation}/expected_greedy.json"):
        text = case["prompt"].split("USER: ")[1].removesuffix(" ASSISTANT:")
        images = [golden_image(case["image"])] if case["image"] else []
        batch = processor.prompt([Message("user", text)], images)
        collapsed = [i for n, i in enumerate(batch.input_ids[0].tolist()) if i != IMAGE_TOKEN_ID or _begins(batch, n)]
        compared.equal(collapsed, [IMAGE_TOKEN_ID if i == -200 else i for i in case["input_ids"]])
        ids = model.generate(batch, max_new_tokens=len(case[kind]), eos_token_id=None, pad_token_id=0)
        compared.equal(ids[0].tolist(), case[kind])


def _begins(batch: Batch, place: int) -> bool:
    return place == 0 or int(batch.input_ids[0, place - 1]) != IMAGE_TOKEN_ID


# --- checkpoints ----------------------------------------------------------------------------------------------------


@each_generation
def test_golden_imp_adapters(compared: Compared, generation: str) -> None:
    """Adapters beside the base give the logits of the original's merged model."""
    _, processor = base(generation)
    golden = expected(generation)
    mask = golden["batch.base.attention_mask"]
    output = run(with_adapters(generation), training_batch(processor))
    every = golden.get("batch.merged.logits_every_4th_position")
    compare_rows(compared, output.logits[:, ::4], every, mask[:, ::4], LOGITS)
    compared.close(output.loss.reshape(1), golden.get("batch.merged.loss"), LOSSES)


@pytest.mark.parametrize("generation", MERGED)
def test_golden_imp_merged_folder(compared: Compared, generation: str) -> None:
    """The original's merged folder, which brings its tokenizer."""
    folder = GOLDEN / generation / "merged"
    model, processor = load({"checkpoint": str(folder)})
    assert processor.tokenizer.eos_token == "</s>"
    golden = expected(generation)
    mask = golden["batch.base.attention_mask"]
    output = run(model, training_batch(processor))
    every = golden.get("batch.merged.logits_every_4th_position")
    compare_rows(compared, output.logits[:, ::4], every, mask[:, ::4], LOGITS)
    compared.close(output.loss.reshape(1), golden.get("batch.merged.loss"), LOSSES)


@each_generation
@pytest.mark.parametrize("key", ["weights", "checkpoint"])
def test_golden_imp_projector(compared: Compared, generation: str, key: str) -> None:
    """The file of the first stage as weights of the connector, and its folder as a checkpoint."""
    folder = GOLDEN / generation / "stage1"
    given = torch.load(folder / "mm_projector.bin", weights_only=True)
    section: dict[str, Any] = {"checkpoint": str(GOLDEN / generation), "language_model": language()}
    if key == "weights":
        section["connector"] = {"name": "mlp", "weights": str(folder / "mm_projector.bin")}
    else:
        section = {"checkpoint": str(folder), "language_model": language(GOLDEN / generation)}
    model, _ = load(section)
    for name, tensor in given.items():
        compared.close(model.connector.state_dict()[f"layers.{name.split('mm_projector.')[1]}"], tensor, 0, name)


def same_tensors(compared: Compared, ours: dict[str, Tensor], golden: dict[str, Tensor]) -> None:
    """The same names, and the same values to the bit."""
    compared.equal(sorted(ours), sorted(golden))
    for name, tensor in golden.items():
        compared.close(ours[name], tensor, 0, name)


@each_generation
@pytest.mark.parametrize("kind", ["whole", "adapters", "projector"])
def test_golden_imp_written_back(compared: Compared, generation: str, kind: str, tmp_path: Path) -> None:
    """What was read from a file of the original is exported with its names and values."""
    source = {"whole": ".", "adapters": "stage2_lora", "projector": "stage1"}[kind]
    node = language() if kind == "whole" else language(GOLDEN / generation)
    section = {"model": {"checkpoint": str((GOLDEN / generation / source).resolve()), "language_model": node}}
    form = "imp_v1" if generation == "v1" else "imp"
    done = export([str(write_yaml(tmp_path / "model.yaml", section)), str(tmp_path / "out"), "--to", form])
    assert done == 0
    for file in sorted((GOLDEN / generation / source).glob("*.bin")):
        ours = torch.load(tmp_path / "out" / file.name, weights_only=True)
        same_tensors(compared, ours, torch.load(file, weights_only=True))
    if kind == "whole":
        ours = load_file(tmp_path / "out" / "model.safetensors")
        same_tensors(compared, ours, golden_tensors(f"{generation}/model.safetensors"))
    again, _ = load({"checkpoint": str(tmp_path / "out"), "language_model": node})
    assert all(torch.isfinite(p).all() for p in again.parameters())


# --- training -------------------------------------------------------------------------------------------------------


def training_folder(generation: str, target: Path) -> Path:
    """The state before the first step as a folder of adapters, in the original's layout."""
    target.mkdir()
    about = golden_json(f"{generation}/expected_train.json")
    source = GOLDEN / generation / "stage2_lora"
    config = json.loads((source / "config.json").read_text())
    config["mm_vision_tower"] = str(GOLDEN / config["mm_vision_tower"])
    (target / "config.json").write_text(json.dumps(config))
    settings = json.loads((source / "adapter_config.json").read_text())
    settings |= {"r": about["r"], "lora_alpha": about["alpha"], "lora_dropout": about["dropout"]}
    (target / "adapter_config.json").write_text(json.dumps(settings))
    state = golden_tensors(f"{generation}/train_init.safetensors")
    save_file({k: v for k, v in state.items() if "lora_" in k}, target / "adapter_model.safetensors")
    torch.save({k: v for k, v in state.items() if "lora_" not in k}, target / "non_lora_trainables.bin")
    return target


@each_generation
def test_golden_imp_training(compared: Compared, generation: str, tmp_path: Path) -> None:
    """Six steps with adapters and a projector at a rate of its own: losses, gradients, weights."""
    about = golden_json(f"{generation}/expected_train.json")
    form = FUSED_LORA if generation == "v1" else LLAVA_LORA
    section: dict[str, Any] = {"checkpoint": str(training_folder(generation, tmp_path / "start"))}
    section["language_model"] = language(GOLDEN / generation)
    section["connector"] = {"name": "mlp", "init_lr": about["mm_projector_lr"]}
    model, processor, config = assemble(parse_model(section, "golden set"))
    batch = training_batch(processor)
    model.train()
    groups = parameter_groups(model, config, about["lr"], weight_decay=0.0)
    for group in groups:
        group["lr"] = about["lr"] * group["lr_scale"]
    optimizer = torch.optim.AdamW(groups, betas=tuple(about["adam"]["betas"]), eps=about["adam"]["eps"])
    named = dict(model.named_parameters(remove_duplicate=False))
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    by_name, _ = form.back({name: torch.full_like(p, rates[id(p)]) for name, p in named.items() if p.requires_grad})
    for group in about["groups"]:
        for name in group["names"]:
            compared.close(by_name[plain(name)].mean(), torch.tensor(group["lr"]), 1e-9, name)
    for step, golden_loss in enumerate(about["losses"]):
        optimizer.zero_grad()
        loss = model(batch).loss
        loss.backward()
        compared.close(loss, torch.tensor(golden_loss), CURVE, f"step {step}")
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        compared.close(norm, torch.tensor(about["grad_norms"][step]), 1e-3, f"norm of step {step}")
        if step == 0:
            gradients, lost = form.back({name: p.grad for name, p in named.items() if p.grad is not None})
            assert not lost
            for name, tensor in golden_tensors(f"{generation}/train_grad_step0.safetensors").items():
                compared.close(gradients[plain(name)], tensor, GRADIENTS, name)
        optimizer.step()
    final, _ = form.back({name: p.detach() for name, p in named.items() if p.requires_grad})
    for name, tensor in golden_tensors(f"{generation}/train_final.safetensors").items():
        compared.close(final[plain(name)], tensor, TRAINED, name)


def plain(name: str) -> str:
    """A name of peft without that of the adapter, as files have it."""
    return name.replace(".default.", ".")


@each_generation
def test_golden_imp_frozen_parts_stay(compared: Compared, generation: str) -> None:
    """Adapters that are named like layers of the vision encoder do not touch it."""
    plain_model, _ = base(generation)
    adapted = with_adapters(generation)
    compared.equal(
        {
            n: float(t.double().sum())
            for n, t in adapted.vision_encoder.state_dict().items()
            if "post_layernorm" not in n
        },
        {
            n: float(t.double().sum())
            for n, t in plain_model.vision_encoder.state_dict().items()
            if "post_layernorm" not in n
        },
    )
    assert not [name for name, _ in adapted.vision_encoder.named_modules() if "lora" in name]


def test_golden_imp_sample_of_chat(compared: Compared) -> None:
    """A chat prompt ends behind ASSISTANT: and the end token is the one that was trained."""
    _, processor = base(GENERATIONS[-1])
    batch = processor.prompt([{"role": "user", "content": "<image>\nWhat?"}], [golden_image("wide")])
    ids = [i for i in batch.input_ids[0].tolist() if i != IMAGE_TOKEN_ID]
    compared.equal(processor.tokenizer.decode(ids)[-len("ASSISTANT:") :], "ASSISTANT:")
    special = golden_json(f"{GENERATIONS[-1]}/expected_preprocess.json")["special"]
    compared.equal(processor.generation_options()["eos_token_id"], [special["</s>"]])
