"""The one model class, what trains in it, and any language model of transformers inside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import tiny_model
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from minivlm.api import assemble
from minivlm.checkpoints.loading import load_part
from minivlm.config.loader import parse_model
from minivlm.models.base import Connector, LanguageModel, ModelError, PartModule, VisionEncoder
from minivlm.models.build import build_model
from minivlm.models.configs import HFLanguageModelConfig
from minivlm.models.language.hf import HFLanguageModel
from minivlm.models.tuning import apply_freeze, parameter_groups, part_table
from minivlm.models.vlm import PARTS, VisionLanguageModel
from minivlm.processors.processor import VLMProcessor
from minivlm.types import IGNORE_INDEX, IMAGE_TOKEN_ID, Batch, Message, Sample

RED, BLUE, GREY, GREEN = (
    Image.new("RGB", (40, 30), colour) for colour in ((220, 30, 30), (40, 60, 220), (90, 90, 90), (30, 180, 60))
)


def build(**changes: dict[str, Any]) -> tuple[VisionLanguageModel, VLMProcessor, Any]:
    """Model, processor and configuration of ``tiny_model`` with changed nodes, weights from seed 0."""
    section = tiny_model()
    for name, settings in changes.items():
        section[name] = {**section[name], **settings}
    torch.manual_seed(0)
    return assemble(parse_model(section, "test"))


def sharpen(model: VisionLanguageModel) -> VisionLanguageModel:
    """Larger random weights, so that greedy choices differ from row to row and are not decided by rounding."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1.5 / parameter.shape[-1] ** 0.5)
    return model.eval()


def sample(question: str, answer: str | None, *images: Any) -> Sample:
    return Sample("s", [Message("user", question), Message("assistant", answer)], list(images))


SAMPLES = [
    sample("<image>\nwhat color is the shape?", "red", RED),
    sample("<image>", "a blue picture with nothing in it", BLUE),
    sample("what is a triangle?", "a shape with three sides"),
    sample("is <image> the color of <image>?", "no", GREY, GREEN),
]


def training_batch(processor: VLMProcessor, samples: list[Sample] = SAMPLES) -> Batch:
    return processor.collate([processor.encode(s) for s in samples])


def prompts(processor: VLMProcessor, samples: list[Sample] = SAMPLES) -> Batch:
    return processor.collate([processor.prompt_sample(s) for s in samples], for_generation=True)


def test_a_picture_cut_at_the_limit_counts_as_far_as_it_goes() -> None:
    """What stands in front of the cut is computed as if nothing had followed; all parameters get gradients."""
    model, processor, _ = build()
    sharpen(model)
    whole = training_batch(processor, SAMPLES[3:])
    processor.config.on_overflow = "cut_right"
    second = [place for place, token in enumerate(whole.input_ids[0].tolist()) if token == IMAGE_TOKEN_ID][5]
    for limit, left in ((second + 1, [4, 2]), (second - 1, [4, 0])):
        processor.config.max_length = limit
        cut = training_batch(processor, SAMPLES[3:])
        assert cut.image_tokens == left and cut.to("cpu").image_tokens == left
        expected = model(whole, return_logits=True).logits[:, :limit]
        torch.testing.assert_close(model(cut, return_logits=True).logits, expected, rtol=0, atol=1e-5)
    processor.config.max_length = 2
    gone = training_batch(processor, SAMPLES[:1])
    assert gone.image_tokens == [0] and gone.num_images == 1
    model.embed(gone).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.connector.parameters())


# --- generation -----------------------------------------------------------------------------------------------------


def test_a_batch_of_four_generates_what_four_singles_generate() -> None:
    """Greedy ids, token by token; the rows differ in length, in pictures and in their answers."""
    model, processor, _ = build()
    sharpen(model)
    options = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": 3}
    together = model.generate(prompts(processor), **options).tolist()
    alone = [model.generate(prompts(processor, [s]), **options)[0].tolist() for s in SAMPLES]
    length = max(map(len, alone))
    assert together == [ids + [0] * (length - len(ids)) for ids in alone]
    assert len({tuple(ids) for ids in together}) == 4


