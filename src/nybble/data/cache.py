"""What became of data, kept on the disk for the next run with the same data, tokenizer, template and settings.

`<key>.safetensors` has the tensors and `<key>.json` the rest; a key is never written with other contents.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nybble.data.template import special_texts
from nybble.errors import UserError
from nybble.files import cache_folder, read_json, write_bytes, write_json
from nybble.versions import installed_versions

_PACKAGES = ("transformers", "tokenizers", "jinja2", "datasets", "pyarrow")
_KEPT_SECONDS = 30 * 24 * 3600


def cache_key(settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, template: str | None) -> str:
    """A name for what `settings` (JSON values) make by means of `tokenizer` and `template`, and of this very code."""
    parts = {
        "settings": settings,
        "tokenizer": _tokenizer_facts(tokenizer),
        "template": template,
        "date": date.today().isoformat() if _tells_the_date(template, tokenizer.chat_template) else None,
        "versions": installed_versions(_PACKAGES),
        "code": [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(Path(__file__).parent.glob("*.py"))],
    }
    return _sha256(json.dumps(parts, sort_keys=True, default=str).encode())


def read(key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The tensors and facts kept under `key`; None if there are none, or not as they were written."""
    file = _folder() / f"{key}.safetensors"
    try:
        held = read_json(file.with_suffix(".json"))
        data = file.read_bytes()
        if not isinstance(held, dict) or held.pop("sha256", None) != _checksum(data, held):
            return None
        os.utime(file)  # it was of use
    except (UserError, OSError):
        return None
    return safetensors.torch.load(data), held


def write(key: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Keep both under `key`. A disk that is full or may not be written to is no error: the next run takes longer."""
    data = safetensors.torch.save(tensors)
    file = _folder() / f"{key}.safetensors"
    with contextlib.suppress(UserError, OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        _drop_unused(file.parent)
        write_bytes(file, data)
        write_json(file.with_suffix(".json"), facts | {"sha256": _checksum(data, facts)})


def _folder() -> Path:
    return cache_folder() / "data"


def _drop_unused(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        if time.time() - file.stat().st_mtime > _KEPT_SECONDS:
            file.unlink(missing_ok=True)
            file.with_suffix(".json").unlink(missing_ok=True)


def _tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "class": type(tokenizer).__qualname__,
        "model": _sha256(tokenizer.backend_tokenizer.to_str().encode()),
        "special": [special_texts(tokenizer), tokenizer.special_tokens_map],
        "ids": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "templates": tokenizer.chat_template,  # it may choose between several
    }


def _tells_the_date(*templates: object) -> bool:
    return "strftime_now" in str(templates)


def _checksum(data: bytes, facts: Mapping[str, Any]) -> str:
    return _sha256(data + json.dumps(facts, sort_keys=True).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
