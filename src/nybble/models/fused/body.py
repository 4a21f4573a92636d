"""A model's body, from token ids to the last hidden states, by fused regions."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nybble.models.fused.attention import Layout, describe
from nybble.models.fused.block import Block, Rotation, Stream, read_block, read_norm
from nybble.models.fused.reason import CannotFuseError
from nybble.models.fused.recompute import checkpoint_store, recomputed
from nybble.models.fused.regions import Projected, add_and_norm

# These rotations depend on the longest sequence seen so far, which the host must ask for.
_ROPES_THAT_ASK = ("dynamic", "longrope")


class FusedBody:
    """Computes what `model.base_model` computes, from the same modules, which stay as they are.

    It describes the model as it is when it is built: after adapters were injected, loaded or chosen anew, build it
    anew. samples_a_row: the most samples that a row of tokens holds (1: rows are not packed).
    activations: keep, recompute or offload, as in TrainConfig; precision: bf16 or fp8.
    Raises CannotFuseError with the reason if the model, or what is trained of it, is not known here.
    """

    def __init__(
        self, model: PreTrainedModel, *, samples_a_row: int = 1, activations: str = "keep", precision: str = "bf16"
    ) -> None:
        body = model.base_model
        layers = list(getattr(body, "layers", []))
        if not layers:
            raise CannotFuseError(f"{type(body).__name__} has no layers that are known")
        self.embed, self.rotary = body.embed_tokens, body.rotary_emb
        self.blocks = [read_block(layer, precision=precision) for layer in layers]
        self.last_norm = read_norm(body.norm, layers[0])
        self.samples_a_row = samples_a_row
        by_type = isinstance(self.rotary.rope_type, dict)  # Gemma 3 rotates by other angles in sliding layers
        self.rotation_kinds = [block.layer_type if by_type else None for block in self.blocks]
        self.store = checkpoint_store(activations, len(layers), model.device)
        pairs = [projection.pair for block in self.blocks for projection in block.projections if projection.pair]
        self._copies = [copy for pair in pairs for copy in pair.copies()]

    @property
    def capturable(self) -> bool:
        """Whether it never asks the device for anything, so that a CUDA graph can hold it."""
        kinds = self.rotary.rope_type
        return not any(kind in _ROPES_THAT_ASK for kind in (kinds.values() if isinstance(kinds, dict) else [kinds]))

    def __call__(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """The last hidden states, (batch * seq_len, hidden_size), of input_ids and position_ids (batch, seq_len)."""
        self._copy_adapters()
        layout = Layout.of(position_ids, samples_a_row=self.samples_a_row)
        embedded = self.embed(input_ids)
        rotations = {kind: self._rotation(embedded, position_ids, kind) for kind in dict.fromkeys(self.rotation_kinds)}
        stream: Stream = (None, Projected(embedded.flatten(0, 1)))
        for number, (block, kind) in enumerate(zip(self.blocks, self.rotation_kinds, strict=True)):
            stream = self._through(number, block, stream, rotations[kind], layout)
        return add_and_norm(*stream, self.last_norm)

    def describe(self) -> str:
        """How it computes, in one line."""
        block = self.blocks[0]
        dtype, device = block.qkv.dtype, block.attention_norm.weight.device
        head_dim = block.output.matrix.shape[1] // block.heads.num_heads
        attention = describe(device, block.attention, packed=self.samples_a_row > 1, head_dim=head_dim, dtype=dtype)
        return f"{len(self.blocks)} blocks by fused kernels; attention by {attention}"

    def _through(self, number: int, block: Block, stream: Stream, rotation: Rotation, layout: Layout) -> Stream:
        if self.store is None or not torch.is_grad_enabled():
            return block(stream, rotation, layout)

        return None, Projected(recomputed(block, self.store, number, stream[1].base, rotation, layout))

    @torch.no_grad()
    def _copy_adapters(self) -> None:
        """Bring what is trained to where the products read it, in their dtype: a few launches for all of it."""
        if self._copies:
            places, masters = zip(*self._copies, strict=True)
            torch._foreach_copy_(places, masters)

    def _rotation(self, embedded: Tensor, position_ids: Tensor, layer_type: str | None) -> Rotation:
        arguments = () if layer_type is None else (layer_type,)
        cos, sin = self.rotary(embedded, position_ids, *arguments)
        return cos.flatten(0, 1), sin.flatten(0, 1)
