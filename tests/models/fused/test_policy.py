"""Whatever a plan says of activations and weights, outputs and gradients are the same to the bit."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from nybble.adapters.inject import adapter_parameters
from nybble.memory import saved
from nybble.memory.offload import HostStore
from nybble.memory.saved import SavedOnHost
from nybble.memory.transfer import SideStream
from nybble.models.fused import matrix, regions
from nybble.models.fused.body import FusedBody
from nybble.models.fused.matrix import HalfMatrix
from nybble.models.fused.policy import Units
from nybble.models.fused.recompute import Segment
from nybble.ops.fp8 import fp8_quantize_rows
from nybble.ops.glu import glu
from nybble.plan import Activations, LayerPolicy, MemoryPlan
from tests.models.fused.test_body import SAMPLES_A_ROW, model_in_bf16, model_of
from tests.models.test_packing import packed, relative_gap, samples

LAYERS = 4


def plan_of(activations: str, weights: str = "resident", **settings: Any) -> MemoryPlan:
    """The kinds of the layers, one for all or one each."""
    kinds, places = (list(words.split()) * (LAYERS // len(words.split())) for words in (activations, weights))
    layers = tuple(LayerPolicy(kind, place) for kind, place in zip(kinds, places, strict=True))
    return MemoryPlan(layers, **settings)


def body_of(model: PreTrainedModel, plan: MemoryPlan) -> FusedBody:
    return FusedBody(model, samples_a_row=SAMPLES_A_ROW, plan=plan)


def output_and_gradients(model: PreTrainedModel, body: FusedBody) -> list[Tensor]:
    input_ids, _, position_ids = packed(samples())
    model.zero_grad()
    hidden = body(input_ids, position_ids)
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3), dtype=hidden.dtype)
    (hidden * weights).sum().backward()
    return [hidden.detach(), *(parameter.grad for parameter in adapter_parameters(model).values())]


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) > 10
    assert all(tensor.abs().max() > 0 for tensor in expected)
    assert all(map(torch.equal, found, expected))


PLANS = {
    "keep_matmuls": plan_of("keep_matmuls"),
    "keep_on_host": plan_of("keep_on_host"),
    "recompute": plan_of("recompute"),
    "recompute two": plan_of("recompute", span=2),
    "recompute three": plan_of("recompute", span=3),
    "offload": plan_of("offload"),
    "offload without middle": plan_of("offload", keep_middle=False),
    "offload two": plan_of("offload", span=2),
    "mixed": plan_of("offload keep recompute keep_matmuls"),
    "mixed spans": plan_of("keep recompute recompute offload", span=2),
    "streamed": plan_of("keep", "streamed"),
    "some streamed": plan_of("keep_matmuls recompute keep offload", "streamed resident streamed streamed"),
    "streamed through one slot": plan_of("recompute", "streamed", stream_slots=1),
    "streamed spans": plan_of("recompute", "streamed", span=2, stream_slots=1),
}


@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "dense"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_plans_give_the_same_bits(plan: MemoryPlan, kind: str, nf4: bool) -> None:
    model = model_of(kind, nf4=nf4, num_layers=LAYERS)
    expected = output_and_gradients(model, body_of(model, plan_of("keep")))
    body = body_of(model, plan)
    for _ in range(2):
        assert_same_bits(output_and_gradients(model, body), expected)
        with torch.no_grad():
            assert torch.equal(body(*packed(samples())[::2]), expected[0])


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_plans_give_the_same_bits_in_fp8(plan: MemoryPlan, kind: str) -> None:
    model = model_in_bf16(kind, num_layers=LAYERS, head_dim=16)
    kept, body = (
        FusedBody(model, samples_a_row=SAMPLES_A_ROW, plan=chosen, precision="fp8")
        for chosen in (plan_of("keep"), plan)
    )
    assert_same_bits(output_and_gradients(model, body), output_and_gradients(model, kept))


@pytest.mark.parametrize("plan", [plan_of("keep"), plan_of("recompute"), plan_of("keep_matmuls")], ids=str)
def test_a_norm_quantizes_for_the_projection_behind_it(monkeypatch: pytest.MonkeyPatch, plan: MemoryPlan) -> None:
    """So that a block quantizes for two of four projections, and for four gradients; the bits are the same."""
    model = model_in_bf16("llama", num_layers=LAYERS)
    body = FusedBody(model, samples_a_row=SAMPLES_A_ROW, plan=plan, precision="fp8")
    calls: Counter[bool] = Counter()

    def counted(x: Tensor, column_scale: Tensor | None) -> tuple[Tensor, Tensor]:
        calls[column_scale is None] += 1
        values, scale = fp8_quantize_rows(x, column_scale)
        return values, scale

    monkeypatch.setattr(matrix, "fp8_quantize_rows", counted)
    found = output_and_gradients(model, body)
    again = LAYERS if plan.layers[0].activations == "recompute" else 0  # attention's output; the last one is not made
    assert calls == {True: 2 * LAYERS + again, False: 4 * LAYERS - 1}  # of the embeddings there is no gradient
    monkeypatch.setattr(matrix.Float8Matrix, "reads_fp8", False)
    calls.clear()
    assert_same_bits(output_and_gradients(model, body), found)
    assert calls[True] > 2 * LAYERS + again


@pytest.mark.parametrize("activations", ["recompute", "offload"])
@pytest.mark.parametrize("settings", [{}, {"span": 2}, {"keep_middle": False}], ids=str)
@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_an_mlp_by_rows(kind: str, activations: Activations, settings: dict[str, Any]) -> None:
    """Its products are summed in another order, so bits differ; rows of another number come out even or do not."""
    model = model_of(kind, num_layers=LAYERS)
    expected = output_and_gradients(model, body_of(model, plan_of("keep")))
    for rows in (16, 7, 1000):
        body = body_of(model, plan_of(activations, mlp_rows=rows, **settings))
        found = output_and_gradients(model, body)
        assert max(map(relative_gap, found, expected)) < 1e-12
        with torch.no_grad():
            assert relative_gap(body(*packed(samples())[::2]), expected[0]) < 1e-13


@pytest.mark.parametrize("activations", ["recompute", "offload"])
def test_no_more_rows_than_told_go_through_the_mlp(monkeypatch: pytest.MonkeyPatch, activations: str) -> None:
    seen: list[int] = []
    monkeypatch.setattr(regions, "glu", lambda gate_up, *rest: (seen.append(len(gate_up)), glu(gate_up, *rest))[1])
    model = model_of("llama", num_layers=LAYERS)
    tokens = packed(samples())[0].numel()
    output_and_gradients(model, body_of(model, plan_of(activations)))
    assert seen == 2 * LAYERS * [tokens]
    seen.clear()
    output_and_gradients(model, body_of(model, plan_of(activations, mlp_rows=16)))
    assert max(seen) == 16
    assert sum(seen) == 2 * LAYERS * tokens  # each once in a pass


def kept_values(model: PreTrainedModel, body: FusedBody) -> int:
    """Of activations, from the forward pass to the backward pass."""
    sizes: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in parameters:
            sizes[place] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = body(*packed(samples())[::2])
    assert hidden.requires_grad
    return sum(sizes.values())


def test_leaner_policies_keep_less() -> None:
    model = model_of("llama", num_layers=LAYERS)
    tokens, hidden = packed(samples())[0].numel(), model.config.hidden_size
    kept = {name: kept_values(model, body_of(model, plan)) for name, plan in PLANS.items() if "streamed" not in name}
    every = kept_values(model, body_of(model, plan_of("keep")))
    of_norms = every - kept["keep_matmuls"]
    assert of_norms == 2 * LAYERS * tokens * hidden  # the norms' values
    stream = tokens * (hidden + 1)  # and a number a token of each norm
    last = stream
    assert kept["recompute"] == LAYERS * stream + last
    assert kept["recompute two"] == LAYERS // 2 * stream + last
    assert kept["offload"] == 2 * LAYERS * stream + last  # on a CPU, where the host's memory is all there is


def test_leaner_for_one_step() -> None:
    model = model_of("llama", num_layers=LAYERS)
    body = body_of(model, plan_of("keep offload keep_matmuls recompute"))
    before = kept_values(model, body)
    expected = output_and_gradients(model, body)
    with body.leaner():
        assert kept_values(model, body) < before
        assert_same_bits(output_and_gradients(model, body), expected)
    assert kept_values(model, body) == before


@pytest.mark.parametrize(
    ("plan", "products", "materialized"),
    [
        (plan_of("keep"), 4, 4 + 4),
        (plan_of("recompute"), 4 + 3, 4 + 6),  # none for the down projection; gate and up once for both
        (plan_of("recompute", span=2), 4 + 3.5, 4 + 7),
        (plan_of("offload"), 4 + 2, 4 + 5),  # nor for the output of attention
        (plan_of("recompute", mlp_rows=16), None, 4 + 6),
    ],
    ids=["keep", "recompute", "two", "offload", "rows"],
)
def test_no_product_is_made_again_that_nobody_reads(
    monkeypatch: pytest.MonkeyPatch, plan: MemoryPlan, products: float | None, materialized: int
) -> None:
    """Counted a block, in both passes."""
    calls: Counter[str] = Counter()
    for name in ("product", "materialize"):
        original = getattr(HalfMatrix, name)

        def counted(*arguments: Any, name: str = name, original: Any = original) -> Any:
            calls[name] += 1
            return original(*arguments)

        monkeypatch.setattr(HalfMatrix, name, counted)
    model = model_of("llama", num_layers=LAYERS)
    output_and_gradients(model, body_of(model, plan))
    assert calls["materialize"] == LAYERS * materialized - 1  # the first block has no gradient of its input to make
    assert products is None or calls["product"] == LAYERS * products


def offloading(body: FusedBody) -> HostStore:
    """Let the recomputed parts of a body keep their streams in a store, as they do for a GPU."""
    store = HostStore(len(body.units.parts), SideStream(torch.device("cpu")))
    parts = [dataclasses.replace(part, store=store) if isinstance(part, Segment) else part for part in body.units]
    body.units = Units(parts, [store])
    return store


def keeping_on_host(monkeypatch: pytest.MonkeyPatch, body: FusedBody, kinds: str) -> SavedOnHost:
    """Let layers keep on the host what they save, as they do beside a GPU, however little it is."""
    monkeypatch.setattr(saved, "LEAST_ON_HOST_BYTES", 1)
    store = SavedOnHost(torch.device("cpu"))
    parts = [
        dataclasses.replace(part, store=store) if kind == "on_host" else part
        for part, kind in zip(body.units, kinds.split(), strict=True)
    ]
    body.units = Units(parts, [store])
    return store


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_what_is_kept_on_the_host_is_nowhere_else(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    model = model_of(kind, num_layers=LAYERS)
    expected = output_and_gradients(model, body_of(model, plan_of("keep")))
    body = body_of(model, plan_of("keep_on_host keep keep_on_host keep_on_host"))
    store = keeping_on_host(monkeypatch, body, "on_host kept on_host on_host")
    for _ in range(2):
        assert_same_bits(output_and_gradients(model, body), expected)
        assert len(store.layers) == 3
        assert not any(away.held or away.coming or away.here for layer in store.layers for away in layer.saved)
    pinned = store.host_bytes
    with torch.no_grad():
        body(*packed(samples())[::2])
    assert store.host_bytes == pinned


def test_a_leaner_step_finds_nothing_of_one_that_was_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", num_layers=LAYERS)
    body = body_of(model, plan_of("keep_on_host"))
    expected = output_and_gradients(model, body)
    store = keeping_on_host(monkeypatch, body, LAYERS * "on_host ")
    body(*packed(samples())[::2])
    assert any(away.held for away in store.layers[-1].saved)
    broken_off = list(store.layers)
    with body.leaner():
        assert not any(away.held or away.coming for layer in broken_off for away in layer.saved)
        assert_same_bits(output_and_gradients(model, body), expected)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_what_is_offloaded_is_not_kept(kind: str) -> None:
    model = model_of(kind, num_layers=LAYERS)
    expected = output_and_gradients(model, body_of(model, plan_of("keep")))
    body = body_of(model, plan_of("keep offload"))
    store = offloading(body)
    assert_same_bits(output_and_gradients(model, body), expected)
    halves = 2 if kind == "llama" else 1
    assert len(store.tickets) == 2 * halves
    lean = body_of(model, plan_of("offload"))
    offloading(lean)
    tokens = packed(samples())[0].numel()
    assert kept_values(model, lean) == LAYERS * halves * tokens + tokens * (model.config.hidden_size + 1)
    store.begin()
    with torch.no_grad():
        body(*packed(samples())[::2])
    assert not store.tickets


def test_streamed_weights_are_away_between_uses() -> None:
    model = model_of("llama", num_layers=LAYERS)
    expected = output_and_gradients(model, body_of(model, plan_of("keep")))
    body = body_of(model, plan_of("recompute", "resident streamed streamed streamed", stream_slots=1))
    assert body.stream is not None
    assert_same_bits(output_and_gradients(model, body), expected)
    assert body.stream.on_device == [1]
    assert body.stream.device_bytes < body.stream.host_bytes / 2


def test_a_plan_for_other_layers() -> None:
    with pytest.raises(ValueError, match="zip"):
        FusedBody(model_of("llama"), samples_a_row=1, plan=MemoryPlan.uniform(3))
