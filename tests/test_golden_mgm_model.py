"""The visual half of the original Mini-Gemini, reproduced: pictures, both encoders, mining, projection, HD."""

from __future__ import annotations

import pytest
import torch
from golden_compared import Compared
from golden_mgm import BASES, HDS, compared, golden_tensors, pixels, training_pixels, visual
from torch import Tensor

from minivlm.checkpoints.foreign import Format, prefixed
from minivlm.checkpoints.mgm import VISUAL

__all__ = ["compared"]
PICTURES = golden_tensors("preprocess.safetensors")
WITHOUT_WHOLE = "feat.projected_grid2_noglobal"
RESIZED, SHARE = 2e-2, 1e-3
"""The README's tolerance for resized pictures, and the share of pixels that may be that far off."""


@pytest.mark.parametrize("mode", sorted({key.partition(".")[0] for key in PICTURES}))
def test_golden_mini_gemini_pictures(compared: Compared, mode: str) -> None:
    """High resolution from the picture, low resolution from that."""
    encoder, _ = visual(BASES[0])
    for key in (key for key in PICTURES if key.startswith(f"{mode}.")):
        name, kind = key.removeprefix(f"{mode}.").rsplit(".", 1)
        high = pixels(encoder, mode, name)
        ours = {"hr": high, "hr_stride4": high[:, ::4, ::4], "lr": encoder.low_pictures(high[None])[0, 0]}[kind]
        far = ((ours - PICTURES[key]).abs() > 1e-4).float().mean()
        assert far <= SHARE, key
        compared.close(ours, PICTURES[key], RESIZED)


@pytest.mark.parametrize("folder", BASES)
@torch.no_grad()
def test_golden_mini_gemini_features(compared: Compared, folder: str) -> None:
    """Low and high features, every stage, what is mined, the visual tokens."""
    encoder, connector = visual(folder)
    golden = golden_tensors(f"{folder}/expected.safetensors")
    rows = training_pixels(encoder, folder)
    features = encoder(rows)
    tokens, cells = features[..., : encoder.low_size], features[..., encoder.low_size :]
    compared.close(encoder.low_pictures(rows)[:, 0], golden.get("batch.images"))
    compared.close(tokens, golden.get("feat.lr"))
    for stage, output in enumerate(encoder.high.stage_outputs(rows[:1])):
        compared.close(output, golden.get(f"feat.hr_stage_{stage}"))
    compared.close(as_map(encoder.high(rows[:1])), golden.get("feat.hr.0"))
    compared.close(connector.mine(tokens, cells.unflatten(-1, (-1, encoder.high_size))), golden.get("feat.mined"))
    compared.close(connector(features), golden.get("feat.projected"))
    compared.close(connector(tokens), golden.get("feat.projected_lr_only"))


@pytest.mark.parametrize("folder", HDS)
@torch.no_grad()
def test_golden_mini_gemini_hd(compared: Compared, folder: str) -> None:
    """The whole picture in front of its crops, each with cells of its own."""
    encoder, connector = visual(folder)
    golden = golden_tensors(f"{folder}/expected.safetensors")
    rows = training_pixels(encoder, folder)[: len(golden["feat.projected"])]  # a shorter batch than that of the base
    seen = encoder.low_pictures(rows)
    compared.close(torch.cat([seen[0, 1:], seen[0, :1]]), golden.get("batch.images.0"))
    features = encoder(rows)
    whole = encoder.low.num_tokens
    tokens, cells = features[..., : encoder.low_size], features[..., encoder.low_size :]
    mined = connector.mine(tokens, cells.unflatten(-1, (-1, encoder.high_size)))
    for name, ours in (("lr", tokens), ("mined", mined)):
        compared.close(ours[:, :whole], golden.get(f"feat.{name}.global"))
        compared.close(ours[:, whole:].unflatten(1, (-1, whole)).flatten(0, 1), golden.get(f"feat.{name}.local"))
    compared.close(as_map(encoder.high(rows[:1]))[:, ::2, ::2], golden.get("feat.hr.0_stride2"))
    small = cells[0, :whole].reshape(*encoder.low.grid, *[round(encoder.cells**0.5)] * 2, encoder.high_size)
    map_of_whole = small.permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)
    compared.close(map_of_whole[:, ::2, ::2], golden.get("feat.hr_global.0_stride2"))
    compared.close(connector(features), golden.get("feat.projected"))


@pytest.mark.parametrize("folder", [f for f in HDS if WITHOUT_WHOLE in golden_tensors(f"{f}/expected.safetensors")])
@torch.no_grad()
def test_golden_mini_gemini_hd_without_the_whole_picture(compared: Compared, folder: str) -> None:
    encoder, connector = visual(folder, global_view=False)
    golden = golden_tensors(f"{folder}/expected.safetensors")[WITHOUT_WHOLE]
    compared.close(connector(encoder(training_pixels(encoder, folder)[: len(golden)])), golden)


@pytest.mark.parametrize("folder", BASES)
def test_golden_mini_gemini_names_go_back(compared: Compared, folder: str) -> None:
    """Our tensors by the original's names, those of layers that we do not keep aside."""
    encoder, connector = visual(folder)
    ours = {f"vision_encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    ours |= {f"connector.{name}": tensor for name, tensor in connector.state_dict().items()}
    form = Format("Mini-Gemini", "model.checkpoint", (), prefixed("model.", VISUAL), always=())
    back, lost = form.back(ours)
    assert not lost
    golden = golden_tensors(f"{folder}/model.safetensors")
    for name, tensor in back.items():
        compared.close(tensor, golden[name], 0)
    visual_names = {name for name in golden if name.startswith(("model.vision", "model.vlm_", "model.mm_"))}
    assert all(".encoder.layers." in name for name in visual_names - set(back))


def as_map(features: Tensor) -> Tensor:
    """[1, S * S, C] -> [C, S, S]."""
    side = round(features.shape[1] ** 0.5)
    return features[0].T.unflatten(1, (side, side))