def test_cached_features_and_given_tokens_generate_what_pixels_generate() -> None:
    model, processor, _ = build()
    sharpen(model)
    batch = prompts(processor)
    options = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": []}
    expected = model.generate(batch, **options)
    with torch.no_grad():
        features = model.extract_features(batch.pixels)
        visual = model.encode_images(batch)
    cached = Batch(batch.input_ids, batch.attention_mask, features=features, padding_side="left")
    assert cached.num_images == 4
    assert torch.equal(model.generate(cached, **options), expected)
    bare = Batch(batch.input_ids, batch.attention_mask, padding_side="left")
    assert torch.equal(model.generate(bare, visual=visual, **options), expected)
    grey = Batch(batch.input_ids, batch.attention_mask, features=torch.zeros_like(features), padding_side="left")
    assert not torch.equal(model.generate(grey, **options), expected), "pictures decide what is said"


def test_generation_stops_at_strings_of_several_tokens() -> None:
    """No end token is ever generated here: the text of the answer ends it."""
    model, processor, _ = build()
    sharpen(model)
    batch = prompts(processor, SAMPLES[:1])
    free = model.generate(batch, max_new_tokens=12, eos_token_id=[], pad_token_id=0)[0].tolist()
    pairs = [processor.tokenizer.decode(free[i : i + 2]) for i in range(11)]
    text = next(pair for pair in pairs if pair.isascii())
    processor.template.config.stop = [text]
    options = processor.generation_options()
    assert options["stop_strings"] == [text]
    stopped = model.generate(batch, max_new_tokens=12, **{**options, "eos_token_id": []})[0].tolist()
    assert stopped == free[: pairs.index(text) + 2] != free
    assert processor.decode(torch.tensor([free])) == processor.decode(torch.tensor([stopped]))


def test_generation_equals_the_argmax_of_the_forward_pass() -> None:
    model, processor, _ = build()
    sharpen(model)
    batch = prompts(processor)
    new = model.generate(batch, max_new_tokens=4, eos_token_id=[], pad_token_id=0)
    ids, mask = batch.input_ids, batch.attention_mask
    for step in range(4):
        with torch.no_grad():
            grown = Batch(ids, mask, pixels=batch.pixels, padding_side="left")
            logits = model(grown, return_logits=True).logits
        assert torch.equal(logits[:, -1].argmax(-1), new[:, step])
        ids, mask = torch.cat([ids, new[:, step : step + 1]], 1), pad(mask, (0, 1), value=1)


# --- forward --------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_full_logits() -> None:
    model, processor, _ = build()
    batch = training_batch(processor)
    output = model.eval()(batch, return_logits=True)
    assert output.logits.shape == (*batch.input_ids.shape, 360)
    shifted = output.logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten()  # type: ignore[index]
    expected = cross_entropy(*shifted, ignore_index=IGNORE_INDEX, reduction="sum")
    count = sum(processor.encode(s).num_supervised for s in SAMPLES)
    assert output.token_count.item() == count
    torch.testing.assert_close(output.loss_sum, expected)
    torch.testing.assert_close(output.loss, expected / count)
    silent = model(Batch(batch.input_ids, batch.attention_mask, pixels=batch.pixels))
    assert silent.loss is None and silent.logits is None


GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}


