"""Matrices side by side in memory, which can be treated as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def stacked(parameters: Sequence[Tensor]) -> Tensor:
    """The parameters (rows, columns), all of one width, as one matrix.

    Those that are not side by side yet become views of it, if their memory is their own: an optimizer may know it.
    """
    matrix = joined(parameters)
    if matrix is None:
        matrix = torch.cat([parameter.detach() for parameter in parameters])
        if all(parameter.untyped_storage().nbytes() == parameter.nbytes for parameter in parameters):
            rows = torch.split(matrix, [len(parameter) for parameter in parameters])
            for parameter, place in zip(parameters, rows, strict=True):
                parameter.data = place
    return matrix


def joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """Matrices that lie one behind the other in one piece of memory, as one; None if they do not."""
    first = tensors[0]
    begin = end = first.data_ptr()
    for tensor in tensors:
        alike = tensor.is_contiguous() and tensor.shape[1] == first.shape[1] and tensor.dtype == first.dtype
        if not alike or tensor.data_ptr() != end:
            return None
        end += tensor.nbytes
    if first.storage_offset() * first.element_size() + end - begin > first.untyped_storage().nbytes():
        return None  # neighbours by chance, each in memory of its own
    shape = sum(len(tensor) for tensor in tensors), first.shape[1]
    return first.detach().as_strided(shape, (first.shape[1], 1))
