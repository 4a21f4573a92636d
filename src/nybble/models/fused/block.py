"""The blocks of the models that are known: what each reads from its stock modules, and how it computes.

Stock modules stay where they are and own every tensor. A block here reads them once, when it is built. It is two halves
that are alike: the stream's norm, a projection, what is done with it, and a projection back. What the second gives is
added to the stream by the norm that reads it next, so a half takes and gives the stream as two parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer, Gemma2Model
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer, Gemma3TextModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralModel
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer, Phi3Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3Model

from nybble.models.fused.attention import AttentionRule, Layout, attend
from nybble.models.fused.projection import Pair, Projection
from nybble.models.fused.reason import CannotFuseError
from nybble.models.fused.regions import (
    Heads,
    Known,
    Norm,
    Projected,
    add_and_norm,
    add_norm_project,
    glu_project,
    project,
    rotated_heads,
)

# The residual stream, and what is still to be added to it.
Stream = tuple[Tensor | None, Projected]

Rotation = tuple[Tensor, Tensor]  # cos and sin, (tokens, rotary_dim)


@dataclass(frozen=True)
class Positions:
    """Where tokens lie: the rotations of each type of layer, and the borders of samples."""

    rotations: Mapping[str, Rotation]
    layout: Layout


class Half(Protocol):
    """Half a block."""

    @property
    def after(self) -> Norm | None:
        """Of what it adds to the stream: Gemma has one."""

    @property
    def projections(self) -> tuple[Projection, Projection]:
        """The one that reads the stream, and the one that adds to it."""

    def __call__(
        self, stream: Stream, positions: Positions, *, known: Known | None = None, replay: bool = False
    ) -> tuple[Known, Projected]:
        """The stream (tokens, hidden) that it reads, and what is to be added to it.

        known: that stream, if it was kept from an earlier pass: then it is not computed again. replay: for a backward
        pass alone, which needs no value of what is to be added.
        """


@dataclass(frozen=True)
class AttentionHalf:
    """keep_normed: see `add_norm_project`."""

    norm: Norm
    qkv: Projection
    heads: Heads
    rule: AttentionRule
    output: Projection
    after: Norm | None
    layer_type: str
    keep_normed: bool = True

    @property
    def projections(self) -> tuple[Projection, Projection]:
        return self.qkv, self.output

    def __call__(
        self, stream: Stream, positions: Positions, *, known: Known | None = None, replay: bool = False
    ) -> tuple[Known, Projected]:
        known, qkv = add_norm_project(*stream, self.norm, self.qkv, known=known, keep_normed=self.keep_normed)
        q, k, v = rotated_heads(qkv, self.heads, *positions.rotations[self.layer_type])
        del qkv  # 12 KB a token of 8B that nobody reads while attention runs
        delta = project(attend(q, k, v, self.rule, positions.layout), self.output, replay=replay and not self.after)
        return known, _normed(delta, self.after)


@dataclass(frozen=True)
class MlpHalf:
    norm: Norm
    gate_up: Projection
    activation: str
    down: Projection
    after: Norm | None
    keep_normed: bool = True

    @property
    def projections(self) -> tuple[Projection, Projection]:
        return self.gate_up, self.down

    def __call__(
        self,
        stream: Stream,
        positions: Positions,  # noqa: ARG002
        *,
        known: Known | None = None,
        replay: bool = False,
    ) -> tuple[Known, Projected]:
        known, gate_up = add_norm_project(*stream, self.norm, self.gate_up, known=known, keep_normed=self.keep_normed)
        delta = glu_project(gate_up, self.activation, self.down, replay=replay and not self.after)
        return known, _normed(delta, self.after)


@dataclass(frozen=True)
class Block:
    """One decoder layer."""

    attention: AttentionHalf
    mlp: MlpHalf

    @property
    def projections(self) -> tuple[Projection, ...]:
        return *self.attention.projections, *self.mlp.projections

    @property
    def stored(self) -> list[nn.Parameter]:
        """What holds its frozen weights."""
        return [parameter for projection in self.projections for parameter in projection.stored]


def through(halves: Sequence[Half], stream: Stream, positions: Positions) -> Stream:
    """The stream behind halves of blocks."""
    for half in halves:
        known, delta = half(stream, positions)
        stream = known.h, delta
    return stream


def masters(halves: Sequence[Half]) -> list[Tensor]:
    """All that is trained of them."""
    return [master for half in halves for projection in half.projections for master in projection.masters]


def pair_behind(half: Half) -> Pair | None:
    """Whose low-rank product is still to be added to what a half gives."""
    return half.projections[1].pair if half.after is None else None


def _normed(delta: Projected, rule: Norm | None) -> Projected:
    return delta if rule is None else Projected(add_and_norm(None, delta, rule))


@dataclass(frozen=True)
class Family:
    """What the models of one architecture have in common. window: where a layer's sliding window is written."""

    layer: type[nn.Module]
    window: Callable[[Any], int | None]  # of a layer's attention
    norm_offset: float = 0.0
    sandwiched: bool = False  # norms after attention and MLP too
    head_norms: bool = False


