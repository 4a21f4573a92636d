"""Linear layers and embeddings whose storage dtype and compute dtype are two things.

One rule: a linear casts x to its compute dtype, materializes its weight in it, multiplies, and returns that dtype.
Legend: in = in_features, out = out_features, numel = out * in.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from nybble.ops.linear import frozen_linear
from nybble.quant.format import NF4Spec, codes_shape
from nybble.quant.weight import NF4Weight


class DenseLinear(nn.Linear):
    """A linear with its weight (out, in) in a storage dtype of its own.

    `fan_in_fan_out`: the checkpoint holds the weight as (in, out), as GPT-2's Conv1D does; here it is (out, in) always.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        compute_dtype: torch.dtype,
        fan_in_fan_out: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.compute_dtype = compute_dtype
        self.fan_in_fan_out = fan_in_fan_out

    @classmethod
    def from_linear(cls, linear: nn.Linear, compute_dtype: torch.dtype) -> DenseLinear:
        """Take over the parameters of `linear`, the same objects, so that tied weights stay tied."""
        return cls.from_weight(linear.weight, linear.bias, compute_dtype)

    @classmethod
    def from_weight(
        cls, weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype, *, fan_in_fan_out: bool = False
    ) -> Self:
        """Hold `weight` (out, in) and `bias` (out,) without a copy; plain tensors become frozen parameters."""
        out_features, in_features = weight.shape
        module = cls(
            in_features, out_features, False, compute_dtype=compute_dtype, fan_in_fan_out=fan_in_fan_out, device="meta"
        )
        module.weight = _as_parameter(weight)
        module.register_parameter("bias", None if bias is None else _as_parameter(bias))
        return module

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.compute_dtype)
        bias = _cast(self.bias, self.compute_dtype)
        if self.weight.requires_grad or self.weight.dtype == self.compute_dtype:
            return nn.functional.linear(x, self.weight.to(self.compute_dtype), bias)
        return frozen_linear(x, bias, self.materialize, *self.stored())

    def stored(self) -> tuple[Tensor, ...]:
        """What holds the weight, for `materialize`."""
        return (self.weight,)

    def materialize(self, weight: Tensor) -> Tensor:
        """The weight (out, in) in the compute dtype."""
        return weight.to(self.compute_dtype)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) in `dtype`."""
        return self.weight.detach().to(dtype)


class NF4Linear(nn.Module):
    """A frozen linear over an NF4 weight, held as plain uint8 parameters that no cast can change.

    codes (out, in / 2), or (ceil(numel / 2),) for odd `in`. With double quantization absmax (blocks,) are 8-bit codes,
    group_absmax (groups, 4) and offset (1, 4) the bytes of fp32; without it absmax (blocks, 4) are the bytes of fp32.
    Weight (out, in) and bias (out,) are held without a copy; a plain bias becomes a frozen parameter.
    """

    codes: nn.Parameter
    absmax: nn.Parameter
    group_absmax: nn.Parameter | None
    offset: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, weight: NF4Weight, bias: Tensor | None, compute_dtype: torch.dtype, *, fan_in_fan_out: bool = False
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.spec = weight.spec
        self.compute_dtype = compute_dtype
        self.fan_in_fan_out = fan_in_fan_out
        self.codes = _frozen(weight.codes.view(codes_shape(weight.shape)))
        self.absmax = _frozen(weight.absmax if self.spec.double_quant else _as_bytes(weight.absmax))
        self.register_parameter("group_absmax", _frozen_bytes(weight.group_absmax))
        self.register_parameter("offset", _frozen_bytes(weight.offset))
        self.register_parameter("bias", None if bias is None else _as_parameter(bias))
        self.register_load_state_dict_post_hook(_align)  # type: ignore[no-untyped-call]

    @classmethod
    def from_linear(cls, linear: nn.Linear, spec: NF4Spec, compute_dtype: torch.dtype) -> NF4Linear:
        """Quantize the weight of `linear`; its bias is taken over."""
        return cls(NF4Weight.quantize(linear.weight.detach(), spec), linear.bias, compute_dtype)

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        bias: bool,
        spec: NF4Spec,
        compute_dtype: torch.dtype,
        *,
        fan_in_fan_out: bool = False,
        device: torch.device | str | None = None,
    ) -> NF4Linear:
        """Room for a weight that `load_state_dict` will fill."""
        weight = NF4Weight.empty((out_features, in_features), spec, device=device)
        room = torch.empty(out_features, dtype=compute_dtype, device=device) if bias else None
        return cls(weight, room, compute_dtype, fan_in_fan_out=fan_in_fan_out)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.compute_dtype)
        bias = _cast(self.bias, self.compute_dtype)
        return frozen_linear(x, bias, self.materialize, *self.stored())

    def stored(self) -> tuple[Tensor, ...]:
        """What holds the weight, for `materialize`."""
        held = (self.codes, self.absmax, self.group_absmax, self.offset)
        return tuple(tensor for tensor in held if tensor is not None)

    def materialize(self, *stored: Tensor) -> Tensor:
        """The weight (out, in) in the compute dtype."""
        return _weight((self.out_features, self.in_features), self.spec, *stored).dequantize(self.compute_dtype)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in), rounded once to `dtype`."""
        return self.nf4_weight.dequantize(dtype)

    @property
    def nf4_weight(self) -> NF4Weight:
        """The same bytes as a value."""
        return _weight((self.out_features, self.in_features), self.spec, *self.stored())

    @property
    def packed_bytes(self) -> int:
        """Bytes held for the weight, without the bias."""
        return sum(tensor.nbytes for tensor in self.stored())

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block_size={self.spec.block_size}, group_size={self.spec.group_size}, compute_dtype={self.compute_dtype}"
        )


