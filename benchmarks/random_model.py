"""A model of a public shape with random weights, made in seconds where it will lie: no checkpoint is written or read.

NF4 weights get random codes, which trained ones nearly have too: the levels are a normal distribution's quantiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from nybble.memory.pinned import pinned
from nybble.models.attention import set_attention
from nybble.models.placement import Placement
from nybble.models.skeleton import replace_modules
from nybble.ops.nf4 import absmax_quantize
from nybble.plan import MemoryPlan
from nybble.quant.format import NF4Spec
from nybble.quant.linear import DenseEmbedding, DenseLinear, NF4Linear
from nybble.quant.weight import NF4Weight

STD = 0.02
_BLOCK_BYTES = 64 * 2**20
# Of 64 draws from a standard normal the largest magnitude is 2.4 on average, with a standard deviation of 0.4.
_ABSMAX, _ABSMAX_STD = 2.4 * STD, 0.4 * STD


def random_model(
    config: PreTrainedConfig,
    *,
    device: torch.device,
    spec: NF4Spec | None = None,
    head_spec: NF4Spec | None = None,
    compute_dtype: torch.dtype = torch.bfloat16,
    plan: MemoryPlan | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A frozen model, ready for adapters. spec: of the blocks' linears in NF4; without it they are in 16 bits.

    head_spec: of a head in NF4, with an embedding of its own then, as the loader parts them.
    What `plan` has in host memory is made on the device one by one, from the same draws as what stays there.
    """
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    set_attention(model, "auto", device)
    replace_modules(model, compute_dtype)
    if head_spec is not None:
        model.config.tie_word_embeddings = False
    if model.config.tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    torch.manual_seed(seed)
    _fill(model, device, spec, head_spec, compute_dtype, _HostMemory(Placement.of(model, plan)).place)
    model.config.dtype = compute_dtype
    return model.requires_grad_(False).eval()


Place = Callable[[str, Tensor], Tensor]


def _fill(
    model: PreTrainedModel,
    device: torch.device,
    blocks_spec: NF4Spec | None,
    head_spec: NF4Spec | None,
    compute_dtype: torch.dtype,
    place: Place,
) -> None:
    head = model.get_output_embeddings()
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied ones are made once
    for path, module in list(model.named_modules()):
        spec = head_spec if module is head else blocks_spec
        if spec is not None and isinstance(module, DenseLinear):
            bias = None if module.bias is None else torch.zeros_like(module.bias, dtype=compute_dtype, device=device)
            weight = random_nf4((module.out_features, module.in_features), spec, device)
            ours = NF4Linear(weight, bias, compute_dtype)
            for parameter in ours.stored():
                parameter.data = place(path, parameter.data)
            model.set_submodule(path, ours)
            continue
        large = isinstance(module, DenseLinear | DenseEmbedding)
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in made:
                if large and leaf == "weight":
                    blocks = _normal_rows(parameter.shape, compute_dtype, device)
                    values = _joined(parameter.shape, (place(path, block) for block in blocks))
                else:
                    values = torch.full(parameter.shape, 0 if leaf == "bias" else 1, dtype=compute_dtype, device=device)
                made[parameter] = nn.Parameter(values, requires_grad=False)
            setattr(module, leaf, made[parameter])
        for leaf, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, leaf, buffer.to(device))


def _normal_rows(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """Blocks of rows, so that a card which is to hold no embedding need not have room for one."""
    rows = max(1, _BLOCK_BYTES // (shape[1] * dtype.itemsize))
    for start in range(0, shape[0], rows):
        yield torch.empty((min(rows, shape[0] - start), shape[1]), dtype=dtype, device=device).normal_(0, STD)


def _joined(shape: torch.Size, blocks: Iterator[Tensor]) -> Tensor:
    """The blocks of rows as one tensor, where they lie."""
    first = next(blocks)
    whole, start = first.new_empty(shape), 0
    for block in chain([first], blocks):
        whole[start : start + len(block)] = block
        start += len(block)
    return whole


def random_nf4(shape: tuple[int, int], spec: NF4Spec, device: torch.device) -> NF4Weight:
    """About what quantizing normal values of standard deviation STD gives."""
    numel = shape[0] * shape[1]
    codes = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=device).random_(0, 256)
    absmax = torch.empty(spec.num_blocks(numel), device=device).normal_(_ABSMAX, _ABSMAX_STD).abs_()
    if not spec.double_quant:
        return NF4Weight(codes, absmax, None, None, shape, spec)
    return NF4Weight(codes, *absmax_quantize(absmax, spec.group_size), shape, spec)


class _HostMemory:
    """Takes tensors to host memory through one pinned buffer: straight into fresh memory, a GPU copies 5 GB/s."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def place(self, path: str, value: Tensor) -> Tensor:
        """The value, where the weights of the module at `path` lie."""
        if self._placement.at(path) == "device":
            return value
        if value.nbytes > self._buffer.numel():
            self._buffer = pinned(value.nbytes)
        staged = self._buffer[: value.nbytes].view(value.dtype).view(value.shape)
        return torch.empty_like(value, device="cpu").copy_(staged.copy_(value))
