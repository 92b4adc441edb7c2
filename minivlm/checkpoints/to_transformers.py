"""A model as a folder of ``LlavaForConditionalGeneration`` (LLaVA-1.5, Liu et al. 2024), for plain transformers.

Where the architecture is LLaVA's, nothing is approximated: the tensors are ours under other names, and processor and
chat template give our ids and pixels. Everything else is refused. Pictures are to be given in RGB: behind transparent
ones transformers puts white, and a file it turns as its EXIF says, both of which we, as LLaVA, do not.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.checkpoints.llava_hf import VISION_TYPES
from minivlm.checkpoints.probe import Comparison, compare
from minivlm.checkpoints.report import CheckpointError
from minivlm.io import atomic_folder
from minivlm.models.connectors.mlp import LinearConnector, MLPConnector
from minivlm.models.language.hf import HFLanguageModel
from minivlm.models.vision.hf import HFVisionEncoder
from minivlm.models.vlm import VisionLanguageModel
from minivlm.processors.chat_template import to_jinja
from minivlm.processors.image import ImageTransform
from minivlm.processors.processor import VLMProcessor
from minivlm.processors.template import adds_bos, begins
from minivlm.types import IMAGE_MARKER

TOLERANCE = 1e-3
"""How much the logits of the exported folder may differ, in fp32."""
_PIL = "pixels are those of Pillow: where torchvision is installed, AutoProcessor.from_pretrained needs backend='pil'"
_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


@dataclass
class Exported:
    """What was written. ``notes`` say what a user of the folder must know."""

    parameters: int
    dtypes: list[str]
    image_token_id: int
    notes: list[str] = field(default_factory=list)
    comparison: Comparison | None = None


def export_transformers(
    model: VisionLanguageModel, processor: VLMProcessor, target: Path, *, check: bool = True
) -> Exported:
    """Write the folder atomically; the weights keep their storage types.

    With ``check`` plain transformers reads it back before it gets its name, and its logits are compared with those
    of ``model``, which becomes fp32 on the CPU for that. Raises :class:`CheckpointError` that names every part
    which LLaVA of transformers does not have, and if logits differ by more than :data:`TOLERANCE`.
    """
    with atomic_folder(target) as unfinished:
        exported = write_transformers(model, processor, unfinished)
        if check:
            exported.comparison = found = compare(unfinished, model.cpu().float().eval(), processor)
            if not found.logits <= TOLERANCE:
                raise CheckpointError(
                    f"transformers gives other logits for what was exported, by up to {found.logits:.3g}; {target} is "
                    "not written. This is an error of minivlm: please report it with the configuration of the model"
                )
            exported.notes += [f"the chat template gives other ids than minivlm {kind}" for kind in found.other_ids]
    return exported


def write_transformers(model: VisionLanguageModel, processor: VLMProcessor, folder: Path) -> Exported:
    """Write the files of :func:`export_transformers` into an existing folder."""
    wrong = differences(model, processor)
    if wrong:
        lines = "".join(f"\n  {line}" for line in wrong)
        raise CheckpointError(f"this model is not LlavaForConditionalGeneration of transformers:{lines}")
    tokenizer, image_token = _tokenizer(processor)
    llava = _llava(model, max(len(tokenizer), image_token + 1), image_token)
    llava.generation_config = generation_config(model.language_model, processor)
    notes = [_PIL]
    theirs = _processor(model, processor, tokenizer, notes)
    llava.save_pretrained(folder)
    theirs.save_pretrained(folder)
    theirs.image_processor.save_pretrained(folder)  # where readers before transformers 5 look
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in llava.parameters()})
    if len(dtypes) > 1:
        notes.append(f"the weights are stored as {' and '.join(dtypes)}; transformers loads all as {llava.dtype}")
    return Exported(llava.num_parameters(), dtypes, image_token, notes)


def differences(model: VisionLanguageModel, processor: VLMProcessor) -> list[str]:
    """What keeps a model from being LLaVA of transformers; one line for each setting, empty if nothing does."""
    return [
        *_vision(model.vision_encoder),
        *_connector(model),
        *_language(model.language_model),
        *_data(processor, model),
    ]


def _vision(encoder: Any) -> list[str]:
    key = "model.vision_encoder"
    kind = encoder.model.config.model_type if isinstance(encoder, HFVisionEncoder) else type(encoder).__name__
    if kind not in VISION_TYPES:
        return [f"{key}: it is {kind}, LLaVA has CLIP or SigLIP (name: hf)"]
    wrong = []
    if encoder.config.class_token == "only":
        wrong.append(f"{key}.class_token: only; LLaVA takes the patches, with the class token or without it")
    if encoder.config.final_norm and "siglip" in kind:
        wrong.append(f"{key}.final_norm: true; LLaVA takes the hidden state in front of the last norm")
    if encoder.interpolate:
        size = encoder.model.config.image_size
        wrong.append(f"{key}.image_size: {encoder.image_size}; LLaVA does not interpolate the positions of {size}")
    return wrong


def _connector(model: VisionLanguageModel) -> list[str]:
    key, connector = "model.connector", model.connector
    wanted = "LLaVA has mlp of depth 2, without norm and merge, or linear"
    if isinstance(connector, LinearConnector):
        return []
    if not isinstance(connector, MLPConnector):
        return [f"{key}: it is {type(connector).__name__}, {wanted}"]
    kinds = [type(layer) for layer in connector.layers]
    if kinds != [nn.Linear, nn.GELU, nn.Linear] or connector.merge > 1:
        layers = ", ".join(kind.__name__ for kind in kinds)
        return [f"{key}: its layers are {layers} with merge {connector.merge}, {wanted}"]
    hidden, width = connector.layers[0].out_features, model.language_model.hidden_size
    return [f"{key}.hidden_size: {hidden}; LLaVA has the width of the language model, {width}"] * (hidden != width)


def _language(language: Any) -> list[str]:
    key = "model.language_model"
    if not isinstance(language, HFLanguageModel):
        return [f"{key}: it is {type(language).__name__}, LLaVA has a causal language model of transformers (name: hf)"]
    wrong = []
    if any(".lora_" in name for name in language.state_dict()):
        wrong.append(f"{key}.lora: its adapters are not merged; run minivlm merge first")
    if language.quantization:
        wrong.append(f"{key}.quantization: its weights are quantised; set it to null")
    head = language.model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    if bias is not None and bool(bias.detach().count_nonzero()):
        wrong.append(f"{key}: the output head of {type(language.model).__name__} has a bias, that of LLaVA has none")
    if language.logit_scale != 1.0:
        wrong.append(f"{key}: its logits are scaled by {language.logit_scale:g}, those of LLaVA are not")
    if language.embed_scale != 1.0:
        wrong.append(f"{key}.scale_visual: visual tokens are multiplied by {language.embed_scale:g}, LLaVA's are not")
    if language.softcap is not None:
        wrong.append(f"{key}: its logits are capped at {language.softcap:g}, those of LLaVA are not")
    return wrong or _decoder(key, language)


def _decoder(key: str, language: HFLanguageModel) -> list[str]:
    from transformers import AutoModel

    text = language.model.config.get_text_config()
    with torch.device("meta"):
        theirs = AutoModel.from_config(text)
    ours = language.model.base_model
    if type(theirs) is not type(ours) or text.hidden_size != language.hidden_size:
        return [
            f"{key}: {type(ours).__name__} of width {language.hidden_size} is not what transformers builds from its "
            f"configuration, {type(theirs).__name__} of width {text.hidden_size}"
        ]
    return []


def _data(processor: VLMProcessor, model: VisionLanguageModel) -> list[str]:
    key, wrong = "model.processor.image", []
    transforms = list(processor.transforms.values())
    size = getattr(model.vision_encoder, "image_size", None)
    if len(transforms) != 1 or type(transforms[0]) is not ImageTransform:
        wrong.append(f"{key}: {', '.join(type(t).__name__ for t in transforms)}; LLaVA has one picture processor")
    elif transforms[0].resize not in ("squash", "shortest_edge", "pad"):
        wrong.append(f"{key}.resize: {transforms[0].resize}; LLaVA has squash, shortest_edge and pad")
    elif transforms[0].size != size:
        wrong.append(f"{key}.size: {transforms[0].size}, but the encoder takes {size}")
    tokenizer, bos = processor.tokenizer, processor.template.chat_config.bos
    front = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    if front and bos == "never":
        wrong.append("model.template.bos: never, but the tokenizer of the exported model would add it")
    if processor.template.chat_config.image_number:
        wrong.append("model.template.image_number: LLaVA's chat template does not number pictures")
    if tokenizer("a")["input_ids"] != front + tokenizer("a", add_special_tokens=False)["input_ids"]:
        wrong.append("model.language_model.tokenizer: it adds more than BOS to a text, and so it would in LLaVA")
    return wrong


def _tokenizer(processor: VLMProcessor) -> tuple[Any, int]:
    """A copy of the tokenizer that knows ``<image>``, and the id of that."""
    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(processor.tokenizer)
    if IMAGE_MARKER not in tokenizer.get_added_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE_MARKER, special=True, normalized=False)], special_tokens=True)
    as_llava = {"padding_side": "left", "model_input_names": ["input_ids", "attention_mask"]}
    for name, value in as_llava.items():
        setattr(tokenizer, name, value)
    tokenizer.init_kwargs |= as_llava  # which is what gets saved
    return tokenizer, tokenizer.convert_tokens_to_ids(IMAGE_MARKER)


def _llava(model: VisionLanguageModel, rows: int, image_token: int) -> Any:
    """The model of transformers around our tensors, with at least ``rows`` embeddings."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    encoder, connector, language = _parts(model)
    activation, first, second = _projector(connector)
    embeddings, head = language.model.get_input_embeddings(), language.model.get_output_embeddings()
    tied = head.weight is embeddings.weight
    rows = max(rows, embeddings.num_embeddings)
    vision, text = (config.to_dict() for config in (encoder.model.config, language.model.config.get_text_config()))
    # Layers behind the one that is taken are not kept, so it is the last.
    vision["num_hidden_layers"] = len(encoder.model.encoder.layers)
    text |= {"vocab_size": rows, "tie_word_embeddings": tied}
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=connector.tokens_per_image,
        vision_feature_layer=-1,
        vision_feature_select_strategy=_strategy(encoder),
        tie_word_embeddings=tied,
        projector_hidden_act=activation,
        multimodal_projector_bias=first.bias is not None,
    )
    modules: dict[str, nn.Module] = {
        "model.vision_tower": encoder.model,
        "model.multi_modal_projector.linear_1": first,
        "model.multi_modal_projector.linear_2": second,
        "model.language_model": language.model.base_model,
        "lm_head": head,
    }
    state = {f"{at}.{name}": tensor for at, module in modules.items() for name, tensor in module.state_dict().items()}
    state.pop("lm_head.bias", None)  # all zeros, see `differences`
    place = next(n for n, p in language.model.base_model.named_parameters() if p is embeddings.weight)
    for name in (f"model.language_model.{place}", "lm_head.weight"):
        state[name] = _enlarged(state[name], rows)
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(config)
    llava.load_state_dict(state, assign=True)
    llava.tie_weights()
    return llava.eval()


