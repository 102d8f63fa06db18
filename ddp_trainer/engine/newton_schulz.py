"""Orthogonalizes many matrices at once by Newton-Schulz iteration, for Muon."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

# Coefficients of a quintic polynomial. They make its slope at zero as steep as possible under the condition that all
# singular values end up near one: Jordan et al., "Muon: An optimizer for hidden layers in neural networks"
# (kellerjordan.github.io/posts/muon, 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)

# Above this ratio of columns to rows, iterating on the Gram matrix takes fewer operations than iterating on the matrix
# itself. It saves 2 * steps - 2 products of 2 * rows^2 * columns operations each, and adds 3 * steps - 3 products of
# 2 * rows^3 operations each. The ratio does not depend on the number of steps.
GRAM_FORM_COLUMNS = 1.5


def orthogonalize(matrices: Sequence[Tensor], *, steps: int = 3) -> list[Tensor]:
    """Matrices with the same shapes and singular vectors as `matrices`, and singular values close to one.

    Each step replaces a matrix X by P X, where P = a I + b G + c G^2 and G = X X^T. Matrices of equal shape are
    computed as a batch. On a GPU that supports bfloat16, X is stored in bfloat16, whatever the precision of the run.
    """
    wide = [matrix.mT if matrix.size(0) > matrix.size(1) else matrix for matrix in matrices]
    places_of: dict[torch.Size, list[int]] = {}
    for place, matrix in enumerate(wide):
        places_of.setdefault(matrix.shape, []).append(place)
    banks = {shape: _normalized(torch.stack([wide[k] for k in places])) for shape, places in places_of.items()}
    long = [shape for shape in banks if shape[1] > GRAM_FORM_COLUMNS * shape[0]]
    for rows in {shape[0] for shape in long}:
        shapes = [shape for shape in long if shape[0] == rows]
        banks |= zip(
            shapes, _iterate_on_grams([banks[shape] for shape in shapes], steps, matrices[0].dtype), strict=True
        )
    banks |= {shape: _iterate(banks[shape], steps) for shape in banks.keys() - long}
    results = list(matrices)
    for shape, places in places_of.items():
        for place, result in zip(places, banks[shape].to(matrices[0].dtype).unbind(), strict=True):
            results[place] = result if wide[place] is matrices[place] else result.mT.contiguous()
    return results


def _normalized(bank: Tensor) -> Tensor:
    """(B, M, N) -> the same matrices scaled to norm 1. The iteration needs singular values of at most 1."""
    bank = bank.bfloat16() if bank.is_cuda and _gpu_has_bf16() else bank
    return bank / bank.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)


def _iterate(bank: Tensor, steps: int) -> Tensor:
    """Iterates on the matrices themselves: (B, M, N) with M <= N -> the same shape."""
    for _ in range(steps):
        bank = _polynomial(bank @ bank.mT) @ bank
    return bank


def _iterate_on_grams(banks: Sequence[Tensor], steps: int, dtype: torch.dtype) -> list[Tensor]:
    """Iterates on Gram matrices. `banks`: (B, M, N) each, all with the same M. The results have the same shapes.

    Each step replaces G by P G P and multiplies the product of all P so far by the next P. G and the product have type
    `dtype`. At the end, each X is multiplied by its product.
    """
    gram = torch.cat([bank @ bank.mT for bank in banks]).to(dtype)
    product = factor = _polynomial(gram)
    for _ in range(steps - 1):
        gram = factor @ gram @ factor
        factor = _polynomial(gram)
        product = factor @ product
    products = product.to(banks[0].dtype).split([len(bank) for bank in banks])
    return [one @ bank for one, bank in zip(products, banks, strict=True)]


def _polynomial(gram: Tensor) -> Tensor:
    """P = a I + b G + c G^2 for each G in `gram` (B, M, M)."""
    a, b, c = COEFFICIENTS
    value = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    value.diagonal(dim1=1, dim2=2).add_(a)
    return value


@functools.cache
def _gpu_has_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)
