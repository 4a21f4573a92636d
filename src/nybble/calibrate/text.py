"""Text for a calibration: windows of one length, so that every layer is called alike for all of them."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nybble.data.chat import Renderer
from nybble.data.encode import Encoder
from nybble.data.formats import RowError, recognize
from nybble.data.source import Source
from nybble.data.template import Rendered
from nybble.errors import UserError

_TEXT_FILES = {".txt", ".md", ".rst", ".py", ".tex"}
_CHARACTERS_AT_ONCE = 1 << 20  # for the tokenizer
_MULTIPLE = 8  # many windows are one of it: of 313, say, only single ones could go through a layer together


@dataclass(frozen=True)
class CalibrationText:
    """Tokens (windows, length) and what names them: where they are from, and a digest of the tokens themselves.

    counted: at which of them the prediction of the next counts, bool of the same shape.
    """

    windows: Tensor
    counted: Tensor
    source: str

    @classmethod
    def alike(cls, windows: Tensor, source: str) -> CalibrationText:
        """All predictions count."""
        return cls(windows, torch.ones_like(windows, dtype=torch.bool), source)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.windows.numpy().tobytes() + self.counted.numpy().tobytes()).hexdigest()

    @property
    def tokens(self) -> int:
        return self.windows.numel()


def read_calibration_text(
    path: str, tokenizer: PreTrainedTokenizerBase, *, tokens: int, length: int
) -> CalibrationText:
    """About `tokens` tokens of `path` in windows of `length`: whole ones only, spread evenly over all that is there.

    path: a file of plain text, or rows as for training (a file, a folder, a hub dataset), by the chat template where
    they are chats; of these the predictions count that training would count. Raises UserError if it holds less than one
    window.
    """
    file = Path(path).expanduser()
    if file.suffix.lower() in _TEXT_FILES and file.is_file():
        ids = _plain(file, tokenizer)
        counted = torch.ones_like(ids, dtype=torch.bool)
    else:
        ids, counted = _rows(path, tokenizer)
    there = len(ids) // length
    wanted = min(there, max(1, tokens // length))
    if wanted > _MULTIPLE:
        wanted -= wanted % _MULTIPLE
    if there == 0:
        what = f"holds {len(ids)} tokens, less than one window of {length}"
        raise UserError(what, where=path, fix="Give more text, or ask for fewer tokens of it.")
    taken = torch.arange(wanted) * there // wanted
    windows, counted = (whole[: there * length].view(there, length)[taken] for whole in (ids, counted))
    text = CalibrationText(windows.to(torch.int64), counted, path)
    return text if bool(counted.any()) else CalibrationText.alike(text.windows, path)


def _plain(file: Path, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """All tokens of a file of plain text, int32: of a long one most are not taken, and a list would hold 40 bytes each.

    It is read in pieces of whole lines.
    """
    ids = array("i")
    try:
        with file.open(encoding="utf-8-sig") as stream:
            while lines := stream.readlines(_CHARACTERS_AT_ONCE):
                ids.extend(tokenizer("".join(lines), add_special_tokens=False, verbose=False).input_ids)
    except UnicodeDecodeError:
        raise UserError("is not UTF-8 text", where=file) from None
    return torch.frombuffer(ids, dtype=torch.int32) if ids else torch.empty(0, dtype=torch.int32)


def _rows(path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """All tokens of rows, int32, and at which of them the next one is to be predicted."""
    ids, trained = array("i"), bytearray()
    for encoded in Encoder(tokenizer, sys.maxsize).encode(_rendered(path, tokenizer)):
        ids.frombytes(encoded.example.input_ids.numpy().tobytes())
        trained += encoded.example.trained.numpy().tobytes()
    trained.append(False)  # behind the last one
    if not ids:
        return torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.bool)
    return torch.frombuffer(ids, dtype=torch.int32), torch.frombuffer(trained, dtype=torch.bool)[1:]


def _rendered(path: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, Rendered]]:
    renderer = Renderer(tokenizer)
    for number, row in enumerate(Source.find(path).rows()):
        try:
            renderings = renderer.render(recognize(row))
        except RowError as error:
            raise UserError(str(error), where=row.where) from None
        # Chats bring their own BOS; in the middle of a window no other is wanted.
        yield from ((number, replace(rendered, add_bos=False)) for rendered in renderings)
