"""Every kernel is compiled by `make check`, with what each card can hold."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import nybble.ops.triton
from nybble.ops import triton

FOLDER = Path(nybble.ops.triton.__file__).parent
pytestmark = pytest.mark.skipif(not triton.available(), reason="Triton is not installed here")


def kernels_in(file: Path) -> set[str]:
    """Names of the functions in `file` that are decorated with triton.jit and called by no other such function."""
    functions = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    jitted = [f for f in functions if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)]
    called = {ast.unparse(node.func) for f in jitted for node in ast.walk(f) if isinstance(node, ast.Call)}
    return {f.name for f in jitted} - called


def test_every_kernel_is_listed() -> None:
    from nybble.ops.triton.catalog import compile_cases
    from nybble.ops.triton.launch import CARDS

    written = set().union(*(kernels_in(file) for file in FOLDER.glob("*.py")))
    assert {"quantize_kernel", "dequantize_kernel"} <= written
    for card in CARDS:
        has_fp8 = card.capability >= (8, 9)
        expected = written if has_fp8 else written - kernels_in(FOLDER / "fp8.py")
        assert {case.kernel.fn.__name__ for case in compile_cases(card)} == expected
