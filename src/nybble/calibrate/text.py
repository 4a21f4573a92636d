"""Text for a calibration pass: windows of one length, so that every layer is called alike for all of them."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nybble.data.chat import Renderer
from nybble.data.formats import RowError, recognize
from nybble.data.source import Source
from nybble.errors import UserError
from nybble.files import explain_no_permission

_TEXT_FILES = {".txt", ".md", ".rst", ".py", ".tex"}
_CHARACTERS_AT_ONCE = 1 << 20  # for the tokenizer
_MULTIPLE = 8  # many windows are one of it: of 313, say, only single ones could go through a layer together


@dataclass(frozen=True)
class CalibrationText:
    """Tokens (windows, length) and what names them: where they are from, and a digest of the tokens themselves."""

    windows: Tensor
    source: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()

    @property
    def tokens(self) -> int:
        return self.windows.numel()


def read_calibration_text(
    path: str, tokenizer: PreTrainedTokenizerBase, *, tokens: int, length: int
) -> CalibrationText:
    """About `tokens` tokens of `path` in windows of `length`: whole ones only, spread evenly over all that is there.

    path: a file of plain text, or rows as for training (a file, a folder, a hub dataset), by the chat template where
    they are chats. Raises UserError if it holds less than one window.
    """
    ids = _tokens(_texts(path, tokenizer), tokenizer)
    there = len(ids) // length
    wanted = min(there, max(1, tokens // length))
    if wanted > _MULTIPLE:
        wanted -= wanted % _MULTIPLE
    if there == 0:
        what = f"holds {len(ids)} tokens, less than one window of {length}"
        raise UserError(what, where=path, fix="Give more text, or ask for fewer tokens of it.")
    windows = ids[: there * length].view(there, length)
    if there > wanted:
        windows = windows[torch.arange(wanted) * there // wanted]
    return CalibrationText(windows.to(torch.int64, memory_format=torch.contiguous_format), path)


def _texts(path: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    file = Path(path).expanduser()
    if file.suffix.lower() in _TEXT_FILES and file.is_file():
        return _plain(file)
    return _rows(path, tokenizer)


def _plain(file: Path) -> Iterator[str]:
    """A file of plain text in pieces of whole lines."""
    try:
        with explain_no_permission(file), file.open(encoding="utf-8-sig") as stream:
            while lines := stream.readlines(_CHARACTERS_AT_ONCE):
                yield "".join(lines)
    except UnicodeDecodeError:
        raise UserError("is not UTF-8 text", where=file) from None


def _rows(path: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    renderer = Renderer(tokenizer)
    end = tokenizer.eos_token or ""
    for row in Source.find(path).rows():
        try:
            renderings = renderer.render(recognize(row))
        except RowError as error:
            raise UserError(str(error), where=row.where) from None
        yield from (rendered.text + (end if rendered.add_eos else "") for rendered in renderings)


def _tokens(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """All of them in int32: of a long text most are not taken, and a list would hold some 40 bytes for each."""
    ids = array("i")
    for text in texts:
        # Rendered chats bring their own BOS; in the middle of a window none is wanted.
        ids.extend(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    return torch.frombuffer(ids, dtype=torch.int32) if ids else torch.empty(0, dtype=torch.int32)
