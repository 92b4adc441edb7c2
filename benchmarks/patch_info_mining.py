"""Patch info mining that projects no cells, against the formula of the paper as it stands.

Forward, and forward with backward, in fp32, batch 1, at the sizes of Mini-Gemini (336 / 768 pixels) and of a share of
the tokens of Mini-Gemini-HD, whose keys, values and norms alone take 6 GB in the plain form. Encoders are frozen, as
in its recipes. Prints the largest difference of the outputs, and the ratios of time and of peak memory (beyond
weights and features).

    python benchmarks/patch_info_mining.py
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import torch
from common import machine, peak_memory, peak_memory_of, time_side_by_side
from torch import Tensor

import minivlm  # noqa: F401
from minivlm.models.connectors.patch_info_mining import PatchInfoMining
from minivlm.schema import ModelPart

LOW, HIGH, CELLS = 1024, 2880, 64
TOKENS = {"base": 576, "hd": 2880}


def plain(mining: PatchInfoMining, tokens: Tensor, cells: Tensor) -> Tensor:
    """The formula: every cell normalised twice and projected to a key and a value."""
    query, key, value = mining.query(tokens), mining.key(cells), mining.value(cells)
    logits = (query[..., None, :] @ (key / LOW**0.5).transpose(-1, -2)).nan_to_num()
    return (logits.softmax(-1) @ value)[..., 0, :]


def own(mining: PatchInfoMining, tokens: Tensor, cells: Tensor) -> Tensor:
    """That of minivlm."""
    return mining.mine(tokens, cells)


VARIANTS = {"plain": plain, "own": own}


def build(tokens: int, device: str) -> tuple[PatchInfoMining, Tensor, Tensor]:
    """The connector at its real size, and features as a dual encoder gives them."""
    from minivlm.models.configs import MLPConnectorConfig, PatchInfoMiningConfig

    torch.manual_seed(0)
    encoder: Any = SimpleNamespace(low_size=LOW, high_size=HIGH, grid=(tokens, 1), num_tokens=tokens)
    config = PatchInfoMiningConfig(projector=ModelPart("mlp", MLPConnectorConfig(hidden_size=1)))
    with torch.device(device):
        mining = PatchInfoMining(config, encoder, 1)
        features = torch.empty(1, tokens, LOW + CELLS * HIGH)
    features.normal_()
    return mining, features[..., :LOW], features[..., LOW:].unflatten(-1, (CELLS, HIGH))


def step(run: Any, mining: PatchInfoMining, tokens: Tensor, cells: Tensor, backward: bool) -> Tensor:
    """The output, and with ``backward`` the gradients of all weights."""
    with torch.set_grad_enabled(backward):
        output = run(mining, tokens, cells)
        if backward:
            output.square().mean().backward()
    return output.detach()


def main() -> None:
    """Compare, time side by side, measure the memory of each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hd-tokens", type=int, default=720, help="of 2880, which take 30 GB in the plain form")
    parser.add_argument("--memory", choices=tuple(VARIANTS), help="print the peak memory of one variant")
    parser.add_argument("--tokens", type=int, default=TOKENS["base"], help="with --memory")
    parser.add_argument("--backward", action="store_true", help="with --memory")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if given.memory:
        parts = build(given.tokens, device)
        before = peak_memory()
        step(VARIANTS[given.memory], *parts, given.backward)
        print(peak_memory() - before)
        return
    print(machine())
    for name, tokens in (("base", TOKENS["base"]), ("HD", given.hd_tokens)):
        parts = build(tokens, device)
        share = f" (of {TOKENS['hd']})" if name == "HD" and tokens != TOKENS["hd"] else ""
        outputs = [step(run, *parts, False) for run in VARIANTS.values()]
        difference = float((outputs[0] - outputs[1]).abs().max())
        print(f"{name}: {tokens} tokens{share}, {CELLS} cells of {HIGH} channels; largest difference {difference:.1e}")
        assert difference < 1e-4, "the two variants must compute the same"
        for backward in (False, True):
            report(parts, backward, given.rounds)


def report(parts: tuple[PatchInfoMining, Tensor, Tensor], backward: bool, rounds: int) -> None:
    """One line for each variant, and the ratios."""
    seconds = time_side_by_side(
        {name: lambda run=run: step(run, *parts, backward) for name, run in VARIANTS.items()}, rounds, warm_up=1
    )
    options = ["--tokens", str(parts[1].shape[1]), *["--backward"] * backward]
    memory = {name: peak_memory_of(__file__, "--memory", name, *options) for name in VARIANTS}
    print("  forward and backward" if backward else "  forward")
    for name in VARIANTS:
        print(f"    {name:<6} {seconds[name] * 1e3:9.1f} ms {memory[name]:8.0f} MiB")
    ratios = (figures["plain"] / figures["own"] for figures in (seconds, memory))
    print("    ratio  {:9.1f} x  {:8.1f} x".format(*ratios))


if __name__ == "__main__":
    main()
