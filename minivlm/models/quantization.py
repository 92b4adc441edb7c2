"""A language model in four or eight bits, by bitsandbytes: nf4 (Dettmers et al. 2023), int8 (Dettmers et al. 2022).

A folder of transformers is quantised while it is read. Weights from anywhere else first fill layers that hold them as
they are; :func:`quantise` follows.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch

from minivlm.models.base import DTYPES, ModelError, PartModule, on_meta_device

log = logging.getLogger(__name__)
_KEY = "model.language_model.quantization"


def hush_bitsandbytes() -> None:
    """Silence what no user can act on; call it before the first import, which peft's and transformers' bring.

    bitsandbytes computes in fp16 and says so in every call of every layer where the model has another type; on a CPU it
    looks for a kernel on the hub and says that it does without.
    """
    for module in ("autograd._functions", "backends.cpu.ops"):
        logging.getLogger(f"bitsandbytes.{module}").setLevel(logging.ERROR)


def quantization_arguments(kind: str, dtype: str | None) -> dict[str, Any]:
    """What transformers must be told: ``quantization_config``, and a ``dtype`` for nf4; nothing where there is none.

    Raises :class:`ModelError` without bitsandbytes.
    """
    if on_meta_device():  # where nothing is loaded; `minivlm.runners.memory` counts what it would take
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f'{_KEY}: {kind} needs bitsandbytes; run pip install "minivlm[quant]", or set it to null: '
            "half precision takes twice the memory"
        )
    if torch.backends.mps.is_available() and not torch.cuda.is_available():
        log.warning("%s: bitsandbytes does not run on MPS; the language model stays in half precision", _KEY)
        return {}
    from transformers import BitsAndBytesConfig

    hush_bitsandbytes()
    if kind == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    compute = DTYPES[dtype or "bf16"]
    return {
        "dtype": compute,  # of embeddings, norms and head, which are not quantised
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
        ),
    }


def replace_linear(model: Any, settings: Any) -> None:
    """Put layers of bitsandbytes, with the same weights, where transformers puts them; :func:`quantise` does the rest.

    ``settings`` is the BitsAndBytesConfig. Raises :class:`ModelError` for the transposed layers of GPT-2.
    """
    from transformers.integrations import replace_with_bnb_linear
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer

    plain = dict(model.named_modules())
    if any(isinstance(layer, Conv1D) for layer in plain.values()):
        raise ModelError(f"{_KEY}: {type(model).__name__} can only be quantised from a folder of transformers (path)")
    kept = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    replace_with_bnb_linear(model, kept, settings)  # its new layers are on the meta device
    for name, layer in model.named_modules():
        if layer is not plain[name]:
            layer.weight = type(layer.weight)(plain[name].weight.data, requires_grad=False, **vars(layer.weight))
            layer.bias = plain[name].bias


def quantise(language_model: PartModule) -> None:
    """Quantise a language model that has been filled, on the GPU if there is one; a quantised one stays as it is.

    Its weights cannot be saved, so it needs a source that gives them again. Raises :class:`ModelError` without.
    """
    if not language_model.quantization:
        return
    if language_model.source is None:
        raise ModelError(
            f"{_KEY}: only trained weights that can be read again are quantised: name them as path or weights, or give "
            "a checkpoint that holds all of the language model without adapters, as `minivlm merge` writes it; or set "
            "quantization: null"
        )
    language_model.to("cuda" if torch.cuda.is_available() else "cpu")  # where bitsandbytes quantises
    layer: Any
    for layer in language_model.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False) and (layer.out_features % 32 or layer.in_features % 64):
            layer.support_avx512bf16_for_cpu = False  # which takes whole blocks only
