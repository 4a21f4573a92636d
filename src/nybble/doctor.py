"""What this machine can do: its device, the versions found, and three small computations whose results are known."""

from __future__ import annotations

import os
import platform
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from nybble.adapters.config import LoraConfig
from nybble.adapters.inject import inject
from nybble.models.dtypes import dtype_name, resolve_compute, resolve_device
from nybble.ops import triton
from nybble.ops.nf4 import LEVELS
from nybble.quant.format import NF4Spec
from nybble.quant.linear import NF4Linear
from nybble.quant.weight import NF4Weight
from nybble.train.card import card_here
from nybble.units import format_bytes
from nybble.versions import PACKAGES, installed_versions


@dataclass(frozen=True)
class Check:
    """A self-test and how it went; `detail` says what was seen."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Diagnosis:
    """facts: what was found, by name, for people to read."""

    facts: dict[str, str]
    checks: list[Check]

    @property
    def healthy(self) -> bool:
        return all(check.passed for check in self.checks)


def diagnose() -> Diagnosis:
    """Look at this machine and run the self-tests on its device (a few seconds)."""
    device = resolve_device()
    tests: dict[str, Callable[[torch.device], str]] = {
        "NF4 gives the known bytes": check_known_bytes,
        "NF4 on the device equals the reference": check_against_reference,
        "a LoRA step over NF4 lowers the loss": check_lora_step,
    }
    return Diagnosis(_facts(device), [_run(name, test, device) for name, test in tests.items()])


def check_known_bytes(device: torch.device) -> str:
    """A block of 64 values that lie on the sixteen levels has these bytes and comes back as it was."""
    block = torch.tensor(LEVELS, device=device).repeat(4) * 3.0
    weight = NF4Weight.quantize(block, NF4Spec(block_size=64, group_size=0))
    expected = bytes.fromhex("0123456789abcdef") * 4
    found = bytes(weight.codes.cpu().tolist())
    if found != expected:
        raise ArithmeticError(f"{found.hex()} instead of {expected.hex()}")
    if not torch.equal(weight.dequantize(torch.float32), block):
        raise ArithmeticError("the values differ after quantizing and dequantizing")
    return f"{found[:8].hex()} four times"


def check_against_reference(device: torch.device) -> str:
    """Bytes made on the device and on the CPU from one random weight whose blocks cross its rows."""
    values = torch.randn(192, 1000, generator=torch.Generator().manual_seed(0))
    reference = NF4Weight.quantize(values, NF4Spec())
    weight = NF4Weight.quantize(values.to(device), NF4Spec())
    differing = int((weight.codes.cpu() != reference.codes).sum())
    # A GPU's reciprocal may be one unit in the last place off, which moves a value that lies on a midpoint.
    allowed = 0 if device.type == "cpu" else reference.codes.numel() // 10_000
    if differing > allowed:
        raise ArithmeticError(f"{differing} of {reference.codes.numel()} bytes differ")
    dequantized = reference.dequantize(torch.float32)
    error = float((dequantized - values).norm() / values.norm())
    return f"{differing} of {reference.codes.numel()} bytes differ; relative error {error:.4f} on normal weights"


def check_lora_step(device: torch.device) -> str:
    """One step of gradient descent on an adapter over an NF4 layer, as in training."""
    compute = resolve_compute("auto", device)
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(256, 128)
    linear.weight.data = torch.randn(128, 256, generator=generator) / 16
    model = nn.Sequential(NF4Linear.from_linear(linear.to(device), NF4Spec(), compute))
    inject(model, LoraConfig(r=8, target_modules=("0",)))
    x = torch.randn(64, 256, generator=generator).to(device)
    target = torch.randn(64, 128, generator=generator).to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    before = _step(model, x, target, optimizer)
    after = _step(model, x, target, optimizer)
    if not after < before:
        raise ArithmeticError(f"loss {before:.4f} -> {after:.4f}")
    return f"loss {before:.4f} -> {after:.4f}, arithmetic in {dtype_name(compute)}"


def _step(model: nn.Module, x: torch.Tensor, target: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
    loss = (model(x).float() - target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _run(name: str, test: Callable[[torch.device], str], device: torch.device) -> Check:
    try:
        return Check(name, True, test(device))
    except Exception as error:  # a broken driver or kernel may raise anything, and that is the finding
        reason = traceback.format_exception_only(error)[-1].strip()
        return Check(name, False, reason)


def _facts(device: torch.device) -> dict[str, str]:
    packages = installed_versions([*PACKAGES, "peft", "bitsandbytes"])
    return {
        "python": f"{platform.python_version()} on {platform.platform()}",
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items()),
        "host": _host(),
        "device": _card(device) if device.type == "cuda" else "CPU (no CUDA device found)",
        "planner": _planner(device),
        "arithmetic": f"{dtype_name(resolve_compute('auto', device))} (model.compute: auto)",
        "kernels": _kernels(device),
    }


def _host() -> str:
    memory = f", {format_bytes(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))}" if os.name == "posix" else ""
    return f"{os.cpu_count()} cores, {torch.get_num_threads()} threads{memory}"


def _card(device: torch.device) -> str:
    card = torch.cuda.get_device_properties(device)
    count = torch.cuda.device_count()
    several = f"{count} x " if count > 1 else ""
    memory = format_bytes(card.total_memory)
    return f"{several}{card.name}, sm_{card.major}{card.minor}, {memory}, CUDA {torch.version.cuda}"


def _planner(device: torch.device) -> str:
    """What `nybble plan` and runs reckon with here."""
    card = card_here(device)
    host = f"{format_bytes(card.host_bytes)} of host memory for what a run keeps there"
    if device.type != "cuda":
        return host
    return (
        f"{format_bytes(card.memory_bytes)} of device memory, {host}; {card.bf16_flops / 1e12:.0f} TFLOP/s in bf16, "
        f"{card.bandwidth / 1e9:.0f} GB/s, {card.link / 1e9:.0f} GB/s from the host"
    )


def _kernels(device: torch.device) -> str:
    if not triton.available():
        return "PyTorch reference (Triton is not installed)"
    if device.type != "cuda":
        return "PyTorch reference (Triton's kernels are for CUDA devices)"
    from nybble.ops.triton.catalog import compile_cases
    from nybble.ops.triton.launch import card_of

    names = sorted({case.name for case in compile_cases(card_of(device))})
    return f"Triton: {', '.join(names)}"
