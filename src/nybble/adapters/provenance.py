"""Where an adapter comes from: the base it was trained on and how that base was held. Kept beside it as nybble.json."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from nybble.adapters.config import Init
from nybble.errors import UserError
from nybble.files import read_json, write_json
from nybble.settings import Section, parse_section
from nybble.versions import installed_versions

FILE = "nybble.json"

# search, weighted and compensated choose codes for less error; the last two by what a text makes the layers see.
Rounding = Literal["nearest", "search", "weighted", "compensated"]


class HeadCodes(Section):
    """How an output head was rounded to NF4 while its model was loaded, whatever the model's other weights are in."""

    rounding: Literal["nearest", "search"]
    block_size: int
    double_quant: bool


class Provenance(Section):
    """`base` and `base_fingerprint` name the checkpoint, `storage` how its weights were held while training."""

    base: str
    revision: str | None = Field(default=None, description="of a base on the hub; None: not said, its default")
    base_fingerprint: str
    storage: Literal["bf16", "fp16", "fp32", "nf4"]
    base_kept: bool = Field(default=True, description="false: base was made on the way, and only says what of")
    head: HeadCodes | None = Field(default=None, description="how the head was held in NF4; None: it was not")
    block_size: int | None = Field(default=None, description="weights per NF4 scale; None: no linear is in NF4")
    double_quant: bool | None = Field(default=None, description="None: no linear is in NF4")
    rounding: Rounding | None = Field(default=None, description="how NF4 codes were chosen; None: not said, nearest")
    calibration: str | None = Field(default=None, description="digest of the text that they were chosen for, if any")
    codes_fingerprint: str | None = Field(
        default=None, description="of the folder that brought them; None: they were made from the weights of the base"
    )
    init: Init = Field(default="plain", description="where the adapter began")
    residual_fingerprint: str | None = Field(
        default=None, description="of the base that it belongs to, where its start was taken out of the weights"
    )
    difference: bool = Field(default=False, description="it is what training changed, for the weights of the base")
    versions: dict[str, str] = Field(default_factory=installed_versions)

    def write(self, folder: Path) -> None:
        write_json(folder / FILE, self.model_dump())

    @property
    def base_in_words(self) -> str:
        return self.base if self.revision is None else f"{self.base} at revision {self.revision}"

    @property
    def belongs_to_nf4(self) -> bool:
        """Whether the weights that the adapter is to be added to are what NF4 makes of the base's."""
        return self.storage == "nf4" and not self.difference

    @property
    def counts_its_start(self) -> bool:
        """Whether the adapter holds more than training changed: on the weights of the base that would count twice."""
        return self.init != "plain" and not self.difference

    @property
    def codes(self) -> tuple[object, ...]:
        """What tells NF4 codes of the same weights apart, as far as it was said."""
        return self.rounding or "nearest", self.calibration, self.block_size, self.double_quant

    @property
    def codes_in_words(self) -> str:
        rounding, doubly = self.rounding or "nearest", "double" if self.double_quant else "no double"
        words = f"{rounding} rounding in blocks of {self.block_size} ({doubly} quantization)"
        return words + (f", calibrated on {self.calibration[:8]}" if self.calibration else "")

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


def check_codes(trained_on: Provenance, folder: Path, *, held: str | None) -> None:
    """Raise UserError unless the NF4 codes that an adapter was trained on can be had from the checkpoint in `folder`.

    held: the checkpoint's `codes_fingerprint`.
    """
    if not trained_on.belongs_to_nf4:
        return
    wanted = trained_on.codes_in_words
    if held is not None:
        known, recorded = trained_on.codes_fingerprint, Provenance.read(folder)
        fix = f"Give the folder that it was trained on: {trained_on.base_in_words}"
        if recorded is not None and recorded.codes != trained_on.codes:
            what = f"holds NF4 codes of {recorded.codes_in_words}; the adapter was trained on those of {wanted}"
            raise UserError(what, where=folder, fix=fix)
        if known is not None and known != held:
            what = f"holds other NF4 codes than those that the adapter was trained on, though of {wanted} too"
            raise UserError(what, where=folder, fix=fix)
    elif trained_on.calibration is not None:
        what = f"the adapter was trained on NF4 codes of {wanted}, which cannot be made from these weights again"
        fix = f"Give the prepared folder that it was trained on: {trained_on.base_in_words}"
        raise UserError(what, where=folder, fix=fix)
