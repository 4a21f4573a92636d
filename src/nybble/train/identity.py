"""All that decides a run's numbers, as flat names and values: two runs with the same are the same run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nybble.config import RunConfig
from nybble.data.example import Example

# These change where files lie or how often something is looked at, not what is computed. Base and data are compared
# by what they hold, so both may have moved.
_WITHOUT_EFFECT = {
    "output",
    "model.name",
    "model.revision",
    "data.path",
    "data.validation_path",
    "data.cache",
    "lora.save_as",
    "memory.budget",
    "memory.activations",
    "memory.weights",
    "memory.embedding",
    "memory.head",
    "memory.moments",
    "memory.span",
    "memory.mlp_rows",
    "train.fused",
    "train.cuda_graph",
    "train.eval_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.trackers",
}


def run_settings(
    config: RunConfig,
    *,
    base_fingerprint: str,
    train: Iterable[Example],
    held_out: Sequence[Example],
    compute: str,
    processes: int,
) -> dict[str, Any]:
    """JSON values by dotted names. compute: the dtype that `model.compute` came to on this device.

    Held-out rows are compared too: they train nothing, but losses of two sets have no best one among them.
    """
    settings = {name: value for name, value in flatten(config.model_dump(mode="json")) if name not in _WITHOUT_EFFECT}
    found = {
        "base weights": base_fingerprint,
        "training tokens": digest_examples(train),
        "held-out tokens": digest_examples(held_out) if held_out else None,
        "processes": processes,
    }
    return settings | found | {"model.compute": compute}


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """`{"lora": {"r": 8}}` -> ("lora.r", 8). An empty section is a value."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def digest_examples(examples: Iterable[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(example.lengths).encode())
        digest.update(example.input_ids.numpy().tobytes())
        digest.update(example.trained.numpy().tobytes())
    return digest.hexdigest()
