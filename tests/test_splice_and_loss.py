"""The splice and the loss over supervised positions, against plain formulations of both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from minivlm.models.losses import supervised_loss
from minivlm.models.splice import splice
from minivlm.types import IGNORE_INDEX, IMAGE_TOKEN_ID

IMG = IMAGE_TOKEN_ID


def test_visual_tokens_stand_in_their_places_in_order() -> None:
    ids = torch.tensor([[5, IMG, IMG, 6, IMG, IMG], [7, 8, 9, 9, 9, 9], [IMG, IMG, 4, 4, 4, 4]])
    embeds = torch.randn(3, 6, 4)
    visual = torch.randn(3, 2, 4)
    result = splice(embeds, ids, visual)
    expected, pictures = embeds.clone(), iter(visual)
    for row, columns in ((0, (1, 2)), (0, (4, 5)), (2, (0, 1))):
        for column, token in zip(columns, next(pictures)):
            expected[row, column] = token
    assert torch.equal(result, expected)


def test_pictures_that_were_cut_give_their_first_tokens() -> None:
    """Of the second picture one token is left, of the third none; its gradients are zero, not missing."""
    ids = torch.tensor([[IMG, IMG, IMG, 6], [7, 8, 9, 9]])
    embeds, visual = torch.zeros(2, 4, 5), torch.randn(3, 2, 5, requires_grad=True)
    result = splice(embeds, ids, visual, [2, 1, 0])
    assert torch.equal(result[0, :3], visual.flatten(0, 1)[:3]) and not result[0, 3:].any() and not result[1].any()
    result.sum().backward()
    assert visual.grad is not None
    assert visual.grad.sum(-1).tolist() == [[5, 5], [5, 0], [0, 0]]
    with pytest.raises(ValueError, match="3 image positions in the batch, but 4 visual tokens"):
        splice(embeds, ids, visual, [2, 2, 0])
    gone = splice(embeds, torch.full_like(ids, 7), visual, [0, 0, 0])
    visual.grad = None
    gone.sum().backward()
    assert visual.grad is not None and not visual.grad.any()


def test_gradients_of_the_splice() -> None:
    ids = torch.tensor([[1, IMG, 2], [IMG, 3, 3]])
    embeds = torch.randn(2, 3, 4, requires_grad=True)
    visual = torch.randn(2, 1, 4, requires_grad=True)
    weight = torch.randn(2, 3, 4)
    (splice(embeds, ids, visual) * weight).sum().backward()
    assert embeds.grad is not None and visual.grad is not None
    assert torch.equal(visual.grad[:, 0], torch.stack([weight[0, 1], weight[1, 0]]))
    assert torch.equal(embeds.grad, weight * (ids != IMG).unsqueeze(-1))


def test_the_splice_takes_the_type_of_the_embeddings() -> None:
    ids = torch.tensor([[IMG, 1]])
    result = splice(torch.zeros(1, 2, 3, dtype=torch.bfloat16), ids, torch.full((1, 1, 3), 0.5))
    assert result.dtype == torch.bfloat16 and result[0, 0].tolist() == [0.5] * 3


@pytest.mark.parametrize(("positions", "pictures"), [(2, 1), (1, 2), (0, 1), (3, 0)])
def test_counts_that_differ_are_refused(positions: int, pictures: int) -> None:
    ids = torch.full((1, 4), 7)
    ids[0, :positions] = IMG
    with pytest.raises(ValueError, match=f"{positions} image positions in the batch, but {pictures} visual tokens"):
        splice(torch.zeros(1, 4, 3), ids, torch.zeros(pictures, 1, 3))


SIZE, VOCABULARY = 12, 31


def reference(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
    """Full logits, shifted, plain cross entropy."""
    logits = head(hidden)[:, :-1].reshape(-1, VOCABULARY)
    return cross_entropy(logits, labels[:, 1:].reshape(-1), ignore_index=IGNORE_INDEX, reduction="sum")


def some_labels(supervised: float) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, VOCABULARY, (4, 17), generator=generator)
    labels[torch.rand(4, 17, generator=generator) >= supervised] = IGNORE_INDEX
    return labels


@pytest.mark.parametrize("chunk", [1, 5, 16, 4096])
@pytest.mark.parametrize("supervised", [1.0, 0.3])
def test_loss_and_gradients_equal_full_logits(chunk: int, supervised: float) -> None:
    torch.manual_seed(0)
    labels = some_labels(supervised)
    head = nn.Linear(SIZE, VOCABULARY)
    one = torch.randn(4, 17, SIZE, requires_grad=True)
    two = one.detach().clone().requires_grad_()

    loss, count = supervised_loss(one, labels, head, chunk)
    loss.div(count).backward()
    gradients = [one.grad, head.weight.grad, head.bias.grad]
    head.zero_grad(set_to_none=True)
    expected = reference(two, labels, head)
    expected.div(count).backward()

    assert count.item() == (labels[:, 1:] != IGNORE_INDEX).sum().item() > 0
    assert loss.dtype == torch.float32 and loss.dim() == 0
    assert loss.item() / count.item() == pytest.approx(expected.item() / count.item(), abs=1e-6)
    for mine, other in zip(gradients, [two.grad, head.weight.grad, head.bias.grad]):
        assert mine is not None and other is not None
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 4096])
def test_without_any_target_the_loss_is_a_differentiable_zero(chunk: int) -> None:
    labels = torch.full((2, 5), IGNORE_INDEX)
    labels[:, 0] = 3  # the first position is never a target
    head = nn.Linear(SIZE, VOCABULARY)
    hidden = torch.randn(2, 5, SIZE, requires_grad=True)
    loss, count = supervised_loss(hidden, labels, head, chunk)
    assert (loss.item(), count.item()) == (0.0, 0)
    loss.backward()
    for tensor in (hidden, head.weight, head.bias):
        assert tensor.grad is not None and not tensor.grad.any()


def test_the_head_sees_supervised_positions_only_and_never_more_than_a_chunk() -> None:
    labels = some_labels(0.4)
    head, seen = nn.Linear(SIZE, VOCABULARY), []

    def watched(states: Tensor) -> Tensor:
        seen.append(len(states))
        return head(states)

    hidden = torch.randn(4, 17, SIZE)
    _, count = supervised_loss(hidden, labels, watched)
    assert seen == [count.item()] and count.item() < labels.numel() / 2
    seen.clear()
    supervised_loss(hidden, labels, watched, chunk=4)
    assert max(seen) == 4 and sum(seen) == count.item()


def test_what_is_not_supervised_does_not_matter() -> None:
    labels = torch.full((1, 6), IGNORE_INDEX)
    labels[0, 3] = 9
    head = nn.Linear(SIZE, VOCABULARY)
    hidden = torch.randn(1, 6, SIZE)
    loss, _ = supervised_loss(hidden, labels, head)
    changed = torch.full_like(hidden, float("nan"))
    changed[0, 2] = hidden[0, 2]  # position 2 tells token 3
    assert supervised_loss(changed, labels, head)[0].item() == loss.item()
    assert loss.item() == pytest.approx(-head(hidden[0, 2]).log_softmax(-1)[9].item(), rel=1e-6)


@pytest.mark.parametrize("chunk", [2, 4096])
def test_half_precision_is_summed_in_full(chunk: int) -> None:
    """The logits are exact in bf16, in whatever order and shape a processor multiplies: eighths below 32."""
    generator = torch.Generator().manual_seed(5)
    labels = some_labels(1.0)
    head = nn.Linear(SIZE, VOCABULARY).bfloat16()
    for parameter in head.parameters():
        parameter.data = torch.randint(-8, 9, parameter.shape, generator=generator).bfloat16() / 8
    hidden = torch.randint(-1, 2, (4, 17, SIZE), generator=generator).bfloat16().requires_grad_()
    loss, _ = supervised_loss(hidden, labels, head, chunk)
    assert loss.dtype == torch.float32
    logits = head(hidden)[:, :-1].float().reshape(-1, VOCABULARY)
    assert loss.item() == pytest.approx(
        cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum").item(), rel=1e-5
    )
    loss.backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
