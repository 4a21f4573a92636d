"""A checkpoint folder: found or fetched, checked as a whole, then read tensor by tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from nybble.errors import UserError, listed
from nybble.models.dtypes import DTYPES
from nybble.models.hub import SETTINGS_FILES, fetch, read_settings
from nybble.models.shards import INDEX, SINGLE, read_weight_map
from nybble.models.staging import read_onto
from nybble.models.tensorfile import TensorBlocks, TensorEntry, read_entries
from nybble.quant.bnb import from_bnb, part_keys, quantized_names, table_keys
from nybble.quant.weight import NF4Weight

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A Transformers model folder whose files were checked: every tensor that is named can be read."""

    name: str
    folder: Path
    entries: Mapping[str, TensorEntry]
    config: Mapping[str, Any]
    revision: str | None = None  # that was asked for; None: the default one, or a folder

    @classmethod
    def open(cls, name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Checkpoint:
        """Check the folder `name`, or the one fetched from the hub by that id.

        Raises UserError with every problem found: files missing, truncated or corrupt, an index that names tensors
        its files lack, no safetensors at all, a quantization that is not read here.
        """
        folder = _find(name, revision, trust_remote_code=trust_remote_code)
        config = read_settings(folder)
        _check_quantization(config, folder / "config.json")
        weight_map = read_weight_map(folder)
        files = tuple(folder / file for file in sorted(set(weight_map.values()))) or (_single_file(folder),)
        return cls(name, folder, _read_all(folder, files, weight_map), config, revision)

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of all tensors, sorted."""
        return tuple(sorted(self.entries))

    @cached_property
    def weights(self) -> tuple[str, ...]:
        """The names of the weights, sorted: a 4-bit weight is one name, without those of its scales and tables."""
        parts = {part for name, keys in self._nf4_parts.items() for part in keys if part != name}
        return tuple(key for key in self.keys if key not in parts)

    @property
    def nf4_weights(self) -> Set[str]:
        """The names of the weights that are held in NF4, as bitsandbytes writes it."""
        return self._nf4_parts.keys()

    def read(self, key: str) -> torch.Tensor:
        """One tensor as it is in the file, on the CPU; it owns its memory."""
        return self.entries[key].read()

    def mapped(self, name: str) -> torch.Tensor | NF4Weight:
        """One of `weights` as it is in the file, whose memory it has; see `TensorEntry.mapped`."""
        if name not in self.nf4_weights:
            return self.entries[name].mapped()
        held = self._nf4_parts[name]
        return from_bnb(name, {part: self.entries[part].mapped() for part in held})

    def read_nf4(self, key: str, device: torch.device | str = "cpu") -> NF4Weight:
        """One of `nf4_weights` on `device`, byte for byte."""
        return from_bnb(key, {part: self.read(part).to(device) for part in self._nf4_parts[key]})

    def stream(
        self, names: Sequence[str], device: torch.device, *, in_blocks: Set[str] = frozenset()
    ) -> Generator[torch.Tensor | TensorBlocks | NF4Weight, None, None]:
        """Those of `weights` on `device`, in the order given, read ahead of a GPU; NF4 byte for byte.

        in_blocks: 16- and 32-bit weights that come block by block if they are large; all blocks of one are to be taken
        before the next weight is. A GPU may still be copying what is yielded: use it on the stream that is current
        here.
        """
        moved = {name: self._moved_parts(name) for name in names}
        large = {name for name in in_blocks if self.entries[name].is_large}
        entries = [
            entry
            for name, parts in moved.items()
            for part in parts
            for entry in (self.entries[part].blocks() if name in large else [self.entries[part]])
        ]
        with closing(read_onto(entries, device)) as tensors:
            for name, parts in moved.items():
                if name in self.nf4_weights:
                    held = {part: self.read(part) for part in self._nf4_parts[name].difference(parts)}
                    yield from_bnb(name, held | {part: next(tensors) for part in parts})
                elif name in large:
                    entry = self.entries[name]
                    yield TensorBlocks(entry.shape, device, islice(tensors, len(entry.blocks())))
                else:
                    yield next(tensors)

    def position(self, key: str) -> tuple[str, int]:
        """Where a tensor lies: sorted by it, a whole checkpoint is read front to back."""
        return self.entries[key].file.name, self.entries[key].start

    def source_bytes(self, key: str) -> int:
        """Bytes in the files for one of `weights`."""
        return sum(self.entries[part].nbytes for part in self._nf4_parts.get(key, {key}))

    @property
    def settings_files(self) -> tuple[Path, ...]:
        """What lies beside the weights: configuration, tokenizer, chat template, generation settings, code."""
        found = (path for pattern in (*SETTINGS_FILES, "*.py") for path in sorted(self.folder.glob(pattern)))
        return tuple(path for path in found if path.name != INDEX)

    @property
    def total_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    @cached_property
    def dtype(self) -> torch.dtype:
        """bf16, fp16 or fp32, whichever most of its weights are in beside NF4."""
        numel = dict.fromkeys(DTYPES.values(), 0)
        for key in set(self.weights) - self.nf4_weights:
            entry = self.entries[key]
            if entry.dtype in numel:
                numel[entry.dtype] += entry.nbytes // entry.dtype.itemsize
        return max(numel, key=lambda dtype: numel[dtype]) if any(numel.values()) else torch.float32

    @property
    def max_positions(self) -> int | None:
        """Positions that the model has, None if config.json does not say."""
        text = self.config.get("text_config") or self.config  # of models that also see images
        return text.get("max_position_embeddings") or text.get("n_positions")  # GPT-2's name

    @property
    def codes_fingerprint(self) -> str | None:
        """The fingerprint, where the checkpoint brings NF4 codes; None: they are made from its weights."""
        return self.fingerprint if self.nf4_weights else None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the sorted names, dtypes, shapes and 4 x 256 bytes of each tensor, as hexadecimal digits.

        The bytes come from the start, the end and between, evenly: fine-tuning changes nearly every weight, so a
        sample tells two bases apart, and 16 GB take well under a second. How files are split does not matter.
        """
        digest = hashlib.sha256()
        for key in self.keys:
            entry = self.entries[key]
            digest.update(f"{key} {entry.dtype} {entry.shape}\n".encode())
            last = max(0, entry.nbytes - 256)
            for offset in sorted({last * part // 3 for part in range(4)}):
                digest.update(entry.read_bytes(offset, 256))
        return digest.hexdigest()

    def _moved_parts(self, name: str) -> list[str]:
        """The tensors of one of `weights` that a device needs, in the order of the files."""
        return sorted(self._nf4_parts.get(name, {name}).difference(table_keys(name)), key=self.position)

    @cached_property
    def _nf4_parts(self) -> dict[str, set[str]]:
        return {name: part_keys(name, self.entries) for name in quantized_names(self.entries)}


def _find(name: str, revision: str | None, *, trust_remote_code: bool) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise UserError("a folder has no revisions", where="model.revision", fix="Remove the setting.")
        return folder
    if folder.is_file():
        raise UserError("is a file; a model is a folder with config.json and safetensors files", where=name)
    return fetch(name, revision, with_code=trust_remote_code)


def _check_quantization(config: Mapping[str, Any], path: Path) -> None:
    quantization = config.get("quantization_config")
    if not quantization:
        return
    method = quantization.get("quant_method")
    if method == "bitsandbytes" and quantization.get("load_in_4bit"):
        kind = quantization.get("bnb_4bit_quant_type", "fp4")
        if kind == "nf4":
            return
        method = f"bitsandbytes {kind}"
    elif method == "bitsandbytes":
        method = "bitsandbytes int8"
    fix = "Use the model's 16-bit checkpoint: nybble quantizes it to NF4 while loading."
    raise UserError(f"its weights are quantized by {method}; only bitsandbytes' nf4 is read", where=path, fix=fix)


def _single_file(folder: Path) -> Path:
    if (folder / SINGLE).exists():
        return folder / SINGLE
    pickles = [path.name for pattern in _PICKLES for path in folder.glob(pattern)]
    if pickles:
        what = f"has its weights in pickle files only ({', '.join(sorted(pickles)[:3])}), which can run code when read"
        fix = "Use a revision with safetensors, or convert it: load it with Transformers and call save_pretrained."
        raise UserError(what, where=folder, fix=fix)
    raise UserError(f"has neither {SINGLE} nor {INDEX}", where=folder, fix="Fetch the checkpoint again.")


def _read_all(folder: Path, files: tuple[Path, ...], weight_map: Mapping[str, str]) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    problems = []
    for file in files:
        try:
            entries |= read_entries(file)
        except UserError as error:
            problems.append(f"{file.name}: {error.what}")
    absent = sorted(set(weight_map) - set(entries))
    if absent and not problems:
        problems.append(f"{INDEX} names tensors that its files lack: {', '.join(absent[:5])}")
    if problems:
        what = listed("the checkpoint is not whole:", problems)
        raise UserError(what, where=folder, fix="Fetch the checkpoint again.")
    return entries
