"""Fetching a model from the Hugging Face hub: only files that are read, and no pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from nybble.errors import UserError
from nybble.files import read_json

SETTINGS_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")


def fetch(name: str, revision: str | None, *, with_code: bool) -> Path:
    """The folder in the hub's cache with the model `name`: settings, tokenizer and safetensors.

    `with_code` fetches the Python files too. Raises UserError when the id is unknown, gated, or cannot be reached.
    """
    from nybble.models.shards import SINGLE, read_weight_map  # torch, which `read_model_config` does without

    patterns = [*SETTINGS_FILES, "*.py"] if with_code else list(SETTINGS_FILES)
    folder = _snapshot(name, revision, patterns)
    # Repositories also carry the same weights under other names (consolidated.safetensors, original/...).
    files = sorted(set(read_weight_map(folder).values())) or [SINGLE]
    return _snapshot(name, revision, [*patterns, *files])


def read_model_config(name: str, revision: str | None = None) -> dict[str, Any]:
    """config.json of the folder or hub model `name`, without anything else of it. Raises UserError if there is none."""
    folder = Path(name).expanduser()
    return read_settings(folder if folder.is_dir() else _snapshot(name, revision, ["config.json"]))


def read_settings(folder: Path) -> dict[str, Any]:
    """config.json of a model's folder. Raises UserError if there is none, or it holds something else."""
    file = folder / "config.json"
    if not file.exists():
        if any((inside / "adapter_config.json").exists() for inside in (folder, folder / "adapter")):
            fix = "This folder holds an adapter: give its base as the model, and this folder as the adapter."
        elif (folder / "model" / "config.json").exists():
            fix = f"This is the folder of a run: give {folder / 'model'}."
        else:
            fix = "Give the folder that holds config.json and the safetensors files."
        raise UserError("no config.json here, so this is no model checkpoint", where=folder, fix=fix)
    config = read_json(file)
    if not isinstance(config, dict):
        raise UserError("does not hold settings", where=file)
    return config


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    not_a_folder = f"{name!r} is neither a folder here nor"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise UserError(f"{not_a_folder} a model id", where="model", fix="Check the path.") from None
    except GatedRepoError:
        fix = f"Accept its terms on https://huggingface.co/{name}, then log in with `hf auth login`."
        raise UserError("asks for its terms to be accepted first", where=name, fix=fix) from None
    except RevisionNotFoundError:
        raise UserError(f"has no revision {revision!r}", where=name) from None
    except RepositoryNotFoundError:
        fix = "Check the spelling; for a private model log in with `hf auth login`."
        raise UserError(f"{not_a_folder} a model on the hub", where="model", fix=fix) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        fix = f"Check the path, or the connection and HF_HUB_OFFLINE. ({type(error).__name__})"
        what = f"{not_a_folder} in the hub's cache, and the hub cannot be reached"
        raise UserError(what, where="model", fix=fix) from error
