"""Next-token loss without the logits: tokens x vocabulary is never in memory, in training or in evaluation.

Logits are made for a few rows at a time, only where there is a target, and the gradient of those rows is taken at
once, in the forward pass (as in Liger Kernel, https://arxiv.org/abs/2410.10989). The head may be any module: frozen,
trained, tied to the embedding, with a LoRA pair, because autograd runs through it chunk by chunk. One that lies in host
memory or in NF4 is chunked the other way, see `nybble.models.streamed_loss`.

Legend: batch, seq_len; targets = tokens that are predicted and count; rows = the targets of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel

from nybble.labels import IGNORED
from nybble.memory.head import passing_head
from nybble.models.attention import body_inputs
from nybble.models.logits import find_logit_rule
from nybble.models.streamed_loss import StreamedLoss
from nybble.ops.wide import wide_dtype

# fp32 logits of one chunk; with their softmax and gradient three times as much is held at the peak.
CHUNK_BYTES = 256 * 2**20


class CausalLMLoss(nn.Module):
    """A causal language model that returns its loss: what the training loop calls, DDP wraps and FSDP2 roots at.

    Raises UserError where the model makes logits in a way that `nybble.models.logits` does not know.
    """

    def __init__(self, model: PreTrainedModel, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        super().__init__()
        self.model = model
        self.logit_rule = find_logit_rule(model)
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self.chunk_bytes = chunk_bytes
        passing = passing_head(model.get_output_embeddings())
        self.streamed = StreamedLoss(passing, self.logit_rule) if passing is not None else None

    def forward(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> Tensor:
        """Sum of the loss over the target tokens, an fp32 scalar in nats.

        input_ids, labels, position_ids: (batch, seq_len) int64. Labels are not shifted: token i + 1's label is the
        target of token i, -100 is none. Positions that start again within a row begin another sample, which sees
        nothing of the one before; the first label of each sample is -100.
        """
        if self.streamed is not None:
            return self._streamed_losses(self.streamed, input_ids, labels, position_ids)[0].sum()
        hidden, targets, _ = self.target_rows(input_ids, labels, position_ids)
        if not torch.is_grad_enabled():
            return torch.stack([losses.sum() for losses in self._chunk_losses(hidden, targets)]).sum()
        head: nn.Module = self.model.get_output_embeddings()
        trained = (parameter for parameter in head.parameters() if parameter.requires_grad)
        return _chunked_loss(self._losses, self.rows_a_chunk, hidden, targets, *trained)

    @torch.no_grad()
    def token_losses(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> Tensor:
        """Loss of each token as it is predicted, (batch, seq_len) fp32, 0 where the label is -100. No gradients."""
        if self.streamed is not None:
            found, where = self._streamed_losses(self.streamed, input_ids, labels, position_ids)
        else:
            hidden, targets, where = self.target_rows(input_ids, labels, position_ids)
            found = torch.cat(list(self._chunk_losses(hidden, targets)))
        losses = found.new_zeros(labels.numel())
        losses[where + 1] = found
        return losses.view(labels.shape)

    def sequence_losses(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> Tensor:
        """Sum of the loss over each row's target tokens, (batch,) fp32. No gradients."""
        return self.token_losses(input_ids, labels, position_ids).sum(dim=1)

    @property
    def rows_a_chunk(self) -> int:
        return rows_within(self.chunk_bytes, self.vocab_size)

    def settle(self) -> None:
        """Have weights that come and go where a step finds them and is to leave them, as CUDA graphs of it need."""

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """The last hidden states, (batch * seq_len, hidden_size)."""
        body = self.model.base_model(**body_inputs(self.model.config, input_ids, position_ids))
        hidden: Tensor = body.last_hidden_state.flatten(0, 1)
        return hidden

    def target_rows(self, input_ids: Tensor, labels: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states that predict a target, (targets, hidden_size), the targets, and the rows' flat indices.

        Of a batch as `forward` takes it.
        """
        hidden = self.hidden_states(input_ids, position_ids)
        targets = following(labels)
        where = (targets != IGNORED).nonzero().squeeze(1)
        return hidden.index_select(0, where), targets.index_select(0, where), where

    def _streamed_losses(
        self, streamed: StreamedLoss, input_ids: Tensor, labels: Tensor, position_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Losses of the targets, and the flat indices of the rows that predict them."""
        with streamed.coming(input_ids.numel()) as losses:
            hidden, targets, where = self.target_rows(input_ids, labels, position_ids)
            return losses(hidden, targets), where

    def _losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Loss of each of a chunk's rows."""
        logits = self.logit_rule(self.model.get_output_embeddings()(hidden))
        return cross_entropy(logits, targets, reduction="none")

    def _chunk_losses(self, hidden: Tensor, targets: Tensor) -> Iterator[Tensor]:
        for chunk in _chunks(len(targets), self.rows_a_chunk):
            yield self._losses(hidden[chunk], targets[chunk])


def rows_within(num_bytes: int, vocab_size: int) -> int:
    """How many rows of logits, in fp32, so many bytes hold; one at least."""
    rows = num_bytes // (4 * vocab_size)
    return max(1, rows if rows < 64 else rows // 64 * 64)  # GEMMs are fastest with multiples of 64 rows


def following(labels: Tensor) -> Tensor:
    """What each token is to predict, (batch * seq_len,), of labels (batch, seq_len)."""
    return pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()


class _ChunkedLoss(torch.autograd.Function):
    """The sum of `losses(rows, targets)` over all rows, and its gradient, taken chunk by chunk in the forward pass.

    The head's trained parameters are inputs, so that their gradients go through autograd and arrive where those of
    another use of the same parameter do (a tied embedding) and where DDP and FSDP2 wait for them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        losses: Callable[[Tensor, Tensor], Tensor],
        rows_a_chunk: int,
        hidden: Tensor,
        targets: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=wide_dtype(hidden))
        hidden_grad = torch.empty_like(hidden)
        trained_grads: list[Tensor | None] = [None] * len(trained)
        for chunk in _chunks(len(targets), rows_a_chunk):
            with torch.enable_grad():
                rows = hidden[chunk].detach().requires_grad_()
                loss = losses(rows, targets[chunk]).sum()
            hidden_grad[chunk], *grads = torch.autograd.grad(loss, [rows, *trained], allow_unused=True)
            trained_grads = [_add(so_far, grad) for so_far, grad in zip(trained_grads, grads, strict=True)]
            total += loss.detach()
        ctx.save_for_backward(hidden_grad, *trained_grads)
        ctx.dtypes = [tensor.dtype for tensor in (hidden, *trained)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, *trained_grads = (
            None if grad is None else (grad * grad_output).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return None, None, hidden_grad, None, *trained_grads


# The class attribute has no type of its own in PyTorch.
_chunked_loss: Callable[..., Tensor] = _ChunkedLoss.apply


def _chunks(num_rows: int, rows_a_chunk: int) -> list[slice]:
    """Slices that cover all rows; one empty slice for no rows, so that there always is a (zero) loss and gradient."""
    return [slice(start, start + rows_a_chunk) for start in range(0, max(num_rows, 1), rows_a_chunk)]


def _add(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """Their sum in fp32 whatever the parameter's dtype, as it has as many terms as there are chunks."""
    if grad is None:
        return total
    return grad.to(wide_dtype(grad)) if total is None else total.add_(grad)
