"""Every kernel there is. A new one is listed here, through its file's `compile_cases`; a test finds what is missing."""

from __future__ import annotations

from nybble.ops.triton import (
    adamw,
    columns,
    cross_entropy,
    fp8,
    gather,
    glu,
    low_rank,
    nf4,
    norm,
    online_cross_entropy,
    rope,
)
from nybble.ops.triton.launch import Card, KernelCase


def compile_cases(card: Card) -> list[KernelCase]:
    """How each kernel is launched on `card`."""
    families = (adamw, columns, cross_entropy, fp8, gather, glu, low_rank, nf4, norm, online_cross_entropy, rope)
    return [case for family in families for case in family.compile_cases(card)]
