"""Low-rank corrections of quantized linears, kept beside a folder's weights as `correction.safetensors`.

Of each linear, by its path `P` in the model: `P.U` (out, R) and `P.V` (R, in), fp32, with weight - NF4 ~ U V on the
inputs of the text that the folder was calibrated on; for compensated codes on those behind corrected layers, and with
the weight that makes up for these. The first r columns of U and rows of V are the best of rank r.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from nybble.errors import UserError
from nybble.files import explain_corruption, write_bytes

FILE = "correction.safetensors"


@dataclass(frozen=True)
class Correction:
    """U (out, R) and V (R, in) of one linear."""

    U: Tensor
    V: Tensor

    def to(self, device: torch.device | str) -> Correction:
        return Correction(self.U.to(device), self.V.to(device))

    def rank(self, r: int) -> Correction:
        """The best correction of rank r at most."""
        return Correction(self.U[:, :r], self.V[:r])


def write_corrections(folder: Path, corrections: Iterable[tuple[str, Correction]]) -> None:
    """Write the corrections of a folder, by the paths of their linears, in one step."""
    tensors: dict[str, Tensor] = {}
    for path, correction in corrections:
        tensors[f"{path}.U"] = correction.U.cpu().contiguous()
        tensors[f"{path}.V"] = correction.V.cpu().contiguous()
    write_bytes(folder / FILE, save(tensors))


def read_corrections(folder: Path, paths: Sequence[str]) -> Mapping[str, Correction]:
    """The corrections of the linears `paths`; raises UserError if the folder has none, or lacks that of one of them.

    Raises it for a file that is corrupt or cut off too, without any path as well, which reads its header alone.
    """
    file = folder / FILE
    if not file.exists():
        fix = "Make it with `nybble quantize --calibration TEXT`."
        raise UserError(f"has no {FILE}, so it brings no corrections", where=folder, fix=fix)
    anew = "Fetch the folder again, or make it anew with `nybble quantize --calibration TEXT`."
    with explain_corruption(file, fix=anew), safe_open(file, framework="pt") as tensors:
        held = set(tensors.keys())
        missing = [path for path in paths if f"{path}.U" not in held]
        if missing:
            fix = "Leave them out with lora.exclude_modules, or calibrate on text that reaches them."
            raise UserError(f"brings no correction for {', '.join(missing[:3])}", where=file, fix=fix)
        return {path: Correction(tensors.get_tensor(f"{path}.U"), tensors.get_tensor(f"{path}.V")) for path in paths}
