"""What a plan needs: the bytes of every phase of a run, and the time of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from nybble.plan import MemoryPlan
from nybble.planner.allocator import Allocator
from nybble.planner.cards import DeviceSpec
from nybble.planner.holdings import on_device, on_host, stacked, staging, weights_on_device
from nybble.planner.prediction import Phase, Prediction
from nybble.planner.run_shape import RunShape
from nybble.planner.shapes import ModelShape
from nybble.planner.sizes import Sizes
from nybble.planner.speed import Clock
from nybble.planner.step import MicroBatch
from nybble.planner.stock import StockStep
from nybble.planner.tape import Passage, at_peak, replay, rounded

MIB = 2**20
# cuBLAS keeps a workspace for each thread that multiplies, the loop's and autograd's.
_CUBLAS_THREADS, _CUBLAS_BYTES, _CUBLAS_BYTES_HOPPER = 2, 8_519_680, 32 * MIB
# Loading holds a block of a tensor on the device, in 16 bits, fp32 scales and what is made of it; and on the host four
# buffers through which files are read (`nybble.models.staging`).
_LOAD_DEVICE_BYTES, _LOAD_HOST_BYTES = 160 * MIB, 256 * MIB
# A merge holds blocks of rows on their way through fp32: `nybble.export.merged`.
_MERGE_HOST_BYTES = 512 * MIB

Parts = Mapping[str, int]


def predict(model: ModelShape, run: RunShape, device: DeviceSpec, plan: MemoryPlan) -> Prediction:
    """What `run` needs under `plan`: device and host bytes of its phases, and the seconds of an optimizer step.

    Moments that may be paged count as resident where the device has room for them.
    """
    return Costs(Sizes(model, run), device, plan).prediction()


def workspaces(device: DeviceSpec) -> int:
    """Bytes that cuBLAS holds."""
    return _CUBLAS_THREADS * (_CUBLAS_BYTES_HOPPER if device.capability[0] in (9, 10) else _CUBLAS_BYTES)


def beyond(device: DeviceSpec, sizes: Sizes, *, from_disk: bool) -> int:
    """Bytes that show in use beside the allocator."""
    return device.context_bytes + (device.graph_bytes if has_graph(sizes, from_disk=from_disk) else 0)


def has_graph(sizes: Sizes, *, from_disk: bool) -> bool:
    """Whether steps run as a CUDA graph: reading files cannot be part of one."""
    return sizes.run.cuda_graph and sizes.run.is_fused(sizes.model) and not from_disk


def load_phase(sizes: Sizes, device: DeviceSpec, plan: MemoryPlan) -> Phase:
    """What loading needs of device and host."""
    weights = sum(rounded(size) for _, size in weights_on_device(sizes, plan))
    on_card = {"weights": weights, "blocks": _LOAD_DEVICE_BYTES, "context": device.context_bytes}
    host = on_host(sizes, plan, 0)
    return Phase(on_card, {"blocks": _LOAD_HOST_BYTES} | {"weights": host.get("weights", 0)})


@dataclass(frozen=True)
class Costs:
    sizes: Sizes
    device: DeviceSpec
    plan: MemoryPlan

    def prediction(self) -> Prediction:
        step = at_least = self._step(moments_resident=True)
        if self.plan.moments == "paged" and step.device_bytes > self.device.memory_bytes:
            at_least = self._step(moments_resident=False)
            step = self._with_moments(at_least)
        reserved = step.device_bytes - step.device["context"]
        phases = {"load": load_phase(self.sizes, self.device, self.plan), "step": step}
        if self.sizes.run.evaluation_len:
            phases["evaluation"] = self._evaluation(at_least)
        phases |= {"save": self._save(at_least), "merge": Phase({}, {"blocks": _MERGE_HOST_BYTES})}
        return Prediction(
            self.plan,
            phases,
            reserved - step.device.get("fragmentation", 0) - step.device.get("CUDA graph", 0),
            reserved,
            Clock(self.sizes, self.device).of_plan(self.plan),
            self.sizes.run.tokens_a_step,
        )

    @property
    def _fused(self) -> bool:
        return self.sizes.run.is_fused(self.sizes.model)

    @property
    def _has_graph(self) -> bool:
        return has_graph(self.sizes, from_disk=any(layer.weights == "disk" for layer in self.plan.layers))

    @cached_property
    def _micro_batch(self) -> MicroBatch:
        return MicroBatch(self.sizes, self.device, self.plan, self.sizes.run.batch, self.sizes.run.seq_len)

    @cached_property
    def _passages(self) -> list[Passage]:
        return self._micro_batch.training()

    @cached_property
    def _stock(self) -> StockStep:
        return StockStep(self.sizes, self.plan, self.sizes.run.tokens)

    def _held(self, *, moments_resident: bool) -> tuple[dict[str, int], int]:
        """By category, and what the allocator reserves for it."""
        held: dict[str, int] = {"weights": 0}
        pool = Allocator()
        for number, (category, size) in enumerate(on_device(self.sizes, self.plan, moments_resident=moments_resident)):
            pool.take((number, category), rounded(size))
            held[category] = held.get(category, 0) + rounded(size)
        return held, pool.reserved + self.lost_by_stacking

    def _with_moments(self, step: Phase) -> Phase:
        """`step`, which leaves moments at home, as far as they lie on the device all the same.

        They do where tensors have room beside them; what the allocator loses is found out in a step, which fills the
        device before they leave.
        """
        room, moments = self.device.memory_bytes - step.device_bytes, sum(self.sizes.moments)
        lost = sum(step.device.get(category, 0) for category in ("fragmentation", "CUDA graph"))
        if not 0 < room < moments <= room + lost:
            return step
        return Phase(_sum(step.device, {"moments": room}), step.host)

    @cached_property
    def lost_by_stacking(self) -> int:
        """Parts of pages that stay between matrices when those beside them have moved: 0.9 GiB of 8B in 16 bits."""
        pool = Allocator().run(stacked(self.sizes, self.plan)).give_back()
        return pool.reserved - pool.allocated

    def _step(self, *, moments_resident: bool) -> Phase:
        held, reserved = self._held(moments_resident=moments_resident)
        taken, reserved_by_steps = self._taken if self._fused else self._taken_by_stock()
        if not moments_resident and staging(self.sizes) > sum(taken.values()):  # in the update, all else is given back
            taken, reserved_by_steps = {"paging": staging(self.sizes)}, staging(self.sizes)
        device = _sum(held, taken, {"workspaces": workspaces(self.device)})
        device["fragmentation"] = reserved + reserved_by_steps + workspaces(self.device) - sum(device.values())
        device["context"] = self.device.context_bytes
        if self._has_graph:
            device["CUDA graph"] = self.device.graph_bytes
        return Phase(device, on_host(self.sizes, self.plan, self._micro_batch.host_bytes(self._micro_batch.units)))

    @cached_property
    def _taken(self) -> tuple[dict[str, int], int]:
        """By category at the peak of a micro-batch, and what the allocator reserves for one after another.

        Steps run on a stream of their own, whose pool begins empty. The second finds other free blocks than the first.
        """
        pool, events = Allocator(), list(replay(self._passages))
        for _ in range(2):
            pool.run(events)
        taken = at_peak(self._passages)
        taken["rounding"] = pool.most_allocated - sum(taken.values())
        return taken, pool.reserved

    def _taken_by_stock(self) -> tuple[dict[str, int], int]:
        taken = self._stock.training()
        total = sum(taken.values())
        return taken, total + self._stock.fragments(total)

    def _evaluation(self, step: Phase) -> Phase:
        """Beside the memory of a graph, which only steps can use; if that is too much, the graph is given up for it."""
        run = self.sizes.run
        passing = MicroBatch(self.sizes, self.device, self.plan, run.batch, run.evaluation_len)
        if self._fused:
            passages = passing.evaluation()
            taken, pool = at_peak(passages), Allocator().run(replay(passages))
            taken["fragmentation"] = pool.reserved - sum(taken.values())
        else:
            taken = StockStep(self.sizes, self.plan, passing.tokens).evaluation()
        rest = _at_rest(step)
        alone = Phase(_sum(rest, taken), step.host)
        if not self._has_graph:
            return alone
        graph = {"step's graph": step.device_bytes - sum(rest.values())}
        beside = Phase(_sum(rest, taken, graph), step.host)
        return beside if beside.device_bytes <= self.device.memory_bytes else alone

    def _save(self, step: Phase) -> Phase:
        copies = self.sizes.trained + sum(self.sizes.moments)
        return Phase(_at_rest(step), _sum(step.host, {"copies": copies}))


# What is there between two steps, too.
_AT_REST = (
    "weights", "adapters", "adapter copies", "gradients", "moments", "streaming slots", "workspaces", "context",
    "CUDA graph",
)  # fmt: skip


def _at_rest(step: Phase) -> dict[str, int]:
    return {category: size for category, size in step.device.items() if category in _AT_REST}


def _sum(*parts: Parts) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        for category, size in part.items():
            total[category] = total.get(category, 0) + size
    return total
