"""A budget of device memory: how it is kept, and what was used of it at most.

A device's memory is held by PyTorch's allocator and, beyond it, by the context, libraries and CUDA graphs, and by other
processes. A budget counts all of it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from nybble.errors import UserError
from nybble.units import format_bytes

# What segments that expand grow by. PyTorch holds a request against the cap as it is, and then takes whole pages.
_PAGE_BYTES = 20 * 2**20


@dataclass(frozen=True)
class Peak:
    """Most bytes of a device in use since `reset_peak`; `beyond_bytes` as it is now.

    allocated: by tensors. reserved: by the allocator, with what it keeps for later. beyond: by all else.
    """

    allocated_bytes: int
    reserved_bytes: int
    beyond_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.reserved_bytes + self.beyond_bytes


# By GPU, the most that was allocated and reserved before `take_peak` had PyTorch, which counts one peak, begin anew.
_taken: dict[int, tuple[int, int]] = {}


def peak(device: torch.device) -> Peak:
    """The peak of `device`; all zero for a CPU, which has no device memory."""
    if device.type != "cuda":
        return Peak(0, 0, 0)
    _, reserved = _taken.get(_index(device), (0, 0))
    reserved = max(reserved, torch.cuda.max_memory_reserved(device))
    return Peak(peak_allocated_bytes(device), reserved, beyond_bytes(device))


def peak_allocated_bytes(device: torch.device) -> int:
    """Of `peak` for a GPU, what is had without asking the driver."""
    allocated, _ = _taken.get(_index(device), (0, 0))
    return max(allocated, torch.cuda.max_memory_allocated(device))


def take_peak(device: torch.device) -> tuple[int, int]:
    """Most bytes of a GPU allocated and reserved since this was called last; `peak` goes on over all of that time."""
    part = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    allocated, reserved = _taken.get(_index(device), (0, 0))
    _taken[_index(device)] = max(allocated, part[0]), max(reserved, part[1])
    torch.cuda.reset_peak_memory_stats(device)
    return part


def reset_peak(device: torch.device) -> None:
    """Count the peak of `device` from now on, beginning with what it holds."""
    if device.type == "cuda":
        _taken.pop(_index(device), None)
        torch.cuda.reset_peak_memory_stats(device)


def expand_segments() -> None:
    """Let PyTorch's allocator take a GPU's memory by pages, and give single pages back; before it is first asked.

    Segments of fixed size leave gaps: under a budget of 4.98 GiB a step of 8B found no 224 MiB among 1.09 GiB that were
    free. Steps are as fast (benchmarks/results/segments_h200.txt). Other settings of PYTORCH_ALLOC_CONF stay, and this
    one if it is among them. PyTorch has no public name for it, but that variable's; where it does not have this
    one either, plans are too low by what such gaps take.
    """
    set_options = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if set_options is None:
        return
    get_options = getattr(torch._C, "_accelerator_getAllocatorSettings", None)
    given = get_options() if get_options is not None else ""
    if "expandable_segments" not in given:
        set_options(",".join(filter(None, [given, "expandable_segments:True"])))


def beyond_bytes(device: torch.device) -> int:
    """Memory of a GPU in use that PyTorch's allocator has not taken."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def available_bytes(device: torch.device) -> int:
    """What tensors can still take of a GPU within the allocator's cap, fragmentation aside. For a CPU nothing is known.

    Memory that the allocator keeps for CUDA graphs counts as well, though only graphs can have it.
    """
    if device.type != "cuda":
        return sys.maxsize
    reserved = torch.cuda.memory_reserved(device)
    return unreserved_bytes(device) + reserved - torch.cuda.memory_allocated(device)


def unreserved_bytes(device: torch.device) -> int:
    """What the allocator can still take of a GPU within its cap."""
    free, _ = torch.cuda.mem_get_info(device)
    return min(free, max(allowed_bytes(device) - torch.cuda.memory_reserved(device), 0))


def allowed_bytes(device: torch.device) -> int:
    """The allocator's cap on a GPU; without one, all of its memory."""
    _, total = torch.cuda.mem_get_info(device)
    return int(torch.cuda.get_per_process_memory_fraction(_index(device)) * total)


def cap_allocator(budget_bytes: int, device: torch.device, *, expected_beyond_bytes: int = 0) -> int:
    """Let PyTorch's allocator take no more of a GPU than leaves all together within the budget; returns the cap.

    Beyond the allocator counts what is in use now, with context and cuBLAS, or `expected_beyond_bytes` if that is more:
    kernels are loaded, and graphs made, when they are first used. Call it again later to count anew. On a CPU it does
    nothing. Raises UserError if the budget leaves nothing.
    """
    if device.type != "cuda":
        return budget_bytes
    _load_libraries(device)
    beyond = max(beyond_bytes(device), expected_beyond_bytes)
    _, total = torch.cuda.mem_get_info(device)
    allowed = min(budget_bytes, total) - beyond
    if allowed <= _PAGE_BYTES:
        raise UserError(
            f"{format_bytes(budget_bytes)} of device memory leave nothing beside the {format_bytes(beyond)} that the "
            "context, libraries and other processes hold",
            where="memory.budget",
            fix="Give more, or end what else runs on the device.",
        )
    cap = allowed - _PAGE_BYTES
    torch.cuda.set_per_process_memory_fraction(cap / total, _index(device))
    return cap


def _load_libraries(device: torch.device) -> None:
    """Have the context made and cuBLAS loaded: they hold memory from their first use on."""
    square = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    torch.mm(square, square)
    torch.cuda.synchronize(device)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
