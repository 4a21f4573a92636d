"""A model's body, from token ids to the last hidden states, by fused regions."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nybble.models.fused.attention import Layout, describe
from nybble.models.fused.block import Block, Rotation, Stream, family_of, read_block, read_norm
from nybble.models.fused.recompute import HostStore, recomputed
from nybble.models.fused.regions import Projected, add, add_and_norm

# These rotations depend on the longest sequence seen so far, which the host must ask for.
_ROPES_THAT_ASK = ("dynamic", "longrope")


class FusedBody:
    """Computes what `model.base_model` computes, from the same modules, which stay as they are.

    It describes the model as it is when it is built: after adapters were injected, loaded or chosen anew, build it
    anew. Hooks on the stock modules do not run. Gradients of adapters that have one already, in fp32, are added to it
    within the backward pass, so `torch.autograd.grad` does not see them.
    samples_a_row: the most samples that a row of tokens holds (1: rows are not packed); of more, some would see each
    other. activations: keep, recompute or offload, as in TrainConfig; precision: bf16 or fp8.
    Raises CannotFuseError with the reason if the model, or what is trained of it, is not known here.
    """

    def __init__(
        self, model: PreTrainedModel, *, samples_a_row: int, activations: str = "keep", precision: str = "bf16"
    ) -> None:
        body = model.base_model
        family = family_of(body)
        layers = body.layers[: body.config.num_hidden_layers]
        self.embed, self.rotary = body.embed_tokens, body.rotary_emb
        self.blocks = [read_block(layer, family, precision=precision) for layer in layers]
        self.last_norm = read_norm(body.norm, family)
        self.recompute = activations != "keep"
        on_host = activations == "offload" and model.device.type == "cuda"
        self.store = HostStore(len(layers), model.device) if on_host else None
        self.samples_a_row = samples_a_row
        by_type = isinstance(self.rotary.rope_type, dict)  # Gemma 3 rotates by other angles in sliding layers
        self.rotation_kinds = [block.layer_type if by_type else None for block in self.blocks]
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
        if self.store is not None and torch.is_grad_enabled():
            self.store.begin()
        for block, kind in zip(self.blocks, self.rotation_kinds, strict=True):
            stream = self._through(block, stream, rotations[kind], layout)
        return add_and_norm(*stream, self.last_norm)

    def describe(self) -> str:
        """How it computes, in one line."""
        block = self.blocks[0]
        dtype, device = block.qkv.dtype, block.attention_norm.weight.device
        head_dim = block.output.matrix.shape[1] // block.heads.num_heads
        attention = describe(device, block.attention, packed=self.samples_a_row > 1, head_dim=head_dim, dtype=dtype)
        return f"{len(self.blocks)} blocks by fused kernels; attention by {attention}"

    def _through(self, block: Block, stream: Stream, rotation: Rotation, layout: Layout) -> Stream:
        if not (self.recompute and torch.is_grad_enabled()):
            return block(stream, rotation, layout)
        h = stream[1].base  # all of the stream, as blocks before have added it up
        if not any(tensor.requires_grad for tensor in (h, *block.masters)):
            return None, Projected(add(*block(stream, rotation, layout)))
        return None, Projected(recomputed(block, self.store, h, rotation, layout))

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