class DenseEmbedding(nn.Embedding):
    """An embedding with its weight (rows, hidden) in a storage dtype of its own, and output in the compute dtype.

    `scale` multiplies the output in the compute dtype, as Gemma's embedding does.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        compute_dtype: torch.dtype,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self.compute_dtype = compute_dtype
        self.scale = scale

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, compute_dtype: torch.dtype) -> DenseEmbedding | None:
        """Take over the parameter of `embedding`, the same object; None if its class does more than look up and scale.

        Such a class (learned positions, normed rows) must stay as it is, with its weight in the compute dtype.
        """
        scale = _output_scale(embedding)
        if scale is None:
            return None
        rows, hidden = embedding.num_embeddings, embedding.embedding_dim
        module = cls(rows, hidden, embedding.padding_idx, compute_dtype=compute_dtype, scale=scale, device="meta")
        module.weight = embedding.weight
        return module

    def forward(self, input: Tensor) -> Tensor:
        rows = self.look_up(input).to(self.compute_dtype)
        # Rounded to the compute dtype, as Gemma's is, but on the host: a GPU would have to be waited for.
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale, dtype=rows.dtype).item()

    def look_up(self, input: Tensor) -> Tensor:
        """The rows of the weight, (*input.shape, hidden), in its own dtype."""
        return super().forward(input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale}, compute_dtype={self.compute_dtype}"


def _output_scale(embedding: nn.Embedding) -> float | None:
    # Transformers names every embedding that only scales its rows `<Model>ScaledWordEmbedding`, with `embed_scale`.
    if type(embedding) is nn.Embedding:
        return 1.0 if embedding.max_norm is None else None
    if type(embedding).__name__.endswith("ScaledWordEmbedding"):
        return float(getattr(embedding, "embed_scale"))  # noqa: B009
    return None


def _weight(shape: tuple[int, ...], spec: NF4Spec, codes: Tensor, absmax: Tensor, *second_level: Tensor) -> NF4Weight:
    codes = codes.view(-1)
    if not spec.double_quant:
        return NF4Weight(codes, _as_fp32(absmax), None, None, shape, spec)
    group_absmax, offset = (_as_fp32(tensor) for tensor in second_level)
    return NF4Weight(codes, absmax, group_absmax, offset, shape, spec)


def _as_bytes(values: Tensor) -> Tensor:
    """fp32 (n,) as uint8 (n, 4)."""
    return values.view(torch.uint8).view(-1, 4)


def _as_fp32(data: Tensor) -> Tensor:
    """uint8 (n, 4) as fp32 (n,)."""
    return data.view(torch.float32).view(-1)


def _align(module: nn.Module, _keys: object) -> None:
    """Copy what `load_state_dict(assign=True)` took from a mapped file at a byte where no fp32 can begin."""
    for parameter in module.parameters(recurse=False):
        if parameter.storage_offset() % 4:
            parameter.data = parameter.data.clone()


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _frozen_bytes(values: Tensor | None) -> nn.Parameter | None:
    return None if values is None else _frozen(_as_bytes(values))


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else _frozen(tensor)
