"""A model's body, from token ids to the last hidden states, by fused regions."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nybble.memory.ledger import StepObserver, Unobserved
from nybble.memory.stream import LayerStream
from nybble.models.fused.attention import Layout, describe
from nybble.models.fused.block import Positions, Rotation, Stream, family_of, read_block, read_norm
from nybble.models.fused.policy import Units, units_of
from nybble.models.fused.projection import put_together
from nybble.models.fused.regions import Projected, add_and_norm
from nybble.plan import MemoryPlan

# These rotations depend on the longest sequence seen so far, which the host must ask for.
_ROPES_THAT_ASK = ("dynamic", "longrope")


class FusedBody:
    """Computes what `model.base_model` computes, from the same modules, which stay as they are.

    It describes the model as it is when it is built: after adapters were injected, loaded or chosen anew, build it
    anew. Hooks on the stock modules do not run. Gradients of adapters that have one already, in fp32, are added to it
    within the backward pass, so `torch.autograd.grad` does not see them.
    samples_a_row: the most samples that a row of tokens holds (1: rows are not packed); of more, some would see each
    other. plan: how each layer is held (None: everything kept, on the device); precision: bf16 or fp8.
    most_tokens: see `nybble.models.fused.policy`.
    Raises CannotFuseError with the reason if the model, or what is trained of it, is not known here.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        samples_a_row: int,
        plan: MemoryPlan | None = None,
        precision: str = "bf16",
        most_tokens: int = 0,
    ) -> None:
        body = model.base_model
        family = family_of(body)
        layers = body.layers[: body.config.num_hidden_layers]
        self.plan = MemoryPlan.uniform(len(layers)) if plan is None else plan
        self.embed, self.rotary = body.embed_tokens, body.rotary_emb
        self.blocks = [
            read_block(layer, family, precision=precision, resident=policy.weights == "resident")
            for layer, policy in zip(layers, self.plan.layers, strict=True)
        ]
        self.last_norm = read_norm(body.norm, family)
        self.device = self.last_norm.weight.device
        self.stream = self._stream()
        self._most_tokens = most_tokens
        self.units = units_of(self.blocks, self.plan, self.device, most_tokens=most_tokens)
        self.observer: StepObserver = Unobserved()
        self.samples_a_row = samples_a_row
        pairs = [projection.pair for block in self.blocks for projection in block.projections if projection.pair]
        put_together(pairs)
        self._copies = [copy for pair in pairs for copy in pair.copies()]

    @property
    def capturable(self) -> bool:
        """Whether it never asks the device for anything, so that a CUDA graph can hold it."""
        kinds = self.rotary.rope_type
        asking = any(kind in _ROPES_THAT_ASK for kind in (kinds.values() if isinstance(kinds, dict) else [kinds]))
        return not asking and (self.stream is None or self.stream.capturable)

    def __call__(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """The last hidden states, (batch * seq_len, hidden_size), of input_ids and position_ids (batch, seq_len)."""
        self._copy_adapters()
        embedded = self.embed(input_ids)
        positions = self._positions(embedded, position_ids)
        stream: Stream = (None, Projected(embedded.flatten(0, 1)))
        del embedded
        self.units.begin()
        kind = "layer" if len(self.units.parts) == len(self.blocks) else "part"  # halves of one, or several
        for number, unit in enumerate(self.units, 1):
            stream = unit(stream, positions)
            self.observer.border(f"{kind} {number}", stream[1].base)
        if self.stream is not None and not torch.is_grad_enabled():
            self.stream.settle()
        return add_and_norm(*stream, self.last_norm)

    @contextlib.contextmanager
    def leaner(self) -> Iterator[None]:
        """Within, every layer keeps its input alone, in host memory: the same gradients from the least memory."""
        before, self.units = self.units, self._leanest
        before.begin()  # what a pass that was broken off has under way is given up
        try:
            yield
        finally:
            self.units = before

    def describe(self) -> str:
        """How it computes, in one line."""
        half = self.blocks[0].attention
        head_dim = half.output.matrix.shape[1] // half.heads.num_heads
        packed = self.samples_a_row > 1
        attention = describe(self.device, half.rule, packed=packed, head_dim=head_dim, dtype=half.qkv.dtype)
        return f"{len(self.blocks)} blocks by fused kernels; attention by {attention}"

    @functools.cached_property
    def _leanest(self) -> Units:
        lean = MemoryPlan.uniform(len(self.blocks), "offload")
        return units_of(
            self.blocks, dataclasses.replace(lean, keep_middle=False, mlp_rows=self.plan.mlp_rows), self.device
        )

    def _stream(self) -> LayerStream | None:
        """Takes the weights that are not resident off the device, and brings them back for each use."""
        streamed = self.plan.streamed()
        if not streamed:
            return None
        weights = {index: self.blocks[index].stored for index in streamed}
        on_disk = [index for index in streamed if self.plan.layers[index].weights == "disk"]
        slots, span = self.plan.stream_slots, self.plan.span
        stream = LayerStream(weights, self.device, slots=slots, span=span, on_disk=on_disk)
        for index in streamed:
            for projection in self.blocks[index].projections:
                projection.matrix.follow(functools.partial(stream.ready, index))
        return stream

    @torch.no_grad()
    def _copy_adapters(self) -> None:
        """Bring what is trained to where the products read it, in their dtype: a few launches for all of it."""
        if self._copies:
            places, masters = zip(*self._copies, strict=True)
            torch._foreach_copy_(places, masters)

    def _positions(self, embedded: Tensor, position_ids: Tensor) -> Positions:
        types = dict.fromkeys(block.attention.layer_type for block in self.blocks)
        if isinstance(self.rotary.rope_type, dict):  # Gemma 3 rotates by other angles in sliding layers
            rotations = {kind: self._rotation(embedded, position_ids, kind) for kind in types}
        else:
            rotations = dict.fromkeys(types, self._rotation(embedded, position_ids))
        return Positions(rotations, Layout.of(position_ids, samples_a_row=self.samples_a_row))

    def _rotation(self, embedded: Tensor, position_ids: Tensor, *layer_type: str) -> Rotation:
        cos, sin = self.rotary(embedded, position_ids, *layer_type)
        return cos.flatten(0, 1), sin.flatten(0, 1)
