"""Settings of templates and processors (free of torch: they are the schema of the YAML nodes)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minivlm.lavis.configs import LavisEnvironment
from minivlm.schema import Part, setting


@dataclass
class TemplateConfig:
    """How a conversation becomes text, and which of it is supervised.

    One turn is ``user_prefix + text + user_suffix + assistant_prefix | answer_prefix + answer +
    assistant_suffix | turn_end``; what stands between the two bars is supervised, and a generation
    prompt ends at the first bar. Thoughts belong to the answer, but an empty block of them to the prompt.
    ``cut`` names the places at which the text is split before it is tokenised, since token ids depend on that.
    """

    system: str = setting("", help="system text")
    systems: list[str] = setting(factory=list, help="texts of which a training sample without a system text gets one")
    system_share: float = setting(0.0, ge=0, le=1, help="share of such samples that get one of `systems`")
    system_prefix: str = ""
    system_suffix: str = ""
    system_in_user: bool = setting(False, help="the system text stands inside the first user turn")
    user_prefix: str = ""
    user_suffix: str = ""
    user_text: str = setting("keep", choices=("keep", "drop"), help="drop: only the pictures of a user turn stay")
    assistant_prefix: str = ""
    answer_prefix: str = setting("", help="blank between the prefix and the answer, supervised with it")
    think_prefix: str = setting("", help="text in front of the thoughts that precede an answer")
    think_suffix: str = setting(
        "", help="text between thoughts and answer; if set, an answer without thoughts gets an empty block of them"
    )
    think_share: float = setting(1.0, ge=0, le=1, help="share of the training samples that keep empty blocks")
    think_open: bool = setting(
        False, help="a generation prompt ends behind think_prefix, not behind an empty block: the model thinks first"
    )
    assistant_suffix: str = setting("", help="end of an answer, supervised")
    turn_end: str = setting("", help="text behind an answer that is not supervised")
    turn_separator: str = setting("", help="text before every user turn but the first")
    image: str = setting("{image}", help="text around the visual tokens of a picture")
    image_separator: str = setting("\n", help="between pictures given without a place in the text and the text")
    image_number: str = setting(
        "", help="text before every picture of a conversation that has several; {number} counts them from 1"
    )
    placeholder: dict[str, int] = setting(
        factory=dict,
        help="what another project writes into a text for a picture, as {characters: how often}; read as <image>",
    )
    markers: str = setting(
        "keep",
        choices=("keep", "collapse_to_front"),
        help="collapse_to_front: the markers of a message stand at its front, each with a line break; where they are "
        "not as many as the pictures they become one",
    )
    cut: list[str] = setting(
        factory=lambda: ["image"], choices=("image", "answer"), help="where text is split before tokenisation"
    )
    bos: str = setting(
        "auto",
        choices=("auto", "always", "known", "never"),
        help="auto: as the tokenizer does by itself; known: where the tokenizer has a begin token",
    )
    eos: str = setting(
        "never", choices=("never", "always"), help="the tokenizer's end token behind the last answer, supervised"
    )
    supervise: str = setting("all", choices=("all", "last"), help="which answers are supervised")
    leading_assistant: str = setting(
        "error",
        choices=("error", "drop", "keep", "alone"),
        help="a first turn of the assistant; alone: kept, and it may be all there is, as a document is",
    )
    stop: list[str] = setting(factory=list, help="strings that end an answer")
    chat: dict[str, Any] = setting(factory=dict, help="keys that differ when the model is talked to")


RESIZES = ("squash", "shortest_edge", "pad", "crop")


@dataclass
class ImageConfig:
    """How a picture becomes a tensor; what is not set comes from the vision encoder."""

    size: int | None = setting(None, ge=1, help="side in pixels; default: the encoder's")
    resize: str | None = setting(
        None,
        choices=RESIZES,
        help="squash to a square; shortest edge and centre crop; pad to a square first; crop to a square first",
    )
    interpolation: str | None = setting(None, choices=("nearest", "bilinear", "bicubic", "lanczos"))
    mean: list[float] | None = None
    std: list[float] | None = None
    alpha: str = setting(
        "drop",
        choices=("drop", "weigh"),
        help="an alpha channel; drop: before all else; weigh: behind the resize, which weighs the colours by it, as "
        "MiniMind-V v1 trains",
    )
    random_crop: list[float] | None = setting(
        None,
        gt=0,
        le=1,
        help="[smallest, largest] share of a training picture's area: another part of it is taken every time",
    )

    def __post_init__(self) -> None:
        share = self.random_crop
        if share is not None and (len(share) != 2 or share[0] > share[1]):
            raise ValueError(f"random_crop: expected [smallest, largest] share of the area, got {share}")


@dataclass
class Blip2ImageConfig(ImageConfig):
    """The pictures of BLIP-2 and MiniGPT-4, whatever the encoder says: squashed, CLIP's mean and deviation."""

    resize: str | None = setting("squash", choices=RESIZES)
    interpolation: str | None = setting("bicubic", choices=("nearest", "bilinear", "bicubic", "lanczos"))
    mean: list[float] | None = setting(factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    std: list[float] | None = setting(factory=lambda: [0.26862954, 0.26130258, 0.27577711])


@dataclass
class BlipCaptionConfig:
    """How the captions of BLIP and MiniGPT-4's first stage are cleaned."""

    prompt: str = setting("", help="text in front of every caption")
    max_words: int = setting(50, ge=1, help="longer captions are cut")


@dataclass(kw_only=True)
class LavisImageConfig(LavisEnvironment):
    """A picture processor of LAVIS, run by LAVIS."""

    processor: str = setting(help="LAVIS's name, e.g. blip_image_eval, blip2_image_train, clip_image_eval")
    options: dict[str, Any] = setting(
        factory=dict, help="settings of that processor; default: image_size, mean and std of the encoder"
    )


@dataclass
class ProcessorConfig:
    """How a sample becomes ids, labels and pixels."""

    image: Part = setting(factory=lambda: {"name": "image"}, part="processor")
    max_length: int = setting(2048, ge=1, help="longest sequence in tokens, visual tokens included")
    on_overflow: str = setting(
        "cut_text",
        choices=("cut_text", "cut_right", "error"),
        help="a longer training sample: cut behind the last picture; cut at max_length wherever that is, as LLaVA and "
        "Imp do, so that part of a picture or all answers may be lost; or refuse",
    )
    max_answer_tokens: int | None = setting(None, ge=1, help="cut what follows the first prompt to this length")
    prompts: list[str] = setting(
        factory=list, help="user texts from which one is drawn for a picture that has only a caption"
    )
    text: Part | None = setting(
        None, part="processor", help="text processor that `load_model_and_preprocess` returns; default: none is needed"
    )
