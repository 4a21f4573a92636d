"""Where Triton is not installed (macOS) the references are used, and nothing asks for it."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
sys.modules["triton"] = None  # every import of it fails
import torch
from nybble.quant.linear import NF4Linear, NF4Spec
module = NF4Linear.from_linear(torch.nn.Linear(64, 32), NF4Spec(), torch.float32)
print(module(torch.ones(1, 64)).shape)
"""


def test_layers_work_without_triton() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "torch.Size([1, 32])", result.stderr
