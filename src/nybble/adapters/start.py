"""Where an adapter began, if not at zero: kept beside it as `start.safetensors`.

Of each linear, by its path `P` in the model: `P.initial.A` (r, in) and `P.initial.B` (out, r), what the pair held
before the first step; where something was taken out of the base's weight first, `P.removed.A` and `P.removed.B` too.
A path in the metadata's list `removed_is_initial` had its initial pair taken out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from nybble.adapters.config import LoraConfig
from nybble.files import explain_corruption, write_bytes

FILE = "start.safetensors"

_SAME = "removed_is_initial"


@dataclass(frozen=True)
class Factors:
    """A (r, in) and B (out, r) of a weight scaling * B A."""

    A: Tensor
    B: Tensor
    scaling: float

    def product(self, device: torch.device) -> Tensor:
        """scaling * B A, (out, in) in fp32."""
        A, B = self.A.to(device, torch.float32), self.B.to(device, torch.float32)
        return self.scaling * (B @ A)

    def taken_out_of(self, weight: Tensor) -> Tensor:
        """The weight (out, in) without scaling * B A, in fp32."""
        return weight.float() - self.product(weight.device)

    def equals(self, other: Factors) -> bool:
        return torch.equal(self.A, other.A) and torch.equal(self.B, other.B)


@dataclass(frozen=True)
class AdapterStart:
    """initial: what each pair held before the first step. removed: what was taken out of the base's weights, if that.

    Without `removed` the adapter belongs to the checkpoint's own weights, or to what quantizing makes of them.
    """

    initial: Mapping[str, Factors]
    removed: Mapping[str, Factors] = field(default_factory=dict)

    def residual_fingerprint(self, base_fingerprint: str) -> str | None:
        """What names the weights of the checkpoint without `removed`; None where those are its own."""
        if not self.removed:
            return None
        digest = hashlib.sha256(base_fingerprint.encode())
        for path, factors in sorted(self.removed.items()):
            digest.update(f"{path} {factors.scaling!r}".encode())
            for tensor in (factors.A, factors.B):
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Of what `write` writes, its header aside."""
        return sum(tensor.nbytes for tensor in self._written()[0].values())

    def write(self, folder: Path) -> None:
        tensors, same = self._written()
        write_bytes(folder / FILE, save(tensors, metadata={_SAME: json.dumps(same)}))

    def _written(self) -> tuple[dict[str, Tensor], list[str]]:
        """The file's tensors, and the paths whose removed pair is the initial one and so is not among them."""
        same = [path for path, factors in self.removed.items() if factors.equals(self.initial[path])]
        apart = {path: factors for path, factors in self.removed.items() if path not in same}
        tensors: dict[str, Tensor] = {}
        for kind, pairs in (("initial", self.initial), ("removed", apart)):
            for path, factors in pairs.items():
                tensors[f"{path}.{kind}.A"] = factors.A.contiguous()
                tensors[f"{path}.{kind}.B"] = factors.B.contiguous()
        return tensors, same

    @classmethod
    def read(cls, folder: Path, config: LoraConfig) -> AdapterStart | None:
        """What is in `folder`, beside the adapter of `config`; None if there is nothing: the adapter began at zero."""
        file = folder / FILE
        if not file.exists():
            return None
        with explain_corruption(file), safe_open(file, framework="pt") as tensors:
            held = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  # it is no mapping
            same = json.loads((tensors.metadata() or {}).get(_SAME, "[]"))
        initial, removed = (_pairs(held, kind, config) for kind in ("initial", "removed"))
        return cls(initial, removed | {path: initial[path] for path in same})


def _pairs(tensors: Mapping[str, Tensor], kind: str, config: LoraConfig) -> dict[str, Factors]:
    end = f".{kind}.A"
    paths = [name.removesuffix(end) for name in tensors if name.endswith(end)]
    return {
        path: Factors(tensors[f"{path}{end}"], tensors[f"{path}.{kind}.B"], config.at(path).scaling) for path in paths
    }