@pytest.mark.parametrize("config", [tiny_model()["language_model"]["config"], GPT2], ids=["relative", "absolute"])
def test_padding_and_neighbours_change_nothing(config: dict[str, Any]) -> None:
    """Right-padded for training, left-padded, and alone: the same logits at every real position.

    One language model has relative positions, to which a shift makes no difference, the other absolute ones.
    """
    model, processor, _ = build(language_model={"config": config})
    sharpen(model)
    encoded = [processor.encode(s) for s in SAMPLES]
    right, left = processor.collate(encoded), processor.collate(encoded, for_generation=True)
    with torch.no_grad():
        logits_right = model(right, return_logits=True).logits[right.attention_mask.bool()]
        logits_left = model(left, return_logits=True).logits[left.attention_mask.bool()]
        alone = [model(processor.collate([e]), return_logits=True).logits[0] for e in encoded]
    torch.testing.assert_close(logits_right, torch.cat(alone), rtol=0, atol=1e-4)
    torch.testing.assert_close(logits_left, torch.cat(alone), rtol=0, atol=1e-4)


def test_visual_tokens_of_several_pictures_stand_in_order() -> None:
    model, processor, _ = build()
    model.eval()
    batch = training_batch(processor)
    with torch.no_grad():
        embeds = model.embed(batch)
        tokens = [
            model.connector(model.vision_encoder(processor.transforms["image"](x)[None]))[0]
            for x in (RED, BLUE, GREY, GREEN)
        ]
        words = model.language_model.embed(batch.input_ids.clamp(min=0))
    is_image = batch.input_ids == IMAGE_TOKEN_ID
    assert is_image.sum(1).tolist() == [4, 4, 0, 8]
    torch.testing.assert_close(embeds[is_image], torch.cat(tokens), rtol=0, atol=1e-6)
    assert torch.equal(embeds[~is_image], words[~is_image])


def test_another_picture_changes_only_its_own_row() -> None:
    model, processor, _ = build()
    sharpen(model)
    with torch.no_grad():
        one = model(training_batch(processor), return_logits=True).logits
        changed = [*SAMPLES[:3], sample("is <image> the color of <image>?", "no", GREY, BLUE)]  # a shared one
        two = model(training_batch(processor, changed), return_logits=True).logits
    assert torch.equal(one[:3], two[:3]) and not torch.allclose(one[3], two[3])


def test_positions_and_visual_tokens_must_agree() -> None:
    model, processor, _ = build()
    batch = training_batch(processor)
    batch.pixels["image"] = batch.pixels["image"][:3]
    with pytest.raises(ValueError, match="16 image positions in the batch, but 12 visual tokens"):
        model(batch)
    batch.pixels = {}
    with pytest.raises(ValueError, match="16 image positions in the batch, but no picture"):
        model(batch)


# --- what trains ----------------------------------------------------------------------------------------------------


def test_a_frozen_encoder_has_no_gradient_and_stays_in_eval_mode() -> None:
    model, processor, _ = build()
    model.train()
    assert not model.vision_encoder.training and model.connector.training and model.language_model.training
    assert model.is_frozen("vision_encoder") and not model.is_frozen("connector")
    assert not any(module.training for module in model.vision_encoder.modules())
    seen: list[bool] = []
    model.vision_encoder.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    model(training_batch(processor)).loss.backward()
    assert seen == [False]
    for name, parameter in model.named_parameters():
        if name.startswith("vision_encoder."):
            assert not parameter.requires_grad and parameter.grad is None
        else:
            assert parameter.grad is not None and parameter.grad.any(), name


def test_batch_norm_of_a_frozen_encoder_does_not_move() -> None:
    encoder = {"name": "efficientnet_lite0", "config": None, "freeze": True, "image_size": 64, "block": 4}
    section = tiny_model()
    section["vision_encoder"] = {key: value for key, value in encoder.items() if value is not None}
    model, processor, _ = assemble(parse_model(section, "test"))
    before = {name: buffer.clone() for name, buffer in model.vision_encoder.named_buffers()}
    assert len(before) > 10
    model.train()
    model(training_batch(processor)).loss.backward()
    for name, buffer in model.vision_encoder.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_a_frozen_language_model_still_teaches_the_connector() -> None:
    model, processor, _ = build(language_model={"freeze": True})
    model.train()
    assert not model.language_model.training
    model(training_batch(processor)).loss.backward()
    assert all(p.grad is None for p in model.language_model.parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.connector.parameters())