def _projector(connector: MLPConnector | LinearConnector) -> tuple[str, nn.Linear, nn.Linear]:
    """LLaVA's activation and the two layers around it; behind a single layer comes one that changes nothing."""
    if isinstance(connector, MLPConnector):
        first, _, second = connector.layers
        assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
        return "gelu", first, second
    first = connector.linear
    width, like = first.out_features, first.weight
    second = nn.Linear(width, width, bias=first.bias is not None, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        second.weight.copy_(torch.eye(width))
        if second.bias is not None:
            second.bias.zero_()
    return "linear", first, second


def _parts(model: VisionLanguageModel) -> tuple[HFVisionEncoder, MLPConnector | LinearConnector, HFLanguageModel]:
    encoder, connector, language = model.vision_encoder, model.connector, model.language_model
    assert isinstance(encoder, HFVisionEncoder) and isinstance(connector, (MLPConnector, LinearConnector))
    assert isinstance(language, HFLanguageModel)
    return encoder, connector, language


def _strategy(encoder: HFVisionEncoder) -> str:
    return "default" if encoder.num_prefix and encoder.config.class_token == "drop" else "full"


def _enlarged(weight: Tensor, rows: int) -> Tensor:
    """More rows, each the mean of the others: its logit is the mean of theirs, and so is never the greatest."""
    more = rows - len(weight)
    return (
        torch.cat([weight, weight.float().mean(0, keepdim=True).to(weight.dtype).expand(more, -1)]) if more else weight
    )


def generation_config(language: Any, processor: VLMProcessor) -> Any:
    """The language model's own, but greedy as ours, with the tokens that end an answer here."""
    settings = copy.deepcopy(language.model.generation_config)
    settings.do_sample = False
    settings.temperature = settings.top_p = settings.top_k = None
    settings._from_model_config = False  # else `generate` makes new ones from the configuration
    options = processor.generation_options()
    settings.eos_token_id, settings.pad_token_id = options["eos_token_id"], options["pad_token_id"]
    return settings


def _processor(model: VisionLanguageModel, processor: VLMProcessor, tokenizer: Any, notes: list[str]) -> Any:
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    encoder, _, _ = _parts(model)
    tokenizer.chat_template = chat_template(processor, tokenizer)
    if strings := processor.generation_options().get("stop_strings"):
        notes.append(
            f"{' '.join(map(repr, strings))} ends an answer and is no token: give generate(stop_strings={strings}, "
            "tokenizer=processor.tokenizer)"
        )
    (transform,) = processor.transforms.values()
    return LlavaProcessor(
        image_processor=LlavaImageProcessorPil(**picture_settings_of(transform)),
        tokenizer=tokenizer,
        patch_size=encoder.model.config.patch_size,
        vision_feature_select_strategy=_strategy(encoder),
        num_additional_image_tokens=encoder.num_prefix,
        image_token=IMAGE_MARKER,
        chat_template=tokenizer.chat_template,
    )


def chat_template(processor: VLMProcessor, tokenizer: Any) -> str:
    """The Jinja template of prompts as they are talked with, for a ``tokenizer`` that knows ``<image>``."""
    form, adds = processor.template.chat_config, adds_bos(tokenizer)
    bos = tokenizer.bos_token if begins(form.bos, tokenizer) else ""
    blank, tokens = _blank_behind_image(tokenizer), tokenizer.get_added_vocab()
    return to_jinja(form, bos=bos, bos_always=not adds, blank_behind_image=blank, tokens=tokens)


def _blank_behind_image(tokenizer: Any) -> bool:
    """Whether a text behind ``<image>`` needs a blank in front to have the ids of a text that begins there."""
    text = "\nWhat is it?"
    alone = tokenizer(text, add_special_tokens=False)["input_ids"]
    behind = [tokenizer(IMAGE_MARKER + blank + text, add_special_tokens=False)["input_ids"][1:] for blank in ("", " ")]
    return alone != behind[0] and alone == behind[1]


def picture_settings_of(transform: ImageTransform) -> dict[str, Any]:
    """The settings of LLaVA's picture processor, and of CLIP's, for what a transform does."""
    square = {"height": transform.size, "width": transform.size}
    crops = transform.resize == "shortest_edge"
    return {
        "size": {"shortest_edge": transform.size} if crops else square,
        "crop_size": square,
        "do_center_crop": crops,
        "do_pad": transform.resize == "pad",
        "resample": _RESAMPLE[transform.interpolation],
        "image_mean": transform.mean,
        "image_std": transform.std,
    }
