"""Any causal language model of transformers, held as a child and fed with embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minivlm.models.balance import load_balancing
from minivlm.models.base import DTYPES, LanguageModel, ModelError, on_meta_device
from minivlm.models.configs import HFLanguageModelConfig
from minivlm.models.hub import from_pretrained, load_hf_config, source_of
from minivlm.models.language.few_rows import fast_few_rows
from minivlm.models.quantization import quantization_arguments, replace_linear

_CACHE_OPTIONS = {"past_key_values", "use_cache", "cache_implementation", "assistant_model", "prompt_lookup_num_tokens"}
"""With one of these the caller says what is kept between two tokens."""


class HFLanguageModel(LanguageModel):
    """The decoder and the output head are called apart, so that the head runs on chosen positions only."""

    def __init__(self, config: HFLanguageModelConfig, vocab_size: int):
        super().__init__()
        from transformers import AutoModelForCausalLM

        self.config = config
        part = "model.language_model"
        scratch = None if config.config is None else {"vocab_size": vocab_size, **config.config}
        hf = load_hf_config(part, config.path, scratch, config.revision)
        arguments: dict[str, Any] = {"attn_implementation": config.attention}
        if config.dtype:
            arguments["dtype"] = DTYPES[config.dtype]
        if config.quantization:
            arguments |= quantization_arguments(config.quantization, config.dtype)
        if "quantization_config" in arguments:
            self.quantization = config.quantization
        if config.path is None or on_meta_device():
            quantised = arguments.pop("quantization_config", None)
            self.model: Any = AutoModelForCausalLM.from_config(hf, **arguments)
            if config.path is None and config.scaled_init:
                _scale_down(self.model, config.scaled_init, hf.get_text_config().num_hidden_layers)
            if quantised:
                replace_linear(self.model, quantised)
        else:
            self.model = from_pretrained(part, AutoModelForCausalLM, config.path, revision=config.revision, **arguments)
            self.source = source_of(config.path, config.revision)
        self.model.generation_config = _only_tokens(self.model.generation_config)
        if config.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            _checkpoint_in_eval_mode(self.model)
        self.hidden_size = self.model.get_input_embeddings().embedding_dim
        self.vocab_size = self.model.get_input_embeddings().num_embeddings
        if config.vocab_size not in (None, self.vocab_size):
            raise ModelError(
                f"{part}.vocab_size: {config.vocab_size} embeddings are expected, {config.path or 'the model'} has "
                f"{self.vocab_size} (Vicuna v0 has 32001; LLaMA and Vicuna v1.1 and v1.5 have 32000)"
            )
        self.fixed_parameters = frozenset(n for n, p in self.named_parameters() if not p.requires_grad)
        text = hf.get_text_config()
        self.head_dim = _head_dim(text)
        self.softcap = getattr(text, "final_logit_softcapping", None)  # Gemma 2 and 3
        self.logit_scale = _logit_scale(text)
        if config.scale_visual:
            self.embed_scale = _embed_scale(self.model.get_input_embeddings())
        self.device_map = config.device_map
        if config.router_loss is not None:
            self.router_loss = config.router_loss
            self._balance = load_balancing(self.model, config.router_loss_form)

    @property
    def dtype(self) -> torch.dtype:
        """Storage type of the embeddings, the type in which inputs are expected."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def output_head(self) -> nn.Module:
        """The layer that gives the logits."""
        return self.model.get_output_embeddings()

    def embed(self, ids: Tensor) -> Tensor:
        """[B, L] -> [B, L, hidden_size]."""
        return self.model.get_input_embeddings()(ids).to(ids.device)  # here as below: layers may lie elsewhere

    def forward(self, embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor) -> Tensor:
        """[B, L, hidden_size] -> normed hidden states of the last layer, same shape."""
        return self._decode(embeds, attention_mask, position_ids).last_hidden_state.to(embeds.device)

    def forward_balanced(self, embeds: Tensor, attention_mask: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The load-balancing loss of all layers' routers, padding left out; see :mod:`minivlm.models.balance`."""
        output = self._decode(embeds, attention_mask, position_ids, output_router_logits=True)
        return output.last_hidden_state, self._balance(output.router_logits, attention_mask)

    def _decode(self, embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor, **options: Any) -> Any:
        decoder: nn.Module = self.model.get_decoder()
        positions = {"attention_mask": attention_mask, "position_ids": position_ids}
        return decoder(inputs_embeds=embeds, **positions, use_cache=False, **options)

    def head(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] -> logits [..., vocab_size], as the model's own forward computes them."""
        logits = self.output_head(hidden).to(hidden.device) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def generate(self, embeds: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """Left-padded embeddings -> new ids [B, T], finished rows filled with the pad id."""
        from minivlm.models.language.cache import roomy_cache

        options = {"do_sample": False, "num_beams": 1} | options
        if options["num_beams"] == 1 and not _CACHE_OPTIONS & options.keys():
            cache = roomy_cache(self.model, options.get("max_new_tokens"))
            if cache is not None:
                options["past_key_values"] = cache
        with fast_few_rows(self.model):
            return self.model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **options)


@torch.no_grad()
def _scale_down(model: nn.Module, globs: Sequence[str], layers: int) -> None:
    """Divide what the globs match by sqrt(2 x layers) (GPT-2, Radford et al. 2019, section 2.3).

    Experts whose gate and up projections are one tensor [E, 2 * width, hidden] go by the names of both.
    """
    named: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        gate, fused, end = name.rpartition("gate_up_proj")
        if fused:
            halves = parameter.chunk(2, dim=1 if parameter.ndim == 3 else 0)
            named |= {f"{gate}{half}_proj{end}": own for half, own in zip(("gate", "up"), halves, strict=True)}
        else:
            named[name] = parameter
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in named):
            some = ", ".join(list(named)[:4])
            raise ModelError(f"model.language_model.scaled_init: '{glob}' matches no weight; names look like {some}")
    for name, tensor in named.items():
        if any(fnmatchcase(name, glob) for glob in globs):
            tensor.div_(math.sqrt(2 * layers))


def _only_tokens(folder: Any) -> Any:
    """What a folder says of generation, without penalties, lengths and sampling, which would be added to ours."""
    from transformers import GenerationConfig

    return GenerationConfig(**{key: getattr(folder, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")})


def _checkpoint_in_eval_mode(model: nn.Module) -> None:
    """Gradients also pass through a frozen model, which is in eval mode; transformers asks for train mode."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(_forward_of, layer, layer.forward)


def _forward_of(layer: nn.Module, forward: Any, *inputs: Any, **options: Any) -> Any:
    if layer.training or not torch.is_grad_enabled():  # there transformers does what is right
        return forward(*inputs, **options)
    return checkpoint(partial(forward, **options), *inputs, use_reentrant=False)


def _head_dim(config: Any) -> int | None:
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    return getattr(config, "head_dim", None) or (width // heads if width and isinstance(heads, int) else None)


def _logit_scale(config: Any) -> float:
    if getattr(config, "logit_scale", None):  # Cohere
        return float(config.logit_scale)
    if getattr(config, "logits_scaling", None):  # Granite
        return 1.0 / float(config.logits_scaling)
    return 1.0


def _embed_scale(embeddings: nn.Module) -> float:
    """What an embedding layer multiplies by itself; models that do so behind it, such as Granite, scale all inputs."""
    scale = getattr(embeddings, "scalar_embed_scale", None)  # Gemma, which keeps it as a buffer, too
    return float(getattr(embeddings, "embed_scale", 1.0) if scale is None else scale)