def test_an_encoder_that_trains_gets_gradients() -> None:
    model, processor, _ = build(vision_encoder={"freeze": False})
    model.train()
    assert model.vision_encoder.training
    model(training_batch(processor)).loss.backward()
    gradient = model.vision_encoder.model.get_parameter("embeddings.patch_embedding.weight").grad
    assert gradient is not None and gradient.any()


def test_a_batch_of_texts_gives_the_connector_zeros() -> None:
    """Zeros and not None: otherwise processes that met pictures would wait for one that did not."""
    model, processor, _ = build()
    batch = training_batch(processor, [SAMPLES[2]])
    loss = model.train()(batch).loss
    loss.backward()
    for name, parameter in model.connector.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name
    assert all(p.grad is not None and p.grad.any() for p in model.language_model.parameters())
    with torch.no_grad():
        assert model.eval()(batch).loss.item() == pytest.approx(loss.item(), rel=1e-6)


def test_freezing_by_glob() -> None:
    model, _, config = build(language_model={"freeze": ["*.embed_tokens.*", "model.model.layers.0.*"]})
    frozen = {n for n, p in model.language_model.named_parameters() if not p.requires_grad}
    assert "model.model.embed_tokens.weight" in frozen and "model.lm_head.weight" not in frozen
    assert {n for n in frozen if "embed_tokens" not in n} == {
        n for n, _ in model.language_model.named_parameters() if ".layers.0." in n
    }
    assert not model.is_frozen("language_model") and model.train().language_model.training
    rows = {row.part: row for row in part_table(model, config, 1e-3)}
    trainable = sum(p.numel() for p in model.language_model.parameters() if p.requires_grad)
    assert rows["language_model"].trainable == trainable < rows["language_model"].parameters
    assert rows["vision_encoder"].trainable == 0 and not rows["vision_encoder"].rates


def test_freezing_can_be_undone_and_a_glob_must_match() -> None:
    module = PartModule()
    for name in ("0", "1"):
        module.add_module(name, nn.Linear(2, 2))
    apply_freeze("connector", module, True)
    assert not any(p.requires_grad for p in module.parameters())
    apply_freeze("connector", module, ["0.*"])
    assert [p.requires_grad for p in module.parameters()] == [False, False, True, True]
    apply_freeze("connector", module, [])
    assert all(p.requires_grad for p in module.parameters())
    with pytest.raises(ModelError, match=r"model\.connector\.freeze: 'layer\.\*' matches no parameter; .*0\.weight"):
        apply_freeze("connector", module, ["0.*", "layer.*"])


def test_parameter_groups() -> None:
    """Every trainable parameter once; biases and norms do not decay; rates by part."""
    model, _, config = build(connector={"norm": True, "init_lr": 1e-2}, vision_encoder={"freeze": False})
    groups = parameter_groups(model, config, init_lr=1e-3, weight_decay=0.1)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    by_name = {name: group for group in groups for name in group["param_names"]}
    assert set(by_name) == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, group in by_name.items():
        part = name.split(".")[0]
        assert group["name"].split(" ")[0] == part
        assert (group["lr"], group["lr_scale"]) == ((1e-2, 10.0) if part == "connector" else (1e-3, 1.0))
        bare = name.endswith("bias") or "norm" in name or name.startswith("connector.layers.0.") or "class_emb" in name
        assert group["weight_decay"] == (0.0 if bare else 0.1), name
    torch.optim.AdamW(groups)


def test_norms_are_known_by_their_class_and_shared_weights_are_grouped_once() -> None:
    config = {**tiny_model()["language_model"]["config"], "tie_word_embeddings": True}
    model, _, parsed = build(language_model={"config": config})
    groups = parameter_groups(model, parsed, 1e-3, 0.1)
    names = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    assert names["language_model.model.model.norm.weight"] == 0
    assert names["language_model.model.model.embed_tokens.weight"] == 0.1
    assert not any("lm_head" in name for name in names)
    assert not any(name.startswith("vision_encoder.") for name in names)


