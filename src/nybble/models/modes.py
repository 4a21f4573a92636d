"""Training and evaluation mode of a module, module by module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def kept_modes(module: nn.Module) -> Iterator[None]:
    """Afterwards each submodule is in the mode it was in."""
    modes = [(inner, inner.training) for inner in module.modules()]
    try:
        yield
    finally:
        for inner, training in modes:
            inner.training = training


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """No dropout inside; afterwards each submodule is in the mode it was in."""
    with kept_modes(module):
        module.eval()
        yield
