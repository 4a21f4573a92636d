"""The device at hand as the planner sees it."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from nybble.memory.budget import beyond_bytes, cap_allocator
from nybble.memory.host import available_host_bytes
from nybble.planner.cards import DeviceSpec, card_of_device

# Of a core, products in fp32: 32 operations a cycle at 2 GHz. Only how plans compare depends on it.
_CORE_FLOPS = 64e9
_HOST_BANDWIDTH = 10e9
# Of what is left of the host: data, tokenizer, files on their way and other processes need some too.
_HOST_SHARE = 0.8


def card_within(budget_bytes: int | None, device: torch.device) -> DeviceSpec:
    """`card_here`, and the allocator capped if there is a budget."""
    card = card_here(device)
    if budget_bytes:
        cap_allocator(budget_bytes, device, expected_beyond_bytes=card.context_bytes)
    return card


def card_here(device: torch.device) -> DeviceSpec:
    """What this process may use of `device` and of the host.

    Of a GPU, what other processes do not hold now; a CPU's memory is the host's.
    """
    host_bytes = int(_HOST_SHARE * available_host_bytes())
    if device.type != "cuda":
        flops = _CORE_FLOPS * (os.cpu_count() or 1)
        return DeviceSpec(
            "CPU",
            host_bytes,
            flops,
            0.0,
            _HOST_BANDWIDTH,
            _HOST_BANDWIDTH,
            (0, 0),
            context_bytes=0,
            host_bytes=host_bytes,
        )
    properties = torch.cuda.get_device_properties(device)
    _, total = torch.cuda.mem_get_info(device)
    found = card_of_device(properties.name, total, (properties.major, properties.minor))
    # This process's own context is in use already, and part of what is predicted.
    others_bytes = max(0, beyond_bytes(device) - found.context_bytes)
    return replace(
        found,
        memory_bytes=total - others_bytes,
        multiprocessors=properties.multi_processor_count,
        host_bytes=host_bytes,
    )
