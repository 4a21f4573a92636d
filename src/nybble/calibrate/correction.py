"""What a quantized linear still lacks, as the low-rank product that makes up for most of it on its own inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from nybble.quant.correction import Correction

RANK = 64
# Of the corrections with which layers compute while those behind them are corrected: lora.r, unless it is set.
CARRIED_RANK = 16


def low_rank_correction(error: Tensor, moments: Tensor, rank: int = RANK) -> Correction:
    """U (out, R) and V (R, in), R = min(rank, out, in), with the least mean square of (error - U V) x.

    error: what the weight is to be less what it was quantized to, (out, in); moments: the mean of x x^T, (in, in). The
    first r columns of U and rows of V are the best product of rank r. U's columns are orthonormal, so V = U^T error:
    nothing is divided by what inputs hardly show. They are the eigenvectors of error moments error^T, found on its
    smaller side.
    """
    out_features, in_features = error.shape
    error = error.to(moments.device, torch.float32)
    rank = min(rank, out_features, in_features)
    if out_features <= in_features:
        outputs = error @ moments @ error.t()
        left = torch.linalg.eigh(outputs)[1][:, -rank:].flip(1)
    else:
        left = _left_vectors(error @ _root(moments), rank)
    return Correction(left, left.t() @ error)


def _left_vectors(matrix: Tensor, rank: int) -> Tensor:
    """Left singular vectors (out, rank) of a matrix with more rows than columns."""
    right = torch.linalg.eigh(matrix.t() @ matrix)[1][:, -rank:].flip(1)
    # Orthonormal again, in their order: the square of small singular values is rounded.
    vectors: Tensor = torch.linalg.qr(matrix @ right)[0]
    return vectors


def _root(moments: Tensor) -> Tensor:
    """A matrix whose product with its transpose is `moments`."""
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(moments)  # of damped ones it is there, and much faster
    if failed:
        values, vectors = torch.linalg.eigh(moments)
        root = vectors * values.clamp(min=0).sqrt()
    return root
