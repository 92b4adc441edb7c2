"""Memory that it takes to talk to MiniMind-V about a picture: 27M and 109M parameters with CLIP ViT-B/32.

Random weights in real sizes; each model answers in a process of its own, with a prompt of 100 ids and 100 new ones.
On a CPU the peak of the whole process is counted, libraries included, and what these take alone is told beside it; on
a GPU what torch holds there. Its authors published 0.6 and 1.1 GB; both are printed side by side.

    python benchmarks/minimind_v_memory.py           # --dtype bf16: weights as stored
"""

from __future__ import annotations

import argparse

import torch
from common import machine, peak_memory, peak_memory_of

import minivlm  # noqa: F401
from minivlm.api import cast
from minivlm.config.loader import parse_model
from minivlm.models.base import DTYPES
from minivlm.models.build import build_model
from minivlm.types import IMAGE_TOKEN_ID, Batch

VOCABULARY, PROMPT, ANSWER = 6400, 100, 100
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
PUBLISHED = {"v1_small": 0.6, "v1": 1.1}
NOTHING = "nothing"


def answer(model_type: str, dtype: str) -> None:
    """Print the peak memory in MiB of one answer; of `nothing`, that of the libraries."""
    if model_type == NOTHING:
        import transformers.models.clip.modeling_clip
        import transformers.models.llama.modeling_llama  # noqa: F401

        print(peak_memory())
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = {"path": None, "config": CLIP}
    section = parse_model({"arch": "minimind_v", "model_type": model_type, "vision_encoder": encoder}, "benchmark")
    model = cast(build_model(section, VOCABULARY).eval(), DTYPES[dtype]).to(device)
    ids = torch.randint(3, VOCABULARY, (1, PROMPT))
    ids[:, 3 : 3 + model.connector.tokens_per_image] = IMAGE_TOKEN_ID
    pixels = {"image": torch.randn(1, 3, 224, 224, dtype=DTYPES[dtype])}
    batch = Batch(ids, torch.ones_like(ids), pixels=pixels, padding_side="left").to(device)
    new = model.generate(batch, max_new_tokens=ANSWER, eos_token_id=None, pad_token_id=0)
    assert new.shape == (1, ANSWER)
    print(peak_memory())


def main() -> None:
    """Measure each model in a process of its own and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="how weights are stored")
    parser.add_argument("--answer", choices=(*PUBLISHED, NOTHING), help="print the peak memory of one model")
    arguments = parser.parse_args()
    if arguments.answer:
        answer(arguments.answer, arguments.dtype)
        return
    measured = {
        name: peak_memory_of(__file__, "--dtype", arguments.dtype, "--answer", name) * 2**20 / 1e9
        for name in (NOTHING, *PUBLISHED)
    }
    libraries = measured.pop(NOTHING)
    where = "of the GPU" if torch.cuda.is_available() else f"of the process, {libraries:.2f} GB of it libraries"
    print(f"{machine()}; {arguments.dtype}; peak memory {where}")
    for name, own in measured.items():
        print(f"{name:<10}{own:6.2f} GB   published {PUBLISHED[name]:.1f} GB")


if __name__ == "__main__":
    main()
