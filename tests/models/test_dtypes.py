"""What `auto` means, and what a card without bf16 is told."""

from __future__ import annotations

import pytest
import torch

from nybble.models.dtypes import dtype_name, resolve_compute, resolve_device, resolve_storage

CPU = torch.device("cpu")


def test_a_cpu_computes_in_fp32_unless_told_otherwise() -> None:
    assert resolve_compute("auto", CPU) == torch.float32
    assert resolve_compute("bf16", CPU) == torch.bfloat16
    assert resolve_compute("fp16", CPU) == torch.float16


@pytest.mark.parametrize(("method", "storage"), [("qlora", "nf4"), ("full", "fp32"), ("lora", "auto")])
def test_storage_follows_the_method_unless_set(method: str, storage: str) -> None:
    assert resolve_storage("auto", method) == storage
    assert resolve_storage("bf16", method) == "bf16"


def test_names() -> None:
    assert dtype_name(torch.bfloat16) == "bf16"
    assert dtype_name(torch.float64) == "float64"


def test_the_device_is_the_gpu_if_there_is_one() -> None:
    assert resolve_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.gpu
def test_a_gpu_computes_in_what_it_has() -> None:
    has_bf16 = torch.cuda.get_device_capability() >= (8, 0)
    assert resolve_compute("auto", torch.device("cuda")) == (torch.bfloat16 if has_bf16 else torch.float16)
