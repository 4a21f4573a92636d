"""Compile every Triton kernel for every supported card, without a GPU, and fail where one asks for too much.

Run by `make check`. Launch parameters are those that `nybble.ops.triton.launch` chooses for each card.
"""

from __future__ import annotations

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from nybble.ops.triton.catalog import compile_cases
from nybble.ops.triton.launch import CARDS, WARP_SIZE, Card, KernelCase


def compile_case(case: KernelCase, card: Card) -> CompiledKernel:
    """The kernel as it runs when pointers and sizes are multiples of 16, which PyTorch's allocations are."""
    signature = {name: case.signature.get(name, "constexpr") for name in case.kernel.arg_names}
    aligned = {place: [["tt.divisibility", 16]] for place in _places(list(signature.values()))}
    source = ASTSource(case.kernel, signature, constexprs=case.constants, attrs=aligned)
    major, minor = card.capability
    target = GPUTarget("cuda", 10 * major + minor, WARP_SIZE)
    return triton.compile(source, target=target, options={"num_warps": case.num_warps, **case.options})


def _places(types: list[str | tuple[str, ...]]) -> list[tuple[int, ...]]:
    """Where Triton looks for what it knows of each argument, items of tuples included."""
    return [
        place
        for i, kind in enumerate(types)
        if kind != "constexpr"
        for place in ([(i, j) for j in range(len(kind))] if isinstance(kind, tuple) else [(i,)])
    ]


def main() -> int:
    print(f"{'kernel':<22}{'target':>8}{'warps':>7}{'shared bytes':>14}{'of':>9}")
    too_large = []
    for card in CARDS:
        for case in compile_cases(card):
            compiled = compile_case(case, card)
            target = "sm_{}{}".format(*card.capability)
            shared = compiled.metadata.shared
            print(f"{case.name:<22}{target:>8}{case.num_warps:>7}{shared:>14,}{card.shared_bytes:>9,}")
            if shared > card.shared_bytes:
                too_large.append(
                    f"{case.name} on {target}: {shared:,} bytes of shared memory, {card.shared_bytes:,} there"
                )
    print(*too_large, sep="\n", file=sys.stderr)
    return 1 if too_large else 0


if __name__ == "__main__":
    sys.exit(main())
