"""The label of tokens without loss, as in PyTorch and Transformers: where data and loss meet."""

from __future__ import annotations

IGNORED = -100