def test_nothing_to_train_is_an_error() -> None:
    model, _, config = build(connector={"freeze": True}, language_model={"freeze": True})
    with pytest.raises(ModelError, match="nothing trains: every part is frozen"):
        parameter_groups(model, config, 1e-3, 0.0)


# --- building -------------------------------------------------------------------------------------------------------


def test_any_three_parts_make_a_model() -> None:
    """The class asks for nothing but the three interfaces."""

    class Encoder(VisionEncoder):
        hidden_size, grid, num_tokens = 3, (1, 2), 2
        image_settings = {"size": 4}

        def forward(self, pixels: Tensor) -> Tensor:
            return pixels.mean((2, 3))[:, None].expand(-1, 2, -1)

    class Identity(Connector):
        tokens_per_image = 2

        def forward(self, features: Tensor) -> Tensor:
            return features

    class Bigram(LanguageModel):
        hidden_size, vocab_size = 3, 5

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 3)

        def embed(self, ids: Tensor) -> Tensor:
            return self.table(ids)

        def forward(self, embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> Tensor:
            assert position_ids.tolist() == [[0, 1, 2, 3]]
            return embeds

        def head(self, hidden: Tensor) -> Tensor:
            return hidden @ self.table.weight.T

    model = VisionLanguageModel(Encoder(), Identity(), Bigram())
    ids = torch.tensor([[1, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, 4]])
    pixels = torch.arange(48, dtype=torch.float32).view(1, 3, 4, 4)
    output = model(Batch(ids, torch.ones_like(ids), labels=ids.clamp(min=0), pixels={"image": pixels}), True)
    expected = pixels.mean((2, 3)) @ model.language_model.table.weight.T
    torch.testing.assert_close(output.logits[:, 1], expected)
    output.loss.backward()
    assert model.language_model.table.weight.grad is not None
    assert model.is_frozen("vision_encoder") and model.is_frozen("connector")


def test_on_the_meta_device_a_model_has_shapes_only() -> None:
    section = tiny_model()
    section["connector"]["weights"] = "/nowhere.safetensors"  # is not read
    config = parse_model(section, "test")
    meta = build_model(config, 360, meta=True)
    real, _, _ = build()
    assert all(p.is_meta for p in meta.parameters())
    assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert [meta.is_frozen(part) for part in PARTS] == [True, False, False]
    assert torch.get_default_device().type == "cpu"


def test_parts_that_cannot_be_built_name_their_node() -> None:
    section = tiny_model()
    section["language_model"]["config"]["num_attention_heads"] = 5
    with pytest.raises(ModelError, match=r"model\.language_model \(hf\) cannot be built: (.|\n)*heads \(5\)"):
        build_model(parse_model(section, "test"), 360)
    section = tiny_model()
    section["connector"]["merge"] = 3
    with pytest.raises(ModelError, match="merge 3 does not divide"):
        build_model(parse_model(section, "test"), 360)


def test_a_language_model_with_too_few_embeddings_is_refused() -> None:
    with pytest.raises(ModelError, match="the tokenizer has 360 entries, but the language model embeds only 100"):
        build(language_model={"config": {**tiny_model()["language_model"]["config"], "vocab_size": 100}})


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_of_a_part_from_a_file(suffix: str, tmp_path: Any) -> None:
    from safetensors.torch import save_file

    def save(state: dict[str, Tensor], name: str) -> str:
        path = str(tmp_path / (name + suffix))
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
        return path

    model, _, _ = build()
    state = {name: torch.randn_like(tensor) for name, tensor in model.connector.state_dict().items()}
    filled, _, _ = build(connector={"weights": save(state, "good")})
    for name, tensor in filled.connector.state_dict().items():
        assert torch.equal(tensor, state[name])
    short = {name: tensor for name, tensor in state.items() if name != "layers.0.bias"}
    long = {**state, "layers.9.bias": torch.zeros(1)}
    wide = {**state, "layers.0.bias": torch.zeros(7)}
    for content, reason in (
        (short, r"missing +1  \(layers\.0\.bias\)"),
        (long, r"unexpected +1  \(layers\.9\.bias\)"),
        (wide, r"wrong shape +1  \(layers\.0\.bias is \(7,\), wanted \(32,\)\)"),
    ):
        before = {name: tensor.clone() for name, tensor in model.connector.state_dict().items()}
        with pytest.raises(
            ModelError, match=rf"connector\.weights: .* does not belong to this part; it holds (.|\n)*{reason}"
        ):
            load_part(model, "connector", save(content, "bad"))
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.connector.state_dict().items())
    with pytest.raises(ModelError, match="there is no file"):
        load_part(model, "connector", f"nowhere{suffix}")
    damaged = tmp_path / f"damaged{suffix}"
    damaged.write_bytes(b"no tensors here")
    with pytest.raises(ModelError, match="cannot be read"):
        load_part(model, "connector", str(damaged))


