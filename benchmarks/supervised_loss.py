"""A training step whose output head runs on supervised positions only, against one with full logits.

A small language model with a 16k vocabulary, 196 visual tokens and 88 of text, 53 of them supervised: the
shape of a picture-and-answer sample. Prints the ratio of time and of peak memory (beyond what the model
and its optimiser take before the first step).

    python benchmarks/supervised_loss.py
"""

from __future__ import annotations

import argparse

import torch
from common import machine, peak_memory, peak_memory_of, time_side_by_side
from torch.nn.functional import cross_entropy

import minivlm  # noqa: F401
from minivlm.models.configs import HFLanguageModelConfig
from minivlm.models.language.hf import HFLanguageModel
from minivlm.models.losses import supervised_loss

VISUAL, TEXT, SUPERVISED, BATCH = 196, 88, 53, 8


def build(vocabulary: int, device: str) -> tuple[HFLanguageModel, torch.Tensor, torch.Tensor]:
    """Model, input embeddings [B, L, D] and labels [B, L]."""
    torch.manual_seed(0)
    config = {
        "model_type": "llama",
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "tie_word_embeddings": True,
    }
    model = HFLanguageModel(HFLanguageModelConfig(config=config), vocabulary).to(device)
    length = VISUAL + TEXT
    labels = torch.full((BATCH, length), -100, device=device)
    labels[:, -SUPERVISED:] = torch.randint(0, vocabulary, (BATCH, SUPERVISED), device=device)
    return model, torch.randn(BATCH, length, model.hidden_size, device=device), labels


def step(model: HFLanguageModel, embeds: torch.Tensor, labels: torch.Tensor, full: bool) -> float:
    """Forward and backward pass; returns the loss."""
    positions = torch.arange(embeds.shape[1], device=embeds.device).expand(len(embeds), -1)
    hidden = model(embeds, None, positions)
    if full:
        logits = model.head(hidden).float()
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    else:
        loss_sum, count = supervised_loss(hidden, labels, model.head)
        loss = loss_sum / count
    loss.backward()
    return float(loss.detach())


def main() -> None:
    """Time both variants side by side; measure the memory of each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--memory", choices=("full", "supervised"), help="print the peak memory of one variant")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, embeds, labels = build(arguments.vocabulary, device)
    if arguments.memory:
        before = peak_memory()
        step(model, embeds, labels, arguments.memory == "full")
        print(peak_memory() - before)
        return
    loss_full, loss_own = (step(model, embeds, labels, full) for full in (True, False))
    assert abs(loss_full - loss_own) < 1e-4, "the two variants must compute the same loss"
    seconds = time_side_by_side(
        {name: lambda full=full: step(model, embeds, labels, full) for name, full in (("full", True), ("own", False))},
        arguments.rounds,
    )
    memory = {
        name: peak_memory_of(__file__, "--memory", name, "--vocabulary", str(arguments.vocabulary))
        for name in ("full", "supervised")
    }
    tokens = BATCH * (VISUAL + TEXT)
    print(f"{machine()}; vocabulary {arguments.vocabulary}, {tokens} positions, {BATCH * SUPERVISED} supervised")
    print(f"full logits       {seconds['full'] * 1e3:8.1f} ms  {memory['full']:8.0f} MiB")
    print(f"supervised only   {seconds['own'] * 1e3:8.1f} ms  {memory['supervised']:8.0f} MiB")
    print(
        f"ratio             {seconds['full'] / seconds['own']:8.2f} x   {memory['full'] / memory['supervised']:8.2f} x"
    )


if __name__ == "__main__":
    main()
