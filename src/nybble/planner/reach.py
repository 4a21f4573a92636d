"""What of a model an adapter reaches, and how many parameters train, told from the sizes alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nybble.adapters.config import LoraConfig
from nybble.adapters.names import is_named, is_trained_whole, left_out
from nybble.planner.shapes import LinearShape, ModelShape

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True)
class Reach:
    """targets: names of the linears that are adapted, in some layer at least. rank: the highest.

    parameters: that train. ends_trained: whether the embedding or the head is trained or adapted.
    """

    targets: tuple[str, ...]
    rank: int
    parameters: int
    ends_trained: bool


def reach(model: ModelShape, lora: LoraConfig) -> Reach:
    """As `nybble.adapters.inject` will find it, in a model whose modules are called as Llama's are."""
    adapted = {path: linear for path, linear in _linears(model) if _is_adapted(lora, path)}
    names = {linear.name for linear in adapted.values()}
    pairs = sum(_pair_parameters(lora, path, linear) for path, linear in adapted.items())
    whole = {path: size for path, size in _whole_sizes(model) if is_trained_whole(lora, path)}
    return Reach(
        targets=tuple(linear.name for linear in model.linears if linear.name in names),
        rank=max((lora.at(path).r for path in adapted), default=lora.r),
        parameters=pairs + sum(whole.values()),
        ends_trained=HEAD in adapted or EMBEDDING in whole or HEAD in whole,
    )


def _is_adapted(lora: LoraConfig, path: str) -> bool:
    return is_named(lora, path, is_head=path == HEAD) and not left_out(lora, path)


def _pair_parameters(lora: LoraConfig, path: str, linear: LinearShape) -> int:
    magnitude = linear.outputs if lora.use_dora else 0
    return lora.at(path).r * (linear.inputs + linear.outputs) + magnitude


def _linears(model: ModelShape) -> Iterator[tuple[str, LinearShape]]:
    attention = {linear.name for projection in model.projections[:2] for linear in projection}
    for layer in range(model.num_layers):
        for linear in model.linears:
            owner = "self_attn" if linear.name in attention else "mlp"
            yield f"model.layers.{layer}.{owner}.{linear.name}", linear
    yield HEAD, LinearShape(HEAD, model.hidden, model.vocabulary)


def _whole_sizes(model: ModelShape) -> Iterator[tuple[str, int]]:
    """What `modules_to_save` can name. Tied, both ends are copied and trained apart."""
    yield EMBEDDING, model.embedding_weights
    for path, linear in _linears(model):
        yield path, linear.parameters
