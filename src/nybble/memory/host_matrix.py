"""An embedding and a head whose matrices stay in host memory while the device computes with them.

Legend: tokens; in = in_features, out = out_features; a head's out is the vocabulary.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nybble.memory.passage import Passage, passing
from nybble.memory.pinned import pinned
from nybble.memory.transfer import SideStream
from nybble.ops.gather import gather_rows
from nybble.quant.linear import DenseEmbedding, DenseLinear

_CHUNK_BYTES = 64 * 2**20  # of a head, where it is multiplied as any other linear is


def keep_on_host(parameter: Tensor) -> None:
    """Have `parameter` lie in page-locked host memory of its exact size, for good.

    Raises MemoryError if the system does not lock so much. Without a GPU it stays where it is.
    """
    held = parameter.detach()
    if held.device.type == "cpu" and (held.is_pinned() or not torch.cuda.is_available()):
        return
    memory = pinned(held.nbytes)
    parameter.data = memory.view(held.dtype).view(held.shape).copy_(held)


class HostEmbedding(DenseEmbedding):
    """A frozen embedding whose rows are read from host memory, by the device whose indices ask for them."""

    @classmethod
    def taking(cls, embedding: DenseEmbedding) -> HostEmbedding:
        """Take over the parameter of `embedding`, the same object, which from now on lies in host memory."""
        rows, hidden, padding = embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx
        settings: dict[str, Any] = {"compute_dtype": embedding.compute_dtype, "scale": embedding.scale}
        module = cls(rows, hidden, padding, **settings, device="meta")
        module.weight = embedding.weight
        keep_on_host(module.weight)
        return module

    def look_up(self, input: Tensor) -> Tensor:
        rows: Tensor = gather_rows(self.weight.detach(), input.flatten())
        return rows.view(*input.shape, -1)


class HostLinear(DenseLinear):
    """A frozen linear whose weight lies in host memory and passes through the device in chunks of rows."""

    side: SideStream

    @classmethod
    def taking(cls, linear: DenseLinear, device: torch.device) -> HostLinear:
        """Take over the parameters of `linear`, the same objects: the weight to host memory, the bias to `device`."""
        module = cls.from_weight(linear.weight, linear.bias, linear.compute_dtype, fan_in_fan_out=linear.fan_in_fan_out)
        keep_on_host(module.weight)
        if module.bias is not None:
            module.bias.data = module.bias.detach().to(device)
        module.side = SideStream(device)
        return module

    @property
    def bytes_a_row(self) -> int:
        """Of the device, for each row that passes: in two slots, and cast where it is held in another dtype."""
        cast = 0 if self.weight.dtype == self.compute_dtype else self.compute_dtype.itemsize
        return self.in_features * (2 * self.weight.element_size() + cast)

    def passing(self, rows_a_chunk: int, *, passes: int = 1) -> contextlib.AbstractContextManager[Passage]:
        """The weight on its way through the device, from now on; see `Passage`."""
        return passing(self.weight.detach(), self.side, rows_a_chunk, passes=passes)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = _HostProduct.apply(self, x.to(self.compute_dtype))  # type: ignore[no-untyped-call]
        return output


class _HostProduct(torch.autograd.Function):
    """x (..., in) times W^T plus the bias, (..., out); the gradient passes through W as well."""

    @staticmethod
    def forward(ctx: Any, linear: HostLinear, x: Tensor) -> Tensor:
        ctx.linear = linear
        output = x.new_empty(*x.shape[:-1], linear.out_features)
        with linear.passing(_rows_a_chunk(linear)) as passage:
            for first, weight in passage.chunks():
                words = slice(first, first + len(weight))
                bias = None if linear.bias is None else linear.bias[words].to(x.dtype)
                output[..., words] = nn.functional.linear(x, weight.to(x.dtype), bias)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[None, Tensor]:
        linear: HostLinear = ctx.linear
        d_x = d_output.new_zeros(*d_output.shape[:-1], linear.in_features)
        with linear.passing(_rows_a_chunk(linear)) as passage:
            for first, weight in passage.chunks():
                d_x += d_output[..., first : first + len(weight)] @ weight.to(d_output.dtype)
        return None, d_x


def _rows_a_chunk(linear: HostLinear) -> int:
    return max(1, _CHUNK_BYTES // (linear.in_features * linear.weight.element_size()))
