"""Triton kernels without a GPU: the checks in `interpreted/` run under Triton's interpreter.

It must be on before a kernel is decorated, so they run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nybble.ops import triton


@pytest.mark.skipif(not triton.available(), reason="Triton is not installed here")
def test_kernels_agree_with_the_references() -> None:
    checks = Path(__file__).with_name("interpreted")
    command = [sys.executable, "-m", "pytest", "-o", "python_files=check_*.py", "-p", "no:cacheprovider", str(checks)]
    root = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
