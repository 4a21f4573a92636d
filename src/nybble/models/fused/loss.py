"""The loss of a model whose body runs by fused regions, without a word between host and device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from nybble.models.fused.body import FusedBody
from nybble.models.fused.matrix import HalfMatrix, held_weight
from nybble.models.logits import LogitRule
from nybble.models.loss import CausalLMLoss, following
from nybble.ops.cross_entropy import cross_entropy_
from nybble.quant.linear import DenseLinear

# Logits of one chunk, in the compute dtype. 1,024 rows of a vocabulary of 128,256 fill an H100 with tiles of 128.
CHUNK_BYTES = 256 * 2**20


class FusedCausalLMLoss(CausalLMLoss):
    """As CausalLMLoss, with the body by fused regions and, over a frozen head, the loss by one kernel a chunk.

    The head is read where it lies: from host memory or out of NF4, it passes through the device in chunks.
    """

    def __init__(self, model: PreTrainedModel, body: FusedBody) -> None:
        with _without_layers(model):
            super().__init__(model)
        self.body = body
        head: nn.Module = model.get_output_embeddings()
        self.head: HalfMatrix | None = None
        frozen = not any(parameter.requires_grad for parameter in head.parameters())
        if self.streamed is None and isinstance(head, DenseLinear) and frozen:
            self.head, self.head_bias = HalfMatrix([head]), head.bias

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can hold it: shapes follow from the inputs' shapes, and the host waits for nothing."""
        return (self.head is not None or self.streamed is not None) and self.body.capturable

    def leaner(self) -> contextlib.AbstractContextManager[None]:
        """Within, the least memory that the same gradients can be had with; see `FusedBody.leaner`."""
        return self.body.leaner()

    def settle(self) -> None:
        if self.body.stream is not None:
            self.body.stream.settle()

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.body(input_ids, position_ids)

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> Tensor:
        if self.streamed is not None:
            with self.streamed.coming(input_ids.numel()) as losses:
                hidden = self.hidden_states(input_ids, position_ids)
                return losses(hidden, following(labels)).sum()
        if self.head is None:
            return super().forward(input_ids, labels, position_ids)
        hidden = self.hidden_states(input_ids, position_ids)
        rows = max(128, CHUNK_BYTES // (hidden.element_size() * self.vocab_size) // 128 * 128)
        loss: Tensor = _linear_cross_entropy(
            self.head, self.head_bias, self.logit_rule, rows, hidden, following(labels)
        )
        return loss


@contextlib.contextmanager
def _without_layers(model: PreTrainedModel) -> Iterator[None]:
    """Within, the stock model goes from its embedding to its last norm: the body may hold what is between elsewhere."""
    config = model.base_model.config
    before, config.num_hidden_layers = config.num_hidden_layers, 0
    try:
        yield
    finally:
        config.num_hidden_layers = before


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of the rows' losses. All rows go through the head, targets or not: their number is known beforehand.

    Hidden states that require a gradient become it: for 350,000 tokens of 8B they are 2.9 GB.
    """

    @staticmethod
    def forward(
        ctx: Any,
        head: HalfMatrix,
        bias: Tensor | None,
        rule: LogitRule,
        rows_a_chunk: int,
        hidden: Tensor,
        targets: Tensor,
    ) -> Tensor:
        losses = []
        with held_weight(head):
            for start in range(0, max(len(hidden), 1), rows_a_chunk):
                chunk = slice(start, start + rows_a_chunk)
                logits = head.product(hidden[chunk], bias)
                losses.append(cross_entropy_(logits, targets[chunk], rule.scale, rule.softcap).sum())
                if ctx.needs_input_grad[4]:
                    hidden[chunk] = head.gradient(logits)  # which are their gradient now
                del logits  # 250 MiB, before as many are made for the next rows
        ctx.save_for_backward(hidden)
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (d_hidden,) = ctx.saved_tensors
        return None, None, None, None, d_hidden.mul_(grad_output), None


_linear_cross_entropy: Callable[..., Tensor] = _LinearCrossEntropy.apply
