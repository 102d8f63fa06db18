"""Orthogonalizes many matrices at once by Newton-Schulz iteration, for Muon."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

# Coefficients of a quintic polynomial. They make its slope at zero as steep as possible under the condition that, after
# enough steps, all positive singular values end near one (between about 0.7 and 1.2): Jordan et al., "Muon: An
# optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon, 2024).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)

# Above this ratio of columns to rows, iterating on the Gram matrix takes fewer operations than iterating on the matrix
# itself. The Gram form saves 2 * steps - 2 products of 2 * rows^2 * columns operations each, and adds 3 * steps - 3
# products of 2 * rows^3 operations each. The ratio does not depend on the number of steps.
GRAM_FORM_COLUMNS = 1.5


def orthogonalize(matrices: Sequence[Tensor], *, steps: int = 3) -> list[Tensor]:
    """Matrices with the same shapes and singular vectors as `matrices`. Large singular values end near one.

    After three steps, singular values of at least 0.02 times the norm of the matrix are between 0.68 and 1.21. A
    smaller value x becomes at most 41 x / norm, so it may stay close to zero.

    Each step replaces a matrix X by P X, where P = a I + b G + c G^2 and G = X X^T. Matrices of equal shape are
    computed as a batch. On a GPU that supports bfloat16, X is stored in bfloat16, whatever the precision of the run.
    """
    wide = [matrix.mT if matrix.size(0) > matrix.size(1) else matrix for matrix in matrices]
    positions_of: dict[torch.Size, list[int]] = {}
    for position, matrix in enumerate(wide):
        positions_of.setdefault(matrix.shape, []).append(position)
    batches = {
        shape: _normalized(torch.stack([wide[k] for k in positions])) for shape, positions in positions_of.items()
    }
    long = [shape for shape in batches if shape[1] > GRAM_FORM_COLUMNS * shape[0]]
    for rows in {shape[0] for shape in long}:
        shapes = [shape for shape in long if shape[0] == rows]
        iterated = _iterate_on_grams([batches[shape] for shape in shapes], steps, matrices[0].dtype)
        batches.update(zip(shapes, iterated, strict=True))
    batches.update({shape: _iterate(batches[shape], steps) for shape in batches.keys() - long})
    results = list(matrices)
    for shape, positions in positions_of.items():
        for position, result in zip(positions, batches[shape].to(matrices[0].dtype).unbind(), strict=True):
            results[position] = result if wide[position] is matrices[position] else result.mT.contiguous()
    return results


def _normalized(batch: Tensor) -> Tensor:
    """(B, M, N) -> the same matrices scaled to norm 1. The iteration needs singular values of at most 1."""
    batch = batch.bfloat16() if batch.is_cuda and _gpu_has_bf16() else batch
    return batch / batch.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)


def _iterate(batch: Tensor, steps: int) -> Tensor:
    """Iterates on the matrices themselves: (B, M, N) with M <= N -> the same shape."""
    for _ in range(steps):
        batch = _polynomial(batch @ batch.mT) @ batch
    return batch


def _iterate_on_grams(batches: Sequence[Tensor], steps: int, dtype: torch.dtype) -> list[Tensor]:
    """Iterates on Gram matrices. `batches`: (B, M, N) each, all with the same M. The results have the same shapes.

    Each step replaces the Gram matrix G of a matrix X by P G P, and multiplies the product of all P so far by the next
    P. G and the product have type `dtype`. At the end, X is multiplied by the product.
    """
    gram = torch.cat([batch @ batch.mT for batch in batches]).to(dtype)
    product = factor = _polynomial(gram)
    for _ in range(steps - 1):
        gram = factor @ gram @ factor
        factor = _polynomial(gram)
        product = factor @ product
    products = product.to(batches[0].dtype).split([len(batch) for batch in batches])
    return [one @ batch for one, batch in zip(products, batches, strict=True)]


def _polynomial(gram: Tensor) -> Tensor:
    """P = a I + b G + c G^2 for each G in `gram` (B, M, M)."""
    a, b, c = COEFFICIENTS
    value = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    value.diagonal(dim1=1, dim2=2).add_(a)
    return value


@functools.cache
def _gpu_has_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)
