"""What a run holds from its first step to its last, tensor by tensor: on the device, and pinned on the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby

from nybble.plan import MemoryPlan
from nybble.planner.sizes import Sizes
from nybble.planner.tape import Request, rounded

MIB = 2**20
_INT64 = 8
# `nybble.memory.paging` stages moments that are paged through three buffers.
_BUCKET_BYTES, _BUCKETS = 32 * MIB, 3

Holding = tuple[str, int]  # category, bytes


def on_device(sizes: Sizes, plan: MemoryPlan, *, moments_resident: bool) -> Iterator[Holding]:
    """In about the order in which they are made."""
    yield from weights_on_device(sizes, plan)
    for size in slots(sizes, plan):
        yield "streaming slots", size
    if sizes.run.is_fused(sizes.model):
        yield "adapter copies", sizes.model.num_layers * sum(sizes.pair_copies())
    if sizes.trained_values and sizes.run.method != "full":
        yield "adapters", sizes.trained
    if sizes.trained_values:
        yield "gradients", sizes.trained
    if moments_resident:
        yield from (("moments", size) for size in sizes.moments)
    # Ids, labels and positions of a step's micro-batches, and where a CUDA graph reads them.
    yield "inputs", 2 * 3 * _INT64 * sizes.run.tokens_a_step


def weights_on_device(sizes: Sizes, plan: MemoryPlan) -> Iterator[Holding]:
    model = sizes.model
    if plan.embedding == "device":
        yield "weights", sizes.vocabulary_matrix
    small = [model.hidden * sizes.value] * model.norms
    small += [linear.outputs * sizes.value for linear in model.linears if linear.bias]
    for layer in plan.layers:
        if layer.weights == "resident":
            yield from (("weights", size) for size in matrices(sizes))
        yield from (("weights", size) for size in small)
    yield "weights", model.hidden * sizes.value
    if plan.head == "device" and not sizes.tied:
        yield from (("weights", size) for size in sizes.head)


def matrices(sizes: Sizes) -> Iterator[int]:
    """Of one layer; those that are multiplied as they are held are stacked where they read one input."""
    for product in sizes.products:
        tensors = [list(sizes.of_linear(linear)) for linear in product.linears]
        if sizes.run.is_fused(sizes.model) and not sizes.materialized(product):
            yield sum(map(sum, tensors))
        else:
            yield from (size for sizes_of_one in tensors for size in sizes_of_one)


def stacked(sizes: Sizes, plan: MemoryPlan) -> Iterator[Request]:
    """How matrices that are multiplied as they are held are brought to the device, in the order of common files, and
    those that read one input stacked when all are there.
    """
    if not sizes.run.is_fused(sizes.model) or any(map(sizes.materialized, sizes.products)):
        return
    layers = [number for number, layer in enumerate(plan.layers) if layer.weights == "resident"]
    qkv, output, gate_up, down = (
        [(linear.name, sum(sizes.of_linear(linear))) for linear in product.linears] for product in sizes.products
    )
    for layer in layers:
        for name, size in [*sorted(gate_up + down), *sorted(qkv + output)]:
            yield (layer, name), rounded(size), "weights"
    for layer in layers:
        for parts in (qkv, gate_up):
            if len(parts) > 1:
                yield (layer, "+".join(name for name, _ in parts)), rounded(sum(size for _, size in parts)), "weights"
                yield from (((layer, name), 0, "weights") for name, _ in parts)


def slots(sizes: Sizes, plan: MemoryPlan) -> list[int]:
    """Room for streamed layers: as `nybble.memory.stream` has it, `span` of them a slot."""
    pieces = [len(list(piece)) for _, piece in groupby(plan.streamed(), key=lambda layer: layer // plan.span)]
    count = min(plan.stream_slots, len(pieces))
    return [max(pieces[slot::count]) * sizes.layer_weights for slot in range(count)]


def staging(sizes: Sizes) -> int:
    """Of paged moments, while the weights are updated."""
    return min(_BUCKETS * _BUCKET_BYTES, sum(sizes.moments))


def on_host(sizes: Sizes, plan: MemoryPlan, activations: int) -> Mapping[str, int]:
    """Pinned, by category; activations: bytes of what a micro-batch keeps there."""
    ends = (plan.embedding == "host") + (plan.head == "host" and not sizes.tied)
    ends = max(ends, sizes.tied and plan.head == "host")
    kinds = [layer.weights for layer in plan.layers]
    held = {
        "weights": kinds.count("streamed") * sizes.layer_weights + ends * sizes.vocabulary_matrix,
        "reading": 2 * plan.span * sizes.layer_weights if "disk" in kinds else 0,
        "activations": activations,
        "moments": sum(sizes.moments) if plan.moments == "paged" else 0,
    }
    return {category: size for category, size in held.items() if size}