def test_a_file_that_holds_something_else_is_refused(tmp_path: Any) -> None:
    model, _, _ = build()
    torch.save({"layers": 3, "notes": [1, 2]}, tmp_path / "other.pth")
    with pytest.raises(ModelError, match="holds no mapping from names to tensors, but the keys layers, notes"):
        load_part(model, "connector", str(tmp_path / "other.pth"))


# --- language models ------------------------------------------------------------------------------------------------

LLM: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}


@pytest.mark.parametrize(
    ("model_type", "settings", "attention"),
    [
        ("llama", {}, "sdpa"),
        ("llama", {"tie_word_embeddings": True}, "eager"),
        ("qwen2", {}, "sdpa"),
        ("phi", {}, "sdpa"),
        ("gemma", {"head_dim": 8}, "sdpa"),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 0.5}, "eager"),
        ("mixtral", EXPERTS, "sdpa"),
        ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 2.0}, "sdpa"),
        ("cohere", {"logit_scale": 0.25}, "sdpa"),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}, "sdpa"),
    ],
)
def test_logits_are_those_of_the_models_own_forward(model_type: str, settings: dict[str, Any], attention: str) -> None:
    """Also with padding on either side; scales and caps of the logits are easy to forget."""
    base = {} if model_type == "gpt2" else LLM
    torch.manual_seed(0)
    config = HFLanguageModelConfig(config={"model_type": model_type, **base, **settings}, attention=attention)
    model = HFLanguageModel(config, 50).eval()
    assert (model.hidden_size, model.vocab_size) == (32, 50)
    with torch.no_grad():
        model.model.get_output_embeddings().weight.mul_(20)
        ids = torch.randint(3, 50, (2, 7))
        expected = model.model(input_ids=ids).logits
        positions = torch.arange(7).expand(2, -1)
        plain = model.head(model(model.embed(ids), None, positions))
        right = model.head(model(model.embed(pad(ids, (0, 3))), None, pad(positions, (0, 3), value=6)))
        mask = pad(torch.ones_like(ids), (3, 0))
        left = model.head(model(model.embed(pad(ids, (3, 0))), mask, pad(positions, (3, 0))))
    assert expected.std() > 0.1
    for logits in (plain, right[:, :7], left[:, 3:]):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_the_storage_type_of_the_language_model() -> None:
    model = HFLanguageModel(HFLanguageModelConfig(config={"model_type": "llama", **LLM}, dtype="bf16"), 50)
    assert model.dtype == torch.bfloat16 and {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_checkpointing_the_language_model_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model, processor, _ = build(language_model={"gradient_checkpointing": checkpointing})
        model.train()(training_batch(processor)).loss.backward()
        gradients.append([p.grad for p in model.connector.parameters()])
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two)
