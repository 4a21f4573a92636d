"""Where an adapter comes from: the base it was trained on and how that base was held. Kept beside it as nybble.json."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from nybble.files import read_json, write_json
from nybble.settings import Section, parse_section
from nybble.versions import installed_versions

FILE = "nybble.json"


class Provenance(Section):
    """`base` and `base_fingerprint` name the checkpoint, `storage` how its weights were held while training."""

    base: str
    base_fingerprint: str
    storage: Literal["bf16", "fp16", "fp32", "nf4"]
    block_size: int | None = Field(default=None, description="weights per NF4 scale; None unless storage is nf4")
    double_quant: bool | None = Field(default=None, description="None unless storage is nf4")
    versions: dict[str, str] = Field(default_factory=installed_versions)

    def write(self, folder: Path) -> None:
        write_json(folder / FILE, self.model_dump())

    @classmethod
    def read(cls, folder: Path) -> Provenance | None:
        """What nybble.json in `folder` says; None without the file, as in a folder that another tool wrote."""
        path = folder / FILE
        return parse_section(cls, read_json(path), where=path) if path.exists() else None


def base_fingerprint(folder: Path, own: str) -> str:
    """The fingerprint that stands for the checkpoint in `folder`, whose own is `own`.

    A folder that nybble quantized stands for its original: the weights are the same, only held in another way.
    """
    recorded = Provenance.read(folder)
    return own if recorded is None else recorded.base_fingerprint
