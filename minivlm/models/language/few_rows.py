"""Linear layers of a few rows on a CPU, as they come when one token follows another.

MKL multiplies a few rows with a matrix of 512 x 1408 at half the speed at which it multiplies the matrix with the same
rows as columns (AMD EPYC, one to four rows). A single column is as slow as a row, so it gets a copy beside it. Sums are
taken in another order, which the last digits show. `benchmarks/minimind_v_generation.py` times whole answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

MOST_ROWS = 6
"""With more rows both ways are equally fast."""
LEAST_WEIGHTS = 2**17
"""Of smaller layers the call itself takes longer than the product."""


class FewRowsLinear(nn.Linear):
    """The same layer, which multiplies few rows as columns."""

    def forward(self, input: Tensor) -> Tensor:
        """Rows [..., in] -> [..., out]."""
        count = input.numel() // self.in_features
        if not 0 < count <= MOST_ROWS:
            return super().forward(input)
        rows = input.reshape(count, -1)
        columns = torch.cat([rows, rows] if count == 1 else [rows]).t()  # each lies in one piece, or nothing is gained
        product = torch.mm(self.weight, columns)[:, :count]
        output = product.t().contiguous().view(*input.shape[:-1], self.out_features)
        return output if self.bias is None else output.add_(self.bias)


@contextmanager
def fast_few_rows(model: nn.Module) -> Iterator[None]:
    """While it lasts, the large fp32 linear layers of a model on a CPU with MKL multiply few rows as columns."""
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and _is_slow(layer.weight)]
    try:
        for layer in layers:
            layer.__class__ = FewRowsLinear
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Linear


def _is_slow(weight: Tensor) -> bool:
    is_mkl = torch.backends.mkl.is_available() and weight.device.type == "cpu" and weight.dtype == torch.float32
    return is_mkl and weight.numel() >= LEAST_WEIGHTS