def _no_window(_attention: Any) -> None:
    """Whatever stands in the configuration: the architecture does not read it."""


def _window_of_all(attention: Any) -> int | None:
    window: int | None = attention.config.sliding_window
    return window


def _window_of_some(attention: Any) -> int | None:
    window: int | None = attention.sliding_window
    return window


# By the class of the body: its forward pass, as well as its layers', is what a FusedBody stands in for.
_FAMILIES: Mapping[type[nn.Module], Family] = {
    LlamaModel: Family(LlamaDecoderLayer, _no_window),
    MistralModel: Family(MistralDecoderLayer, _window_of_all),
    Phi3Model: Family(Phi3DecoderLayer, _window_of_all),
    Qwen2Model: Family(Qwen2DecoderLayer, _window_of_some),
    Qwen3Model: Family(Qwen3DecoderLayer, _window_of_some, head_norms=True),
    Gemma2Model: Family(Gemma2DecoderLayer, _window_of_some, norm_offset=1.0, sandwiched=True),
    Gemma3TextModel: Family(Gemma3DecoderLayer, _window_of_some, norm_offset=1.0, sandwiched=True, head_norms=True),
}


def family_of(body: nn.Module) -> Family:
    """The family of a model's body; raises CannotFuseError if it is of none."""
    if type(body) not in _FAMILIES:
        raise CannotFuseError(f"{type(body).__name__} is not known")
    return _FAMILIES[type(body)]


def read_block(layer: Any, family: Family, *, precision: str, resident: bool) -> Block:
    """The block that computes as `layer` does; raises CannotFuseError with the reason if there is none.

    resident: its frozen weights stay on the device.
    """
    _refuse(type(layer) is not family.layer, f"{type(layer).__name__} is not known")
    attention, mlp = layer.self_attn, layer.mlp
    config, offset = attention.config, family.norm_offset
    _refuse(config.attention_dropout > 0, "attention_dropout is not zero")
    _refuse(not attention.is_causal, "its attention is not causal")
    _refuse(getattr(config, "resid_pdrop", 0) > 0, "resid_pdrop is not zero")
    joint = hasattr(attention, "qkv_proj")  # Phi-3
    queries = [attention.qkv_proj] if joint else [attention.q_proj, attention.k_proj, attention.v_proj]
    gates = [mlp.gate_up_proj] if joint else [mlp.gate_proj, mlp.up_proj]
    before_mlp = layer.pre_feedforward_layernorm if family.sandwiched else layer.post_attention_layernorm
    softcap = getattr(attention, "attn_logit_softcapping", None)

    def projection(*linears: nn.Module) -> Projection:
        return Projection(linears, precision=precision, device=layer.input_layernorm.weight.device, resident=resident)

    return Block(
        AttentionHalf(
            norm=_norm(layer.input_layernorm, offset),
            qkv=projection(*queries),
            heads=_heads(attention, offset, normed=family.head_norms),
            rule=AttentionRule(attention.scaling, family.window(attention), softcap),
            output=projection(attention.o_proj),
            after=_norm(layer.post_attention_layernorm, offset) if family.sandwiched else None,
            layer_type=getattr(attention, "layer_type", None) or "full_attention",
        ),
        MlpHalf(
            norm=_norm(before_mlp, offset),
            gate_up=projection(*gates),
            activation=_activation(config),
            down=projection(mlp.down_proj),
            after=_norm(layer.post_feedforward_layernorm, offset) if family.sandwiched else None,
        ),
    )


def _heads(attention: Any, offset: float, *, normed: bool) -> Heads:
    counts = attention.config.num_attention_heads, attention.config.num_key_value_heads
    if not normed:
        return Heads(*counts)
    q_norm, k_norm = (_norm(module, offset) for module in (attention.q_norm, attention.k_norm))
    return Heads(*counts, q_norm.weight, k_norm.weight, q_norm.eps, offset)


def read_norm(module: Any, family: Family) -> Norm:
    """The norm after the last block."""
    return _norm(module, family.norm_offset)


def _norm(module: Any, offset: float) -> Norm:
    _refuse(module.weight.requires_grad, "norms are trained")
    return Norm(module.weight.detach(), _eps(module), offset)


def _eps(module: Any) -> float:
    return float(module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps)


def _activation(config: Any) -> str:
    name = getattr(config, "hidden_activation", None) or config.hidden_act
    known = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    _refuse(name not in known, f"its activation {name} is not known")
    return known[name]


def _refuse(condition: bool, reason: str) -> None:
    if condition:
        raise CannotFuseError(reason)
